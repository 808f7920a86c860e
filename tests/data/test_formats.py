"""Formats: round trips, every quirk of a layout on a hand-made file, the other projects' own readers, and bad files."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import io
import json
import re
import socket
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cvlctl import files
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import exchange, formats
from cvlctl.data.formats import cutting, d4rl_infos, fetching, sources
from cvlctl.data.formats.d4rl_files import FILES, Known
from cvlctl.data.store import Store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

WRITTEN = {"d4rl": "out.hdf5", "minari": "out-v0", "ogbench": "out.npz", "npz": "out.npz"}
Arrays = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """No power is lost in this process, and fsync is most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda _: None)
        patch.setattr(sources, "sync", lambda _: None)
        yield


def episodes(count: int = 5, **changes: Any) -> list[Episode]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = 1 + (5 * i) % 11
        parts: Arrays = {
            "observations": rng.normal(size=(length + 1, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (length, 2)), "rewards": rng.normal(size=length),
            "successes": rng.random(length) < 0.3, "terminated": i % 3 == 0, "task": "ab"[i % 2],
            "collected_at": 100 * i, "seed": i,
        }  # fmt: skip
        made.append(Episode(**(parts | changes)))
    return made


def rows(count: int = 5, dtype: type = np.float32) -> Arrays:
    """The arrays of D4RL's layout, of the same episodes."""
    made = episodes(count)
    last = [np.arange(len(e)) == len(e) - 1 for e in made]
    join = np.concatenate
    return {
        "observations": join([e.observations[:-1] for e in made]).astype(dtype),
        "next_observations": join([e.observations[1:] for e in made]).astype(dtype),
        "actions": join([e.actions for e in made]).astype(dtype),
        "rewards": join([e.rewards for e in made if e.rewards is not None]).astype(dtype),
        "terminals": join([end & e.terminated for e, end in zip(made, last, strict=True)]),
        "timeouts": join([end & (not e.terminated) for e, end in zip(made, last, strict=True)]),
    }


def hdf5(path: Path, arrays: Arrays, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def npz(path: Path, arrays: Arrays) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def read(format: str, path: Path, **options: Any) -> list[Episode]:
    return list(formats.FORMATS[format].read(path, **options))


def same(found: list[Episode], wanted: list[Episode], *names: str) -> None:
    assert [len(e) for e in found] == [len(e) for e in wanted]
    for a, b in zip(found, wanted, strict=True):
        for name in names or ("observations", "actions", "rewards", "terminated"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def same_store(a: Store, b: Store) -> None:
    assert a.digest() == b.digest()
    assert (a.spec, a.task, a.labels) == (b.spec, b.task, b.labels)
    for label in a.labels:
        assert a.label_digest(label) == b.label_digest(label)


# ---------------------------------------------------------------------------------------------------------- round trip


@st.composite
def episode_lists(draw: st.DrawFn) -> list[Episode]:
    pixels, rewards, successes = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    shape, actions = draw(st.sampled_from([(1,), (4,), (2, 3)])), draw(st.integers(1, 3))
    values, result = st.floats(-1e6, 1e6, width=32), []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 6))
        kind = {"dtype": np.uint8} if pixels else {"dtype": np.float32, "elements": values}
        result.append(
            Episode(
                draw(hnp.arrays(shape=(length + 1, *shape), **kind)),
                draw(hnp.arrays(np.float32, (length, actions), elements=st.floats(-1, 1, width=32))),
                draw(hnp.arrays(np.float32, length, elements=values)) if rewards else None,
                draw(hnp.arrays(bool, length)) if successes else None,
                draw(st.booleans()),
                draw(st.sampled_from(["", "a", "b/c", "../../ö 机器人"])),
                draw(st.integers(0, 2**40)),
                draw(st.integers(0, 2**31)),
            )
        )
    return result


@pytest.mark.parametrize("format", WRITTEN)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=episode_lists(), horizon=st.sampled_from([None, 50]))
def test_what_is_exported_and_imported_is_the_same_store(
    tmp_path: Path, format: str, made: list[Episode], horizon: int | None
) -> None:
    store = write_store(tmp_path / "a.zarr", made, task="../toy ö", horizon=horizon, force=True)
    out = formats.export_store(format, store, tmp_path / WRITTEN[format], force=True)
    back = formats.import_store(format, out, tmp_path / "b.zarr", force=True)
    same_store(back, store)


def test_a_label_of_another_name_is_exported_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy", label="mine")
    for format, name in WRITTEN.items():
        out = formats.export_store(format, store, tmp_path / format / name, label="mine")
        same_store(formats.import_store(format, out, tmp_path / f"{format}.zarr", label="mine"), store)
        bare = formats.export_store(format, store, tmp_path / f"bare-{format}" / name)  # has no label "given"
        assert formats.import_store(format, bare, tmp_path / f"bare-{format}.zarr").labels == []
        with pytest.raises(CvlctlError, match="no label 'x'"):
            formats.export_store(format, store, tmp_path / "x" / name, label="x")


def test_blocks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(9), task="toy")
    monkeypatch.setattr(sources, "BLOCK_BYTES", 50)
    monkeypatch.setattr(cutting, "BATCH_ROWS", 4)
    for format, name in WRITTEN.items():
        out = formats.export_store(format, store, tmp_path / format / name)
        same_store(formats.import_store(format, out, tmp_path / f"{format}.zarr"), store)


@pytest.mark.parametrize("format", ["d4rl", "ogbench", "npz"])
def test_reading_takes_memory_for_a_block_not_for_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    made = [Episode(np.zeros((501, 40)) + i, np.zeros((500, 4)), np.zeros(500)) for i in range(60)]
    out = formats.export_store(format, write_store(tmp_path / "a.zarr", made, task="toy"), tmp_path / WRITTEN[format])
    monkeypatch.setattr(sources, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(cutting, "BATCH_ROWS", 1000)
    tracemalloc.start()
    steps = sum(len(episode) for episode in formats.FORMATS[format].read(out))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert steps == 30_000
    assert peak < 2.5e6  # observations alone are 4.8 MB


# ---------------------------------------------------------------------------------------------------------------- D4RL


def test_d4rl_version_2(tmp_path: Path) -> None:
    found = read("d4rl", hdf5(tmp_path / "a.hdf5", rows() | {"infos/qpos": np.zeros((3, 1)), "metadata/seed": 1}))
    same(found, episodes())
    assert [e.collected_at for e in found] == [0, 1, 7, 18, 23]


def test_d4rl_float64_and_columns_of_width_one(tmp_path: Path) -> None:
    arrays = rows(dtype=np.float64)
    for name in ("rewards", "terminals", "timeouts"):
        arrays[name] = arrays[name][:, None].astype(np.float64)
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_d4rl_without_next_observations(tmp_path: Path) -> None:
    """Cut off: the last transition goes. Terminated: it stays, and the last observation stands in for the final one."""
    arrays = rows()
    del arrays["next_observations"]
    found, wanted = read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes()
    assert [(len(e), e.terminated) for e in wanted] == [(1, True), (6, False), (11, False), (5, True), (10, False)]
    assert [(len(e), e.terminated) for e in found] == [(1, True), (5, False), (10, False), (5, True), (9, False)]
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a.observations[: len(a)], b.observations[: len(a)])
        np.testing.assert_array_equal(a.actions, b.actions[: len(a)])
        final = b.observations[len(b) - 1]
        np.testing.assert_array_equal(a.observations[-1], final)


