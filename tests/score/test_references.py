"""`cvlctl references`: measured, kept beside a store, found again by evaluations of runs on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_robots

from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.play import envs
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.rollout import EVALUATION_SEED, collect_episode, outcome
from cvlctl.score import references
from cvlctl.score.evaluate import evaluate
from cvlctl.score.recipe import EvaluateRecipe

TASK, STORE = "py/robots.py:limited", Path("data/x.zarr")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("references")
    toy_robots.write(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        source = {"name": "random", "episodes": 12}
        build(BuildRecipe.model_validate({"task": TASK, "source": source, "out": STORE}))
        yield folder


def test_random_actions_are_zero_and_the_best_tenth_or_the_user_says_a_hundred() -> None:
    found = references.measure(TASK, store=STORE, episodes=3, workers=2)
    env = envs.make(TASK, EVALUATION_SEED, None, envs.named(TASK))
    played = [collect_episode(env, RandomPolicy(env.spec, EVALUATION_SEED, n), n) for n in range(3)]
    assert found["min"] == pytest.approx(np.mean([outcome(episode)[0] for episode in played]))
    assert found["random_success"] == np.mean([bool(outcome(episode)[1]) for episode in played])
    returns = sorted(outcome(episode)[0] for episode in open_store(STORE).episodes())
    assert found["max"] == pytest.approx(np.mean(returns[-2:])) and "the best 2 of 12" in found["source"]
    assert json.loads(Path("data/x.references.json").read_text())["tasks"][TASK]["max"] == found["max"]
    assert references.measure(TASK, store=STORE, episodes=3, high=5.0, workers=2)["max"] == 5.0
    with pytest.raises(CvlctlError, match="-500 is to be a score of 100"):
        references.measure(TASK, store=STORE, episodes=1, high=-500.0)
    assert references.beside(STORE, TASK, envs.named(TASK)) is not None
    assert references.beside(STORE, "another", None) is None
    assert references.beside(STORE, TASK, envs.named(TASK, {"success": "x"})) is None


@pytest.mark.parametrize("bad", [{"min": 1, "max": 0}, {"min": None, "max": 1}, {"min": "0", "max": 1}, 3])
def test_a_file_that_says_no_references(bad: Any, tmp_path: Path) -> None:
    known = bad | {"environment": {}} if isinstance(bad, dict) else bad
    (tmp_path / "x.references.json").write_text(json.dumps({"tasks": {"a": known}}))
    assert references.beside(tmp_path / "x.zarr", "a", None) is None


def test_evaluations_find_them(tmp_path: Path) -> None:
    plain = {"stores": [str(STORE)], "algorithm": {"name": "bc", "hidden": [4]}, "steps": 2, "batch_size": 4}
    finetune(FinetuneRecipe.model_validate({**plain, "seeds": [0], "out": "runs/x", "compile": "false"}))
    recipe = {"runs": ["runs/x"], "task": TASK, "episodes": 2, "workers": 0, "out": tmp_path / "scores"}
    Path("data/x.references.json").unlink(missing_ok=True)
    (row,) = evaluate(EvaluateRecipe.model_validate(recipe))["table"]
    assert row["normalised_runs"] is None
    references.measure(TASK, store=STORE, episodes=3, high=100.0, workers=2)
    known = references.beside(STORE, TASK, envs.named(TASK))
    (row,) = evaluate(EvaluateRecipe.model_validate(recipe))["table"]  # of the same rows
    assert known is not None
    assert row["normalised_runs"][0] == pytest.approx(100 * (row["return_mean"] - known["min"]) / (100 - known["min"]))
    (row,) = evaluate(EvaluateRecipe.model_validate(recipe | {"horizon": 5, "out": tmp_path / "short"}))["table"]
    assert row["normalised_runs"] is None
