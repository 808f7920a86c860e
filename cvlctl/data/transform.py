"""`cvlctl data merge | split | filter | subsample | drop-rewards`: stores made of stores.

Every function returns what it wrote as plain data (`--json` prints it). It finds what it wrote earlier from the same
stores ("finished already"), and refuses to overwrite anything else unless forced.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl import files
from cvlctl.data.criteria import Criteria, meets, no_label, ranges
from cvlctl.data.derive import (
    Output,
    Part,
    command_line,
    copied_labels,
    derive,
    finished_already,
    label_arrays,
    summary,
    whole,
)
from cvlctl.data.store import Store, open_store
from cvlctl.data.units import bounds_of, require_alike, units_of, widest
from cvlctl.errors import CvlctlError
from cvlctl.folders import again_where_it_exists
from cvlctl.progress import say
from cvlctl.units import plain

FINISHED = "finished already"


@again_where_it_exists
def merge(
    paths: Sequence[Path], out: Path, *, task: str | None = None, rescale: bool = False, force: bool = False
) -> dict[str, Any]:
    """Join stores of one observation and action shape, one after the other; labels that all of them have are kept.

    Args:
        task: the new store's task; default: the parents', joined by " + " where they differ. Episodes keep their own.
        rescale: bring the actions of stores of different action bounds to bounds that hold them all.
    """
    if len(paths) < 2:
        raise CvlctlError("merge needs two stores or more", "cvlctl data merge A B --out C")
    command = command_line("merge", *paths, out=out, task=task, rescale=rescale or None)
    if done := finished_already(command, [Path(out)], paths, force=force):
        return summary(done[0], FINISHED)
    stores = [open_store(path) for path in paths]
    for path, store in zip(paths, stores, strict=True):
        if _shape(store) != _shape(stores[0]):
            what = f"{path} has {_shape(store)}, but {paths[0]} has {_shape(stores[0])}"
            raise CvlctlError(what, "merge stores of one robot and task family")
    bounds = [bounds_of(store) for store in stores]
    units = [
        units_of(store)._replace(action_bounds=None if rescale else b) for store, b in zip(stores, bounds, strict=True)
    ]
    way_out = "--rescale brings all actions to bounds that hold both; in Python, merge(..., rescale=True)"
    require_alike(list(zip(paths, units, strict=True)), stores[0].spec.action_dim, way_out)
    to = widest(bounds, stores[0].spec.action_dim) if rescale else None
    if to is not None:
        for path, found in zip(paths, bounds, strict=True):
            if found is not None and plain(found) == plain(to):
                continue
            say(f"{path}: actions of {plain(found) or '[-1, 1], since it does not say'} become those of {plain(to)}")
    parts = [whole(store) for store in stores]
    labels = copied_labels(parts)
    left_out = sorted({name for store in stores for name in label_arrays(store)} - set(labels))
    name = task or " + ".join(dict.fromkeys(store.task for store in stores))
    (store,) = derive([Output(Path(out), parts, labels, name, to)], command, force=force)
    return {**summary(store), "labels_left_out": left_out}


@again_where_it_exists
def split(
    path: Path, *, train: float = 0.9, seed: int = 0, out: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Divide a store by episode, by a seeded draw, into `<out>-train.zarr` and `<out>-validation.zarr`: both or none.

    Args:
        train: share of the episodes, in (0, 1); both stores get at least one.
        out: default: the store's own path without its suffix.
    """
    stem = files.named(Path(out)) if out is not None else files.named(Path(path)).with_suffix("")
    outs = [stem.with_name(f"{stem.name}-{name}.zarr") for name in ("train", "validation")]
    command = command_line("split", path, train=train, seed=seed, out=out)
    if done := finished_already(command, outs, [path], force=force):
        return dict(zip(("train", "validation"), (summary(store, FINISHED) for store in done), strict=True))
    store = open_store(path)
    if not 0.0 < train < 1.0:
        raise CvlctlError(
            f"--train {train:g} is no share of the episodes", "give a number between 0 and 1, such as 0.9"
        )
    if store.num_episodes < 2:
        raise CvlctlError(f"{path} has one episode: it cannot be split", "collect more episodes")
    order = _generator(seed).permutation(store.num_episodes)
    count = min(max(round(train * store.num_episodes), 1), store.num_episodes - 1)
    parts = [Part(store, np.sort(numbers)) for numbers in (order[:count], order[count:])]
    outputs = [Output(to, [part], copied_labels([part]), store.task) for to, part in zip(outs, parts, strict=True)]
    written = derive(outputs, command, force=force)
    return dict(zip(("train", "validation"), map(summary, written), strict=True))