def test_d4rl_single_row_that_was_cut_off_leaves_nothing(tmp_path: Path) -> None:
    arrays = {"observations": np.eye(3), "actions": np.zeros((3, 1)), "rewards": np.arange(3.0),
              "terminals": np.zeros(3), "timeouts": np.array([1, 0, 1])}  # fmt: skip
    (found,) = read("d4rl", hdf5(tmp_path / "a.hdf5", arrays))
    assert found.rewards is not None
    assert (found.rewards.tolist(), found.collected_at) == ([1.0], 1)


def test_d4rl_terminals_win_over_timeouts_and_the_last_episode_may_be_unfinished(tmp_path: Path) -> None:
    arrays = rows()
    arrays["timeouts"] = arrays["timeouts"] | arrays["terminals"]
    arrays["timeouts"][-1] = False
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_d4rl_version_0_is_cut_at_the_horizon(tmp_path: Path) -> None:
    arrays = {"observations": np.arange(10.0)[:, None], "actions": np.zeros((10, 1)), "rewards": np.zeros(10),
              "terminals": np.arange(10) == 4}  # fmt: skip
    path = hdf5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(CvlctlError, match="timeouts") as caught:
        read("d4rl", path)
    assert "horizon" in caught.value.hint
    found = read("d4rl", path, horizon=3)  # rows 0-2, 3-4 (terminal), 5-7, 8-9
    assert [e.observations[:, 0].tolist() for e in found] == [[0, 1, 2], [3, 4, 4], [5, 6, 7], [8, 9]]
    assert [e.terminated for e in found] == [False, True, False, False]
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", horizon=3)
    assert store.spec.horizon == 3


def test_resets_that_nothing_marks_are_found_by_the_next_observations(tmp_path: Path) -> None:
    arrays = rows()
    del arrays["timeouts"]
    same(read("d4rl", hdf5(tmp_path / "a.hdf5", arrays)), episodes())


def test_shuffled_rows_are_refused(tmp_path: Path) -> None:
    arrays = rows(20)
    order = np.random.default_rng(1).permutation(len(arrays["actions"]))
    path = hdf5(tmp_path / "a.hdf5", {name: values[order] for name, values in arrays.items()})
    with pytest.raises(CvlctlError, match=r"a\.hdf5.* the next row does not go on"):
        read("d4rl", path)


def plain_qlearning(data: Arrays) -> Arrays:
    """What D4RL documents of `qlearning_dataset`: pairs of rows, those of a timeout and the last left out."""
    kept = ~data["timeouts"][:-1].astype(bool)
    found = {name: data[name][:-1][kept] for name in ("observations", "actions", "rewards", "terminals")}
    return found | {"next_observations": data["observations"][1:][kept]}


def datasets(path: Path) -> Arrays:
    found: Arrays = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: found.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None)
    return found


def package_functions(package: str, file: str, *names: str) -> dict[str, Callable[..., Any]]:
    """Functions of an installed package, without importing it: what it pulls in may crash, and is not needed."""
    try:
        source = Path(str(importlib.metadata.distribution(package).locate_file(file))).read_text()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    module = ast.parse(source)
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name in names]
    import collections

    space: dict[str, Any] = {"np": np, "collections": collections}
    exec(compile(module, file, "exec"), space)
    return {name: space[name] for name in names}


@pytest.mark.parametrize("own", [False, True], ids=["as documented", "d4rl's own code"])
def test_d4rl_reads_our_file_as_we_meant_it(tmp_path: Path, own: bool) -> None:
    made = episodes(9)
    store = write_store(tmp_path / "a.zarr", made, task="toy")
    data = datasets(formats.export_store("d4rl", store, tmp_path / "a.hdf5"))
    if own:
        functions = package_functions("d4rl", "d4rl/__init__.py", "qlearning_dataset", "sequence_dataset")
        found = functions["qlearning_dataset"](None, dataset=dict(data))
        sequences = list(functions["sequence_dataset"](None, dataset=dict(data)))
        assert [len(s["actions"]) for s in sequences] == [len(e) for e in made]
        for sequence, episode in zip(sequences, made, strict=True):
            np.testing.assert_array_equal(sequence["observations"], episode.observations[:-1])
            np.testing.assert_array_equal(sequence["rewards"], episode.rewards)
            assert bool(sequence["terminals"][-1]) == episode.terminated
    else:
        found = plain_qlearning(data)
    # all transitions but the last one of each episode that was cut off, and the last of all
    kept = [len(e) if e.terminated else len(e) - 1 for e in made]
    kept[-1] = len(made[-1]) - 1
    for name in ("actions", "rewards", "observations"):
        wanted = np.concatenate([getattr(e, name)[:n] for e, n in zip(made, kept, strict=True)])
        np.testing.assert_array_equal(found[name], wanted)
    alive = ~found["terminals"].astype(bool)
    wanted = np.concatenate([e.observations[1 : n + 1] for e, n in zip(made, kept, strict=True)])
    np.testing.assert_array_equal(found["next_observations"][alive], wanted[alive])
    assert found["terminals"].sum() == sum(e.terminated for e in made[:-1])


# -------------------------------------------------------------------------------------------------------------- Minari


