"""Rows of evaluated episodes -> tables of scores with intervals: pure functions.

A *run* is one seed of one algorithm on one task; its score is its episodes' mean at its last step, never at its best.
Intervals resample the runs within each task, for the episodes of one policy say nothing about the next seed. One run
has none (None), few runs have too narrow ones: of nominal 95 %, ten normal runs really cover about 90, five 83, two 50.
Tables are lists of flat records with a `level`; an *estimate* is three keys, <key>, <key>_low and <key>_high.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple, Unpack

import numpy as np

from cvlctl.score.rows import (
    METRICS,
    Record,
    References,
    Rows,
    as_tree,
    final_runs,
    matrix,
    scores_of,
)
from cvlctl.score.statistics import (
    Confidence,
    Statistic,
    aggregates_of,
    bootstrap,
    estimates_of,
    iqm,
    mean,
    probability_of_improvement,
    profile,
    wilson,
)
from cvlctl.types import EpisodeResult

Names = Sequence[str]
TOP = {"normalised": 100.0, "success": 1.0}  # what an expert scores


class OfflineEstimate(NamedTuple):
    """What fitted Q evaluation expects of a policy's discounted return."""

    value: float
    gamma: float


def score_table(
    rows: Rows, *, references: References = None, aggregates: Names = ("iqm", "mean"), **confidence: Unpack[Confidence]
) -> list[Record]:
    """One record per (task, algorithm), with intervals over its runs.

    Keys: task, algorithm, runs, episodes, step (the least of the runs' last steps), uneven_steps; for each metric the
    estimates <metric>_mean, <metric>_<aggregate>, and the list <metric>_runs: all None where the task lacks the metric.
    What the task's reference policies score stands beside: reference_min, _max, random_success, scripted_success; and
    in which simulator the rows were played.
    """
    records, names = [], dict.fromkeys(["mean", *aggregates])
    for (task, algorithm), runs in final_runs(rows).items():
        steps, episodes = {run[0].step for run in runs.values()}, sum(map(len, runs.values()))
        record: Record = {"task": task, "algorithm": algorithm, "runs": len(runs), "episodes": episodes}
        record |= {"step": min(steps), "uneven_steps": len(steps) > 1}
        for metric in METRICS:
            scores = scores_of(runs.values(), metric, (references or {}).get(task))
            record |= estimates_of(aggregates_of(names, metric, f"{metric}_"), *scores, **confidence)
            record[f"{metric}_runs"] = scores[0][:, 0].tolist() if scores else None
        reference = (references or {}).get(task) or {}
        record |= {"reference_min": reference.get("min"), "reference_max": reference.get("max")}
        record |= {key: reference.get(key) for key in ("random_success", "scripted_success", "simulator")}
        records.append(record)
    return records


def run_table(rows: Rows, *, references: References = None, **confidence: Unpack[Confidence]) -> list[Record]:
    """One record per run, with intervals over its episodes (Wilson's for success): how well one policy is measured.

    Keys: task, algorithm, seed, episodes, step, length_mean, and the estimates <metric>_mean.
    """
    records = []
    runs = [(*key, seed, run) for key, runs in final_runs(rows).items() for seed, run in runs.items()]
    for task, algorithm, seed, run in runs:
        record: Record = {"task": task, "algorithm": algorithm, "seed": seed, "episodes": len(run), "step": run[0].step}
        record["length_mean"] = sum(row.length for row in run) / len(run)
        for metric in METRICS:
            scores = scores_of([[row] for row in run], metric, (references or {}).get(task))
            record |= estimates_of({f"{metric}_mean": mean}, *scores, **confidence)
        if record["success_mean"] is not None:
            low, high = wilson(sum(bool(row.success) for row in run), len(run), record["level"])
            record |= {"success_mean_low": low, "success_mean_high": high}
        records.append(record)
    return records


