"""How much work a recipe is: its size in the plan's words, and an estimate. Each step's own recipe knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cvlctl.experiments import plan
from cvlctl.experiments.commands import STEPS, load
from cvlctl.experiments.graph import cells_of
from cvlctl.experiments.plan import plan as plan_of

SOURCES: list[tuple[dict[str, Any], str, int]] = [
    ({"name": "sac", "steps": 3_000}, "3,000 steps of SAC", 15),
    (
        {"name": "contrastive_ac", "steps": 2_000, "update_every": 4},
        "2,000 steps of contrastive actor-critic",
        5,
    ),
    ({"name": "contrastive_ac", "steps": 3_000, "gate": "none"}, "3,000 steps of contrastive actor-critic", 14),
    ({"name": "random", "transitions": 30_000}, "30,000 transitions", 8),
    ({"name": "scripted", "episodes": 2}, "2 episodes", 0),
    ({"name": "policy", "checkpoints": ["a", "b", "c"], "episodes": 20}, "60 episodes", 8),
    ({"name": "policy", "checkpoints": {"run": "a", "reaches": 0.5}, "transitions": 1}, "1 transition", 0),
    ({"name": "mix", "run": "a", "success_rate": 0.5, "episodes": 1}, "1 episode", 0),
    ({"name": "stores", "stores": ["a"]}, "episodes of 1 store", 10),
    ({"name": "stores", "stores": ["a", "b"]}, "episodes of 2 stores", 10),
]
METHODS = {"cvl": 39, "laeo": 31, "bc": 3, "td3_bc": 9, "cql": 124, "iql": 12, "goal_conditioned": 28,
           "successor_features": 21, "fqe": 9, "contrastive_ac": 31}  # fmt: skip


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # as where nothing was measured
    monkeypatch.setattr("cvlctl.recipes.values.num_cpus", lambda: 2)
    stages: dict[str, Any] = {
        f"data{n}": {"command": "build-dataset", "task": "gym/Hopper-v5", "source": source, "out": f"${{out}}/{n}.zarr"}
        for n, (source, _, _) in enumerate(SOURCES)
    }
    train = {"command": "finetune", "stores": ["a"], "steps": 1_000, "success_examples": {"from": "a"}}
    critic = {"hidden": [32, 16]}
    stages["pre"] = {"command": "pretrain", "stores": ["a"], "steps": 1_000, "critic": critic, "out": "${out}/pre"}
    stages["fine"] = {**train, "algorithm": "${method}", "seeds": [0, 1, 2], "out": "${out}/fine/${method}"}
    stages["on"] = {**train, "algorithm": "cvl", "init_from": "${out}/pre", "out": "${out}/fine/on"}
    stages["score"] = {"command": "evaluate", "runs": ["${out}/fine/*"], "checkpoints": "all", "episodes": 1,
                       "out": "${out}/score"}  # fmt: skip
    stages["earlier"] = {"command": "evaluate", "runs": ["other/*"], "out": "${out}/earlier"}
    whole = {"out": str(tmp_path / "e"), "matrix": {"method": list(METHODS)}, "stages": stages}
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    experiment = load(path, (), "run")
    return plan_of(cells_of(experiment.out, experiment.jobs))


def test_every_size_and_estimate(rows: list[dict[str, Any]]) -> None:
    found = {(row["stage"], row["combination"].get("method")): (row["size"], row["estimate_seconds"]) for row in rows}
    for n, (_, size, seconds) in enumerate(SOURCES):
        assert found[f"data{n}", None] == (size, seconds)
    for name, seconds in METHODS.items():
        assert found["fine", name] == ("1,000 steps x 3 seeds", seconds)
    assert found["pre", None] == ("1,000 steps x 1 seed", 1)
    size, seconds = found["on", None]
    assert size == "1,000 steps x 1 seed"
    assert seconds < METHODS["cvl"] / 3 - 1  # the pretrained critic is small
    assert found["score", None] == ("31 policies x 1 episode, every checkpoint", 2)
    assert found["earlier", None] == ("policies of earlier runs x 50 episodes", 2)


def test_the_plan_knows_no_size_of_a_step() -> None:
    text = Path(plan.__file__).read_text()
    assert not [key for key in ("hidden", "batch_size", "critic", "seeds", "source", "steps") if f".{key}" in text]
    assert len(STEPS) == 4
