"""Recipes: the shipped ones, what the schema fills in, and what a user reads when something is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvlctl.data.recipe import StoreUse
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn.algorithms import ALGORITHMS

SHIPPED = sorted(Path(__file__).parents[2].joinpath("recipes").rglob("*.yaml"))

FINETUNE = """\
stores: [a.zarr, {path: b.zarr, rewards: none}]
algorithm: {name: cvl, hidden: [8]}
steps: 1e4
seeds: [0, 1]
out: runs/x
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str, kind: str | None = "finetune") -> CvlctlError:
    with pytest.raises(CvlctlError) as caught:
        load(path, overrides, kind)
    return caught.value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid_and_says_what_it_is_and_how_to_run_it(path: Path) -> None:
    recipe = load(path)
    comment = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    relative = path.relative_to(SHIPPED[0].parents[2])
    kind = recipe.command
    assert f"#   cvlctl {kind} {relative}" in comment
    assert comment[0].startswith("# ") and len(comment[0]) > 40, "the first line says what the recipe is, in a sentence"
    assert any(line.startswith("# yaml-language-server: $schema=") for line in comment), "editors find its schema by it"


def test_shipped_recipes_are_there() -> None:
    assert len(SHIPPED) >= 10


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_resolved_recipe_reads_back_as_itself(path: Path, tmp_path: Path) -> None:
    recipe = load(path)
    jobs = [job.recipe for job in getattr(recipe, "jobs", ())]
    for one in jobs or getattr(recipe, "recipes", [recipe]):
        plain = one.resolved()
        assert load(write(tmp_path, yaml.safe_dump(plain))) == one


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_without_keys_has_its_own_defaults(name: str, tmp_path: Path) -> None:
    text = f"stores: [a.zarr]\nalgorithm: {name}\nsteps: 5\nout: x\nsuccess_examples: {{from: a.zarr}}\n"
    recipe = load(write(tmp_path, text), kind="finetune")
    assert recipe.algorithm.name == name
    assert recipe.algorithm.config == ALGORITHMS[name].Config()


def test_a_critic_given_in_part_keeps_the_rest_of_its_algorithm(tmp_path: Path) -> None:
    text = "stores: [a.zarr]\nalgorithm: {name: laeo, critic: {latent_dim: 7}}\nsteps: 5\nout: x\n"
    recipe = load(write(tmp_path, text + "success_examples: {file: e.npy}\n"))
    assert recipe.algorithm.config.critic.latent_dim == 7
    assert recipe.algorithm.config.critic.loss == "binary_nce"


def test_numbers_paths_and_short_forms(tmp_path: Path) -> None:
    text = FINETUNE + "compile: true\ncheckpoint_seconds: 5e-1\n"
    recipe = load(write(tmp_path, text), ["algorithm.learning_rate=1e-4", "batch_size=1_000", "threads=2"])
    assert recipe.steps == 10_000
    assert isinstance(recipe.steps, int)
    assert recipe.algorithm.config.learning_rate == 1e-4
    assert recipe.batch_size == 1000
    assert recipe.compile == "true"
    assert recipe.threads == 2
    assert recipe.checkpoint_seconds == 0.5
    assert recipe.stores[0] == StoreUse(path=Path("a.zarr"))
    assert recipe.stores[1].rewards == "none"
    assert recipe.resolved()["out"] == "runs/x"


def test_overrides_win_and_make_what_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path, FINETUNE)
    overrides = ["algorithm.critic.latent_dim=3", "stores.1.rewards=given", "steps=3", "steps=4", "device=cpu"]
    recipe = load(path, overrides)
    assert (recipe.algorithm.config.critic.latent_dim, recipe.stores[1].rewards, recipe.steps) == (3, "given", 4)


UNKNOWN = [
    ("algoritm: x", r"line 6: unknown key algoritm$", "did you mean algorithm\\?"),
    ("init_frm: x", r"line 6: unknown key init_frm$", "did you mean init_from\\?"),
]


@pytest.mark.parametrize(("line", "what", "hint"), UNKNOWN)
def test_an_unknown_key_names_file_line_and_nearest(line: str, what: str, hint: str, tmp_path: Path) -> None:
    path = write(tmp_path, FINETUNE + line + "\n")
    error = error_of(path)
    assert error.what.startswith(f"{path}, ")
    assert re.search(what, error.what)
    assert re.search(hint, error.hint)


