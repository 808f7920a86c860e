"""Which episodes of a store meet what `cvlctl data filter` was given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cvlctl.data.derive import column_rows, whole
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError


@dataclass(frozen=True)
class Criteria:
    """Which episodes `filter_episodes` keeps: those that meet every criterion that is given.

    Returns are undiscounted; an episode succeeds where any of its steps does; bounds are inclusive, but for
    `collected_to`, so that [0, n) and [n, m) share no episode. Returns and successes are those of `label`.
    """

    min_return: float | None = None
    max_return: float | None = None
    success: bool | None = None
    min_length: int | None = None
    max_length: int | None = None
    tasks: Sequence[str] = ()
    collected_from: int | None = None
    collected_to: int | None = None
    label: str = "given"


def meets(store: Store, criteria: Criteria) -> np.ndarray:
    """(episodes,) bool."""
    keep = np.ones(store.num_episodes, bool)
    lengths, collected_at = store.lengths(), store.collected_at()
    bounded: list[tuple[np.ndarray, float | None, float | None]] = [
        (lengths, criteria.min_length, criteria.max_length),
        (collected_at, criteria.collected_from, None if criteria.collected_to is None else criteria.collected_to - 1),
    ]
    if criteria.min_return is not None or criteria.max_return is not None:
        bounded.append((_returns(store, criteria.label), criteria.min_return, criteria.max_return))
    elif criteria == Criteria(label=criteria.label):
        raise CvlctlError("filter needs a criterion", "such as --min-return 100; see cvlctl data filter --help")
    for values, low, high in bounded:
        if low is not None:
            keep &= values >= low
        if high is not None:
            keep &= values <= high
    if criteria.success is not None:
        keep &= _solved(store, criteria.label) == criteria.success
    if criteria.tasks:
        for task in criteria.tasks:
            if task not in store.task_names:
                raise CvlctlError(f"{store.path} has no task {task!r}", f"it has {', '.join(store.task_names)}")
        keep &= np.isin(store.episode_tasks(), list(criteria.tasks))
    return keep


def _returns(store: Store, label: str) -> np.ndarray:
    store.require_label(label)
    rows = column_rows([whole(store)], f"labels/{label}/reward")
    return np.array([x.sum(dtype=np.float64) for x in rows])


def _solved(store: Store, label: str) -> np.ndarray:
    store.require_label(label, "success")
    return np.array([x.any() for x in column_rows([whole(store)], f"labels/{label}/success")])


def ranges(store: Store, label: str) -> str:
    """What filters could ask for, so that the next try hits something."""
    lengths, collected_at = store.lengths(), store.collected_at()
    said = [f"lengths {lengths.min()} to {lengths.max()}", f"collected at {collected_at.min()} to {collected_at.max()}"]
    if store.has_label(label):
        returns = _returns(store, label)
        said.append(f"returns {returns.min():.6g} to {returns.max():.6g}")
    if store.has_label(label, "success"):
        said.append(f"{int(_solved(store, label).sum())} successful")
    return f"the store has {', '.join(said)}"


def no_label(store: Store, label: str) -> CvlctlError:
    return CvlctlError(f"{store.path}: no label {label!r}", f"the store has {', '.join(store.labels) or 'no labels'}")
