"""50 evaluation episodes on Metaworld: ours beside Stable-Baselines3 and gymnasium's AsyncVectorEnv.

    python benchmarks/evaluation.py [--episodes 50] [--rounds 3] [--workers 2] [--json evaluation.json]

One actor with random weights (256x256) plays the same episodes for all three. Ours: `rollout.run_episodes`, whole
episodes in worker processes with a numpy policy. Stable-Baselines3 (the extra `bench`): `evaluate_policy` with its own
SAC actor holding these weights, one environment. AsyncVectorEnv: as many processes as ours, the same actor in plain
torch on the batch of their observations. Wall seconds count from the call to the last row, processes and environments
being built on the way; rounds alternate; ratios are medians over rounds. `disagreement` is the largest relative
difference of an episode's return from ours: the proof that all played the same thing. Where EnvPool is installed (the
extra `envpool`), ours once more with `backend: envpool`: as many episodes of the same task, from starts of its own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import common
import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from cvlctl import checkpoints
from cvlctl.learn import networks
from cvlctl.learn.networks import State
from cvlctl.play import envpool, envs
from cvlctl.play.players import run_episodes
from cvlctl.play.rollout import EVALUATION_SEED, PolicyJob

TASKS = ("metaworld/drawer-close-v3", "metaworld/pick-place-v3")
HIDDEN = (256, 256)
OURS, OURS_ENVPOOL, SB3 = "cvlctl", "cvlctl, EnvPool", "Stable-Baselines3 evaluate_policy"
TARGETS: dict[tuple[str, str, str], tuple[float | None, float | None]] = {  # at least, aim
    ("metaworld/pick-place-v3", OURS, SB3): (3.5, None),
    ("metaworld/pick-place-v3", OURS_ENVPOOL, SB3): (None, 10.0),
}


class Numbered(gymnasium.Env):
    """cvlctl's environment as gymnasium's: plays the episodes first, first + stride, ..."""

    def __init__(self, task: str, first: int = 0, stride: int = 1) -> None:
        self._inner, self._next, self._stride = envs.make(task, EVALUATION_SEED), first, stride
        # Metaworld's contact test as it is shipped: ours is part of what is measured
        vars(self._inner.raw).pop("touching_object", None)
        spec = self._inner.spec
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, spec.observation_shape, np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (spec.action_dim,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        episode, self._next = self._next, self._next + self._stride
        return self._inner.reset(episode), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, _ = self._inner.step(action)
        return observation, reward, terminated, truncated, {}

    def close(self) -> None:
        self._inner.close()


def random_actor(task: str) -> tuple[State, dict[str, Any]]:
    """State and metadata of a checkpoint whose actor has random weights and sees observations as they are."""
    env = envs.make(task, 0)
    spec = env.spec
    env.close()
    (width,) = spec.observation_shape
    state = networks.actor_init([0], width, spec.action_dim, HIDDEN)
    state |= networks.normaliser_init([0], torch.zeros(width), torch.ones(width))
    metadata = {"algorithm": "random", "task": task, "spec": asdict(spec), "seeds": [0], "step": 0}
    return state, metadata


def linear_layers(state: State) -> list[tuple[Tensor, Tensor]]:
    """(weight (out, in), bias (out,)) of the actor's layers, as nn.Linear keeps them; of the last only the mean's."""
    depth = sum(name.startswith("actor.") for name in state) // 2
    layers = [(state[f"actor.{i}.weight"][0].T, state[f"actor.{i}.bias"][0, 0]) for i in range(depth)]
    weight, bias = layers[-1]
    action_dim = len(bias) // 2
    return [*layers[:-1], (weight[:action_dim], bias[:action_dim])]


def fill(linears: Sequence[nn.Module], state: State) -> None:
    """Give `linears` the weights of the actor."""
    for layer, (weight, bias) in zip(linears, linear_layers(state), strict=True):
        assert isinstance(layer, nn.Linear)
        layer.weight.data.copy_(weight)
        layer.bias.data.copy_(bias)


def ours(task: str, checkpoint: Path, episodes: int, workers: int) -> list[float]:
    """Returns of the episodes, in their order."""
    job = PolicyJob("random", task, 0, 0, checkpoint)
    return [row.episode_return for row in run_episodes([job], episodes=episodes, workers=workers)]


def ours_in_envpool(task: str, checkpoint: Path, episodes: int, threads: int) -> list[float]:
    """The same of as many episodes of EnvPool's own, of the same length."""
    job = PolicyJob("random", task, 0, 0, checkpoint)
    return [row.episode_return for row in envpool.run_episodes([job], episodes=episodes, threads=threads)]


def stable_baselines3(task: str, model: Any, episodes: int) -> list[float]:
    """The same, by `evaluate_policy` in one environment."""
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    env = Monitor(Numbered(task))
    returns, _ = evaluate_policy(model, env, n_eval_episodes=episodes, return_episode_rewards=True)
    env.close()
    return np.array(returns).tolist()


