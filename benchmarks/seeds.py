"""Seeds that train together, as one batched program, beside seeds that train apart.

    python benchmarks/seeds.py [--threads 2] [--together 5] [--device cpu] [--json seeds.json]

* SAC: updates/s of five seeds together, compiled, beside five Stable-Baselines3 processes at once, one thread each
  (the extra `bench`; on the CPU alone). A turn of theirs: all five pass a barrier, then each trains until its seconds
  are over; their rates are added up. Both sides make one update a call, batch 256, twin critic and actor of 256x256,
  each seed sampling from 20,000 transitions of its own, which is part of what is timed.
* CVL, batch 256, its critic as in the quickstart and by default: five seeds together beside five runs one after the
  other, which make as many updates a second in all as one of them does alone. On a GPU a step is a CUDA graph on both
  sides.
* Curves: what CVL's and the occupancy critic's update (batch 1024) costs with more and more seeds.

A rate counts one update of one seed as one. Contestants take turns, so that a busy machine slows all alike; a ratio is
the median over rounds. Compiling, some 15 s for each number of seeds and algorithm, is not in any rate.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import common
import numpy as np
from common import AS_SHIPPED, HIDDEN, OUR_SETTING, Contestant
from sac import BATCH as SAC_BATCH
from sac import CONFIG as SAC
from sac import FILLED, theirs
from sac import ours as sac_learner

from cvlctl.data.load import to_device
from cvlctl.data.samplers import Data
from cvlctl.learn.algorithms import cvl, occupancy
from cvlctl.learn.settings import Settings, configure

CRITIC = occupancy.Config()
CVL = {common.size_of(hidden): common.with_critic(cvl, hidden) for hidden in HIDDEN}
CVL_BATCH, CRITIC_BATCH = 256, 1024  # the recipes' defaults
WARM_UP = 4  # updates before anything is timed; the first compiles
PRECISION = {AS_SHIPPED: common.SHIPPED, OUR_SETTING: "medium"}

Rate = Callable[[float], float]  # trains for so many seconds; updates/s, of all seeds together


def rate(run: Contestant, seconds: float) -> float:
    """Updates of `run` a second, from now until `seconds` are over and its last update is finished."""
    begin = now = time.perf_counter()
    updates = 0
    while now < begin + seconds:
        run(1)
        updates += 1
        now = time.perf_counter()
    return updates / (now - begin)


def sac_together(num_seeds: int, settings: Settings) -> Contestant:
    """n updates of all seeds of SAC."""
    return sac_learner(settings, num_seeds, SAC, SAC_BATCH, FILLED)


def sb3_process(pipe: Connection, barrier: Barrier) -> None:
    """One of several processes: told a precision and how many seconds, it waits for the others, trains, and answers."""
    runs = {precision: theirs(Settings("cpu", 1, precision, False)) for precision in PRECISION.values()}
    for run in runs.values():
        common.warm_up(run, WARM_UP)
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        precision, seconds = task
        barrier.wait(timeout=60)  # broken where one of the others has died
        pipe.send(rate(runs[precision], seconds))


@contextmanager
def sb3_apart(num_processes: int) -> Iterator[dict[str, Rate]]:
    """Total rates of processes that train at once, by what they compute with. They sleep while it is not their turn."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(num_processes)
    pipes, processes = [], []
    for _ in range(num_processes):
        here, there = context.Pipe()
        process = context.Process(target=sb3_process, args=(there, barrier), daemon=True)
        process.start()
        there.close()  # so that the end of a process is the end of its pipe
        pipes.append(here)
        processes.append(process)

    def train(precision: str, seconds: float) -> float:
        for pipe in pipes:
            pipe.send((precision, seconds))
        return sum(pipe.recv() for pipe in pipes)

    try:
        for pipe in pipes:
            pipe.recv()
        yield {f"Stable-Baselines3{name}": partial(train, precision) for name, precision in PRECISION.items()}
        for pipe in pipes:
            pipe.send(None)
    finally:
        for process, pipe in zip(processes, pipes, strict=True):
            pipe.close()
            process.join(timeout=10)
            process.terminate()


