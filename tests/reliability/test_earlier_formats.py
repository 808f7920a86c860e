"""What an earlier version wrote (`tests/fixtures/earlier.tar.gz`) is read, verified, resumed and finished for ever."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from reliability.driver import Runner

import cvlctl
from cvlctl import checkpoints
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.runs import read_metrics, read_run
from cvlctl.score.rows import read_rows

# content, whoever wrote it: these digests hold for ever
DIGESTS = {
    "a": "cae096405626e1da3e8359ed418abb33470cd664b9a0096cca706e9c3b73b38e",
    "b": "418110ec9ea326dadd55f2f07e850b8fc14e26d97be527903d1e5765bff0d18f",
    "labelled": "cae096405626e1da3e8359ed418abb33470cd664b9a0096cca706e9c3b73b38e",
    "pixels": "1f4e3c73f63a09c7d376a0330d52819a7eba0dc3a41ce0afbf8037e5ba2bf1a8",
    "whole": "a2fa7db2f7358d8d06dbb7e9a24cd7a5f6f41d62a0e8bbd0909f50f662aa7c51",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(Path(__file__).parents[1] / "fixtures" / "earlier.tar.gz") as file:
        file.extractall(folder, filter="data")
    return folder


@pytest.fixture
def earlier(archive: Path, tmp_path: Path) -> Path:
    return shutil.copytree(archive, tmp_path / "earlier")


@pytest.mark.parametrize("name", ["a", "b", "labelled", "pixels", "whole"])
def test_stores_are_sound(archive: Path, name: str) -> None:
    store = open_store(archive / f"{name}.zarr")
    assert verify_store(store.path) == []
    assert store.digest() == DIGESTS[name]
    assert len(list(store.episodes())) == store.num_episodes


def test_labels_and_examples(archive: Path) -> None:
    store = open_store(archive / "labelled.zarr")
    assert store.labels == ["given", "zero"]
    assert store.digest() == DIGESTS["a"] and not store.rewards("zero").any()
    assert store.label_digest() == open_store(archive / "a.zarr").label_digest()
    assert np.load(archive / "last.npz")["observations"].shape == (3, 3)


@pytest.mark.parametrize(
    ("line", "finished"),
    [
        ("build-dataset random.yaml out=a.zarr", "a.zarr"),
        ("build-dataset sac.yaml out=whole.zarr", "whole.zarr"),
        ("pretrain pretrain.yaml out=critic", "critic"),
        ("finetune bc.yaml", "policy"),
        ("finetune oril.yaml out=oril", "oril"),
        ("evaluate evaluate.yaml out=whole-scores", "whole-scores"),
    ],
)
def test_what_is_finished_is_found_finished(earlier: Path, runner: Runner, line: str, finished: str) -> None:
    before = {path: path.read_bytes() for path in (earlier / finished).rglob("*") if path.is_file()}
    result = runner(earlier, *line.split(), "--json")
    assert result["code"] == 0, result["err"]
    assert json.loads(result["out"])["status"] == "finished already"
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed in ([], ["evaluation.json"])  # whose tables have had a digest since


def test_a_collection_goes_on(earlier: Path, runner: Runner) -> None:
    result = runner(earlier, "build-dataset", "sac.yaml")
    assert result["code"] == 0, result["err"]
    assert "resuming at frame 10, episode 2" in result["err"]
    resumed, whole = (list(open_store(earlier / f"{name}.zarr").episodes()) for name in ("out", "whole"))
    assert len(resumed) == len(whole)
    for one, other in zip(resumed, whole, strict=True):
        np.testing.assert_allclose(one.observations, other.observations, rtol=1e-3, atol=1e-3)


def test_a_run_goes_on(earlier: Path, runner: Runner) -> None:
    result = runner(earlier, "pretrain", "pretrain.yaml")
    assert result["code"] == 0, result["err"]
    assert "resuming at step" in result["err"]
    resumed, whole = (
        checkpoints.load(earlier / name / "checkpoints" / "last.safetensors") for name in ("run", "critic")
    )
    assert resumed[1]["step"] == whole[1]["step"] == 3 and resumed[0].keys() == whole[0].keys()
    for name in resumed[0]:
        torch.testing.assert_close(resumed[0][name], whole[0][name], rtol=1e-3, atol=1e-5)
    assert [line["step"] for line in read_metrics(earlier / "run")] == [1, 2, 3]
    assert read_run(earlier / "run")["status"] == "finished"


def test_an_evaluation_goes_on(earlier: Path, runner: Runner) -> None:
    kept = read_rows(earlier / "scores" / "rows.jsonl")
    assert 0 < len(kept) < 4
    result = runner(earlier, "evaluate", "evaluate.yaml")
    assert result["code"] == 0, result["err"]
    assert f"{len(kept)} of 4 episodes are evaluated already" in result["err"]
    rows, whole = (read_rows(earlier / name / "rows.jsonl") for name in ("scores", "whole-scores"))
    assert [row.episode for row in rows] == [row.episode for row in whole]
    np.testing.assert_allclose(*([row.episode_return for row in found] for found in (rows, whole)), rtol=1e-3)


def test_a_merge_that_died_is_not_taken_for_nobodys(earlier: Path, runner: Runner) -> None:
    """Earlier versions did not mark what may be resumed: what is unfinished might be a collection's, and is kept."""
    merge = ("data", "merge", "a.zarr", "b.zarr", "--out", "merged.zarr")
    result = runner(earlier, *merge)
    assert result["code"] == 2 and "merged.zarr.partial holds 5 episodes" in result["err"]
    assert runner(earlier, *merge, "--force")["code"] == 0
    assert open_store(earlier / "merged.zarr").num_episodes == 5
    assert not (earlier / "merged.zarr.partial").exists()


def test_critics_and_policies_load(archive: Path) -> None:
    critic, policy = cvlctl.load_critic(archive / "critic", seed=1), cvlctl.load_policy(archive / "policy", seed=1)
    observations = open_store(archive / "a.zarr").observations()[:4]
    actions = policy(observations)
    assert actions.shape == (4, 1)
    ratio = critic.log_ratio(observations, actions, observations)
    assert ratio.shape == (4, 4) and np.isfinite(ratio).all()


def test_a_pretrained_run_is_gone_on_from(earlier: Path, runner: Runner) -> None:
    result = runner(earlier, "finetune", "cvl.yaml", "out=fine")
    assert result["code"] == 0, result["err"]
