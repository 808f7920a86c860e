"""The command line: exit codes, what goes to which stream, and how fast help is."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments import commands
from cvlctl.experiments import run as run_command
from cvlctl.score import evaluate as evaluate_command
from cvlctl.version import __version__

RANDOM = "task: gym/Pendulum-v1\nsource: {name: random, episodes: 1}\nout: OUT\n"
HEAVY = ("torch", "zarr", "mujoco", "metaworld", "gymnasium", "matplotlib", "pydantic", "numpy", "scipy", "ray")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "build.yaml"
    path.write_text(RANDOM.replace("OUT", str(tmp_path / "x.zarr")))
    return path


def call(*args: str | Path) -> int:
    return execute(app.app, [str(arg) for arg in args])


def replace(monkeypatch: pytest.MonkeyPatch, behaviour: Any) -> None:
    """Let every step's command do `behaviour(recipe, force=...)`."""
    monkeypatch.setattr(commands, "function", lambda command: behaviour)


def cpu_seconds(*words: str) -> float:
    """Of an interpreter with these arguments; the least of five, since the machine may be busy otherwise."""
    taken = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-P", *words], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return min(taken)


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    """As fast as the help of any program of Typer's, within a factor of two and a half."""
    code = f"import sys, cvlctl.cli.app; sys.exit(', '.join(m for m in {HEAVY} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stderr.strip() == ""
    assert cpu_seconds("-m", "cvlctl", "--help") < 2.5 * cpu_seconds("-c", "import typer, typer.rich_utils")


