"""Equal to rliable 1.2 on the same matrices: values that it printed once, and beside it where it is installed.

`pip install -c constraints.txt -e '.[stats]'`. Its bootstrap draws from numpy's global generator: with the very same
draws intervals are equal, and with ours as close as resampling allows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cvlctl.score.statistics import (
    bootstrap,
    iqm,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    profile,
)
from cvlctl.score.tables import aggregate_table, efficiency_table, profile_table
from cvlctl.types import EpisodeResult

RNG = np.random.default_rng(7)
A, B = RNG.beta(2, 2, (6, 4)).round(2), RNG.beta(2, 3, (5, 4)).round(2)
FRAMES = RNG.beta(2, 2, (6, 4, 3)).round(2)
TAUS = np.linspace(0, 1, 11)
STATISTICS: dict[str, Callable[..., Any]] = {
    "mean": mean, "median": median, "iqm": iqm, "optimality_gap": optimality_gap
}  # fmt: skip
# printed by rliable 1.2.0: aggregates of A (200,000 resamples), A over B and A's profile over TAUS (20,000)
PRINTED = {
    "mean": (0.48875, 0.4083333333, 0.5666666667),
    "median": (0.5166666667, 0.395, 0.6083333333),
    "iqm": (0.4883333333, 0.3725, 0.595),
    "optimality_gap": (0.51125, 0.4333333333, 0.5916666667),
    "improvement": (0.5708333333, 0.4165625, 0.7083333333),
}
PROFILE = [1.0, 1.0, 0.9166666667, 0.7083333333, 0.625, 0.4583333333, 0.3333333333, 0.2083333333, 0.125, 0.0, 0.0]
PROFILE_AT = {2: (0.79167, 1.0), 3: (0.54167, 0.875), 4: (0.45833, 0.79167), 6: (0.16667, 0.5)}


def rliable() -> Any:
    pytest.importorskip("arch")
    library = pytest.importorskip("rliable.library")
    return library, pytest.importorskip("rliable.metrics")


def test_profile_by_hand() -> None:
    """Above 0: three of four; above .5: two, for .5 itself is not above; above 1: none."""
    scores = np.array([[0.0, 0.5], [0.7, 1.0]])
    assert profile(scores, np.array([0.0, 0.5, 1.0])).tolist() == [0.75, 0.5, 0.0]
    many = profile(np.stack([scores, scores + 10, scores - 10]), np.array([0.0, 0.5, 1.0]))
    assert many.tolist() == [[0.75, 0.5, 0.0], [1, 1, 1], [0, 0, 0]]


def test_values_that_rliable_printed() -> None:
    found = {name: (statistic, (A,)) for name, statistic in STATISTICS.items()}
    found["improvement"] = (probability_of_improvement, (A, B))
    assert set(found) == set(PRINTED)
    for name, (statistic, samples) in found.items():
        value, low, high = PRINTED[name]
        assert statistic(*samples) == pytest.approx(value, abs=1e-9), name
        assert bootstrap(statistic, *samples, resamples=50_000) == pytest.approx([low, high], abs=0.004), name
    assert profile(A, TAUS).tolist() == pytest.approx(PROFILE, abs=1e-9)
    interval = bootstrap(lambda x: profile(x, TAUS), A, resamples=20_000)
    assert interval is not None
    for at, ends in PROFILE_AT.items():
        assert [interval[0][at], interval[1][at]] == pytest.approx(ends, abs=0.042)  # a score in 24


def rows_of(scores: np.ndarray, steps: bool) -> list[EpisodeResult]:
    """Runs x tasks (x steps) of success rates, as rows of 100 episodes."""
    scores = scores if steps else scores[..., None]
    return [
        EpisodeResult("a", f"t{task}", run, 10 * (1 + step), i, 0.0, 5, i < round(100 * scores[run, task, step]))
        for run, task, step in np.ndindex(*scores.shape)
        for i in range(100)
    ]


def test_tables_of_rows_are_those_of_matrices() -> None:
    (record,) = profile_table(rows_of(A, False), resamples=300)
    assert (record["metric"], record["tasks"], record["runs"], len(record["tau"])) == ("success", 4, 6, 101)
    assert record["share"] == profile(A, np.linspace(0, 1, 101)).tolist()
    assert all(a <= x <= b for a, x, b in zip(record["low"], record["share"], record["high"], strict=True))
    rows = rows_of(FRAMES, True)
    (record,) = efficiency_table(rows, resamples=300)
    assert record["steps"] == [10, 20, 30]
    assert record["iqm"] == pytest.approx([float(iqm(FRAMES[..., i])) for i in range(3)])
    (last,) = aggregate_table(rows, aggregates=["iqm"], resamples=300)
    assert (record["low"][2], record["high"][2]) == (last["iqm_low"], last["iqm_high"])  # the same draws of runs
    part = [row for row in rows if not (row.task == "t1" and row.seed == 2 and row.step == 20)]
    (record,) = efficiency_table(part, resamples=300)
    assert record["steps"] == [10, 30]  # the step that one run lacks is left out
    lacking = [row for row in rows if not (row.task == "t1" and row.seed == 2)]
    assert profile_table(lacking) == efficiency_table(lacking) == []
    one_task = [row for row in rows if row.task == "t0"]
    assert profile_table(one_task) == efficiency_table(one_task) == profile_table([]) == []
    (single,) = profile_table([row for row in rows if row.seed == 0])
    assert single["low"] is None


def test_the_same_draws_give_rliables_intervals() -> None:
    library, metrics = rliable()
    theirs = {
        "mean": metrics.aggregate_mean, "median": metrics.aggregate_median, "iqm": metrics.aggregate_iqm,
        "optimality_gap": metrics.aggregate_optimality_gap,
    }  # fmt: skip
    np.random.seed(0)  # noqa: NPY002 (what rliable draws from)
    points, intervals = library.get_interval_estimates(
        {"a": A}, lambda x: np.array([of(x) for of in theirs.values()]), reps=400
    )
    np.random.seed(0)  # noqa: NPY002
    drawn = np.stack([A[np.random.choice(6, (6, 4)), np.arange(4)] for _ in range(400)])  # noqa: NPY002
    for i, (name, statistic) in enumerate(STATISTICS.items()):
        assert statistic(A) == pytest.approx(points["a"][i], abs=1e-12), name
        np.testing.assert_allclose(np.percentile(statistic(drawn), [2.5, 97.5]), intervals["a"][:, i], atol=1e-12)
    np.random.seed(0)  # noqa: NPY002
    shares, bands = library.create_performance_profile({"a": A}, TAUS, reps=400)
    np.testing.assert_allclose(profile(A, TAUS), shares["a"], atol=1e-12)
    ours = np.percentile(profile(drawn, TAUS), [2.5, 97.5], axis=0)
    np.testing.assert_allclose(ours, bands["a"], atol=1e-12)


def test_improvement_and_sample_efficiency_beside_rliable() -> None:
    library, metrics = rliable()
    ties = np.round(A, 1)[:5]
    for a, b in ((A, B), (B, A), (ties, np.round(B, 1)), (ties, ties)):
        assert probability_of_improvement(a, b) == pytest.approx(metrics.probability_of_improvement(a, b), abs=1e-12)
    np.random.seed(0)  # noqa: NPY002
    _, intervals = library.get_interval_estimates(
        {"a,b": (A, B)}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=400
    )
    ours = bootstrap(probability_of_improvement, A, B, resamples=20_000)
    assert ours == pytest.approx(intervals["a,b"][:, 0].tolist(), abs=0.04)
    points, bands = library.get_interval_estimates(
        {"a": FRAMES}, lambda x: np.array([metrics.aggregate_iqm(x[..., i]) for i in range(3)]), reps=400
    )
    (record,) = efficiency_table(rows_of(FRAMES, True), resamples=20_000)
    assert record["iqm"] == pytest.approx(points["a"].tolist(), abs=1e-12)
    assert np.array([record["low"], record["high"]]) == pytest.approx(bands["a"], abs=0.04)


if __name__ == "__main__":  # prints PRINTED and PROFILE
    library, metrics = rliable()
    names = ("mean", "median", "iqm", "optimality_gap")
    kept = [getattr(metrics, f"aggregate_{name}") for name in names]
    points, ends = library.get_interval_estimates({"a": A}, lambda x: np.array([f(x) for f in kept]), reps=20_000)
    lines = {name: (points["a"][i], *ends["a"][:, i]) for i, name in enumerate(names)}
    points, ends = library.get_interval_estimates(
        {"a": (A, B)}, lambda x, y: np.array([metrics.probability_of_improvement(x, y)]), reps=20_000
    )
    lines["improvement"] = (points["a"][0], *ends["a"][:, 0])
    shares, bands = library.create_performance_profile({"a": A}, TAUS, reps=20_000)
    sys.stdout.write(f"{ {k: tuple(round(float(x), 10) for x in v) for k, v in lines.items()} }\n")
    sys.stdout.write(f"{shares['a'].round(10).tolist()}\n{bands['a'].round(5).tolist()}\n")
