"""Our SAC beside Stable-Baselines3's: updates and frames a second, and what both learn at the same number of frames.

    python benchmarks/sac.py [--threads 2] [--json speed.json]         updates/s and frames/s, all in one process
    python benchmarks/sac.py --learn gym/Hopper-v5 --frames 40000      train both, compare returns and successes

Needs the extra `bench` (stable-baselines3). Both agents do the same work: one update a frame, batch 256, twin critic
and actor of 256x256, learned temperature, Polyak 0.005. Speed rounds alternate between the contestants, so that a busy
machine slows all alike; the ratio is the median over rounds.

Frames/s are those of whole collections on Metaworld's drawer-close, one update a frame: ours by the code of
`cvlctl build-dataset`, store and checkpoints included; theirs by `model.learn`, in the same environment. They count
from WARM_UP frames after learning starts; what came before, compiling above all, is told apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cvlctl  # noqa: F401 (before torch: it says how OpenMP's threads are to wait)

# isort: split
import gymnasium
import numpy as np
import torch
from common import (
    AS_SHIPPED,
    BF16,
    EAGER,
    FORM,
    OUR_SETTING,
    SPEC,
    Contestant,
    best,
    configure,
    finish,
    forms,
    machine,
    measure,
    our_settings,
    parser,
    show,
    versus,
)

from cvlctl.collect import replay
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.learn.algorithms import sac
from cvlctl.learn.programs import whole_step
from cvlctl.learn.settings import Settings
from cvlctl.play import envs
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode
from cvlctl.progress import Progress
from cvlctl.types import Episode

CONFIG, BATCH = sac.Config(), 256
FILLED = 20_000  # transitions in the replay buffer while measuring
TASK, WARM_UP = "metaworld/drawer-close-v3", 500  # of the frames' rate: learning frames that do not count yet
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


def ours(
    settings: Settings,
    num_seeds: int = 1,
    config: sac.Config = CONFIG,
    batch_size: int = BATCH,
    filled: int = FILLED,
) -> Contestant:
    """n updates of all seeds: the online loop's own pieces, without its environment. Sampling and noise are included,
    and each seed samples from `filled` transitions of its own."""
    seeds = list(range(num_seeds))
    state, wanted = sac.init(config, SPEC, seeds), sac.draws(config, SPEC, batch_size)
    program = whole_step(partial(sac.step, config), settings)
    buffer = replay.Replay(num_seeds * filled, SPEC)
    rng = np.random.default_rng(0)
    for _ in range(num_seeds * filled):
        o, o2 = rng.standard_normal((2, *SPEC.observation_shape), dtype=np.float32)
        buffer.add(o, rng.uniform(-1, 1, SPEC.action_dim), 0.0, False, o2)
    own = filled * torch.arange(num_seeds).unsqueeze(1)  # where each seed's transitions begin
    frame, draws = 0, replay.draw("sac", wanted, SPEC, seeds, 0)

    def run(updates: int) -> None:
        nonlocal frame, draws
        configure(settings)
        for _ in range(updates):
            block, i = divmod(frame, replay.BLOCK)
            if i == 0:
                draws = replay.draw("sac", wanted, SPEC, seeds, block)
            batch = buffer.gather(own + (draws.place[i] * filled).long(), config.gamma, "cpu")
            program(state, batch, {name: value[i] for name, value in draws.noise.items()})
            frame += 1

    return run


def theirs(settings: Settings) -> Contestant:
    """Stable-Baselines3's `train`, on a buffer as full as ours."""
    model = sb3_model(Noise(), buffer_size=FILLED)
    rng = np.random.default_rng(0)
    for _ in range(FILLED):
        o, o2 = rng.standard_normal((2, 1, *SPEC.observation_shape), dtype=np.float32)
        model.replay_buffer.add(o, o2, rng.uniform(-1, 1, (1, SPEC.action_dim)), np.zeros(1), np.zeros(1), [{}])

    def run(updates: int) -> None:
        configure(settings)
        for _ in range(updates):  # one a call, as `learn` does with one update a frame
            model.train(gradient_steps=1, batch_size=BATCH)

    return run


class Clock(Progress):
    """Notes when how many frames were done, instead of reporting on it."""

    seen: list[tuple[int, float]] = []  # frames, and the time in seconds; of the collection at work

    def __enter__(self) -> Clock:
        Clock.seen = []
        return self

    def update(self, done: int, text: str = "") -> None:
        self.seen.append((done, time.perf_counter()))

    def __exit__(self, *error: object) -> None:
        pass


