"""Stores made of stores: what is kept, what is recorded, and that nothing half-written ever stays."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvlctl import files
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import writer as writer_module
from cvlctl.data.criteria import Criteria
from cvlctl.data.examples import examples
from cvlctl.data.store import Store, open_store
from cvlctl.data.transform import drop_rewards, filter_episodes, in_words, merge, split, subsample
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.finetune import finetune
from cvlctl.learn.label import label_store
from cvlctl.types import Episode

ARRAYS = ("observations", "actions", "rewards", "successes")


def episode(seed: int, length: int, task: str = "", width: int = 3) -> Episode:
    rng = np.random.default_rng(seed)
    successes = np.arange(length) == (length - 1 if seed % 2 else -1)  # odd seeds succeed
    return Episode(
        rng.normal(size=(length + 1, width)), rng.uniform(-1, 1, (length, 2)), np.full(length, float(seed)), successes,
        seed % 3 == 0, task, 100 * seed, seed,
    )  # fmt: skip


def many(count: int, first: int = 0, task: str = "") -> list[Episode]:
    return [episode(i, 1 + (5 * i) % 11, task) for i in range(first, first + count)]


def assert_same(found: Store, wanted: list[Episode], task: str = "toy") -> None:
    assert verify_store(found.path) == []
    assert found.num_episodes == len(wanted)
    for a, b in zip(found.episodes(), wanted, strict=True):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        assert (a.terminated, a.collected_at, a.seed, a.task) == (b.terminated, b.collected_at, b.seed, b.task or task)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def call(*args: str | Path) -> int:
    return execute(app.app, [str(arg) for arg in args])


@pytest.fixture(autouse=True)
def _fast_and_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is lost here, so nothing is synced; chunks of 20 rows, so that every store has several."""
    monkeypatch.setattr(files, "sync", lambda _: None)
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 20)


@pytest.fixture
def a(tmp_path: Path) -> Path:
    provenance = {"recipe": {"steps": 3}, "environment": {"mujoco": "3.3.0"}, "seeds": [0]}
    return write_store(tmp_path / "a.zarr", many(12), task="toy", horizon=20, provenance=provenance).path


@pytest.fixture
def labelled(a: Path, tmp_path: Path) -> Path:
    """A store with three labels: given, sparse (rewards alone) and zero."""
    label_store(a, "sparse", tmp_path / "x.zarr", rewards="successes")
    label_store(tmp_path / "x.zarr", "zero", tmp_path / "labelled.zarr", rewards="zeros")
    shutil.rmtree(tmp_path / "x.zarr")
    return tmp_path / "labelled.zarr"


# --------------------------------------------------------------------------------------------------------------- merge


def test_merge_keeps_every_episode_as_it_was(a: Path, tmp_path: Path) -> None:
    b = write_store(tmp_path / "b.zarr", [*many(5, 20), *many(3, 40, task="other")], task="second").path
    result = merge([a, b], tmp_path / "c.zarr")
    store = open_store(tmp_path / "c.zarr")
    wanted = many(12) + [dataclasses.replace(e, task=e.task or "second") for e in open_store(b).episodes()]
    assert_same(store, wanted)
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
        (Episode(np.zeros((3, 1, 3), np.uint8), np.zeros((2, 2))), "pixels of shape"),
    ],
)
def test_stores_that_do_not_fit_are_one_clear_error(a: Path, tmp_path: Path, other: Episode, message: str) -> None:
    b = write_store(tmp_path / "b.zarr", [other], task="toy").path
    with pytest.raises(CvlctlError, match=rf"b\.zarr has {message}.* but .*a\.zarr has observations of shape \(3,\)"):
        merge([a, b], tmp_path / "c.zarr")
    assert names(tmp_path) == ["a.zarr", "b.zarr"]
    with pytest.raises(CvlctlError, match="two stores"):
        merge([a], tmp_path / "c.zarr")


# ------------------------------------------------------------------------------------------------- parts of a store


