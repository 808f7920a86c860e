"""Scores by hand, intervals against published and simulated values, and what damaged or odd rows do."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvlctl.errors import CvlctlError
from cvlctl.score.rows import matrix, normalised, read_rows, write_rows
from cvlctl.score.statistics import bootstrap, iqm, mean, median, optimality_gap, probability_of_improvement, wilson
from cvlctl.score.tables import aggregate_table, curve, pairwise, run_table, score_table
from cvlctl.types import EpisodeResult


def row(
    algorithm: str = "bc",
    task: str = "t",
    seed: int = 0,
    step: int = 10,
    episode: int = 0,
    episode_return: float = 0.0,
    length: int = 5,
    success: bool | None = None,
) -> EpisodeResult:
    return EpisodeResult(algorithm, task, seed, step, episode, episode_return, length, success)


def runs(
    algorithm: str, values: list[list[float]], task: str = "t", successes: list[list[bool]] | None = None
) -> list[EpisodeResult]:
    """Seeds x episodes of returns."""
    return [
        row(algorithm, task, seed, 10, i, x, success=None if successes is None else successes[seed][i])
        for seed, episodes in enumerate(values)
        for i, x in enumerate(episodes)
    ]


# ---- rows on disk


def test_rows_survive_the_disk_even_as_numpy_scalars(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows = [row(episode_return=1.5, success=True), row(episode=1, success=None), row("cvl", success=False)]
    scalars: dict[str, Any] = {"seed": np.int64(3), "episode_return": np.float32(0.5), "success": np.bool_(True)}
    write_rows(path, [*rows, row(**scalars)])
    assert read_rows(path) == [*rows, row(seed=3, episode_return=0.5, success=True)]
    assert [file.name for file in path.parent.iterdir()] == ["rows.jsonl"]  # nothing half-written beside it
    assert len(path.read_text().splitlines()) == 4


def test_a_failed_write_leaves_the_old_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [row()])
    with pytest.raises(CvlctlError, match="episode 7 of cvl seed 2 on t has return nan"):
        write_rows(path, [row(), row("cvl", seed=2, episode=7, episode_return=float("nan"))])
    assert read_rows(path) == [row()]


GOOD = {
    "algorithm": "a",
    "task": "t",
    "seed": 0,
    "step": 1,
    "episode": 0,
    "episode_return": 1,
    "length": 2,
    "success": None,
}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (json.dumps(GOOD)[:-9], "line 2"),
        ("[1, 2]", "line 2"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "step"}), "no 'step'"),
        (json.dumps(GOOD | {"seed": True}), "seed is True"),
        (json.dumps(GOOD | {"seed": 0.5}), "seed is 0.5"),
        (json.dumps(GOOD | {"success": 1}), "success is 1"),
        (json.dumps(GOOD | {"task": 3}), "task is 3"),
        (json.dumps(GOOD | {"episode_return": float("nan")}), "episode_return is nan"),
        (b"\xff\xfe", "line 2"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: str | bytes, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(CvlctlError, match=fault) as error:
        read_rows(path)
    assert f"{path}, line 2" in error.value.what


def test_missing_file_and_blank_lines(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="cannot read the rows in"):
        read_rows(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(GOOD | {"later": "key"}) + "\n\n")
    assert read_rows(tmp_path / "rows.jsonl") == [row("a", step=1, episode_return=1.0, length=2)]


# ---- run scores


def test_normalised() -> None:
    rows = [row(episode_return=x) for x in (-20.0, 90.0, 200.0, 310.0)]
    assert normalised(rows, {"min": -20, "max": 200}) == pytest.approx([0, 50, 100, 150])
    assert normalised(rows, None) is None
    for reference in ({"min": 1, "max": 1}, {"min": 2, "max": 1}, {"max": 1}, {"min": 0, "max": float("nan")}):
        with pytest.raises(CvlctlError, match="min below a max"):
            normalised(rows, reference)


def test_matrix_holds_means_over_the_episodes_of_the_last_step() -> None:
    rows = [row("cvl", "b", 1, 20, i, x) for i, x in enumerate((1.0, 3.0))]
    rows += [row("cvl", "b", 0, 20, 0, 7.0), row("cvl", "b", 0, 10, 0, 1000.0)]  # a better, earlier checkpoint
    rows += [row("bc", "a", 4, 20, 0, 5.0)]
    algorithms, tasks, arrays = matrix(rows, "return")
    assert (algorithms, tasks) == (["cvl", "bc"], ["b", "a"])
    np.testing.assert_array_equal(arrays["cvl"], [[7, np.nan], [2, np.nan]])
    np.testing.assert_array_equal(arrays["bc"], [[np.nan, 5]])
    assert np.isnan(matrix(rows, "success")[2]["cvl"]).all()
    np.testing.assert_array_equal(matrix(rows, "normalised", {"a": {"min": 0, "max": 10}})[2]["bc"], [[np.nan, 50]])
    with pytest.raises(CvlctlError, match="no metric 'reward'"):
        matrix(rows, "reward")


def test_the_same_episode_twice_is_an_error_not_a_heavier_score() -> None:
    with pytest.raises(CvlctlError, match="episode 0 of bc seed 0 on t, step 10, is there twice"):
        score_table([row(), row()])


# ---- aggregates by hand


def test_aggregates_by_hand() -> None:
    table = np.array([[0.0, 10.0], [2.0, 30.0], [4.0, 20.0], [6.0, 1000.0]])  # runs x tasks
    assert mean(table) == pytest.approx(1072 / 8)
    assert median(table) == pytest.approx((3 + 265) / 2)  # of the two task means
    assert iqm(table) == pytest.approx((4 + 6 + 10 + 20) / 4)  # 0, 2 and 30, 1000 are cut
    assert iqm(np.array([[1.0], [2.0], [9.0]])) == pytest.approx(4)  # a quarter of three, rounded down: none
    assert iqm(np.array([[0.0], [1.0], [2.0], [3.0], [100.0]])) == pytest.approx(2)
    assert optimality_gap(np.array([[0.2, 1.5], [1.0, 0.6]])) == pytest.approx((0.8 + 0 + 0 + 0.4) / 4)
    assert optimality_gap(np.array([[20.0, 150.0]]), threshold=100) == pytest.approx(40)
    stacked = np.stack([table, table + 1])
    for aggregate in (mean, median, iqm):
        np.testing.assert_allclose(aggregate(stacked), [aggregate(table), aggregate(table) + 1])


def test_probability_of_improvement_by_hand() -> None:
    a, b = np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[0.0, 9.0], [1.0, 9.0], [2.0, 9.0]])
    # first task: 1 beats 0, ties 1, loses to 2; 3 beats all: 4.5 of 6; second task: none
    assert probability_of_improvement(a, b) == pytest.approx(0.75 / 2)
    assert probability_of_improvement(b, a) == pytest.approx(1 - 0.75 / 2)


# ---- intervals


@pytest.mark.parametrize(
    ("successes", "num", "low", "high"),
    [  # textbook values
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (15, 50, 0.1910, 0.4375),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_against_published_values(successes: int, num: int, low: float, high: float) -> None:
    assert wilson(successes, num) == pytest.approx((low, high), abs=6e-5)


def test_wilson_widens_with_the_level() -> None:
    (a, b), (c, d) = wilson(8, 10, 0.8), wilson(8, 10, 0.99)
    assert c < a < 0.8 < b < d


def test_bootstrap_covers_and_falls_short_as_documented() -> None:
    rng = np.random.default_rng(1)
    for num_runs, expected in ((10, 0.90), (5, 0.83), (2, 0.50)):
        hits = 0
        for _ in range(600):
            low, high = bootstrap(mean, rng.normal(3.0, 2.0, (num_runs, 1)), resamples=400) or (0, 0)
            hits += low <= 3.0 <= high
        assert hits / 600 == pytest.approx(expected, abs=0.05)


def test_bootstrap_is_the_exact_law_on_two_runs() -> None:
    # the mean of two draws out of {0, 1}: 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4
    table = np.array([[0.0], [1.0]])
    assert bootstrap(mean, table, level=0.4) == [0.5, 0.5]
    assert bootstrap(mean, table, level=0.6) == [0.0, 1.0]


def test_bootstrap_resamples_within_each_task() -> None:
    tasks_apart = np.array([[0.0, 1000.0]] * 5)  # unstratified, the mean of all would swing by hundreds
    assert bootstrap(mean, tasks_apart) == [500.0, 500.0]
    rng = np.random.default_rng(0)
    noisy = tasks_apart + rng.normal(size=tasks_apart.shape)
    low, high = bootstrap(mean, noisy) or (0, 0)
    # two independent means of five: sd about sqrt(2 / 5) / 2, not the sd of rows that move together
    assert 0 < high - low < 2.2
    together = np.array([[-1.0, 1.0], [1.0, -1.0]] * 10)  # rows always average to zero, tasks apart do not
    low, high = bootstrap(mean, together) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(40), rel=0.15)


def test_intervals_repeat_under_a_seed_and_ignore_the_company() -> None:
    rng = np.random.default_rng(0)
    bc, cvl = (runs(name, rng.normal(size=(5, 4)).tolist()) for name in ("bc", "cvl"))
    once, again, other = (score_table(bc + cvl, seed=seed) for seed in (0, 0, 1))
    assert once == again
    assert once[0]["return_mean_low"] != other[0]["return_mean_low"]
    assert once[1] == score_table(cvl)[0]
    assert [r for r in score_table(cvl + bc) if r["algorithm"] == "bc"] == [once[0]]


def test_two_thousand_resamples_are_quick() -> None:
    table = np.random.default_rng(0).normal(size=(10, 50))
    start = time.process_time()  # the machine may be busy with other things
    bootstrap(iqm, table, resamples=2000)
    assert time.process_time() - start < 1.0


# ---- tables


def test_score_table_by_hand() -> None:
    rows = runs("bc", [[1.0, 3.0], [10.0, 20.0]], successes=[[True, False], [True, True]])
    (record,) = score_table(rows, references={"t": {"min": 0, "max": 20}}, aggregates=("iqm", "optimality_gap"))
    assert (record["runs"], record["episodes"], record["step"], record["uneven_steps"]) == (2, 4, 10, False)
    assert record["return_mean"] == pytest.approx(8.5) and record["return_runs"] == [2.0, 15.0]
    assert (record["return_mean_low"], record["return_mean_high"]) == (
        2.0,
        15.0,
    )  # both runs the worse one, or the better
    assert record["success_mean"] == pytest.approx(0.75) and record["success_runs"] == [0.5, 1.0]
    assert record["normalised_mean"] == pytest.approx(42.5) and record["normalised_runs"] == pytest.approx([10, 75])
    assert record["normalised_optimality_gap"] == pytest.approx(57.5)
    assert record["success_optimality_gap"] == pytest.approx(0.25)
    assert "return_optimality_gap" not in record
    assert record["return_iqm"] == pytest.approx(8.5)
    json.dumps(record, allow_nan=False)


def test_one_run_has_no_interval_over_runs_but_one_over_its_episodes() -> None:
    returns, successes = [[float(x) for x in range(10)]], [[True] * 8 + [False] * 2]
    rows = runs("bc", returns, successes=successes)
    (record,) = score_table(rows)
    assert record["runs"] == 1 and record["return_mean"] == pytest.approx(4.5)
    assert record["return_mean_low"] is None and record["success_mean_high"] is None
    (record,) = run_table(rows)
    assert (record["seed"], record["episodes"], record["length_mean"]) == (0, 10, 5.0)
    assert (record["success_mean_low"], record["success_mean_high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    # sd of ten draws' mean: sqrt(8.25 / 10)
    width = record["return_mean_high"] - record["return_mean_low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(0.825), rel=0.1)
    assert record["normalised_mean"] is None and record["normalised_mean_low"] is None


def test_metrics_that_a_task_lacks_are_none() -> None:
    rows = [*runs("bc", [[1.0], [2.0]]), *runs("bc", [[1.0], [2.0]], "u", [[True], [False]])]
    first, second = score_table(rows, references={"u": {"min": 0, "max": 1}})
    assert first["success_mean"] is first["success_runs"] is first["normalised_mean"] is None
    assert second["success_mean"] == 0.5 and second["normalised_mean"] == 150
    half_known = [row(success=True), row(episode=1, success=None)]
    assert score_table(half_known)[0]["success_mean"] is None
    assert score_table([]) == run_table([]) == aggregate_table([]) == pairwise([]) == []


def test_records_come_by_task_and_say_when_seeds_stopped_early() -> None:
    rows = [row("a", "t"), row("a", "u"), row("b", "t"), row("b", "u"), row("b", "u", seed=1, step=4)]
    records = score_table(rows)
    assert [(r["task"], r["algorithm"]) for r in records] == [("t", "a"), ("t", "b"), ("u", "a"), ("u", "b")]
    assert [r["uneven_steps"] for r in records] == [False, False, False, True]
    assert records[3]["step"] == 4


def test_aggregate_table_by_hand() -> None:
    rows = [*runs("bc", [[0.0], [2.0]], "t"), *runs("bc", [[4.0], [10.0]], "u")]
    references = {"t": {"min": 0, "max": 10}, "u": {"min": 0, "max": 100}}
    (record,) = aggregate_table(rows, references=references, aggregates=("iqm", "mean", "optimality_gap"))
    assert (record["metric"], record["tasks"], record["runs"], record["missing"]) == ("normalised", 2, 2, [])
    assert record["mean"] == pytest.approx((0 + 20 + 4 + 10) / 4)
    assert record["iqm"] == pytest.approx((4 + 10) / 2)
    assert record["optimality_gap"] == pytest.approx(100 - 8.5)
    assert record["mean_low"] >= 2 and record["mean_high"] <= 15
    assert aggregate_table(rows) == []  # raw returns of different tasks do not add up
    assert aggregate_table(rows[:2], references=references) == []  # one task
    with pytest.raises(CvlctlError, match="no aggregate 'max'"):
        aggregate_table(rows, references=references, aggregates=("max",))


def test_aggregate_table_falls_back_on_success_and_names_missing_runs() -> None:
    rows = [*runs("a", [[0.0], [0.0]], "t", [[True], [False]]), *runs("a", [[0.0], [0.0]], "u", [[True], [True]])]
    rows += [*runs("b", [[0.0], [0.0]], "t", [[True], [False]]), *runs("b", [[0.0]], "u", [[True]])]
    first, second = aggregate_table(rows)
    assert (first["metric"], first["mean"]) == ("success", 0.75)
    assert second["missing"] == ["u"] and second["mean"] is None and second["mean_low"] is None


def test_pairwise_by_hand() -> None:
    rows = [*runs("bc", [[0.0], [1.0], [2.0]]), *runs("cvl", [[11.0], [12.0], [13.0]]), *runs("laeo", [[0.5]])]
    cvl, laeo = pairwise(rows)
    assert (cvl["algorithm"], cvl["baseline"], cvl["metric"]) == ("cvl", "bc", "return")
    assert cvl["difference"] == pytest.approx(11) and 9 <= cvl["difference_low"] < 11 < cvl["difference_high"] <= 13
    assert (cvl["probability_of_improvement"], cvl["probability_of_improvement_low"]) == (1.0, 1.0)
    assert laeo["difference"] == pytest.approx(-0.5) and laeo["difference_low"] is None
    assert laeo["probability_of_improvement"] == pytest.approx(1 / 3)
    assert pairwise(rows, baseline="iql") == []


def test_pairwise_interval_has_both_sides_noise() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40, 1)), rng.normal(0, 1, (40, 1))
    (record,) = pairwise(runs("bc", b.tolist()) + runs("cvl", a.tolist()))
    expected = 2 * 1.96 * np.sqrt((a.var() + b.var()) / 40)
    assert record["difference_high"] - record["difference_low"] == pytest.approx(expected, rel=0.1)


def test_curve_averages_the_same_number_of_runs_everywhere() -> None:
    rows = [row(seed=s, step=t, episode=e, episode_return=10.0 * t + s) for s in (0, 1) for t in (1, 2) for e in (0, 1)]
    rows.append(row(seed=0, step=3, episode_return=999.0))  # seed 1 has not come so far
    (record,) = curve(rows)
    assert (record["runs"], record["steps"], record["mean"]) == (2, [1, 2], [10.5, 20.5])
    assert (record["low"], record["high"]) == ([10.0, 20.0], [11.0, 21.0])
    assert curve(rows, metric="success") == []
    (record,) = curve([r for r in rows if r.seed == 0])
    assert record["steps"] == [1, 2, 3] and record["low"] is None
