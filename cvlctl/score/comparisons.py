"""Algorithms beside a baseline over many tasks: per cent over it, and on how many tasks above it, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np

from cvlctl.score.rows import METRICS, Record, Reference, References, Rows, Runs, final_runs, scores_of
from cvlctl.score.statistics import Confidence, estimates_of, mean, probability_of_improvement
from cvlctl.score.tables import TOP, over_tasks
from cvlctl.types import EpisodeResult


def relative_table(
    rows: Rows, *, baseline: str = "bc", references: References = None, **confidence: Unpack[Confidence]
) -> list[Record]:
    """Per cent over the baseline, 100 (mean / its mean - 1): one record per (task, algorithm), and one over all tasks.

    Only where the baseline's mean is positive; without an interval where a resampled one is not. Keys: task (or
    "all N tasks"), algorithm, baseline, runs, baseline_runs, small_base (the metrics in which the baseline is within a
    tenth of the way from random actions to the expert: a percentage over next to nothing), estimates <metric>_over.
    """
    rows = list(rows)
    records = []
    for (task, algorithm), runs in (groups := final_runs(rows)).items():
        others, reference = groups.get((task, baseline), {}), (references or {}).get(task)
        if algorithm == baseline or not others:
            continue
        record: Record = {"task": task, "algorithm": algorithm, "baseline": baseline}
        record |= {"runs": len(runs), "baseline_runs": len(others), "small_base": []}
        for metric in METRICS:
            ours, base = (scores_of(x.values(), metric, reference) for x in (runs, others))
            record |= _over(
                metric, ours + base if ours else [], _near_random(metric, base, reference), record, confidence
            )
        records.append(record)
    metric, tasks, arrays = over_tasks(rows, references)
    whole = {name: scores for name, scores in arrays.items() if not np.isnan(scores).any()}
    for algorithm, scores in whole.items() if baseline in whole else ():
        if algorithm != baseline:
            record = {"task": f"all {len(tasks)} tasks", "algorithm": algorithm, "baseline": baseline}
            record |= {"runs": len(scores), "baseline_runs": len(whole[baseline]), "small_base": []}
            small = metric == "normalised" and bool(mean(whole[baseline]) < TOP[metric] / 10)
            record |= _over(metric, [scores, whole[baseline]], small, record, confidence)
            records.append(record)
    return [record for record in records if any(record.get(f"{metric}_over") is not None for metric in METRICS)]


def _over(metric: str, pair: list[np.ndarray], small: bool, record: Record, confidence: Confidence) -> Record:
    """The estimate of one metric, and the record's `small_base` with it."""
    if len(pair) < 2 or mean(pair[1]) <= 0:
        pair, small = [], False
    with np.errstate(divide="ignore", invalid="ignore"):
        found = estimates_of({f"{metric}_over": _per_cent_over}, *pair, **confidence)
    unbounded = {key: None for key, value in found.items() if isinstance(value, float) and np.isnan(value)}
    return found | unbounded | {"small_base": [*record["small_base"], *([metric] if small else [])]}


def _per_cent_over(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    base = mean(b)
    return np.where(base > 0, 100 * (mean(a) / base - 1), np.nan)


def _near_random(metric: str, base: list[np.ndarray], reference: Reference) -> bool:
    """Whether scores (runs, 1) are less than a tenth of the way above random actions'; no where those are unknown."""
    ends = {"return": ("min", "max"), "success": ("random_success", "scripted_success"), "normalised": ("min", "max")}
    low, high = ((reference or {}).get(key) for key in ends[metric])
    if metric == "normalised":
        low, high = 0.0, TOP[metric]
    return bool(base) and low is not None and high is not None and bool(mean(base[0]) < low + (high - low) / 10)


def comparison_table(rows: Rows, *, baseline: str = "bc", **confidence: Unpack[Confidence]) -> list[Record]:
    """Each algorithm against the baseline over the tasks of both, for return and success, on the same episodes.

    A run's score is its mean over the episodes (by number, so by start) that all runs of both played on that task.
    Empty for fewer than two tasks. Keys: algorithm, baseline, metric, tasks, above, below (tasks on which its mean is),
    runs, baseline_runs, episodes (the least of the tasks'), and the estimate probability_of_improvement: the mean over
    tasks of the probability that a run of the algorithm beats one of the baseline (rliable's).
    """
    groups, records = final_runs(rows), []
    for algorithm in dict.fromkeys(name for _, name in groups if name != baseline):
        both = [task for task, name in groups if name == algorithm and (task, baseline) in groups]
        shared = {task: _shared(groups[task, algorithm], groups[task, baseline]) for task in both}
        pairs = [pair for pair in shared.values() if pair[0][0]]
        for metric in ("return", "success") if len(pairs) > 1 else ():
            samples = [scores for pair in pairs for runs in pair for scores in scores_of(runs, metric)]
            if len(samples) < 2 * len(pairs):
                continue
            differences = [float(mean(a) - mean(b)) for a, b in _in_twos(samples)]
            record: Record = {"algorithm": algorithm, "baseline": baseline, "metric": metric, "tasks": len(pairs)}
            record |= {"above": sum(x > 0 for x in differences), "below": sum(x < 0 for x in differences)}
            record |= {"runs": min(map(len, samples[::2])), "baseline_runs": min(map(len, samples[1::2]))}
            record["episodes"] = min(len(runs[0]) for runs, _ in pairs)
            statistic = {"probability_of_improvement": _improvement_over_tasks}
            records.append(record | estimates_of(statistic, *samples, **confidence))
    return records


def _shared(ours: Runs, others: Runs) -> tuple[list[list[EpisodeResult]], list[list[EpisodeResult]]]:
    """Of the runs of two algorithms on a task, the episodes that all of them played."""
    everyone = [{row.episode for row in run} for run in (*ours.values(), *others.values())]
    common = set.intersection(*everyone)
    ours_, others_ = ([[row for row in run if row.episode in common] for run in x.values()] for x in (ours, others))
    return ours_, others_


def _improvement_over_tasks(*samples: np.ndarray) -> np.ndarray:
    return np.mean([probability_of_improvement(a, b) for a, b in _in_twos(samples)], axis=0)


def _in_twos(samples: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return zip(samples[::2], samples[1::2], strict=True)


def sentences(records: Sequence[Record]) -> list[str]:
    """Records of `comparison_table` in words, one sentence an algorithm."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        found.setdefault((record["algorithm"], record["baseline"]), []).append(record)
    return [_sentence(*names, of_each_metric) for names, of_each_metric in found.items()]


def _sentence(algorithm: str, baseline: str, records: Sequence[Record]) -> str:
    first, *others = records
    text = f"{algorithm} is above {baseline} on {first['above']} of {first['tasks']} tasks by {first['metric']}; "
    text += _probability(first)
    for record in others:
        text += f". By {record['metric']}, on {record['above']} of {record['tasks']}; {_probability(record)}"
    episodes = "episode" if first["episodes"] == 1 else f"{first['episodes']} episodes"
    return f"{text}. On the same {episodes} of each run."


def _probability(record: Record) -> str:
    value, low, high = (record[f"probability_of_improvement{end}"] for end in ("", "_low", "_high"))
    sure = " (one run)" if low is None else "" if low == high else f" [{_in_short(low)}, {_in_short(high)}]"
    return f"P(improvement) = {_in_short(value)}{sure}"


def _in_short(value: float) -> str:
    """As papers print it: .81, 1.00."""
    return f"{value:.2f}".removeprefix("0")