def minari_folder(folder: Path, made: list[Arrays], **metadata: Any) -> Path:
    """A dataset as Minari lays it out."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number, arrays in enumerate(made):
            group = file.create_group(f"episode_{number}")
            group.attrs["seed"] = 7 + number
            for name, values in arrays.items():
                group[name] = values
    about = {"total_episodes": len(made), "total_steps": sum(len(a["actions"]) for a in made), "data_format": "hdf5",
             "dataset_id": "some/set-v0", "minari_version": "0.5.4"}  # fmt: skip
    (folder / "data" / "metadata.json").write_text(json.dumps(about | metadata))
    return folder


def minari_episode(length: int = 4, **changes: Any) -> Arrays:
    rng, last = np.random.default_rng(length), np.arange(length) == length - 1
    arrays = {"observations": rng.normal(size=(length + 1, 2)), "actions": rng.uniform(-1, 1, (length, 1)),
              "rewards": np.arange(length, dtype=np.float64), "terminations": last, "truncations": ~last}  # fmt: skip
    return arrays | changes


def test_minari_environment_dict_observations_and_bounds(tmp_path: Path) -> None:
    first = minari_episode(3, actions=np.array([[-2.0], [0.0], [2.0]]))
    del first["observations"]
    first |= {"observations/goal": np.full((4, 1), 5.0), "observations/achieved/x": np.arange(8.0).reshape(4, 2)}
    box = {"type": "Box", "dtype": "float32", "shape": [1], "low": [-2.0], "high": [2.0]}
    env = {"id": "Toy-v3", "max_episode_steps": 50}
    folder = minari_folder(tmp_path / "m", [first], action_space=json.dumps(box), env_spec=json.dumps(env))
    store = formats.import_store("minari", folder, tmp_path / "m.zarr")
    assert (store.task, store.spec.horizon, store.spec.observation_shape) == ("gym/Toy-v3", 50, (3,))
    (found,) = store.episodes()
    assert found.actions[:, 0].tolist() == [-1, 0, 1]
    assert found.observations[1].tolist() == [2, 3, 5]  # achieved/x, goal
    assert (found.seed, found.terminated) == (7, True)
    assert store.provenance["source"]["action_bounds"] == [[-2.0], [2.0]]
    (chosen,) = read("minari", folder, observation_keys=["goal"])
    assert chosen.observations.shape == (4, 1)
    with pytest.raises(CvlctlError, match="no observation 'gaol'"):
        read("minari", folder, observation_keys=["gaol"])


def test_minari_images_coded_as_jpeg(tmp_path: Path) -> None:
    from PIL import Image

    def jpeg(level: int) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(np.full((32, 40, 3), level, np.uint8)).save(buffer, format="JPEG")
        return np.frombuffer(buffer.getvalue(), np.uint8)

    space = {"type": "Box", "dtype": "uint8", "shape": [32, 40, 3], "low": 0, "high": 255}
    for levels in ((100, 100, 100), (0, 100, 200)):  # those of unlike size are kept as ragged rows
        coded = [jpeg(level) for level in levels]
        frames: Any = np.empty(3, object)
        frames[:] = coded
        frames = np.stack(coded) if len(set(levels)) == 1 else frames.astype(h5py.vlen_dtype(np.uint8))
        folder = minari_folder(
            tmp_path / str(levels), [minari_episode(2, observations=frames)], observation_space=json.dumps(space)
        )
        (found,) = read("minari", folder)
        assert found.observations.shape == (3, 32, 40, 3)
        assert tuple(found.observations[:, 5, 5, 0].tolist()) == levels


def test_minari_opens_our_folder_and_we_open_its(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("minari")
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    made = episodes()
    store = write_store(tmp_path / "a.zarr", made, task="gym/Hopper-v5")
    formats.export_store("minari", store, tmp_path / "root" / "mine" / "toy-v2")
    assert list(package.list_local_datasets()) == ["mine/toy-v2"]
    dataset = package.load_dataset("mine/toy-v2")
    assert (dataset.total_episodes, dataset.total_steps) == (store.num_episodes, store.num_transitions)
    assert dataset.env_spec.id == "Hopper-v5"
    for theirs, ours in zip(dataset.iterate_episodes(), made, strict=True):
        np.testing.assert_array_equal(theirs.observations, ours.observations)
        np.testing.assert_array_equal(theirs.actions, ours.actions)
        np.testing.assert_array_equal(theirs.rewards, ours.rewards)
        assert (theirs.terminations[-1], theirs.truncations[-1]) == (ours.terminated, not ours.terminated)
        assert theirs.infos["success"].shape == theirs.observations.shape[:1]
    buffers = [
        EpisodeBuffer(
            id=None, seed=e.seed, observations=e.observations, actions=e.actions, rewards=list(e.rewards),
            terminations=[False] * (len(e) - 1) + [e.terminated], infos={},
            truncations=[False] * (len(e) - 1) + [not e.terminated],
        ) for e in made if e.rewards is not None
    ]  # fmt: skip
    package.create_dataset_from_buffers(
        "their/toy-v0", buffers, observation_space=Box(-9, 9, (3,)), action_space=Box(-1, 1, (2,))
    )
    found = formats.import_store("minari", tmp_path / "root" / "their" / "toy-v0", tmp_path / "b.zarr")
    same(list(found.episodes()), made, "observations", "actions", "rewards", "terminated", "seed")
    assert found.task == "their/toy-v0"


def test_minari_names_that_it_could_not_open_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    for name in ("toy", "tö y-v0", "toy-vx"):
        with pytest.raises(CvlctlError, match="no name that Minari could open"):
            formats.export_store("minari", store, tmp_path / name)
        assert not (tmp_path / name).exists()
    formats.export_store("minari", store, tmp_path / "elsewhere" / "toy-v1")
    metadata = json.loads((tmp_path / "elsewhere" / "toy-v1" / "data" / "metadata.json").read_text())
    assert metadata["dataset_id"] == "toy-v1"


# ------------------------------------------------------------------------------------------------------------- OGBench


def test_ogbench_by_hand(tmp_path: Path) -> None:
    arrays = {
        "observations": np.arange(7.0)[:, None], "actions": np.linspace(-1, 1, 7)[:, None],
        "terminals": np.array([0, 0, 1, 0, 0, 0, 1], np.float32), "qpos": np.zeros((7, 2)),
    }  # fmt: skip
    found = read("ogbench", npz(tmp_path / "a.npz", arrays))
    assert [e.observations[:, 0].tolist() for e in found] == [[0, 1, 2], [3, 4, 5, 6]]
    assert [len(e) for e in found] == [2, 3]
    assert [(e.rewards, e.terminated, e.collected_at) for e in found] == [(None, False, 0), (None, False, 2)]


@pytest.mark.parametrize("own", [False, True], ids=["as documented", "ogbench's own code"])
def test_ogbench_reads_our_file_as_we_meant_it(tmp_path: Path, own: bool) -> None:
    made = episodes()
    path = formats.export_store("ogbench", write_store(tmp_path / "a.zarr", made, task="toy"), tmp_path / "a.npz")
    if own:
        found = package_functions("ogbench", "ogbench/utils.py", "load_dataset")["load_dataset"](str(path))
    else:
        with np.load(path, allow_pickle=False) as file:
            row = np.flatnonzero(file["terminals"] == 0)  # the last row of a trajectory starts no transition
            found = {"observations": file["observations"][row], "actions": file["actions"][row],
                     "next_observations": file["observations"][row + 1]}  # fmt: skip
    np.testing.assert_array_equal(found["observations"], np.concatenate([e.observations[:-1] for e in made]))
    np.testing.assert_array_equal(found["next_observations"], np.concatenate([e.observations[1:] for e in made]))
    np.testing.assert_array_equal(found["actions"], np.concatenate([e.actions for e in made]))


# ------------------------------------------------------------------------------------- robomimic, SB3, rows of your own


def robomimic_file(path: Path, count: int = 11, **changes: Any) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for i in range(count):
            rng, last = np.random.default_rng(i), np.arange(i + 2) == i + 1
            states = rng.normal(size=(i + 3, 5))
            arrays = {
                "actions": rng.uniform(-1, 1, (i + 2, 2)), "rewards": last.astype(float), "dones": last * (i % 2),
                "obs/b": states[:-1, :3], "obs/a": states[:-1, 3:], "next_obs/b": states[1:, :3],
                "next_obs/a": states[1:, 3:], "obs/image": np.full((i + 2, 8, 9, 3), i, np.uint8),
                "next_obs/image": np.full((i + 2, 8, 9, 3), i + 1, np.uint8), "states": states[:-1],
            }  # fmt: skip
            for name, values in (arrays | changes).items():
                if values is not None:
                    data[f"demo_{i}/{name}"] = values
    return path


def test_robomimic(tmp_path: Path) -> None:
    path = robomimic_file(tmp_path / "low_dim.hdf5")
    store = formats.import_store("robomimic", path, tmp_path / "a.zarr")
    assert store.task == "Lift"
    assert store.provenance["source"]["env_args"]["type"] == 1
    assert store.lengths().tolist() == list(range(2, 13))  # demo_10 after demo_9
    for i, episode in enumerate(store.episodes()):
        states = np.random.default_rng(i).normal(size=(i + 3, 5)).astype(np.float32)
        np.testing.assert_array_equal(episode.observations, np.concatenate([states[:, 3:], states[:, :3]], axis=1))
        assert episode.terminated == bool(i % 2)
    pixels = read("robomimic", path, observation_keys=["image"])
    assert pixels[3].observations.shape == (6, 8, 9, 3)
    assert (pixels[3].observations.dtype, pixels[3].observations[-1].max()) == (np.uint8, 4)
    with pytest.raises(CvlctlError, match="an image does not join"):
        read("robomimic", path, observation_keys=["a", "image"])


def test_robomimic_without_next_obs_or_observations(tmp_path: Path) -> None:
    none = dict.fromkeys(["next_obs/a", "next_obs/b", "next_obs/image"])
    found = read("robomimic", robomimic_file(tmp_path / "a.hdf5", 3, **none))
    assert [(len(e), e.terminated) for e in found] == [(1, False), (3, True), (3, False)]
    none |= dict.fromkeys(["obs/a", "obs/b", "obs/image"])
    with pytest.raises(CvlctlError, match="no observations") as caught:
        read("robomimic", robomimic_file(tmp_path / "b.hdf5", 3, **none))
    assert "dataset_states_to_obs" in caught.value.hint


def sb3_arrays(steps: int = 12, width: int = 2) -> Arrays:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(steps + 1, width, 3))
    clock = np.arange(steps)[:, None] * np.ones((1, width), int)
    arrays = {"observations": states[:-1].copy(), "next_observations": states[1:].copy(),
              "actions": rng.uniform(-1, 1, (steps, width, 2)), "rewards": rng.normal(size=(steps, width)),
              "dones": (clock % 5 == 4).astype(np.float32), "timeouts": (clock == 9).astype(np.float32)}  # fmt: skip
    after_a_reset = rng.normal(size=(steps, width, 3))
    ends = arrays["dones"][:-1] == 1
    arrays["observations"][1:][ends] = after_a_reset[1:][ends]
    return arrays


def test_sb3_environments_side_by_side(tmp_path: Path) -> None:
    arrays = sb3_arrays()
    found = read("sb3", npz(tmp_path / "a.npz", arrays))
    assert [(len(e), e.terminated, e.collected_at) for e in found] == [
        (5, True, 0), (5, False, 10), (2, False, 20), (5, True, 1), (5, False, 11), (2, False, 21)
    ]  # fmt: skip
    np.testing.assert_array_equal(found[4].actions, arrays["actions"][5:10, 1].astype(np.float32))
    np.testing.assert_array_equal(found[4].observations[-1], arrays["next_observations"][9, 1].astype(np.float32))


def test_sb3_buffer_saved_by_the_lines_in_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "replay_buffer" in block]
    monkeypatch.chdir(tmp_path)
    model = sb3.SAC("MlpPolicy", "Pendulum-v1", buffer_size=450, learning_starts=10**6, device="cpu", seed=0)
    model.learn(700)  # random actions: the buffer has come round, and begins within the second episode
    exec(code, {"model": model})
    found = read("sb3", tmp_path / "replay.npz")
    assert [(len(e), e.terminated) for e in found] == [(150, False), (200, False), (100, False)]
    buffer = model.replay_buffer
    at = (buffer.pos + 150) % buffer.buffer_size
    np.testing.assert_array_equal(found[1].observations[0], buffer.observations[at, 0])
    assert np.concatenate([e.actions for e in found]).min() < -0.9


@pytest.mark.parametrize("write", [npz, hdf5])
def test_arrays_of_your_own(tmp_path: Path, write: Callable[[Path, Arrays], Path]) -> None:
    ours = rows()
    keys = {"observations": "log/state" if write is hdf5 else "state", "actions": "cmd", "terminals": "fell"}
    arrays = {keys.get(name, name): values for name, values in ours.items()}
    path = write(tmp_path / ("a.npz" if write is npz else "a.h5"), arrays | {"successes": ours["rewards"] > 0})
    store = formats.import_store("arrays", path, tmp_path / "a.zarr", task="robot", keys=keys)
    found = list(store.episodes())
    same(found, episodes())
    assert found[1].successes is not None
    assert found[1].rewards is not None
    assert found[1].successes.tolist() == (found[1].rewards > 0).tolist()
    assert store.provenance["source"]["options"]["keys"] == keys
    with pytest.raises(CvlctlError, match="no array 'stat'"):
        read("arrays", path, keys=keys | {"observations": "stat"})
    with pytest.raises(CvlctlError, match="no array 'action'") as caught:
        read("arrays", path, keys={"action": "cmd"})
    assert "did you mean actions?" in caught.value.hint


# ------------------------------------------------------------------------------------------------------------- actions


def test_actions_are_scaled_clipped_or_refused(tmp_path: Path) -> None:
    arrays = rows()
    arrays["actions"] = arrays["actions"] * np.float32([2, 10])
    path = hdf5(tmp_path / "a.hdf5", arrays)
    with pytest.raises(CvlctlError, match=r"a\.hdf5: episode 0 \(rows 0-0\): actions lie in .* outside") as caught:
        read("d4rl", path)
    assert "--action-bounds" in caught.value.hint
    scaled = read("d4rl", path, action_bounds=([-2, -10], [2, 10]))
    for a, b in zip(scaled, episodes(), strict=True):
        np.testing.assert_allclose(a.actions, b.actions, atol=1e-6)
    assert max(np.abs(e.actions).max() for e in read("d4rl", path, clip_actions=True)) == 1.0
    for wrong in ((1, 0), (0, np.nan), (0, [1, 2, 3]), (1,), "ab"):
        with pytest.raises(CvlctlError, match="action_bounds"):
            read("d4rl", path, action_bounds=wrong)


def test_actions_beyond_by_rounding_are_cut_off(tmp_path: Path) -> None:
    arrays = rows()
    arrays["actions"][0] = 1.000001
    assert read("d4rl", hdf5(tmp_path / "a.hdf5", arrays))[0].actions.max() == 1.0


# ------------------------------------------------------------------------------------------------------------ bad files


class Bomb:
    """What a pickle would do on loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