@again_where_it_exists
def filter_episodes(path: Path, out: Path, criteria: Criteria, *, force: bool = False) -> dict[str, Any]:
    """Keep the episodes that meet the criteria, in their order.

    Raises:
        CvlctlError: no criterion, a label that the store lacks, an unknown task, or no episode that meets them.
    """
    options = {
        "min_return": criteria.min_return, "max_return": criteria.max_return, "success": criteria.success,
        "min_length": criteria.min_length, "max_length": criteria.max_length, "task": criteria.tasks,
        "collected_from": criteria.collected_from, "collected_to": criteria.collected_to,
        "label": criteria.label if criteria.label != "given" else None,
    }  # fmt: skip
    command = command_line("filter", path, out=out, **options)
    if done := finished_already(command, [Path(out)], [path], force=force):
        return summary(done[0], FINISHED)
    store = open_store(path)
    numbers = np.flatnonzero(meets(store, criteria))
    if len(numbers) == 0:
        raise CvlctlError(f"{path}: none of {store.num_episodes} episodes passes", ranges(store, criteria.label))
    return _some(Part(store, numbers), out, command, force)


@again_where_it_exists
def subsample(
    path: Path,
    out: Path,
    *,
    episodes: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
    force: bool = False,
) -> dict[str, Any]:
    """Keep a seeded choice of episodes, by number or by fraction, in their order."""
    command = command_line("subsample", path, out=out, episodes=episodes, fraction=fraction, seed=seed)
    if done := finished_already(command, [Path(out)], [path], force=force):
        return summary(done[0], FINISHED)
    store = open_store(path)
    if (episodes is None) == (fraction is None):
        raise CvlctlError("subsample needs one of --episodes and --fraction", "such as --fraction 0.1")
    if fraction is not None and not 0.0 < fraction <= 1.0:
        raise CvlctlError(f"--fraction {fraction:g} is not in (0, 1]", "such as --fraction 0.1")
    if episodes is not None and not 1 <= episodes <= store.num_episodes:
        raise CvlctlError(f"--episodes {episodes}: {path} has {store.num_episodes} episodes", "choose 1 to that many")
    count = episodes or max(1, round((fraction or 0.0) * store.num_episodes))
    numbers = np.sort(_generator(seed).permutation(store.num_episodes)[:count])
    return _some(Part(store, numbers), out, command, force)


@again_where_it_exists
def drop_rewards(path: Path, out: Path, *, labels: Sequence[str] = (), force: bool = False) -> dict[str, Any]:
    """Leave labels out, rewards and successes both: all of them, or those named. The digest stays the same."""
    command = command_line("drop-rewards", path, out=out, label=labels)
    if done := finished_already(command, [Path(out)], [path], force=force):
        return summary(done[0], FINISHED)
    store = open_store(path)
    for label in labels:
        if label not in store.labels:
            raise no_label(store, label)
    part = whole(store)
    names = tuple(f"labels/{label}/" for label in labels or store.labels)
    kept = {name: rows for name, rows in copied_labels([part]).items() if not name.startswith(names)}
    (written,) = derive([Output(Path(out), [part], kept, store.task)], command, force=force)
    return summary(written)


def in_words(result: dict[str, Any]) -> str:
    """The result of any of these as one line, two for `split`."""
    if "status" not in result:
        return "\n".join(in_words(one) for one in result.values())
    place = f"{result['status']}: {result['path']}" if result["status"] == FINISHED else result["path"]
    if "examples" in result:
        return f"{place}: {result['examples']:,} success examples"
    of = f" of {result['of_episodes']:,}" if "of_episodes" in result else ""
    line = f"{place}: {result['episodes']:,}{of} episodes, {result['transitions']:,} transitions, "
    line += f"labels: {', '.join(result['labels']) or 'none'}"
    if result.get("labels_left_out"):
        line += f"\nleft out, since not every store has them: {', '.join(result['labels_left_out'])}"
    return line


def _some(part: Part, out: Path, command: str, force: bool) -> dict[str, Any]:
    (store,) = derive([Output(Path(out), [part], copied_labels([part]), part.store.task)], command, force=force)
    return {**summary(store), "of_episodes": part.store.num_episodes}


def _shape(store: Store) -> str:
    cameras = ", ".join(f"camera {name} {size}" for name, size in store.spec.cameras.items())
    seen = f"observations of shape {store.spec.observation_shape}" + (f", {cameras}," if cameras else "")
    return f"{seen} and {store.spec.action_dim} action dimensions"


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise CvlctlError(f"--seed {seed} is negative", "give 0 or more")
    return np.random.default_rng(seed)
