"""Stores as LeRobot's datasets, v3.0: rows in parquet, frames as H.264, and all that a store says beside.

A row is a frame, with its action. The final observation has a row too, whose action repeats the one before: LeRobot has
no rows without one, and reading our folder again, as any other, leaves it out. What LeRobot has no place for (horizon,
action bounds, seeds, what episodes ended by) lies under `cvlctl` in meta/info.json, and in columns cvlctl/... of
meta/episodes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.tables import pyarrow_parquet
from cvlctl.data.store import Store
from cvlctl.data.units import bounds_of, export_digest, exported_units, units_of
from cvlctl.errors import CvlctlError
from cvlctl.folders import replacing
from cvlctl.frames import Mp4
from cvlctl.progress import Progress
from cvlctl.types import Episode
from cvlctl.units import KEY, Bounds, physical, plain

INFO = Path("meta") / "info.json"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
STATE, CAMERA = "observation.state", "observation.images."
FPS = 10  # of a store that does not say its control period
FILE_ROWS = 50_000  # at which a file of rows, and of frames, is full
CHUNK_FILES = 1000
SHOWN = 8  # frames of an episode that the statistics are of
CODEC = {"crf": "18", "g": "2", "threads": "1"}  # every second frame stands alone, as LeRobot has it, to be drawn fast


def write(store: Store, path: Path, label: str, force: bool = False) -> None:
    """Write a store as the folder of a LeRobot dataset; several episodes share a file.

    Raises:
        CvlctlError: observations that are no vectors, frames of other than 3 channels, or pyarrow or PyAV is missing.
    """
    spec = store.spec
    pyarrow_parquet(path)
    if len(spec.observation_shape) != 1:
        raise CvlctlError(f"{store.path}: observations of shape {spec.observation_shape} are not vectors")
    for camera, size in spec.cameras.items():
        if size[2] != 3:
            raise CvlctlError(f"{store.path}: frames of camera {camera} have {size[2]} channels, videos have 3")
    bounds, period = bounds_of(store), units_of(store).control_period
    fps = FPS if period is None else round(1 / period) if abs(1 / period - round(1 / period)) < 1e-6 else 1 / period
    named = label if label in store.labels else "given"
    with replacing(path, folder=True, force=force) as folder:
        made = _Folder(folder, store, fps)
        with Progress(str(path), store.num_episodes, "episodes") as progress:
            for number, episode in enumerate(store.episodes(named)):
                made.add(episode, physical(episode.actions, bounds))
                progress.update(number + 1)
        made.finish(_about(store, label, bounds))


def is_dataset(path: Path) -> bool:
    """Whether a folder is a LeRobot dataset's."""
    return (path / INFO).is_file()


def _about(store: Store, label: str, bounds: Bounds | None) -> dict[str, Any]:
    """What reading it again makes the same store of."""
    more, environment = exported_units(store), store.attributes.get("environment")
    return {
        "task": store.task, "horizon": store.spec.horizon, KEY: plain(bounds),
        "exported": export_digest("lerobot", store, label),
        **({"units": more} if more else {}), **({"environment": environment} if environment else {}),
    }  # fmt: skip


