"""The images of LeRobot's datasets: videos of one episode (v2) or of several (v3), or pictures in the rows.

video_path              where they lie: videos/chunk-000/observation.images.top/episode_000000.mp4, or
                        videos/observation.images.top/chunk-000/file-000.mp4
meta/episodes/          v3 alone: of each episode and camera the file, and at which second it begins there
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cvlctl.data.formats.pictures import KEY, Cameras, frames_column
from cvlctl.data.formats.sources import Column, reading
from cvlctl.data.formats.tables import Table, small_parquet
from cvlctl.data.formats.videos import Videos
from cvlctl.errors import CvlctlError
from cvlctl.frames import decoded
from cvlctl.play.spaces import natural

FIELDS = ("video_key", "episode_chunk", "episode_index", "chunk_index", "file_index")
EPISODES = Path("meta") / "episodes"
MAX_FPS = 10_000

Size = tuple[int, int, int]  # height, width, channels


class Place(NamedTuple):
    """Where an episode's video is: its file, and the second at which it begins there."""

    file: Path
    begin: float
    alone: bool  # the file holds this episode, and nothing else


def images_of(features: Mapping[str, Any]) -> list[str]:
    """Names of the features that are images or videos."""
    return [name for name, about in features.items() if about.get("dtype") in ("image", "video")]


def image_columns(path: Path, info: Mapping[str, Any], table: Table, chosen: Mapping[str, str], cameras: Cameras
                  ) -> dict[str, Column]:  # fmt: skip
    """A column of frames for each camera that is chosen: our name -> the feature's."""
    columns = {}
    for camera, name in chosen.items():
        about = info["features"][name]
        size, where = _size(path, name, about), f"{table.path}: {name}"
        if about["dtype"] == "image":
            frames: _Pictures | _Rows = _Pictures(table, name, size)
        else:
            frames = _Rows(path, info, table, name, size)
        columns[f"{KEY}{camera}"] = frames_column(where, table.length, size, cameras, frames.fetch)
    return columns


class _Pictures:
    """The frames of a table's rows, which are pictures in it."""

    def __init__(self, table: Table, name: str, size: Size) -> None:
        self._blobs, self._where, self._size = table.blobs(name), f"{table.path}: {name}", size

    def fetch(self, start: int, count: int) -> np.ndarray:
        found = []
        for row in range(start, start + count):
            frame = decoded(next(self._blobs), f"{self._where}, row {row}")
            if frame.shape != self._size:
                what = f"{self._where}, row {row}: is {frame.shape}; expected {self._size}"
                raise CvlctlError(what, "as meta/info.json says")
            found.append(frame)
        return np.stack(found)


class _Rows:
    """The frames of a table's rows, from the videos of the episodes that these belong to."""

    def __init__(self, path: Path, info: Mapping[str, Any], table: Table, name: str, size: Size) -> None:
        fps = info.get("fps")
        if not isinstance(fps, int | float) or not 0 < fps < MAX_FPS:
            raise CvlctlError(f"{path / 'meta' / 'info.json'}: fps is {str(fps)[:40]}, no number of frames a second")
        if size[2] != 3:
            raise CvlctlError(f"{path}: {name}: videos have 3 channels, meta/info.json says {size[2]}")
        self._name, self._places = name, _places(path, info, name)
        self._videos = Videos(size[:2], float(fps))
        columns = ("episode_index", "frame_index", "timestamp")
        if missing := [column for column in columns if column not in table.names]:
            raise CvlctlError(f"{table.path}: no column {missing[0]!r}", "which says where a row's frame is")
        self._index, self._frame, self._time = (table.column([column]) for column in columns)
        self._episode, self._length, self._left = -1, 0, table.length

    def fetch(self, _: int, count: int) -> np.ndarray:
        rows = zip(self._index.take(count), self._frame.take(count), self._time.take(count), strict=True)
        found = []
        for episode, number, time in rows:
            if episode != self._episode:
                self._begin(int(episode))
            self._length += 1
            place = self._places(int(episode))
            where = f"{self._name} of frame {int(number)} of episode {int(episode)}"
            found.append(self._videos.frame(place.file, place.begin + float(time), where))
        self._left -= count
        if not self._left:
            self._begin(-1)
            self._videos.close()
        return np.stack(found)

    def _begin(self, episode: int) -> None:
        self._check_length()
        self._episode, self._length = episode, 0

    def _check_length(self) -> None:
        """That the video of an episode alone has no frames beyond its rows."""
        if self._episode < 0 or not (place := self._places(self._episode)).alone:
            return
        count = self._videos.count(place.file)
        if count > self._length:
            what = f"{place.file}: has {count} frames, episode {self._episode} has {self._length} rows"
            raise CvlctlError(what, "rows are missing, or the video is another's: fetch or write it again")


def _size(path: Path, name: str, about: Mapping[str, Any]) -> tuple[int, int, int]:
    """Height, width and channels, whichever way round the file has them."""
    shape, names = list(about.get("shape") or ()), about.get("names")
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise CvlctlError(f"{path / 'meta' / 'info.json'}: {name} has shape {str(shape)[:60]}; expected [H, W, C]")
    first = str(names[0]).startswith("channel") if isinstance(names, list) and names else shape[0] in (1, 3)
    height, width, channels = (*shape[1:], shape[0]) if first else shape
    return height, width, channels


def _places(path: Path, info: Mapping[str, Any], name: str) -> Any:
    """A function from an episode's number to its `Place`."""
    template, where = str(info.get("video_path")), path / "meta" / "info.json"
    with reading(str(where)):
        parts = list(string.Formatter().parse(template))
        fields = [field for _, field, _, _ in parts if field is not None]
        sound = all(re.fullmatch(r"0?\d{0,2}d?", spec or "") and not change for _, _, spec, change in parts)
        plain = sound and not PurePosixPath(template).is_absolute() and ".." not in PurePosixPath(template).parts
        if not plain or not fields or set(fields) - set(FIELDS) or "/" in name or ".." in name:
            what = f"{where}: video_path is {template[:80]!r}, which leads to no file of this folder"
            raise CvlctlError(what, "such as videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4")
    if "file_index" not in fields:
        size = info.get("chunks_size") or 1000

        def of_one(episode: int) -> Place:
            numbers = {"episode_chunk": episode // int(size), "episode_index": episode, "video_key": name}
            return Place(path / template.format(**numbers), 0.0, True)

        return of_one
    table = dict(_shared(path, template, name))

    def of_several(episode: int) -> Place:
        if episode not in table:
            raise CvlctlError(f"{path / EPISODES}: says nothing of episode {episode}", "fetch the dataset again")
        return table[episode]

    return of_several


def _shared(path: Path, template: str, name: str) -> Iterator[tuple[int, Place]]:
    keys = [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
    files: Sequence[Path] = sorted((path / EPISODES).rglob("*.parquet"), key=lambda file: natural(str(file)))
    if not files:
        raise CvlctlError(f"{path}: no {EPISODES}, which says where videos begin", "fetch the dataset's meta/ as well")
    for file in files:
        with reading(str(file)):
            for row in small_parquet(file, ["episode_index", *keys]):
                if any(row.get(key) is None for key in ("episode_index", *keys)):
                    raise CvlctlError(f"{file}: does not say where the videos of {name} are: {', '.join(keys)}")
                chunk, number, begin = (row[key] for key in keys)
                numbers = {"chunk_index": int(chunk), "file_index": int(number), "video_key": name}
                yield int(row["episode_index"]), Place(path / template.format(**numbers), float(begin), False)
