"""Evaluated episodes: read, written, and laid out as matrices of scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.files import read_regular, write_atomically
from cvlctl.types import EpisodeResult

METRICS = ("return", "success", "normalised")
Record = dict[str, Any]
Rows = Iterable[EpisodeResult]
Runs = dict[int, list[EpisodeResult]]  # seed -> rows
Reference = Mapping[str, float] | None  # {"min": return, "max": return}
References = Mapping[str, Mapping[str, float]] | None  # task -> reference
_TYPES = {"str": (str,), "int": (int,), "float": (float, int), "bool | None": (bool, type(None))}
_TYPES["float | None"] = (float, int, type(None))
_KINDS = {field.name: _TYPES[str(field.type)] for field in fields(EpisodeResult)}


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
    return rows_in(rows_file(path), path)


def rows_file(path: str | os.PathLike[str]) -> bytes:
    """What a file of rows holds. CvlctlError where it cannot be read."""
    try:
        return read_regular(Path(path))
    except OSError as error:
        raise CvlctlError(f"cannot read the rows in {path}: {error.strerror}", "evaluate first") from error


def rows_in(content: bytes, path: str | os.PathLike[str]) -> list[EpisodeResult]:
    """The rows in what a file holds. CvlctlError on a damaged line."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        try:
            rows += [parse_row(line)] if line.strip() else []
        except (ValueError, TypeError, LookupError, RecursionError) as error:  # JSON's, UTF-8's are ValueErrors
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


def with_failures(rows: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """The rows, with no success where an episode tells nothing of it, and others of its task do."""
    telling = {row.task for row in rows if row.success is not None}
    return [replace(row, success=False) if row.success is None and row.task in telling else row for row in rows]


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
    groups = final_runs(rows)
    tasks, algorithms = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    arrays = {}
    for algorithm in algorithms:
        num_runs = max(len(runs) for (_, name), runs in groups.items() if name == algorithm)
        arrays[algorithm] = np.full((num_runs, len(tasks)), np.nan)
        for column, task in enumerate(tasks):
            for scores in scores_of(groups.get((task, algorithm), {}).values(), metric, (references or {}).get(task)):
                arrays[algorithm][: len(scores), column] = scores[:, 0]
    return algorithms, tasks, arrays


def as_tree(rows: Rows) -> dict[tuple[str, str], dict[int, Runs]]:
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


def final_runs(rows: Rows) -> dict[tuple[str, str], Runs]:
    """(task, algorithm) -> seed -> the rows of that run's last step."""
    return {key: {seed: steps[max(steps)] for seed, steps in runs.items()} for key, runs in as_tree(rows).items()}


def scores_of(runs: Iterable[Sequence[EpisodeResult]], metric: str, reference: Reference = None) -> list[np.ndarray]:
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