def sac_comparisons(num_seeds: int, settings: Settings, rounds: int, seconds: float) -> list[dict[str, Any]]:
    configure(settings)
    run = sac_together(num_seeds, settings)
    run(WARM_UP)
    with sb3_apart(num_seeds) as peers:
        turns = {name: partial(peer, seconds) for name, peer in peers.items()}
        peer_rates = common.turns({"ours": lambda: num_seeds * rate(run, seconds)} | turns, rounds)
    ours = peer_rates.pop("ours")
    return [
        common.versus(
            f"SAC update, {num_seeds} seeds together", f"{num_seeds} processes of {name}", ours, found,
            threads=settings.threads, least=2.2 if name.endswith(AS_SHIPPED) else None,
            aim=3.0 if name.endswith(AS_SHIPPED) else None,
        )
        for name, found in peer_rates.items()
    ]  # fmt: skip


def rates_by_seeds(
    module: Any,
    config: Any,
    nums: Sequence[int],
    data: Data,
    batch_size: int,
    settings: Settings,
    rounds: int,
    updates: int,
) -> dict[int, np.ndarray]:
    """Updates/s (rounds,) of all seeds together, by their number."""
    configure(settings)  # forgets the programs of others, of which torch keeps eight at most
    runs = {str(num): common.learner(module, config, range(num), data, batch_size, settings) for num in nums}
    return {
        int(num): int(num) * np.array(found) for num, found in common.measure(runs, rounds, updates, WARM_UP).items()
    }


def curve(name: str, rates: dict[int, np.ndarray], how: str) -> dict[str, Any]:
    """What an update of all costs with more and more seeds, in units of one seed's of the same round."""
    rows: list[list[float]] = []
    for num, found in rates.items():
        cost = num * rates[1] / found
        rows.append([num, round(float(np.median(found)), 1), *common.spread(cost)])
    note = f"{how}. Updates/s of all seeds; cost: time of one update of all, one seed's is 1, linear is their number"
    columns = ["seeds", "updates/s", "cost", "least", "most"]
    return {"title": f"{name}, seeds together", "columns": columns, "rows": rows, "note": note}


def beside_processes(num: int, settings: Settings, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """SAC's comparisons, or a line that says why there are none."""
    if settings.device == "cuda":
        print("SAC beside Stable-Baselines3: left out, it is a comparison on the CPU")
    elif importlib.util.find_spec("stable_baselines3") is None:
        print("SAC beside Stable-Baselines3: left out, it is not installed; pip install -e '.[bench]'")
    else:
        return sac_comparisons(num, settings, rounds, seconds)
    return []


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Seeds together beside seeds apart, and the curves over their number."""
    num = args.together
    mine = common.our_settings(args.threads, args.eager_only, args.device)
    settings = mine[common.best(mine)]
    comparisons = beside_processes(num, settings, args.rounds, args.seconds)

    nums = sorted({1, num, *args.seeds})
    data = to_device(common.synthetic(args.rows), args.device)
    least, aim = (1.5, None) if args.device == "cpu" else (None, 4.0)
    how = f"{args.device}, {args.threads} threads, {'compiled' if settings.compile else 'eager'}, batch "
    curves = []
    for size, config in CVL.items():
        rates = rates_by_seeds(cvl, config, nums, data, CVL_BATCH, settings, args.rounds, args.updates)
        comparisons.append(
            common.versus(
                f"CVL update, critic {size}, {num} seeds together, {args.device}", f"{num} runs one after the other",
                rates[num].tolist(), rates[1].tolist(), threads=args.threads, least=least, aim=aim,
            )
        )  # fmt: skip
        curves.append(curve(f"CVL, critic {size}", rates, f"{how}{CVL_BATCH}, bank {config.bank_size}"))
    rates = rates_by_seeds(occupancy, CRITIC, nums, data, CRITIC_BATCH, settings, args.rounds, args.updates)
    curves.append(curve("Occupancy critic", rates, f"{how}{CRITIC_BATCH}"))
    return {"comparisons": comparisons, "curves": curves, "settings": settings.as_dict(), "rounds": args.rounds}


def main(arguments: Sequence[str] | None = None) -> None:
    made = common.parser(__doc__, rounds=5, updates=64, rows=500_000, forms=True, device=True)
    made.add_argument("--together", type=int, default=5, help="seeds of the comparisons")
    made.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 5, 8], help="numbers of seeds of the curves")
    made.add_argument("--seconds", type=float, default=3.0, help="of SAC's turns")
    common.main(made, benchmark, arguments)


if __name__ == "__main__":
    main()
