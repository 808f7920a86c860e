"""Experiments on a real SLURM, to their ends: rows and weights as by the local engine, whatever comes between."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cvlctl import checkpoints
from cvlctl.experiments.engines import squeue

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.usefixtures("cluster")]
TEXT = """\
out: OUT
slurm: {mem: 900M, time: 5}
matrix: {seed: [0, 1]}
stages:
  data:
    {command: build-dataset, task: gym/Pendulum-v1, source: {name: random, episodes: 2}, out: "${out}/p.zarr"}
  critic:
    {command: pretrain, stores: ["${out}/p.zarr"], critic: {hidden: [8], latent_dim: 4}, steps: 4, batch_size: 16,
     seeds: [0, 1], threads: 1, out: "${out}/critic"}
  policy:
    {command: finetune, stores: ["${out}/p.zarr"], algorithm: {name: bc, hidden: [8]}, steps: 9,
     batch_size: 16, seeds: ["${seed}"], threads: 1, label: "bc ${seed}", out: "${out}/policy/${seed}"}
  tuned:
    {command: finetune, stores: ["${out}/p.zarr"], init_from: "${out}/critic", algorithm: {name: cvl, hidden: [8]},
     steps: 9, batch_size: 16, seeds: [0, 1], threads: 1, out: "${out}/policy/tuned"}
  scores: {command: evaluate, runs: ["${out}/policy/*"], episodes: 1, workers: 0, out: "${out}/scores"}
"""
SECONDS = 50.0  # that a policy trains: more than SLURM's 40 at most
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`cvlctl run` of the experiment, its answer as JSON."""
    path = tmp_path / "e.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "e")))

    def call(*arguments: str, code: int = 0) -> dict[str, Any]:
        command = [sys.executable, "-P", "-m", "cvlctl", "run", str(path), *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    return call


def states(answer: dict[str, Any]) -> dict[str, str]:
    return {row["cell"]: row["state"] for row in answer["cells"]}


def result(out: Path) -> tuple[list[str], dict[str, dict[str, torch.Tensor]]]:
    """The rows of the evaluation, and the weights of all runs."""
    runs = {file.parents[1].name: checkpoints.load(file)[0] for file in out.rglob("last.safetensors")}
    return (out / "scores" / "rows.jsonl").read_text().splitlines(), runs


def assert_same(out: Path, other: Path) -> None:
    (rows, runs), (other_rows, other_runs) = result(out), result(other)
    assert rows == other_rows
    assert len(rows) == 4
    assert runs.keys() == other_runs.keys() == {"critic", "0", "1", "tuned"}
    for name, state in runs.items():
        assert state.keys() == other_runs[name].keys()
        assert all(torch.equal(state[key], other_runs[name][key]) for key in state), name


def test_an_experiment_ends_in_the_same_rows_and_weights_as_on_one_machine(run: Run, tmp_path: Path) -> None:
    local = tmp_path / "local"
    assert run(f"out={local}")["status"] == "done"

    plan = run("--engine", "slurm", "--dry-run")
    assert [one["cells"] for one in plan["arrays"]] == [1, 1, 2, 1, 1]
    assert all(Path(one["file"]).read_text().startswith("#!/bin/bash\n") for one in plan["arrays"])

    # a policy that cannot be: its scores wait, the others go on
    broken = ["--engine", "slurm", "stages.tuned.init_from=${out}/nowhere"]
    first = run(*broken)
    assert first["status"] == "submitted"
    assert all(one["job"].isdecimal() for one in first["arrays"])
    assert run(*broken)["arrays"] == []
    ended = run(*broken, "--status", "--follow", code=2)
    assert states(ended) == {
        "p.zarr": "done", "critic": "done", "policy/0": "done", "policy/1": "done", "policy/tuned": "failed",
        "scores": "blocked",
    }  # fmt: skip
    assert "nowhere" in next(row["why"] for row in ended["cells"] if row["cell"] == "policy/tuned")

    # mended: what is missing, and no more
    second = run("--engine", "slurm")
    assert [one["stage"] for one in second["arrays"]] == ["tuned", "scores"]
    assert set(states(run("--engine", "slurm", "--status", "--follow")).values()) == {"done"}
    last = run("--engine", "slurm")
    assert last["status"] == "finished already"
    assert len(last["scores"]) == 1
    assert_same(tmp_path / "e", local)


def progress(out: Path, cell: str) -> int:
    """How many steps a cell says that it has made."""
    file = out / "cells" / cell / "state.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    return int(told.get("progress", {}).get("done", 0))


def test_time_limits_and_a_cancelled_job_change_no_bit(run: Run, tmp_path: Path) -> None:
    """A minute a job, of which SLURM leaves at most 40 seconds until it warns; one job is cancelled amid its work."""
    out, local, probe = tmp_path / "e", tmp_path / "local", tmp_path / "probe"
    short = ["stages.policy.steps=2000", "stages.policy.compile=false"]
    run(f"out={probe}", "--only", "stage=policy", *short)
    rate = json.loads((probe / "cells/policy/0/state.json").read_text())["progress"]["rate"]
    steps = int(rate * SECONDS)
    long = [f"stages.policy.steps={steps}", "stages.policy.compile=false"]
    assert run(f"out={local}", *long)["status"] == "done"

    on_slurm = [*long, "--engine", "slurm", "slurm.time=1"]
    run(*on_slurm)
    begin = time.monotonic()
    while progress(out, "policy/1") == 0:
        assert time.monotonic() - begin < 100
        time.sleep(0.2)
    rows = run(*on_slurm, "--status")["cells"]
    squeue.cancel([row["job"] for row in rows if row["cell"] == "policy/1"])
    ended = states(run(*on_slurm, "--status", "--follow", code=2))
    assert (ended["policy/0"], ended["policy/1"], ended["scores"]) == ("done", "stopped", "blocked")
    said = "".join(file.read_text() for file in (out / "cells/slurm").glob("policy-*.txt"))
    assert "DUE TO JOB REQUEUE" in said
    assert 0 < progress(out, "policy/1") < steps

    on_slurm[-1] = "slurm.time=10"
    assert {one["stage"] for one in run(*on_slurm)["arrays"]} == {"policy", "scores"}
    assert set(states(run(*on_slurm, "--status", "--follow")).values()) == {"done"}
    assert_same(out, local)