def test_split_is_by_episode_seeded_and_complete(a: Path, tmp_path: Path) -> None:
    result = split(a, train=0.75, seed=3)
    train, validation = (open_store(result[name]["path"]) for name in ("train", "validation"))
    assert [train.path.name, validation.path.name] == ["a-train.zarr", "a-validation.zarr"]
    assert (train.num_episodes, validation.num_episodes) == (9, 3)
    seeds = [store.seeds().tolist() for store in (train, validation)]
    assert sorted(seeds[0] + seeds[1]) == list(range(12)) and all(x == sorted(x) for x in seeds)
    for store, numbers in zip((train, validation), seeds, strict=True):
        assert_same(store, [many(12)[i] for i in numbers])
    again = split(a, train=0.75, seed=3, out=tmp_path / "again")
    other = split(a, train=0.75, seed=4, out=tmp_path / "other")
    assert again["validation"]["digest"] == result["validation"]["digest"] != other["validation"]["digest"]
    assert split(a, train=0.999, out=tmp_path / "most")["validation"]["episodes"] == 1


def test_split_writes_both_or_none(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "a-validation.zarr", many(2), task="mine")
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
    one = write_store(tmp_path / "one.zarr", many(1), task="toy").path
    with pytest.raises(CvlctlError, match="one episode"):
        split(one)
    with pytest.raises(CvlctlError, match="negative"):
        split(a, seed=-1)


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
    episodes = [*many(8), *many(6, 8, task="other")]
    source = write_store(tmp_path / "a.zarr", episodes, task="toy").path
    result = filter_episodes(source, tmp_path / "b.zarr", criteria)
    wanted = [e for e in episodes if passes(e)]
    assert_same(open_store(tmp_path / "b.zarr"), wanted)
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


def test_subsample(a: Path, tmp_path: Path) -> None:
    result = subsample(a, tmp_path / "b.zarr", episodes=5, seed=1)
    store = open_store(tmp_path / "b.zarr")
    assert_same(store, [many(12)[i] for i in store.seeds().tolist()])
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


# -------------------------------------------------------------------------------------------------------------- labels


def test_drop_rewards(labelled: Path, tmp_path: Path) -> None:
    drop_rewards(labelled, tmp_path / "b.zarr")
    store = open_store(tmp_path / "b.zarr")
    assert store.labels == [] and not (store.path / "labels").exists() and verify_store(store.path) == []
    assert store.digest() == open_store(labelled).digest()
    assert drop_rewards(labelled, tmp_path / "c.zarr", labels=["given"])["labels"] == ["sparse", "zero"]
    with pytest.raises(CvlctlError, match="no label 'x'") as caught:
        drop_rewards(labelled, tmp_path / "d.zarr", labels=["x"])
    assert "given, sparse, zero" in caught.value.hint


def test_label(a: Path, labelled: Path, tmp_path: Path) -> None:
    store, source = open_store(labelled), open_store(a)
    assert verify_store(labelled) == [] and store.digest() == source.digest()
    assert store.label_digest("given") == source.label_digest("given")
    np.testing.assert_array_equal(store.rewards("sparse"), source.successes().astype(np.float32))
    assert not store.rewards("zero").any() and store.rewards("zero").shape == source.rewards().shape
    label_store(labelled, "copy", tmp_path / "c.zarr", rewards="sparse")
    np.testing.assert_array_equal(open_store(tmp_path / "c.zarr").rewards("copy"), store.rewards("sparse"))


