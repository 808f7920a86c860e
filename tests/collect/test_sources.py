"""Stores of random, scripted and trained policies, and of other stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_builds import BIASES, PENDULUM, Killed, agent, die_in_flush, die_in_step, recipe_for, replayed

from cvlctl.collect import sources
from cvlctl.collect.build import build
from cvlctl.collect.online import policies_dir
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.play import envs
from cvlctl.play.policies import load_policy


def test_random_source(tmp_path: Path) -> None:
    build(recipe_for(tmp_path / "r.zarr", {"name": "random", "episodes": 3}, seed=4))
    store = open_store(tmp_path / "r.zarr")
    replayed(store, PENDULUM, 4)
    actions = np.delete(store.actions(), store.episode_ends() - 1)
    assert abs(actions.mean()) < 0.1 and 0.5 < actions.std() < 0.65  # uniform on [-1, 1]: 0.577


def test_random_source_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"name": "random", "episodes": 3}
    build(recipe_for(tmp_path / "whole.zarr", source))
    with monkeypatch.context() as patched:
        die_in_step(patched)
        with pytest.raises(Killed):
            build(recipe_for(tmp_path / "r.zarr", source))
    calls = []
    before = sources.collect_episode

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        return before(*args, **kwargs)

    monkeypatch.setattr(sources, "collect_episode", counted)
    build(recipe_for(tmp_path / "r.zarr", source))
    assert calls == [2]
    assert open_store(tmp_path / "r.zarr").digest() == open_store(tmp_path / "whole.zarr").digest()


def test_scripted_source(tmp_path: Path) -> None:
    task = "metaworld/drawer-close-v3"
    summary = build(recipe_for(tmp_path / "s.zarr", {"name": "scripted", "episodes": 1, "noise": 0.1}, task=task))
    assert summary["success_rate"] == 1.0 and summary["transitions"] == 500
    store = open_store(tmp_path / "s.zarr")
    replayed(store, task, 0)
    expert = envs.scripted_policy(task)
    (episode,) = store.episodes()
    clean = np.stack([expert(o, t) for t, o in enumerate(episode.observations[:-1])])
    inside = (np.abs(episode.actions) < 1) & (np.abs(clean) < 0.7)  # where the clip hides nothing
    assert 0.08 < (episode.actions - clean)[inside].std() < 0.12
    with pytest.raises(CvlctlError, match="expert"):
        build(recipe_for(tmp_path / "none.zarr", {"name": "scripted", "episodes": 1}))


def test_policy_source(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = policies_dir(built[0])
    paths = [str(folder / "checkpoints" / "step-000000300.safetensors"), str(folder)]
    source = {"name": "policy", "checkpoints": paths, "episodes": 1, "greedy": True}
    build(recipe_for(tmp_path / "p.zarr", source))
    store = open_store(tmp_path / "p.zarr")
    replayed(store, PENDULUM, 0)
    for episode, policy in zip(store.episodes(), (load_policy(folder, 0, 300), load_policy(folder, 0)), strict=True):
        np.testing.assert_allclose(episode.actions, policy(episode.observations[:-1]), atol=1e-5)
    build(recipe_for(tmp_path / "q.zarr", source | {"greedy": False}))
    sampled = next(open_store(tmp_path / "q.zarr").episodes())
    assert np.abs(sampled.actions - load_policy(folder, 0, 300)(sampled.observations[:-1])).std() > 0.05
    with pytest.raises(CvlctlError, match="sees"):
        build(recipe_for(tmp_path / "h.zarr", source, task="gym/Hopper-v5"))


def test_replay_until_then_and_joined_stores(one_step: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = agent(tmp_path / "agent.policies", BIASES)
    build(recipe_for(tmp_path / "a.zarr", {"name": "random", "episodes": 20}))
    until = {"run": str(run), "reaches": 0.333, "episodes": 60}
    source = {"name": "stores", "stores": [str(tmp_path / "a.zarr")], "until": until}
    assert build(recipe_for(tmp_path / "replay.zarr", source))["episodes"] == 13  # of 3 frames each: over by 40
    a, replay = open_store(tmp_path / "a.zarr"), open_store(tmp_path / "replay.zarr")
    assert replay.collected_at().tolist() == a.collected_at()[:13].tolist()
    np.testing.assert_array_equal(replay.actions(), a.actions()[: 13 * 4])
    np.testing.assert_array_equal(replay.rewards(), a.rewards()[: 13 * 4])
    parent = replay.attributes["collector"]["parents"][0]
    assert parent["digest"] == a.digest() and parent["provenance"]["recipe"]["source"]["name"] == "random"
    both = {"name": "stores", "stores": [str(tmp_path / "replay.zarr"), str(tmp_path / "a.zarr")]}
    with monkeypatch.context() as patched:
        die_in_flush(patched, 17)
        with pytest.raises(Killed):
            build(recipe_for(tmp_path / "both.zarr", both))
    assert build(recipe_for(tmp_path / "both.zarr", both))["episodes"] == 33
    joined = open_store(tmp_path / "both.zarr")
    np.testing.assert_array_equal(joined.actions(), np.concatenate([replay.actions(), a.actions()]))
    with pytest.raises(CvlctlError, match="no episode was over by frame 2"):
        build(recipe_for(tmp_path / "none.zarr", source | {"until": 2}))
    with pytest.raises(CvlctlError, match="Hopper"):
        build(recipe_for(tmp_path / "none.zarr", source | {"until": None}, task="gym/Hopper-v5"))


def test_horizon_reference_and_environment(tmp_path: Path) -> None:
    summary = build(recipe_for(tmp_path / "r.zarr", {"name": "random", "transitions": 21}, task="gym/Hopper-v5"))
    store = open_store(tmp_path / "r.zarr")
    assert store.attributes["reference"]["max"] == 3234.3
    assert summary["normalised"] == pytest.approx(100 * (summary["return_mean"] + 20.272305) / (3234.3 + 20.272305))
    assert summary["environment"].startswith("gym/Hopper-v5 (mujoco ")
    assert summary["transitions"] >= 21 > summary["transitions"] - store.lengths()[-1]
    build(recipe_for(tmp_path / "short.zarr", {"name": "random", "episodes": 2}, horizon=7))
    short = open_store(tmp_path / "short.zarr")
    build(recipe_for(tmp_path / "hop.zarr", {"name": "random", "episodes": 1}, task="gym/Hopper-v5", horizon=7))
    assert open_store(tmp_path / "hop.zarr").attributes["reference"] is None  # it is of whole episodes
    assert short.lengths().tolist() == [7, 7] and not short.terminated().any() and short.spec.horizon == 7
    with pytest.raises(CvlctlError, match="horizon: 201"):
        build(recipe_for(tmp_path / "long.zarr", {"name": "random", "episodes": 2}, horizon=201))
