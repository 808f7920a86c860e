"""Derived stores: episodes of other stores with all their labels, streamed chunk by chunk, and where they came from.

Memory stays flat: one chunk of each array of a parent, and what the writer holds until its own chunk is full.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from cvlctl import files
from cvlctl.data.attributes import KEYS
from cvlctl.data.layout import SIM
from cvlctl.data.store import Column, Store, open_store
from cvlctl.data.units import agreed, bounds_of
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.folders import put_in_place, put_right
from cvlctl.progress import Progress
from cvlctl.types import Episode
from cvlctl.units import KEY, Bounds, Units, physical, plain, scaled

# what is true of a store's writing, not of its episodes
OWN_PROVENANCE = ("versions", "platform", "where", "git_commit", "created", "recipe", "parents", "command", "inputs")

Rows = Callable[[], Iterator[np.ndarray]]  # (T+1,) rows of every episode, in order, the final row included


class Part(NamedTuple):
    """Some episodes of a store; `numbers` (n,) ascend."""

    store: Store
    numbers: np.ndarray


class Output(NamedTuple):
    """A store to be written: episodes, label arrays by name ("labels/given/reward"), and the store's task.

    `bounds`: what its actions are rescaled to; None: they stay as they are. `cameras`: whose frames are kept; None: of
    all. `drawn`: frames by camera, beside those, of an episode's states (T+1, n). `told`: attributes beside the
    parents' own.
    """

    path: Path
    parts: Sequence[Part]
    labels: Mapping[str, Rows]
    task: str
    bounds: Bounds | None = None
    cameras: Collection[str] | None = None
    drawn: Callable[[np.ndarray], dict[str, np.ndarray]] | None = None
    told: Mapping[str, Any] = MappingProxyType({})


def whole(store: Store) -> Part:
    """All of a store."""
    return Part(store, np.arange(store.num_episodes))


def bounds(part: Part) -> Iterator[tuple[int, int]]:
    """First row and end of every episode of a part."""
    ends = part.store.episode_ends()
    starts = ends - part.store.lengths() - 1
    yield from zip(starts[part.numbers].tolist(), ends[part.numbers].tolist(), strict=True)


def column_rows(parts: Sequence[Part], name: str) -> Iterator[np.ndarray]:
    """(T+1, ...) rows of one array, episode by episode."""
    for part in parts:
        column = Column(part.store, name)
        for start, end in bounds(part):
            yield column.rows(start, end)


def episodes(
    parts: Sequence[Part], to: Bounds | None = None, cameras: Collection[str] | None = None
) -> Iterator[Episode]:
    """The episodes, without labels, with their frames (None: of all cameras), and the simulator's states where all have
    such. Each keeps its task, seed and collected_at. Actions are rescaled to bounds `to`."""
    for part in parts:
        store = part.store
        observation, action = Column(store, "data/observation"), Column(store, "data/action")
        frames = {camera: Column(store, store.camera_array(camera)) for camera in _kept(store, cameras)}
        states = Column(store, SIM) if has_states(parts) else None
        tasks, terminated = store.episode_tasks(), store.terminated().tolist()
        collected_at, seeds = store.collected_at().tolist(), store.seeds().tolist()
        for i, (start, end) in zip(part.numbers.tolist(), bounds(part), strict=True):
            about = (terminated[i], tasks[i], collected_at[i], seeds[i])
            actions = action.rows(start, end - 1)
            if to is not None:
                actions = scaled(physical(actions, bounds_of(store)), to, clip=False)
            images = {camera: column.rows(start, end) for camera, column in frames.items()}
            state = states.rows(start, end) if states else None
            yield Episode(observation.rows(start, end), actions, None, None, *about, images, state)


def _kept(store: Store, cameras: Collection[str] | None) -> list[str]:
    return [name for name in store.spec.cameras if cameras is None or name in cameras]


def has_states(parts: Sequence[Part]) -> bool:
    """Whether all parts have states of the simulator, so that what is made of them has."""
    return all(part.store.has_sim_state for part in parts)


def label_arrays(store: Store) -> list[str]:
    """Names of the label arrays of a store."""
    return [name for label in store.labels for name in store.label_arrays(label)]


def copied_labels(parts: Sequence[Part]) -> dict[str, Rows]:
    """The label arrays that every part has."""
    common = [name for name in label_arrays(parts[0].store) if all(name in label_arrays(p.store) for p in parts)]
    return {name: lambda name=name: column_rows(parts, name) for name in common}  # type: ignore[misc]


def derive(
    outputs: Sequence[Output], command: str, *, force: bool = False, inputs: Mapping[str, str] | None = None
) -> list[Store]:
    """Write stores, all of them or none: whatever goes wrong, nothing half-written stays, and old stores stay.

    Args:
        command: the command line that does this, for the provenance.
        inputs: digest by name of whatever else than stores it read.
        force: replace stores that are there already, once the new ones are complete.

    Raises:
        CvlctlError: an output exists (and no `force`), another writer is at work there, a parent is damaged, or the
            disk refuses.
    """
    writers: list[StoreWriter] = []
    _check_parents(outputs)
    try:
        for output in outputs:
            parents = [part.store for part in output.parts]
            horizon = max(store.spec.horizon for store in parents)
            origin = {**_agreed([_about(store) for store in parents]), **_origin(parents, command)}
            if output.bounds is not None:
                origin[KEY] = plain(output.bounds)
            if inputs:
                origin["inputs"] = dict(inputs)
            writer = StoreWriter(
                output.path, task=output.task, horizon=horizon, provenance=origin, force=force, resume=False,
                in_place=False,
            )  # fmt: skip
            writers.append(writer)
            _fill(writer, output)
        for writer, output in zip(writers, outputs, strict=True):
            writer.finish(**_attributes(output))
        put_in_place([writer.folder for writer in writers])
    except BaseException:
        for writer in writers:
            writer.close(discard=True)
        raise
    return [open_store(output.path) for output in outputs]


def finished_already(
    command: str,
    outs: Sequence[Path],
    parents: Sequence[Path],
    *,
    force: bool = False,
    inputs: Callable[[], Mapping[str, str]] = dict,
) -> list[Store]:
    """The stores at `outs`, where this very command wrote all of them, from what it would read now; else none.

    With `force` it is none either: but for a command that was killed when all was done, and could not tidy up. It might
    have replaced what it read, and must not do the same to its own result.

    Args:
        outs: what killed commands left there is put right first: a parent may be among it.
        inputs: makes what `derive` was given; called where the rest is the same.
    """
    tidied = [put_right(out) for out in outs]  # all of them
    if not all(out.exists() for out in outs) or (force and not any(tidied)):
        return []
    try:
        found = [open_store(out) for out in outs]
    except CvlctlError:  # who writes there will say what it is
        return []
    if any(store.provenance.get("command") != command for store in found):
        return []
    places = [files.real(out) for out in outs]
    known = [None if any(tidied) and files.real(path) in places else _content(open_store(path)) for path in parents]
    made = inputs()
    return found if all(_same(store.provenance, known, dict(made)) for store in found) else []


def _content(store: Store) -> list[Any]:
    return [store.digest(), {label: store.label_digest(label) for label in store.labels}, store.sim_digest()]


def _same(provenance: dict[str, Any], parents: list[Any], inputs: dict[str, str]) -> bool:
    """Whether a store is of these parents (None: of whichever) and inputs."""
    written, then = provenance.get("parents"), provenance.get("inputs", {})
    if not isinstance(written, list) or len(written) != len(parents) or then != inputs:
        return False
    pairs = zip(written, parents, strict=True)
    return all(
        now is None or (isinstance(before, dict) and [before.get(key) for key in ("digest", "labels", "sim")] == now)
        for before, now in pairs
    )


def command_line(name: str, *words: object, **options: Any) -> str:
    """The command line that does the same; what was left to its default of None is left out."""
    line = ["cvlctl", "data", name, *map(str, words)]
    for key, value in options.items():
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, bool):
            line.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
            line += [word for one in many for word in (flag, str(one))]
    return shlex.join(line)


def summary(store: Store, status: str = "written") -> dict[str, Any]:
    """What is said of a store that was just written, or was "finished already"."""
    return {
        "status": status, "path": str(store.path), "episodes": store.num_episodes,
        "transitions": store.num_transitions, "labels": store.labels, "digest": store.digest(),
    }  # fmt: skip


def _fill(writer: StoreWriter, output: Output) -> None:
    total = sum(len(part.numbers) for part in output.parts)
    with Progress(str(output.path), total, "episodes") as progress:
        for count, episode in enumerate(episodes(output.parts, output.bounds, output.cameras), start=1):
            if output.drawn is not None:
                assert episode.sim_state is not None
                episode = replace(episode, images={**(episode.images or {}), **output.drawn(episode.sim_state)})
            writer.append(episode)
            progress.update(count)
    for name, rows in output.labels.items():
        writer.add_array(name, rows())


def _check_parents(outputs: Sequence[Output]) -> None:
    """Hold all that is taken along to its sha256: what is copied from here on gets checksums of its own."""
    for output in outputs:
        for part in output.parts:
            labels = [name for name in label_arrays(part.store) if name in output.labels]
            sim = [SIM] if has_states(output.parts) else []
            left = set(part.store.spec.cameras) - set(_kept(part.store, output.cameras))
            wanted = [name for name in part.store.arrays if name not in map(part.store.camera_array, left)]
            part.store.check([*wanted, *labels, *sim])


def _origin(parents: Sequence[Store], command: str) -> dict[str, Any]:
    """Of each parent: path, digests, and its own provenance in turn."""
    described = [
        {
            "path": str(store.path),
            "digest": store.digest(),
            "labels": {label: store.label_digest(label) for label in store.labels},
            **({"sim": store.sim_digest()} if store.has_sim_state else {}),
            "provenance": store.provenance,
            "attributes": _extra(store),
        }
        for store in parents
    ]
    return {"parents": described, "command": command}


def _attributes(output: Output) -> dict[str, Any]:
    """Free attributes as the parents agree on them; what they say of their numbers, taken together."""
    stores = [part.store for part in output.parts]
    free = {k: v for k, v in _agreed([_extra(store) for store in stores]).items() if k not in Units._fields}
    together = agreed(stores)
    units = together if output.bounds is None else together._replace(action_bounds=output.bounds)
    return free | units.attributes() | dict(output.told)


def _about(store: Store) -> dict[str, Any]:
    return {key: value for key, value in store.provenance.items() if key not in OWN_PROVENANCE}


def _extra(store: Store) -> dict[str, Any]:
    return {key: value for key, value in store.attributes.items() if key not in KEYS}


def _agreed(all_of_them: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all the parents say alike."""
    first, *others = all_of_them
    return {key: value for key, value in first.items() if all(key in o and o[key] == value for o in others)}
