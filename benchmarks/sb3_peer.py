"""Stable-Baselines3's SAC, for the benchmarks beside it: in our environments, and on a buffer as full as ours."""

from __future__ import annotations

from typing import Any

import common
import gymnasium
import numpy as np
from common import SPEC, Contestant

from cvlctl.learn.algorithms import sac
from cvlctl.learn.settings import Settings
from cvlctl.play import envs

CONFIG, BATCH = sac.Config(), 256  # of both sides
FILLED = 20_000  # transitions in the replay buffer while measuring
PEER = "Stable-Baselines3"


class Wrapped(gymnasium.Env):
    """cvlctl's environment for Stable-Baselines3: the same episodes, numbered from 0."""

    def __init__(self, task: str, seed: int) -> None:
        self.inner, self.episode = envs.make(task, seed), -1
        self.results: list[tuple[float, bool | None]] = []  # return and success of every whole episode
        self._rewards: list[float] = []
        self._successes: list[bool | None] = []
        shape, action_dim = self.inner.spec.observation_shape, self.inner.spec.action_dim
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self.episode += 1
        self._rewards, self._successes = [], []
        return self.inner.reset(self.episode), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, success = self.inner.step(action)
        self._rewards.append(reward)
        self._successes.append(success)
        if terminated or truncated:
            self.results.append((sum(self._rewards), None if success is None else any(self._successes)))
        return observation, reward, terminated, truncated, {}


class Noise(gymnasium.Env):
    """Random observations: an environment of the right shape for the speed test."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, SPEC.observation_shape, np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (SPEC.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self.observation_space.sample(), 0.0, False, False, {}


def sb3_model(env: Any, **changes: Any) -> Any:
    """Stable-Baselines3's SAC as shipped, on the CPU."""
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    model = SAC("MlpPolicy", env, device="cpu", **{"seed": 0, **changes})
    model.set_logger(Logger(None, []))
    return model


def theirs(settings: Settings) -> Contestant:
    """Stable-Baselines3's `train`, on a buffer as full as ours."""
    model = sb3_model(Noise(), buffer_size=FILLED)
    rng = np.random.default_rng(0)
    for _ in range(FILLED):
        o, o2 = rng.standard_normal((2, 1, *SPEC.observation_shape), dtype=np.float32)
        model.replay_buffer.add(o, o2, rng.uniform(-1, 1, (1, SPEC.action_dim)), np.zeros(1), np.zeros(1), [{}])

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):  # one a call, as `learn` does with one update a frame
            model.train(gradient_steps=1, batch_size=BATCH)

    return run
