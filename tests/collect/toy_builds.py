"""Tiny recipes of builds, ways for them to die, and a task whose policies succeed as often as we like."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from cvlctl import checkpoints
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import Store
from cvlctl.data.writer import StoreWriter
from cvlctl.learn import networks
from cvlctl.play import envs
from cvlctl.types import Spec

PENDULUM = "gym/Pendulum-v1"


SPEC = Spec((3,), 1, 200)  # Pendulum's


SAC = {"name": "sac", "steps": 650, "learning_starts": 40, "hidden": [16], "batch_size": 16, "policy_every_steps": 300}


CONTRASTIVE = SAC | {"name": "contrastive_ac", "steps": 450, "learning_starts": 240}


def recipe_for(out: Path, source: dict[str, Any] | None = None, **more: Any) -> BuildRecipe:
    common = {"task": PENDULUM, "threads": 1, "precision": "float32", "compile": "false", "checkpoint_seconds": 1e-6}
    return BuildRecipe.model_validate({**common, "source": source or SAC, "out": out, **more})


def replayed(store: Store, task: str, seed: int) -> None:
    """The stored actions, played again in a fresh environment, give the stored observations, rewards and ends."""
    env = envs.make(task, seed)
    for number, episode in enumerate(store.episodes()):
        assert episode.rewards is not None
        np.testing.assert_array_equal(episode.observations[0], env.reset(number))
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, success = env.step(action)
            np.testing.assert_array_equal(episode.observations[t + 1], observation)
            assert episode.rewards[t] == np.float32(reward)
            assert (None if episode.successes is None else bool(episode.successes[t])) == success
        last = number == store.num_episodes - 1
        assert episode.terminated == terminated and (terminated or truncated or last)


class Killed(Exception):
    pass


def die_in_step(monkeypatch: pytest.MonkeyPatch, number: int = 477) -> None:
    before, calls = envs.Env.step, 0

    def step(self: envs.Env, action: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise Killed
        return before(self, action)

    monkeypatch.setattr(envs.Env, "step", step)


def die_in_flush(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        before(self)
        calls += 1
        if calls == number:
            raise Killed

    monkeypatch.setattr(StoreWriter, "flush", flush)


def die_before_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: StoreWriter, **extra: Any) -> Store:
        raise Killed

    monkeypatch.setattr(StoreWriter, "finish", finish)


class OneStep:
    """One or more steps; an action above 0 succeeds, the reward is 1 + the action, and what is seen then shows it."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def step(self, action: np.ndarray) -> Any:
        return np.array([action[0], 0.0]), float(1 + action[0]), False, False, {"success": float(action[0] > 0)}

    def close(self) -> None:
        pass


BIASES = {10: -3.0, 20: -1.5, 30: -0.8, 40: 0.0, 50: 0.6, 60: 1.5}  # success in one step: 0, 7, 21, 50, 73, 93 %


def agent(folder: Path, biases: dict[int, float], status: str = "finished") -> Path:
    """A SAC collection's run: at each step a policy whose action is tanh of a normal variable with that mean."""
    for step, bias in biases.items():
        state = networks.actor_init([0], 2, 1, (4,))
        state = {name: torch.zeros_like(value) for name, value in state.items()}
        state["actor.1.bias"][..., 0] = bias
        state |= networks.normaliser_init([0], torch.zeros(2), torch.ones(2))
        metadata = {"algorithm": "sac", "spec": asdict(Spec((2,), 1, 3)), "seeds": [0], "step": step}
        name = "last" if step == max(biases) else f"step-{step:09d}"
        checkpoints.save(folder / "checkpoints" / f"{name}.safetensors", state, metadata)
    record = {"status": status, "inputs": {}, "algorithm": "sac", "seeds": [0], "steps": max(biases)}
    (folder / "run.json").write_text(json.dumps(record))
    return folder