def nan_at(values: np.ndarray, row: int) -> np.ndarray:
    values = values.astype(float)
    values[row] = np.nan
    return values


def plain(count: int = 5) -> Arrays:
    made = episodes(count)
    return {
        "observations": np.concatenate([e.observations for e in made]),
        "actions": np.concatenate([e.actions for e in made]), "rewards": rows(count)["rewards"],
        "episode_ends": np.cumsum([len(e) for e in made]),
    }  # fmt: skip


def changed(arrays: Arrays, **changes: Any) -> Arrays:
    return {name: values for name, values in (arrays | changes).items() if values is not None}


OBJECTS = np.array([Bomb()] * 33, dtype=object)
WORDS = np.array([b"x"] * 33)
BAD: dict[str, tuple[str, Callable[[], Arrays], str]] = {
    "d4rl: no rewards": ("d4rl", lambda: changed(rows(), rewards=None), "no array 'rewards'"),
    "d4rl: lengths": ("d4rl", lambda: changed(rows(), rewards=np.zeros(7)), "rewards 7"),
    "d4rl: NaN": ("d4rl", lambda: changed(rows(), rewards=nan_at(rows()["rewards"], 4)), "rows 1-6.*rewards hold NaN"),
    "d4rl: NaN terminal": ("d4rl", lambda: changed(rows(), terminals=nan_at(rows()["terminals"], 4)), "terminals.*NaN"),
    "d4rl: words": ("d4rl", lambda: changed(rows(), actions=WORDS), "actions: holds text"),
    "d4rl: complex": ("d4rl", lambda: changed(rows(), actions=np.zeros((33, 2), complex)), "actions: holds complex"),
    "d4rl: nothing": ("d4rl", lambda: {k: v[:0] for k, v in rows().items()}, "no episodes"),
    "d4rl: empty rows": ("d4rl", lambda: changed(rows(), actions=np.zeros((33, 0))), "actions: rows of shape"),
    "d4rl: wide rewards": ("d4rl", lambda: changed(rows(), rewards=np.zeros((33, 2))), r"rewards: has shape \(N, 2\)"),
    "d4rl: next (N, 4)": ("d4rl", lambda: changed(rows(), next_observations=np.zeros((33, 4))), "next_observations"),
    "d4rl: scalar": ("d4rl", lambda: changed(rows(), rewards=1.0), "rewards: is a single value"),
    "d4rl: too large for float32": (
        "d4rl", lambda: changed(rows(), rewards=np.full(33, 1e300)), "episode 0.*rewards hold NaN or infinity"
    ),
    "d4rl: discrete actions": ("d4rl", lambda: changed(rows(), actions=np.ones(33, int)), "actions have shape"),
    "npz: pickle": ("npz", lambda: changed(plain(), actions=OBJECTS), "actions: holds pickled Python objects"),
    "npz: pickled task": ("npz", lambda: changed(plain(), task=OBJECTS), "task: holds pickled"),
    "npz: no ends": ("npz", lambda: changed(plain(), episode_ends=None), "no array 'episode_ends'"),
    "npz: ends too far": ("npz", lambda: changed(plain(), episode_ends=[1, 99]), "episode_ends"),
    "npz: ends backwards": ("npz", lambda: changed(plain(), episode_ends=[1, 7, 5, 23, 33]), "episode 2 has -2"),
    "npz: an empty episode": (
        "npz",
        lambda: changed(plain(4), episode_ends=[1, 7, 7, 18, 23], observations=np.zeros((28, 3))),
        "episode 2 has 0",
    ),
    "npz: ends as floats": ("npz", lambda: changed(plain(), episode_ends=[1.0, 33.0]), "episode_ends: holds float64"),
    "npz: none": ("npz", lambda: {k: v[:0] for k, v in plain().items()}, "0 episodes"),
    "npz: table too short": ("npz", lambda: changed(plain(), terminated=[True]), "terminated: has 1 values"),
    "npz: task is a number": ("npz", lambda: changed(plain(), task=3), "task: holds values of type int64"),
    "npz: NaN": ("npz", lambda: changed(plain(), observations=nan_at(plain()["observations"], 3)), "episode 1: .*NaN"),
    "npz: huge action": ("npz", lambda: changed(plain(), actions=plain()["actions"] * 9), "episode 0: actions lie in"),
    "ogbench: empty episode": (
        "ogbench",
        lambda: {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "terminals": [0, 1, 1, 0]},
        r"episode 1 \(rows 2-2\) has no transition",
    ),
    "ogbench: table of others": (
        "ogbench",
        lambda: {"observations": np.zeros((4, 2)), "actions": np.zeros((4, 1)), "terminals": [0, 1, 0, 1],
                 "seeds": [1, 2, 3]},
        "seeds: has 3 values for 2 episodes",
    ),
    "sb3: no environments": ("sb3", lambda: {k: v[:, 0] for k, v in sb3_arrays().items()}, "expected .N, environments"),
    "sb3: no timeouts": ("sb3", lambda: changed(sb3_arrays(), timeouts=None), "no array 'timeouts'"),
    "arrays: lengths": ("arrays", lambda: changed(rows(), actions=np.zeros((3, 2))), "actions 3"),
    "arrays: nothing that ends": (
        "arrays", lambda: changed(rows(), timeouts=None, next_observations=None), "neither timeouts"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_error_that_names_file_and_array_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    format, make, message = BAD[case]
    made = make()
    if format in ("d4rl", "arrays"):
        path = hdf5(tmp_path / "bäd $(x).hdf5", made)
    else:
        path = npz(tmp_path / "bäd $(x).npz", {name: np.asarray(values) for name, values in made.items()})
    with pytest.raises(CvlctlError, match=rf"bäd \$\(x\).*{message}"):
        formats.import_store(format, path, tmp_path / "out.zarr", task="toy")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


MINARI_BAD: dict[str, tuple[Arrays, Arrays, str]] = {
    "empty episode": (minari_episode(4, **{k: v[:0] for k, v in minari_episode(4).items()}), {}, r"actions have shape"),
    "no truncations needed, no terminations": ({"actions": np.zeros((2, 1))}, {}, "episode_1/rewards.*missing"),
    "lengths": (minari_episode(4, rewards=np.zeros(3)), {}, "rewards 3"),
    "observations": (minari_episode(4, observations=np.zeros((4, 2))), {}, "observations of shape"),
    "discrete": (minari_episode(4, actions=np.zeros(4, int)), {}, "episode_1/actions: int64"),
    "NaN": (minari_episode(4, rewards=np.full(4, np.nan)), {}, "episode_1: .*rewards hold NaN"),
    "counts": (minari_episode(), {"total_episodes": 10**15}, "has 2 episodes"),
    "format": (minari_episode(), {"data_format": "arrow"}, "not of an HDF5 dataset"),
    "discrete space": (minari_episode(), {"action_space": '{"type": "Discrete", "n": 3}'}, "Discrete space"),
    "metadata": (minari_episode(), {"total_steps": "many"}, "metadata.json"),
    "names": (minari_episode(), {"env_spec": "{"}, "metadata.json"),
}


@pytest.mark.parametrize("case", MINARI_BAD)
def test_bad_minari_datasets(tmp_path: Path, case: str) -> None:
    arrays, metadata, message = MINARI_BAD[case]
    folder = minari_folder(tmp_path / "bad", [minari_episode(), arrays], **metadata)
    with pytest.raises(CvlctlError, match=f"bad/data/.*{message}"):
        formats.import_store("minari", folder, tmp_path / "out.zarr", task="toy")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("format", [*WRITTEN, "robomimic", "sb3", "arrays"])
def test_cut_short_or_of_another_kind(tmp_path: Path, format: str) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    if format in WRITTEN:
        path = formats.export_store(format, store, tmp_path / WRITTEN[format])
        path = path / "data" / "main_data.hdf5" if path.is_dir() else path
    else:
        path = robomimic_file(tmp_path / "r.hdf5") if format == "robomimic" else npz(tmp_path / "r.npz", sb3_arrays())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-30], b"", b"PK\x03\x04", b"not a file of arrays" * 50):
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(CvlctlError, match=re.escape(str(path))):
            formats.import_store(format, path, tmp_path / "b.zarr", task="toy")
    assert not list(tmp_path.glob("b.zarr*"))


