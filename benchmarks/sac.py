"""Our SAC beside Stable-Baselines3's: updates a second, and what both learn at the same number of frames.

    python benchmarks/sac.py [--threads 2] [--json speed.json]         updates/s, all forms side by side in one process
    python benchmarks/sac.py --learn gym/Hopper-v5 --frames 40000      train both, compare returns and successes

Needs the extra `bench` (stable-baselines3). Both agents do the same work: one update a frame, batch 256, twin critic
and actor of 256x256, learned temperature, Polyak 0.005. Speed rounds alternate between the contestants, so that a busy
machine slows all alike; the ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cvlctl  # noqa: F401 (before torch: it says how OpenMP's threads are to wait)

# isort: split
import gymnasium
import numpy as np
import torch
from common import measure

from cvlctl import envs, replay, training
from cvlctl.algorithms import sac
from cvlctl.rollout import EVALUATION_SEED, collect_episode
from cvlctl.types import Episode, Spec

SPEC = Spec((39,), 4, 500)  # Metaworld's
FILLED = 20_000  # transitions in the replay buffer while measuring


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

    model = SAC("MlpPolicy", env, device="cpu", seed=0, **changes)
    model.set_logger(Logger(None, []))
    return model


def ours(compiled: bool, threads: int) -> Callable[[int], None]:
    """A function that makes n updates, sampling and noise included."""
    settings = training.Settings("cpu", threads, "medium", compiled)
    config = sac.Config()
    state = sac.init(config, SPEC, [0])
    program = training.whole_step(partial(sac.step, config), settings)
    buffer, wanted = replay.Replay(FILLED, SPEC), sac.draws(config, SPEC, 256)
    rng = np.random.default_rng(0)
    for _ in range(FILLED):
        o, o2 = rng.standard_normal((2, *SPEC.observation_shape), dtype=np.float32)
        buffer.add(o, rng.uniform(-1, 1, SPEC.action_dim), 0.0, False, o2)
    frame, draws = 0, replay.draw("sac", wanted, SPEC, [0], 0)

    def run(updates: int) -> None:
        nonlocal frame, draws
        training.configure(settings)
        for _ in range(updates):
            if frame % replay.BLOCK == 0:
                draws = replay.draw("sac", wanted, SPEC, [0], frame // replay.BLOCK)
            program(state, *draws.batch(frame % replay.BLOCK, buffer, config.gamma))
            frame += 1

    return run


def theirs(precision: str, threads: int) -> Callable[[int], None]:
    """Stable-Baselines3's `train`, on a buffer as full as ours."""
    model = sb3_model(Noise(), buffer_size=FILLED)
    rng = np.random.default_rng(0)
    for _ in range(FILLED):
        o, o2 = rng.standard_normal((2, 1, *SPEC.observation_shape), dtype=np.float32)
        model.replay_buffer.add(o, o2, rng.uniform(-1, 1, (1, SPEC.action_dim)), np.zeros(1), np.zeros(1), [{}])

    def run(updates: int) -> None:
        training.configure(training.Settings("cpu", threads, precision, False))
        for _ in range(updates):  # one a call, as `learn` does with one update a frame
            model.train(gradient_steps=1, batch_size=256)

    return run


def speed(threads: int, rounds: int, updates: int) -> dict[str, Any]:
    """Median updates/s of every form, and its ratio to Stable-Baselines3 as shipped."""
    contestants = {
        "Stable-Baselines3, as shipped": theirs("float32", threads),
        "Stable-Baselines3, our matmul setting": theirs("medium", threads),
        "cvlctl, eager": ours(False, threads),
    }
    if training.have_compiler():
        contestants["cvlctl, whole step compiled"] = ours(True, threads)
    rates = measure(contestants, rounds, updates, warm_up=20)
    base = np.array(rates["Stable-Baselines3, as shipped"])
    return {
        "threads": threads,
        "updates_per_second": {name: round(float(np.median(r)), 1) for name, r in rates.items()},
        "ratio": {name: round(float(np.median(np.array(r) / base)), 2) for name, r in rates.items()},
    }


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
    from cvlctl.commands.build_dataset import build
    from cvlctl.policies import load_policy
    from cvlctl.recipes import BuildRecipe
    from cvlctl.store import open_store

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
    training.configure(training.Settings("cpu", torch.get_num_threads(), "float32", False))
    env = Wrapped(task, seed)
    model = sb3_model(env, buffer_size=frames, learning_starts=learning_starts)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--updates", type=int, default=150, help="updates a round")
    parser.add_argument("--learn", metavar="TASK", help="train both on this task instead of measuring speed")
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-starts", type=int, default=1_000)
    parser.add_argument("--only", choices=["both", "cvlctl", "sb3"], default="both")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.learn:
        found = learn(args.learn, args.frames, args.seed, args.learning_starts, args.only)
    else:
        found = speed(args.threads, args.rounds, args.updates)
        print(f"{'updates/s, ' + str(args.threads) + ' threads':40}{'median':>10}{'ratio':>8}")
        for name, rate in found["updates_per_second"].items():
            print(f"{name:40}{rate:10.1f}{found['ratio'][name]:7.2f}x")
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
