"""Diffusion Policy's and UMI's replay buffers (Zarr v2, written by zarr), and imitation's npz: by hand."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from toy_files import npz

from cvlctl.data import formats
from cvlctl.data.formats import imitation, zarr_replay
from cvlctl.data.store import open_store
from cvlctl.data.units import units_of
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

Arrays = dict[str, Any]
pytestmark = pytest.mark.usefixtures("no_fsync")


def pusht() -> Arrays:
    """Nine rows of three episodes, whose state counts rows."""
    rows = np.arange(9, dtype=np.float32)
    return {"data/action": 100 * rows[:, None] * np.float32([0.5, 0.25]), "data/state": np.stack([rows, -rows], axis=1),
            "data/n_contacts": rows[:, None] % 2, "data/img": np.zeros((9, 4, 4, 3), np.uint8),
            "data/keypoint": np.zeros((9, 3, 2), np.float32), "meta/episode_ends": np.array([4, 5, 9])}  # fmt: skip


def umi() -> Arrays:
    rows = np.arange(9, dtype=np.float32)
    pose = {"eef_pos": rows[:, None] * np.float32([0.01, 0.02, 0.03]), "gripper_width": rows[:, None] / 100,
            "eef_rot_axis_angle": -rows[:, None] * np.float32([0.01, 0.02, 0.03])}  # fmt: skip
    return {f"data/robot0_{name}": values for name, values in pose.items()} | {
        "data/camera0_rgb": np.zeros((9, 4, 4, 3), np.uint8), "meta/episode_ends": np.array([4, 5, 9])
    }  # fmt: skip


def write(path: Path, arrays: Arrays, rows: int = 2, codec: Any = "blosc", **options: Any) -> Path:
    """As zarr writes its version 2, `rows` rows a chunk."""
    shutil.rmtree(path, ignore_errors=True)
    group = zarr.open_group(path, mode="w", zarr_format=2)
    compressor = numcodecs.Blosc("zstd") if codec == "blosc" else codec
    for name, values in arrays.items():
        chunks = (min(rows, len(values)), *values.shape[1:])
        array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks, compressors=compressor,
                                   **options)  # fmt: skip
        array[...] = values
    return path


def states(found: list[Episode], column: int = 0) -> list[list[float]]:
    return [episode.observations[:, column].tolist() for episode in found]


CODECS = {
    "blosc": numcodecs.Blosc("lz4"), "bitshuffle": numcodecs.Blosc("zstd", shuffle=2), "zstd": numcodecs.Zstd(),
    "lz4": numcodecs.LZ4(), "zlib": numcodecs.Zlib(), "gzip": numcodecs.GZip(), "none": None,
}  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
def test_diffusion_policys_buffer(tmp_path: Path, codec: str) -> None:
    path = write(tmp_path / "pusht.zarr", pusht(), codec=CODECS[codec])
    store = formats.import_store("zarr", path, tmp_path / "a.zarr", task="pusht", action_bounds=(0, 512))
    found = list(store.episodes())
    assert states(found, 1) == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert found[1].observations[0].tolist() == [1, 5, -5]  # n_contacts, state
    wanted = np.float32([[250, 125], [300, 150], [350, 175]]) / 256 - 1
    np.testing.assert_allclose(found[1].actions, wanted, atol=1e-6)
    assert [(e.terminated, e.rewards) for e in found] == [(False, None)] * 2
    units = units_of(store)
    assert list(units.observation_columns) == ["n_contacts", "state[0]", "state[1]"]
    assert list(units.dropped_columns) == ["img", "keypoint"]


def test_chunks_orders_and_zips_do_not_show(tmp_path: Path) -> None:
    wanted = list(zarr_replay.read(write(tmp_path / "a.zarr", pusht(), rows=100), action_bounds=(0, 512)))
    for rows, options in ((1, {}), (4, {"order": "F"}), (3, {"chunk_key_encoding": {"name": "v2", "separator": "/"}})):
        found = list(zarr_replay.read(write(tmp_path / "b.zarr", pusht(), rows, **options), action_bounds=(0, 512)))
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(a.observations, b.observations)
            np.testing.assert_array_equal(a.actions, b.actions)
    group = zarr.open_group(tmp_path / "a.zarr", mode="a")
    del group["data/state"]  # and in chunks of a column each
    group.create_array("data/state", shape=(9, 2), dtype="f4", chunks=(2, 1))[...] = pusht()["data/state"]
    assert states(list(zarr_replay.read(tmp_path / "a.zarr", action_bounds=(0, 512))), 2) == states(wanted, 2)
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w", method) as archive:
            for file in (tmp_path / "a.zarr").rglob("*"):
                archive.write(file, file.relative_to(tmp_path / "a.zarr"))
        zipped = list(zarr_replay.read(tmp_path / "a.zarr.zip", action_bounds=(0, 512)))
        assert states(zipped) == states(wanted)


def test_umi_has_the_next_pose_for_an_action(tmp_path: Path) -> None:
    for rows in (2, 100):
        store = formats.import_store(
            "zarr", write(tmp_path / "a.zarr", umi(), rows), tmp_path / "o.zarr", task="cup", force=True
        )
        found = list(store.episodes())
        assert [len(e) for e in found] == [3, 3]
        for start, episode in zip((0, 5), found, strict=True):
            k = np.arange(start + 1, start + 4, dtype=np.float32)[:, None]
            wanted = np.concatenate([k * [0.01, 0.02, 0.03], k * [-0.01, -0.02, -0.03], k / 100], axis=1)
            np.testing.assert_allclose(episode.actions, wanted, atol=1e-7)
        assert any("actions are the next row's robot0_eef_pos" in remark for remark in units_of(store).remarks)


def test_keys(tmp_path: Path) -> None:
    arrays = pusht() | {"data/solved": np.arange(9) == 3, "data/r": np.arange(9.0)}
    path = write(tmp_path / "a.zarr", arrays | {"data/end": np.arange(9) == 3})
    keys = {"actions": "n_contacts", "rewards": "r", "successes": "solved", "terminals": "end"}
    found = list(zarr_replay.read(path, keys=keys, observation_keys=["state"]))
    assert [(len(e), e.terminated) for e in found] == [(4, True), (3, False)]
    assert found[0].rewards is not None and found[0].rewards.tolist() == [0, 1, 2, 3]
    assert found[0].successes is not None and found[0].successes.tolist() == [False, False, False, True]


def zarray(name: str, **changes: Any) -> Callable[[Path], Any]:
    def work(path: Path) -> None:
        file = path / name / ".zarray"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return work


def chunk(content: bytes, name: str = "data/state/1.0") -> Callable[[Path], Any]:
    return lambda path: (path / name).write_bytes(content)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no ends": (lambda p: shutil.rmtree(p / "meta/episode_ends"), "no array 'meta/episode_ends'"),
    "no action": (lambda p: shutil.rmtree(p / "data/action"), "no data/action"),
    "ends of others": (lambda p: write(p, pusht() | {"meta/episode_ends": np.array([4, 5])}), "says 2 episodes"),
    "lengths": (lambda p: write(p, pusht() | {"data/action": np.zeros((4, 2), np.float32)}), "there are 4 rows"),
    "a chunk cut short": (chunk(b"\x02\x01\x21\x08"), "data/state: chunk 1.0: cannot be read"),
    "a chunk of nothing": (chunk(b""), "data/state: chunk 1.0: cannot be read"),
    "a chunk that says it is huge": (chunk(b"\x02\x01\x21\x08" + b"\xff\xff\xff\x7f" * 3), "it says that it has 2,147"),
    "a shape the rows cannot have": (zarray("data/state", shape=[10**12, 2]), "differ in their number of rows"),
    "a huge chunk": (zarray("data/state", chunks=[10**9, 2]), "chunks of shape .* are too large"),
    "no chunk": (zarray("data/state", chunks=[0, 2]), "shape .9, 2. in chunks of .0, 2."),
    "objects": (zarray("data/state", dtype="|O"), "data/state: holds objects, not numbers"),
    "records": (zarray("data/state", dtype=[["a", "<f4"]]), "data/state: holds records, not numbers"),
    "pickles": (zarray("data/state", compressor={"id": "pickle"}), "packed by 'pickle', which is not unpacked"),
    "lzma": (zarray("data/state", compressor={"id": "lzma"}), "packed by 'lzma', which is not unpacked"),
    "filters": (zarray("data/state", filters=[{"id": "pickle"}]), "filters, which are not read"),
    "json": (lambda p: (p / "data/state/.zarray").write_text("{"), "data/state/.zarray: cannot be read"),
    "a chunk less": (lambda p: [zarray("data/state", fill_value=None)(p), (p / "data/state/1.0").unlink()], "missing"),
    "actions too large": (lambda p: None, "outside .-1, 1."),
    "version 3": (lambda p: [shutil.rmtree(p), zarr.open_group(p, mode="w", zarr_format=3)], "is of Zarr's version 3"),
    "a climbing name": (lambda p: zarray("data/state", dimension_separator="/../../")(p), "in chunks of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_amiss_is_one_error_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    change, told = BAD[case]
    path = write(tmp_path / "in.zarr", pusht())
    change(path)
    bounds = None if case == "actions too large" else (0, 512)
    with pytest.raises(CvlctlError, match=told) as caught:
        formats.import_store("zarr", path, tmp_path / "x.zarr", task="toy", action_bounds=bounds)
    assert str(path) in caught.value.what
    assert [p.name for p in tmp_path.iterdir()] == ["in.zarr"]


def test_reading_takes_memory_for_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 40_000
    arrays = {"data/action": np.zeros((count, 2), np.float32), "data/state": np.zeros((count, 40), np.float32),
              "meta/episode_ends": np.arange(1, 81) * 500}  # fmt: skip
    path = write(tmp_path / "a.zarr", arrays, rows=2000)
    monkeypatch.setattr("cvlctl.data.formats.sources.BLOCK_BYTES", 2**16)
    monkeypatch.setattr("cvlctl.data.formats.cutting.BATCH_ROWS", 1000)
    tracemalloc.start()
    steps = sum(len(episode) for episode in zarr_replay.read(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps == 80 * 499
    assert peak < 3e6  # states alone are 6.4 MB


# ------------------------------------------------------------------------------------------------------------ imitation


class Bomb:
    """What a pickle would do on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def trajectories(**changes: Any) -> Arrays:
    made = {"obs": np.arange(12.0).reshape(12, 1), "acts": np.linspace(-1, 1, 9)[:, None], "rews": np.arange(9.0),
            "terminal": np.array([True, False, True]), "indices": np.array([2, 5]),
            "infos": np.array([Bomb()] * 9, dtype=object)}  # fmt: skip
    return {name: values for name, values in (made | changes).items() if values is not None}


