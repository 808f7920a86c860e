"""Collecting while learning: what is stored is what happened, and the same where kills came between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_builds import CONTRASTIVE, PENDULUM, SAC, SPEC, recipe_for, replayed

from cvlctl import checkpoints
from cvlctl.collect import measured, replay
from cvlctl.collect.build import build
from cvlctl.collect.online import acting, policies_dir
from cvlctl.data import samplers
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.learn.algorithms import contrastive_ac, sac
from cvlctl.play import envs
from cvlctl.play.policies import load_policy
from cvlctl.runs import read_metrics, read_run
from cvlctl.types import Spec

# ------------------------------------------------------------------------------------------------------------------ SAC


def test_sac_store_holds_what_happened(built: tuple[Path, dict[str, Any]]) -> None:
    out, summary = built
    store = open_store(out)
    assert verify_store(out) == []
    assert summary["status"] == "built" and summary["episodes"] == 4 and summary["transitions"] == len(store) == 650
    assert store.lengths().tolist() == [200, 200, 200, 50]  # the last one cut by the end of the steps
    assert not store.terminated().any()
    assert store.collected_at().tolist() == [0, 200, 400, 600]
    assert store.seeds().tolist() == [0] * 4 and store.task == PENDULUM and store.spec.horizon == 200
    replayed(store, PENDULUM, 0)
    rewards = store.rewards()
    assert summary["return_mean"] == pytest.approx(rewards.sum() / 4, rel=1e-5) and summary["success_rate"] is None


def test_sac_store_says_where_it_comes_from(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    store = open_store(out)
    assert store.provenance["recipe"] == recipe_for(out).resolved()
    assert store.provenance["environment"]["gymnasium"] and store.provenance["seeds"] == [0]
    assert store.attributes["collector"]["sac"]["ema_rate"] == 0.005
    assert store.attributes["collector"]["settings"]["threads"] == 1


def test_sac_keeps_policies_that_load(built: tuple[Path, dict[str, Any]]) -> None:
    out, _ = built
    folder = policies_dir(out)
    assert folder.name == "pendulum.policies"
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    assert names == ["last.safetensors", "step-000000300.safetensors", "step-000000600.safetensors"]
    run = read_run(folder)
    assert (run["status"], run["algorithm"], run["task"], run["seeds"]) == ("finished", "sac", PENDULUM, [0])
    observations = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    early, last = load_policy(folder, 0, 300)(observations), load_policy(folder, 0)(observations)
    assert last.shape == (5, 1) and np.abs(last).max() <= 1 and not np.allclose(early, last)
    rows = read_metrics(folder)
    store = open_store(out)
    assert [row["step"] for row in rows] == [200, 400, 600, 650] and rows[0]["success"] is None
    returns = [float(e.rewards.sum(dtype=np.float64)) for e in store.episodes() if e.rewards is not None]
    assert [row["episode_return"] for row in rows] == returns
    _, metadata = checkpoints.load(folder / "checkpoints" / "last.safetensors")
    assert metadata["step"] == 650 and metadata["algorithm"] == "sac"


def test_same_recipe_same_store(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    build(recipe_for(tmp_path / "again.zarr"))
    again, first = open_store(tmp_path / "again.zarr"), open_store(built[0])
    assert again.digest() == first.digest() and again.label_digest() == first.label_digest()
    build(recipe_for(tmp_path / "other.zarr", seed=1, source=SAC | {"steps": 210}))
    assert not np.array_equal(open_store(tmp_path / "other.zarr").observations()[:200], first.observations()[:200])


def test_a_share_of_actions_stays_random_and_updates_come_every_so_many_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates, before = [], sac.step
    monkeypatch.setattr(sac, "step", lambda *args: (updates.append(1), before(*args))[1])
    drawn = [replay.draw("sac", samplers.Draws(batch_size=1), SPEC, [0], i) for i in range(11)]
    held = np.concatenate([block.uniform_action[np.arange(64) // 4 * 4] for block in drawn])[:650]
    choice = np.concatenate([block.choice[np.arange(64) // 4 * 4] for block in drawn])[:650]
    shares = {}
    for share in (0.0, 0.3, 1.0):
        out, source = tmp_path / f"{share}.zarr", SAC | {"random_share": share, "random_repeat": 4, "update_every": 3}
        build(recipe_for(out, source))
        actions = np.concatenate([episode.actions for episode in open_store(out).episodes()])
        at_random = (actions == held).all(axis=-1)
        assert at_random[:40].all()
        assert np.array_equal(at_random[40:], choice[40:] < share)
        shares[share] = at_random[40:].mean()
        assert len(updates) == (650 - 40) // 3
        updates.clear()
    assert shares[0.0] == 0 and shares[0.3] == pytest.approx(0.3, abs=0.1) and shares[1.0] == 1


def test_a_device_that_is_not_here_is_said_before_anything_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CvlctlError, match="PyTorch sees no GPU"):
        build(recipe_for(tmp_path / "here" / "a.zarr", device="cuda"))
    assert not list(tmp_path.iterdir())


def test_acting_follows_the_weights() -> None:
    spec, config = Spec((3,), 2, 10), sac.Config(hidden=(8, 8))
    state = sac.init(config, spec, [0])
    act = acting(state, spec)
    observation, noise = np.array([0.3, -20.0, 1.0], dtype=np.float32), np.array([0.5, -1.0], dtype=np.float32)
    before = act(observation, noise)
    state["actor.2.bias"].add_(0.5)
    after = act(observation, noise)
    assert not np.allclose(before, after)
    mean, log_std = networks.actor(state, networks.normalise(state, torch.from_numpy(observation)[None, None]))
    expected = torch.tanh(mean + log_std.exp() * torch.from_numpy(noise))[0, 0]
    np.testing.assert_allclose(after, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "more", [{"name": "sac"}, {"name": "contrastive_ac"}, {"name": "contrastive_ac", "gate": "none"}, {"name": "cvl"}]
)
def test_online_learners_learn(one_step: None, tmp_path: Path, more: dict[str, Any]) -> None:
    """A step pays 1 + the action: 3 an episode at random, 6 at best."""
    source = {
        "steps": 600,
        "learning_starts": 60,
        "hidden": [32],
        "batch_size": 64,
        "learning_rate": 3e-3,
        "gamma": 0.5,
    }
    build(recipe_for(tmp_path / "x.zarr", source | more, checkpoint_seconds=60))
    store = open_store(tmp_path / "x.zarr")
    returns = np.add.reduceat(store.rewards(), np.append(0, store.episode_ends()[:-1]))
    assert abs(returns[:20].mean() - 3) < 0.7 and returns[-20:].mean() > 5
    gated = "contrastive_ac" in store.attributes["collector"] and "gate" not in more
    assert ("gate/action" in read_metrics(policies_dir(tmp_path / "x.zarr"))[-1]) == gated


# --------------------------------------------------------------------------------------------- contrastive actor-critic


def test_contrastive_acts_with_gaussian_noise_on_the_greedy_action(tmp_path: Path) -> None:
    """With a policy that stays as it is: frame by frame clip(tanh(mean) + 0.1 n), not a sample of the tanh-Gaussian."""
    out, source = tmp_path / "still.zarr", CONTRASTIVE | {"learning_rate": 1e-30, "steps": 400, "learning_starts": 60}
    build(recipe_for(out, source))
    wanted = samplers.Draws(batch_size=1)
    noise = np.concatenate([replay.draw("contrastive_ac", wanted, SPEC, [0], i).exploration for i in range(7)])[:400]
    store, policy = open_store(out), load_policy(policies_dir(out))
    observations = np.concatenate([episode.observations[:-1] for episode in store.episodes()])
    actions = np.concatenate([episode.actions for episode in store.episodes()])
    greedy = policy(observations)
    expected = np.clip(greedy + 0.1 * noise, -1, 1)
    np.testing.assert_allclose(actions[60:], expected[60:], atol=1e-5)
    assert 0.08 < (actions - greedy)[60:].std() < 0.12
    assert 0.4 < actions[:60].std() < 0.7 and np.abs(actions[:60] - expected[:60]).mean() > 0.3  # random until then
    build(recipe_for(tmp_path / "calm.zarr", source | {"exploration_noise": 0.0, "steps": 100}))
    (calm,) = open_store(tmp_path / "calm.zarr").episodes()
    np.testing.assert_allclose(calm.actions[60:], policy(calm.observations[60:-1]), atol=1e-5)


def test_contrastive_policies_are_those_of_any_other_source(contrastive: Path, tmp_path: Path) -> None:
    folder = policies_dir(contrastive)
    source = {"name": "policy", "checkpoints": [str(folder)], "episodes": 1}
    build(recipe_for(tmp_path / "p.zarr", source))
    (episode,) = open_store(tmp_path / "p.zarr").episodes()
    aside = episode.actions - load_policy(folder, 0)(episode.observations[:-1])
    assert 0.05 < aside.std() < 0.15  # a sample is about what the collection did: no loss moves the actor's own head
    steps = [one.step for one in measured.checkpoints_of(folder, envs.make(PENDULUM, 0))]
    assert steps == [300, 450]
    record = read_run(folder)
    offline = record["recipe"] | {"algorithm": {"name": "contrastive_ac"}}
    (tmp_path / "finetuned").mkdir()
    (tmp_path / "finetuned" / "run.json").write_text(json.dumps(record | {"recipe": offline}))
    with pytest.raises(CvlctlError, match="finished online"):
        measured.checkpoints_of(tmp_path / "finetuned", envs.make(PENDULUM, 0))


def test_contrastive_store_says_where_it_comes_from(contrastive: Path) -> None:
    store, run = open_store(contrastive), read_run(policies_dir(contrastive))
    assert store.attributes["collector"]["contrastive_ac"]["gate"] == "contrastive"
    assert store.provenance["recipe"]["source"]["exploration_noise"] == 0.1
    assert (run["status"], run["algorithm"], run["steps"]) == ("finished", "contrastive_ac", 450)
    rows = read_metrics(policies_dir(contrastive))
    assert "critic/td" not in rows[0] and {"critic/td", "actor/q", "gate/action"} <= rows[1].keys() == rows[2].keys()


def test_a_delayed_actor_learns_every_second_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, before = [], contrastive_ac.step

    def step(*args: Any) -> Any:
        seen.append(args[-1])
        return before(*args)

    monkeypatch.setattr(contrastive_ac, "step", step)
    build(recipe_for(tmp_path / "x.zarr", CONTRASTIVE | {"steps": 49, "learning_starts": 40, "actor_every": 3}))
    assert seen == [False, False, True] * 3
