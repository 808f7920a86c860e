"""Intervals of aggregate scores beside rliable (Agarwal et al. 2021) on the same matrices: seconds of one table.

    python benchmarks/intervals.py [--runs 10] [--tasks 10] [--resamples 300] [--rounds 3] [--json intervals.json]

Extra `stats`. Both give the same point values, which is checked, and percentile intervals of as many resamples.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import common
import numpy as np

from cvlctl.score import statistics as ours

NAMES = ("mean", "median", "iqm", "optimality_gap")
TAUS, STEPS = np.linspace(0, 1, 101), 10


def contestants(runs: int, tasks: int, resamples: int) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Of every kind of table, ours and rliable's: functions that return (values, [low, high])."""
    from rliable import library, metrics

    rng = np.random.default_rng(0)
    a, b = rng.beta(2, 2, (runs, tasks)), rng.beta(2, 3, (runs, tasks))
    frames = rng.beta(2, 2, (runs, tasks, STEPS))
    theirs = [getattr(metrics, f"aggregate_{name}") for name in NAMES]

    def mine(statistic: ours.Statistic, *samples: np.ndarray) -> Any:
        return statistic(*samples), ours.bootstrap(statistic, *samples, resamples=resamples)

    def rliable(statistic: Callable[..., np.ndarray], samples: Any) -> Any:
        values, ends = library.get_interval_estimates({"a": samples}, statistic, reps=resamples)
        return values["a"], ends["a"]

    def shares() -> Any:
        values, ends = library.create_performance_profile({"a": a}, TAUS, reps=resamples)
        return values["a"], ends["a"]

    def aggregates() -> Any:
        found = [mine(ours.AGGREGATES[name], a) for name in NAMES]
        return np.array([value for value, _ in found]), np.array([ends for _, ends in found]).T

    every = np.repeat(np.arange(runs)[:, None], tasks, axis=1)
    by_step = [frames[..., i] for i in range(STEPS)]
    columns = np.arange(tasks)
    return {
        "mean, median, IQM, optimality gap": (
            aggregates, partial(rliable, lambda x: np.array([of(x) for of in theirs]), a)),
        "performance profile, 101 thresholds": (partial(mine, partial(ours.profile, taus=TAUS), a), shares),
        "probability of improvement": (
            partial(mine, ours.probability_of_improvement, a, b),
            partial(rliable, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), (a, b))),
        f"sample efficiency, {STEPS} steps": (
            partial(mine, lambda at: np.stack([ours.iqm(x[at, columns]) for x in by_step], axis=-1), every),
            partial(rliable, lambda x: np.array([metrics.aggregate_iqm(x[..., i]) for i in range(STEPS)]), frames)),
    }  # fmt: skip


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every kind of table in turn; both sides' values are the same."""
    rows = []
    for kind, (mine, theirs) in contestants(args.runs, args.tasks, args.resamples).items():
        values, ends = mine()
        np.testing.assert_allclose(np.ravel(values), np.ravel(theirs()[0]), atol=1e-12)
        assert np.isfinite(ends).all()
        taken = common.timed({"ours": mine, "theirs": theirs}, args.rounds)
        work = f"{kind}: {args.runs} runs x {args.tasks} tasks, {args.resamples} resamples"
        rows.append(common.versus(work, "rliable", taken["ours"], taken["theirs"], unit="seconds", threads=1, least=10))
    return {"comparisons": rows}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=3)
    options.add_argument("--runs", type=int, default=10)
    options.add_argument("--tasks", type=int, default=10)
    options.add_argument("--resamples", type=int, default=300)
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
