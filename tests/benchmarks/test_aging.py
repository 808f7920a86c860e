"""Update rates are those of states with dead units, ours and peers', as they are after thousands of updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cvlctl.learn.algorithms import ALGORITHMS, occupancy
from cvlctl.learn.settings import Settings

Script = Callable[[str], Any]


def denormals(x: torch.Tensor) -> int:
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    return int(((bits > 0) & (bits < 0x00800000)).sum())


def in_state(state: dict[str, torch.Tensor]) -> float:
    """The share of Adam's first moments that are denormal."""
    moments = [value for name, value in state.items() if "/m/" in name]
    return sum(map(denormals, moments)) / sum(value.numel() for value in moments)


@pytest.mark.parametrize("name", ["cvl", "td3_bc", "bc"])
@pytest.mark.parametrize("flushed", [True, False])
def test_ours_stay_aged_where_nothing_is_flushed(name: str, flushed: bool, script: Script) -> None:
    common, module = script("common"), ALGORITHMS[name]
    data, config = common.synthetic(2_000), module.Config(hidden=(64, 64))
    kept = {}
    init = module.init

    def remembered(*arguments: Any) -> Any:
        kept["state"] = init(*arguments)
        return kept["state"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "init", remembered)
        how = Settings("cpu", 1, "float32", False) if flushed else common.shipped(1)
        run = common.learner(module, config, [0], data, 16, how)
    assert 0.005 < in_state(kept["state"]) < 0.06
    run(4)
    assert (in_state(kept["state"]) == 0) == flushed
    if not flushed:
        assert in_state(kept["state"]) > 0.005


@pytest.mark.parametrize("flushed", [True, False])
def test_so_do_peers(flushed: bool, script: Script) -> None:
    common, critic, aging = script("common"), script("critic"), script("aging")
    data = common.synthetic(2_000)
    how = Settings("cpu", 1, "float32", False) if flushed else common.shipped(1)
    run = critic.theirs(data, occupancy.Config(hidden=(64, 64)), 16, how)
    with aging.watched() as optimisers:
        common.warm_up(run, 2)
    assert len(optimisers) == len(critic.SEEDS)
    run(3)
    averages = [average["exp_avg"] for optimiser in optimisers for average in optimiser.state.values()]
    share = sum(map(denormals, averages)) / sum(average.numel() for average in averages)
    assert share == 0 if flushed else 0.005 < share < 0.06
    with aging.watched() as others:
        pass
    assert others == []
