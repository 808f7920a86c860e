"""Stores as LeRobot's folders, and back: rows exactly, frames within the codec's error, times exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_files import read, same_store
from toy_stores import assert_same

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.formats import lerobot_out
from cvlctl.data.store import Store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pq = pytest.importorskip("pyarrow.parquet", reason="pip install 'cvlctl[lerobot]'")
av = pytest.importorskip("av", reason="pip install 'cvlctl[lerobot]'")
pytestmark = pytest.mark.usefixtures("no_fsync")

LENGTHS, SIZES = (3, 6, 4, 5), {"corner": (32, 48, 3), "odd": (17, 19, 3)}


def smooth(rows: int, size: tuple[int, int, int], first: int) -> np.ndarray:
    """Ramps that move by a pixel a row, as videos are made of."""
    y, x = np.mgrid[: size[0], : size[1]]
    t = (first + np.arange(rows))[:, None, None]
    return np.stack(
        [3 * (x + t) % 256, 4 * (y + 2 * t) % 256, np.broadcast_to(40 + 5 * t, (rows, *x.shape))], -1
    ).astype(np.uint8)


def seen_store(path: Path, vector: bool = True, sizes: Any = SIZES, **about: Any) -> Store:
    rng, episodes = np.random.default_rng(0), []
    for i, length in enumerate(LENGTHS):
        images = {name: smooth(length + 1, size, 10 * i) for name, size in sizes.items()}
        episodes.append(Episode(
            rng.normal(size=(length + 1, 2)) if vector else None, rng.uniform(-1, 1, (length, 2)),
            rng.normal(size=length), np.arange(length) == length - 1, i % 2 == 0, ("push", "", "pull 机")[i % 3],
            100 * i, 7 + i, images,
        ))  # fmt: skip
    return write_store(path, episodes, task="kitchen", horizon=9, **about)


@pytest.mark.parametrize("vector", [True, False])
def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vector: bool) -> None:
    monkeypatch.setattr(lerobot_out, "FILE_ROWS", 12)  # 4 + 7 rows in the first file, 5 + 6 in the second
    columns = ["x", "y"] if vector else []
    store = seen_store(tmp_path / "a.zarr", vector, observation_columns=columns, control_period=0.04)
    folder = formats.export_store("lerobot", store, tmp_path / "set")
    back = formats.import_store("lerobot", folder, tmp_path / "b.zarr")
    assert (back.spec, back.task, back.labels) == (store.spec, store.task, store.labels)
    for name in ("observation_columns", "control_period"):
        assert back.attributes.get(name) == store.attributes.get(name)
    for ours, theirs in zip(store.episodes(), back.episodes(), strict=True):
        for camera in SIZES:
            apart = np.abs(ours.images[camera].astype(int) - theirs.images[camera])
            assert apart.mean() < 4 and np.abs(apart.mean(axis=(1, 2, 3)) - apart.mean()).max() < 3, camera
    without = [[replace(e, observations=e.actions[:1].repeat(len(e) + 1, 0), images=None) for e in s.episodes()]
               for s in (back, store)]  # fmt: skip
    assert_same(*without, "kitchen")
    np.testing.assert_array_equal(back.observations(), store.observations())
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.mp4"))
    assert files == [f"videos/observation.images.{c}/chunk-000/file-00{i}.mp4" for c in SIZES for i in range(2)]


def test_vectors_alone_are_the_same_store(tmp_path: Path) -> None:
    store = seen_store(tmp_path / "a.zarr", sizes={})
    folder = formats.export_store("lerobot", store, tmp_path / "set")
    same_store(formats.import_store("lerobot", folder, tmp_path / "b.zarr"), store)
    assert json.loads((folder / "meta/info.json").read_text())["video_path"] is None


def test_what_lerobot_reads_of_it(tmp_path: Path) -> None:
    """By the files alone, as LeRobot has them: every row's frame is at from_timestamp + timestamp."""
    store = seen_store(tmp_path / "a.zarr", action_bounds=(-3.0, 3.0), control_period=0.04)
    folder = formats.export_store("lerobot", store, tmp_path / "set")
    info = json.loads((folder / "meta/info.json").read_text())
    assert (info["codebase_version"], info["fps"], info["total_episodes"], info["total_frames"]) == ("v3.0", 25, 4, 22)
    rows = pq.read_table(folder / "data/chunk-000/file-000.parquet")
    assert set(rows.column_names) == {name for name, about in info["features"].items() if about["dtype"] != "video"}
    assert rows["index"].to_pylist() == list(range(22)) and rows["timestamp"].to_pylist()[:2] == [0, np.float32(0.04)]
    actions = np.array(rows["action"].to_pylist())
    np.testing.assert_allclose(actions[:3], 3 * store.actions()[:3], rtol=1e-6)  # in the units of the robot
    np.testing.assert_array_equal(actions[3], actions[2])
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    assert tasks.to_pylist() == [{"task_index": i, "task": t} for i, t in enumerate(("push", "kitchen", "pull 机"))]
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert [e["length"] for e in episodes] == [4, 7, 5, 6] and episodes[2]["tasks"] == ["pull 机"]
    with av.open(folder / "videos/observation.images.corner/chunk-000/file-000.mp4") as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        assert (stream.height, stream.width, stream.codec_context.name) == (32, 48, "h264")
    begins = [e["videos/observation.images.corner/from_timestamp"] for e in episodes]
    wanted = [begin + frame / 25 for begin, e in zip(begins, episodes, strict=True) for frame in range(e["length"])]
    assert len(times) == 22 and np.abs(np.array(times) - wanted).max() < 1e-9
    stats = json.loads((folder / "meta/stats.json").read_text())
    np.testing.assert_allclose(stats["action"]["max"], actions.max(axis=0))
    assert np.shape(stats["observation.images.odd"]["mean"]) == (3, 1, 1)


def test_export_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, out = seen_store(tmp_path / "a.zarr"), tmp_path / "set"
    line = ["data", "export", str(store.path), "lerobot", "--out", str(out)]
    assert execute(app, line) == 0 and "4 episodes as lerobot" in capsys.readouterr().out
    assert execute(app, line) == 0 and "finished already" in capsys.readouterr().out
    info = out / "meta/info.json"
    info.write_text(info.read_text().replace('"exported": "', '"exported": "x'))
    assert execute(app, line) == 2 and "exists" in capsys.readouterr().err
    assert execute(app, [*line, "--force"]) == 0
    (tmp_path / "other").mkdir()
    assert execute(app, [*line[:-1], str(tmp_path / "other"), "--force"]) == 2
    assert "is a directory" in capsys.readouterr().err


def test_what_does_not_fit(tmp_path: Path) -> None:
    grey = write_store(
        tmp_path / "g.zarr", [Episode(None, np.zeros((2, 1)), images={"c": np.zeros((3, 8, 8), np.uint8)})], task="toy"
    )
    with pytest.raises(CvlctlError, match="frames of camera c have 1 channels, videos have 3"):
        formats.export_store("lerobot", grey, tmp_path / "set")
    store = seen_store(tmp_path / "a.zarr")
    folder = formats.export_store("lerobot", store, tmp_path / "set")
    file = folder / "meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(file).slice(0, 3), file)
    with pytest.raises(CvlctlError, match="it tells of 3 episodes"):
        read("lerobot", folder)