def test_what_an_environment_prints_is_no_part_of_the_result(
    recipe: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what a simulator in C prints, at once or when its buffer is emptied."""

    def chatty(*_: Any, **options: Any) -> dict[str, str]:
        print("by print")
        os.write(1, b"by the system\n")
        ctypes.CDLL(None).printf(b"by C\n")
        return {"status": "done", "out": "x"}

    replace(monkeypatch, chatty)
    assert call("build-dataset", recipe, "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"status": "done", "out": "x"}
    assert {"by print", "by the system", "by C"} <= set(err.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == f"cvlctl {__version__}\n"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    out = capsys.readouterr().out
    positions = [out.index(name) for name in ("build-dataset", "pretrain", "finetune", "evaluate", " run ", " data ")]
    assert positions == sorted(positions)


@pytest.mark.parametrize("name", ["build-dataset", "pretrain", "finetune", "evaluate", "run"])
def test_every_command_shows_a_worked_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(name, "--help") == 0
    assert f"Example: cvlctl {name} recipes/" in capsys.readouterr().out


USAGE = [
    (["pretrian", "x"], "No such command 'pretrian'", "cvlctl --help"),
    (["pretrain"], "Missing argument", "cvlctl pretrain --help"),
    (["pretrain", "x", "--nope"], "No such option", "cvlctl pretrain --help"),
    (["evaluate", "x", "--format", "xml"], "xml", "cvlctl evaluate --help"),
]


@pytest.mark.parametrize(("args", "what", "hint"), USAGE)
def test_a_usage_error_is_two_lines_and_exit_2(
    args: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert what in err
    assert hint in err.splitlines()[-1]
    assert call(*args, "--json") == 2
    assert json.loads(capsys.readouterr().out).keys() == {"error", "hint"}


def test_an_error_in_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(recipe.read_text() + "sed: 3\n")
    assert call("build-dataset", recipe) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {recipe}, line 4: unknown key sed\nhint: did you mean seed?")
    assert call("build-dataset", recipe, "--json") == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == f"{recipe}, line 4: unknown key sed"
    assert err == ""


def test_brackets_in_an_error_are_text_not_markup(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("build-dataset", recipe, "seed=[red]") == 2
    assert "given the list ['red']" in capsys.readouterr().err


def test_results_go_to_stdout_and_progress_to_stderr(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(loaded: Any, force: bool) -> dict[str, Any]:
        print("a library that chats")
        print("progress", file=sys.stderr)
        return {"status": "built", "path": str(loaded.out), "episodes": loaded.source.episodes, "forced": force}

    replace(monkeypatch, work)
    assert call("build-dataset", recipe, "source.episodes=7") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"built: {recipe.parent / 'x.zarr'} (episodes 7, forced False)"]
    assert err == "a library that chats\nprogress\n"
    assert call("build-dataset", recipe, "--json", "--quiet", "--force") == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["forced"] is True
    assert err == ""


FAULTS = [
    (CvlctlError("the store is gone", "build it"), 2, "the store is gone", "build it"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 2, "/x/y: No space left on device", "free some space"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied", "permissions"),
    (MemoryError("Unable to allocate 9 TiB"), 2, "out of memory", "lower batch_size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory", "lower batch_size"),
    (RuntimeError("CUDA out of memory. Tried to"), 2, "out of memory", "lower batch_size"),
    (OSError(12, "Cannot allocate memory"), 2, "out of memory", "lower batch_size"),
    (ImportError("libx.so: failed to map segment: Cannot allocate memory"), 2, "out of memory", "lower batch_size"),
    (KeyboardInterrupt(), 130, "interrupted", "run the same command again"),
]


@pytest.mark.parametrize(("fault", "code", "what", "hint"), FAULTS, ids=lambda x: type(x).__name__)
def test_faults_become_two_lines(
    fault: BaseException,
    code: int,
    what: str,
    hint: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work(loaded: Any, force: bool) -> dict[str, Any]:
        raise fault

    replace(monkeypatch, work)
    assert call("build-dataset", recipe) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == f"error: {what}"
    assert hint in err.splitlines()[1]
    assert call("build-dataset", recipe, "--json") == code
    assert json.loads(capsys.readouterr().out)["error"] == what


def test_a_bug_is_not_hidden(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def work(loaded: Any, force: bool) -> dict[str, Any]:
        raise ZeroDivisionError("division by zero")

    replace(monkeypatch, work)
    assert call("build-dataset", recipe) == 70
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert "error: internal error: ZeroDivisionError: division by zero\nhint: please report" in err
    assert call("build-dataset", recipe, "--json", "--quiet") == 70
    out, err = capsys.readouterr()
    assert json.loads(out)["error"] == "internal error: ZeroDivisionError: division by zero"
    assert "in work" in err


def test_results_fit_any_terminal(tmp_path: Path) -> None:
    (tmp_path / "\u00e9.yaml").write_text("runs: [x]\nout: y\n", encoding="utf-8")
    for columns in ("abc", "0", "40"):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cvlctl", "recipes", "ls", "."],
            capture_output=True, text=True,
            cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": columns},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "?.yaml" in done.stdout.replace("\n", "")


def test_a_broken_pipe_is_silent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cvlctl", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1
    process.stderr.close()


def test_evaluate_prints_in_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evaluate.yaml"
    path.write_text(f"runs: [x]\nout: {tmp_path / 'out'}\n")
    replace(monkeypatch, lambda loaded, force: {"status": "evaluated", "table": [{"task": "a"}]})
    monkeypatch.setattr(evaluate_command, "as_text", lambda result, form: f"{form} of {result['status']}\n")
    monkeypatch.setattr(evaluate_command, "render", lambda result, console: console.print("rich tables"))
    shown = {}
    for form in ("csv", "markdown", "rich", "json"):
        assert call("evaluate", path, "--format", form) == 0
        shown[form] = capsys.readouterr().out
    assert shown["csv"] == "csv of evaluated\n"
    assert shown["markdown"] == "markdown of evaluated\n"
    assert shown["rich"] == "rich tables\n"
    assert json.loads(shown["json"])["table"] == [{"task": "a"}]
    assert call("evaluate", tmp_path / "none.yaml", "--format", "json") == 2
    assert "no recipe" in json.loads(capsys.readouterr().out)["error"]


def test_run_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def work(experiment: Any, **options: bool) -> dict[str, Any]:
        seen.append((str(experiment.out), experiment.jobs[0].recipe.episodes, options))
        return {"status": "planned"}

    path = tmp_path / "e.yaml"
    path.write_text("out: x\nstages: {a: {command: evaluate, runs: [r], out: '${out}/a'}}\n")
    monkeypatch.setattr(run_command, "run_experiment", work)
    options = (
        "--dry-run",
        "--force",
        "--json",
        "--only",
        "stage=a",
        "--fail-fast",
        "--unfinished",
        "--engine",
        "local",
    )
    assert call("run", path, "out=y", "stages.a.episodes=2", *options) == 0
    told = {"force": True, "dry_run": True, "only": "stage=a", "fail_fast": True, "unfinished": True}
    assert seen == [("y", 2, told)]
    assert call("run", path, "out=y", "--engine", "slurmy") == 2


def test_data_commands(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("build-dataset", recipe, "threads=1", "--quiet", "--json") == 0
    assert json.loads(capsys.readouterr().out)["episodes"] == 1
    store = recipe.parent / "x.zarr"
    assert call("data", "ls", recipe.parent, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["path"] == str(store)
    assert call("data", "info", store) == 0
    assert "gym/Pendulum-v1" in capsys.readouterr().out
    assert call("data", "verify", store, "--json") == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    chunk = next(path for path in (store / "data").rglob("*") if path.is_file() and path.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:-7] + b"1234567")
    assert call("data", "verify", store, "--json") == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
    assert call("data", "info", recipe.parent / "y.zarr") == 2


def test_recipes_ls_and_validate(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text("# Random actions. More.\n" + recipe.read_text())
    assert call("recipes", "ls", recipe.parent, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"path": str(recipe), "command": "build-dataset", "item": None, "about": "Random actions"}
    ]
    assert call("recipes", "validate", recipe, "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["command"] == "build-dataset"
    (recipe.parent / "worse.yaml").write_text("runs: 3\n")
    assert call("recipes", "validate", recipe.parent) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{recipe}: valid"
    assert "worse.yaml, line 1: runs: expected a list, given 3" in lines[1]
    assert call("recipes", "ls", recipe.parent) == 0
    assert call("recipes", "validate", recipe.parent / "none.yaml") == 2
    assert "no recipe at" in capsys.readouterr().out


def test_recipes_ls_names_the_item_of_the_paper(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = recipe.read_text()
    heads = {  # opening comment -> item, about
        "CVL Figure 2: fifty tasks. More.": ("CVL Figure 2", "fifty tasks"),
        "LAEO Figure 6, left: from 1 example": ("LAEO Figure 6, left", "from 1 example"),
        "Proposal, online: a learner": ("Proposal, online", "a learner"),
        "CVL: a policy from rewards": (None, "CVL: a policy from rewards"),
        "LAEO's datasets (its section 5): checkpoints": (None, "LAEO's datasets (its section 5): checkpoints"),
    }
    for head, (item, about) in heads.items():
        recipe.write_text(f"# {head}\n{plain}")
        assert call("recipes", "ls", recipe.parent, "--json") == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert (row["item"], row["about"]) == (item, about)
        monkeypatch.setenv("COLUMNS", "200")
        assert call("recipes", "ls", recipe.parent) == 0
        shown = capsys.readouterr().out
        assert ("paper" in shown) == (item is not None)
        assert about in shown


def test_python_m() -> None:
    done = subprocess.run([sys.executable, "-P", "-m", "cvlctl", "data", "info", "no"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no store at no")
    assert "Traceback" not in done.stderr
