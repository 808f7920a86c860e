"""A training step as one program: compiled and captured steps do what the eager step does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from toy_runs import ALL, MOST, run, state_of

from cvlctl.learn.settings import have_compiler


@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["cvl", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != "cvl")])
def test_compiled_and_eager_steps_agree(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "eager")
    run(name, store, tmp_path / "compiled", "compile=true")
    eager, compiled = state_of(tmp_path / "eager"), state_of(tmp_path / "compiled")
    for key, value in eager.items():
        assert (value - compiled[key]).abs().max() < 2e-3, key


@pytest.mark.slow
@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
def test_compiled_and_eager_steps_agree_in_bf16(store: Path, tmp_path: Path) -> None:
    """As a whole: they round at other places, and Adam makes a step of a single weight's rounding error."""
    run("cvl", store, tmp_path / "eager", "precision=bf16")
    run("cvl", store, tmp_path / "compiled", "precision=bf16", "compile=true")
    run("cvl", store, tmp_path / "exact", "precision=float32")
    eager, compiled, exact = (state_of(tmp_path / name) for name in ("eager", "compiled", "exact"))
    for key, value in exact.items():
        for rounded in (eager, compiled):
            assert (rounded[key] - value).norm() <= (0.05 if "adam/" in key else 0.01) * value.norm(), key
    assert not torch.equal(eager["phi.0.weight"], exact["phi.0.weight"])


@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
def test_any_number_of_compiled_runs_in_one_process(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{**k, "backend": "eager", "mode": None}))
    for width in range(8, 18):  # torch's limit is 8 for one function
        more = ("compile=true", "steps=2", f"algorithm.hidden=[{width}]")
        assert run("bc", store, tmp_path / str(width), *more)["status"] == "trained"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", MOST)
def test_cuda_graph_and_eager_steps_agree(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "eager", "device=cuda", "precision=float32")
    run(name, store, tmp_path / "graph", "device=cuda", "precision=float32", "compile=true")
    eager, graph = state_of(tmp_path / "eager"), state_of(tmp_path / "graph")
    for key, value in eager.items():
        assert (value - graph[key]).abs().max() < 2e-3, key
