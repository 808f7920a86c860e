"""Rows of evaluated episodes -> tables of scores with intervals. Pure functions, `read_rows` and `write_rows` apart.

A *run* is one seed of one algorithm on one task; its score is its episodes' mean at its last step, never at its best.
Intervals resample the runs within each task, for the episodes of one policy say nothing about the next seed. One run
has none (None), few runs have too narrow ones: of nominal 95 %, ten normal runs really cover about 90, five 83, two 50.
Tables are lists of flat records with a `level`; an *estimate* is three keys, <key>, <key>_low and <key>_high.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np
from scipy import stats

from cvlctl.errors import CvlctlError
from cvlctl.files import write_atomically
from cvlctl.types import EpisodeResult

METRICS = ("return", "success", "normalised")
Record = dict[str, Any]
Rows = Iterable[EpisodeResult]
Runs = dict[int, list[EpisodeResult]]  # seed -> rows
Reference = Mapping[str, float] | None  # {"min": return, "max": return}
References = Mapping[str, Mapping[str, float]] | None  # task -> reference
Names = Sequence[str]
Statistic = Callable[..., np.ndarray]
_TYPES = {"str": (str,), "int": (int,), "float": (float, int), "bool | None": (bool, type(None))}
_TYPES["float | None"] = (float, int, type(None))
_KINDS = {field.name: _TYPES[str(field.type)] for field in fields(EpisodeResult)}


class Confidence(TypedDict, total=False):
    """How intervals are made: level (0.95), number of resamples (2000), seed (0)."""

    level: float
    resamples: int
    seed: int


class OfflineEstimate(NamedTuple):
    """What fitted Q evaluation expects of a policy's discounted return."""

    value: float
    gamma: float


def write_rows(path: str | os.PathLike[str], rows: Rows) -> None:
    """Write one JSON line an episode, atomically. CvlctlError on a return that is not finite."""
    lines = []
    for row in rows:
        if not math.isfinite(row.episode_return):
            where = f"episode {row.episode} of {row.algorithm} seed {row.seed} on {row.task}"
            raise CvlctlError(f"{where} has return {row.episode_return}", "the policy or the simulation diverged")
        values = {name: getattr(row, name) for name in _KINDS}  # converted below, since numpy's scalars are not JSON
        lines.append(json.dumps({k: None if v is None else _KINDS[k][0](v) for k, v in values.items()}) + "\n")
    write_atomically(Path(path), "".join(lines).encode())


def read_rows(path: str | os.PathLike[str]) -> list[EpisodeResult]:
    """Read what `write_rows` wrote; other keys are ignored. CvlctlError on a missing file or a damaged line."""
    rows = []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise CvlctlError(f"cannot read the rows in {path}: {error.strerror}", "evaluate first") from error
    for number, line in enumerate(lines, start=1):
        try:
            rows += [parse_row(line)] if line.strip() else []
        except (ValueError, TypeError, LookupError) as error:  # JSON's and UTF-8's errors are ValueErrors
            fault = f"no {error}" if isinstance(error, KeyError) else error
            raise CvlctlError(f"{path}, line {number}: not an evaluated episode ({fault})", "evaluate again") from error
    return rows


def parse_row(line: bytes) -> EpisodeResult:
    """The row in one line of JSON; ValueError, TypeError or LookupError where it is none."""
    values = {"discounted_return": None, **json.loads(line)}  # which older rows lack
    for name, kinds in _KINDS.items():
        value = values[name]
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}")
    return EpisodeResult(**{name: values[name] for name in _KINDS})


