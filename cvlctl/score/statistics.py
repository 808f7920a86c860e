"""Means, intervals and comparisons of scores (rliable's, by a stratified bootstrap that repeats under a seed)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypedDict, Unpack

import numpy as np
from scipy import stats

from cvlctl.errors import CvlctlError
from cvlctl.score.rows import Record

Statistic = Callable[..., np.ndarray]


class Confidence(TypedDict, total=False):
    """How intervals are made: level (0.95), number of resamples (2000), seed (0)."""

    level: float
    resamples: int
    seed: int


def mean(scores: np.ndarray) -> np.ndarray:
    """Mean over runs and tasks; like the other aggregates (..., runs, tasks) -> (...)."""
    return scores.mean(axis=(-2, -1))


def median(scores: np.ndarray) -> np.ndarray:
    """Median over tasks of the mean over runs."""
    return np.median(scores.mean(axis=-2), axis=-1)


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean: all runs x tasks scores, a quarter of them (rounded down) cut at either end."""
    return np.asarray(stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1))


def optimality_gap(scores: np.ndarray, threshold: float = 1.0) -> np.ndarray:
    """Mean shortfall from the threshold (less is better); exceeding it in one run does not make up for another."""
    return threshold - mean(np.minimum(scores, threshold))


def probability_of_improvement(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean over tasks of the share of run pairs where a (..., runs, tasks) beats b (..., runs', tasks); ties half."""
    a, b = a[..., :, None, :], b[..., None, :, :]
    return ((a > b) + 0.5 * (a == b)).mean(axis=(-3, -2, -1))


def profile(scores: np.ndarray, taus: np.ndarray) -> np.ndarray:
    """Performance profile: the share of all runs x tasks scores above each tau, (..., runs, tasks) -> (..., taus).

    `taus` ascend. Scores are counted in the gaps between them: no comparison of every score with every tau.
    """
    flat = scores.reshape(-1, scores.shape[-2] * scores.shape[-1])
    num = len(taus) + 1
    gap = np.searchsorted(taus, flat, side="left") + num * np.arange(len(flat))[:, None]  # taus below the score
    counts = np.bincount(gap.ravel(), minlength=num * len(flat)).reshape(*scores.shape[:-2], num)
    above = counts[..., :0:-1].cumsum(axis=-1)[..., ::-1]
    return np.asarray(above / flat.shape[1])


AGGREGATES: dict[str, Statistic] = {"mean": mean, "median": median, "iqm": iqm, "optimality_gap": optimality_gap}


def aggregates_of(names: Iterable[str], metric: str, prefix: str = "") -> dict[str, Statistic]:
    table = AGGREGATES | {"optimality_gap": partial(optimality_gap, threshold=100.0 if metric == "normalised" else 1.0)}
    for name in names:
        if name not in table:
            raise CvlctlError(f"no aggregate '{name}'", f"choose among {', '.join(table)}")
    # a raw return has no optimum to fall short of
    return {prefix + name: table[name] for name in names if (metric, name) != ("return", "optimality_gap")}


def wilson(successes: float, num: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a success rate after `successes` in `num` episodes."""
    z, rate = float(stats.norm.ppf(0.5 + level / 2)), successes / num
    centre, scale = rate + z * z / (2 * num), 1 + z * z / num
    half = z * math.sqrt(rate * (1 - rate) / num + (z / (2 * num)) ** 2)
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def bootstrap(statistic: Statistic, *samples: np.ndarray, **confidence: Unpack[Confidence]) -> list[Any] | None:
    """Percentile interval [low, high] of a statistic of one or more (runs, tasks) arrays; None if one has a single run.

    Stratified: each array's runs are drawn with replacement within each task, independently of the other arrays' runs.
    """
    drawn = _drawn(*samples, **confidence)
    return None if drawn is None else _interval(statistic(*drawn), **confidence)


def _drawn(*samples: np.ndarray, **confidence: Unpack[Confidence]) -> list[np.ndarray] | None:
    """Arrays (resamples, runs, tasks): the same for every statistic."""
    if min(map(len, samples), default=0) < 2:
        return None
    rng, num = np.random.default_rng(confidence.get("seed", 0)), confidence.get("resamples", 2000)
    return [np.take_along_axis(x[None], rng.integers(len(x), size=(num, *x.shape)), axis=1) for x in samples]


def _interval(values: np.ndarray, **confidence: Unpack[Confidence]) -> list[Any]:
    tail = 50 * (1 - confidence.get("level", 0.95))
    found: list[Any] = np.percentile(values, [tail, 100 - tail], axis=0).tolist()
    return found


def estimates_of(statistics: Mapping[str, Statistic], *samples: np.ndarray, **confidence: Unpack[Confidence]) -> Record:
    """One estimate a statistic; None throughout where there are no samples."""
    record: Record = {"level": confidence.get("level", 0.95)}
    drawn = _drawn(*samples, **confidence)
    for key, statistic in statistics.items():
        low, high = (None, None) if drawn is None else _interval(statistic(*drawn), **confidence)
        record |= {key: float(statistic(*samples)) if samples else None, f"{key}_low": low, f"{key}_high": high}
    return record
