"""RLDS datasets as TensorFlow Datasets writes them (Open X-Embodiment), without TensorFlow: an episode a record.

features.json                              names, shapes and types of what a step holds
NAME-SPLIT.tfrecord-00000-of-00004, ...    records: `steps/observation/...`, `steps/action`, `steps/reward`, ...

Observations are the tensors of a step's `observation` that are numbers, joined by name (`joining`); actions its
`action`, or of several all that are floats, by name. Images are said, and are frames of `cameras` where asked for.

An episode of T steps has T observations. RLDS means nothing by the action and the reward of the last; Open X's datasets
mean them, and often reward there alone. So, where the environment ended the episode (`is_terminal`) and the last step
has an action or a reward that is not 0, that observation stands in for the final one too, and all T transitions are
kept; else it is the final observation of T - 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cvlctl.data.formats.cutting import flags, flat, with_final
from cvlctl.data.formats.joining import Observations, beside
from cvlctl.data.formats.making import Maker
from cvlctl.data.formats.pictures import Cameras
from cvlctl.data.formats.segments import check_names
from cvlctl.data.formats.sources import Facts, Told, reading, regular, same_length
from cvlctl.data.formats.tfrecord import Feature, example, records
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural
from cvlctl.types import Episode
from cvlctl.units import Bounds

FEATURES, INFO = "features.json", "dataset_info.json"
SHARD = re.compile(r"(?P<name>.+)-(?P<split>\w+)\.tfrecord(-(?P<number>\d+)-of-(?P<count>\d+))?")
NAMES = {"actions": "action", "rewards": "reward", "terminals": "is_terminal", "successes": "success"}
TASKS = ("language_instruction", "observation/natural_language_instruction", "observation/language_instruction")
MAX_JSON = 2**26


class Leaf(NamedTuple):
    """What a step holds under a name: numbers of a fixed shape, text, or something else that is not read."""

    kind: str  # "numbers", "text" or what it is
    shape: tuple[int, ...] = ()
    dtype: str = ""


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    observation_keys: Sequence[str] = (),
    split: str = "",
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a dataset, given by its folder, or of one of its files.

    Args:
        keys: our name -> a step's: actions (several with commas between), rewards, terminals, successes.
        split: which one is read; default: train, or the only one.
    """
    path, keys = Path(path), dict(keys or {})
    check_names(keys, list(NAMES))
    files, others = _files(path, split)
    leaves = _leaves(files[0].parent)
    maker = Maker(path, action_bounds, clip_actions, told=told)
    joined = Observations(path, observation_keys, alone=bool(cameras))
    pictures, images = Cameras(path, cameras, image_size, maker.told), _images(leaves)
    chosen = pictures.choose(images)
    shapes = _observations(files[0].parent / FEATURES, leaves, observation_keys)
    seen = joined.chosen(
        f"{files[0].parent / FEATURES}: observation", {k: (0, *leaf.shape) for k, leaf in shapes.items()}
    )
    acts = _actions(files[0].parent, leaves, keys.get("actions", ""))
    single = {ours: keys.get(ours, theirs) for ours, theirs in NAMES.items() if ours != "actions"}
    for ours in keys:
        if ours != "actions" and single[ours] not in leaves:
            raise CvlctlError(f"--key {ours}={keys[ours]}: a step has no such value", f"it has: {', '.join(leaves)}")
    text = next((name for name in TASKS if name in leaves and leaves[name].kind == "text"), "")
    names = [*(_full(k, leaves) for k in seen), *acts, *single.values(), *chosen.values(), text]
    wanted = {f"steps/{name}" for name in names if name}
    maker.told.columns = maker.told.columns or joined.columns()
    steps = 0
    for file in files:
        for number, record in enumerate(records(file)):
            where = f"{file}: record {number}"
            found = {k.removeprefix("steps/"): v for k, v in example(record, wanted, where).items()}
            coded = {k: found.pop(k) for k in chosen.values() if k in found}
            arrays = {k: _shaped(f"{where}: {k}", v, leaves[k]) for k, v in found.items() if k != text and k in leaves}
            for name in [*(_full(k, leaves) for k in seen), *acts]:
                if name not in arrays:
                    raise CvlctlError(
                        f"{where}: no steps/{name}, which {FEATURES} speaks of", "fetch the dataset again"
                    )
            frames = {camera: _frames(f"{where}: {k}", coded.get(k), pictures) for camera, k in chosen.items()}
            length = same_length(where, arrays | frames)
            observations = joined.of_arrays(where, {k: arrays[_full(k, leaves)] for k in seen})
            parts: dict[str, Any] = {ours: arrays[name] for ours, name in single.items() if name in arrays}
            actions = beside([arrays[name] for name in acts], length).reshape(length, -1)
            steps += yield from _episode(
                maker, where, observations, frames, actions, parts, steps, _task(where, found.get(text))
            )
    maker.told.dropped = sorted(
        {k.removeprefix("observation/") for k in leaves if k.startswith("observation/")}
        - {*seen, *(k.removeprefix("observation/") for k in chosen.values())}
    )
    pictures.left_out(images)
    if len(acts) > 1:
        maker.told.remarks.append(f"actions are joined of {', '.join(acts)}")
    if others:
        maker.told.remarks.append(f"of the splits {', '.join(sorted(others))} nothing is read: --split NAME reads one")
    maker.finish(maker.told.columns)


