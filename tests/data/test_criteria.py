"""Which episodes `filter` keeps, and what it says where none is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy_stores import assert_holds, names, numbered_episodes

from cvlctl.data.criteria import Criteria
from cvlctl.data.store import open_store
from cvlctl.data.transform import filter_episodes
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync", "small_chunks")


FILTERS: list[tuple[Criteria, Callable[[Episode], bool]]] = [
    (Criteria(min_return=20), lambda e: float(np.sum(e.rewards)) >= 20),
    (Criteria(max_return=20), lambda e: float(np.sum(e.rewards)) <= 20),
    (Criteria(success=True), lambda e: e.seed % 2 == 1),
    (Criteria(success=False), lambda e: e.seed % 2 == 0),
    (Criteria(min_length=5), lambda e: len(e) >= 5),
    (Criteria(max_length=5), lambda e: len(e) <= 5),
    (Criteria(tasks=("other",)), lambda e: e.task == "other"),
    (Criteria(tasks=("other", "toy")), lambda e: True),
    (Criteria(collected_from=300, collected_to=700), lambda e: 300 <= e.collected_at < 700),
    (
        Criteria(min_return=5, success=True, max_length=9),
        lambda e: np.sum(e.rewards) >= 5 and e.seed % 2 and len(e) < 10,
    ),
]


@pytest.mark.parametrize(("criteria", "passes"), FILTERS)
def test_filter(tmp_path: Path, criteria: Criteria, passes: Callable[[Episode], bool]) -> None:
    episodes = [*numbered_episodes(8), *numbered_episodes(6, 8, task="other")]
    source = write_store(tmp_path / "a.zarr", episodes, task="toy").path
    result = filter_episodes(source, tmp_path / "b.zarr", criteria)
    wanted = [e for e in episodes if passes(e)]
    assert_holds(open_store(tmp_path / "b.zarr"), wanted)
    assert (result["episodes"], result["of_episodes"]) == (len(wanted), 14)


def test_filter_by_another_label(labelled: Path, tmp_path: Path) -> None:
    filter_episodes(labelled, tmp_path / "b.zarr", Criteria(min_return=0.5, label="sparse"))
    store = open_store(tmp_path / "b.zarr")
    assert store.seeds().tolist() == [1, 3, 5, 7, 9, 11] and store.labels == ["given", "sparse", "zero"]
    assert "--label sparse" in store.provenance["command"]


def test_filter_says_what_there_is(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.zarr"
    with pytest.raises(CvlctlError, match="none of 12 episodes passes") as caught:
        filter_episodes(a, out, Criteria(min_return=1e9))
    assert "returns 0 to 70" in caught.value.hint and "lengths 1 to 11" in caught.value.hint
    assert "collected at 0 to 1100" in caught.value.hint and "6 successful" in caught.value.hint
    with pytest.raises(CvlctlError, match="no task 'tyo'") as caught:
        filter_episodes(a, out, Criteria(tasks=("tyo",)))
    assert "toy" in caught.value.hint
    with pytest.raises(CvlctlError, match="needs a criterion"):
        filter_episodes(a, out, Criteria())
    with pytest.raises(CvlctlError, match="no label 'human'"):
        filter_episodes(a, out, Criteria(success=True, label="human"))
    assert names(tmp_path) == ["a.zarr"]
