"""A replay buffer, and what each of its updates draws: what every online learner has beside its own module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.data.samplers import NO_SHIFT, generator
from cvlctl.types import Goals, Observation, Observe, Spec, TransitionBatch

BLOCK = 64  # frames whose randomness is drawn together: part of what a seed means, so a constant


class Instants:
    """What was seen at every instant so far, each frame once: stacks of them are made as a batch is gathered.

    Args:
        rows: about how many instants there will be; room for more is made where episodes are short.
        spec: what is seen: a vector, which may have no columns, and cameras.
        device: where frames lie.
    """

    def __init__(self, rows: int, spec: Spec, observe: Observe, device: str) -> None:
        self._observe = observe
        kinds = [(spec.observation_shape, torch.float32), *((spec.cameras[c], torch.uint8) for c in observe.cameras)]
        # memory that is never written to is never taken
        self._arrays = [torch.empty(rows, *shape, dtype=dtype, device=device) for shape, dtype in kinds]
        self._first = torch.zeros(0, dtype=torch.int64, device=device)  # row of each episode's first instant
        self.size = 0

    def add(self, vector: np.ndarray, frames: Mapping[str, np.ndarray], begins: bool) -> None:
        """Append an instant: a vector (O,), frames (H, W, C) by camera; `begins`: it is an episode's first."""
        if begins:
            self._first = torch.cat([self._first, self._first.new_full((1,), self.size)])
        if self.size == len(self._arrays[0]):
            self._arrays = [torch.cat([one, torch.empty_like(one[: len(one) // 4 + 1])]) for one in self._arrays]
        seen = [vector[: self._arrays[0].shape[1]], *(frames[camera] for camera in self._observe.cameras)]
        for array, one in zip(self._arrays, seen, strict=True):
            array[self.size] = torch.from_numpy(np.ascontiguousarray(one))
        self.size += 1

    def at(self, row: Tensor, shift: Tensor) -> Observation:
        """What is seen at rows (E, N), frames shifted by `shift` (E, N, 2) pixels, or (E, 0, 2)."""
        vector, *frames = self._arrays
        nothing, where = vector[:0], samplers.Layout(self._first, self._first, self._first, self._first)
        data = samplers.Data(
            vector, nothing, nothing, where, nothing, nothing, tuple(frames), (), self._observe.stack,
            self._observe.shift,
        )  # fmt: skip
        return samplers.observed(data, row.to(vector.device), shift.to(vector.device))

    def latest(self) -> Observation:
        """What is seen now, (1, 1)."""
        return self.at(torch.tensor([[self.size - 1]]), NO_SHIFT)


class Replay:
    """Every transition so far, packed one a row: a batch is a single gather, which is faster than one for each part.

    Args:
        capacity: transitions in all; nothing is ever overwritten, since the replay is the dataset.
        goals: where observations hold goals, for `hindsight`.
        instants: where the learner sees frames, what was seen; a transition is added after the instant that it led to.
    """

    def __init__(self, capacity: int, spec: Spec, goals: Goals | None = None, instants: Instants | None = None) -> None:
        observation_dim = 0 if instants is not None else spec.observation_shape[0]
        self._widths = [observation_dim, spec.action_dim, 1, 1, observation_dim]
        self._rows = torch.zeros(capacity, sum(self._widths))
        self._numpy = self._rows.numpy()  # the same memory
        self._cuts = np.cumsum(self._widths)[:-1].tolist()
        self.instants = instants
        self._instant = torch.zeros(0 if instants is None else capacity, dtype=torch.int64)  # that each row began at
        self._goals = goals
        known = capacity if goals else 0
        self._episode = np.zeros(known, dtype=np.int64)  # of each row
        self._last = np.zeros(known, dtype=np.int64)  # row of each episode, so far
        self.size = 0

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: float,
        terminated: bool,
        next_observation: np.ndarray,
        episode: int = 0,
    ) -> None:
        """Append one transition: (O,), (A,), numbers, (O,), and the number of its episode, 0, 1, ..."""
        row, (a, r, t, n) = self._numpy[self.size], self._cuts
        row[:a], row[n:] = observation[:a], next_observation[:a]
        row[a:r], row[r], row[t] = action, reward, not terminated
        if self.instants is not None:
            self._instant[self.size] = self.instants.size - 2
        if self._goals:
            self._episode[self.size], self._last[episode] = episode, self.size
        self.size += 1

    def gather(
        self, index: Tensor, gamma: float, device: str, later: Tensor | None = None, shift: Tensor = NO_SHIFT
    ) -> TransitionBatch:
        """The transitions `index` (E, B), int64; `later` as in `hindsight`, `shift` as in `Draws`."""
        rows = self._rows.index_select(0, index.flatten())
        if later is not None:
            self.hindsight(rows, index.flatten(), later.flatten())
        rows = rows.unflatten(0, index.shape).to(device)
        observation, action, reward, going_on, following = rows.split(self._widths, dim=-1)
        seen, then = observation, following
        if self.instants is not None:
            begun, size = self._instant[index], index.shape[1]
            seen, then = self.instants.at(begun, shift[:, :size]), self.instants.at(begun + 1, shift[:, size:])
        return TransitionBatch(seen, action, reward.squeeze(-1), gamma * going_on.squeeze(-1), then)

    def hindsight(self, rows: Tensor, index: Tensor, later: Tensor) -> None:
        """Pretend that the goal was what the episode reached: hindsight experience replay, strategy "future".

        (Andrychowicz et al. 2017.) The goal of row i becomes what was achieved after a step of the same episode, drawn
        uniformly from the row's own to the last so far; its reward is worked out anew.

        Args:
            rows: (N, columns), copies of the rows `index` (N,), changed in place.
            later: (N,) in [0, 1): how far on to look; negative: the row stays as it is.
        """
        assert self._goals is not None
        left = torch.from_numpy(self._last[self._episode[index.numpy()]]) - index + 1
        then = index + (later.clamp(min=0) * left).long()
        before, _, reward, _, after = rows.split(self._widths, dim=-1)  # views
        achieved, desired = self._goals.achieved, self._goals.desired
        seen = self._rows[:, self._cuts[-1] :][:, achieved].index_select(0, then)
        goal = torch.where((later < 0)[:, None], after[:, desired], seen)
        before[:, desired] = after[:, desired] = goal
        anew = self._goals.reward(after[:, achieved], goal)
        reward[:, 0] = torch.where(later < 0, reward[:, 0], anew)


class Draws(NamedTuple):
    """Randomness of the BLOCK frames of one block."""

    uniform_action: np.ndarray  # (BLOCK, A) in [-1, 1): what the collector does before learning starts
    exploration: np.ndarray  # (BLOCK, A) standard normal: the acting policy's noise
    choice: np.ndarray  # (BLOCK,) in [0, 1): whether to act at random
    place: Tensor  # (BLOCK, E, B) in [0, 1), float64: where in the replay, as far as it is filled by then
    noise: dict[str, Tensor]  # (BLOCK, E, *shape) standard normal, by name: the update's own
    later: Tensor | None = None  # (BLOCK, E, B) for Replay.hindsight
    shift: Tensor | None = None  # (BLOCK, E, 2 B, 2) pixels down and right: of frames seen, and of those that follow

    def batch(
        self, i: int, replay: Replay, gamma: float, device: str = "cpu"
    ) -> tuple[TransitionBatch, dict[str, Tensor]]:
        """Batch and noise of the update after frame `i` of the block."""
        index = (self.place[i] * replay.size).long()
        later = None if self.later is None else self.later[i]
        noise = {name: value[i].to(device) for name, value in self.noise.items()}
        return replay.gather(index, gamma, device, later, NO_SHIFT if self.shift is None else self.shift[i]), noise


def draw(
    learner: str,
    wanted: samplers.Draws,
    spec: Spec,
    seeds: Sequence[int],
    block: int,
    hindsight: float = 0.0,
    shift: int = 0,
) -> Draws:
    """The draws of `block`: a pure function of (learner, seeds, block). Acting follows seeds[0].

    Args:
        learner: names the streams of randomness: a learner's own.
        wanted: what its step draws; of it batch size and noise count here.
        hindsight: share of each batch whose goals are replaced.
        shift: most pixels by which frames are shifted.
    """
    acting = generator(seeds[0], f"{learner}/act", block)
    uniform_action = 2 * torch.rand(BLOCK, spec.action_dim, generator=acting) - 1
    exploration = torch.randn(BLOCK, spec.action_dim, generator=acting)
    choice = torch.rand(BLOCK, generator=acting)
    members = []
    for seed in seeds:
        g = generator(seed, f"{learner}/batch", block)
        place = torch.rand((BLOCK, wanted.batch_size), generator=g, dtype=torch.float64)
        members.append([place, *(torch.randn((BLOCK, *shape), generator=g) for _, shape in wanted.noise)])
    place, *noise = (torch.stack(column, dim=1) for column in zip(*members, strict=True))
    names = [name for name, _ in wanted.noise]
    later = None
    if hindsight:
        shape = (2, BLOCK, wanted.batch_size)
        drawn = [torch.rand(shape, generator=generator(seed, f"{learner}/hindsight", block)) for seed in seeds]
        share, then = torch.stack(drawn, dim=2)
        later = torch.where(share < hindsight, then, -1.0)
    moved = None
    if shift:
        gens, size = [generator(seed, f"{learner}/shift", block) for seed in seeds], (BLOCK, 2 * wanted.batch_size, 2)
        moved = torch.stack([torch.randint(-shift, shift + 1, size, generator=g) for g in gens], dim=1)
    named = dict(zip(names, noise, strict=True))
    return Draws(uniform_action.numpy(), exploration.numpy(), choice.numpy(), place, named, later, moved)