def test_label_from_a_file(a: Path, tmp_path: Path) -> None:
    source, file = open_store(a), tmp_path / "r.npy"
    rng = np.random.default_rng(0)
    steps = np.ones(len(source.rewards()), bool)
    steps[source.episode_ends() - 1] = False
    values = rng.normal(size=source.num_transitions)
    expected = np.zeros(len(steps), np.float32)
    expected[steps] = values
    for saved in (values, np.where(steps, expected, 9.0)):  # one a transition; one a row, with whatever in padding
        np.save(file, saved)
        label_store(a, "mine", tmp_path / "b.zarr", rewards=str(file), force=True)
        np.testing.assert_array_equal(open_store(tmp_path / "b.zarr").rewards("mine"), expected)
    bad = [values[:-1], values.astype(str), np.where(values > 0, np.nan, values), values * 1e300]
    for saved in bad:
        np.save(file, saved)
        with pytest.raises(CvlctlError):
            label_store(a, "mine", tmp_path / "c.zarr", rewards=str(file))
    np.save(file, np.array([{}] * len(values)), allow_pickle=True)
    with pytest.raises(CvlctlError, match="cannot be read"):
        label_store(a, "mine", tmp_path / "c.zarr", rewards=str(file))
    with pytest.raises(CvlctlError, match="no file"):
        label_store(a, "mine", tmp_path / "c.zarr", rewards="nowhere.npy")
    assert names(tmp_path) == ["a.zarr", "b.zarr", "r.npy"]