def test_shapes_that_a_file_cannot_hold_are_not_believed(tmp_path: Path) -> None:
    huge = (10**12, 3)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        for name in ("observations", "actions", "next_observations"):
            file.create_dataset(name, huge, np.float32, chunks=(1000, 3), compression="gzip")
        for name in ("rewards", "terminals", "timeouts"):
            file.create_dataset(name, huge[:1], np.float32, chunks=(1000,), compression="gzip")
    with pytest.raises(CvlctlError, match="observations: holds less than its shape"):
        read("d4rl", tmp_path / "a.hdf5")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": huge})
    npz(tmp_path / "a.npz", plain())
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as out, zipfile.ZipFile(tmp_path / "a.npz") as source:
        for name in source.namelist():
            out.writestr(name, buffer.getvalue() if name == "actions.npy" else source.read(name))
    with pytest.raises(CvlctlError, match="actions: holds less than its shape"):
        read("npz", tmp_path / "b.npz")


def test_data_in_other_files_are_not_followed(tmp_path: Path) -> None:
    secret = hdf5(tmp_path / "secret.hdf5", rows())
    arrays = rows()
    actions = arrays.pop("actions")
    for name in ("link", "external", "virtual"):
        path = hdf5(tmp_path / f"{name}.hdf5", arrays)
        with h5py.File(path, "a") as file:
            if name == "link":
                file["actions"] = h5py.ExternalLink(str(secret), "/actions")
            elif name == "external":
                file.create_dataset("actions", actions.shape, actions.dtype, external=[(str(secret), 0, 10**6)])
            else:
                layout = h5py.VirtualLayout(actions.shape, actions.dtype)
                layout[:] = h5py.VirtualSource(str(secret), "actions", actions.shape)
                file.create_virtual_dataset("actions", layout)
        with pytest.raises(CvlctlError, match=r"no array 'actions'|actions: lies in another file"):
            read("d4rl", path)


