"""What tuning costs: the score of the best of n settings tried online, by the number tried; and of one chosen offline.

The settings of a method are the algorithms whose names match a pattern. The maximum of noisy scores flatters, so what
chooses never scores: a seed chooses by half of its episodes (even or odd numbers), and what it chose is scored by the
other half of the episodes of the other seeds; of a single seed's runs, by its own other half. Averaged over both halves
and all (choosing, scoring) pairs of seeds; over which n of the K settings were tried, in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import comb
from typing import Any, Unpack

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.score.rows import Record, Rows, Runs, final_runs
from cvlctl.score.statistics import Confidence, estimates_of, mean
from cvlctl.score.tables import OfflineEstimate
from cvlctl.types import EpisodeResult

Estimates = Mapping[tuple[str, str, int], OfflineEstimate]  # of (algorithm, task, seed)


def settings_of(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match. CvlctlError where they are fewer than two: there is nothing to choose."""
    names = list(dict.fromkeys(names))
    found = [name for name in names if fnmatchcase(name, pattern)]
    if len(found) < 2:
        what = f"tuning: {len(found)} of the evaluated runs match {pattern!r}, and two at least are to choose from"
        raise CvlctlError(what, f"they are called {', '.join(names)}")
    return found


def best_of(num: int) -> np.ndarray:
    """Probability that the setting of rank r (0: the best of K) is the best of n drawn without replacement.

    C(K - 1 - r, n - 1) / C(K, n), of shape (n, r) = (K, K); row i is of n = i + 1.
    """
    table = [[comb(num - 1 - r, n - 1) / comb(num, n) for r in range(num)] for n in range(1, num + 1)]
    return np.array(table)


def choices(scores: np.ndarray) -> np.ndarray:
    """How likely each setting is chosen by its score (..., K) when n are tried: (..., n, K). Ties are even chances."""
    num = scores.shape[-1]
    better = (scores[..., None, :] > scores[..., :, None]).sum(axis=-1)  # (..., K): its first possible rank
    tied = (scores[..., None, :] == scores[..., :, None]).sum(axis=-1)
    up_to = np.concatenate([np.zeros((num, 1)), best_of(num).cumsum(axis=1)], axis=1)  # (n, K + 1)
    return np.moveaxis((up_to[:, better + tied] - up_to[:, better]) / tied, 0, -2)


def tuned(scores: np.ndarray) -> np.ndarray:
    """Expected scores of the best of n: (settings, seeds, episodes) -> (choosing seed, scoring seed, n).

    The halves are the episodes at even and odd positions; two episodes are needed.
    """
    halves = [scores[..., half::2].mean(axis=-1) for half in (0, 1)]  # (K, seeds)
    found = [np.einsum("snk,kt->stn", choices(halves[half].T), halves[1 - half]) for half in (0, 1)]
    return (found[0] + found[1]) / 2


def over_pairs(table: np.ndarray, **confidence: Unpack[Confidence]) -> tuple[np.ndarray, list[Any] | None]:
    """Mean of (seeds, seeds, n) over pairs of different seeds (one seed: itself), and its interval [low, high].

    Seeds are drawn with replacement, all settings' together; a seed drawn twice makes no pair with itself. None for
    fewer than three: two seeds make but one pair, however they are drawn.
    """
    num = len(table)
    if num == 1:
        return table[0, 0], None
    pairs = table * (1 - np.eye(num))[..., None]
    estimate = pairs.sum(axis=(0, 1)) / (num * (num - 1))
    if num == 2:
        return estimate, None
    rng, tail = np.random.default_rng(confidence.get("seed", 0)), 50 * (1 - confidence.get("level", 0.95))
    drawn = rng.integers(num, size=(confidence.get("resamples", 2000), num))
    counts = (drawn[..., None] == np.arange(num)).sum(axis=1).astype(np.float64)  # (resamples, seeds)
    weight = num**2 - (counts**2).sum(axis=1)
    counts, weight = counts[weight > 0], weight[weight > 0]
    if not len(weight):
        return estimate, None
    sums = np.einsum("bs,bsn->bn", counts, np.einsum("bt,stn->bsn", counts, pairs))
    return estimate, np.percentile(sums / weight[:, None], [tail, 100 - tail], axis=0).tolist()


