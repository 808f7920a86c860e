"""Numbers below 1.2e-38, which cost an Intel processor a hundred cycles each, are 0 in every thread that trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from toy_runs import run

from cvlctl import checkpoints
from cvlctl.learn import labellers, settings
from cvlctl.learn.settings import Settings, configure

TINY = 1e-39


def denormals(x: torch.Tensor) -> int:
    """By their bits: a comparison with 0 would take them for 0 where they are flushed."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return int(((bits > 0) & (bits < 0x00800000)).sum())


def test_the_flag_is_on_here_and_in_threads_of_openmp_that_were_there_before() -> None:
    x = torch.full((2**20,), TINY)
    torch.set_num_threads(2)
    assert denormals(x * 1) == len(x)  # and there are two threads now
    torch.set_flush_denormal(True)
    assert denormals(x * 1) == len(x) // 2
    configure(Settings("cpu", 2, "float32", False))
    assert denormals(x * 1) == 0


def stopped(store: Path, out: Path) -> Path:
    """A run after two of its five updates, with dead units whose Adam moments have decayed as far as they go."""
    run("bc", store, out, "steps=5")
    torch.set_flush_denormal(False)  # else 1e-39 were 0 already
    last = out / "checkpoints" / "last.safetensors"
    state, metadata = checkpoints.load(last)
    for name, value in state.items():
        if name.startswith("adam/") and value.ndim > 1:
            value.fill_(TINY)
        elif name.endswith("0.bias"):
            value.fill_(-1e3)
    checkpoints.save(last, state, metadata | {"step": 2})
    record = out / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    return last


@pytest.mark.parametrize("flushed", [True, False])
def test_a_trained_state_holds_none(
    flushed: bool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = stopped(store, tmp_path / "run")
    if not flushed:
        monkeypatch.setattr(settings, "flush_denormals", lambda: None)
    run("bc", store, tmp_path / "run", "steps=5")
    state, metadata = checkpoints.load(last)
    found = sum(denormals(value) for value in state.values() if value.dtype == torch.float32)
    assert metadata["step"] == 5 and (found == 0) == flushed


def test_nor_do_learned_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    monkeypatch.setattr(labellers, "flush_denormals", lambda: called.append(True))
    x = torch.zeros(8, 2)
    labellers.learn("oril", labellers.Config(steps=1, hidden=(4,), batch_size=2), x, x, [0], "cpu")
    assert called