def _episode(
    maker: Maker,
    where: str,
    observations: np.ndarray | None,
    frames: dict[str, np.ndarray],
    actions: np.ndarray,
    parts: dict[str, Any],
    begun: int,
    task: str,
) -> Any:
    """Make one; returns its number of transitions."""
    rewards = flat(parts["rewards"], where) if "rewards" in parts else None
    solved = flags(parts["successes"], where) if "successes" in parts else None
    ended = "terminals" in parts and bool(flags(parts["terminals"], where)[-1:].any())
    meant = bool(actions[-1:].any()) or (rewards is not None and bool(rewards[-1:].any()))
    count = len(actions)
    if observations is not None:
        observations, count = with_final(observations, None, ended and meant, len(actions))
    for camera, of in frames.items():
        frames[camera], count = with_final(of, None, ended and meant, len(actions))
    if count:
        yield from maker.make(
            where, observations=observations, images=frames, actions=actions[:count], terminated=ended,
            rewards=None if rewards is None else rewards[:count],
            successes=None if solved is None else solved[:count], collected_at=begun, task=task,
        )  # fmt: skip
    return count


def facts(path: Path) -> Facts:
    """The dataset's name for the task; which split is read is not known here."""
    files, _ = _files(path, "", any_split=True)
    info = files[0].parent / INFO
    name = ""
    if info.is_file():
        with reading(str(info)):
            name = str(_json(info).get("name", ""))
    named = SHARD.fullmatch(files[0].name)
    return Facts(0, name or (named["name"] if named else ""), data=files)


# --------------------------------------------------------------------------------------------------------------- files


def _files(path: Path, split: str, *, any_split: bool = False) -> tuple[list[Path], set[str]]:
    """The files of a split, in order, and the names of the other splits."""
    if not path.is_dir():
        regular(path, "a folder with features.json and TFRecord files, or one of these")
        return [path], set()
    below = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
    folders = [folder for folder in below if (folder / FEATURES).is_file()]
    if len(folders) > 1:
        raise CvlctlError(f"{path} holds several datasets", f"give one: {', '.join(str(f) for f in folders[:5])}")
    found: dict[str, list[Path]] = {}
    for file in sorted((folders or [path])[0].iterdir(), key=lambda file: natural(file.name)):
        if named := SHARD.fullmatch(file.name):
            found.setdefault(named["split"], []).append(file)
    if not found:
        hint = "give the folder of a dataset's version, such as bridge_dataset/1.0.0; array_record files are not read"
        raise CvlctlError(f"{path} has no files NAME-SPLIT.tfrecord-...", hint)
    if any_split:
        return [file for files in found.values() for file in files], set()
    chosen = split or ("train" if "train" in found or len(found) > 1 else next(iter(found)))
    if chosen not in found:
        raise CvlctlError(f"{path} has no split {chosen!r}", f"--split: {', '.join(found)}")
    last = SHARD.fullmatch(found[chosen][0].name)
    if last and last["count"] and int(last["count"]) != len(found[chosen]):
        what = f"{path}: of the {int(last['count'])} files of split {chosen} there are {len(found[chosen])}"
        raise CvlctlError(what, "fetch the others too, or give one file: each is read alone as well")
    return found[chosen], set(found) - {chosen}


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON:
        raise ValueError("too large to be true")
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


# --------------------------------------------------------------------------------------------------------------- shapes


