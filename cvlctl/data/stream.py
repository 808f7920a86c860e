"""Stores larger than memory: a window of whole episodes that slides over them in a shuffled order.

The stores are cut into segments, stretches of consecutive episodes. A pass is a random order of all segments; the
window holds SLOTS of them, one more is read meanwhile by a thread, and takes the place of the oldest. Inside the window
everything is drawn as from a store in memory, futures by their exact law since episodes are whole. A window serves
updates in proportion to its transitions, hence over a pass every transition of the stores is drawn equally often in
expectation: each of n in a window of N is drawn (updates x batch / N) times, and updates / N is the same for all.

What an update sees depends on its number alone, so that a stopped run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cvlctl.data import samplers
from cvlctl.data.examples import Examples
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data, Layout
from cvlctl.data.store import Column, Store
from cvlctl.errors import CvlctlError
from cvlctl.machine import free_memory
from cvlctl.types import Observe

SLOTS = 8  # segments of a window: of neighbouring episodes, so that a window of few is a poor sample of the stores
INDEX_BYTES = 50  # a row of Layout, of each segment and of the window, and of `labelled`


def row_bytes(store: Store, observe: Observe | None = None) -> int:
    """Memory of one row of a store: what is seen of it, action, reward and index."""
    frames = 0 if observe is None else sum(math.prod(store.spec.cameras[camera]) for camera in observe.cameras)
    return frames + 4 * (_width(store, observe) + store.spec.action_dim + 1) + INDEX_BYTES


def _width(store: Store, observe: Observe | None) -> int:
    return store.spec.observation_shape[0] if observe is None or observe.vector else 0


def window_rows(stores: Sequence[Store], memory_gb: float | str, device: str, observe: Observe | None = None) -> int:
    """Rows that may lie in memory at once; 0 where all of the stores' rows may.

    Args:
        memory_gb: what data may take; "auto" is half of what is free (the other half is for what is computed with it).
    """
    allowed = _free(device) / 2 if isinstance(memory_gb, str) else memory_gb * 1e9
    rows, size = sum(store.num_rows for store in stores), row_bytes(stores[0], observe)
    return 0 if rows * size <= allowed else int(allowed // size)


def _free(device: str) -> int:
    """Bytes that data may yet take: of the host's memory, into which they are read, and of the GPU's.

    Blocks that PyTorch keeps there for later count as free. Else it would depend on what the process did before whether
    a run streams, and thereby which batches it sees.
    """
    if not device.startswith("cuda"):
        return free_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free_memory(), torch.cuda.mem_get_info(device)[0] + kept)


class Segment(NamedTuple):
    """Episodes [first, end) of one of the stores."""

    store: int
    first: int
    end: int


class Stream:
    """Windows on stores, as `Data` on a device.

    Args:
        rows: of a window, the segment that is being read included.
        rewards: whether to read the labels of `uses`.
        draws_per_block: transitions that a block of updates draws for each seed.

    Raises:
        CvlctlError: the stores' labels are used in a way that needs all of them at once, or the memory is too small.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        uses: Sequence[StoreUse],
        examples: Examples | None,
        rewards: bool,
        rows: int,
        draws_per_block: int,
        device: str,
        observe: Observe | None = None,
    ) -> None:
        _refuse(uses, rewards)
        self._stores, self._uses, self._rewards, self._device = stores, uses, rewards, device
        self._capacity = rows // (SLOTS + 1)
        self._kept = [use.kept(store.num_episodes) for store, use in zip(stores, uses, strict=True)]
        self._steps = [store.lengths() for store in stores]  # of each episode
        self._observe = observe
        self._segments = [
            s
            for i in range(len(stores))
            for s in _segments(stores[i], i, self._capacity, row_bytes(stores[i], observe))
        ]
        self._columns = [self._open(i) for i in range(len(stores))]
        count, spec, width = (SLOTS + 1) * self._capacity, stores[0].spec, _width(stores[0], observe)
        shown, frames_shown = example_arrays(examples, width, observe)
        self._examples, self._example_frames = shown.to(device), tuple(camera.to(device) for camera in frames_shown)
        self._arrays = [torch.zeros(count, wide, device=device) for wide in (1, spec.action_dim, width)]
        for camera in () if observe is None else observe.cameras:
            frames = torch.zeros((count, *spec.cameras[camera]), dtype=torch.uint8, device=device)
            self._arrays.append(frames)
        self._lengths = np.array([self._steps[s.store][s.first : s.end].sum() for s in self._segments])  # transitions
        # each transition is drawn once a pass for each seed; more often where a window would not serve one block
        self._blocks_per_transition = 1 / (SLOTS * min(draws_per_block, float(self._lengths.mean())))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="stream")
        self._window, self._block_end = -1, 0.0
        self._layouts: list[Layout | None] = [None] * (SLOTS + 1)
        self._coming: Future[Layout] | None = None
        self._data: Data | None = None

    def at(self, block: int) -> Data:
        """The window of a block of updates. Blocks are asked for in ascending order."""
        while self._data is None or block >= int(self._block_end):
            self._slide(block)
        return self._data

    def sample(self) -> Data:
        """Random episodes from all over the stores, as many as a segment may hold: what statistics are taken of.

        It lies where the windows will: call it, and be done with it, before `at`.
        """
        steps = np.concatenate(self._steps)
        order = np.random.default_rng([1]).permutation(len(steps))
        chosen = np.sort(order[np.cumsum(steps[order] + 1) <= self._capacity])
        first = np.cumsum([0] + [len(each) for each in self._steps])  # the number of each store's first episode
        stores = np.searchsorted(first, chosen, side="right") - 1
        layouts, offset = [], 0
        for i, episode in zip(stores.tolist(), (chosen - first[stores]).tolist(), strict=True):
            where = self._read_into(Segment(i, episode, episode + 1), offset)
            layouts.append(where)
            offset = int(where.last[-1]) + 1
        return self._joined(layouts, offset)

    def close(self) -> None:
        """Stop reading."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _slide(self, block: int) -> None:
        """Go to the next window, or at first to that of `block`."""
        if self._coming is not None:
            self._window += 1
            self._layouts[(self._window + SLOTS - 1) % (SLOTS + 1)] = self._coming.result()
            self._block_end += self._blocks(self._window)
        else:
            while self._window < 0 or block >= int(self._block_end):
                self._window += 1
                self._block_end += self._blocks(self._window)
            for place in range(self._window, self._window + SLOTS):
                self._layouts[place % (SLOTS + 1)] = self._read_place(place)
        spare = (self._window + SLOTS) % (SLOTS + 1)
        where = [x for slot, x in enumerate(self._layouts) if slot != spare and x is not None]
        self._data = self._joined(where, (SLOTS + 1) * self._capacity)
        self._coming = self._reader.submit(self._read_place, self._window + SLOTS)

    def _blocks(self, window: int) -> float:
        numbers = [self._segment(place) for place in range(window, window + SLOTS)]
        return float(self._lengths[numbers].sum()) * self._blocks_per_transition

    def _segment(self, place: int) -> int:
        """Which segment comes at a place of the endless sequence of passes."""
        number, i = divmod(place, len(self._segments))
        return int(_order(number, len(self._segments))[i])

    def _read_place(self, place: int) -> Layout:
        return self._read_into(self._segments[self._segment(place)], place % (SLOTS + 1) * self._capacity)

    def _read_into(self, segment: Segment, offset: int) -> Layout:
        """Read a segment to the rows from `offset` on; its layout there."""
        store = self._stores[segment.store]
        ends = store.episode_ends()
        begin, stop = (int(ends[segment.first - 1]) if segment.first else 0), int(ends[segment.end - 1])
        mine = ends[segment.first : segment.end] - begin
        reward, *columns = self._columns[segment.store]
        rewards = np.zeros(stop - begin, dtype=np.float32)
        if reward is not None:
            kept = self._kept[segment.store][segment.first : segment.end]
            rewards = arrival_reward(reward.rows(begin, stop), mine, kept)
        read = [None if column is None else column.rows(begin, stop) for column in columns]
        for array, rows in zip(self._arrays, [rewards, *read], strict=True):
            if rows is not None:
                values = torch.from_numpy(np.ascontiguousarray(rows))
                array[offset : offset + len(rows)] = values.view(-1, *array.shape[1:])
        where = samplers.layout(mine, store.terminated()[segment.first : segment.end])
        return Layout(where.row + offset, where.last + offset, where.terminated, where.first + offset)

    def _open(self, i: int) -> list[Column | None]:
        """Reward, action, vector, and frames of each camera; None for what is not read."""
        store, use = self._stores[i], self._uses[i]
        reward = f"labels/{use.rewards}/reward" if self._rewards and use.from_store else None
        vector = "data/observation" if _width(store, self._observe) else None
        cameras = () if self._observe is None else self._observe.cameras
        names = (reward, "data/action", vector, *(f"data/images/{camera}" for camera in cameras))
        return [None if name is None else Column(store, name) for name in names]

    def _joined(self, layouts: Sequence[Layout], rows: int) -> Data:
        reward, action, observation, *frames = (array[:rows] for array in self._arrays)
        where = Layout(*(torch.cat(parts).to(self._device) for parts in zip(*layouts, strict=True)))
        labelled = torch.arange(len(where.row) if self._rewards else 0, device=self._device)
        stack, shift = (self._observe.stack, self._observe.shift) if self._observe else (1, 0)
        return Data(
            observation, action, reward.reshape(1, -1), where, labelled, self._examples, tuple(frames),
            self._example_frames, stack, shift,
        )  # fmt: skip


def example_arrays(
    examples: Examples | None, width: int, observe: Observe | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Success examples (X, O), or none of `width` columns, and what the cameras show of them, or features of that."""
    if examples is None:
        return torch.zeros(0, width), ()
    images = examples.images
    names = observe.cameras if observe is not None and images.keys() >= set(observe.cameras) else images
    return torch.from_numpy(examples.observations), tuple(torch.from_numpy(images[name]) for name in names)


