"""What a recipe uses of its stores, read into memory for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.data.examples import Examples
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data
from cvlctl.data.store import Store, open_store
from cvlctl.data.stream import Stream, arrival_reward, example_arrays
from cvlctl.data.units import agreed, require_alike, units_of
from cvlctl.errors import CvlctlError
from cvlctl.types import Observe, Spec
from cvlctl.units import Units


def open_stores(uses: Sequence[StoreUse], observe: Observe | None = None) -> list[Store]:
    """Open every store and check that they agree in what a policy sees and does."""
    stores = [open_store(use.path) for use in uses]
    for use, store in zip(uses, stores, strict=True):
        _check_cameras(use.path, store, stores[0], observe)
    first, *_ = seen = [seen_spec(store.spec, observe) for store in stores]
    for use, spec in zip(uses, seen, strict=True):
        if (spec.observation_shape, spec.action_dim) != (first.observation_shape, first.action_dim):
            raise CvlctlError(
                f"{use.path}: observations {spec.observation_shape} and {spec.action_dim} action "
                f"dimensions, but {uses[0].path} has {first.observation_shape} and {first.action_dim}",
                "train on stores of one robot",
            )
        if len(spec.observation_shape) != 1:
            raise CvlctlError(f"{use.path}: observations of shape {spec.observation_shape} are not vectors")
    said = [(store.path, units_of(store)) for store in stores]
    require_alike(said, stores[0].spec.action_dim, "cvlctl data merge --rescale makes one store of them, of one scale")
    return stores


def _check_cameras(path: Path, store: Store, first: Store, observe: Observe | None) -> None:
    """Raise a CvlctlError where a store does not have what is to be seen of it."""
    has = ", ".join(store.spec.cameras)
    no_vector = store.spec.observation_shape == (0,)
    if observe is None:
        if no_vector:
            hint = f"say which cameras are seen: observe: {{cameras: [{has}]}}"
            raise CvlctlError(f"{path} has frames alone, and no vector", hint)
        return
    if observe.vector and no_vector:
        raise CvlctlError(f"observe.vector: {path} has no vector", "leave vector out")
    for camera in observe.cameras:
        if camera not in store.spec.cameras:
            hint = f"it has {has}" if has else "it has no cameras: leave observe out, or build it with cameras"
            raise CvlctlError(f"observe.cameras: {path} has no camera {camera!r}", hint)
        size, wanted = store.spec.cameras[camera], first.spec.cameras[camera]
        if size != wanted:
            what = f"{path}: the frames of camera {camera} are {_by(size)}, but {first.path} has {_by(wanted)}"
            raise CvlctlError(what, "render or import them again in one size")


def _by(size: tuple[int, int, int]) -> str:
    return "x".join(map(str, size))


def seen_spec(spec: Spec, observe: Observe | None) -> Spec:
    """What is seen of a store: its vector alone, or the cameras that `observe` names, with or without it."""
    shape = spec.observation_shape if observe is None or observe.vector else (0,)
    cameras = {} if observe is None else {camera: spec.cameras[camera] for camera in observe.cameras}
    return Spec(shape, spec.action_dim, spec.horizon, cameras=cameras)


class Part(NamedTuple):
    """What is used of one store, as arrays."""

    observation: np.ndarray  # (rows, O)
    action: np.ndarray  # (rows, A)
    arrival_reward: np.ndarray  # (rows,): reward received on arriving at the row's observation
    labelled: np.ndarray  # (rows,) bool: its episode's rewards may be learned from
    episode_ends: np.ndarray  # (n,) cumulative row counts
    terminated: np.ndarray  # (n,) bool
    frames: tuple[np.ndarray, ...] = ()  # (rows, H, W, C) uint8 of each camera that is seen


class Reading(NamedTuple):
    """What training reads: stores, what is used of each, and success examples beside them."""

    stores: Sequence[Store]
    uses: Sequence[StoreUse]
    examples: Examples | None = None
    rewards: bool = False  # whether labels are opened
    relabel: Callable[[Data, str], Tensor] | None = None  # (data, device) -> rewards (E, rows) that are learned instead
    observe: Observe | None = None  # what is seen of cameras; None: the vector alone
    encode: Callable[[Reading, str], Reading] | None = None  # (reading, device) -> with features in place of frames
    features: Sequence[np.ndarray] | None = None  # (rows, E, K) float32 for each store

    @property
    def spec(self) -> Spec:
        """What is seen of the stores."""
        return seen_spec(self.stores[0].spec, self.observe)

    @property
    def units(self) -> Units:
        """What all stores say of their numbers, as far as they are seen."""
        units = agreed(self.stores)
        return units if self.observe is None or self.observe.vector else units._replace(observation_columns=())


@contextmanager
def opened(reading: Reading, window_rows: int, draws_per_block: int, device: str) -> Iterator[Data | Stream]:
    """The stores in the device's memory; with `window_rows` windows on them of so many rows, where that is too small.

    Args:
        draws_per_block: transitions that a block of updates draws for each seed.
    """
    if reading.encode is not None:
        if window_rows:
            hint = "raise memory_gb, or let frames be shifted: they are then streamed"
            raise CvlctlError("of stores larger than memory_gb allows no features are computed beforehand", hint)
        reading = reading.encode(reading, device)
    stores, uses, examples, rewards, relabel, observe, _, features = reading
    if window_rows == 0:
        data = join(stores, uses, examples, rewards, observe, features)
        if relabel is not None:
            data = data._replace(arrival_reward=relabel(data, device))
        data = to_device(data, device)  # and of what was read nothing stays behind
        yield data
        return
    with closing(Stream(stores, uses, examples, rewards, window_rows, draws_per_block, device, observe)) as stream:
        yield stream


def hold_out(data: Data, share: float) -> tuple[Data, Data]:
    """The episodes to learn from, and the `share` of them that is held out: always the same ones, and of those with
    and those without labels alike. Both lie in the same rows.

    Raises:
        CvlctlError: too few episodes (of those with labels, where there are any) for one on either side.
    """
    last = torch.unique(data.layout.last)
    episode = torch.searchsorted(last, data.layout.last)  # of each transition
    labelled = np.zeros(len(last), dtype=bool)
    labelled[episode[data.labelled].cpu().numpy()] = True
    held = torch.from_numpy(held_out(labelled, share)).to(last.device)
    return _of_episodes(data, (~held)[episode]), _of_episodes(data, held[episode])


def held_out(labelled: np.ndarray, share: float) -> np.ndarray:
    """(n,) bool: which of n episodes are held out, of those that are `labelled` (n,) and of the others alike.

    Raises:
        CvlctlError: as `hold_out` does.
    """
    held = np.zeros(len(labelled), dtype=bool)
    order = np.random.default_rng([2]).permutation(len(labelled))
    for kind in (labelled, ~labelled):
        mine = order[kind[order]]
        held[mine[: min(max(1, round(share * len(mine))), len(mine) - 1)]] = True
    if not (held & (labelled | ~labelled.any())).any():
        what = f"validation: {share} of the episodes cannot be held out: there is only one" + " with labels" * any(
            labelled
        )
        raise CvlctlError(what, "leave validation out")
    return held


def _of_episodes(data: Data, kept: Tensor) -> Data:
    """Of the transitions those that are `kept` (N,)."""
    row, last, terminated, first = data.layout
    number = kept.cumsum(0) - 1  # of each that is kept, among them
    where = samplers.Layout(row[kept], last[kept], terminated[kept], first)
    return data._replace(layout=where, labelled=number[data.labelled[kept[data.labelled]]])


def to_device(data: Data, device: str) -> Data:
    """The same data on `device`."""
    where = samplers.Layout(*(x.to(device) for x in data.layout))
    return Data(
        data.observation.to(device), data.action.to(device), data.arrival_reward.to(device), where,
        data.labelled.to(device), data.examples.to(device), tuple(x.to(device) for x in data.frames),
        tuple(x.to(device) for x in data.example_frames), data.stack, data.shift,
    )  # fmt: skip


def join(
    stores: Sequence[Store],
    uses: Sequence[StoreUse],
    examples: Examples | None,
    rewards: bool,
    observe: Observe | None = None,
    features: Sequence[np.ndarray] | None = None,
) -> Data:
    """The stores in memory, row axes joined. Without `rewards` no label is opened, except to find `top`.

    `features`: what stands for each store's frames, (rows, E, K) float32.
    """
    part = _read_all(stores, uses, rewards, observe, features)
    where = samplers.layout(part.episode_ends, part.terminated)
    shown, shown_frames = example_arrays(examples, part.observation.shape[1], observe)
    return Data(
        observation=torch.from_numpy(part.observation),
        action=torch.from_numpy(part.action),
        arrival_reward=torch.from_numpy(part.arrival_reward).unsqueeze(0),
        layout=where,
        labelled=torch.from_numpy(part.labelled)[where.row].nonzero().squeeze(1),
        examples=shown,
        frames=tuple(map(torch.from_numpy, part.frames)),
        example_frames=shown_frames,
        stack=observe.stack if observe and features is None else 1,
        shift=observe.shift if observe else 0,
    )


def _read_all(
    stores: Sequence[Store],
    uses: Sequence[StoreUse],
    rewards: bool,
    observe: Observe | None,
    features: Sequence[np.ndarray] | None,
) -> Part:
    """The stores as one. Each goes to its place as it is read: a single one is not copied, many never held twice."""
    if len(stores) == 1:
        return read_part(stores[0], uses[0], rewards, observe, None if features is None else features[0])
    capacity, count = sum(store.num_rows for store in stores), 0  # rows that stay unused are never touched
    arrays: list[np.ndarray] = []
    ends, terminated = [], []
    for i, (store, use) in enumerate(zip(stores, uses, strict=True)):
        part = read_part(store, use, rewards, observe, None if features is None else features[i])
        columns = (part.observation, part.action, part.arrival_reward, part.labelled, *part.frames)
        arrays = arrays or [np.empty((capacity, *column.shape[1:]), column.dtype) for column in columns]
        for array, column in zip(arrays, columns, strict=True):
            array[count : count + len(column)] = column
        ends.append(part.episode_ends + count)
        terminated.append(part.terminated)
        count += len(part.observation)
        del part, columns, column  # before the next is read
    observation, action, reward, labelled, *frames = (array[:count] for array in arrays)
    return Part(observation, action, reward, labelled, np.concatenate(ends), np.concatenate(terminated), tuple(frames))


def read_part(
    store: Store,
    use: StoreUse,
    rewards: bool,
    observe: Observe | None = None,
    features: np.ndarray | None = None,
) -> Part:
    """What `use` says of a store, read into memory."""
    action, ends = store.actions(), store.episode_ends()
    seen = observe is None or observe.vector
    observation = store.observations() if seen else np.zeros((store.num_rows, 0), np.float32)
    lengths, count = np.diff(ends, prepend=0), len(ends)
    reward, labelled = np.zeros(len(observation), dtype=np.float32), np.zeros(count, dtype=bool)
    if rewards:
        labelled = use.labelled(count)
        if use.from_store:
            reward = arrival_reward(store.rewards(use.rewards), ends, use.kept(count))
    labelled = np.repeat(labelled, lengths)
    frames: tuple[np.ndarray, ...] = () if features is None else (features,)
    if observe is not None and features is None:
        frames = tuple(store.images(camera) for camera in observe.cameras)
    part = Part(observation, action, reward, labelled, ends, store.terminated(), frames)
    return part if use.top == 1 else best_episodes(part, store.rewards(use.rewards), use.top)


def best_episodes(part: Part, rewards: np.ndarray, share: float) -> Part:
    """The `share` of its episodes with the highest return; the earlier one of equals. `rewards` (rows,) as stored."""
    ends = part.episode_ends
    starts = ends - np.diff(ends, prepend=0)
    kept = best_numbers(ends, rewards, share)
    rows = np.concatenate([np.arange(starts[i], ends[i]) for i in kept])
    new_ends = np.cumsum((ends - starts)[kept])
    return Part(
        part.observation[rows], part.action[rows], part.arrival_reward[rows], part.labelled[rows], new_ends,
        part.terminated[kept], tuple(camera[rows] for camera in part.frames),
    )  # fmt: skip


def best_numbers(ends: np.ndarray, rewards: np.ndarray, share: float) -> np.ndarray:
    """The numbers, ascending, of the episodes that `best_episodes` keeps."""
    starts = ends - np.diff(ends, prepend=0)
    order = np.argsort(-np.add.reduceat(rewards.astype(np.float64), starts), kind="stable")
    return np.sort(order[: max(1, round(share * len(ends)))])
