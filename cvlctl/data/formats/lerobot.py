"""LeRobot's datasets, v2.0 to v3.0: a folder of parquet files, a row a frame, and `meta/`.

meta/info.json          fps, features (dtype, shape, names), data_path: where the rows lie, of an episode a file
                        (data/chunk-000/episode_000000.parquet), or of several (data/chunk-000/file-000.parquet)
meta/tasks.jsonl        or tasks.parquet: texts of the tasks
meta/stats.json         or episodes_stats.jsonl: what actions lie in

State and action are read; images and videos where they are asked for (`lerobot_images`), else said and left out. A
frame has no observation after its action, so that the last one of an episode gives the final observation
(`cutting.with_final`). Whether an episode's end was the environment's is not told, but for simulated data
(`next.reward` or `next.success`): there `next.done` counts as such.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cvlctl.data.formats import segments
from cvlctl.data.formats.joining import Observations, side_by_side
from cvlctl.data.formats.lerobot_images import image_columns, images_of
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.pictures import Cameras
from cvlctl.data.formats.rows import episodes_of_rows
from cvlctl.data.formats.sources import Column, Facts, Told, reading, regular, steps_of
from cvlctl.data.formats.tables import Table, open_table, small_parquet
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural
from cvlctl.types import Episode
from cvlctl.units import KEY, Bounds, plain

INFO = Path("meta") / "info.json"
FIELDS = ("episode_chunk", "episode_index", "chunk_index", "file_index")  # that a data_path may be made of
MAX_META = 2**30  # bytes of a file of meta/
MAX_TASKS = 1_000_000


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    observation_keys: Sequence[str] = (),
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a LeRobot dataset, given by its folder.

    Args:
        observation_keys: features to join, in this order; default: all `observation.*` that are vectors, by name.
        action_bounds: default: the least and the greatest of meta/stats.json, where actions leave [-1, 1].
    """
    path = Path(path)
    info = _info(path)
    features, tasks, files = info["features"], _tasks(path), _files(path, info)
    ours = _ours(path, info)
    cameras = ["all"] if ours and not cameras and images_of(features) else cameras
    maker = Maker(path, action_bounds, clip_actions, _bounds(path, info), told)
    joined, pictures = Observations(path, observation_keys), Cameras(path, cameras, image_size, maker.told)
    chosen = pictures.choose(images_of(features))
    steps = episodes = 0
    for file in files:
        with open_table(file) as table:
            columns, names = _columns(table, features, joined, alone=bool(chosen))
            columns |= image_columns(path, info, table, chosen, pictures)
            ends = segments.ends_of(file, {"episode_index": table.column(["episode_index"])}, table.length)
            columns["ends"] = segments.last_rows(file, _counted(file, table, ends), table.length)
            maker.told.columns = maker.told.columns or names
            maker.path = file
            if ours:  # whose last rows are final observations, whatever ended the episode
                columns.pop("terminals", None)
            for i, episode in enumerate(episodes_of_rows(maker, columns, horizon=None, tasks=tasks, offset=steps)):
                yield replace(episode, **ours[episodes + i]) if ours else episode
            steps, episodes = steps + table.length, episodes + len(ends if ends is not None else ())
    maker.path = path
    maker.told.dropped = sorted({*joined.left_out, *pictures.left_out(images_of(features))})
    if episodes != info.get("total_episodes", episodes):
        maker.told.remarks.append(f"{INFO} counts {info['total_episodes']} episodes: {episodes} are in this folder")
    maker.finish(maker.told.columns)


def facts(path: Path) -> Facts:
    """Frames a second, the task where there is one, the robot, and what actions lie in."""
    info, tasks = _info(path), [task for task in _tasks(path) if task]
    if isinstance(said := info.get("cvlctl"), dict):
        where, environment = str(path / INFO), said.get("environment")
        return Facts(
            int(info.get("total_frames", 0)), str(said.get("task", "")), steps_of(said.get("horizon"), where), {},
            [*_files(path, info), *_videos(path)], plain(said[KEY], where) if said.get(KEY) is not None else None,
            environment if isinstance(environment, dict) else None, str(said.get("exported", "")),
            units=dict(said.get("units", {})),
        )  # fmt: skip
    fps = info.get("fps")
    kept: dict[str, Any] = {key: info[key] for key in ("codebase_version", "robot_type", "fps") if key in info}
    period = {"control_period": 1 / fps} if isinstance(fps, int | float) and fps > 0 else {}
    frames = info.get("total_frames")
    return Facts(
        frames if isinstance(frames, int) else 0, tasks[0] if len(tasks) == 1 else path.resolve().name, None, kept,
        _files(path, info), _bounds(path, info), units=period, videos=_videos(path),
    )  # fmt: skip


