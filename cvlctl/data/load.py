"""What a recipe uses of its stores, read into memory for training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data
from cvlctl.data.store import Store, open_store
from cvlctl.data.stream import Stream, arrival_reward
from cvlctl.data.units import agreed, require_alike, units_of
from cvlctl.errors import CvlctlError
from cvlctl.types import Spec
from cvlctl.units import Units


def open_stores(uses: Sequence[StoreUse]) -> list[Store]:
    """Open every store and check that they agree in what a policy sees and does."""
    stores = [open_store(use.path) for use in uses]
    for use, store in zip(uses, stores, strict=True):
        first = stores[0].spec
        if (store.spec.observation_shape, store.spec.action_dim) != (first.observation_shape, first.action_dim):
            raise CvlctlError(
                f"{use.path}: observations {store.spec.observation_shape} and {store.spec.action_dim} action "
                f"dimensions, but {uses[0].path} has {first.observation_shape} and {first.action_dim}",
                "train on stores of one robot",
            )
        if store.spec.cameras:
            what = f"{use.path} has images ({', '.join(store.spec.cameras)}), which nothing trains on yet"
            raise CvlctlError(what, "train on a store of vectors alone")
        if len(store.spec.observation_shape) != 1:
            raise CvlctlError(f"{use.path}: observations of shape {store.spec.observation_shape} are not vectors")
    said = [(store.path, units_of(store)) for store in stores]
    require_alike(said, stores[0].spec.action_dim, "cvlctl data merge --rescale makes one store of them, of one scale")
    return stores


class Part(NamedTuple):
    """What is used of one store, as arrays."""

    observation: np.ndarray  # (rows, O)
    action: np.ndarray  # (rows, A)
    arrival_reward: np.ndarray  # (rows,): reward received on arriving at the row's observation
    labelled: np.ndarray  # (rows,) bool: its episode's rewards may be learned from
    episode_ends: np.ndarray  # (n,) cumulative row counts
    terminated: np.ndarray  # (n,) bool


class Reading(NamedTuple):
    """What training reads: stores, what is used of each, and success examples beside them."""

    stores: Sequence[Store]
    uses: Sequence[StoreUse]
    examples: np.ndarray | None = None  # (X, O)
    rewards: bool = False  # whether labels are opened
    relabel: Callable[[Data, str], Tensor] | None = None  # (data, device) -> rewards (E, rows) that are learned instead

    @property
    def spec(self) -> Spec:
        return self.stores[0].spec

    @property
    def units(self) -> Units:
        """What all stores say of their numbers."""
        return agreed(self.stores)


@contextmanager
def opened(reading: Reading, window_rows: int, draws_per_block: int, device: str) -> Iterator[Data | Stream]:
    """The stores in the device's memory; with `window_rows` windows on them of so many rows, where that is too small.

    Args:
        draws_per_block: transitions that a block of updates draws for each seed.
    """
    stores, uses, examples, rewards, relabel = reading
    if window_rows == 0:
        data = join(stores, uses, examples, rewards)
        if relabel is not None:
            data = data._replace(arrival_reward=relabel(data, device))
        data = to_device(data, device)  # and of what was read nothing stays behind
        yield data
        return
    with closing(Stream(stores, uses, examples, rewards, window_rows, draws_per_block, device)) as stream:
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
        data.labelled.to(device), data.examples.to(device),
    )  # fmt: skip


def join(stores: Sequence[Store], uses: Sequence[StoreUse], examples: np.ndarray | None, rewards: bool) -> Data:
    """The stores in memory, row axes joined. Without `rewards` no label is opened, except to find `top`."""
    part = _read_all(stores, uses, rewards)
    where = samplers.layout(part.episode_ends, part.terminated)
    empty = np.zeros((0, part.observation.shape[1]), dtype=np.float32)
    return Data(
        observation=torch.from_numpy(part.observation),
        action=torch.from_numpy(part.action),
        arrival_reward=torch.from_numpy(part.arrival_reward).unsqueeze(0),
        layout=where,
        labelled=torch.from_numpy(part.labelled)[where.row].nonzero().squeeze(1),
        examples=torch.from_numpy(empty if examples is None else examples),
    )


def _read_all(stores: Sequence[Store], uses: Sequence[StoreUse], rewards: bool) -> Part:
    """The stores as one. Each goes to its place as it is read: a single one is not copied, many never held twice."""
    if len(stores) == 1:
        return read_part(stores[0], uses[0], rewards)
    capacity, count = sum(store.num_rows for store in stores), 0  # rows that stay unused are never touched
    arrays: list[np.ndarray] = []
    ends, terminated = [], []
    for store, use in zip(stores, uses, strict=True):
        part = read_part(store, use, rewards)
        columns = (part.observation, part.action, part.arrival_reward, part.labelled)
        arrays = arrays or [np.empty((capacity, *column.shape[1:]), column.dtype) for column in columns]
        for array, column in zip(arrays, columns, strict=True):
            array[count : count + len(column)] = column
        ends.append(part.episode_ends + count)
        terminated.append(part.terminated)
        count += len(part.observation)
        del part, columns, column  # before the next is read
    observation, action, reward, labelled = (array[:count] for array in arrays)
    return Part(observation, action, reward, labelled, np.concatenate(ends), np.concatenate(terminated))


def read_part(store: Store, use: StoreUse, rewards: bool) -> Part:
    """What `use` says of a store, read into memory."""
    observation, action, ends = store.observations(), store.actions(), store.episode_ends()
    lengths, count = np.diff(ends, prepend=0), len(ends)
    reward, labelled = np.zeros(len(observation), dtype=np.float32), np.zeros(count, dtype=bool)
    if rewards:
        labelled = use.labelled(count)
        if use.from_store:
            reward = arrival_reward(store.rewards(use.rewards), ends, use.kept(count))
    labelled = np.repeat(labelled, lengths)
    part = Part(observation, action, reward, labelled, ends, store.terminated())
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
        part.terminated[kept],
    )  # fmt: skip


def best_numbers(ends: np.ndarray, rewards: np.ndarray, share: float) -> np.ndarray:
    """The numbers, ascending, of the episodes that `best_episodes` keeps."""
    starts = ends - np.diff(ends, prepend=0)
    order = np.argsort(-np.add.reduceat(rewards.astype(np.float64), starts), kind="stable")
    return np.sort(order[: max(1, round(share * len(ends)))])