def test_names_that_would_climb_out_are_only_names(tmp_path: Path) -> None:
    with zipfile.ZipFile(npz(tmp_path / "a.npz", plain()), "a") as file:
        file.writestr("../../climbed.npy", b"x")
    inside = {p.name for p in tmp_path.parent.iterdir()}
    store = formats.import_store("npz", tmp_path / "a.npz", tmp_path / "a.zarr", task="../../etc/ö")
    assert store.task == "../../etc/ö"
    assert {p.name for p in tmp_path.parent.iterdir()} == inside
    assert verify_store(store.path) == []


# ------------------------------------------------------------------------------------------------- import_store, export


def test_provenance_and_the_progress_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(formats.Progress, "update", lambda self, done, text="": seen.append((done, self.total)))
    path = hdf5(tmp_path / "a.hdf5", rows())
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", command="cvlctl data import ...")
    assert seen == [(1, 33), (7, 33), (18, 33), (23, 33), (33, 33)]
    assert store.provenance["command"] == "cvlctl data import ..."
    assert store.provenance["source"] == {
        "format": "d4rl", "file": str(path), "bytes": path.stat().st_size, "sha256": files.sha256(path), "options": {}
    }  # fmt: skip


def test_what_import_and_export_refuse(tmp_path: Path) -> None:
    path = hdf5(tmp_path / "hopper.hdf5", rows())
    store = formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy")
    digest = store.digest()
    with pytest.raises(CvlctlError, match="no format 'd4lr'") as caught:
        formats.import_store("d4lr", path, tmp_path / "b.zarr", task="toy")
    assert caught.value.hint == "did you mean d4rl?"
    with pytest.raises(CvlctlError, match="no option 'clip'"):
        formats.import_store("d4rl", path, tmp_path / "b.zarr", task="toy", clip=True)
    with pytest.raises(CvlctlError, match=r"nothing at .*hoper\.hdf5") as caught:
        formats.import_store("d4rl", tmp_path / "hoper.hdf5", tmp_path / "b.zarr", task="toy")
    assert "hopper.hdf5" in caught.value.hint
    with pytest.raises(CvlctlError, match="does not say which task"):
        formats.import_store("d4rl", path, tmp_path / "b.zarr")
    with pytest.raises(CvlctlError, match="exists"):
        formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy")
    bad = hdf5(tmp_path / "bad.hdf5", changed(rows(), rewards=np.full(33, np.nan)))
    with pytest.raises(CvlctlError, match="NaN"):
        formats.import_store("d4rl", bad, tmp_path / "a.zarr", task="toy", force=True)
    assert formats.import_store("d4rl", path, tmp_path / "a.zarr", task="toy", force=True).digest() == digest
    with pytest.raises(CvlctlError, match="not written as robomimic"):
        formats.export_store("robomimic", store, tmp_path / "x.hdf5")
    with pytest.raises(CvlctlError, match="exists"):
        formats.export_store("d4rl", store, path)
    (tmp_path / "folder-v0").mkdir()
    (tmp_path / "folder-v0" / "precious").write_text("x")
    for format in WRITTEN:
        with pytest.raises(CvlctlError, match="is a directory"):
            formats.export_store(format, store, tmp_path / "folder-v0", force=True)
    assert (tmp_path / "folder-v0" / "precious").exists()


