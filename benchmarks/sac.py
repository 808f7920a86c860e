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
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aging
import common
import numpy as np
import torch
from common import AS_SHIPPED, BF16, EAGER, FORM, OUR_SETTING, SPEC, Contestant
from sb3_peer import BATCH, CONFIG, FILLED, PEER, Wrapped, sb3_model, theirs

from cvlctl.collect import replay
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.learn.algorithms import sac
from cvlctl.learn.programs import whole_step
from cvlctl.learn.settings import Settings
from cvlctl.progress import Progress

TASK, WARM_UP = "metaworld/drawer-close-v3", 500  # of the frames' rate: learning frames that do not count yet


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
    state, wanted = aging.aged(sac.init(config, SPEC, seeds)), sac.draws(config, SPEC, batch_size)
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
        common.configure(settings)
        for _ in range(updates):
            block, i = divmod(frame, replay.BLOCK)
            if i == 0:
                draws = replay.draw("sac", wanted, SPEC, seeds, block)
            batch = buffer.gather(own + (draws.place[i] * filled).long(), config.gamma, "cpu")
            program(state, batch, {name: value[i] for name, value in draws.noise.items()})
            frame += 1

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


def our_frames(
    settings: Settings, frames: int, learning_starts: int, hidden: Sequence[int], task: str = TASK
) -> list[tuple[int, float]]:
    """When how many frames were done, in a collection that becomes a store."""
    source = {
        "name": "sac", "steps": frames, "learning_starts": learning_starts, "hidden": hidden, "update_every": 1
    }  # fmt: skip
    how = {
        "threads": settings.threads, "precision": settings.precision, "compile": settings.compile,
        "device": settings.device,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "replay.zarr"
        build(BuildRecipe.model_validate({"task": task, "source": source, "out": out, **how}), progress=Clock)
    return Clock.seen


def their_frames(
    settings: Settings, frames: int, learning_starts: int, hidden: Sequence[int]
) -> list[tuple[int, float]]:
    """The same by `model.learn`."""
    common.configure(settings)
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

    def once(collect: Callable[[], list[tuple[int, float]]]) -> tuple[float, float]:
        return steady(collect(), learning_starts)

    found = common.turns({name: partial(once, collect) for name, collect in contestants.items()}, rounds)
    rates = {name: [rate for rate, _ in rows] for name, rows in found.items()}
    return rates, {name: [round(warm_up, 1) for _, warm_up in rows] for name, rows in found.items()}


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Updates/s of every form and frames/s of whole collections, beside Stable-Baselines3's."""
    threads, mine = args.threads, common.our_settings(args.threads, args.eager_only)
    mine.pop(BF16, None)  # not what collects data
    shipped, alike, chosen = PEER + AS_SHIPPED, PEER + OUR_SETTING, common.best(mine)
    as_shipped = common.shipped(threads)
    contestants = {shipped: theirs(as_shipped), alike: theirs(mine[EAGER])}
    contestants |= {form: ours(settings) for form, settings in mine.items()}
    rates = common.measure(contestants, args.rounds, args.updates, first=20)
    curves = [common.forms(f"SAC's update, batch 256, 256x256, {threads} threads", rates, shipped)]
    work = f"SAC's update, batch 256, 256x256, {FORM[chosen]}"
    comparisons = [
        common.versus(work, shipped, rates[chosen], rates[shipped], threads=threads, least=2.2, aim=3),
        common.versus(work, alike, rates[chosen], rates[alike], threads=threads),
    ]
    how = (args.frames or 4000, args.learning_starts, args.hidden)
    collections = {
        shipped: partial(their_frames, as_shipped, *how),
        alike: partial(their_frames, mine[EAGER], *how),
        chosen: partial(our_frames, mine[chosen], *how),
    }
    rates, warm_ups = frames_a_second(collections, args.frame_rounds, args.learning_starts)
    work = f"SAC end to end on {TASK}, one update a frame, {FORM[chosen]}"
    row = partial(common.versus, work, unit="frames/s", threads=threads)
    comparisons += [
        row(shipped, rates[chosen], rates[shipped], least=2, aim=2.5),
        row(alike, rates[chosen], rates[alike]),
    ]
    for name, seconds in warm_ups.items():
        print(f"{name:42} seconds before the steady rate, each round: {seconds}")
    return {
        "comparisons": comparisons, "curves": curves, "frames": how[0], "warm_up_seconds": warm_ups,
        "settings": mine[chosen].as_dict(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=9, updates=150, forms=True)
    options.add_argument("--frame-rounds", type=int, default=3, help="rounds of whole collections")
    options.add_argument("--frames", type=int, help="of each collection (4,000), or with --learn of training (20,000)")
    options.add_argument("--learning-starts", type=int, default=1000, help="random frames, of --frames")
    options.add_argument("--hidden", type=int, nargs="+", default=[256, 256], help="networks of the collections")
    options.add_argument("--learn", metavar="TASK", help="train both on this task instead of measuring speed")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", choices=["both", "cvlctl", "sb3"], default="both")
    args = options.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.learn:
        import sac_learning

        frames = args.frames or 20_000
        common.keep(sac_learning.learn(args.learn, frames, args.seed, args.learning_starts, args.only), args.json)
    else:
        common.main(options, speed, arguments)


if __name__ == "__main__":
    main()
