"""The training loop: seeds alone and in company, exact resume, checkpoints, divergence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_runs import CRITIC, MOST, load, recipe_of, run, state_of, without

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.loop import _check_finite
from cvlctl.learn.pretrain import pretrain
from cvlctl.runs import read_metrics


@pytest.mark.parametrize("name", MOST)
def test_a_seed_trains_alike_alone_and_in_company(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "alone", "seeds=[3]", "steps=50")
    run(name, store, tmp_path / "together", "seeds=[0,3]", "steps=50")
    alone, together = state_of(tmp_path / "alone"), state_of(tmp_path / "together")
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        if value.dim():
            assert (value[0] - together[key][1]).abs().max() < 1e-5, key
    weight = "phi.0.weight" if name.startswith("occupancy") else "actor.0.weight"
    assert (together[weight][0] - together[weight][1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", MOST)
def test_a_resumed_run_ends_with_the_same_bits(name: str, store: Path, tmp_path: Path, monkeypatch) -> None:
    often = ("steps=30", "checkpoint_seconds=1e-9")
    run(name, store, tmp_path / "whole", "steps=30")
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    for _ in range(3):  # stopped after step 1, 2 and 3: the clock is always due
        monkeypatch.setattr(checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(name, store, tmp_path / "cut", *often)
    monkeypatch.setattr(checkpoints, "save", save)
    assert run(name, store, tmp_path / "cut", *often)["status"] == "trained"
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


LONG = ["steps=1500", "checkpoint_seconds=0.05"]  # to be killed in the midst of it


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("whole") / "run"
    run("occupancy", store, out, *LONG)
    return state_of(out)


@pytest.mark.parametrize("end", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_killed_from_outside(end: signal.Signals, store: Path, whole: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """kill -9 loses what the clock had not saved, Ctrl-C nothing; the same command goes on to the same bits."""
    recipe_of("occupancy", store, tmp_path / "cut", *LONG)
    command = [sys.executable, "-P", "-m", "cvlctl", "pretrain", str(tmp_path / "cut.yaml"), *LONG]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ})
    last = tmp_path / "cut" / "checkpoints" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(end)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), stderr.decode()
    assert b"Traceback" not in stderr
    before = checkpoints.load(last)[1]["step"]
    assert 0 < before < 1500
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    cut = state_of(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_damaged_metadata_cannot_be_resumed(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run", "steps=1")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    without(tmp_path / "run" / "checkpoints" / "last.safetensors", "settings")
    with pytest.raises(CvlctlError, match=r"last\.safetensors: .*'settings'\n.*--force"):
        run("bc", store, tmp_path / "run", "steps=1")


@pytest.mark.parametrize(
    ("seconds", "left"),
    [
        ("60", "no checkpoint was saved before"),
        ("1e-9", r"the last checkpoint .*last.safetensors\) has diverged too"),
    ],
)
def test_divergence_is_an_error_and_not_a_score(seconds: str, left: str, store: Path, tmp_path: Path) -> None:
    text = f"steps: 300, critic: {CRITIC[:-1]}, learning_rate: 1e18}}, checkpoint_seconds: {seconds}"
    recipe = load("pretrain", store, tmp_path / "run", text)
    with pytest.raises(CvlctlError, match=f"diverged.*\n.*{left}"):
        pretrain(recipe)


def test_divergence_after_a_sound_checkpoint_says_so(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run", "steps=3")
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    with pytest.raises(CvlctlError, match="the last checkpoint, of step 3, is sound"):
        _check_finite({"loss": [np.nan]}, 10, last)


def test_algorithms_export_what_the_loop_asks_for() -> None:
    for name, module in ALGORITHMS.items():
        assert all(hasattr(module, part) for part in ("Config", "draws", "init", "step")), name
