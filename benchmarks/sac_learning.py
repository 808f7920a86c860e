"""What our SAC and Stable-Baselines3's learn in the same number of frames: `python benchmarks/sac.py --learn TASK`."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from sb3_peer import Wrapped, sb3_model

from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.learn.settings import Settings
from cvlctl.play import envs
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode
from cvlctl.types import Episode


def learn(task: str, frames: int, seed: int, learning_starts: int, only: str) -> dict[str, Any]:
    """Train both on the same task for the same frames; the last training episodes, and 20 greedy ones of each."""
    found: dict[str, Any] = {"task": task, "frames": frames, "seed": seed}
    if only in ("both", "cvlctl"):
        found["cvlctl"] = _learn_ours(task, frames, seed, learning_starts)
        print(json.dumps({"task": task, "cvlctl": found["cvlctl"]}), flush=True)
    if only in ("both", "sb3"):
        found["Stable-Baselines3"] = _learn_theirs(task, frames, seed, learning_starts)
        print(json.dumps({"task": task, "Stable-Baselines3": found["Stable-Baselines3"]}), flush=True)
    return found


def _learn_ours(task: str, frames: int, seed: int, learning_starts: int) -> dict[str, Any]:
    source = {"name": "sac", "steps": frames, "learning_starts": learning_starts}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "replay.zarr"
        recipe = BuildRecipe.model_validate(
            {"task": task, "source": source, "out": out, "seed": seed, "threads": torch.get_num_threads()}
        )
        begin = time.perf_counter()
        build(recipe)
        seconds = time.perf_counter() - begin
        episodes = list(open_store(out).episodes())
        policy = load_policy(Path(folder) / "replay.policies", seed)
    if len(episodes) > 1 and not episodes[-1].terminated and len(episodes[-1]) < policy.spec.horizon:
        episodes.pop()  # cut off by the end of the frames
    return _summary(task, seed, [_result(episode) for episode in episodes], policy, seconds)


def _learn_theirs(task: str, frames: int, seed: int, learning_starts: int) -> dict[str, Any]:
    common.configure(Settings("cpu", torch.get_num_threads(), "float32", False))
    env = Wrapped(task, seed)
    model = sb3_model(env, seed=seed, buffer_size=frames, learning_starts=learning_starts)
    begin = time.perf_counter()
    model.learn(frames)
    seconds = time.perf_counter() - begin
    return _summary(task, seed, env.results, lambda o: model.predict(o, deterministic=True)[0], seconds)


def _result(episode: Episode) -> tuple[float, bool | None]:
    assert episode.rewards is not None
    return float(episode.rewards.sum()), None if episode.successes is None else bool(episode.successes.any())


def _summary(
    task: str, seed: int, results: list[Any], act: Callable[[np.ndarray], np.ndarray], seconds: float
) -> dict[str, Any]:
    """The last 10 whole training episodes and 20 greedy ones on other seeds, in numbers."""
    env = envs.make(task, EVALUATION_SEED + seed)
    greedy = [collect_episode(env, lambda observation, step: act(observation), number) for number in range(20)]
    found: dict[str, Any] = {"seconds": round(seconds, 1), "training_episodes": len(results)}
    for what, rows in (("last_10_training", results[-10:]), ("20_greedy", [_result(episode) for episode in greedy])):
        returns, successes = zip(*rows, strict=True)
        found[what] = {
            "return_mean": round(float(np.mean(returns)), 1),
            "return_std": round(float(np.std(returns)), 1),
            "success": None if successes[0] is None else round(float(np.mean(successes)), 3),
        }
    return found
