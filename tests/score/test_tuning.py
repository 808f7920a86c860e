"""The tuning budget: by hand, by trying all orders, and that the maximum of noise does not flatter."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from cvlctl.errors import CvlctlError
from cvlctl.score.tables import OfflineEstimate
from cvlctl.score.tuning import best_of, choices, over_pairs, settings_of, tuned, tuning_table
from cvlctl.types import EpisodeResult


def rows(scores: np.ndarray, task: str = "t", success: bool | None = None) -> list[EpisodeResult]:
    """Of (settings, seeds, episodes) returns; settings are called a0, a1, ..."""
    return [
        EpisodeResult(f"a{k}", task, seed, 10, i, float(scores[k, seed, i]), 5, success)
        for k, seed, i in np.ndindex(*scores.shape)
    ]


def test_best_of_n_by_hand() -> None:
    """Of three settings, two tried: the best is among them in 2 of 3 draws, else the second is the best of them."""
    np.testing.assert_allclose(best_of(3), [[1 / 3, 1 / 3, 1 / 3], [2 / 3, 1 / 3, 0], [1, 0, 0]])


def test_choices_are_those_of_trying_every_draw() -> None:
    scores = np.array([[3.0, 7.0, 5.0, 7.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    found = choices(scores)
    for at, values in enumerate(scores):
        for n in range(1, 6):
            expected = np.zeros(5)
            draws = list(combinations(range(5), n))
            for drawn in draws:
                best = [k for k in drawn if values[k] == max(values[list(drawn)])]
                expected[best] += 1 / len(best) / len(draws)
            np.testing.assert_allclose(found[at, n - 1], expected)


def test_what_chooses_does_not_score_by_hand() -> None:
    """Two settings, two seeds, two episodes. Seed 0's even episode prefers the second (2 > 1): seed 1's odd one of it
    is 40; its odd episode prefers the first (9 > 3), whose even one of seed 1 is 10. Together (40 + 10) / 2."""
    scores = np.array([[[1.0, 9.0], [10.0, 20.0]], [[2.0, 3.0], [30.0, 40.0]]])
    table = tuned(scores)
    assert table.shape == (2, 2, 2)
    assert table[0, 1, 1] == (40 + 10) / 2
    assert table[0, 1, 0] == (10 + 20 + 30 + 40) / 4  # one tried: any of them
    assert table[1, 0, 1] == (3 + 2) / 2  # seed 1 prefers the second by both halves
    estimate, interval = over_pairs(table)
    assert estimate[1] == (25 + 2.5) / 2 and interval is None  # two seeds: a single pair
    single, interval = over_pairs(table[:1, :1])
    assert single[1] == ((3 + 1) / 2) and interval is None


def test_the_best_of_many_equals_is_no_better_than_one() -> None:
    """All settings are the same; the flattered maximum of a dozen would be two standard errors above."""
    rng = np.random.default_rng(0)
    values = np.array([over_pairs(tuned(rng.normal(size=(12, 3, 4))))[0] for _ in range(400)])
    error = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0)) < 4 * error).all()
    assert values.mean(axis=0)[-1] < 0.1


def test_with_clear_differences_the_budget_pays_and_intervals_hold_the_truth() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([0.0, 1.0, 4.0])
    expected = best_of(3) @ truth[::-1]
    held = np.zeros(3)
    for at in range(60):
        scores = truth[:, None, None] + rng.normal(0, 0.2, (3, 8, 1)) + rng.normal(0, 0.2, (3, 8, 6))
        estimate, interval = over_pairs(tuned(scores), seed=at, resamples=400)
        assert interval is not None
        np.testing.assert_allclose(estimate, expected, atol=0.3)
        held += (np.array(interval[0]) <= expected) & (expected <= np.array(interval[1]))
    assert (held >= 48).all()  # of 60, at a nominal 95 % that few seeds narrow


def test_intervals_repeat_under_a_seed() -> None:
    table = tuned(np.random.default_rng(2).normal(size=(4, 5, 6)))
    assert over_pairs(table, seed=1)[1] == over_pairs(table, seed=1)[1]
    assert over_pairs(table, seed=1)[1] != over_pairs(table, seed=2)[1]
    narrow, wide = (over_pairs(table, level=level)[1] for level in (0.5, 0.95))
    assert narrow is not None and wide is not None and (np.array(wide[0]) < np.array(narrow[0])).all()


def test_table_by_hand() -> None:
    scores = np.array([[[1.0, 9.0], [10.0, 20.0]], [[2.0, 3.0], [30.0, 40.0]]])
    one, two = tuning_table([*rows(scores), EpisodeResult("bc", "t", 0, 10, 0, 99.0, 5, None)], ["a*"])
    assert (one["task"], one["of"], one["settings"], one["tried"]) == ("t", "a*", 2, 1)
    assert (one["runs"], one["episodes"], one["chosen"], one["success_tuned"]) == (2, 2, None, None)
    assert one["return_tuned"] == (25 + 3.75) / 2 and two["return_tuned"] == (25 + 2.5) / 2
    assert two["return_tuned_low"] is None


def test_the_offline_choice_is_that_of_the_highest_estimate() -> None:
    scores = np.array([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [2.0, 2.0]]])
    estimates = {(name, "t", s): OfflineEstimate(x, 0.9) for name, x in (("a0", 5.0), ("a1", 4.0)) for s in (0, 1)}
    last = tuning_table(rows(scores, success=True), ["*"], estimates)[-1]
    assert (last["tried"], last["chosen"]) == (0, "a0")
    assert last["return_tuned"] == 4.0 and 2.0 <= last["return_tuned_low"] < last["return_tuned_high"] <= 6.0
    assert last["success_tuned"] == 1.0
    del estimates["a1", "t", 1]
    assert [r["tried"] for r in tuning_table(rows(scores), ["*"], estimates)] == [1, 2]


def test_only_seeds_and_episodes_that_all_have() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 3, 4))
    lacking = [r for r in rows(scores) if not (r.algorithm == "a1" and (r.seed == 1 or r.episode == 3))]
    first = tuning_table(lacking, ["a*"])[0]
    assert (first["runs"], first["episodes"]) == (2, 3)
    assert tuning_table([r for r in lacking if r.episode == 0], ["a*"]) == []
    other = rows(scores[:1], "only-one-setting-here")
    assert {r["task"] for r in tuning_table([*lacking, *other], ["a*"])} == {"t"}


def test_a_pattern_that_leaves_no_choice() -> None:
    assert settings_of("cvl*", ["bc", "cvl 1", "cvl 2"]) == ["cvl 1", "cvl 2"]
    with pytest.raises(CvlctlError, match="tuning: 1 of the evaluated runs match 'bc'") as caught:
        settings_of("bc", ["bc", "cvl 1"])
    assert caught.value.hint == "they are called bc, cvl 1"
