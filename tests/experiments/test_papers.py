"""Recipes that reprint the papers: all sizes are planned whole, and a tiny form of each runs to its end."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvlctl.experiments.commands import load
from cvlctl.experiments.recipe import ExperimentRecipe
from cvlctl.experiments.run import run_experiment

ROOT = Path(__file__).parents[2]
PAPERS = sorted((ROOT / "recipes" / "papers").glob("*.yaml"))
SWEEP = ROOT / "recipes" / "sweeps" / "cvl.yaml"
REPLAY = Path("data/door-close-replay.zarr")  # the one that travels with the project
METAWORLD = {"frames": 300, "tasks": ["drawer-close-v3"], "episodes": 1}
# random actions succeed here from four starts in ten, untrained policies from some: a mix and its examples need both
CLOSING = {
    "name": "tiny", "task": "metaworld/drawer-close-v3", "horizon": 150,
    "source": {"name": "sac", "steps": 300, "policy_every_steps": 150},
}  # fmt: skip
LAEO = {"rollouts": 8, "tolerance": 1.0, "examples": 5}
TINY: dict[str, dict[str, Any]] = {  # what is not the same for all: values of the size
    "cvl-figure-2": {**METAWORLD, "tasks": [{"name": "drawer-close-v3", "related": "drawer-close-v3"}], "replay": 0},
    "cvl-figure-3": {**METAWORLD, "features": 16},
    "cvl-figure-8": {"frames": 1_050, "starts": 1_000, "q_updates": 3},
    "cvl-section-6.3": {
        **METAWORLD, "pretraining": 3, "tasks": ["drawer-close-v3", "door-close-v3", "reach-v3"],
        "targets": [{"name": "drawer-close-v3", "twin": "door-close-v3", "other": "reach-v3"}],
    },
    "cvl-table-1": {**METAWORLD, "pixels": 16, "encoder": "small", "stack": 2, "bank": 8},
    "cvl-tables-2-3-4": {"frames": 300, "policy_every": 100},
    "laeo-figure-3": LAEO,
    "laeo-figure-4": {**LAEO, "every": 2},
    "laeo-figure-5": LAEO,
    "laeo-images": {
        **LAEO, "encoder": "small", "qualities": [{"name": "medium", "success_rate": 0.475, "tolerance": 1.0}],
    },
    "laeo-figure-6-left": {**LAEO, "examples": [1, 200]},
    "laeo-figure-6-right": {
        **LAEO, "shown": 8, "amounts": [{"name": "0.1x", "episodes": 4, "tolerance": 1.0},
                                        {"name": "1x", "episodes": 8, "tolerance": 1.0}],
    },
    "proposal-offline-d4rl": {"frames": 300, "policy_every": 100, "curriculum": 2},
    "proposal-offline-metaworld": {**METAWORLD, "curriculum": 2},
    "proposal-online": {
        "tasks": ["gym/Pendulum-v1"], "frames": 260, "starts": 250, "every": 100, "curriculum": 2, "seeds": [0, 1],
    },
}  # fmt: skip
COMMON = {
    "updates": 3, "batch": 16, "others": 16, "hidden": [8], "seeds": [0], "threads": 1, "actions": 2,
    "data": "laeo", "observe": None, "cameras": {},
}  # fmt: skip


def tiny(path: Path) -> list[str]:
    """Overrides that make a paper's recipe run in seconds, all its stages, methods and kinds of data still there."""
    data = yaml.safe_load(path.read_text())
    keys = data["sizes"]["small"]
    values = {key: value for key, value in {**COMMON, **TINY[path.stem]}.items() if key in keys}
    found = [f"sizes.tiny={yaml.safe_dump(values, default_flow_style=True, width=10_000).strip()}", "size=tiny"]
    matrix = data.get("matrix", {})
    if "environment" in matrix:
        first = [CLOSING] if path.stem.startswith("laeo") else matrix["environment"][:1]
        found.append(f"matrix.environment={yaml.safe_dump(first, default_flow_style=True, width=10_000).strip()}")
    for name, stage in data["stages"].items():
        if stage["command"] == "evaluate":
            found += [f"stages.{name}.episodes=1", f"stages.{name}.workers=0"]
        else:
            found.append(f"stages.{name}.compile=false")
        if "success_examples" in stage:
            found.append(f"stages.{name}.labeller.steps=3")
    return found


