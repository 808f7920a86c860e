"""Building stores: what is collected is what happened, the same twice, and the same where kills came between."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvlctl import checkpoints, envs, networks
from cvlctl.algorithms import sac
from cvlctl.commands import build_dataset
from cvlctl.commands.build_dataset import build
from cvlctl.commands.collect_sac import acting, policies_dir
from cvlctl.errors import CvlctlError
from cvlctl.policies import load_policy
from cvlctl.recipes import BuildRecipe, resolved
from cvlctl.runs import read_metrics, read_run
from cvlctl.store import Store, open_store, verify_store
from cvlctl.types import Spec
from cvlctl.writer import StoreWriter

PENDULUM = "gym/Pendulum-v1"
SAC = {"name": "sac", "steps": 650, "learning_starts": 40, "hidden": [16], "batch_size": 16, "policy_every_steps": 300}


def recipe_for(out: Path, source: dict[str, Any] | None = None, **more: Any) -> BuildRecipe:
    common = {"task": PENDULUM, "threads": 1, "precision": "float32", "compile": "false", "checkpoint_seconds": 1e-6}
    return BuildRecipe.model_validate({**common, "source": source or SAC, "out": out, **more})


def replayed(store: Store, task: str, seed: int) -> None:
    """The stored actions, played again in a fresh environment, give the stored observations, rewards and ends."""
    env = envs.make(task, seed)
    for number, episode in enumerate(store.episodes()):
        assert episode.rewards is not None
        np.testing.assert_array_equal(episode.observations[0], env.reset(number))
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, success = env.step(action)
            np.testing.assert_array_equal(episode.observations[t + 1], observation)
            assert episode.rewards[t] == np.float32(reward)
            assert (None if episode.successes is None else bool(episode.successes[t])) == success
        last = number == store.num_episodes - 1
        assert episode.terminated == terminated and (terminated or truncated or last)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("built") / "pendulum.zarr"
    return out, build(recipe_for(out))


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
    assert store.provenance["recipe"] == resolved(recipe_for(out))
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


class Killed(Exception):
    pass


def die_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = envs.Env.step, 0

    def step(self: envs.Env, action: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == 477:
            raise Killed
        return before(self, action)

    monkeypatch.setattr(envs.Env, "step", step)


def die_before_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the learner's state of episode 2 is written, the store still holds one episode
            raise Killed
        before(self)

    monkeypatch.setattr(StoreWriter, "flush", flush)


def die_after_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        before(self)
        calls += 1
        if calls == 2:  # both states are there
            raise Killed

    monkeypatch.setattr(StoreWriter, "flush", flush)


def die_before_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    def finish(self: StoreWriter, **extra: Any) -> Store:
        raise Killed

    monkeypatch.setattr(StoreWriter, "finish", finish)


@pytest.mark.parametrize(
    ("die", "episodes"), [(die_in_step, 2), (die_before_flush, 1), (die_after_flush, 2), (die_before_finish, 4)]
)
def test_killed_and_resumed_equals_uninterrupted(
    die: Any, episodes: int, built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "pendulum.zarr"
    recipe = recipe_for(out)
    with monkeypatch.context() as patched:
        die(patched)
        with pytest.raises(Killed):
            build(recipe)
    assert not out.exists()
    assert build(recipe)["status"] == "built"
    assert f"resuming at frame {min(200 * episodes, 650)}" in capsys.readouterr().err
    resumed, whole = open_store(out), open_store(built[0])
    assert resumed.digest() == whole.digest() and resumed.label_digest() == whole.label_digest()
    assert read_metrics(policies_dir(out)) == read_metrics(policies_dir(built[0]))
    ours, theirs = (checkpoints.load(policies_dir(p) / "checkpoints" / "last.safetensors")[0] for p in (out, built[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list((policies_dir(out) / "checkpoints").glob("episodes-*"))


def test_damaged_learner_starts_over(
    built: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pendulum.zarr"
    with monkeypatch.context() as patched:
        die_in_step(patched)
        with pytest.raises(Killed):
            build(recipe_for(out))
    (file,) = (policies_dir(out) / "checkpoints").glob("episodes-*")
    file.write_bytes(file.read_bytes()[:-100])
    build(recipe_for(out))
    assert "starting over" in capsys.readouterr().err
    assert open_store(out).digest() == open_store(built[0]).digest()


def test_forced_and_killed_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, short = tmp_path / "x.zarr", SAC | {"steps": 210}
    build(recipe_for(out, SAC | {"steps": 50}))
    with monkeypatch.context() as patched:
        die_before_finish(patched)
        with pytest.raises(Killed):
            build(recipe_for(out, short), force=True)
    assert len(open_store(out)) == 50  # the old one, until the new one is complete
    with pytest.raises(CvlctlError, match="--force"):
        build(recipe_for(out, short))
    monkeypatch.setattr(envs.Env, "step", None)  # nothing is left to collect
    assert build(recipe_for(out, short), force=True)["transitions"] == 210


def test_finished_and_other_recipes(tmp_path: Path) -> None:
    out = tmp_path / "random.zarr"
    first = build(recipe_for(out, {"name": "random", "episodes": 2}))
    again = build(recipe_for(out, {"name": "random", "episodes": 2}))
    assert again["status"] == "finished already"
    assert {**again, "status": "built", "seconds": first["seconds"]} == first
    with pytest.raises(CvlctlError, match="--force"):
        build(recipe_for(out, {"name": "random", "episodes": 3}))
    assert open_store(out).num_episodes == 2
    assert build(recipe_for(out, {"name": "random", "episodes": 3}), force=True)["episodes"] == 3


def test_sac_finished_run_is_repaired_and_forced(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "x.zarr", SAC | {"steps": 60})
    build(recipe)
    folder = policies_dir(recipe.out)
    record = read_run(folder)
    (folder / "run.json").write_text(json.dumps(record | {"status": "started"}))  # killed between store and run
    assert build(recipe)["status"] == "finished already"
    assert read_run(folder)["status"] == "finished"
    assert build(recipe, force=True)["status"] == "built"
    longer = recipe_for(tmp_path / "x.zarr", SAC | {"steps": 70})
    with pytest.raises(CvlctlError, match="--force"):
        build(longer)
    assert build(longer, force=True)["transitions"] == 70


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
    before = build_dataset.collect_episode

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[2])
        return before(*args, **kwargs)

    monkeypatch.setattr(build_dataset, "collect_episode", counted)
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