def test_imitation(tmp_path: Path) -> None:
    store = formats.import_store("imitation", npz(tmp_path / "a.npz", trajectories()), tmp_path / "a.zarr", task="toy")
    found = list(store.episodes())
    assert states(found) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11]]
    assert [e.rewards.tolist() for e in found if e.rewards is not None] == [[0, 1], [2, 3, 4], [5, 6, 7, 8]]
    assert [e.terminated for e in found] == [True, False, True]
    limited = imitation.read(tmp_path / "a.npz", horizon=4)
    assert [e.terminated for e in limited] == [True, False, False]
    without = list(imitation.read(npz(tmp_path / "b.npz", trajectories(rews=None, infos=None, terminal=None))))
    assert [(e.rewards, e.terminated) for e in without] == [(None, False)] * 3
    assert open_store(tmp_path / "a.zarr").collected_at().tolist() == [0, 2, 5]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"indices": None}, "no array 'indices'"),
        ({"indices": np.array([2, 2])}, "episode 1 has 0 actions"),
        ({"indices": np.array([2])}, "9 actions and 12 observations, but 2 episodes"),
        ({"terminal": np.array([True])}, "terminated: has 1 values for 3 episodes"),
        ({"acts": np.zeros((9, 1), int)}, "discrete actions"),
        ({"obs": np.array([Bomb()] * 12, dtype=object)}, "obs: holds pickled"),
    ],
)
def test_an_imitation_file_that_is_amiss(tmp_path: Path, changes: Arrays, told: str) -> None:
    path = npz(tmp_path / "a.npz", trajectories(**changes))
    with pytest.raises(CvlctlError, match=rf"a\.npz.*{told}"):
        formats.import_store("imitation", path, tmp_path / "x.zarr", task="toy")
    assert not (tmp_path / "x.zarr").exists()