def _leaves(folder: Path) -> dict[str, Leaf]:
    """What a step holds, by names such as observation/state."""
    where = folder / FEATURES
    if not where.is_file():
        raise CvlctlError(f"{where} is missing: it says the shapes of what the records hold",
                          "it lies beside the TFRecord files where the dataset came from: fetch it too")  # fmt: skip
    with reading(str(where)):
        steps = _json(where)["featuresDict"]["features"].get("steps")
        if steps is None or "sequence" not in steps:
            raise CvlctlError(f"{where}: it has no steps, so that this is no RLDS dataset")
        return dict(_walk(steps["sequence"]["feature"], "", 0))


def _walk(node: Mapping[str, Any], name: str, depth: int) -> Iterator[tuple[str, Leaf]]:
    if depth > 50:
        raise ValueError("features within features without an end")
    if "featuresDict" in node:
        for key, inner in node["featuresDict"]["features"].items():
            yield from _walk(inner, f"{name}/{key}" if name else key, depth + 1)
    elif "tensor" in node:
        about = node["tensor"]
        shape = tuple(int(size) for size in (about.get("shape") or {}).get("dimensions", ()))
        plain = about.get("encoding", "none") in ("none", "", None) and min(shape, default=1) > 0
        kind = "text" if about.get("dtype") == "string" else "numbers" if plain else "tensors of no fixed shape"
        yield name, Leaf(kind, shape, str(about.get("dtype", "")))
    else:
        known = {"text": "text", "image": "images", "video": "videos"}
        yield name, Leaf(next((words for key, words in known.items() if key in node), "something that is not read"))


def _images(leaves: Mapping[str, Leaf]) -> list[str]:
    return [name for name, leaf in leaves.items() if leaf.kind in ("images", "videos")]


def _frames(where: str, found: Feature | None, pictures: Cameras) -> np.ndarray:
    if not isinstance(found, list):
        raise CvlctlError(f"{where}: there are no pictures, which {FEATURES} speaks of", "fetch the dataset again")
    return pictures.of_files(where, found)


def _full(name: str, leaves: Mapping[str, Leaf]) -> str:
    return name if name == "observation" and name in leaves else f"observation/{name}"


def _observations(where: Path, leaves: Mapping[str, Leaf], keys: Sequence[str]) -> dict[str, Leaf]:
    found = {name.removeprefix("observation/"): leaf for name, leaf in leaves.items()
             if name == "observation" or name.startswith("observation/")}  # fmt: skip
    for key in keys:
        if key in found and found[key].kind != "numbers":
            raise CvlctlError(f"--observation-key {key}: holds {found[key].kind}, which is not imported")
    if not found:
        raise CvlctlError(f"{where}: a step has no observation", f"it has: {', '.join(leaves)}")
    return {name: leaf for name, leaf in found.items() if leaf.kind == "numbers"}


def _actions(folder: Path, leaves: Mapping[str, Leaf], given: str) -> list[str]:
    """Names of what actions are made of."""
    names = given.split(",") if given else ["action"] if "action" in leaves else []
    names = [name if name in leaves else f"action/{name}" for name in names]
    inner = sorted((name for name in leaves if name.startswith("action/")), key=natural)
    names = names or [name for name in inner if leaves[name].dtype.startswith(("float", "bfloat"))]
    where, choose = folder / FEATURES, f"--key actions=NAME[,NAME] says which: {', '.join(leaves)}"
    if not names or any(name not in leaves for name in names):
        raise CvlctlError(f"{where}: a step has no {given or 'action'}", choose)
    for name in names:
        leaf = leaves[name]
        if leaf.kind != "numbers" or len(leaf.shape) > 1:
            raise CvlctlError(f"{where}: {name} holds {leaf.kind} of shape {leaf.shape}, no actions", choose)
        if not leaf.dtype.startswith(("float", "bfloat")):
            raise CvlctlError(f"{where}: {name}: {leaf.dtype} actions: discrete actions are not supported", choose)
    return names


def _shaped(where: str, values: Feature, leaf: Leaf) -> np.ndarray:
    """(T, *shape)."""
    size = int(np.prod(leaf.shape, dtype=np.int64))
    if isinstance(values, list) or size == 0 or len(values) % size:
        what = "text" if isinstance(values, list) else f"{len(values)} values"
        raise CvlctlError(f"{where}: has {what}, which are no rows of shape {leaf.shape}", "fetch the dataset again")
    return values.reshape(-1, *leaf.shape)


def _task(where: str, found: Feature | None) -> str:
    """The text of the first step."""
    if not isinstance(found, list) or not found:
        return ""
    with reading(f"{where}: the instruction"):
        return found[0].decode()
