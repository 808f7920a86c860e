"""Stores made of stores: merged, split, subsampled, without rewards; images and memory."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_stores import assert_holds, names, numbered, numbered_episodes

from cvlctl.data import writer as writer_module
from cvlctl.data.criteria import Criteria
from cvlctl.data.store import Store, open_store
from cvlctl.data.transform import drop_rewards, filter_episodes, in_words, merge, split, subsample
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.label import label_store
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync", "small_chunks")


# ---------------------------------------------------------------------------------------------------------------- merge


def test_merge_keeps_every_episode_as_it_was(a: Path, tmp_path: Path) -> None:
    b = write_store(
        tmp_path / "b.zarr", [*numbered_episodes(5, 20), *numbered_episodes(3, 40, task="other")], task="second"
    ).path
    result = merge([a, b], tmp_path / "c.zarr")
    store = open_store(tmp_path / "c.zarr")
    wanted = numbered_episodes(12) + [dataclasses.replace(e, task=e.task or "second") for e in open_store(b).episodes()]
    assert_holds(store, wanted)
    assert (store.task, store.task_names, store.spec.horizon) == ("toy + second", ["toy", "second", "other"], 20)
    assert json.loads(json.dumps(result)) == result
    assert (result["episodes"], result["labels"], result["labels_left_out"]) == (20, ["given"], [])
    named = merge([a, b], tmp_path / "d.zarr", task="both")
    assert open_store(named["path"]).task == "both"


def test_a_store_split_in_two_and_merged_has_the_same_digests(a: Path, tmp_path: Path) -> None:
    before = open_store(a)
    for name, low, high in (("x", None, 500), ("y", 500, None)):
        filter_episodes(a, tmp_path / f"{name}.zarr", Criteria(collected_from=low, collected_to=high))
    merge([tmp_path / "x.zarr", tmp_path / "y.zarr"], tmp_path / "z.zarr")
    after = open_store(tmp_path / "z.zarr")
    assert after.digest() == before.digest() and after.label_digest() == before.label_digest()


def test_merge_keeps_the_labels_that_all_have_and_says_so(labelled: Path, a: Path, tmp_path: Path) -> None:
    result = merge([labelled, a], tmp_path / "c.zarr")
    assert result["labels"] == ["given"]
    assert result["labels_left_out"] == ["labels/sparse/reward", "labels/zero/reward"]
    assert "left out" in in_words(result) and "labels/zero/reward" in in_words(result)
    both = merge([labelled, labelled], tmp_path / "d.zarr")
    assert both["labels"] == ["given", "sparse", "zero"] and verify_store(tmp_path / "d.zarr") == []
    sparse = open_store(labelled).rewards("sparse")
    np.testing.assert_array_equal(open_store(tmp_path / "d.zarr").rewards("sparse"), np.tile(sparse, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Episode(np.zeros((3, 4)), np.zeros((2, 2))), r"observations of shape \(4,\) and 2 action"),
        (Episode(np.zeros((3, 3)), np.zeros((2, 1))), r"observations of shape \(3,\) and 1 action"),
        (
            Episode(np.zeros((3, 1, 3), np.uint8), np.zeros((2, 2))),
            r".* camera pixels \(1, 3, 1\), and",
        ),
    ],
)
def test_stores_that_do_not_fit_are_one_clear_error(a: Path, tmp_path: Path, other: Episode, message: str) -> None:
    b = write_store(tmp_path / "b.zarr", [other], task="toy").path
    with pytest.raises(CvlctlError, match=rf"b\.zarr has {message}.* but .*a\.zarr has observations of shape \(3,\)"):
        merge([a, b], tmp_path / "c.zarr")
    assert names(tmp_path) == ["a.zarr", "b.zarr"]
    with pytest.raises(CvlctlError, match="two stores"):
        merge([a], tmp_path / "c.zarr")


# ----------------------------------------------------------------------------------------------------- parts of a store


def test_split_is_by_episode_seeded_and_complete(a: Path, tmp_path: Path) -> None:
    result = split(a, train=0.75, seed=3)
    train, validation = (open_store(result[name]["path"]) for name in ("train", "validation"))
    assert [train.path.name, validation.path.name] == ["a-train.zarr", "a-validation.zarr"]
    assert (train.num_episodes, validation.num_episodes) == (9, 3)
    seeds = [store.seeds().tolist() for store in (train, validation)]
    assert sorted(seeds[0] + seeds[1]) == list(range(12)) and all(x == sorted(x) for x in seeds)
    for store, numbers in zip((train, validation), seeds, strict=True):
        assert_holds(store, [numbered_episodes(12)[i] for i in numbers])
    again = split(a, train=0.75, seed=3, out=tmp_path / "again")
    other = split(a, train=0.75, seed=4, out=tmp_path / "other")
    assert again["validation"]["digest"] == result["validation"]["digest"] != other["validation"]["digest"]
    assert split(a, train=0.999, out=tmp_path / "most")["validation"]["episodes"] == 1


def test_split_writes_both_or_none(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "a-validation.zarr", numbered_episodes(2), task="mine")
    with pytest.raises(CvlctlError, match=r"a-validation\.zarr exists"):
        split(a)
    assert names(tmp_path) == ["a-validation.zarr", "a.zarr"]
    shutil.rmtree(tmp_path / "a-validation.zarr")
    finish, calls = StoreWriter.finish, []

    def fails_second(self: StoreWriter, **extra: Any) -> Store:
        calls.append(self.path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return finish(self, **extra)

    monkeypatch.setattr(StoreWriter, "finish", fails_second)
    with pytest.raises(KeyboardInterrupt):
        split(a)
    assert len(calls) == 2 and names(tmp_path) == ["a.zarr"]


def test_split_refuses_nonsense(a: Path, tmp_path: Path) -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(CvlctlError, match="no share"):
            split(a, train=share)
    one = write_store(tmp_path / "one.zarr", numbered_episodes(1), task="toy").path
    with pytest.raises(CvlctlError, match="one episode"):
        split(one)
    with pytest.raises(CvlctlError, match="negative"):
        split(a, seed=-1)


def test_subsample(a: Path, tmp_path: Path) -> None:
    result = subsample(a, tmp_path / "b.zarr", episodes=5, seed=1)
    store = open_store(tmp_path / "b.zarr")
    assert_holds(store, [numbered_episodes(12)[i] for i in store.seeds().tolist()])
    assert (result["episodes"], result["of_episodes"]) == (5, 12)
    assert subsample(a, tmp_path / "c.zarr", fraction=0.4, seed=1)["digest"] == store.digest()
    assert subsample(a, tmp_path / "d.zarr", episodes=5, seed=2)["digest"] != store.digest()
    assert subsample(a, tmp_path / "e.zarr", fraction=1.0)["digest"] == open_store(a).digest()
    assert subsample(a, tmp_path / "f.zarr", fraction=1e-9)["episodes"] == 1
    wrong: list[dict[str, Any]] = [{}, {"episodes": 3, "fraction": 0.5}, {"episodes": 0}, {"episodes": 13}]
    for options in [*wrong, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": float("nan")}]:
        with pytest.raises(CvlctlError):
            subsample(a, tmp_path / "g.zarr", **options)
    assert not (tmp_path / "g.zarr").exists()


def test_drop_rewards(labelled: Path, tmp_path: Path) -> None:
    drop_rewards(labelled, tmp_path / "b.zarr")
    store = open_store(tmp_path / "b.zarr")
    assert store.labels == [] and not (store.path / "labels").exists() and verify_store(store.path) == []
    assert store.digest() == open_store(labelled).digest()
    assert drop_rewards(labelled, tmp_path / "c.zarr", labels=["given"])["labels"] == ["sparse", "zero"]
    with pytest.raises(CvlctlError, match="no label 'x'") as caught:
        drop_rewards(labelled, tmp_path / "d.zarr", labels=["x"])
    assert "given, sparse, zero" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------- of any size


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=2, max_size=6),
    chunk=st.integers(7, 50),
    parent_chunk=st.integers(7, 50),
)
def test_chunks_and_labels_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: list[int], chunk: int, parent_chunk: int
) -> None:
    for path in tmp_path.iterdir():
        shutil.rmtree(path)
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", parent_chunk)
    source = write_store(tmp_path / "a.zarr", [numbered(i, n) for i, n in enumerate(lengths)], task="toy")
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", chunk)
    copied = open_store(label_store(source.path, "x", tmp_path / "b.zarr", rewards="given")["path"])
    assert verify_store(copied.path) == [] and copied.digest() == source.digest()
    assert copied.label_digest() == source.label_digest()
    np.testing.assert_array_equal(copied.rewards("x"), source.rewards())
    sizes = {zarr.open_array(copied.path / name, mode="r").chunks[0] for name in ("data/action", "labels/x/reward")}
    assert sizes == {min(chunk, len(source.rewards()))}


def test_memory_stays_flat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty times the data, the same peak: a few chunks."""
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 1000)
    peaks = []
    for count in (20, 400):
        items = (Episode(np.full((101, 50), i), np.zeros((100, 2)), np.zeros(100)) for i in range(count))
        source = write_store(tmp_path / f"a{count}.zarr", items, task="toy").path
        tracemalloc.start()
        filter_episodes(source, tmp_path / f"b{count}.zarr", Criteria(min_return=-1.0))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    data = 400 * 101 * 50 * 4
    assert peaks[1] < 1.5 * peaks[0] + 500_000 and peaks[1] < data / 2, peaks


def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "FRAME_BYTES", 7 * 48)
    images = np.random.default_rng(0).integers(0, 255, (3, 11, 4, 4, 3), np.uint8)
    source = write_store(tmp_path / "a.zarr", [Episode(x, np.zeros((10, 1)), np.ones(10)) for x in images], task="toy")
    copied = open_store(label_store(source.path, "x", tmp_path / "b.zarr", rewards="zeros")["path"])
    assert verify_store(copied.path) == [] and copied.digest() == source.digest() and copied.labels == ["given", "x"]
    assert copied.images("pixels").dtype == np.uint8
    assert zarr.open_array(copied.path / "data/images/pixels", mode="r").chunks == (7, 4, 4, 3)
