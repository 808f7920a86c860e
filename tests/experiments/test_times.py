"""What `cvlctl run` says of time: the plan with estimates before anything starts, and where it went at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli.console import console
from cvlctl.experiments import run as module
from cvlctl.experiments.commands import load
from cvlctl.experiments.run import run_experiment
from cvlctl.experiments.show import render

TEXT = """\
out: OUT
local: {processes: 1}
matrix: {algorithm: [cvl, bc]}
stages:
  critic:
    command: pretrain
    stores: [x.zarr]
    steps: 1_000
    out: ${out}/critic
  train:
    command: finetune
    stores: [x.zarr]
    algorithm: ${algorithm}
    steps: 1_000
    out: ${out}/${algorithm}
"""


@pytest.fixture
def experiment(tmp_path: Path, acts: Callable[..., None]) -> Any:
    path = tmp_path / "e.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "e")))
    return load(path, (), "run")


def test_the_plan_is_said_before_anything_starts(experiment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cells = run_experiment(experiment)["cells"]
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("plan: critic: pretrain, 1,000 steps x 1 seed: about ")
    assert told[0].endswith(f": about {cells[0]['estimate_seconds']} s")
    assert told[1].startswith("plan: train: finetune cvl, 1,000 steps x 1 seed: about ")
    total = sum(cell["estimate_seconds"] for cell in cells)
    assert told[3] == f"plan: about {total} s in all on an idle machine, give or take a factor of two"
    assert told[4] == "1/3 critic: pretrain"


def test_where_each_minute_went(experiment: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_experiment(experiment)
    assert all(0 < cell["seconds"] < 20 for cell in result["cells"])
    for cell, seconds in zip(result["cells"], (12.6, 93.2, 20), strict=True):
        cell["seconds"] = seconds
    result["seconds"] = 125.4
    capsys.readouterr()
    render(result, console())
    assert "time:   2m05s in all: critic 12s, train cvl 1m33s, train bc 20s\n" in capsys.readouterr().out


def test_what_was_finished_takes_no_time_and_is_in_no_plan(
    experiment: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["finished", "finished", "to do"]
    plan = module.plan

    def with_states(cells: Any, **options: bool) -> Any:
        return [row | {"state": state} for row, state in zip(plan(cells, **options), before, strict=True)]

    monkeypatch.setattr(module, "plan", with_states)
    result = run_experiment(experiment)
    plans = [line for line in capsys.readouterr().err.splitlines() if line.startswith("plan: ")]
    seconds = result["cells"][2]["estimate_seconds"]
    assert plans == [
        f"plan: train: finetune bc, 1,000 steps x 1 seed: about {seconds} s",
        f"plan: about {seconds} s in all on an idle machine, give or take a factor of two",
    ]
    assert ["seconds" in cell for cell in result["cells"]] == [False, False, True]

    before[2] = "finished"
    result = run_experiment(experiment)
    assert result["status"] == "finished already"
    assert "plan: " not in capsys.readouterr().err
    render(result, console())
    assert "time:   none, all was finished already\n" in capsys.readouterr().out


def test_cells_side_by_side_take_as_long_as_the_longest_way_through_them() -> None:
    def row(cell: str, seconds: float, *needs: str) -> dict[str, Any]:
        return {"cell": cell, "state": "to do", "estimate_seconds": seconds, "needs": needs}

    rows = [row("a", 40), row("b", 30, "a"), row("c", 10), row("d", 10)]
    assert module.lines([], [], 2) == []
    from cvlctl.experiments.plan import in_all

    assert in_all(rows, 1).startswith("about 90 s in all on")
    assert in_all(rows, 2).startswith("about 70 s in all, 2 cells at once, on")
    assert in_all(rows, 4).startswith("about 70 s in all, 4 cells")
    assert in_all([*rows, row("e", 70)], 2).startswith("about 80 s in all")