def tuning_table(
    rows: Rows, patterns: Sequence[str], estimates: Estimates | None = None, **confidence: Unpack[Confidence]
) -> list[Record]:
    """For each task and pattern a record for every number of settings tried, n = 1 to K; and one of the offline choice.

    Keys: task, of (the pattern), settings (K), tried (n), runs (seeds that all settings have), episodes (that all their
    runs have), chosen (None), and the estimates return_tuned and success_tuned (None where the task lacks it). Where
    fitted Q evaluation has estimated all settings, a last record: tried 0, chosen (the setting of the highest mean
    estimate), and what all its episodes came to. Tasks with fewer than two such settings or episodes have none.
    """
    groups, records = final_runs(rows), []
    names = dict.fromkeys(algorithm for _, algorithm in groups)
    for task in dict.fromkeys(task for task, _ in groups):
        for pattern in patterns:
            runs = {name: groups[task, name] for name in settings_of(pattern, names) if (task, name) in groups}
            seeds, episodes = _in_common(runs)
            if len(runs) < 2 or not seeds or len(episodes) < 2:
                continue
            scores = _scores({name: [run[seed] for seed in seeds] for name, run in runs.items()}, episodes)
            base: Record = {"task": task, "of": pattern, "settings": len(runs)}
            size: Record = {"runs": len(seeds), "episodes": len(episodes), "level": confidence.get("level", 0.95)}
            columns = {metric: _columns(metric, x, confidence) for metric, x in scores.items()}
            for i in range(len(runs)):
                tried = base | {"tried": i + 1} | size | {"chosen": None}
                for metric in ("return", "success"):
                    tried |= columns[metric][i] if metric in columns else _columns(metric, None, confidence)[0]
                records.append(tried)
            values = [[(estimates or {}).get((name, task, seed)) for seed in seeds] for name in runs]
            offline = [[x.value for x in row if x is not None] for row in values]
            if all(len(row) == len(seeds) for row in offline):
                best = int(np.mean(offline, axis=1).argmax())
                chosen = base | {"tried": 0} | size | {"chosen": list(runs)[best]}
                for metric in ("return", "success"):
                    of_each = [scores[metric][best].mean(axis=-1)[:, None]] if metric in scores else []
                    chosen |= estimates_of({f"{metric}_tuned": mean}, *of_each, **confidence)
                records.append(chosen)
    return records


def _in_common(runs: Mapping[str, Runs]) -> tuple[list[int], list[int]]:
    """Seeds that all settings have, and episodes that all runs of those have."""
    seeds = sorted(set.intersection(*map(set, runs.values()))) if runs else []
    played = [{row.episode for row in run[seed]} for run in runs.values() for seed in seeds]
    return seeds, sorted(set.intersection(*played)) if played else []


def _scores(runs: Mapping[str, Sequence[Sequence[EpisodeResult]]], episodes: Sequence[int]) -> dict[str, np.ndarray]:
    """(settings, seeds, episodes) of each metric that all have."""
    rows = [[{row.episode: row for row in run} for run in of_setting] for of_setting in runs.values()]
    picked = [[[run[episode] for episode in episodes] for run in of_setting] for of_setting in rows]
    found = {"return": np.array([[[row.episode_return for row in run] for run in x] for x in picked])}
    success = [[[row.success for row in run] for run in x] for x in picked]
    if all(value is not None for x in success for run in x for value in run):
        found["success"] = np.array(success, dtype=np.float64)
    return found


def _columns(metric: str, scores: np.ndarray | None, confidence: Confidence) -> list[Record]:
    """The estimate <metric>_tuned for every n; one of None where there are no scores."""
    key = f"{metric}_tuned"
    if scores is None:
        return [{key: None, f"{key}_low": None, f"{key}_high": None}]
    values, interval = over_pairs(tuned(scores), **confidence)
    low, high = interval or ([None] * len(values), [None] * len(values))
    return [
        {key: float(value), f"{key}_low": a, f"{key}_high": b} for value, a, b in zip(values, low, high, strict=True)
    ]
