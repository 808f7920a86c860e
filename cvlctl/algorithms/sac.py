"""Soft actor-critic (Haarnoja et al. 2018), twin critic and learned temperature: the collector of replay stores.

Observations are not normalised (mean 0, std 1, clipped at +-10): there is no data yet when training starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl import networks
from cvlctl.algorithms import actors, values
from cvlctl.losses import policy, td
from cvlctl.networks import State
from cvlctl.samplers import generator
from cvlctl.training import Metrics
from cvlctl.types import Spec, TransitionBatch

BLOCK = 64  # frames whose randomness is drawn together: part of what a seed means, so a constant


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the defaults are the usual ones of public implementations."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: float = 0.99  # discount
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4  # of critic, actor and temperature
    batch_size: int = 256
    ema_rate: float = 0.005  # [tau] of the target critic
    target_entropy: float | None = None  # [H-bar]; None: minus the number of action dimensions
    initial_temperature: float = 1.0  # [alpha], the entropy's weight, before it is learned

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < 1:
            raise ValueError("gamma must lie in [0, 1)")
        if self.learning_rate <= 0 or self.initial_temperature <= 0 or self.batch_size < 1 or not self.hidden:
            raise ValueError("learning_rate, initial_temperature and batch_size must be positive, and hidden not empty")
        if not 0 < self.ema_rate <= 1:
            raise ValueError("ema_rate must lie in (0, 1]")


def init(config: Config, spec: Spec, seeds: Sequence[int]) -> State:
    """Actor, log temperature (E, 1), twin critic and its target, with Adam's moments, on the CPU."""
    (observation_dim,) = spec.observation_shape
    state = networks.normaliser_init(seeds, torch.zeros(observation_dim), torch.ones(observation_dim))
    state |= actors.init(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)
    return state | actors.temperature_init(seeds, config.initial_temperature)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of critic, actor, temperature and target, in that order.

    Args:
        noise: `action` and `next_action`, each (E, B, A) standard normal.
    """
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    temperature = state["log_temperature"].exp()

    next_action, next_log_prob = policy.sample_tanh(*networks.actor(state, next_observation), noise["next_action"])
    next_q = values.q_values(values.target(state), next_observation, next_action)
    y = td.td_target(batch.reward, batch.discount, td.soft_value(next_q, next_log_prob, temperature))

    metrics = values.regress(state, observation, batch.action, y, config.learning_rate, config.ema_rate)

    def q(action: Tensor) -> Tensor:
        return values.q_values(state, observation, action).amin(dim=1)

    metrics |= actors.improve_soft(state, observation, noise["action"], q, config.target_entropy, config.learning_rate)
    return state, metrics


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
    action: Tensor  # (BLOCK, E, B, A) standard normal
    next_action: Tensor  # (BLOCK, E, B, A)

    def batch(
        self, i: int, replay: Replay, gamma: float, device: str = "cpu"
    ) -> tuple[TransitionBatch, dict[str, Tensor]]:
        """Batch and noise of the update after frame `i` of the block."""
        index = (self.place[i] * replay.size).long()
        noise = {"action": self.action[i].to(device), "next_action": self.next_action[i].to(device)}
        return replay.gather(index, gamma, device), noise


def draw(config: Config, spec: Spec, seeds: Sequence[int], block: int) -> Draws:
    """The draws of `block`: a pure function of (seeds, block). Acting follows seeds[0]."""
    acting = generator(seeds[0], "sac/act", block)
    uniform_action = 2 * torch.rand(BLOCK, spec.action_dim, generator=acting) - 1
    exploration = torch.randn(BLOCK, spec.action_dim, generator=acting)
    shape = (BLOCK, config.batch_size, spec.action_dim)
    parts = []
    for seed in seeds:
        g = generator(seed, "sac/batch", block)
        place = torch.rand(shape[:2], generator=g, dtype=torch.float64)
        parts.append((place, torch.randn(shape, generator=g), torch.randn(shape, generator=g)))
    stacked = (torch.stack(column, dim=1) for column in zip(*parts, strict=True))
    return Draws(uniform_action.numpy(), exploration.numpy(), *stacked)