def normalised(rows: Sequence[EpisodeResult], reference: Reference) -> np.ndarray | None:
    """100 (return - min) / (max - min), shape (rows,); None without a reference, CvlctlError on a senseless one."""
    if reference is None:
        return None
    low, high = (float(reference.get(key, math.nan)) for key in ("min", "max"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise CvlctlError(f"reference scores {dict(reference)} lack a finite min below a max", "give returns for both")
    return 100.0 * (np.array([row.episode_return for row in rows]) - low) / (high - low)


def matrix(
    rows: Rows, metric: str, references: References = None
) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """Algorithms, tasks (both in order of appearance), and each algorithm's final run scores, shape (runs, tasks).

    The metric is "return", "success" (a share) or "normalised" (points). Within a task, runs are in order of seeds; NaN
    where a task has fewer runs than the others, or lacks the metric.
    """
    groups = _final(rows)
    tasks, algorithms = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    arrays = {}
    for algorithm in algorithms:
        num_runs = max(len(runs) for (_, name), runs in groups.items() if name == algorithm)
        arrays[algorithm] = np.full((num_runs, len(tasks)), np.nan)
        for column, task in enumerate(tasks):
            for scores in _scores(groups.get((task, algorithm), {}).values(), metric, (references or {}).get(task)):
                arrays[algorithm][: len(scores), column] = scores[:, 0]
    return algorithms, tasks, arrays


def _tree(rows: Rows) -> dict[tuple[str, str], dict[int, Runs]]:
    """(task, algorithm) -> seed -> step -> rows: tasks, algorithms in order of appearance, seeds, steps ascending."""
    rows, seen = list(rows), set()
    tasks = list(dict.fromkeys(row.task for row in rows))
    keys = dict.fromkeys((row.task, row.algorithm) for row in rows)
    order = sorted(keys, key=lambda key: tasks.index(key[0]))
    tree: dict[tuple[str, str], dict[int, Runs]] = {key: {} for key in order}
    for row in sorted(rows, key=lambda row: (row.seed, row.step)):
        key = (row.task, row.algorithm, row.seed, row.step, row.episode)
        if key in seen:
            where = f"episode {row.episode} of {row.algorithm} seed {row.seed} on {row.task}, step {row.step},"
            raise CvlctlError(f"{where} is there twice", "two runs share a name and a seed: rename one, or drop it")
        seen.add(key)
        tree[row.task, row.algorithm].setdefault(row.seed, {}).setdefault(row.step, []).append(row)
    return tree


def _final(rows: Rows) -> dict[tuple[str, str], Runs]:
    """(task, algorithm) -> seed -> the rows of that run's last step."""
    return {key: {seed: steps[max(steps)] for seed, steps in runs.items()} for key, runs in _tree(rows).items()}


def _scores(runs: Iterable[Sequence[EpisodeResult]], metric: str, reference: Reference = None) -> list[np.ndarray]:
    """One (runs, 1) array of means over episodes; nothing where a run lacks the metric, or there are no runs."""
    if metric not in METRICS:
        raise CvlctlError(f"no metric '{metric}'", f"choose among {', '.join(METRICS)}")
    means = []
    for rows in runs:
        values: Any = normalised(rows, reference) if metric == "normalised" else [row.success for row in rows]
        values = [row.episode_return for row in rows] if metric == "return" else values
        if values is None or any(value is None for value in values):
            return []
        means.append(np.mean(values))
    return [np.array(means)[:, None]] if means else []


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


AGGREGATES: dict[str, Statistic] = {"mean": mean, "median": median, "iqm": iqm, "optimality_gap": optimality_gap}


def _aggregates(names: Iterable[str], metric: str, prefix: str = "") -> dict[str, Statistic]:
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
    if min(map(len, samples), default=0) < 2:
        return None
    rng, tail = np.random.default_rng(confidence.get("seed", 0)), 50 * (1 - confidence.get("level", 0.95))
    num = confidence.get("resamples", 2000)
    drawn = [np.take_along_axis(x[None], rng.integers(len(x), size=(num, *x.shape)), axis=1) for x in samples]
    return np.percentile(statistic(*drawn), [tail, 100 - tail], axis=0).tolist()


def _estimates(statistics: Mapping[str, Statistic], *samples: np.ndarray, **confidence: Unpack[Confidence]) -> Record:
    """One estimate a statistic; None throughout where there are no samples."""
    record: Record = {"level": confidence.get("level", 0.95)}
    for key, statistic in statistics.items():
        low, high = bootstrap(statistic, *samples, **confidence) or (None, None)
        record |= {key: float(statistic(*samples)) if samples else None, f"{key}_low": low, f"{key}_high": high}
    return record


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
    for (task, algorithm), runs in _final(rows).items():
        steps, episodes = {run[0].step for run in runs.values()}, sum(map(len, runs.values()))
        record: Record = {"task": task, "algorithm": algorithm, "runs": len(runs), "episodes": episodes}
        record |= {"step": min(steps), "uneven_steps": len(steps) > 1}
        for metric in METRICS:
            scores = _scores(runs.values(), metric, (references or {}).get(task))
            record |= _estimates(_aggregates(names, metric, f"{metric}_"), *scores, **confidence)
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
    runs = [(*key, seed, run) for key, runs in _final(rows).items() for seed, run in runs.items()]
    for task, algorithm, seed, run in runs:
        record: Record = {"task": task, "algorithm": algorithm, "seed": seed, "episodes": len(run), "step": run[0].step}
        record["length_mean"] = sum(row.length for row in run) / len(run)
        for metric in METRICS:
            scores = _scores([[row] for row in run], metric, (references or {}).get(task))
            record |= _estimates({f"{metric}_mean": mean}, *scores, **confidence)
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
    for (task, algorithm), runs in _final(rows).items():
        found = [estimates[algorithm, task, seed] for seed in runs if (algorithm, task, seed) in estimates]
        played = [[row.discounted_return for row in run if row.discounted_return is not None] for run in runs.values()]
        if len(found) < len(runs) or not all(played):
            continue
        record: Record = {"task": task, "algorithm": algorithm, "runs": len(runs)}
        record |= {"episodes": sum(map(len, played)), "gamma": found[0].gamma}
        offline, online = [estimate.value for estimate in found], [sum(x) / len(x) for x in played]
        for key, values in (("offline", offline), ("discounted", online)):
            column = np.array(values, dtype=np.float64)[:, None]
            record |= _estimates({f"{key}_mean": mean}, column, **confidence) | {f"{key}_runs": column[:, 0].tolist()}
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
    rows, records = list(rows), []
    references = references or {}
    metric = "normalised" if all(row.task in references for row in rows) else "success"
    algorithms, tasks, arrays = matrix(rows, metric, references)
    if len(tasks) < 2 or (metric == "success" and any(row.success is None for row in rows)):
        return []
    for algorithm in algorithms:
        scores = arrays[algorithm]
        missing = [task for task, column in zip(tasks, scores.T, strict=True) if np.isnan(column).any()]
        record: Record = {"algorithm": algorithm, "metric": metric, "tasks": len(tasks), "runs": len(scores)}
        samples = [] if missing else [scores]
        record |= {"missing": missing} | _estimates(_aggregates(aggregates, metric), *samples, **confidence)
        records.append(record)
    return records


def pairwise(rows: Rows, *, baseline: str = "bc", **confidence: Unpack[Confidence]) -> list[Record]:
    """Each algorithm against the baseline, per task, for return and success; an empty table where it was not evaluated.

    Keys: task, algorithm, baseline, metric, runs, baseline_runs, and the estimates difference (of mean run scores) and
    probability_of_improvement (that a run of the algorithm beats one of the baseline).
    """
    groups, records = _final(rows), []
    statistics: dict[str, Statistic] = {"difference": lambda a, b: mean(a) - mean(b)}
    statistics["probability_of_improvement"] = probability_of_improvement
    for (task, algorithm), runs in groups.items():
        for metric in ("return", "success") if algorithm != baseline else ():
            others = groups.get((task, baseline), {})
            pair = _scores(runs.values(), metric) + _scores(others.values(), metric)
            if len(pair) == 2:
                record: Record = {"task": task, "algorithm": algorithm, "baseline": baseline, "metric": metric}
                record |= {"runs": len(runs), "baseline_runs": len(others)}
                records.append(record | _estimates(statistics, *pair, **confidence))
    return records


def curve(rows: Rows, *, metric: str = "return", **confidence: Unpack[Confidence]) -> list[Record]:
    """One record per (task, algorithm): task, algorithm, runs, and lists steps, mean, low, high (None for one run).

    Steps that only some of the runs have are left out, so that a line never changes the number of runs it averages.
    """
    records = []
    for (task, algorithm), runs in _tree(rows).items():
        steps = sorted({step for run in runs.values() for step in run})
        by_step = {step: [run[step] for run in runs.values() if step in run] for step in steps}
        num = max(map(len, by_step.values()))
        scores = {step: x for step in steps if len(by_step[step]) == num for x in _scores(by_step[step], metric)}
        if scores:
            table = np.concatenate(list(scores.values()), axis=1)  # (runs, steps)
            low, high = bootstrap(lambda x: x.mean(axis=-2), table, **confidence) or (None, None)
            record: Record = {"task": task, "algorithm": algorithm, "runs": num, "steps": list(scores)}
            records.append(record | {"mean": table.mean(axis=0).tolist(), "low": low, "high": high})
    return records