def test_an_unknown_key_deep_inside_is_named_with_the_names_that_are_legal_there(tmp_path: Path) -> None:
    text = FINETUNE.replace("{name: cvl, hidden: [8]}", "\n  name: cvl\n  critic:\n    gama: 0.9")
    error = error_of(write(tmp_path, text))
    assert error.what.endswith("line 5: unknown key algorithm.critic.gama")
    assert error.hint.startswith("did you mean gamma? ")
    assert "latent_dim" in error.hint
    assert "bc_coefficient" not in error.hint


WRONG = [
    ("steps=abc", "steps: expected a whole number, given 'abc'"),
    ("steps=1.5", "steps: expected a whole number, given 1.5"),
    ("steps=true", "steps: expected a whole number, given true"),
    ("steps=0", "steps: expected a number of at least 1, given 0"),
    ("steps=", "steps: expected a whole number, given nothing"),
    ("steps=.inf", "steps: .inf is not a finite number"),
    ("algorithm.learning_rate=.nan", "algorithm.learning_rate: .nan is not a finite number"),
    ("algorithm.learning_rate=[1]", r"algorithm.learning_rate: expected a number, given the list \[1\]"),
    ("batch_size=1", "batch_size: expected a number of at least 2"),
    ("seeds=[0,0]", "seeds: holds a seed twice"),
    ("seeds=[-1]", "seeds.0: expected a number of at least 0, given -1"),
    ("seeds=[]", "seeds: expected a list of at least 1"),
    ("threads=many", "threads: expected 'auto' or a whole number, given 'many'"),
    ("device=gpu", "device: expected auto, cpu, cuda or cuda:N, given 'gpu'"),
    ("precision=half", "precision: expected 'auto', 'float32', 'medium' or 'bf16', given 'half'"),
    ("steps=1e13", "steps: expected a number of at most 1000000000000"),
    ("threads=2000", "threads: expected 'auto' or a number of at most 1024"),
    ("stores=[]", "stores: expected a list of at least 1"),
    ("stores.0.fraction=0", "stores.0 cannot|stores.0.fraction cannot be set: stores.0 is 'a.zarr'"),
    ("stores.1.fraction=0", "stores.1.fraction: expected a number above 0"),
    ("stores.1.fraction=1.5", "stores.1.fraction: expected a number of at most 1"),
    ("stores.4.path=c", "stores.4.path cannot be set: stores is the list"),
    ("out=.", "out: is the current directory"),
    ("out=/", "out: is the current directory, or holds it"),
    ("algorithm.name=cvll", "algorithm.name: unknown name 'cvll'"),
    ("algorithm={}", "missing key algorithm.name"),
    ("algorithm.critic.gamma=1", r"algorithm.critic: gamma must lie in \[0, 1\)"),
    ("algorithm.mode=sideways", "algorithm.mode: expected 'auto', 'scratch', 'continue' or 'frozen'"),
    ("nonsense", "'nonsense' is not of the form"),
    ("steps=[1,", "steps: not valid YAML"),
    ("steps={a: 1, a: 2}", "key 'a' is given twice"),
]


@pytest.mark.parametrize(("override", "what"), WRONG)
def test_a_wrong_override_is_called_the_command_lines(override: str, what: str, tmp_path: Path) -> None:
    error = error_of(write(tmp_path, FINETUNE), override)
    assert error.what.startswith("command line")
    assert re.search(what, error.what), error.what


@pytest.mark.parametrize(("override", "hint"), [("seeds=3", "write [3]"), ("stores=a.zarr", "write [a.zarr]")])
def test_one_value_for_a_list(override: str, hint: str, tmp_path: Path) -> None:
    assert hint in error_of(write(tmp_path, FINETUNE), override).hint
    assert error_of(write(tmp_path, FINETUNE), "seeds={a: 1}").hint == ""


def test_a_wrong_value_in_the_file_is_on_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, FINETUNE.replace("steps: 1e4", "steps: many"))
    assert error_of(path).what == f"{path}, line 3: steps: expected a whole number, given 'many'"


def test_a_missing_key(tmp_path: Path) -> None:
    error = error_of(write(tmp_path, FINETUNE.replace("steps: 1e4\n", "")))
    assert error.what.endswith("missing key steps")


