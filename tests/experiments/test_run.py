"""`cvlctl run`: the stages in order, skipped where finished; the plan."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli.console import console
from cvlctl.errors import CvlctlError
from cvlctl.experiments import plan, show
from cvlctl.experiments.commands import load
from cvlctl.experiments.run import run_experiment

TINY = """\
out: OUT
matrix:
  task: [gym/Pendulum-v1]
  algorithm: [{name: cvl, hidden: [8], bank_size: 16}, {name: laeo, hidden: [8]}]
stages:
  data:
    command: build-dataset
    task: ${task}
    source: {name: random, episodes: 2}
    out: ${out}/${task}.zarr
    threads: 1
  pretrain:
    command: pretrain
    stores: ["${out}/${task}.zarr"]
    critic: {hidden: [8], latent_dim: 4}
    steps: 4
    batch_size: 16
    seeds: [0, 1]
    out: ${out}/pretrain/${task}
    threads: 1
  finetune:
    command: finetune
    stores: ["${out}/${task}.zarr"]
    init_from: ${out}/pretrain/${task}
    algorithm: ${algorithm}
    success_examples: {from: "${out}/${task}.zarr", rule: last}
    steps: 4
    batch_size: 16
    seeds: [0, 1]
    out: ${out}/finetune/${task}/${algorithm.name}
    threads: 1
  cloning:
    command: finetune
    stores: ["${out}/${task}.zarr"]
    algorithm: {name: bc, hidden: [8]}
    steps: 4
    batch_size: 16
    seeds: [0, 1]
    out: ${out}/finetune/${task}/bc
    threads: 1
  scores:
    command: evaluate
    runs: ["${out}/finetune/*/*/*"]
    episodes: 1
    workers: 0
    out: ${out}/scores
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(TINY.replace("OUT", str(tmp_path / "e")))
    return path


def run(path: Path, *overrides: str, **options: bool) -> dict[str, Any]:
    return run_experiment(load(path, overrides, "run"), **options)


def states(path: Path, *overrides: str) -> list[str]:
    return [cell["state"] for cell in run(path, *overrides, dry_run=True)["cells"]]


def test_the_whole_chain_and_again(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert states(experiment) == ["to do"] * 6
    assert not (tmp_path / "e").exists()
    result = run(experiment)
    assert result["status"] == "done"
    assert [cell["command"] for cell in result["cells"]] == [
        "build-dataset", "pretrain", "finetune", "finetune", "finetune", "evaluate",
    ]  # fmt: skip
    assert {record["algorithm"] for record in result["scores"][0]["table"]} == {"cvl", "laeo", "bc"}
    lines = [line for line in capsys.readouterr().err.splitlines() if "/6 " in line]
    assert "3/6 finetune: finetune gym/Pendulum-v1 cvl" in lines
    assert any(line.startswith("6/6 scores: evaluate: done in ") for line in lines)

    assert states(experiment) == ["finished"] * 6
    again = run(experiment)
    assert again["status"] == "finished already"
    assert again["scores"][0]["table"] == result["scores"][0]["table"]
    lines = [line for line in capsys.readouterr().err.splitlines() if "/6 " in line]
    assert len(lines) == 6
    assert all(line.endswith(": finished already") for line in lines)

    show.render(again, console())
    out = capsys.readouterr().out
    assert str(tmp_path / "e" / "scores" / "scores.png") in out
    assert f"runs:   {tmp_path / 'e' / 'finetune' / 'gym' / 'Pendulum-v1' / 'cvl'}" in out

    # a run of an earlier version, which lacks keys that came since, is as finished
    for file in (tmp_path / "e").rglob("run.json"):
        before = json.loads(file.read_text())
        before["recipe"].pop("memory_gb", None)
        written = file.stat().st_mtime_ns
        file.write_text(json.dumps(before))
        os.utime(file, ns=(written, written))  # else what reads it would be older
    assert states(experiment) == ["finished"] * 6

    # one stage changed: it alone is another recipe, and says so before anything is lost; what reads it waits for it
    changed = "stages.cloning.steps=3"
    assert states(experiment, changed) == ["finished"] * 4 + ["another recipe", "finished"]
    log = tmp_path / "e" / "cells" / "finetune" / "gym" / "Pendulum-v1" / "bc" / "log.txt"
    before = log.read_text()
    failed = run(experiment, changed)
    assert [row["state"] for row in failed["cells"]] == ["finished"] * 4 + ["failed", "blocked"]
    assert re.search(r"bc holds another run: steps was 4, now 3", failed["cells"][4]["error"])
    assert log.read_text() == before and not any("seconds" in row for row in failed["cells"])  # nothing was started
    capsys.readouterr()
    show.render(failed, console())
    assert "bc: hint: a run goes on to more steps" in (out := capsys.readouterr().out) and "the end of" not in out
    assert "nothing was started" in out and "the same command" not in out
    assert [row["state"] for row in run(experiment, changed, fail_fast=True)["cells"]][4:] == ["failed", "blocked"]
    show.render(run(experiment, changed, dry_run=True), console())
    assert "bc holds another run: steps was 4, now 3" in capsys.readouterr().out
    store = run(experiment, "stages.data.source.episodes=3")["cells"]
    assert [row["state"] for row in store] == ["failed"] + ["blocked"] * 5
    assert store[0]["error"].endswith("v1.zarr holds a store of another recipe: source.episodes was 2, now 3")
    # more steps go on, another name is one: both are asked of the command; where it is shown is no matter
    for more, state in (("steps=5", "partial"), ("label=x", "partial"), ("loggers=[trackio]", "finished")):
        assert states(experiment, f"stages.cloning.{more}")[4] == state
    # of another recipe and without a checkpoint: its command just starts it anew
    record = tmp_path / "e" / "finetune" / "gym" / "Pendulum-v1" / "bc" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"status": "started"}))
    assert states(experiment, changed)[4] == "another recipe"
    (record.parent / "checkpoints" / "last.safetensors").unlink()
    assert states(experiment, changed)[4] == "to do"
    # a stage that was not finished: it and what reads it run
    record.unlink()
    assert states(experiment)[4] == "to do"