def _ours(path: Path, info: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a folder that we wrote says of its episodes, by the names that `Episode` has for it; of another nothing."""
    if not isinstance(info.get("cvlctl"), dict):
        return []
    names = {"terminated": bool, "collected_at": int, "seed": int}
    files = sorted((path / "meta" / "episodes").rglob("*.parquet"), key=lambda file: natural(str(file)))
    with reading(str(path / "meta" / "episodes")):
        rows = [row for file in files for row in small_parquet(file, [f"cvlctl/{name}" for name in names])]
        found = [{name: kind(row[f"cvlctl/{name}"]) for name, kind in names.items()} for row in rows]
        if len(found) != info.get("total_episodes"):
            raise ValueError(f"it tells of {len(found)} episodes, {INFO} of {info.get('total_episodes')}")
        return found


# --------------------------------------------------------------------------------------------------------------- rows


def _columns(
    table: Table, features: Mapping[str, Any], joined: Observations, alone: bool
) -> tuple[dict[str, Column], list[str]]:
    """The columns that `episodes_of_rows` takes, and names of an observation's; `alone`: without a vector will do."""
    for name in ("action", "episode_index", "frame_index"):
        if name not in table.names:
            raise CvlctlError(f"{table.path}: no column {name!r}", f"there are: {', '.join(table.names[:20])}")
    shapes = {
        name: (table.length, *map(int, about.get("shape") or (1,)))
        for name, about in features.items()
        if name.startswith("observation.") and name in table.names and about.get("dtype") not in ("image", "video")
    }
    chosen = joined.chosen(str(table.path), shapes) if shapes or not alone else []
    parts = [table.column([name]) for name in chosen]
    for name, part in zip(chosen, parts, strict=True):
        width = 1 if len(part.shape) == 1 else part.shape[1]
        if (width,) != shapes[name][1:]:
            raise CvlctlError(f"{part.where}: has rows of {width}, in {INFO} it is {list(shapes[name][1:])}")
    found = {"observations": side_by_side(parts)} if parts else {}
    found |= {"actions": side_by_side([table.column(["action"])])}
    names = {"rewards": "next.reward", "successes": "next.success", "terminals": "next.done", "task": "task_index"}
    if not {"next.reward", "next.success"} & set(table.names):
        del names["terminals"]  # it marks ends alone
    found |= {ours: table.column([theirs]) for ours, theirs in names.items() if theirs in table.names}
    return found, _names(chosen, shapes, features)


def _counted(file: Path, table: Table, ends: np.ndarray | None) -> np.ndarray:
    """The ends of episodes, in each of which frames are numbered 0, 1, 2, ...

    Raises:
        CvlctlError: some are missing, or shuffled.
    """
    assert ends is not None
    frames, start = table.column(["frame_index"]), 0
    for end in ends.tolist():
        numbers = frames.take(end - start)
        if (numbers != np.arange(end - start)).any():
            at = int(np.flatnonzero(numbers != np.arange(end - start))[0])
            what = f"{file}: frame_index is {numbers[at]} in row {start + at}, where frame {at} of an episode is"
            raise CvlctlError(what, "rows are to be whole episodes, frame by frame")
        start = end
    return ends


def _names(chosen: Sequence[str], shapes: Mapping[str, tuple[int, ...]], features: Mapping[str, Any]) -> list[str]:
    """Names of an observation's columns: those of meta/info.json, with the feature's where two are alike."""
    found, full = [], []
    for name in chosen:
        width = shapes[name][1]
        given = features[name].get("names")
        if isinstance(given, dict):  # {"motors": [...]}
            given = next((x for x in given.values() if isinstance(x, list)), None)
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
            given = given[0]
        if not (isinstance(given, list) and len(given) == width and all(isinstance(x, str) for x in given)):
            given = [f"{name}[{i}]" for i in range(width)] if width > 1 else [name]
            full += given
        else:
            full += [f"{name}.{x}" for x in given]
        found += given
    return found if len(set(found)) == len(found) else full


# --------------------------------------------------------------------------------------------------------------- meta/


def _info(path: Path) -> dict[str, Any]:
    """meta/info.json, whose features are what they should be."""
    where = path / INFO
    if not path.is_dir() or not where.is_file():
        regular(path, "a LeRobot dataset's folder") if not path.is_dir() else None
        raise CvlctlError(f"{path} is no folder of a LeRobot dataset: no {INFO} in it",
                          "give the folder that has meta/ and data/ in it; a parquet file alone is read by the format "
                          "table: --key observations=observation.state --key actions=action "
                          "--key episode_index=episode_index")  # fmt: skip
    with reading(str(where)):
        info = json.loads(_text(where))
        features = info["features"]
        if not all(isinstance(about, dict) for about in features.values()):
            raise ValueError("its features are no objects")
        for about in features.values():
            tuple(map(int, about.get("shape") or ()))
        if re.match(r"v?[01]\.", str(info.get("codebase_version", ""))):
            raise CvlctlError(f"{where}: of version {info['codebase_version']}, which is not read",
                              "convert it with LeRobot, to v2.1 or v3.0")  # fmt: skip
    return dict(info)


def _text(path: Path) -> str:
    regular(path, "a file of text")
    if path.stat().st_size > MAX_META:
        raise CvlctlError(f"{path}: {path.stat().st_size:,} bytes are too many to be true")
    return path.read_text(encoding="utf-8")


def _files(path: Path, info: Mapping[str, Any]) -> list[Path]:
    """The files of rows, in the order of their numbers."""
    template, where = info.get("data_path"), path / INFO
    with reading(str(where)):
        parts = list(string.Formatter().parse(str(template)))
        fields = [(name, spec, change) for _, name, spec, change in parts if name is not None]
        sound = all(n in FIELDS and re.fullmatch(r"0?\d{0,2}d?", s or "") and not c for n, s, c in fields)
        pattern = "".join(_literal(text) + ("*" if name is not None else "") for text, name, _, _ in parts)
        if not sound or not fields or {"..", "~"} & set(PurePosixPath(pattern).parts) or pattern.startswith("/"):
            raise CvlctlError(f"{where}: data_path is {str(template)[:80]!r}, which leads to no file of this folder",
                              "such as data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet")  # fmt: skip
        files = sorted((file for file in path.glob(pattern) if file.is_file()), key=lambda file: natural(str(file)))
    if not files:
        raise CvlctlError(f"{path}: no {template}", "the rows are missing: download data/ of the dataset as well")
    return files


def _videos(path: Path) -> list[Path]:
    return sorted((file for file in (path / "videos").rglob("*.mp4") if file.is_file()), key=str)


def _literal(text: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", text)


def _tasks(path: Path) -> list[str]:
    """The texts of the tasks by their numbers; none where the dataset has no file of them."""
    lines, table = path / "meta" / "tasks.jsonl", path / "meta" / "tasks.parquet"
    if lines.is_file():
        with reading(str(lines)):
            rows = [json.loads(line) for line in _text(lines).splitlines() if line.strip()]
    else:
        rows = small_parquet(table) if table.is_file() else []
    tasks: dict[int, str] = {}
    with reading(str(lines if lines.is_file() else table)):
        for row in rows:
            text = row.get("task", row.get("__index_level_0__"))  # how pandas writes an index
            if not isinstance(text, str) or not 0 <= int(row["task_index"]) < MAX_TASKS:
                raise ValueError(f"{str(row)[:80]} is no task with its number")
            tasks[int(row["task_index"])] = text
    return [tasks.get(i, "") for i in range(max(tasks, default=-1) + 1)]


def _bounds(path: Path, info: Mapping[str, Any]) -> Bounds | None:
    """What actions lie in, as we said or of the statistics; None where that is [-1, 1], or nothing tells."""
    if isinstance(said := info.get("cvlctl"), dict):
        return plain(said[KEY], str(path / INFO)) if said.get(KEY) is not None else None
    whole, lines = path / "meta" / "stats.json", path / "meta" / "episodes_stats.jsonl"
    where = whole if whole.is_file() else lines
    if not where.is_file():
        return None
    with reading(str(where)):
        if where == whole:
            found = [json.loads(_text(where)).get("action")]
        else:
            found = [json.loads(line)["stats"].get("action") for line in _text(where).splitlines() if line.strip()]
        sides = [[np.asarray(one[side], np.float64).ravel() for one in found if one] for side in ("min", "max")]
        if not sides[0]:
            return None
        low, high = np.stack(sides[0]).min(axis=0), np.stack(sides[1]).max(axis=0)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low <= high).all()):
            raise ValueError("least and greatest of the actions are no numbers in order")
    if low.min() >= -1 and high.max() <= 1:
        return None
    still = low == high  # of what never moved, any range does
    return np.where(still, low - 1, low).tolist(), np.where(still, high + 1, high).tolist()