TOGETHER = [
    (["algorithm=laeo"], "laeo learns from success examples"),
    (["stores=[{path: a, rewards: none}]"], "cvl needs a store with rewards"),
    (["algorithm.mode=frozen"], "mode: frozen needs init_from"),
    (["algorithm.mode=scratch", "init_from=x"], "scratch contradicts init_from"),
    (["algorithm.critic.gamma=0.9", "init_from=x"], "critic contradicts init_from"),
    (["algorithm=bc", "init_from=x"], "bc has no critic"),
    (["success_examples={}"], "needs exactly one of from"),
    (["success_examples={from: a, file: b}"], "needs exactly one of from"),
    (["out=a.zarr"], "out: a.zarr is, holds or lies in a.zarr"),
    (["out=./b.zarr/run"], "out: b.zarr/run is, holds or lies in b.zarr"),
    (["stores=[runs/x/a.zarr]"], "is, holds or lies in runs/x/a.zarr"),
    (["init_from=runs"], "is, holds or lies in runs,"),
    (["success_examples={file: runs/x/goals.npy}"], "is, holds or lies in runs/x/goals.npy"),
]


@pytest.mark.parametrize(("overrides", "what"), TOGETHER)
def test_keys_that_do_not_fit_together(overrides: list[str], what: str, tmp_path: Path) -> None:
    assert what in error_of(write(tmp_path, FINETUNE), *overrides).what


BROKEN = [
    ("steps: 1\nsteps: 2\n", "line 2: steps: key 'steps' is given twice|line 2: key 'steps' is given twice"),
    ("steps: [1\nout: x\n", "line 2: not valid YAML"),
    ("a: &a [*a]\n", "alias that holds itself|not valid YAML"),
    ("yes: 1\n", "line 1: unknown key yes"),  # text since YAML 1.2
    ("true: 1\n", "line 1: key true is not text"),
    ("[a]: 1\n", "is not text"),
    ("- a\n", "is not a recipe"),
    ("", "is not a recipe"),
    ("x: !!python/object/apply:os.getcwd []\n", "line 1: not valid YAML: could not determine a constructor"),
    ("a: " + "[" * 5000, "not valid YAML"),
    ("x: 1\n", "unknown key x"),
]