class _Folder:
    """A dataset that is being written: an open file of rows, and one of frames for each camera."""

    def __init__(self, folder: Path, store: Store, fps: float) -> None:
        self._folder, self._store, self._fps = folder, store, fps
        self._tasks: dict[str, int] = {}
        self._episodes: list[dict[str, Any]] = []
        self._rows = self._in_file = 0
        self._file = -1  # number of the open ones
        self._writer: Any = None
        self._videos: dict[str, Mp4] = {}
        self._kinds: dict[str, str] = {}  # of the columns beside state and action
        self._moments: dict[str, _Moments] = {}  # of each feature

    def add(self, episode: Episode, actions: np.ndarray) -> None:
        rows = len(episode) + 1
        if self._file < 0 or self._in_file + rows > FILE_ROWS:
            self._next_file()
        columns = self._columns(episode, actions)
        self._write_rows(columns)
        for camera, frames in (episode.images or {}).items():
            for frame in frames:
                self._videos[camera].add(frame)
            shown = frames[:: -(-rows // SHOWN)].reshape(-1, 3) / 255
            self._moments.setdefault(CAMERA + camera, _Moments()).add(shown)
        for name, values in columns.items():
            if values.dtype.kind == "f":
                self._moments.setdefault(name, _Moments()).add(values.reshape(rows, -1))
        chunk, file = divmod(self._file, CHUNK_FILES)
        place = {"chunk_index": chunk, "file_index": file}
        times = {"from_timestamp": self._in_file / self._fps, "to_timestamp": (self._in_file + rows) / self._fps}
        videos = {f"videos/{CAMERA}{c}/{key}": x for c in self._videos for key, x in (place | times).items()}
        self._episodes.append({
            "episode_index": len(self._episodes), "tasks": [episode.task], "length": rows,
            "dataset_from_index": self._rows, "dataset_to_index": self._rows + rows,
            **{f"data/{key}": value for key, value in place.items()}, **videos,
            "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0,
            "cvlctl/terminated": episode.terminated, "cvlctl/collected_at": episode.collected_at,
            "cvlctl/seed": episode.seed,
        })  # fmt: skip
        self._rows, self._in_file = self._rows + rows, self._in_file + rows

    def finish(self, about: dict[str, Any]) -> None:
        """Close the files, and write meta/."""
        self._close()
        meta, count = self._folder / "meta", len(self._episodes)
        (meta / "episodes" / "chunk-000").mkdir(parents=True)
        _write_table(meta / "episodes" / "chunk-000" / "file-000.parquet", self._episodes)
        tasks = [{"task_index": number, "task": task} for task, number in self._tasks.items()]
        _write_table(meta / "tasks.parquet", tasks, index="task")
        stats = {name: moments.facts(column=not name.startswith(CAMERA)) for name, moments in self._moments.items()}
        (meta / "stats.json").write_text(json.dumps(stats))
        info = {
            "codebase_version": "v3.0", "robot_type": None, "total_episodes": count, "total_frames": self._rows,
            "total_tasks": len(tasks), "chunks_size": CHUNK_FILES, "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200, "fps": self._fps, "splits": {"train": f"0:{count}"}, "data_path": DATA,
            "video_path": VIDEO if self._videos else None, "features": self._features(), "cvlctl": about,
        }  # fmt: skip
        (self._folder / INFO).write_text(json.dumps(info, indent=4))

    def _columns(self, episode: Episode, actions: np.ndarray) -> dict[str, np.ndarray]:
        rows = len(episode) + 1
        number, numbers = len(self._episodes), np.arange(rows)
        task = self._tasks.setdefault(episode.task, len(self._tasks))
        found = {STATE: episode.observations} if episode.observations.shape[1] else {}
        found["action"] = np.concatenate([actions, actions[-1:]]).astype(np.float32)
        for name, values in (("next.reward", episode.rewards), ("next.success", episode.successes)):
            if values is not None:
                found[name] = np.concatenate([values, np.zeros_like(values[:1])])
        return found | {
            "next.done": numbers == rows - 1, "timestamp": (numbers / self._fps).astype(np.float32),
            "frame_index": numbers, "episode_index": np.full(rows, number), "index": self._rows + numbers,
            "task_index": np.full(rows, task),
        }  # fmt: skip

    def _features(self) -> dict[str, Any]:
        spec, columns = self._store.spec, list(units_of(self._store).observation_columns)
        width = spec.observation_shape[0]
        found: dict[str, Any] = {}
        if width:
            found[STATE] = {"dtype": "float32", "shape": [width], "names": columns or None}
        found["action"] = {"dtype": "float32", "shape": [spec.action_dim], "names": None}
        for camera, size in spec.cameras.items():
            about = {"video.fps": self._fps, "video.codec": "h264", "video.pix_fmt": _pixels(size), "has_audio": False}
            names = ["height", "width", "channels"]
            found[CAMERA + camera] = {"dtype": "video", "shape": list(size), "names": names, "info": about}
        return found | {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in self._kinds.items()}

    def _write_rows(self, columns: dict[str, np.ndarray]) -> None:
        import pyarrow as pa

        table = pa.table({
            name: pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            if values.ndim == 2 else pa.array(values)
            for name, values in columns.items()
        })  # fmt: skip
        kinds = {"f": "float32", "b": "bool", "i": "int64"}
        self._kinds = {name: kinds[x.dtype.kind] for name, x in columns.items() if name not in (STATE, "action")}
        if self._writer is None:
            parquet, place = pyarrow_parquet(self._folder), self._place(DATA)
            self._writer = parquet.ParquetWriter(place, table.schema)
        self._writer.write_table(table)

    def _next_file(self) -> None:
        self._close()
        self._file, self._in_file = self._file + 1, 0
        places = {camera: self._place(VIDEO, CAMERA + camera) for camera in self._store.spec.cameras}
        self._videos = {camera: Mp4(str(place), self._fps, CODEC) for camera, place in places.items()}

    def _place(self, template: str, key: str = "") -> Path:
        chunk, file = divmod(self._file, CHUNK_FILES)
        found = self._folder / template.format(chunk_index=chunk, file_index=file, video_key=key)
        found.parent.mkdir(parents=True, exist_ok=True)
        return found

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for video in self._videos.values():
            video.close()


class _Moments:
    """Least, greatest, mean and deviation of rows (n, C), as meta/stats.json has them."""

    def __init__(self) -> None:
        self._count, self._sides = 0, [np.zeros(0), np.zeros(0)]
        self._sum, self._square = np.zeros(0), np.zeros(0)

    def add(self, rows: np.ndarray) -> None:
        rows, first = rows.astype(np.float64), self._count == 0
        low, high = rows.min(axis=0), rows.max(axis=0)
        self._sides = [low, high] if first else [np.minimum(self._sides[0], low), np.maximum(self._sides[1], high)]
        total, square = rows.sum(axis=0), np.square(rows).sum(axis=0)
        self._sum, self._square = (total, square) if first else (self._sum + total, self._square + square)
        self._count += len(rows)

    def facts(self, column: bool) -> dict[str, Any]:
        """`column`: of a vector; else of an image, (C, 1, 1)."""
        mean = self._sum / self._count
        std = np.sqrt(np.maximum(self._square / self._count - np.square(mean), 0))
        shape = (-1,) if column else (-1, 1, 1)
        values = {"min": self._sides[0], "max": self._sides[1], "mean": mean, "std": std}
        return {name: x.reshape(shape).tolist() for name, x in values.items()} | {"count": [self._count]}


def _pixels(size: tuple[int, int, int]) -> str:
    return "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"


def _write_table(path: Path, rows: list[dict[str, Any]], index: str = "") -> None:
    """A small parquet file; `index`: the column that pandas takes for the names of the rows."""
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    if index:
        columns = [{"name": name, "field_name": name, "pandas_type": "int64" if name != index else "unicode",
                    "numpy_type": "int64" if name != index else "object", "metadata": None}
                   for name in table.column_names]  # fmt: skip
        about = {"index_columns": [index], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        table = table.replace_schema_metadata({"pandas": json.dumps(about)})
    pyarrow_parquet(path).write_table(table, path)
