"""Online learners' steps as CUDA graphs, emulated: a replay's batches are captured as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from toy_builds import CONTRASTIVE, SAC, recipe_for

from cvlctl import checkpoints
from cvlctl.collect import online
from cvlctl.collect.build import build
from cvlctl.collect.online import policies_dir
from cvlctl.data.store import open_store


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(SAC, id="sac"),
        pytest.param(CONTRASTIVE, id="contrastive_ac", marks=pytest.mark.slow),
        pytest.param({**SAC, "name": "cvl", "bank_size": 16}, id="cvl", marks=pytest.mark.slow),
    ],
)
def test_a_captured_step_is_the_eager_one(source: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    short = {**source, "steps": 56, "learning_starts": 40}
    build(recipe_for(tmp_path / "eager.zarr", short))
    monkeypatch.setattr(online, "programs_of", graphs.as_on_a_gpu)
    with graphs.emulated():
        build(recipe_for(tmp_path / "graph.zarr", short))
    eager, graphed = (
        checkpoints.load(policies_dir(tmp_path / name) / "checkpoints" / "last.safetensors")[0]
        for name in ("eager.zarr", "graph.zarr")
    )
    for key, value in eager.items():
        torch.testing.assert_close(graphed[key], value, rtol=1e-3, atol=1e-3)


def test_auto_is_the_cpu_where_there_is_a_gpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that waits for every frame gains nothing from a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    store = tmp_path / "pendulum.zarr"
    build(recipe_for(store, {**SAC, "steps": 10, "learning_starts": 8}))
    assert open_store(store).attributes["collector"]["settings"]["device"] == "cpu"
