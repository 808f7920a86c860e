"""Index maths of the occupancy sampler, and randomness as a pure function of (seed, step).

The law (CVL Eq. 3 and 8, LAEO Eq. 4 shifted to start at offset 1). A transition at time t of an episode with K = T - t
steps left has the future s_{t+Delta}, Delta >= 1:

* truncated episode: P(Delta = k) = (1-gamma) gamma^(k-1) / (1 - gamma^K), k = 1..K (CVL Definition 1): what lies beyond
  the cut is unknown, so its mass is spread over what was seen;
* terminated episode: P(Delta = k) = (1-gamma) gamma^(k-1), k = 1..infinity; from K+1 on the future is the absorbing
  state, seen as the final observation, with reward 0. Renormalising here would make a dying action look as good as a
  living one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from cvlctl.types import Observation, OccupancyBatch, TransitionBatch, Views

BLOCK = 64  # steps whose randomness is drawn together: part of what "the same batches" means, so a constant


class Layout(NamedTuple):
    """Where the N transitions of a store lie on its row axis (an episode of T transitions has T+1 rows)."""

    row: Tensor  # (N,) int64: row of the transition's observation and action; the next observation is at row + 1
    last: Tensor  # (N,) int64: row of the final observation of its episode
    terminated: Tensor  # (N,) bool: the episode terminated (it was not cut off)
    first: Tensor  # (n,) int64: row of each episode's first observation, ascending


def layout(episode_ends: np.ndarray, terminated: np.ndarray, device: torch.device | str = "cpu") -> Layout:
    """Layout from cumulative row counts `episode_ends` (n,) and `terminated` (n,)."""
    ends = np.asarray(episode_ends, dtype=np.int64)
    lengths = np.diff(ends, prepend=0) - 1
    row = np.arange(int(ends[-1]), dtype=np.int64) if len(ends) else np.zeros(0, dtype=np.int64)
    row = np.delete(row, ends - 1)
    last = np.repeat(ends - 1, lengths)
    flags = np.repeat(np.asarray(terminated, dtype=bool), lengths)
    return Layout(*(torch.from_numpy(x).to(device) for x in (row, last, flags, ends - lengths - 1)))


def geometric_offset(u: Tensor, remaining: Tensor, terminated: Tensor, gamma: float) -> Tensor:
    """Delta = 1 + floor(log(1 - u (1 - gamma^K)) / log gamma); the plain geometric (K = infinity) where `terminated`.

    Args:
        u: uniform in [0, 1), float64, any shape; `remaining` (int64, K >= 1) and `terminated` (bool) broadcast to it.

    Returns:
        Offsets >= 1 (int64), at most K where not terminated (clamped only against rounding).
    """
    if gamma == 0.0:
        return torch.ones_like(remaining + torch.zeros_like(u, dtype=torch.int64))
    log_gamma = math.log(gamma)
    mass = torch.where(terminated, 1.0, -torch.expm1(remaining.to(u.dtype) * log_gamma))
    offset = 1 + torch.floor(torch.log1p(-u * mass) / log_gamma).to(torch.int64)
    return torch.where(terminated, offset, torch.minimum(offset, remaining)).clamp_min(1)


class Future(NamedTuple):
    """A drawn future: its row, and the row whose reward was received on arriving there."""

    row: Tensor  # int64
    reward_row: Tensor  # int64: row - 1
    absorbed: Tensor  # bool: beyond a terminal state; the reward there is 0


def future(where: Layout, transition: Tensor, u: Tensor, gamma: float) -> Future:
    """The futures of `transition` (indices into `where`, any shape) for uniforms `u` (same shape, float64)."""
    row, last, terminated = where.row[transition], where.last[transition], where.terminated[transition]
    target = row + geometric_offset(u, last - row, terminated, gamma)
    absorbed = target > last
    target = torch.minimum(target, last)
    return Future(target, target - 1, absorbed)


def marginal(
    episode_ends: np.ndarray, terminated: np.ndarray, labelled: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """The exact law of `future` for a uniform transition of the `labelled` episodes: what a bank is drawn from.

    Args:
        episode_ends: (n,) cumulative row counts; `terminated`, `labelled`: (n,) bool.

    Returns:
        (rows,) float64 each, which sum to one together: the probability of arriving at a row, and of having been
        absorbed there before, which pays nothing. Zeros where no episode is labelled.
    """
    ends = np.asarray(episode_ends, dtype=np.int64)
    lengths = np.diff(ends, prepend=0) - 1
    arrival, absorbed = np.zeros(int(ends[-1])), np.zeros(int(ends[-1]))
    total = max(int(lengths[labelled].sum()), 1)
    for length in np.unique(lengths[labelled]):
        for ended in (False, True):
            chosen = ends[labelled & (lengths == length) & (terminated == ended)]
            if len(chosen) == 0:
                continue
            left = np.arange(length, 0, -1)  # [K] steps left at each transition
            beyond = gamma ** left.astype(np.float64)
            first = np.full(length, 1 - gamma) if ended else (1 - gamma) / (1 - beyond)  # P(Delta = 1)
            mass = np.fromiter(accumulate(first, lambda before, new: gamma * before + new), np.float64, length)
            arrival[chosen[:, None] - left] = mass / total
            absorbed[chosen - 1] = beyond.sum() / total if ended else 0.0
    return arrival, absorbed


def marginal_of_next(
    episode_ends: np.ndarray, terminated: np.ndarray, labelled: np.ndarray, gamma: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same of next observations alone, the law that a critic of a td_ loss stands on; at a terminal state the
    share gamma of the mass has been absorbed there before."""
    ends = np.asarray(episode_ends, dtype=np.int64)
    arrival, absorbed = np.zeros(int(ends[-1])), np.zeros(int(ends[-1]))
    arrival[np.repeat(labelled, np.diff(ends, prepend=0))] = 1.0
    arrival[np.append(0, ends[:-1])] = 0.0  # nobody arrives at an episode's first observation
    arrival /= max(arrival.sum(), 1.0)
    last = ends[labelled & terminated] - 1
    arrival[last], absorbed[last] = (1 - gamma) * arrival[last], gamma * arrival[last]
    return arrival, absorbed