def test_label_by_a_labeller_and_from_a_run(a: Path, tmp_path: Path) -> None:
    """What `finetune` learned with rewards: oril, and what the same labeller learns here, are one and the same."""
    found = examples(a, tmp_path / "x.npy", num=1000)
    label_store(a, "oril", tmp_path / "b.zarr", rewards="oril", examples=tmp_path / "x.npy", seed=1)
    recipe = {
        "stores": [{"path": str(a), "rewards": "oril"}], "algorithm": {"name": "td3_bc", "hidden": [8]}, "steps": 2,
        "success_examples": {"from": str(a), "num": 1000}, "seeds": [1], "out": str(tmp_path / "run"),
        "batch_size": 8, "threads": 1, "compile": False,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    finetune(load(tmp_path / "r.yaml"))
    label_store(a, "oril", tmp_path / "c.zarr", rewards=str(tmp_path / "run"), seed=1)
    here, there = (open_store(tmp_path / name).rewards("oril") for name in ("b.zarr", "c.zarr"))
    np.testing.assert_allclose(here, there, atol=0.03)  # matmul settings differ between the two
    store = open_store(a)
    final, flags = store.episode_ends() - 1, store.successes()
    assert not here[final].any()
    steps = np.setdiff1d(np.arange(len(here)), final)
    assert here[steps][flags[steps]].mean() > here[steps][~flags[steps]].mean()
    assert found["examples"] == flags.sum()
    with pytest.raises(CvlctlError, match="has no seed 7"):
        label_store(a, "z", tmp_path / "d.zarr", rewards=str(tmp_path / "run"), seed=7)
    with pytest.raises(CvlctlError, match="from success examples"):
        label_store(a, "z", tmp_path / "d.zarr", rewards="purl")
    subsample(a, tmp_path / "e.zarr", episodes=3)
    with pytest.raises(CvlctlError, match="holds no rewards of"):
        label_store(tmp_path / "e.zarr", "z", tmp_path / "f.zarr", rewards=str(tmp_path / "run"), seed=1)


def test_label_refuses_nonsense(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.zarr"
    for name in ("given", "", "../up", "a/b", ".hidden", "ünï"):
        with pytest.raises(CvlctlError, match="already" if name == "given" else "plain name"):
            label_store(a, name, out, rewards="zeros")
    with pytest.raises(CvlctlError, match="no label 'nope'"):
        label_store(a, "x", out, rewards="nope")
    free = drop_rewards(a, tmp_path / "free.zarr")["path"]
    with pytest.raises(CvlctlError, match="no label 'given' with a success array"):
        label_store(Path(free), "x", out, rewards="successes")
    assert names(tmp_path) == ["a.zarr", "free.zarr"]


# ------------------------------------------------------------------------------------------------------------ examples


def test_examples_by_rule_are_those_of_a_recipe(a: Path, tmp_path: Path) -> None:
    store, out = open_store(a), tmp_path / "x.npy"
    result = examples(a, out)
    rows = np.flatnonzero(store.successes()) + 1
    np.testing.assert_array_equal(np.load(out), store.observations()[rows])
    assert result == {"status": "written", "path": str(out), "examples": 6, "shape": [6, 3]}
    examples(a, out, rule="last", k=2, num=100, force=True)
    assert len(np.load(out)) == sum(min(2, length) for length in store.lengths())
    examples(a, out, rule="last", num=4, force=True)
    assert len(np.load(out)) == 4


def test_examples_by_frame(a: Path, tmp_path: Path) -> None:
    episodes, out = many(12), tmp_path / "x.npz"
    examples(a, out, picks=["3:0", "1:-1", "0:1", "7:2"])
    with np.load(out, allow_pickle=False) as found:
        wanted = [episodes[3].observations[0], episodes[1].observations[-1], episodes[0].observations[1]]
        np.testing.assert_array_equal(found["observations"], [*wanted, episodes[7].observations[2]])
        origin = json.loads(str(found["provenance"]))
    assert origin["parents"] == [{"path": str(a), "digest": open_store(a).digest()}]
    assert "--pick 3:0" in origin["command"]
    for pick in ("12:0", "-1:0", "0:2", "0:-3", "x", "1:2:3", "1"):
        with pytest.raises(CvlctlError, match=f"--pick {pick}"):
            examples(a, tmp_path / "y.npy", picks=[pick])


def test_examples_that_finetune_reads(a: Path, tmp_path: Path) -> None:
    from cvlctl.data.examples import success_examples
    from cvlctl.data.recipe import SuccessExamples

    for name in ("x.npy", "x.npz"):
        examples(a, tmp_path / name)
        source = SuccessExamples.model_validate({"file": tmp_path / name})
        assert success_examples(source, open_store(a).spec).shape == (6, 3)


def test_examples_refuse_to_overwrite(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npy"
    out.write_text("mine")
    with pytest.raises(CvlctlError, match=r"x\.npy exists"):
        examples(a, out)
    with pytest.raises(CvlctlError, match=r"\.npy or a \.npz"):
        examples(a, tmp_path / "x.txt")
    (tmp_path / "d.npy").mkdir()
    with pytest.raises(CvlctlError, match=r"d\.npy exists"):
        examples(a, tmp_path / "d.npy", force=True)
    assert out.read_text() == "mine" and names(tmp_path) == ["a.zarr", "d.npy", "x.npy"]
    assert examples(a, out, force=True)["examples"] == 6


# --------------------------------------------------------------------------------------------------- what is recorded


def test_every_derived_store_records_its_parents_and_the_command(a: Path, tmp_path: Path) -> None:
    b = write_store(tmp_path / "b.zarr", many(3, 30), task="toy", provenance={"environment": {"mujoco": "3.7.0"}}).path
    store = open_store(merge([a, b], tmp_path / "my c.zarr")["path"])
    parents = store.provenance["parents"]
    assert [parent["path"] for parent in parents] == [str(a), str(b)]
    assert [parent["digest"] for parent in parents] == [open_store(path).digest() for path in (a, b)]
    assert parents[0]["labels"] == {"given": open_store(a).label_digest()}
    assert parents[0]["provenance"]["recipe"] == {"steps": 3}
    assert "environment" not in store.provenance and "recipe" not in store.provenance  # the parents disagree
    assert shlex.split(store.provenance["command"]) == [
        "cvlctl", "data", "merge", str(a), str(b), "--out", str(tmp_path / "my c.zarr")
    ]  # fmt: skip
    small = open_store(subsample(a, tmp_path / "d.zarr", episodes=3)["path"])
    assert small.provenance["environment"] == {"mujoco": "3.3.0"} and small.provenance["seeds"] == [0]
    grandchild = open_store(drop_rewards(small.path, tmp_path / "e.zarr")["path"])
    assert grandchild.provenance["parents"][0]["provenance"]["parents"][0]["path"] == str(a)


def test_the_recorded_command_does_it_again(a: Path, tmp_path: Path) -> None:
    results = [
        split(a, train=0.5, seed=2, out=tmp_path / "s")["train"],
        filter_episodes(a, tmp_path / "f.zarr", Criteria(min_return=2.5, success=False, tasks=("toy",))),
        subsample(a, tmp_path / "n.zarr", fraction=0.5, seed=7),
        drop_rewards(a, tmp_path / "d.zarr", labels=["given"]),
        label_store(a, "x", tmp_path / "l.zarr", rewards="zeros"),
        merge([a, a], tmp_path / "m.zarr", task="two words"),
    ]
    for result in results:
        first = open_store(result["path"])
        command = shlex.split(first.provenance["command"])
        assert command[0] == "cvlctl" and call(*command[1:], "--force", "--quiet") == 0
        second = open_store(result["path"])
        assert second.provenance["command"] == first.provenance["command"] and second.digest() == first.digest()
        assert [second.label_digest(x) for x in second.labels] == [first.label_digest(x) for x in first.labels]


def test_extra_attributes_stay_where_the_parents_agree(tmp_path: Path) -> None:
    paths = []
    for name, collector in (("a", "sac"), ("b", "random")):
        with StoreWriter(tmp_path / f"{name}.zarr", task="toy") as writer:
            writer.append(episode(1, 3))
            paths.append(writer.finish(collector=collector, reference_scores={"max": 2}).path)
    alone = open_store(subsample(paths[0], tmp_path / "c.zarr", episodes=1)["path"])
    assert alone.attributes["collector"] == "sac"
    both = open_store(merge(paths, tmp_path / "d.zarr")["path"])
    assert both.attributes["reference_scores"] == {"max": 2} and "collector" not in both.attributes
    assert [parent["attributes"]["collector"] for parent in both.provenance["parents"]] == ["sac", "random"]


# ------------------------------------------------------------------------------------------------ nothing half-written


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
    source = write_store(tmp_path / "a.zarr", [episode(i, n) for i, n in enumerate(lengths)], task="toy")
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", chunk)
    copied = open_store(label_store(source.path, "x", tmp_path / "b.zarr", rewards="given")["path"])
    assert verify_store(copied.path) == [] and copied.digest() == source.digest()
    assert copied.label_digest() == source.label_digest()
    np.testing.assert_array_equal(copied.rewards("x"), source.rewards())
    sizes = {zarr.open_array(copied.path / name, mode="r").chunks[0] for name in ("data/action", "labels/x/reward")}
    assert sizes == {min(chunk, len(source.rewards()))}


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (StoreWriter, "append", 0),
        (StoreWriter, "append", 5),
        (StoreWriter, "append", 11),
        (StoreWriter, "_write", 1),  # chunks of episodes or of labels
        (StoreWriter, "_write", 4),
        (writer_module, "_checksum", 3),
    ],
)
def test_an_interruption_leaves_no_trace_and_says_so(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    where: Any, name: str, calls: int,
) -> None:  # fmt: skip
    before = subsample(a, tmp_path / "b.zarr", episodes=2)["digest"]
    work, done = getattr(where, name), 0

    def stopped(*args: Any) -> Any:
        nonlocal done
        if done == calls:
            raise KeyboardInterrupt
        done += 1
        return work(*args)

    commands: list[list[str | Path]] = [
        ["merge", a, a, "--out", tmp_path / "c.zarr"],
        ["filter", a, "--out", tmp_path / "b.zarr", "--force", "--min-length", "1", "--quiet"],
        ["label", a, "new", "--rewards", "zeros", "--out", tmp_path / "c.zarr", "--json"],
        ["split", a],
    ]
    monkeypatch.setattr(where, name, stopped)
    for command in commands:
        done = 0
        assert call("data", *command) == 130
        assert done == calls
        assert names(tmp_path) == ["a.zarr", "b.zarr"] and open_store(tmp_path / "b.zarr").digest() == before
        assert "nothing was written: the same command starts over" in capsys.readouterr().err
    monkeypatch.setattr(where, name, work)
    for command in commands[:2]:
        assert call("data", *command) == 0
        assert "nothing was written" not in capsys.readouterr().err


def test_nothing_is_replaced_unless_forced(a: Path, tmp_path: Path) -> None:
    out = write_store(tmp_path / "b.zarr", many(2), task="mine").path
    commands: list[Callable[[bool], Any]] = [
        lambda force: merge([a, a], out, force=force),
        lambda force: filter_episodes(a, out, Criteria(min_length=3), force=force),
        lambda force: subsample(a, out, episodes=4, force=force),
        lambda force: drop_rewards(a, out, force=force),
        lambda force: label_store(a, "x", out, rewards="zeros", force=force),
    ]
    before = open_store(out).provenance
    for command in commands:
        with pytest.raises(CvlctlError, match=r"b\.zarr exists") as caught:
            command(False)
        assert "--force" in caught.value.hint and open_store(out).provenance == before
    for command in commands:
        command(True)
        assert verify_store(out) == []
    assert names(tmp_path) == ["a.zarr", "b.zarr"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        subsample(a, tmp_path / "thesis", episodes=4, force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


def test_a_store_may_replace_its_parent(a: Path) -> None:
    digest = open_store(a).digest()
    filter_episodes(a, a, Criteria(success=True), force=True)
    assert_same(open_store(a), [e for e in many(12) if e.seed % 2])
    assert open_store(a).provenance["parents"][0]["digest"] == digest


def test_a_second_writer_is_refused_and_harms_nothing(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.zarr"
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from cvlctl.data import transform
        from cvlctl.data.writer import StoreWriter
        append = StoreWriter.append
        def waits(self, episode):
            append(self, episode)
            if self.num_episodes == 2:
                print("half way", flush=True)
                sys.stdin.read()
        StoreWriter.append = waits
        transform.drop_rewards(Path({str(a)!r}), Path({str(out)!r}))
    """)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "half way\n"
        for force in (False, True):
            with pytest.raises(CvlctlError, match=r"another process is writing .*b\.zarr\.partial"):
                subsample(a, out, episodes=3, force=force)
        _, said = first.communicate("")
        assert first.returncode == 0, said
    store = open_store(out)
    assert verify_store(out) == [] and store.num_episodes == 12 and store.labels == []


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
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 7 * 48)
    images = np.random.default_rng(0).integers(0, 255, (3, 11, 4, 4, 3), np.uint8)
    source = write_store(tmp_path / "a.zarr", [Episode(x, np.zeros((10, 1)), np.ones(10)) for x in images], task="toy")
    copied = open_store(label_store(source.path, "x", tmp_path / "b.zarr", rewards="zeros")["path"])
    assert verify_store(copied.path) == [] and copied.digest() == source.digest() and copied.labels == ["given", "x"]
    assert copied.observations().dtype == np.uint8
    assert zarr.open_array(copied.path / "labels/x/reward", mode="r").chunks == (7,)


# ----------------------------------------------------------------------------------------------------------- bad input


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(("name", "file"), [("data/observation", "c/1/0"), ("labels/given/reward", "c/1")])
def test_a_damaged_parent_is_named_and_nothing_is_written(a: Path, tmp_path: Path, name: str, file: str) -> None:
    flip(a / name / file)
    with pytest.raises(CvlctlError, match=rf"a\.zarr: {name} chunk 1 \(rows 20-39\): checksum/crc fails") as caught:
        subsample(a, tmp_path / "b.zarr", fraction=1.0)
    assert "cvlctl data verify" in caught.value.hint
    assert names(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data/observation", np.nan, "NaN or infinity"),
        ("data/action", 2.0, r"actions outside \[-1, 1\]"),
        ("labels/given/reward", np.inf, "NaN or infinity"),
    ],
)
def test_bad_values_in_a_parent_are_not_handed_on(
    a: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    zarr.open_array(a / name, mode="r+")[30] = value
    with pytest.raises(CvlctlError, match=rf"a\.zarr: {name} chunk 1 \(rows 20-39\): {message}"):
        merge([a, a], tmp_path / "b.zarr")
    assert names(tmp_path) == ["a.zarr"]


def edit_root(path: Path, **changes: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] |= changes
    (path / "zarr.json").write_text(json.dumps(root))


def unfinished(path: Path) -> None:
    shutil.rmtree(path)
    with StoreWriter(path, task="toy") as writer:
        writer.append(episode(0, 3))
        writer.flush()


PARENTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: edit_root(path, version=2), "is a store of version 2; this cvlctl reads 1"),
    (unfinished, "is not finished: it is still being written"),
    (lambda path: (path / "zarr.json").write_text("{"), "is not a cvlctl store"),
    (lambda path: shutil.rmtree(path / "data/action"), "data/action: the array is missing"),
    (shutil.rmtree, "no store at"),
    (
        lambda path: edit_root(path, counts={"episodes": 12, "transitions": 60, "rows": 1}),
        "data/observation: is float32",
    ),
]


@pytest.mark.parametrize(("harm", "message"), PARENTS)
def test_parents_that_cannot_be_read(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], message: str
) -> None:
    b = tmp_path / "b.zarr"
    shutil.copytree(a, b)
    harm(b)
    before = names(tmp_path)
    for args in (
        ["merge", a, b, "--out", tmp_path / "c.zarr"],
        ["split", b],
        ["subsample", b, "--fraction", "0.5", "--out", tmp_path / "c.zarr"],
        ["examples", b, "--out", tmp_path / "c.npy"],
        ["plot", b, "--out", tmp_path / "c.png"],
        ["info", b],
    ):
        assert call("data", *args) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and "b.zarr" in err and "Traceback" not in err
    assert names(tmp_path) == before


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's powers, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_may_not_be_written_to() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_store(folder / "a.zarr", many(3), task="toy").path
        write_store(folder / "b.zarr", many(2), task="toy")
        folder.chmod(0o555)
        with nobody():
            for out, force in ((folder / "c.zarr", False), (folder / "b.zarr", True)):
                with pytest.raises(CvlctlError, match=r"cannot write .*\.partial: Permission denied") as caught:
                    subsample(source, out, episodes=2, force=force)
                assert "permissions" in caught.value.hint
            with pytest.raises(CvlctlError, match=r"cannot write .*x\.npy: Permission denied"):
                examples(source, folder / "x.npy", rule="last")
        folder.chmod(0o755)
        assert names(folder) == ["a.zarr", "b.zarr"] and verify_store(folder / "b.zarr") == []


def test_a_read_only_file_system(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CvlctlError, match=r"cannot write .*b\.zarr\.partial: Read-only file system") as caught:
        drop_rewards(a, tmp_path / "b.zarr")
    assert caught.value.hint == "choose another place" and names(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize("limit", [100, 1000, 3000])
def test_a_full_disk_leaves_the_parents_and_nothing_else(a: Path, tmp_path: Path, limit: int) -> None:
    """The kernel refuses to let any file grow further: at once, in a chunk, or in what is written last."""
    before = subsample(a, tmp_path / "b.zarr", episodes=2)["digest"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for out, force in ((tmp_path / "c.zarr", False), (tmp_path / "b.zarr", True)):
            with pytest.raises(CvlctlError, match=r"cannot write .*\.partial") as caught:
                merge([a, a], out, force=force)
            assert "free some space" in caught.value.hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["a.zarr", "b.zarr"] and open_store(tmp_path / "b.zarr").digest() == before
    assert verify_store(a) == [] and verify_store(tmp_path / "b.zarr") == []
    assert merge([a, a], tmp_path / "c.zarr")["episodes"] == 24


def test_a_disk_that_fills_up_while_labels_are_written(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = StoreWriter._write

    def full(self: StoreWriter, start: int, rows: dict[str, np.ndarray]) -> None:
        if any(name.startswith("labels/") for name in rows):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, start, rows)

    monkeypatch.setattr(StoreWriter, "_write", full)
    with pytest.raises(CvlctlError, match=r"cannot write .*b\.zarr\.partial: No space left"):
        merge([a, a], tmp_path / "b.zarr")
    assert names(tmp_path) == ["a.zarr"]
