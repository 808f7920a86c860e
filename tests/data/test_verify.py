"""Damage is named: by `verify`, and by whoever reads the damaged part."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from toy_stores import edit_root, flip, replace_array

from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [flip, damage_cut, damage_empty, damage_gone])
@pytest.mark.parametrize(("name", "file"), [("data/observation", "c/1/0"), ("labels/given/reward", "c/1")])
def test_a_damaged_chunk_is_named(written: Path, harm: Callable[[Path], None], name: str, file: str) -> None:
    harm(written / name / file)
    store = open_store(written)
    read = store.observations if name.startswith("data") else store.rewards
    with pytest.raises(CvlctlError, match=rf"{name} chunk 1 \(rows 20-39\): ") as caught:
        read()
    assert "cvlctl data verify" in caught.value.hint
    problems = verify_store(written)
    assert len(problems) == 1 and problems[0].startswith(f"{name} chunk 1 (rows 20-39): ")
    assert ("missing" if harm is damage_gone else "checksum/crc fails") in problems[0]


def test_every_damaged_chunk_is_listed(written: Path) -> None:
    flip(written / "data/action/c/0/0")
    flip(written / "data/action/c/2/0")
    damage_gone(written / "labels/given/success/c/0")
    assert [p.split(":")[0] for p in verify_store(written)] == [
        "data/action chunk 0 (rows 0-19)",
        "data/action chunk 2 (rows 40-59)",
        "labels/given/success chunk 0 (rows 0-19)",
    ]


def test_verify_finds_wrong_values_behind_sound_chunks(written: Path) -> None:
    store = open_store(written)
    actions, observations = store.actions().copy(), store.observations().copy()
    actions[25, 0], observations[45, 1] = 1.5, np.nan
    replace_array(written, "data/action", actions)
    replace_array(written, "data/observation", observations)
    problems = verify_store(written)
    assert "data/action chunk 1 (rows 20-39): actions outside [-1, 1]" in problems
    assert "data/observation chunk 2 (rows 40-59): NaN or infinity" in problems
    assert sum("recorded checksum" in p for p in problems) == 2 and len(problems) == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta/episode_ends", lambda x: np.where(np.arange(12) == 3, x[2] + 1, x), "episode 3 has fewer than 2 rows"),
        ("meta/episode_ends", lambda x: np.where(np.arange(12) == 11, x + 5, x), "the last episode ends at row"),
        ("meta/task", lambda x: x + 7, "indices outside the 1 task names"),
    ],
)
def test_verify_checks_the_episode_table(
    written: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    replace_array(written, name, change(open_store(written).array(name)))
    assert any(p.startswith(name) and message in p for p in verify_store(written))


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("data/observation", 30, np.nan, "NaN or infinity"),
        ("data/action", 30, -np.inf, "NaN or infinity"),
        ("data/action", 30, -1.5, r"actions outside \[-1, 1\]"),
        ("labels/given/reward", 30, np.inf, "NaN or infinity"),
        ("meta/episode_ends", 3, 1, "episode 3 has fewer than 2 rows"),
        ("meta/episode_ends", 0, 1, "episode 0 has fewer than 2 rows"),
        ("meta/episode_ends", 11, 10**6, "the last episode ends at row 1000000 of"),
        ("meta/task", 2, -1, "indices outside the 1 task names"),
    ],
)
def test_values_that_would_garble_training_are_refused_when_read(
    written: Path, name: str, row: int, value: float, message: str
) -> None:
    values = open_store(written).array(name).copy()
    values[row] = value
    replace_array(written, name, values)
    store = open_store(written)
    with pytest.raises(CvlctlError, match=f"{written}: {name}: {message}") as caught:
        list(store.episodes())
    assert f"cvlctl data verify {written}" in caught.value.hint
    if not name.startswith("labels/"):
        assert store.rewards().shape == (store.num_rows,)  # the others can still be read


def test_verify_checks_shapes_counts_and_lost_labels(written: Path) -> None:
    keep = (written / "zarr.json").read_text()
    edit_root(written, counts={**open_store(written).attributes["counts"], "transitions": 5})
    assert any("5 transitions recorded" in p for p in verify_store(written))
    (written / "zarr.json").write_text(keep)
    edit_root(written, spec={**open_store(written).attributes["spec"], "horizon": 2})
    assert any("horizon 2, but an episode has" in p for p in verify_store(written))
    (written / "zarr.json").write_text(keep)
    zarr.open_array(written / "labels/given/reward", mode="r+").resize((30,))
    assert any(p.startswith("labels/given/reward: is float32 (30,), expected") for p in verify_store(written))
    with pytest.raises(CvlctlError, match=r"labels/given/reward: is float32 \(30,\), expected"):
        open_store(written).rewards()
    shutil.rmtree(written / "labels/given/reward")
    assert verify_store(written) == ["labels/given/reward: the array is missing"]