def offline_table(
    rows: Rows, estimates: Mapping[tuple[str, str, int], OfflineEstimate], **confidence: Unpack[Confidence]
) -> list[Record]:
    """One record per (task, algorithm) all of whose runs have an offline estimate of their policy's discounted return.

    `estimates`: of (algorithm, task, seed). Keys: task, algorithm, runs, episodes, gamma, and of offline and of
    discounted (what the episodes came to) the estimate <key>_mean and the list <key>_runs, in order of seeds.
    """
    records = []
    for (task, algorithm), runs in final_runs(rows).items():
        found = [estimates[algorithm, task, seed] for seed in runs if (algorithm, task, seed) in estimates]
        played = [[row.discounted_return for row in run if row.discounted_return is not None] for run in runs.values()]
        if len(found) < len(runs) or not all(played):
            continue
        record: Record = {"task": task, "algorithm": algorithm, "runs": len(runs)}
        record |= {"episodes": sum(map(len, played)), "gamma": found[0].gamma}
        offline, online = [estimate.value for estimate in found], [sum(x) / len(x) for x in played]
        for key, values in (("offline", offline), ("discounted", online)):
            column = np.array(values, dtype=np.float64)[:, None]
            record |= estimates_of({f"{key}_mean": mean}, column, **confidence) | {f"{key}_runs": column[:, 0].tolist()}
        records.append(record)
    return records


def aggregate_table(
    rows: Rows, *, references: References = None, aggregates: Names = ("iqm", "mean"), **confidence: Unpack[Confidence]
) -> list[Record]:
    """One record per algorithm over all tasks; an empty table for fewer than two.

    The metric is the normalised score where every task has a reference, else success where every task has it; else the
    table is empty, for raw returns of different tasks do not add up. Keys: algorithm, metric, tasks, runs, missing (the
    tasks with fewer runs: the estimates are then None, being means of something else), and one estimate per aggregate.
    """
    records = []
    metric, tasks, arrays = over_tasks(list(rows), references)
    for algorithm, scores in arrays.items():
        missing = [task for task, column in zip(tasks, scores.T, strict=True) if np.isnan(column).any()]
        record: Record = {"algorithm": algorithm, "metric": metric, "tasks": len(tasks), "runs": len(scores)}
        samples = [] if missing else [scores]
        record |= {"missing": missing} | estimates_of(aggregates_of(aggregates, metric), *samples, **confidence)
        records.append(record)
    return records


def over_tasks(rows: Sequence[EpisodeResult], references: References) -> tuple[str, list[str], dict[str, np.ndarray]]:
    """The metric that all tasks have, the tasks, and final scores (runs, tasks) by algorithm; no scores of one task."""
    metric = "normalised" if all(row.task in (references or {}) for row in rows) else "success"
    _, tasks, arrays = matrix(rows, metric, references)
    common = len(tasks) > 1 and (metric == "normalised" or all(row.success is not None for row in rows))
    return metric, tasks, arrays if common else {}


def profile_table(rows: Rows, *, references: References = None, **confidence: Unpack[Confidence]) -> list[Record]:
    """Performance profiles: one record per algorithm that has all its runs on every task; empty as `aggregate_table`.

    Keys: algorithm, metric (its own scale: 0 to 1, or to 100), tasks, runs, level, and lists over a grid of 101 steps:
    tau, share (of all runs x tasks scores above it), low, high (pointwise; None for one run).
    """
    records = []
    metric, tasks, arrays = over_tasks(list(rows), references)
    taus = np.linspace(0, TOP[metric], 101)
    for algorithm, scores in arrays.items():
        if not np.isnan(scores).any():
            record: Record = {"algorithm": algorithm, "metric": metric, "tasks": len(tasks), "runs": len(scores)}
            record |= {"level": confidence.get("level", 0.95), "tau": taus.tolist()}
            low, high = bootstrap(partial(profile, taus=taus), scores, **confidence) or (None, None)
            records.append(record | {"share": profile(scores, taus).tolist(), "low": low, "high": high})
    return records


