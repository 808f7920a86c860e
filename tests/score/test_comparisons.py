"""Per cent over a baseline, and paired comparisons over tasks: by hand."""

from __future__ import annotations

import math

import pytest

from cvlctl.score.comparisons import comparison_table, relative_table, sentences
from cvlctl.types import EpisodeResult


def runs(algorithm: str, task: str, values: list[list[float]], success: bool | None = None) -> list[EpisodeResult]:
    """Seeds x episodes of returns."""
    return [
        EpisodeResult(algorithm, task, seed, 10, i, x, 5, success)
        for seed, episodes in enumerate(values)
        for i, x in enumerate(episodes)
    ]


def test_per_cent_over_the_baseline_by_hand() -> None:
    rows = [*runs("bc", "t", [[10.0], [30.0]], success=True), *runs("cvl", "t", [[20.0], [30.0]], success=False)]
    (record,) = relative_table(rows, baseline="bc")
    assert (record["task"], record["algorithm"], record["baseline"]) == ("t", "cvl", "bc")
    assert (record["runs"], record["baseline_runs"], record["small_base"]) == (2, 2, [])
    assert record["return_over"] == pytest.approx(25.0) and record["success_over"] == -100.0
    assert record["normalised_over"] is None
    assert record["return_over_low"] == pytest.approx(100 * (20 / 30 - 1))
    assert record["return_over_high"] == pytest.approx(200.0)


def test_no_percentage_over_nothing_or_less() -> None:
    rows = [*runs("bc", "t", [[-10.0], [-30.0]]), *runs("cvl", "t", [[20.0], [30.0]])]
    assert relative_table(rows, baseline="bc") == []
    assert relative_table(rows, baseline="iql") == []
    rows = [*runs("bc", "t", [[-10.0], [30.0]]), *runs("cvl", "t", [[20.0], [30.0]])]
    (record,) = relative_table(rows, baseline="bc")
    assert record["return_over"] == pytest.approx(150.0)
    assert record["return_over_low"] is None and record["return_over_high"] is None  # a resampled mean is -10


def test_a_base_near_random_is_said() -> None:
    reference = {"t": {"min": 0.0, "max": 100.0, "random_success": 0.5, "scripted_success": 1.0}}
    rows = [*runs("bc", "t", [[9.0], [10.0]], success=True), *runs("cvl", "t", [[20.0], [30.0]], success=True)]
    (record,) = relative_table(rows, references=reference)
    assert record["small_base"] == ["return", "normalised"]
    assert record["normalised_over"] == pytest.approx(100 * (25 / 9.5 - 1))
    (record,) = relative_table([*runs("bc", "t", [[10.0], [10.0]]), *runs("cvl", "t", [[20.0]])], references=reference)
    assert record["small_base"] == []


def test_over_all_tasks_by_the_common_metric() -> None:
    reference = {"t": {"min": 0.0, "max": 10.0}, "u": {"min": 100.0, "max": 200.0}}
    rows = [*runs("bc", "t", [[4.0], [6.0]]), *runs("cvl", "t", [[8.0], [8.0]])]
    rows += [*runs("bc", "u", [[110.0], [110.0]]), *runs("cvl", "u", [[140.0], [140.0]])]
    *_, last = relative_table(rows, references=reference)
    assert last["task"] == "all 2 tasks" and last["normalised_over"] == pytest.approx(100 * (60 / 30 - 1))
    assert "return_over" not in last  # raw returns of different tasks do not add up
    assert [r["task"] for r in relative_table(rows)] == ["t", "u"]


def test_paired_comparison_by_hand() -> None:
    rows = [*runs("bc", "t", [[1.0], [3.0]]), *runs("cvl", "t", [[2.0], [4.0]])]  # P = 3/4
    rows += [*runs("bc", "u", [[1.0], [1.0]]), *runs("cvl", "u", [[1.0], [0.0]])]  # P = 1/4
    (record,) = comparison_table(rows, baseline="bc")
    assert (record["algorithm"], record["baseline"], record["metric"], record["tasks"]) == ("cvl", "bc", "return", 2)
    assert (record["above"], record["below"], record["episodes"]) == (1, 1, 1)
    assert record["probability_of_improvement"] == pytest.approx(0.5)
    assert comparison_table(rows[:4], baseline="bc") == []  # one task: the pairwise table says it
    assert comparison_table(rows, baseline="iql") == []


def test_only_the_episodes_that_both_played_count() -> None:
    """The third episode would turn the tables."""
    rows = [*runs("bc", "t", [[1.0, 1.0, 99.0]]), *runs("cvl", "t", [[2.0, 2.0]])]
    rows += [*runs("bc", "u", [[1.0, 1.0, 99.0]]), *runs("cvl", "u", [[2.0, 0.0]])]
    (record,) = comparison_table(rows)
    assert (record["above"], record["below"], record["episodes"]) == (1, 0, 2)
    assert record["probability_of_improvement"] == 0.75 and record["probability_of_improvement_low"] is None
    (text,) = sentences([record])
    assert text == (
        "cvl is above bc on 1 of 2 tasks by return; P(improvement) = .75 (one run). On the same 2 episodes of each run."
    )


def test_tasks_may_have_unequal_numbers_of_runs() -> None:
    rows = [*runs("bc", "t", [[1.0], [1.0], [1.0]]), *runs("cvl", "t", [[2.0], [0.0]])]
    rows += [*runs("bc", "u", [[1.0], [1.0]]), *runs("cvl", "u", [[2.0], [2.0], [2.0], [2.0]])]
    (record,) = comparison_table(rows)
    assert (record["runs"], record["baseline_runs"]) == (2, 2)
    assert record["probability_of_improvement"] == pytest.approx((0.5 + 1) / 2)


def test_one_sentence_an_algorithm() -> None:
    base = {"algorithm": "CVL", "baseline": "CQL", "tasks": 10, "below": 3, "episodes": 50, "runs": 5}
    keys = ("probability_of_improvement", "probability_of_improvement_low", "probability_of_improvement_high")
    first = base | {"metric": "return", "above": 7} | dict(zip(keys, (0.81, 0.74, 0.88), strict=True))
    second = base | {"metric": "success", "above": 10} | dict(zip(keys, (1.0, 1.0, 1.0), strict=True))
    assert sentences([first, second]) == [
        "CVL is above CQL on 7 of 10 tasks by return; P(improvement) = .81 [.74, .88]. By success, on 10 of 10; "
        "P(improvement) = 1.00. On the same 50 episodes of each run."
    ]
    assert sentences([]) == []
    assert all(math.isfinite(first[key]) for key in keys)
