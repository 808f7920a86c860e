"""Frames as pictures: what is in them again, by other readers."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.reports import page as page_module
from cvlctl.experiments.reports.cards import card
from cvlctl.frames import beside, enlarged, sheet, write_frames, write_mp4
from cvlctl.types import Episode

LEVELS = np.array([0, 60, 120, 180, 240], np.uint8)
FRAMES = np.broadcast_to(LEVELS[:, None, None, None], (5, 50, 70, 3))


def test_a_sheet_has_the_frames_row_by_row(tmp_path: Path) -> None:
    assert write_frames(tmp_path / "a.png", FRAMES) == "written"
    assert write_frames(tmp_path / "a.png", FRAMES) == "finished already"
    with Image.open(tmp_path / "a.png") as image:
        found = np.asarray(image)
    assert found.shape == (100, 5 * (140 + 4) - 4, 3)
    assert found[50, 70::144, 0].tolist() == LEVELS.tolist()
    many = np.arange(100, dtype=np.uint8)[:, None, None, None].repeat(128, 1).repeat(128, 2)
    chosen = sheet(many, 7, 3)
    assert chosen.shape == (3 * 132 - 4, 3 * 132 - 4, 3)
    assert chosen[64::132, 64::132, 0].ravel().tolist() == [0, 16, 33, 50, 66, 82, 99, 255, 255]  # white where none is


def test_a_gif_moves_at_its_rate(tmp_path: Path) -> None:
    write_frames(tmp_path / "a.gif", FRAMES, fps=4)
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.info["duration"], image.size) == (5, 250, (140, 100))  # type: ignore[attr-defined]
        levels = []
        for i in range(5):
            image.seek(i)
            levels.append(np.asarray(image.convert("RGB"))[10, 10, 0])
    assert levels == LEVELS.tolist()


def test_an_mp4_holds_every_frame_and_its_time(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="pip install 'cvlctl[video]'")
    odd = np.broadcast_to(LEVELS[:, None, None, None], (5, 131, 129, 1))
    write_frames(tmp_path / "a.mp4", odd, fps=12.5)
    with av.open(tmp_path / "a.mp4") as container:
        found = list(container.decode(video=0))
    assert [frame.time for frame in found] == [i / 12.5 for i in range(5)]
    assert found[0].to_ndarray(format="rgb24").shape == (132, 130, 3)
    for frame, level in zip(found, LEVELS, strict=True):
        assert abs(int(frame.to_ndarray(format="rgb24")[9, 9, 0]) - int(level)) <= 3
    again = io.BytesIO()
    write_mp4(again, (np.pad(x, ((0, 1), (0, 1), (0, 0)), mode="edge").repeat(3, 2) for x in odd), 12.5)
    assert again.getvalue() == (tmp_path / "a.mp4").read_bytes()


@pytest.mark.parametrize(
    ("name", "frames", "message"),
    [
        ("a.jpg", FRAMES, "not written as .jpg"),
        ("a", FRAMES, "not written as a file without ending"),
        ("a.gif", FRAMES[:0], "no frames to show"),
        ("a.png", np.zeros((2, 4, 4, 2), np.uint8), "cannot be shown"),
        ("a.png", np.zeros((2, 4, 4, 3)), "frames of float64"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, name: str, frames: np.ndarray, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        write_frames(tmp_path / name, frames)
    assert list(tmp_path.iterdir()) == []


def test_cameras_side_by_side_and_small_frames_enlarged() -> None:
    both = beside([np.full((4, 2, 1), 9, np.uint8), np.full((6, 3, 4), 7, np.uint8)])
    assert both.shape == (6, 5, 3) and both[5].ravel().tolist() == [0] * 6 + [7] * 9
    assert enlarged(np.zeros((64, 96, 3), np.uint8)).shape == (128, 192, 3)
    assert enlarged(np.zeros((480, 640, 3), np.uint8)).shape == (480, 640, 3)


def test_preview(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {"corner": FRAMES, "wrist": FRAMES[:, :40, :40, :1]}
    store = write_store(tmp_path / "a.zarr", [Episode(None, np.zeros((4, 1)), images=images)] * 2, task="toy").path

    def call(*words: str) -> tuple[int, str]:
        code = execute(app, ["data", "preview", str(store), *words])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    assert call("--episode", "1") == (0, f"{tmp_path / 'a-1.png'}\n")
    with Image.open(tmp_path / "a-1.png") as image:
        assert image.size == (5 * (2 * 110 + 4) - 4, 100)
    assert call("--camera", "wrist", "--out", str(tmp_path / "b.gif"))[0] == 0
    assert call("--camera", "wrist")[1] == f"{tmp_path / 'a-0-wrist.png'}\n"
    for words, message in {
        ("--episode", "2"): "has no episode 2",
        ("--camera", "top"): "no camera 'top'",
        ("--out", str(tmp_path / "c.avi")): "not written as .avi",
        ("--out", str(tmp_path / "b.gif")): "b.gif exists",
    }.items():
        code, said = call(*words)
        assert code == 2 and message in said
    plain = write_store(tmp_path / "p.zarr", [Episode(np.zeros((2, 1)), np.zeros((1, 1)))], task="toy").path
    assert execute(app, ["data", "preview", str(plain)]) == 2 and "has no images" in capsys.readouterr().err


def test_a_dataset_card_shows_frames(tmp_path: Path) -> None:
    images = {"corner": FRAMES, "large": np.broadcast_to(LEVELS[:, None, None, None], (5, 600, 800, 3))}
    store = write_store(tmp_path / "a.zarr", [Episode(None, np.zeros((4, 1)), images=images)] * 2, task="toy").path
    found = card(str(store), {})
    with Image.open(io.BytesIO(found.frames)) as image:  # 5 frames of 70 + 800 by 600, of which every fourth pixel is
        assert image.size == (5 * (218 + 4) - 4, 150)
    page = page_module._card(found)
    assert f'src="data:image/png;base64,{base64.b64encode(found.frames).decode()}"' in page
    assert ("camera corner", "50x70x3") in found.facts
    assert "<img" not in page_module._card(card(str(store), {}, draw=False))