def sb3_model(task: str, state: State) -> Any:
    """Stable-Baselines3's SAC with the actor's weights."""
    from stable_baselines3 import SAC

    model = SAC("MlpPolicy", Numbered(task), device="cpu", buffer_size=1)
    actor = model.policy.actor
    fill([layer for layer in actor.latent_pi if isinstance(layer, nn.Linear)] + [actor.mu], state)
    return model


def async_vector(task: str, state: State, episodes: int, workers: int) -> list[float]:
    """The same, by gymnasium's vector of processes; episode k is the (k // workers)-th of process k mod workers."""
    sizes = [state["actor.0.weight"].shape[1], *(len(bias) for _, bias in linear_layers(state))]
    linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    fill(linears, state)
    between = [part for linear in linears[:-1] for part in (linear, nn.ReLU())]
    actor = nn.Sequential(*between, linears[-1], nn.Tanh())
    vector = gymnasium.vector.AsyncVectorEnv([partial(Numbered, task, i, workers) for i in range(workers)])
    observations, _ = vector.reset()
    returns = np.full(-(-episodes // workers) * workers, np.nan)
    current, numbers, restarting = np.zeros(workers), np.arange(workers), np.zeros(workers, dtype=bool)
    while np.isnan(returns[:episodes]).any():
        with torch.no_grad():
            actions = actor(torch.from_numpy(observations)).numpy()
        observations, rewards, terminated, truncated, _ = vector.step(actions)
        current += np.where(restarting, 0.0, rewards)  # the step after an episode's end resets
        restarting = terminated | truncated
        for i in np.flatnonzero(restarting):
            if numbers[i] < len(returns):
                returns[numbers[i]] = current[i]
            current[i], numbers[i] = 0.0, numbers[i] + workers
    vector.close()
    return returns[:episodes].tolist()


def benchmark(tasks: Sequence[str], episodes: int, rounds: int, workers: int) -> dict[str, Any]:
    """Wall seconds of every task and contestant."""
    comparisons, disagreement = [], {}
    for task in tasks:
        with tempfile.TemporaryDirectory() as folder:
            state, metadata = random_actor(task)
            file = Path(folder) / "actor.safetensors"
            checkpoints.save(file, state, metadata)
            contestants: dict[str, Callable[[], list[float]]] = {}
            if find_spec("stable_baselines3"):
                contestants[SB3] = partial(stable_baselines3, task, sb3_model(task, state), episodes)
            contestants[f"gymnasium AsyncVectorEnv, {workers} processes"] = partial(
                async_vector, task, state, episodes, workers
            )
            contestants[OURS] = partial(ours, task, file, episodes, workers)
            if find_spec("envpool"):
                contestants[OURS_ENVPOOL] = partial(ours_in_envpool, task, file, episodes, workers)
            seconds, returns = play_in_turns(contestants, rounds)
        for mine, name in product((OURS, OURS_ENVPOOL), contestants):
            if mine not in contestants or name in (OURS, OURS_ENVPOOL):
                continue
            least, aim = TARGETS.get((task, mine, name), (None, None))
            how = f"{workers} processes" if mine == OURS else f"EnvPool's simulator, {workers} threads"
            comparisons.append(
                common.versus(f"{episodes} evaluation episodes, {task}, {how}", name, seconds[mine], seconds[name],
                       unit="seconds", threads=torch.get_num_threads(), least=least, aim=aim)
            )  # fmt: skip
            if mine == OURS:  # EnvPool's starts are its own
                difference = np.abs(returns[name] - returns[OURS]) / np.maximum(np.abs(returns[OURS]), 1.0)
                disagreement[f"{task}, {name}"] = float(difference.max())
    sizes = {"episodes": episodes, "rounds": rounds, "workers": workers, "threads": torch.get_num_threads()}
    return {
        "comparisons": comparisons, "disagreement": disagreement, **sizes,
    }  # fmt: skip


def play_in_turns(
    contestants: dict[str, Callable[[], list[float]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Seconds of each contestant in each round, and the returns of its episodes."""
    returns: dict[str, np.ndarray] = {}

    def play(name: str) -> None:
        returns[name] = np.array(contestants[name]())

    return common.timed({name: partial(play, name) for name in contestants}, rounds), returns


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=3)  # --threads: torch's, of the peers' policies
    options.add_argument("--tasks", nargs="+", default=list(TASKS))
    options.add_argument("--episodes", type=int, default=50)
    options.add_argument("--workers", type=int, default=2, help="processes of ours and of AsyncVectorEnv")

    def measured(args: argparse.Namespace) -> dict[str, Any]:
        torch.set_num_threads(args.threads)
        found = benchmark(args.tasks, args.episodes, args.rounds, args.workers)
        for name, difference in found["disagreement"].items():
            print(f"{name:75} disagreement {difference:.1e}")
        return found

    common.main(options, measured, arguments)


if __name__ == "__main__":
    main()