@pytest.mark.parametrize(("text", "what"), BROKEN)
def test_a_broken_file_is_one_clear_error(text: str, what: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    error = error_of(path)
    assert error.what.startswith(str(path))
    assert re.search(what, error.what), error.what


def test_aliases_of_aliases_are_refused_before_they_fill_memory(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "too many values" in error_of(write(tmp_path, "\n".join(lines))).what


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00x")
    assert "cannot be read" in error_of(path).what
    assert "cannot be read" in error_of(tmp_path).what


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, FINETUNE)
    error = error_of(tmp_path / "recipes.yaml")
    assert error.what == f"no recipe at {tmp_path / 'recipes.yaml'}"
    assert error.hint == f"did you mean {tmp_path / 'recipe.yaml'}?"


def test_a_recipe_for_another_command_says_which(tmp_path: Path) -> None:
    path = write(tmp_path, FINETUNE)
    error = error_of(path, kind="pretrain")
    assert error.what == f"{path} is a recipe for finetune, not for pretrain"
    assert error.hint == f"run: cvlctl finetune {path}"


def test_a_task_that_is_none_names_the_nearest(tmp_path: Path) -> None:
    text = "task: gym/Hoper-v5\nsource: {name: random, episodes: 3}\nout: x.zarr\n"
    error = error_of(write(tmp_path, text), kind="build-dataset")
    assert "line 1: task: unknown task 'gym/Hoper-v5'" in error.what
    assert "gym/Hopper-v5" in error.hint
    text = text.replace("Hoper", "Hopper").replace("random, episodes", "scriptd, episodes")
    assert "did you mean scripted?" in error_of(write(tmp_path, text), kind="build-dataset").hint


EXPERIMENT: dict[str, Any] = {
    "out": "runs/e",
    "matrix": {
        "task": ["gym/Pendulum-v1", "gym/Hopper-v5"],
        "algorithm": [{"name": "cvl", "bc_coefficient": 0.5}, "bc"],
    },
    "stages": {
        "data": {
            "command": "build-dataset",
            "task": "${task}",
            "source": {"name": "random", "episodes": 2},
            "out": "${out}/${task}.zarr",
        },
        "train": {
            "command": "finetune",
            "stores": ["${out}/${task}.zarr"],
            "algorithm": "${algorithm}",
            "steps": 3,
            "out": "${out}/${task}/${algorithm.name}",
        },
        "scores": {"command": "evaluate", "runs": ["${out}/*/*/*"], "out": "${out}/scores"},
    },
}


def experiment(tmp_path: Path, **stages: dict[str, Any]) -> Path:
    changed = {name: {**EXPERIMENT["stages"].get(name, {}), **change} for name, change in stages.items()}
    whole = {**EXPERIMENT, "stages": {**EXPERIMENT["stages"], **changed}}
    return write(tmp_path, yaml.safe_dump(whole, sort_keys=False))


def test_a_stage_runs_once_for_each_combination_that_it_mentions(tmp_path: Path) -> None:
    jobs = load(experiment(tmp_path), kind="run").jobs
    assert [(job.stage, job.label) for job in jobs] == [
        ("data", "gym/Pendulum-v1"),
        ("data", "gym/Hopper-v5"),
        ("train", "gym/Pendulum-v1 cvl"),
        ("train", "gym/Pendulum-v1 bc"),
        ("train", "gym/Hopper-v5 cvl"),
        ("train", "gym/Hopper-v5 bc"),
        ("scores", ""),
    ]
    assert jobs[2].recipe.algorithm.config.bc_coefficient == 0.5
    assert jobs[5].recipe.out == Path("runs/e/gym/Hopper-v5/bc")
    assert jobs[5].recipe.stores[0].path == jobs[1].recipe.out


def test_overrides_reach_matrix_and_stages(tmp_path: Path) -> None:
    overrides = ["matrix.task=[gym/Pendulum-v1]", "stages.train.steps=9", "matrix.algorithm.0.bc_coefficient=0.1"]
    jobs = load(experiment(tmp_path), overrides, "run").jobs
    assert [job.recipe.steps for job in jobs[1:3]] == [9, 9]
    assert jobs[1].recipe.algorithm.config.bc_coefficient == 0.1


STAGES = [
    ({"train": {"steps": "many"}}, "stages.train.steps: expected a whole number"),
    ({"train": {"stps": 3}}, "unknown key stages.train.stps"),
    (
        {"train": {"out": "${out}/${algorithm}"}},
        "train gym/Hopper-v5 cvl and train gym/Pendulum-v1 cvl have the same out",
    ),
    ({"train": {"init_from": "${tusk}"}}, r"\$\{tusk\} names no matrix key"),
    ({"train": {"out": "${out}/${task}/${algorithm.nome}"}}, "cvl has no nome"),
    ({"data": {"command": "build"}}, "stages.data.command is 'build'"),
    ({"data": {"task": "${task}x"}}, "stages.data.task: unknown task 'gym/Pendulum-v1x'"),
]


@pytest.mark.parametrize(("stages", "what"), STAGES)
def test_what_is_wrong_in_a_stage_is_named_with_its_line(stages: dict[str, Any], what: str, tmp_path: Path) -> None:
    path = experiment(tmp_path, **stages)
    error = error_of(path, kind="run")
    assert re.search(what, error.what), error.what
    line = int(re.search(r", line (\d+): ", error.what)[1])  # type: ignore[index]
    (stage, change), lines = next(iter(stages.items())), path.read_text().splitlines()
    assert next(iter(change)) in lines[line - 1]
    assert f"  {stage}:" in lines[:line]


def test_two_cells_with_one_out_are_told_which_key_tells_them_apart(tmp_path: Path) -> None:
    same = experiment(tmp_path, train={"out": "${out}/${algorithm}"})
    assert error_of(same, kind="run").hint.endswith("such as ${task}")


def test_matrix_keys_are_names(tmp_path: Path) -> None:
    path = experiment(tmp_path)
    assert "is not a legal name" in error_of(path, "matrix={out: [1]}", kind="run").what
    assert "matrix.task: expected a list" in error_of(path, "matrix.task=gym/Hopper-v5", kind="run").what


SIZES = {
    "small": {"frames": 2, "tasks": ["gym/Pendulum-v1"], "seeds": [0]},
    "full": {"frames": 50, "tasks": ["gym/Pendulum-v1", "gym/Hopper-v5"], "seeds": [0, 1]},
}


def of_sizes(tmp_path: Path, **changes: Any) -> Path:
    stages = {
        "data": {
            **EXPERIMENT["stages"]["data"],
            "source": {"name": "random", "episodes": "${size.frames}"},
            "out": "data/${task.name}-${size.frames}.zarr",
        },
        "train": {
            **EXPERIMENT["stages"]["train"],
            "stores": ["data/${task.name}-${size.frames}.zarr"],
            "seeds": "${size.seeds}",
            "label": "${size.name}",
        },
    }
    matrix = {**EXPERIMENT["matrix"], "task": "${size.tasks}"}
    whole = {"out": "runs/${size.name}", "size": "small", "sizes": SIZES, "matrix": matrix, "stages": stages}
    return write(tmp_path, yaml.safe_dump({**whole, **changes}, sort_keys=False))


def test_a_size_stands_wherever_it_is_mentioned_and_the_command_line_chooses_or_adds_one(tmp_path: Path) -> None:
    path = of_sizes(tmp_path)
    small, full = load(path, kind="run"), load(path, ["size=full"])
    assert [len(one.jobs) for one in (small, full)] == [3, 6]
    assert [job.recipe.source.episodes for job in full.jobs[:2]] == [50, 50]  # the value itself, not its text
    assert full.jobs[1].recipe.out == Path("data/gym/Hopper-v5-50.zarr")
    train = full.jobs[2].recipe
    assert (train.seeds, train.label, train.out) == ((0, 1), "full", Path("runs/full/gym/Pendulum-v1/cvl"))
    night = "sizes.night={frames: 7, tasks: [gym/Hopper-v5], seeds: [3]}"
    jobs = load(path, [night, "size=night", "sizes.night.seeds=[5, 6]"]).jobs
    assert [job.recipe.out for job in jobs[:1]] == [Path("data/gym/Hopper-v5-7.zarr")]
    assert jobs[1].recipe.seeds == (5, 6)
    again = write(tmp_path, yaml.safe_dump(full.resolved()))
    assert load(again).resolved() == full.resolved()


WRONG_SIZES = [
    (["size=ful"], "command line: size is 'ful'", "did you mean full? legal sizes: small, full"),
    (["size=[small]"], r"command line: size is the list \['small'\]", "legal sizes: small, full"),
    (["size="], "command line: size is nothing", "legal sizes: small, full"),
    (["sizes={}"], "line 2: size is 'small'", "legal sizes: "),
    (["sizes.night={frames: 1}"], "command line: sizes.night lacks the key tasks", "all sizes have the same keys"),
    (["sizes.full.steps=1"], "line 4: sizes.small lacks the key steps", "add `steps: ...`"),
    (["sizes=3"], "command line: sizes: expected a mapping", ""),
    (["sizes.full=3"], "command line: sizes.full: expected a mapping", ""),
    (
        ["stages.train.steps=${size.stepz}"],
        r"command line: \$\{size.stepz\}: small has no stepz",
        "legal keys: frames,",
    ),
    (["stages.train.steps=${size.seed}"], "small has no seed", "did you mean seeds?"),
    (["matrix.task=${size.frames}"], "command line: matrix.task: expected a list, given 2", ""),
    (["matrix.size=[1]"], "key 'size' is not a legal name: letters, digits, _ and -, and not out or size", ""),
]


@pytest.mark.parametrize(("overrides", "what", "hint"), WRONG_SIZES)
def test_what_is_wrong_with_a_size(overrides: list[str], what: str, hint: str, tmp_path: Path) -> None:
    path = of_sizes(tmp_path)
    error = error_of(path, *overrides, kind="run")
    assert re.search(what, error.what), error.what
    assert hint in error.hint
    assert error.what.startswith(("command line", f"{path}, line "))


def test_a_matrix_key_may_be_called_size_where_there_are_no_sizes(tmp_path: Path) -> None:
    path = experiment(tmp_path, train={"steps": "${size}", "out": "${out}/${task}/${algorithm.name}/${size}"})
    assert [job.recipe.steps for job in load(path, ["matrix.size=[3,4]"]).jobs[2:4]] == [3, 4]
