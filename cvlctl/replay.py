"""A replay buffer, and what each of its updates draws: what every online learner has beside its own module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl import samplers
from cvlctl.samplers import generator
from cvlctl.types import Spec, TransitionBatch

BLOCK = 64  # frames whose randomness is drawn together: part of what a seed means, so a constant


class Replay:
    """Every transition so far, packed one a row: a batch is a single gather, which is faster than one for each part.

    Args:
        capacity: transitions in all; nothing is ever overwritten, since the replay is the dataset.
    """

    def __init__(self, capacity: int, spec: Spec) -> None:
        (observation_dim,) = spec.observation_shape
        self._widths = [observation_dim, spec.action_dim, 1, 1, observation_dim]
        self._rows = torch.zeros(capacity, sum(self._widths))
        self._numpy = self._rows.numpy()  # the same memory
        self._cuts = np.cumsum(self._widths)[:-1].tolist()
        self.size = 0

    def add(
        self, observation: np.ndarray, action: np.ndarray, reward: float, terminated: bool, next_observation: np.ndarray
    ) -> None:
        """Append one transition: (O,), (A,), numbers, (O,)."""
        row, (a, r, t, n) = self._numpy[self.size], self._cuts
        row[:a], row[a:r], row[r], row[t], row[n:] = observation, action, reward, not terminated, next_observation
        self.size += 1

    def gather(self, index: Tensor, gamma: float, device: str) -> TransitionBatch:
        """The transitions `index` (E, B), int64."""
        rows = self._rows.index_select(0, index.flatten()).unflatten(0, index.shape).to(device)
        observation, action, reward, going_on, next_observation = rows.split(self._widths, dim=-1)
        return TransitionBatch(observation, action, reward.squeeze(-1), gamma * going_on.squeeze(-1), next_observation)


class Draws(NamedTuple):
    """Randomness of the BLOCK frames of one block."""

    uniform_action: np.ndarray  # (BLOCK, A) in [-1, 1): what the collector does before learning starts
    exploration: np.ndarray  # (BLOCK, A) standard normal: the acting policy's noise
    place: Tensor  # (BLOCK, E, B) in [0, 1), float64: where in the replay, as far as it is filled by then
    noise: dict[str, Tensor]  # (BLOCK, E, *shape) standard normal, by name: the update's own

    def batch(
        self, i: int, replay: Replay, gamma: float, device: str = "cpu"
    ) -> tuple[TransitionBatch, dict[str, Tensor]]:
        """Batch and noise of the update after frame `i` of the block."""
        index = (self.place[i] * replay.size).long()
        return replay.gather(index, gamma, device), {name: value[i].to(device) for name, value in self.noise.items()}


def draw(learner: str, wanted: samplers.Draws, spec: Spec, seeds: Sequence[int], block: int) -> Draws:
    """The draws of `block`: a pure function of (learner, seeds, block). Acting follows seeds[0].

    Args:
        learner: names the streams of randomness: a learner's own.
        wanted: what its step draws; of it batch size and noise count here.
    """
    acting = generator(seeds[0], f"{learner}/act", block)
    uniform_action = 2 * torch.rand(BLOCK, spec.action_dim, generator=acting) - 1
    exploration = torch.randn(BLOCK, spec.action_dim, generator=acting)
    members = []
    for seed in seeds:
        g = generator(seed, f"{learner}/batch", block)
        place = torch.rand((BLOCK, wanted.batch_size), generator=g, dtype=torch.float64)
        members.append([place, *(torch.randn((BLOCK, *shape), generator=g) for _, shape in wanted.noise)])
    place, *noise = (torch.stack(column, dim=1) for column in zip(*members, strict=True))
    names = [name for name, _ in wanted.noise]
    return Draws(uniform_action.numpy(), exploration.numpy(), place, dict(zip(names, noise, strict=True)))