def generator(seed: int, stream: str, block: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on (seed, stream, block) and on nothing else: no state to save, resume is exact.

    `stream` names the use ("batch", "bank", "init", ...), so that adding a use never shifts another.
    """
    words = np.random.SeedSequence([seed, block, *stream.encode()]).generate_state(2, np.uint32)
    g = torch.Generator(device=device)
    g.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    return g


class Data(NamedTuple):
    """One or several stores in memory on the device, row axes joined."""

    observation: Tensor  # (rows, O) float32
    action: Tensor  # (rows, A)
    arrival_reward: Tensor  # (1 or E, rows): reward on arriving at the row's observation; a row a member if learned
    layout: Layout
    labelled: Tensor  # (L,) int64: transitions of the episodes whose reward labels may be read
    examples: Tensor  # (X, O): success examples, or (0, O)
    frames: tuple[Tensor, ...] = ()  # of each camera (rows, H, W, C) uint8, each once; or features of all, (rows, E, K)
    example_frames: tuple[Tensor, ...] = ()  # of each camera (X, S, H, W, C) uint8; or (X, 1, E, K)
    stack: int = 1  # [S] frames of a camera in an observation, the latest last; an episode's first one is repeated
    shift: int = 0  # frames are shifted by up to so many pixels, drawn anew for every observation of a batch


class Draws(NamedTuple):
    """What one step of a learner draws: batch and bank sizes a member, the discount, and its Gaussian noise by name."""

    batch_size: int
    gamma: float = 0.0
    transitions: bool = False  # (s, a, r, s') of the labelled episodes: a TransitionBatch
    futures: bool = False  # one future for each transition
    next_states: bool = False  # futures are next observations, with the action after; the bank is of their law
    bank: int = 0  # futures drawn from the marginal p(s+) of the labelled episodes, with their rewards
    own_futures: bool = False  # a geometric future of each transition in the bank instead, whatever `futures` are
    examples: int = 0  # success examples in the bank instead; all of them where there are fewer
    times: bool = False  # how far into their episodes the transitions lie
    noise: tuple[tuple[str, tuple[int, ...]], ...] = ()


NO_SHIFT = torch.zeros(1, 0, 2, dtype=torch.bool)  # of frames, as `observed` takes it


class Indices(NamedTuple):
    """Row numbers for the batches of n steps, (n, E, B) and (n, E, M)."""

    row: Tensor
    ends: Tensor  # the transition arrives at a terminal state; (n, E, 0) where transitions are not asked for
    future_row: Tensor
    bank_row: Tensor
    bank_absorbed: Tensor
    bank_source: Tensor  # the transition's row whose future it is
    cut: Tensor  # (n, E, B) the episode was cut off after the transition; as `ends`, (n, E, 0) where not asked for
    bank_ends: Tensor  # (n, E, M) the bank's state is terminal; (n, E, 0) likewise
    shift: Tensor = NO_SHIFT  # (n, E, K, 2) int64 pixels down and right: of what is seen, what follows, and the bank


def draw(
    data: Data, draws: Draws, seeds: Sequence[int], block: int, num_steps: int
) -> tuple[Indices, dict[str, Tensor]]:
    """Indices and noise for the `num_steps` steps of `block`: a pure function of (seeds, block), member by member.

    Returns:
        Indices with leading axes (num_steps, E), and noise by name, each (num_steps, E, *shape).
    """
    device, where = data.observation.device, data.layout
    gamma = 0.0 if draws.next_states else draws.gamma  # of futures: at 0 they are the next observations
    columns: list[list[Tensor]] = []
    for seed in seeds:
        g = generator(seed, "batch", block, device)
        pool = len(data.labelled) if draws.transitions else len(where.row)
        transition = torch.randint(pool, (num_steps, draws.batch_size), generator=g, device=device)
        if draws.transitions:
            transition = data.labelled[transition]
        row = where.row[transition]
        ends = torch.zeros((num_steps, 0), dtype=torch.bool, device=device)
        cut, bank_ends = ends, ends
        if draws.transitions or draws.next_states:
            at_end = row + 1 == where.last[transition]
            ends, cut = where.terminated[transition] & at_end, ~where.terminated[transition] & at_end
        future_row = row[:, :0]
        if draws.futures:
            u = torch.rand(transition.shape, generator=g, device=device, dtype=torch.float64)
            future_row = future(where, transition, u, gamma).row
        g = generator(seed, "bank", block, device)
        bank_row = torch.zeros((num_steps, 0), dtype=torch.int64, device=device)
        absorbed = torch.zeros((num_steps, 0), dtype=torch.bool, device=device)
        source = bank_row
        if draws.bank:
            pick = torch.randint(len(data.labelled), (num_steps, draws.bank), generator=g, device=device)
            u = torch.rand(pick.shape, generator=g, device=device, dtype=torch.float64)
            pick = data.labelled[pick]
            source, (bank_row, _, absorbed) = where.row[pick], future(where, pick, u, gamma)
            if draws.next_states:
                bank_ends = where.terminated[pick] & (bank_row == where.last[pick])
        elif draws.own_futures:
            u = torch.rand(transition.shape, generator=g, device=device, dtype=torch.float64)
            bank_row = future(where, transition, u, draws.gamma).row
            absorbed = torch.zeros_like(bank_row, dtype=torch.bool)
        elif draws.examples:
            count = len(data.examples)
            if count > draws.examples:
                bank_row = torch.randint(count, (num_steps, draws.examples), generator=g, device=device)
            else:
                bank_row = torch.arange(count, device=device).expand(num_steps, count)
            absorbed = torch.zeros_like(bank_row, dtype=torch.bool)
        shift = torch.zeros((num_steps, 0, 2), dtype=torch.bool, device=device)
        if data.shift:
            g, seen = generator(seed, "shift", block, device), 2 * draws.batch_size + bank_row.shape[1]
            shift = torch.randint(-data.shift, data.shift + 1, (num_steps, seen, 2), generator=g, device=device)
        columns.append([row, ends, future_row, bank_row, absorbed, source, cut, bank_ends, shift])
    indices = Indices(*(torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)))
    noise = {}
    for name, shape in draws.noise:
        gens = [generator(seed, f"noise/{name}", block, device) for seed in seeds]
        noise[name] = torch.stack([torch.randn((num_steps, *shape), generator=g, device=device) for g in gens], dim=1)
    return indices, noise


class Windows(Protocol):
    """Data that do not fit in memory: for each block of updates a part of them (`stream.Stream`)."""

    def at(self, block: int) -> Data: ...


def at(source: Data | Windows, block: int) -> Data:
    """What the updates of a block draw from."""
    return source if isinstance(source, Data) else source.at(block)


def batches(
    source: Data | Windows, draws: Draws, seeds: list[int], start: int, stop: int
) -> Iterator[tuple[int, tuple[Indices, dict[str, Tensor]]]]:
    """(step, (indices, noise)) for steps start..stop-1: what step i sees does not depend on where the run started."""
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        indices, noise = draw(at(source, block), draws, seeds, block, BLOCK)
        for step in range(max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)):
            i = step - block * BLOCK
            yield step, (Indices(*(x[i] for x in indices)), {name: value[i] for name, value in noise.items()})


def gather(data: Data, indices: Indices, draws: Draws) -> OccupancyBatch | TransitionBatch:
    """The batch of one step, from indices without the leading step axis."""
    size = indices.row.shape[1]
    of_row, of_next, of_bank = (indices.shift[:, a:b] for a, b in ((0, size), (size, 2 * size), (2 * size, None)))
    observation, action = observed(data, indices.row, of_row), _rows(data.action, indices.row)
    if draws.transitions:
        return TransitionBatch(
            observation,
            action,
            reward=_rewards(data, indices.row + 1),
            discount=torch.where(indices.ends, 0.0, draws.gamma),
            next_observation=observed(data, indices.row + 1, of_next),
        )
    bank_reward = (
        _rewards(data, indices.bank_row)
        if draws.bank
        else indices.bank_row.new_ones(indices.bank_row.shape, dtype=torch.float32)
    )
    if draws.next_states and draws.bank:
        bank_reward = arrival_share(bank_reward, indices.bank_ends, draws.gamma)
    return OccupancyBatch(
        observation,
        action,
        future_observation=observed(data, indices.future_row, of_next[:, : indices.future_row.shape[1]]),
        bank_observation=(observed_example if draws.examples else observed)(data, indices.bank_row, of_bank),
        bank_reward=torch.where(indices.bank_absorbed, 0.0, bank_reward),
        time=_times(data, indices.row) if draws.times else indices.row[:, :0],
        bank_time=_times(data, indices.bank_source) if draws.times else indices.row[:, :0],
        next_action=_rows(data.action, indices.future_row if draws.next_states else indices.row[:, :0]),
        ended=indices.ends,
        cut=indices.cut,
    )


def arrival_share(reward: Tensor, ends: Tensor, gamma: float) -> Tensor:
    """What rewards of next states count in a bank of their law: a share gamma of the mass at a terminal state (`ends`)
    has been there before, and is paid nothing."""
    return torch.where(ends, (1 - gamma) * reward, reward)


def observed(data: Data, row: Tensor, shift: Tensor) -> Observation:
    """What is seen at rows (E, N), frames shifted by `shift` (E, N, 2) pixels, or (E, 0, 2)."""
    vector = _rows(data.observation, row)
    if not data.frames:
        return vector
    back = torch.arange(data.stack - 1, -1, -1, device=row.device)
    stacked = torch.maximum(row.unsqueeze(-1) - back, _first(data, row).unsqueeze(-1))  # (E, N, S)
    return Views(vector, tuple(_frames(camera, stacked, shift, data.shift) for camera in data.frames))


def observed_example(data: Data, number: Tensor, shift: Tensor) -> Observation:
    """What success examples (E, N) show; as `observed`."""
    vector = _rows(data.examples, number)
    if not data.example_frames:
        return vector
    stacked = number.unsqueeze(-1) * data.stack + torch.arange(data.stack, device=number.device)
    cameras = (camera.flatten(0, 1) for camera in data.example_frames)
    return Views(vector, tuple(_frames(camera, stacked, shift, data.shift) for camera in cameras))


def _frames(camera: Tensor, index: Tensor, shift: Tensor, most: int) -> Tensor:
    """Of frames (rows, H, W, C) those of `index` (E, N, S): (E, N, S, H, W, C); each stack shifted by its own `shift`
    (E, N, 2) of at most so many pixels, the edge repeated. Of features (rows, E, K), each member's own: (E, N, K)."""
    if camera.dim() == 3:
        members = torch.arange(camera.shape[1], device=index.device).unsqueeze(1)
        return _rows(camera.flatten(0, 1), index[..., -1] * camera.shape[1] + members)
    if shift.shape[1] == 0:
        return _rows(camera, index)
    height, width, channels = camera.shape[1:]
    down, right = shift[..., 0, None, None], shift[..., 1, None, None]  # (E, N, 1, 1)
    line = (torch.arange(height, device=index.device) - down).clamp(0, height - 1)
    lines = _rows(camera.flatten(0, 1), index.unsqueeze(-1) * height + line)  # (E, N, S, H, W, C)
    sides = [lines[..., place, :].expand(*lines.shape[:-2], most, -1) for place in (slice(1), slice(-1, None))]
    wide = torch.cat([sides[0], lines, sides[1]], dim=-2).flatten()
    # each line begins elsewhere: the bytes from every place on, of which the lines' own are taken
    size, step = width * channels, (width + 2 * most) * channels
    begins = torch.arange(lines.shape[:-2].numel(), device=index.device).unflatten(0, lines.shape[:-2]) * step
    windows = wide.as_strided((len(wide) - size + 1, size), (1, 1))
    return _rows(windows, begins + (most - right) * channels).unflatten(-1, (width, channels))


def _first(data: Data, row: Tensor) -> Tensor:
    """The first row of the episode of each of rows (E, N)."""
    first = data.layout.first
    return first[torch.searchsorted(first, row, right=True) - 1]


def _times(data: Data, row: Tensor) -> Tensor:
    """Steps since the episode began, of rows (E, N)."""
    return row - _first(data, row)


def _rows(source: Tensor, index: Tensor) -> Tensor:
    return source.index_select(0, index.flatten()).unflatten(0, index.shape)


def _rewards(data: Data, row: Tensor) -> Tensor:
    """Rewards of arriving at rows (E, N): each member's own where they are learned."""
    table = data.arrival_reward
    if len(table) > 1:
        row = row + table.shape[1] * torch.arange(len(table), device=row.device).unsqueeze(1)
    return _rows(table.flatten(), row)
