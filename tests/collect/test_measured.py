"""Checkpoints of an agent, measured: mixes of a wanted success rate, and the first that reaches a share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_builds import BIASES, Killed, agent, die_in_flush, recipe_for

from cvlctl.collect import measured
from cvlctl.collect.build import build
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError

MIX = {"name": "mix", "success_rate": 0.475, "episodes": 120}


@pytest.mark.parametrize(("rate", "tolerance"), [(0.475, 0.025), (0.1, 0.02)])
def test_mix_meets_the_success_rate(one_step: None, tmp_path: Path, rate: float, tolerance: float) -> None:
    run = agent(tmp_path / "agent.policies", BIASES)
    source = MIX | {"run": str(run), "success_rate": rate, "tolerance": tolerance}
    summary = build(recipe_for(tmp_path / "mix.zarr", source, horizon=1, checkpoint_seconds=60))
    assert summary["episodes"] == summary["transitions"] == 120
    assert abs(summary["success_rate"] - rate) <= tolerance
    store = open_store(tmp_path / "mix.zarr")
    said = store.attributes["collector"]
    assert said["achieved_success_rate"] == summary["success_rate"] == store.successes().sum() / 120
    used = {one["step"]: one for one in said["checkpoints"]}
    assert sum(one["episodes"] for one in used.values()) == 120
    assert sum(one["successes"] for one in used.values()) == store.successes().sum()
    assert sum(one["episodes"] >= 5 for one in used.values()) >= 3  # several checkpoints
    assert used[10]["measured_success_rate"] < used[40]["measured_success_rate"] < used[60]["measured_success_rate"]


def test_mix_resumes(one_step: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = agent(tmp_path / "agent.policies", BIASES)
    source = MIX | {"run": str(run), "tolerance": 0.1, "episodes": 30}
    build(recipe_for(tmp_path / "whole.zarr", source, horizon=1))
    with monkeypatch.context() as patched:
        die_in_flush(patched, 17)
        with pytest.raises(Killed):
            build(recipe_for(tmp_path / "cut.zarr", source, horizon=1))
    build(recipe_for(tmp_path / "cut.zarr", source, horizon=1))
    cut, whole = open_store(tmp_path / "cut.zarr"), open_store(tmp_path / "whole.zarr")
    assert cut.digest() == whole.digest() and cut.label_digest() == whole.label_digest()
    ours, theirs = (store.attributes["collector"]["checkpoints"] for store in (cut, whole))
    assert ours == theirs


def test_mix_says_why_not(one_step: None, tmp_path: Path) -> None:
    run = agent(tmp_path / "agent.policies", {10: -3.0, 20: -3.0})
    source = MIX | {"run": str(run)}
    with pytest.raises(CvlctlError, match=r"no mix .* 47\.5%.* 0% at 10"):
        build(recipe_for(tmp_path / "x.zarr", source, horizon=1))
    unfinished = agent(tmp_path / "more.policies", BIASES, status="started")
    with pytest.raises(CvlctlError, match="finished online"):
        build(recipe_for(tmp_path / "x.zarr", source | {"run": str(unfinished)}))
    few = MIX | {"run": str(agent(tmp_path / "b.policies", BIASES)), "episodes": 3, "tolerance": 0.01}
    with pytest.raises(CvlctlError, match=r"of 3 episodes succeed, 47\.5% asked for"):
        build(recipe_for(tmp_path / "y.zarr", few, horizon=1))
    assert not (tmp_path / "x.zarr").exists() and not (tmp_path / "y.zarr").exists()


def test_mixer_by_itself() -> None:
    true = np.array([0, 0.2, 0.15, 0.3, 0.9, 0.4, 0.35, 0.65, 0.6, 0.8])  # as measured on window-open
    for target in (0.475, 0.1):
        rates = []
        for seed in range(10):
            rng = np.random.default_rng(seed)
            mixer = measured.Mixer((rng.binomial(10, true) / 10).tolist(), 10, target)
            for _ in range(200):
                place = mixer.choose()
                mixer.record(place, rng.random() < true[place])
            rates.append(mixer.rate)
        assert np.abs(np.array(rates) - target).max() <= 0.02


def test_checkpoint_that_first_reaches_a_share(one_step: None, tmp_path: Path, capsys: Any) -> None:
    # mean return of three steps, 3 (1 + E tanh): 0.1 at 10, 0.5 at 20, 1.4 at 30, 3 at 40, 4.2 at 50, 5.4 at 60
    run = agent(tmp_path / "agent.policies", BIASES)
    rule = {"run": str(run), "reaches": 0.333, "episodes": 60}
    medium = {"name": "policy", "checkpoints": rule, "transitions": 100}
    summary = build(recipe_for(tmp_path / "medium.zarr", medium))
    chosen = open_store(tmp_path / "medium.zarr").attributes["collector"]["chosen"]
    assert chosen["step"] == 40 and [step for step, _ in chosen["measured"]] == [10, 20, 30, 40]
    assert chosen["return_mean"] >= 0.333 * chosen["last_return_mean"] > chosen["measured"][-2][1]
    assert (summary["episodes"], summary["transitions"]) == (34, 102)  # whole episodes
    assert "frame 40" in capsys.readouterr().err
    assert summary["return_mean"] == pytest.approx(chosen["return_mean"], abs=1.0)
    always = build(recipe_for(tmp_path / "all.zarr", medium | {"checkpoints": rule | {"reaches": 1.0}}))
    assert always["return_mean"] > 2 * summary["return_mean"] - 2  # the last one always reaches itself
