"""`cvlctl data preview`: an episode's frames as a contact sheet, a GIF or an MP4."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl import files
from cvlctl.data.store import Column, Store, open_store
from cvlctl.data.units import units_of
from cvlctl.errors import CvlctlError
from cvlctl.frames import beside, write_frames

FPS = 20.0  # where a store does not say its control period


def preview(
    path: Path, *, episode: int = 0, camera: str | None = None, out: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the frames of an episode as a .png, .gif or .mp4, by default a PNG beside the store.

    Args:
        episode: its number; -1 is the last one.
        camera: default: all of them, side by side.

    Returns:
        status, path, episode, cameras, frames (how many the episode has).

    Raises:
        CvlctlError: no such camera or episode, no images, another file is there (and no `force`), or damage.
    """
    store = open_store(path)
    if not store.spec.cameras:
        raise CvlctlError(f"{path} has no images", "cvlctl data plot draws what it has")
    cameras = [camera] if camera is not None else list(store.spec.cameras)
    frames = episode_frames(store, episode, cameras)
    number = episode % store.num_episodes
    stem = files.named(Path(path)).with_suffix("")
    target = out or stem.with_name("-".join([stem.name, str(number), *([camera] if camera else [])]) + ".png")
    period = units_of(store).control_period
    status = write_frames(Path(target), frames, fps=1 / period if period else FPS, force=force)
    return {"status": status, "path": str(target), "episode": number, "cameras": cameras, "frames": len(frames)}


def episode_frames(store: Store, episode: int, cameras: Sequence[str]) -> _Frames:
    """The frames of an episode, read as they are asked for; of several cameras side by side.

    Raises:
        CvlctlError: no such camera, or no such episode.
    """
    count, ends = store.num_episodes, store.episode_ends()
    if not -count <= episode < count:
        raise CvlctlError(f"{store.path} has no episode {episode}", f"it has 0 to {count - 1}")
    columns = [Column(store, store.camera_array(camera)) for camera in cameras]
    length = int(store.lengths()[episode]) + 1
    return _Frames(columns, int(ends[episode]) - length, length)


class _Frames(Sequence[np.ndarray]):
    def __init__(self, columns: Sequence[Column], start: int, length: int) -> None:
        self._columns, self._start, self._length = columns, start, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: Any) -> Any:
        row = self._start + i
        shown = [column.rows(row, row + 1)[0] for column in self._columns]
        return shown[0] if len(shown) == 1 else beside(shown)
