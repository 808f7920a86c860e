"""`~` and $NAME in paths: what they become, and that nothing unresolved is ever taken as a name."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments import commands
from cvlctl.experiments.commands import load
from cvlctl.paths import expanded


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("TILDE", "~/t")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("DOLLAR", "a$b")
    for name in ("NOPE", "task", "b"):
        monkeypatch.delenv(name, raising=False)


EXPANDED = [
    ("x.zarr", "x.zarr"),
    ("~", "HOME/home"),
    ("~/x.zarr", "HOME/home/x.zarr"),
    ("$SCRATCH/x.zarr", "HOME/scratch/x.zarr"),
    ("${SCRATCH}x", "HOME/scratchx"),
    ("a/$SCRATCH", "a/HOME/scratch"),
    ("$TILDE/x", "HOME/home/t/x"),
    ("a~b/~c", "a~b/~c"),
    ("runs/*/[ab]", "runs/*/[ab]"),
]


@pytest.mark.parametrize(("path", "found"), EXPANDED)
def test_home_and_environment(path: str, found: str, tmp_path: Path) -> None:
    found = found.replace("HOME", str(tmp_path))
    assert expanded(path) == found
    assert expanded(found) == found  # a resolved recipe reads back as itself


LEFT = [
    ("$NOPE/x.zarr", "no environment variable NOPE is set", "export NOPE=... first"),
    ("${NOPE}/x.zarr", "no environment variable NOPE is set", "export NOPE=... first"),
    ("data/${task}.zarr", "no environment variable task is set", "${task} from `task: [...]`"),
    ("${a.b}/x", "no environment variable a.b is set", "matrix"),
    ("${}/x", "no environment variable  is set", "write the path out"),
    ("$EMPTY/x.zarr", "no environment variable EMPTY is set", "export EMPTY"),
    ("$DOLLAR/x", "no environment variable b is set", "export b"),
    ("a$/x", "a $ begins no name", "no path may hold a plain $"),
    ("${SCRATCH/x", "a $ begins no name", "write $NAME"),
    ("~nobody-of-that-name/x", "~nobody-of-that-name is nobody's home", "from / on"),
    ("a\0b", "holds a zero byte", ""),
    ("a/~/x.zarr", "at the start alone", "from / on"),
    ("$SCRATCH/~", "at the start alone", "from / on"),
    ("", "a path is empty", ". is the current directory"),
]


@pytest.mark.parametrize(("path", "what", "hint"), LEFT)
def test_what_is_left_is_an_error(path: str, what: str, hint: str) -> None:
    with pytest.raises(CvlctlError) as caught:
        expanded(path)
    assert what in caught.value.what
    assert hint in caught.value.hint


BUILD = "task: gym/Pendulum-v1\nsource: {name: random, episodes: 1}\nhorizon: 20\nthreads: 1\nout: PLACE\n"
SOURCE = "task: gym/Pendulum-v1\nsource: SOURCE\nout: x\n"
FINETUNE = "stores: [STORE]\nalgorithm: bc\nsteps: 2\nbatch_size: 4\nout: OUT\n"
# every key of every recipe that is a path: (recipe, key that the error names, line)
PLACES = [
    (BUILD, "out", 5),
    (SOURCE.replace("SOURCE", "{name: policy, episodes: 1, checkpoints: [PLACE]}"), "source.checkpoints.0", 2),
    (SOURCE.replace("SOURCE", "{name: stores, stores: [a, PLACE]}"), "source.stores.1", 2),
    (SOURCE.replace("SOURCE", "{name: mix, run: PLACE, success_rate: 0.5, episodes: 2}"), "source.run", 2),
    (FINETUNE.replace("STORE", "PLACE").replace("OUT", "o"), "stores.0", 1),
    (FINETUNE.replace("STORE", "{path: PLACE}").replace("OUT", "o"), "stores.0.path", 1),
    (FINETUNE.replace("STORE", "s").replace("OUT", "PLACE"), "out", 5),
    (FINETUNE.replace("STORE", "s").replace("OUT", "o").replace("bc", "cvl") + "init_from: PLACE\n", "init_from", 6),
    (
        FINETUNE.replace("STORE", "s").replace("OUT", "o") + "success_examples: {file: PLACE}",
        "success_examples.file",
        6,
    ),
    (
        FINETUNE.replace("STORE", "s").replace("OUT", "o") + "success_examples: {from: PLACE}",
        "success_examples.from",
        6,
    ),
    ("runs: [a, PLACE]\nout: o\n", "runs.1", 1),
    ("runs: [a]\nout: PLACE\n", "out", 2),
    ("runs: [a]\ngoals:\n  from: PLACE\nout: o\n", "goals.from", 3),
    ("out: PLACE\nstages: {a: {command: evaluate, runs: [a], out: b}}\n", "out", 1),
    ("out: o\nstages:\n  a: {command: evaluate, runs: [a], out: PLACE}\n", "stages.a.out", 3),
]


@pytest.mark.parametrize(("recipe", "key", "line"), PLACES, ids=lambda value: value if "." in str(value) else "")
@pytest.mark.parametrize("place", ["~nobody-of-that-name/x", "$NOPE/x", "a$/x"])
def test_no_path_of_a_recipe_keeps_a_placeholder(recipe: str, key: str, line: int, place: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe.replace("PLACE", f"'{place}'"))
    with pytest.raises(CvlctlError) as caught:
        load(path)
    assert caught.value.what.startswith(f"{path}, line {line}: {key}: {place}: ")
    assert caught.value.hint


@pytest.mark.parametrize(("recipe", "key", "line"), PLACES, ids=lambda value: value if "." in str(value) else "")
def test_every_path_of_a_recipe_is_expanded(recipe: str, key: str, line: int, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe.replace("PLACE", "'$SCRATCH/x'"))
    recipe = load(path)
    plain = recipe.model_dump_json(by_alias=True)
    assert str(tmp_path / "scratch" / "x") in (plain if "stages" not in key else str(recipe.jobs[0].recipe.out))
    assert "$" not in plain or "stages" in key


NAMES = [
    (FINETUNE.replace("STORE", "s").replace("OUT", "o") + "label: '${algorithm}'", "label"),
    (FINETUNE.replace("STORE", "{path: s, rewards: '${SCRATCH}'}").replace("OUT", "o"), "stores.0.rewards"),
    ("runs: [a]\nout: o\nbaseline: ${b}", "baseline"),
    (BUILD.replace("gym/Pendulum-v1", "${task}"), "task"),
]


@pytest.mark.parametrize(("recipe", "key"), NAMES)
def test_no_name_of_a_recipe_keeps_a_placeholder(recipe: str, key: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    with pytest.raises(CvlctlError, match=rf"line \d: {key}: "):
        load(path)


def test_a_placeholder_of_a_single_task_is_told_from_that_of_several(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(BUILD.replace("PLACE", "data/${task}.zarr"))
    with pytest.raises(CvlctlError, match=r"out: data/\$\{task\}\.zarr: no environment variable task is set"):
        load(path)
    several = load(path, ["task=[gym/Pendulum-v1]", "out=$SCRATCH/${task}.zarr"])
    assert several.recipes[0].out == tmp_path / "scratch" / "gym" / "Pendulum-v1.zarr"


def test_an_experiment_knows_the_environment_and_its_matrix_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.yaml"
    stage = "{command: evaluate, runs: ['${SCRATCH}/*'], out: '${out}/${name}/$SCRATCH'}"
    path.write_text(f"out: ~/e\nmatrix: {{name: [here]}}\nstages: {{a: {stage}}}\n")
    monkeypatch.setenv("name", "there")
    (job,) = load(path).jobs
    assert job.recipe.runs == (f"{tmp_path}/scratch/*",)
    assert str(job.recipe.out) == f"{tmp_path}/home/e/here{tmp_path}/scratch"


def call(*args: str) -> int:
    return execute(app.app, list(args))


def test_what_is_resolved_is_recorded_and_found_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.yaml").write_text(BUILD.replace("PLACE", "~/a.zarr"))
    (tmp_path / "f.yaml").write_text(FINETUNE.replace("STORE", "$SCRATCH/../home/a.zarr").replace("OUT", "~/run"))
    run = ["finetune", "f.yaml", "threads=1", "device=cpu", "compile=false", "--json"]
    statuses = []
    for args in (["build-dataset", "b.yaml", "--json"], run):
        for again in ([], [], [f"out={tmp_path}/home/{'a.zarr' if args is not run else 'run'}"]):
            assert call(*args, *again) == 0
            statuses.append(json.loads(capsys.readouterr().out)["status"])
    assert statuses == ["built", *["finished already"] * 2, "trained", *["finished already"] * 2]
    assert sorted(os.listdir(tmp_path)) == ["b.yaml", "f.yaml", "home", "scratch"]
    recorded = json.loads((tmp_path / "home" / "run" / "run.json").read_text())["recipe"]
    assert recorded["stores"][0]["path"] == f"{tmp_path}/scratch/../home/a.zarr"
    assert recorded["out"] == f"{tmp_path}/home/run"


def test_paths_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "e.yaml").write_text("runs: [~/r]\nout: ~/o\n")
    seen: list[Any] = []
    monkeypatch.setattr(commands, "function", lambda command: lambda recipe, force: seen.append(recipe.out) or {})
    assert call("evaluate", "~/e.yaml", "--json") == 0
    assert call("evaluate", "$SCRATCH/../home/e.yaml", "out=$SCRATCH/s", "--json") == 0
    assert seen == [tmp_path / "home" / "o", tmp_path / "scratch" / "s"]
    capsys.readouterr()
    for args in (
        ["data", "merge", "a.zarr", "~nobody-of-that-name/b", "--out", "o"],
        ["data", "merge", "a.zarr", "b.zarr", "--out=~nobody-of-that-name/b"],
        ["data", "plot", "a.zarr", "--out=$NOPE/b.png"],
        ["data", "label", "a.zarr", "x", "--rewards=$NOPE/r.npy", "--out=b.zarr"],
        ["evaluate", "home/e.yaml", "out=~nobody-of-that-name/b"],
        ["recipes", "ls", "$NOPE"],
    ):
        assert call(*args) == 2
        error = capsys.readouterr().err
        assert "nobody's home" in error or "NOPE is set" in error
    assert sorted(os.listdir(tmp_path)) == ["home", "scratch"]
