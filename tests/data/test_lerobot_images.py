"""The images of LeRobot's folders: every frame at its time, from videos of one episode or of several, and from rows."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from toy_datasets import LENGTHS, lerobot_folder, write_parquet

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data.store import Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.frames import write_mp4

pytest.importorskip("pyarrow", reason="pip install 'cvlctl[lerobot]'")
pytest.importorskip("av", reason="pip install 'cvlctl[lerobot]'")
pytestmark = pytest.mark.usefixtures("no_fsync")

V21 = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V30 = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
TOP, WRIST = "observation.images.top", "observation.images.wrist"
SIZE = (32, 48)


def frames(levels: Sequence[int]) -> np.ndarray:
    """Of one grey each, with a white corner, so that what is upside down is found."""
    found = np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), *SIZE, 3)).copy()
    found[:, :8, :8] = 255
    return found


def video(path: Path, levels: Sequence[int], fps: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = io.BytesIO()
    write_mp4(data, iter(frames(levels)), fps)
    path.write_bytes(data.getvalue())
    return path


def folder_with_videos(folder: Path, version: str) -> Path:
    """`top` shows 10 times the row's number; v3 has the first two episodes of it in one file, and all of `wrist`."""
    about = {"dtype": "video", "shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    lerobot_folder(folder, version, video_path=V21 if version == "v2.1" else V30)
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"] |= {TOP: about, WRIST: {**about, "shape": [3, *SIZE], "names": ["channels", "height", "width"]}}
    (folder / "meta/info.json").write_text(json.dumps(info))
    rows = np.split(10 * np.arange(sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    if version == "v2.1":
        for i, levels in enumerate(rows):
            for name, shown in {TOP: levels, WRIST: 200 - levels}.items():
                video(folder / V21.format(episode_chunk=0, video_key=name, episode_index=i), shown)
        return folder
    video(folder / V30.format(video_key=TOP, chunk_index=0, file_index=0), np.concatenate(rows[:2]))
    video(folder / V30.format(video_key=TOP, chunk_index=0, file_index=1), rows[2])
    video(folder / V30.format(video_key=WRIST, chunk_index=0, file_index=0), 200 - np.concatenate(rows))
    begins = {TOP: [0.0, LENGTHS[0] / 10, 0.0], WRIST: [0.0, LENGTHS[0] / 10, sum(LENGTHS[:2]) / 10]}
    episodes: dict[str, Any] = {"episode_index": np.arange(3)}
    for name, begin in begins.items():
        episodes |= {
            f"videos/{name}/chunk_index": np.zeros(3, int),
            f"videos/{name}/file_index": np.array([0, 0, 1 if name == TOP else 0]),
            f"videos/{name}/from_timestamp": np.array(begin),
        }
    write_parquet(folder / "meta/episodes/chunk-000/file-000.parquet", episodes)
    return folder


def imported(folder: Path, **options: Any) -> Store:
    return formats.import_store("lerobot", folder, folder.with_suffix(".zarr"), force=True, **options)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_every_row_has_its_frame_of_every_camera(tmp_path: Path, version: str) -> None:
    store = imported(folder_with_videos(tmp_path / "a", version), cameras=["all"])
    assert store.spec.cameras == {"top": (*SIZE, 3), "wrist": (*SIZE, 3)} and store.spec.observation_shape == (3,)
    levels = store.images("top")[:, 16, 16, 0].astype(int)
    assert np.abs(levels - 10 * np.arange(12)).max() <= 3
    assert np.abs(store.images("wrist")[:, 16, 16, 2] - (200.0 - 10 * np.arange(12))).max() <= 3
    assert store.images("top")[:, 2, 2].min() > 245  # upright, and not mirrored
    assert store.lengths().tolist() == [n - 1 for n in LENGTHS]
    np.testing.assert_array_equal(store.observations()[:, 0], 2 * np.arange(12))  # beside the frames of the same rows


def test_chosen_ones_by_name_in_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_videos(tmp_path / "a", "v3.0")
    line = ["data", "import", "lerobot", str(folder), "--out", str(tmp_path / "b.zarr"), "--json"]
    assert execute(app, [*line, "--camera", "hand=wrist", "--image-size", "16", "16"]) == 0
    capsys.readouterr()
    assert execute(app, [*line, "--camera", "hand=wrist", "--image-size", "16", "16"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished already"
    file = folder / V30.format(video_key=TOP, chunk_index=0, file_index=1)
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0")  # another video: what stands there is not of this one
    assert execute(app, [*line, "--camera", "hand=wrist", "--image-size", "16", "16"]) == 2
    file.write_bytes(whole)
    capsys.readouterr()
    store = open_store(tmp_path / "b.zarr")
    assert store.spec.cameras == {"hand": (16, 16, 3)}
    assert np.abs(store.images("hand")[:, 8, 8, 0] - (200.0 - 10 * np.arange(12))).max() <= 3
    assert store.attributes["dropped_columns"] == [TOP]
    assert f"images are not imported: {TOP} (--camera NAME takes them)" in store.attributes["remarks"]
    assert "--camera hand=wrist --image-size 16 16" in store.provenance["command"]


def test_pictures_in_the_rows(tmp_path: Path) -> None:
    def png(level: int) -> dict[str, Any]:
        data = io.BytesIO()
        Image.fromarray(frames([level])[0]).save(data, format="PNG")
        return {"bytes": data.getvalue(), "path": "frame.png"}

    folder = lerobot_folder(tmp_path / "a", "v2.1", changes={TOP: [png(20 * i) for i in range(12)]})
    info = json.loads((folder / "meta/info.json").read_text())
    info["features"][TOP] |= {"dtype": "image", "shape": [*SIZE, 3]}
    (folder / "meta/info.json").write_text(json.dumps(info))
    store = imported(folder, cameras=["top"])
    assert store.images("top")[:, 20, 20, 1].tolist() == list(range(0, 240, 20))


@pytest.mark.parametrize("version", ["v21", "v30"])
def test_what_lerobot_itself_wrote(tmp_path: Path, version: str) -> None:
    """`tests/fixtures/make_lerobot.py` says what is in it."""
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "lerobot.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    store = imported(tmp_path / version, cameras=["all"])
    assert store.spec.cameras == {"side": (64, 64, 3), "top": (64, 64, 3)}
    assert store.lengths().tolist() == [2, 4, 3] and store.episode_tasks() == ["pull", "pull", "push"]
    levels = 20 * np.arange(12)
    np.testing.assert_array_equal(store.observations()[:, 0], np.arange(12))
    assert np.abs(store.images("top")[:, 40, 40].astype(int) - levels[:, None]).max() <= 4
    assert np.abs(store.images("side")[:, 40, 40].astype(int) - (250 - levels)[:, None]).max() <= 4
    assert store.images("top")[:, 4, 4].min() > 240


# ------------------------------------------------------------------------------------------------------------- amiss


@pytest.mark.parametrize(
    ("levels", "fps", "message"),
    [
        (range(4), 10, r"ends before 0\.4000 s, the time of observation.images.top of frame 4 of episode 1"),
        (range(6), 10, "has 6 frames, episode 1 has 5 rows"),
        (range(5), 7, r"has no frame at 0\.1000 s, which is that of .* frame 1 of episode 1"),
    ],
)
def test_frames_that_are_not_those_of_the_rows(tmp_path: Path, levels: range, fps: float, message: str) -> None:
    folder = folder_with_videos(tmp_path / "a", "v2.1")
    video(folder / V21.format(episode_chunk=0, video_key=TOP, episode_index=1), levels, fps)
    with pytest.raises(CvlctlError, match=message):
        imported(folder, cameras=["top"])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_videos_that_are_none(tmp_path: Path) -> None:
    folder = folder_with_videos(tmp_path / "a", "v2.1")
    file = folder / V21.format(episode_chunk=0, video_key=TOP, episode_index=2)
    whole = file.read_bytes()

    def refused(message: str, content: bytes | None, **options: Any) -> None:
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CvlctlError, match=message):
            imported(folder, **{"cameras": ["top"], **options})

    refused("episode_000002.mp4 is missing", None)
    refused("cannot be read", whole[: len(whole) // 3])
    refused("cannot be read", b"")
    refused("cannot be read", b"RIFF....AVI LIST" + whole)
    data = io.BytesIO()
    write_mp4(data, iter(np.zeros((4, 16, 16, 3), np.uint8)), 10)
    refused("is 16 x 16; expected 32 x 48", data.getvalue())
    refused(r"no images 'side'", whole, cameras=["side"])
    for about, message in (
        ({"shape": [100_000, 100_000, 3]}, "too large to be true"),
        ({"shape": [32, 48]}, r"has shape \[32, 48\]"),
    ):
        info = json.loads((folder / "meta/info.json").read_text())
        info["features"][TOP] |= about
        (folder / "meta/info.json").write_text(json.dumps(info))
        refused(message, whole)


def test_meta_that_does_not_say_where_videos_are(tmp_path: Path) -> None:
    folder = folder_with_videos(tmp_path / "a", "v3.0")
    table = folder / "meta/episodes/chunk-000/file-000.parquet"
    whole = table.read_bytes()
    table.write_bytes(whole[:-20])
    with pytest.raises(CvlctlError, match=r"file-000\.parquet: cannot be read"):
        imported(folder, cameras=["top"])
    write_parquet(table, {"episode_index": np.arange(3)})
    with pytest.raises(CvlctlError, match=r"does not say where the videos of observation\.images\.top are"):
        imported(folder, cameras=["top"])
    table.unlink()
    with pytest.raises(CvlctlError, match="no meta/episodes, which says where videos begin"):
        imported(folder, cameras=["top"])
    info = json.loads((folder / "meta/info.json").read_text())
    for template in ("../{video_key}.mp4", "/etc/{video_key}", "x.mp4", "{video_key:0999999999}", "{video_key.a}"):
        (folder / "meta/info.json").write_text(json.dumps(info | {"video_path": template}))
        with pytest.raises(CvlctlError, match="leads to no file of this folder"):
            imported(folder, cameras=["top"])
