"""Building stores: what is collected is what happened, the same twice, and the same where kills came between."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from cvlctl import checkpoints
from cvlctl.collect import measured, replay, sources
from cvlctl.collect.build import build
from cvlctl.collect.online import acting, policies_dir
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data import samplers
from cvlctl.data.store import Store, open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import networks
from cvlctl.learn.algorithms import contrastive_ac, sac
from cvlctl.play import envs
from cvlctl.play.policies import load_policy
from cvlctl.runs import read_metrics, read_run
from cvlctl.types import Spec

PENDULUM = "gym/Pendulum-v1"
SPEC = Spec((3,), 1, 200)  # Pendulum's
SAC = {"name": "sac", "steps": 650, "learning_starts": 40, "hidden": [16], "batch_size": 16, "policy_every_steps": 300}
CONTRASTIVE = SAC | {"name": "contrastive_ac", "steps": 450, "learning_starts": 240}


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


class Killed(Exception):
    pass


def die_in_step(monkeypatch: pytest.MonkeyPatch, number: int = 477) -> None:
    before, calls = envs.Env.step, 0

    def step(self: envs.Env, action: np.ndarray) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
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


def test_hindsight_changes_what_is_learned_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, source = "gym/FetchReach-v4", SAC | {"steps": 120, "hindsight": 0.8}
    recipes = {name: recipe_for(tmp_path / f"{name}.zarr", source, task=task) for name in ("whole", "killed")}
    recipes["without"] = recipe_for(tmp_path / "without.zarr", source | {"hindsight": 0.0}, task=task)
    with monkeypatch.context() as patched:
        die_in_step(patched, 110)
        with pytest.raises(Killed):
            build(recipes["killed"])
    for recipe in recipes.values():
        assert build(recipe)["status"] == "built"
    replayed(open_store(recipes["whole"].out), task, 0)  # the store holds what happened, with the goals that were told
    digests = {name: open_store(recipe.out).digest() for name, recipe in recipes.items()}
    assert digests["whole"] == digests["killed"] != digests["without"]


@pytest.fixture(scope="module")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contrastive") / "pendulum.zarr"
    build(recipe_for(out, CONTRASTIVE))
    return out


@pytest.mark.parametrize(("calls", "frame"), [(230, 200), (430, 400)])  # before learning starts, and after
def test_contrastive_killed_and_resumed_equals_uninterrupted(
    calls: int, frame: int, contrastive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "pendulum.zarr"
    with monkeypatch.context() as patched:
        die_in_step(patched, calls)
        with pytest.raises(Killed):
            build(recipe_for(out, CONTRASTIVE))
    build(recipe_for(out, CONTRASTIVE))
    assert f"resuming at frame {frame}" in capsys.readouterr().err
    resumed, whole = open_store(out), open_store(contrastive)
    assert resumed.digest() == whole.digest() and resumed.label_digest() == whole.label_digest()
    assert read_metrics(policies_dir(out)) == read_metrics(policies_dir(contrastive))
    ours, theirs = (
        checkpoints.load(policies_dir(p) / "checkpoints" / "last.safetensors")[0] for p in (out, contrastive)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


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


@pytest.mark.parametrize(
    "more", [{"name": "sac"}, {"name": "contrastive_ac"}, {"name": "contrastive_ac", "gate": "none"}]
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


# --- checkpoints of an agent, measured: a task whose policies succeed as often as we like


class OneStep:
    """One or more steps; an action above 0 succeeds, and the reward is 1 + the action."""

    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,))
    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,))

    def step(self, action: np.ndarray) -> Any:
        return np.zeros(2), float(1 + action[0]), False, False, {"success": float(action[0] > 0)}

    def close(self) -> None:
        pass


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Pendulum."""

    def make(task: str, seed: int, horizon: int | None = None) -> envs.Env:
        return envs.Env(task, seed, OneStep(), lambda episode: np.zeros(2), horizon or 3, True, {"gymnasium": "1"})

    monkeypatch.setattr(envs, "make", make)


def agent(folder: Path, biases: dict[int, float], status: str = "finished") -> Path:
    """A SAC collection's run: at each step a policy whose action is tanh of a normal variable with that mean."""
    for step, bias in biases.items():
        state = networks.actor_init([0], 2, 1, (4,))
        state = {name: torch.zeros_like(value) for name, value in state.items()}
        state["actor.1.bias"][..., 0] = bias
        state |= networks.normaliser_init([0], torch.zeros(2), torch.ones(2))
        metadata = {"algorithm": "sac", "spec": asdict(Spec((2,), 1, 3)), "seeds": [0], "step": step}
        name = "last" if step == max(biases) else f"step-{step:09d}"
        checkpoints.save(folder / "checkpoints" / f"{name}.safetensors", state, metadata)
    record = {"status": status, "inputs": {}, "algorithm": "sac", "seeds": [0], "steps": max(biases)}
    (folder / "run.json").write_text(json.dumps(record))
    return folder


BIASES = {10: -3.0, 20: -1.5, 30: -0.8, 40: 0.0, 50: 0.6, 60: 1.5}  # success in one step: 0, 7, 21, 50, 73, 93 %
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


def die_in_flush(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    before, calls = StoreWriter.flush, 0

    def flush(self: StoreWriter) -> None:
        nonlocal calls
        before(self)
        calls += 1
        if calls == number:
            raise Killed

    monkeypatch.setattr(StoreWriter, "flush", flush)


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


def test_a_store_of_an_earlier_version_is_still_of_its_recipe(tmp_path: Path) -> None:
    recipe = recipe_for(tmp_path / "r.zarr", {"name": "random", "episodes": 1})
    build(recipe)
    attributes = tmp_path / "r.zarr" / "zarr.json"
    text = json.loads(attributes.read_text())
    recorded = text["attributes"]["provenance"]["recipe"]
    del recorded["horizon"], recorded["source"]["transitions"]  # keys that came later
    attributes.write_text(json.dumps(text))
    assert build(recipe)["status"] == "finished already"


@pytest.mark.parametrize(
    ("source", "what", "hint"),
    [
        ("{name: contrastive_ac, steps: 9, gat: none}", "unknown key source.gat", "did you mean gate"),
        ("{name: contrastive_ac, steps: 9, gate: off}", "expected 'contrastive', 'actor' or 'none'", ""),
        ("{name: contrastive_ac, steps: 9, slack: 0}", "slack must be above 0", ""),
        ("{name: contrastive, steps: 9}", "unknown name 'contrastive'", "did you mean contrastive_ac"),
        ("{name: sac, steps: 9, hindsight: 0.8}", "relabels goals, and gym/Pendulum-v1 is told none", ""),
        ("{name: sac, steps: 9, hindsight: 2}", "source.hindsight: expected a number of at most 1", ""),
        (
            "{name: sac, steps: 9, gate: none}",
            "unknown key source.gate",
            "legal keys here: batch_size, ema_rate",
        ),
    ],
)
def test_wrong_keys_of_online_sources(tmp_path: Path, source: str, what: str, hint: str) -> None:
    (tmp_path / "r.yaml").write_text(f"task: {PENDULUM}\nout: {tmp_path}/x.zarr\nsource: {source}\n")
    with pytest.raises(CvlctlError, match=re.escape(what)) as caught:
        load(tmp_path / "r.yaml")
    assert hint in caught.value.hint


def test_how_much_is_rolled_out() -> None:
    for wrong in ({"name": "random"}, {"name": "random", "episodes": 1, "transitions": 5}):
        with pytest.raises(ValueError, match="exactly one of episodes and transitions"):
            recipe_for(Path("x.zarr"), wrong)
