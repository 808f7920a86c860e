"""What `cvlctl run` says of time: the plan with estimates before anything starts, and where it went at the end."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli.console import console
from cvlctl.experiments import run as module
from cvlctl.experiments.commands import load
from cvlctl.experiments.run import render, run_experiment

TEXT = """\
out: OUT
matrix: {task: [gym/Pendulum-v1], algorithm: [cvl, bc]}
stages:
  data:
    command: build-dataset
    task: ${task}
    source: {name: random, transitions: 40_000}
    out: ${out}/data/${task}.zarr
  train:
    command: finetune
    stores: ["${out}/data/${task}.zarr"]
    algorithm: ${algorithm}
    steps: 1_000
    out: ${out}/${task}/${algorithm}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Any:
    path = tmp_path / "e.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "e")))
    return load(path, (), "run")


def stand_in(monkeypatch: pytest.MonkeyPatch, seconds: list[float], statuses: list[str]) -> None:
    """Jobs that do nothing; the clock says that they took so long."""
    left, now = iter(statuses), itertools.accumulate(itertools.chain.from_iterable((0.0, s) for s in seconds))
    monkeypatch.setattr(module, "function", lambda command: lambda recipe, force: {"status": next(left)})
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))


def test_the_plan_is_said_before_anything_starts(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, [1, 1, 1], ["built", "trained", "trained"])
    stages = run_experiment(experiment)["stages"]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("plan: data: build-dataset gym/Pendulum-v1, 40,000 transitions: about ")
    assert told[0].endswith(f": about {stages[0]['estimate_seconds']} s")
    assert told[1].startswith("plan: train: finetune gym/Pendulum-v1 cvl, 1,000 steps x 1 seed: about ")
    total = sum(stage["estimate_seconds"] for stage in stages)
    assert told[3] == f"plan: about {total} s in all on an idle machine, give or take a factor of two"
    assert told[4] == "1/3 data: build-dataset gym/Pendulum-v1"


def test_where_each_minute_went(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch, [12.6, 93.2, 20], ["built", "trained", "trained"])
    result = run_experiment(experiment)
    capsys.readouterr()
    render(result, console())
    assert "time:   2m05s in all: data 12s, train cvl 1m33s, train bc 20s\n" in capsys.readouterr().out


def test_what_was_finished_takes_no_time_and_is_in_no_plan(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["finished", "finished", "to do"]
    monkeypatch.setattr(module, "plan", lambda *_, **options: [
        {"stage": job.stage, "command": job.command, "combination": job.combination, "out": str(job.recipe.out),
         "state": state, "size": "1 step", "estimate_seconds": 7}
        for job, state in zip(experiment.jobs, before, strict=True)
    ])  # fmt: skip
    stand_in(monkeypatch, [0, 0, 30], ["finished already", "finished already", "trained"])
    result = run_experiment(experiment)
    plans = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: ")]
    assert plans == [
        "plan: train: finetune gym/Pendulum-v1 bc, 1 step: about 7 s",
        "plan: about 7 s in all on an idle machine, give or take a factor of two",
    ]
    render(result, console())
    assert "time:   30s in all: train bc 30s\n" in capsys.readouterr().out

    before[2] = "finished"
    stand_in(monkeypatch, [0, 0, 0], ["finished already"] * 3)
    result = run_experiment(experiment)
    assert "plan: " not in capsys.readouterr().err
    render(result, console())
    assert "time:   none, all was finished already\n" in capsys.readouterr().out
