"""A whole experiment, 3 tasks x 6 methods x 3 seeds, that tests start, kill and look at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvlctl import checkpoints
from cvlctl.files import read_json

TEXT = """\
out: e
slurm: {mem: 900M, time: 10}
matrix:
  task: [gym/Pendulum-v1, gym/MountainCarContinuous-v0, gym/Hopper-v5]
  method:
    - {name: bc, hidden: [8]}
    - {name: td3_bc, hidden: [8]}
    - {name: iql, hidden: [8]}
    - {name: successor_features, hidden: [8]}
    - {name: cvl, hidden: [8], bank_size: 16, critic: {hidden: [8], latent_dim: 4}}
    - {name: laeo, hidden: [8], num_examples: 16, critic: {hidden: [8], latent_dim: 4}}
stages:
  data: {command: build-dataset, task: "${task}", source: {name: random, episodes: 6}, horizon: 60,
    out: "${out}/data/${task}.zarr"}
  critic: {command: pretrain, stores: ["${out}/data/${task}.zarr"], critic: {hidden: [8], latent_dim: 4},
    steps: 300, batch_size: 32, seeds: [0, 1, 2], checkpoint_seconds: 0.5, out: "${out}/critic/${task}"}
  policy: {command: finetune, stores: ["${out}/data/${task}.zarr"], algorithm: "${method}",
    success_examples: {from: "${out}/data/${task}.zarr", rule: last}, steps: 300, batch_size: 32, seeds: [0, 1, 2],
    checkpoint_seconds: 0.5, out: "${out}/policy/${task}/${method.name}"}
  scores: {command: evaluate, runs: ["${out}/policy/*/*/*"], episodes: 2, horizon: 60, confidence: {resamples: 100},
    out: "${out}/scores"}
"""


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """`cvlctl run` in a folder, as the leader of a session."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(p) for p in sys.path if p)}
    (folder / "e.yaml").write_text(TEXT)
    with open(folder / "said.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "cvlctl", "run", "e.yaml", *options],
            cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """All weights and rows of the experiment, by name."""
    rows = {"rows": (folder / "e" / "scores" / "rows.jsonl").read_bytes()}
    for path in sorted((folder / "e").rglob("last.safetensors")):
        state, _ = checkpoints.load(path)
        rows[str(path.relative_to(folder))] = b"".join(state[name].numpy().tobytes() for name in sorted(state))
    return rows


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One cell after the other, undisturbed."""
    folder = tmp_path_factory.mktemp("reference")
    assert start(folder, "local.processes=1").wait() == 0, (folder / "said.txt").read_text()[-3000:]
    found = content(folder)
    assert len(found) == 1 + 3 + 18
    assert found["rows"].count(b"\n") == 3 * 6 * 3 * 2
    return found


def running(folder: Path) -> Iterator[tuple[str, int]]:
    """Cells in training, and their processes."""
    for path in (folder / "e" / "cells").rglob("state.json"):
        told = read_json(path) or {}
        trains = told.get("state") == "running" and told.get("progress", {}).get("unit") == "updates"
        if trains and Path("/proc", str(told["pid"])).exists():  # and was not killed
            yield path.parent.name, told["pid"]


def kill_one(folder: Path) -> None:
    """`kill -9` of a cell, once one is in the middle of its training."""
    os.kill(wait_for_one(folder), signal.SIGKILL)


def wait_for_one(folder: Path) -> int:
    """The process of a cell that is in the middle of its training, as soon as there is one."""
    until = time.monotonic() + 600
    while not (found := list(running(folder))):
        assert time.monotonic() < until, (folder / "said.txt").read_text()[-3000:]
        time.sleep(0.02)
    return found[0][1]