def our_frames(settings: Settings, frames: int, learning_starts: int, hidden: Sequence[int]) -> list[tuple[int, float]]:
    """When how many frames were done, in a collection that becomes a store."""
    source = {
        "name": "sac", "steps": frames, "learning_starts": learning_starts, "hidden": hidden, "update_every": 1
    }  # fmt: skip
    how = {"threads": settings.threads, "precision": settings.precision, "compile": settings.compile, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "replay.zarr"
        build(BuildRecipe.model_validate({"task": TASK, "source": source, "out": out, **how}), progress=Clock)
    return Clock.seen


def their_frames(
    settings: Settings, frames: int, learning_starts: int, hidden: Sequence[int]
) -> list[tuple[int, float]]:
    """The same by `model.learn`."""
    configure(settings)
    net = {"policy_kwargs": {"net_arch": list(hidden)}}
    model = sb3_model(Wrapped(TASK, 0), buffer_size=frames, learning_starts=learning_starts, **net)
    seen: list[tuple[int, float]] = []

    def note(here: dict[str, Any], there: dict[str, Any]) -> bool:
        if model.num_timesteps % 50 == 0:
            seen.append((model.num_timesteps, time.perf_counter()))
        return True

    model.learn(frames, callback=note)
    return seen


def steady(seen: list[tuple[int, float]], learning_starts: int) -> tuple[float, float]:
    """Frames a second once WARM_UP frames are learnt from, and the seconds that these took beyond that rate."""
    times = dict(seen)
    begin, first, last = learning_starts, learning_starts + WARM_UP, seen[-1][0]
    rate = (last - first) / (times[last] - times[first])
    return rate, times[first] - times[begin] - WARM_UP / rate


def frames_a_second(
    contestants: Mapping[str, Callable[[], list[tuple[int, float]]]], rounds: int, learning_starts: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Rates of every contestant, in turns, and the seconds of its warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    warm_ups: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, collect in contestants.items():
            rate, warm_up = steady(collect(), learning_starts)
            rates[name].append(rate)
            warm_ups[name].append(round(warm_up, 1))
    return rates, warm_ups


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Updates/s of every form and frames/s of whole collections, beside Stable-Baselines3's."""
    before, threads, mine = machine(), args.threads, our_settings(args.threads, args.eager_only)
    mine.pop(BF16, None)  # not what collects data
    shipped, alike, chosen = PEER + AS_SHIPPED, PEER + OUR_SETTING, best(mine)
    as_shipped = Settings("cpu", threads, "float32", False)
    contestants = {shipped: theirs(as_shipped), alike: theirs(mine[EAGER])}
    contestants |= {form: ours(settings) for form, settings in mine.items()}
    rates = measure(contestants, args.rounds, args.updates, warm_up=20)
    curves = [forms(f"SAC's update, batch 256, 256x256, {threads} threads", rates, shipped)]
    work = f"SAC's update, batch 256, 256x256, {FORM[chosen]}"
    comparisons = [
        versus(work, shipped, rates[chosen], rates[shipped], threads=threads, least=2.2, aim=3),
        versus(work, alike, rates[chosen], rates[alike], threads=threads),
    ]
    how = (args.frames, args.learning_starts, args.hidden)
    collections = {
        shipped: partial(their_frames, as_shipped, *how),
        alike: partial(their_frames, mine[EAGER], *how),
        chosen: partial(our_frames, mine[chosen], *how),
    }
    rates, warm_ups = frames_a_second(collections, args.frame_rounds, args.learning_starts)
    work = f"SAC end to end on {TASK}, one update a frame, {FORM[chosen]}"
    row = partial(versus, work, unit="frames/s", threads=threads)
    comparisons += [
        row(shipped, rates[chosen], rates[shipped], least=2, aim=2.5),
        row(alike, rates[chosen], rates[alike]),
    ]
    return {
        "comparisons": comparisons, "curves": curves, "frames": args.frames, "warm_up_seconds": warm_ups,
        "settings": mine[chosen].as_dict(), "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


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
    configure(Settings("cpu", torch.get_num_threads(), "float32", False))
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


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--updates", type=int, default=150, help="updates a round")
    options.add_argument("--frame-rounds", type=int, default=3, help="rounds of whole collections")
    options.add_argument("--frames", type=int, help="of each collection (4,000), or with --learn of training (20,000)")
    options.add_argument("--learning-starts", type=int, default=1000, help="random frames, of --frames")
    options.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="networks of the collections")
    options.add_argument("--eager-only", action="store_true", help="compile nothing")
    options.add_argument("--learn", metavar="TASK", help="train both on this task instead of measuring speed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", choices=["both", "cvlctl", "sb3"], default="both")
    args = options.parse_args(arguments)
    args.frames = args.frames or (20_000 if args.learn else 4000)
    torch.set_num_threads(args.threads)
    if args.learn:
        found = learn(args.learn, args.frames, args.seed, args.learning_starts, args.only)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
        return
    found = speed(args)
    for curve in found["curves"]:
        show(curve)
    for name, seconds in found["warm_up_seconds"].items():
        print(f"{name:42} seconds before the steady rate, each round: {seconds}")
    finish(found, args)


if __name__ == "__main__":
    main()