def inputs(recipe: Any) -> list[Path]:
    """What a job reads, as far as it names single stores and runs."""
    named = [use.path for use in getattr(recipe, "stores", ())]
    source = getattr(recipe, "source", None)
    named += [source.run] if hasattr(source, "run") else []
    named += getattr(source, "stores", ())
    reaching = getattr(source, "checkpoints", None) or getattr(source, "until", None)
    named += [reaching.run] if hasattr(reaching, "run") else []
    named += [recipe.init_from] if getattr(recipe, "init_from", None) else []
    examples = getattr(recipe, "success_examples", None)
    return [*named, *([examples.from_] if examples and examples.from_ else [])]


def hours(experiment: ExperimentRecipe) -> float:
    """Of the whole plan, by the rates that hold where none was measured: tests have a cache of their own."""
    planned = run_experiment(experiment, dry_run=True)
    assert planned["status"] == "planned"
    assert {stage["state"] for stage in planned["cells"]} == {"to do"}
    return sum(stage["estimate_seconds"] for stage in planned["cells"]) / 3600


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_all_sizes_are_whole(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing is finished
    assert path.stem in TINY
    data = yaml.safe_load(path.read_text())
    assert list(data["sizes"]) in (["small", "full"], ["small", "full", "images"])
    small, full, *more = (load(path, [f"size={size}"], "run") for size in data["sizes"])
    assert len(small.jobs) <= len(full.jobs)
    assert 0 < hours(small) < min(14, hours(full))  # a night, where two cores each take a cell at a time
    mentioned = path.read_text()
    assert all(f"${{size.{key}}}" in mentioned for key in data["sizes"]["small"]), "a key that nothing reads"
    for experiment in (small, full, *more):
        made: set[Path] = set()
        for job in experiment.jobs:
            missing = [place for place in inputs(job.recipe) if place not in made]
            assert not missing, f"{job.stage} {job.label}: nothing makes {missing[0]}"
            made |= {job.recipe.out, job.recipe.out.with_name(job.recipe.out.stem + ".policies")}
        assert experiment.jobs[-1].command == "evaluate" or path.stem == "cvl-figure-8"
    shared = {job.recipe.out for job in small.jobs} & {job.recipe.out for job in full.jobs}
    assert all(str(place).startswith("data/laeo/") for place in shared)  # the agents alone are alike in both


def test_what_two_recipes_make_in_one_place_is_the_same() -> None:
    known: dict[Path, tuple[str, Any]] = {}
    twice = set()
    for path in (*PAPERS, ROOT / "recipes" / "build" / "laeo.yaml"):
        for size in yaml.safe_load(path.read_text()).get("sizes", [""]):
            for job in load(path, [f"size={size}"] if size else [], "run").jobs:
                before = known.setdefault(job.recipe.out, (path.stem, job.recipe))
                assert before[1] == job.recipe, f"{job.recipe.out}: {path.stem} and {before[0]} differ"
                twice |= {job.stage} if before[0] != path.stem else set()
    assert {"data", "agent", "mix", "cql", "medium-replay"} <= twice


def run_tiny(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, Any]:
    monkeypatch.chdir(folder)  # their places are relative
    experiment: ExperimentRecipe = load(path, overrides or tiny(path), "run")
    result = run_experiment(experiment)
    assert result["status"] == "done"
    assert all(Path(job.recipe.out).exists() for job in experiment.jobs)
    again = run_experiment(experiment)
    assert again["status"] == "finished already"
    return result


@pytest.mark.slow
@pytest.mark.timeout(1800)  # up to twenty processes, one after the other, beside whatever else the machine does
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_tiny_form_runs_to_its_end(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tiny(path, tmp_path, monkeypatch)


def test_the_sweep_multiplies() -> None:
    jobs = load(SWEEP).jobs
    config = [(job.recipe.algorithm.bc_coefficient, job.recipe.algorithm.boltzmann_temperature) for job in jobs[1:-1]]
    assert len(set(config)) == len(config) == 12


@pytest.mark.slow
@pytest.mark.timeout(1800)  # up to twenty processes, one after the other, beside whatever else the machine does
def test_a_tiny_form_of_the_sweep_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / REPLAY, tmp_path / REPLAY)
    few = ["matrix.bc_coefficient=[0.2]", "matrix.temperature=[0.1, 1.0]", "stages.scores.episodes=1"]
    stages = ("steps=2", "seeds=[0]", "compile=false")
    small = [f"stages.{stage}.{key}" for stage in ("critic", "policies") for key in stages]
    result = run_tiny(SWEEP, tmp_path, monkeypatch, *small, *few)
    assert len(result["scores"][0]["table"]) == 2
