"""Labels of one's own: from a rule, a file, a labeller or a run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from toy_stores import labelled_store, names, numbered_store

from cvlctl.data.examples import examples
from cvlctl.data.store import open_store
from cvlctl.data.transform import drop_rewards, subsample
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import labellers
from cvlctl.learn.finetune import finetune
from cvlctl.learn.label import label_store

pytestmark = pytest.mark.usefixtures("no_fsync", "small_chunks")


@pytest.fixture
def a(tmp_path: Path) -> Path:
    return numbered_store(tmp_path / "a.zarr")


def test_label(a: Path, tmp_path: Path) -> None:
    labelled = labelled_store(a, tmp_path / "labelled.zarr")
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


def test_label_by_a_labeller_and_from_a_run(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `finetune` learned with rewards: oril, and what the same labeller learns here, are one and the same."""
    small = {"steps": 500, "hidden": [64]}
    monkeypatch.setattr(labellers, "Config", partial(labellers.Config, steps=500, hidden=(64,)))  # label's own defaults
    found = examples(a, tmp_path / "x.npy", num=1000)
    label_store(a, "oril", tmp_path / "b.zarr", rewards="oril", examples=tmp_path / "x.npy", seed=1)
    recipe = {
        "stores": [{"path": str(a), "rewards": "oril"}], "algorithm": {"name": "td3_bc", "hidden": [8]}, "steps": 2,
        "success_examples": {"from": str(a), "num": 1000}, "seeds": [1], "out": str(tmp_path / "run"),
        "batch_size": 8, "threads": 1, "compile": False, "labeller": small,
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
