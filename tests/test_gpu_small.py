"""The tests for a GPU, on a CPU and eager: what they ask for is there, and they fail for no reason of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import test_gpu
import torch
from toy_stores import moving_point

from cvlctl.data.writer import write_store


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """And this machine in the place of a GPU."""
    monkeypatch.setattr(test_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(test_gpu, "COMPILED", False)
    monkeypatch.setattr(test_gpu, "ON_GPU", ("device=cpu", "compile=false"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    return write_store(tmp_path / "store" / "point.zarr", moving_point(), task="point").path


@pytest.mark.parametrize("name", ["td3_bc", "occupancy-of-policy", "fqe", "online sac"])
def test_steps(name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_gpu.test_a_step_is_the_same_on_cpu_and_gpu_and_in_a_graph(name, store, tmp_path, monkeypatch)


def test_two_hundred_updates(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test_gpu.test_nothing_waits_for_the_gpu_between_logs("bc", store, tmp_path, monkeypatch)


def test_a_run_in_parts_and_a_streamed_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_fsync: None
) -> None:
    test_gpu.test_a_streamed_run_is_captured_while_it_is_read("bc", tmp_path / "streamed")
    test_gpu.test_a_cut_run_goes_on_with_the_same_bits("bc", store, tmp_path, monkeypatch, None)


def test_pytest_alone_collects_them() -> None:
    """A machine that was equipped by hand has none of its plug-ins."""
    command = [sys.executable, "-P", "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    plugins = [flag for name in ("timeout", "xdist", "hypothesispytest") for flag in ("-p", f"no:{name}")]
    done = subprocess.run([*command, *plugins, test_gpu.__file__], cwd=Path(__file__).parents[1], capture_output=True)
    assert done.returncode == 0 and b"tests/test_gpu.py::test_a_step" in done.stdout, done.stdout.decode()