@pytest.mark.parametrize("format", WRITTEN)
def test_an_export_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    store = write_store(tmp_path / "a.zarr", episodes(), task="toy")
    out = formats.export_store(format, store, tmp_path / "out" / WRITTEN[format])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sources, "sync", full)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(CvlctlError, match="No space left"):
        formats.export_store(format, store, out, force=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_options_of_every_format_are_named() -> None:
    assert formats.options_of("d4rl") == ["horizon", "action_bounds", "clip_actions"]
    assert formats.options_of("arrays") == ["keys", "horizon", "action_bounds", "clip_actions"]
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    for name, entry in formats.FORMATS.items():
        (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.rstrip("| ").endswith(("yes", ")")) == (entry.write is not None) or line.count("yes") == 1
        assert (line.count("yes") == 2) == (entry.write is not None)


# ------------------------------------------------------------------------------------------------- D4RL's infos, fetch


def test_the_table_is_what_the_installed_package_says() -> None:
    infos = d4rl_infos.package()
    if infos is None:
        pytest.skip("d4rl is not installed")
    for name, dataset in d4rl_infos.table().items():
        assert dataset.url == infos["DATASET_URLS"][name]
        assert (dataset.min, dataset.max) == (infos["REF_MIN_SCORE"][name], infos["REF_MAX_SCORE"][name])


def test_references_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(d4rl_infos, "package", lambda: None)
    assert d4rl_infos.references("hopper-medium-v2") == (-20.272305, 3234.3)
    assert d4rl_infos.references("hopper-medium-v9") is None
    assert d4rl_infos.urls()["hopper-medium-replay-v2"].endswith("/gym_mujoco_v2/hopper_medium_replay-v2.hdf5")
    assert len(d4rl_infos.table()) == 48 + 12 + 6 + 6 + 3


def test_references_of_a_package_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d4rl").mkdir()
    (tmp_path / "d4rl" / "__init__.py").write_text("raise Exception('needs mujoco-py')")
    tables = "DATASET_URLS = {'a-v0': 'http://x/a.hdf5'}\nREF_MIN_SCORE = {'a-v0': 1}\nREF_MAX_SCORE = {'a-v0': 2}\n"
    (tmp_path / "d4rl" / "infos.py").write_text(tables)
    (tmp_path / "d4rl-1.1.dist-info").mkdir()
    (tmp_path / "d4rl-1.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: d4rl\nVersion: 1.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    d4rl_infos.package.cache_clear()
    try:
        assert d4rl_infos.references("a-v0") == (1.0, 2.0)
        assert d4rl_infos.urls()["a-v0"] == "http://x/a.hdf5"
        assert d4rl_infos.references("hopper-medium-v2") == (-20.272305, 3234.3)
    finally:
        d4rl_infos.package.cache_clear()


class Server(ThreadingHTTPServer):
    """Has one file under every address but `missing`; keeps what it was asked for, and how many bytes it sent."""

    content, etag = b"", '"one"'
    ranges = tags = True
    stop_after = 10**9  # bytes, then the connection breaks
    asked: list[str]
    sent: list[int]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked.append(f"{self.path} {wanted}".strip())
        same = self.headers.get("If-Range", server.etag) == server.etag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges and same else 0
        whole = len(server.content)
        if "missing" in self.path:
            self.send_error(404)
            return
        if start >= whole:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if server.tags:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        body = server.content[start : start + server.stop_after]
        server.sent.append(len(body))
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "BLOCK", 100)
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.sent, made.content = [], [], hdf5(tmp_path / "source.hdf5", rows()).read_bytes()
    known = Known(len(made.content), files.sha256(tmp_path / "source.hdf5"))
    monkeypatch.setattr(fetching, "FILES", {"hopper-medium-v2": known})
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


KNOWN, UNKNOWN = "d4rl/hopper-medium-v2", "d4rl/relocate-human-v1"  # whether size and sha256 are published
NAMES = {KNOWN: "hopper_medium-v2.hdf5", UNKNOWN: "relocate-human-v1.hdf5"}


def fetch(server: Server, out: Path, name: str = KNOWN, base: str = "base/", **options: Any) -> dict[str, Any]:
    return formats.fetch(name, out, mirror=f"http://127.0.0.1:{server.server_address[1]}/{base}", **options)


def refused(match: str, call: Callable[[], Any], hint: str = "--mirror") -> CvlctlError:
    with pytest.raises(CvlctlError, match=match) as caught:
        call()
    assert hint in caught.value.hint
    return caught.value


def test_what_is_known_of_d4rls_files_is_of_datasets_that_there_are() -> None:
    assert set(FILES) <= set(d4rl_infos.table()) and len(FILES) == 63
    assert all(re.fullmatch("[0-9a-f]{64}", known.sha256) and known.bytes > 10**6 for known in FILES.values())
    assert len({known.sha256 for known in FILES.values()}) == len(FILES)


def test_fetch_from_a_mirror_and_find_it_there(tmp_path: Path, server: Server) -> None:
    found = fetch(server, tmp_path / "d4rl")
    path = tmp_path / "d4rl" / NAMES[KNOWN]
    assert found == {
        "status": "fetched", "name": KNOWN, "path": str(path), "bytes": len(server.content), "checked": "published",
        "url": f"http://127.0.0.1:{server.server_address[1]}/base/gym_mujoco_v2/hopper_medium-v2.hdf5",
        "sha256": files.sha256(tmp_path / "source.hdf5"),
    }  # fmt: skip
    assert path.read_bytes() == server.content
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    assert fetch(server, path)["status"] == "there already"
    assert server.sent == [len(server.content)]  # and that was the only request
    assert fetch(server, path, force=True)["status"] == "fetched" and len(server.asked) == 2
    assert fetch(server, tmp_path / "flat", base="files/{file}?download=true")["status"] == "fetched"
    assert server.asked[-1] == "/files/hopper_medium-v2.hdf5?download=true"
    with h5py.File(path, "a") as file:
        file["rewards"][0] = 9.0
    refused(r"its sha256 is .*, expected .* \(published\)", lambda: fetch(server, path), hint="--force")


def test_a_digest_that_nobody_published_is_kept_and_holds_from_then_on(tmp_path: Path, server: Server) -> None:
    found = fetch(server, tmp_path, UNKNOWN)
    assert found["checked"] == "nothing"
    told = exchange.fetched_in_words(found)
    assert found["sha256"] in told and f"{NAMES[UNKNOWN]}.json" in told
    assert json.loads((tmp_path / f"{NAMES[UNKNOWN]}.json").read_text())["sha256"] == found["sha256"]
    assert fetch(server, tmp_path, UNKNOWN)["checked"] == "recorded"
    assert fetch(server, tmp_path, UNKNOWN, sha256_is=found["sha256"].upper())["checked"] == "given"
    with h5py.File(tmp_path / NAMES[UNKNOWN], "a") as file:
        file["rewards"][0] = 9.0
    refused(r"expected .* \(recorded\)", lambda: fetch(server, tmp_path, UNKNOWN), hint="--force")
    refused("--sha256 00 is no sha256", lambda: fetch(server, tmp_path, UNKNOWN, sha256_is="00"), hint="64")


@pytest.mark.parametrize("name", [KNOWN, UNKNOWN])
def test_fetch_goes_on_where_it_was_cut_off(tmp_path: Path, server: Server, name: str) -> None:
    server.stop_after = 2050
    whole, part = len(server.content), tmp_path / f"{NAMES[name]}.part"
    error = refused(f"2,000 of {whole:,} bytes are here", lambda: fetch(server, tmp_path, name))
    assert "goes on where this one stopped" in error.hint
    assert part.read_bytes() == server.content[:2000] and not (tmp_path / NAMES[name]).exists()
    refused("4,000 of", lambda: fetch(server, tmp_path, name))
    server.stop_after = 10**9
    fetch(server, tmp_path, name)
    assert [line.partition(" ")[2] for line in server.asked] == ["", "bytes=2000-", "bytes=4000-"]
    assert server.sent[-1] == whole - 4000
    assert (tmp_path / NAMES[name]).read_bytes() == server.content
    assert sorted(p.name for p in tmp_path.glob(f"*{NAMES[name]}*")) == [NAMES[name], f"{NAMES[name]}.json"]


@pytest.mark.parametrize("name", [KNOWN, UNKNOWN])
def test_a_server_that_does_not_resume_sends_all_of_it_again(tmp_path: Path, server: Server, name: str) -> None:
    server.stop_after, server.ranges = 2050, False
    refused("2,000 of", lambda: fetch(server, tmp_path, name))
    server.stop_after = 10**9
    fetch(server, tmp_path, name)
    assert server.asked[-1].endswith("bytes=2000-") and server.sent[-1] == len(server.content)
    assert (tmp_path / NAMES[name]).read_bytes() == server.content


@pytest.mark.parametrize("tags", [True, False])
def test_two_versions_of_a_file_are_never_put_together(tmp_path: Path, server: Server, tags: bool) -> None:
    """Where no digest would tell, the server is asked whether it still has the file that was begun."""
    old, changed = server.content, {name: values * 0.5 for name, values in rows().items() if values.dtype != bool}
    new = hdf5(tmp_path / "other.hdf5", rows() | changed).read_bytes()
    differ = [i for i in range(len(old)) if old[i] != new[i]]
    server.stop_after, server.tags = differ[len(differ) // 2], tags
    refused("bytes are here", lambda: fetch(server, tmp_path, UNKNOWN))
    here = (tmp_path / f"{NAMES[UNKNOWN]}.part").stat().st_size
    assert old[:here] != new[:here] and old[here:] != new[here:]
    server.stop_after, server.etag, server.content = 10**9, '"two"', new
    if tags:
        fetch(server, tmp_path, UNKNOWN)
        assert (tmp_path / NAMES[UNKNOWN]).read_bytes() == server.content
    else:  # nothing to ask with: then the digest, if there is one, must tell
        digest = files.sha256(tmp_path / "other.hdf5")
        refused("its sha256 is|no whole HDF5", lambda: fetch(server, tmp_path, UNKNOWN, sha256_is=digest))
        assert fetch(server, tmp_path, UNKNOWN, sha256_is=digest)["checked"] == "given"


def test_what_came_whole_before_a_kill_is_not_asked_for_again(tmp_path: Path, server: Server) -> None:
    part = tmp_path / f"{NAMES[KNOWN]}.part"
    part.write_bytes(server.content)
    assert fetch(server, tmp_path)["status"] == "fetched" and server.asked == [] and not part.exists()
    part.write_bytes(server.content + b"more")  # longer than it can be: from the start
    assert fetch(server, tmp_path, force=True)["status"] == "fetched" and len(server.asked) == 1
    part = tmp_path / f"{NAMES[UNKNOWN]}.part"
    part.write_bytes(server.content)  # nobody knows its length: the server says that there is no more, so it is dropped
    refused("416", lambda: fetch(server, tmp_path, UNKNOWN))
    assert fetch(server, tmp_path, UNKNOWN)["status"] == "fetched"


def test_wrong_files_are_refused_and_the_one_that_was_there_stays(tmp_path: Path, server: Server) -> None:
    right, path = server.content, tmp_path / NAMES[KNOWN]
    fetch(server, path)
    server.content, before = right + b"x", len(server.sent)
    refused(
        f"has {len(right) + 1:,} bytes there, and should have {len(right):,}", lambda: fetch(server, path, force=True)
    )
    assert not list(tmp_path.glob("*.part*"))
    server.content = right[:-1] + b"x"  # right in size, and HDF5 does not look there
    error = refused("its sha256 is .*, expected", lambda: fetch(server, path, force=True))
    digest = re.findall("--sha256 ([0-9a-f]{64})", error.hint)[0]
    assert path.read_bytes() == right and not list(tmp_path.glob("*.part*")) and len(server.sent) > before
    assert fetch(server, path, force=True, sha256_is=digest)["checked"] == "given"
    server.content = b"<html>please log in</html>"
    refused("no whole HDF5 file", lambda: fetch(server, tmp_path, UNKNOWN))
    assert not list(tmp_path.glob(f"{NAMES[UNKNOWN]}*"))


def test_no_server_no_network_no_such_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(
        "no dataset 'd4rl/hoper-medium-v2'", lambda: formats.fetch("d4rl/hoper-medium-v2", tmp_path), hint=""
    )
    assert "hopper-medium-v2" in error.hint
    refused("the server says 404 Not Found", lambda: fetch(server, tmp_path, base="missing"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        refused("cannot be fetched: Connection refused", lambda: formats.fetch(KNOWN, tmp_path, mirror=nowhere))
    refused(
        "cannot be fetched: (Invalid URL|Failed to parse)", lambda: formats.fetch(KNOWN, tmp_path, mirror="no address")
    )
    refused("cannot be fetched: No connection adapters", lambda: formats.fetch(KNOWN, tmp_path, mirror="ftp://x"))

    def unknown_host(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    assert execute(app.app, ["data", "fetch", KNOWN, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "hopper_medium-v2.hdf5 cannot be fetched: Name or service not known" in said
    assert "hint: check the network; " in said and "--mirror" in said
    assert [p.name for p in tmp_path.iterdir()] == ["source.hdf5"]


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused("timed out", lambda: formats.fetch(KNOWN, tmp_path, mirror=mirror))
    assert list(tmp_path.iterdir()) == []


def test_fetch_tells_what_it_did(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "data",
        "fetch",
        KNOWN,
        "--out",
        str(tmp_path),
        "--mirror",
        f"http://127.0.0.1:{server.server_address[1]}",
    ]
    assert execute(app.app, command) == 0
    digest = files.sha256(tmp_path / "source.hdf5")
    told = capsys.readouterr().out
    assert told.startswith(f"fetched: {tmp_path / NAMES[KNOWN]}") and f"sha256 {digest}: as published" in told
    assert execute(app.app, [*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "there already"


def test_benchmark_of_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)  # put back afterwards: the script sets it
    import importing

    write_store(tmp_path / "a.zarr", episodes(), task="toy")
    out = tmp_path / "found.json"
    importing.main(["--transitions", "3000", "--store", str(tmp_path / "a.zarr"), "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["import"]["times"][importing.RAW]["ratio"] == 1.0
    assert found["import"]["times"][importing.IMPORT]["seconds"] > 0
    assert found["load"]["times"][importing.LOAD]["size_mb"] >= 0
    assert (importing.MINARI in found["load"]["times"]) == bool(importlib.util.find_spec("minari"))
    assert "cvlctl imports" in capsys.readouterr().out
