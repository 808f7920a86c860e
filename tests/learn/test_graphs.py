"""Steps captured in CUDA graphs, emulated: nothing compiles after the first call, and they do what eager steps do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from toy_runs import ALL, VARIANTS, load, run, state_of

from cvlctl.learn import loop
from cvlctl.learn.finetune import finetune


def alike(eager: dict[str, torch.Tensor], graphed: dict[str, torch.Tensor]) -> None:
    assert eager.keys() == graphed.keys()
    for key, value in eager.items():
        torch.testing.assert_close(
            graphed[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


SLOW = {*VARIANTS, "contrastive_ac", "successor_features", "cvl-fourier", "cql"}  # seconds of tracing


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ALL])
def test_a_captured_step_is_the_eager_one(name: str, store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    run(name, store, tmp_path / "eager", "steps=10")
    monkeypatch.setattr(loop, "programs_of", graphs.as_on_a_gpu)
    with graphs.emulated():
        run(name, store, tmp_path / "graph", "steps=10")
    alike(state_of(tmp_path / "eager"), state_of(tmp_path / "graph"))


def test_a_captured_critic_of_a_policy_is_the_eager_one(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("bc", store, tmp_path / "bc", "steps=2")
    more = ("steps=10", "critic.loss=td_spectral", f"policy={tmp_path / 'bc'}")
    run("occupancy-td", store, tmp_path / "eager", *more)
    monkeypatch.setattr(loop, "programs_of", graphs.as_on_a_gpu)
    with graphs.emulated():
        run("occupancy-td", store, tmp_path / "graph", *more)
    alike(state_of(tmp_path / "eager"), state_of(tmp_path / "graph"))


def test_a_captured_evaluation_is_the_eager_one(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("bc", store, tmp_path / "bc", "steps=2")
    text = f"algorithm: {{name: fqe, hidden: [16]}}, init_from: '{tmp_path / 'bc'}', steps: 10"

    def evaluated(name: str) -> dict[str, torch.Tensor]:
        finetune(load("finetune", store, tmp_path / name, text))
        return state_of(tmp_path / name)

    eager = evaluated("eager")
    monkeypatch.setattr(loop, "programs_of", graphs.as_on_a_gpu)
    with graphs.emulated():
        alike(eager, evaluated("graph"))