def arrival_reward(stored: np.ndarray, ends: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Rewards (rows,) float32 on arriving at each row's observation; zeros in the episodes that are not `kept` (n,).

    Args:
        stored: (rows,), with the step that is rewarded: that of row t is received on arriving at row t + 1.
        ends: (n,) cumulative row counts; an episode's last row is padding.
    """
    reward = np.zeros(len(stored), dtype=np.float32)
    reward[1:] = stored[:-1]
    reward[np.repeat(~kept, np.diff(ends, prepend=0))] = 0.0
    return reward


@lru_cache(maxsize=4)
def _order(number: int, count: int) -> np.ndarray:
    """The order of the segments in a pass."""
    return np.random.default_rng([0, number]).permutation(count)


def _segments(store: Store, number: int, capacity: int, size: int) -> list[Segment]:
    """A store's episodes, in stretches of at most `capacity` rows of `size` bytes."""
    lengths = store.lengths() + 1
    if lengths.max() > capacity:
        least = int(lengths.max()) * (SLOTS + 1) * size / 1e9
        what = f"{store.path}: its longest episode ({int(lengths.max()) - 1} steps) does not fit in a {SLOTS + 1}th"
        raise CvlctlError(f"{what} of memory_gb", f"give memory_gb: {least:.2g} or more")
    found, first, rows = [], 0, 0
    for episode, length in enumerate(lengths.tolist()):
        if rows + length > capacity:
            found.append(Segment(number, first, episode))
            first, rows = episode, 0
        rows += length
    return [*found, Segment(number, first, len(lengths))]


def _refuse(uses: Sequence[StoreUse], rewards: bool) -> None:
    for use in uses:
        problem = ""
        if use.top < 1:
            problem = f"top: {use.top} needs the returns of all episodes"
        elif rewards and use.learned:
            problem = f"rewards: {use.rewards} is learned from all of it"
        elif rewards and (use.rewards == "none" or (use.fraction < 1 and use.rest == "none")):
            problem = "episodes without a label may leave a stretch of it without any"
        if problem:
            hint = (
                "raise memory_gb, or write what you need into a smaller store: cvlctl data filter, label or subsample"
            )
            raise CvlctlError(f"{use.path} is larger than memory_gb allows, and {problem}", hint)
