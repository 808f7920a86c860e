"""What an update costs beside its arithmetic: no copy from the host, for which a GPU would wait; no idle averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_runs import MOST, load, run

from cvlctl.data import samplers
from cvlctl.learn import loop, programs
from cvlctl.learn.algorithms import values
from cvlctl.learn.finetune import finetune

aten = torch.ops.aten
WAITS = (aten.lift_fresh, aten._local_scalar_dense)  # tensors made of Python's numbers; numbers read from tensors


class NoWait(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in WAITS, f"{func} waits for a GPU"
        return func(*args, **(kwargs or {}))


def watched(call: Callable[..., Any]) -> Callable[..., Any]:
    def watching(*args: Any) -> Any:
        with NoWait():
            return call(*args)

    return watching


def test_what_is_watched_for() -> None:
    for waits in (lambda x: x.new_tensor([1.0]), torch.Tensor.item):
        with pytest.raises(AssertionError, match="waits"):
            watched(waits)(torch.ones(1))


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither draws nor batches nor updates wait."""
    programs_of = programs.programs_of
    monkeypatch.setattr(loop, "programs_of", lambda *args: [watched(program) for program in programs_of(*args)])
    monkeypatch.setattr(loop, "gather", watched(loop.gather))
    monkeypatch.setattr(samplers, "draw", watched(samplers.draw))


@pytest.mark.parametrize("name", MOST)
def test_an_update_waits_for_nothing(name: str, store: Path, tmp_path: Path, no_waiting: None) -> None:
    run(name, store, tmp_path / "run", "steps=2")


def test_an_update_on_a_policy_waits_for_nothing(store: Path, tmp_path: Path, no_waiting: None) -> None:
    run("bc", store, tmp_path / "bc", "steps=2")
    more = ("steps=2", f"policy={tmp_path / 'bc'}")
    for loss in ("td_info_nce", "td_spectral"):
        run("occupancy-td", store, tmp_path / loss, f"critic.loss={loss}", *more)
    text = f"algorithm: {{name: fqe, hidden: [16]}}, init_from: '{tmp_path / 'bc'}', steps: 2"
    finetune(load("finetune", store, tmp_path / "fqe", text))


@pytest.mark.parametrize("name", ["td3_bc", "contrastive_ac"])
def test_targets_rest_while_the_critic_learns_alone(
    name: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates, ema_update = [], values.ema_update

    def spied(state: Any, target: str, names: Any, rate: float) -> None:
        rates.append(rate)
        ema_update(state, target, names, rate)

    monkeypatch.setattr(values, "ema_update", spied)
    run(name, store, tmp_path / "run", "steps=4")
    assert rates == [0.005, 0.005]