def efficiency_table(rows: Rows, *, references: References = None, **confidence: Unpack[Confidence]) -> list[Record]:
    """Sample efficiency: the IQM over runs and tasks at every step that all runs of all tasks have; empty as profiles.

    Keys: algorithm, metric, tasks, runs, level, and lists steps, iqm, low, high (pointwise; None for one run). A run
    that is drawn is drawn with all its steps.
    """
    rows, records = list(rows), []
    metric, tasks, arrays = over_tasks(rows, references)
    for algorithm, final in arrays.items():
        by_step = _by_step([row for task in tasks for row in rows if (row.task, row.algorithm) == (task, algorithm)])
        tables = {step: matrix(some, metric, references)[2][algorithm] for step, some in by_step.items()}
        whole = {step: x for step, x in tables.items() if x.shape == final.shape and not np.isnan(x).any()}
        if not whole:
            continue
        columns = np.arange(len(tasks))

        def at_each_step(
            runs: np.ndarray, whole: dict[int, np.ndarray] = whole, at: np.ndarray = columns
        ) -> np.ndarray:
            return np.stack([iqm(scores[runs, at]) for scores in whole.values()], axis=-1)

        every = np.repeat(np.arange(len(final))[:, None], len(tasks), axis=1)  # (runs, tasks): each run's number
        low, high = bootstrap(at_each_step, every, **confidence) or (None, None)
        record: Record = {"algorithm": algorithm, "metric": metric, "tasks": len(tasks), "runs": len(final)}
        record |= {"level": confidence.get("level", 0.95), "steps": list(whole)}
        records.append(record | {"iqm": at_each_step(every).tolist(), "low": low, "high": high})
    return records


def _by_step(rows: Sequence[EpisodeResult]) -> dict[int, list[EpisodeResult]]:
    found: dict[int, list[EpisodeResult]] = {step: [] for step in sorted({row.step for row in rows})}
    for row in rows:
        found[row.step].append(row)
    return found


def pairwise(rows: Rows, *, baseline: str = "bc", **confidence: Unpack[Confidence]) -> list[Record]:
    """Each algorithm against the baseline, per task, for return and success; an empty table where it was not evaluated.

    Keys: task, algorithm, baseline, metric, runs, baseline_runs, and the estimates difference (of mean run scores) and
    probability_of_improvement (that a run of the algorithm beats one of the baseline).
    """
    groups, records = final_runs(rows), []
    statistics: dict[str, Statistic] = {"difference": lambda a, b: mean(a) - mean(b)}
    statistics["probability_of_improvement"] = probability_of_improvement
    for (task, algorithm), runs in groups.items():
        for metric in ("return", "success") if algorithm != baseline else ():
            others = groups.get((task, baseline), {})
            pair = scores_of(runs.values(), metric) + scores_of(others.values(), metric)
            if len(pair) == 2:
                record: Record = {"task": task, "algorithm": algorithm, "baseline": baseline, "metric": metric}
                record |= {"runs": len(runs), "baseline_runs": len(others)}
                records.append(record | estimates_of(statistics, *pair, **confidence))
    return records


def curve_table(rows: Rows, **confidence: Unpack[Confidence]) -> list[Record]:
    """One record per (task, algorithm, step) of what was evaluated at several steps: task, algorithm, runs, updates,
    return_mean, success_mean with their intervals (_low, _high); no success where the task has none."""
    records: dict[tuple[str, str, int], Record] = {}
    for metric in ("return", "success"):
        for line in curve(rows, metric=metric, **confidence):
            task, algorithm, runs = line["task"], line["algorithm"], line["runs"]
            for i, step in enumerate(line["steps"] if len(line["steps"]) > 1 else ()):
                about: Record = {"task": task, "algorithm": algorithm, "runs": runs, "updates": step}
                record = records.setdefault((task, algorithm, step), about)
                ends = {end: line[end.strip("_")] for end in ("_low", "_high")}
                record[f"{metric}_mean"] = line["mean"][i]
                record |= {f"{metric}_mean{end}": values and values[i] for end, values in ends.items()}
    return [*records.values()]


def curve(rows: Rows, *, metric: str = "return", **confidence: Unpack[Confidence]) -> list[Record]:
    """One record per (task, algorithm): task, algorithm, runs, and lists steps, mean, low, high (None for one run).

    Steps that only some of the runs have are left out, so that a line never changes the number of runs it averages.
    """
    records = []
    for (task, algorithm), runs in as_tree(rows).items():
        steps = sorted({step for run in runs.values() for step in run})
        by_step = {step: [run[step] for run in runs.values() if step in run] for step in steps}
        num = max(map(len, by_step.values()))
        scores = {step: x for step in steps if len(by_step[step]) == num for x in scores_of(by_step[step], metric)}
        if scores:
            table = np.concatenate(list(scores.values()), axis=1)  # (runs, steps)
            low, high = bootstrap(lambda x: x.mean(axis=-2), table, **confidence) or (None, None)
            record: Record = {"task": task, "algorithm": algorithm, "runs": num, "steps": list(scores)}
            records.append(record | {"mean": table.mean(axis=0).tolist(), "low": low, "high": high})
    return records