def test_nothing_starts_where_a_later_stage_is_wrong(experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=r"stages\.scores\.episodes"):
        run(experiment, "stages.scores.episodes=none")
    assert not (tmp_path / "e").exists()


def test_the_plan_has_sizes_and_estimates_that_grow(
    experiment: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # however long the folder's name: nothing is wrapped
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # as where nothing was measured
    small = run(experiment, dry_run=True)
    assert [cell["size"] for cell in small["cells"]] == [
        "2 episodes", "4 steps x 2 seeds", "4 steps x 2 seeds", "4 steps x 2 seeds", "4 steps x 2 seeds",
        "6 policies x 1 episode",
    ]  # fmt: skip
    overrides = ["stages.pretrain.steps=100000", "stages.data.source={name: sac, steps: 500000}"]
    large = run(experiment, *overrides, dry_run=True)
    assert large["cells"][0]["size"] == "500,000 steps of SAC"
    # measured on two cores: about 230 to 290 frames a second end to end
    assert 1000 < large["cells"][0]["estimate_seconds"] < 4000
    assert large["cells"][1]["estimate_seconds"] > 30 > small["cells"][1]["estimate_seconds"]
    wide = [*overrides, "stages.pretrain.critic.hidden=[512,512]", "stages.pretrain.batch_size=1024"]
    estimate = run(experiment, *wide, dry_run=True)["cells"][1]["estimate_seconds"]
    assert estimate > 10 * large["cells"][1]["estimate_seconds"]
    show.render(large, console())
    out = capsys.readouterr().out
    assert "500,000 steps of SAC" in out
    assert "to do: about" in out
    assert re.search(r"\nthreads: 1 of \d+ \(so says the recipe\): data, pretrain, finetune, cloning\n", out)


def test_a_partial_store_is_seen(experiment: Path, tmp_path: Path) -> None:
    (tmp_path / "e" / "gym" / "Pendulum-v1.zarr.partial").mkdir(parents=True)
    assert states(experiment)[0] == "partial"
    (tmp_path / "e" / "gym" / "Pendulum-v1.zarr").mkdir()
    assert states(experiment)[0] == "another recipe"


@pytest.mark.parametrize(("seconds", "text"), [(0, "1 s"), (59, "59 s"), (600, "10 min"), (9000, "2.5 h")])
def test_rough_durations(seconds: float, text: str) -> None:
    assert plan.rough(seconds) == text


def test_a_plan_of_many_cells_is_drawn_a_line_a_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"stage": "train", "command": "finetune", "combination": {}, "out": "x", "size": "1 step", "threads": None,
           "needs": [], "estimate_seconds": 30}  # fmt: skip
    cells = [{**row, "cell": f"train/{i}", "state": "finished" if i < 50 else "to do"} for i in range(1050)]
    show.render({"status": "planned", "out": "runs/x", "at_once": 2, "cells": cells}, console())
    out = capsys.readouterr().out
    assert "train: finetune" in out and "1,050" in out and "50 finished, 1,000 to do" in out and "8.3 h" in out
    assert out.count("finetune") == 1 and "--json" in out
