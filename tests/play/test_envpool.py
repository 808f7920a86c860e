"""EnvPool as a collection's simulator: its quirks stay out of the stores, and what is collected is the seed's."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvlctl import checkpoints
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter
from cvlctl.errors import CvlctlError
from cvlctl.learn import networks
from cvlctl.play import envpool as envpool_backend
from cvlctl.play import envs
from cvlctl.play.policies import RandomPolicy, load_policy
from cvlctl.play.rollout import EVALUATION_SEED, PolicyAct, PolicyJob, act_together
from cvlctl.score import evaluate
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.types import Episode, Spec

HOPPER = "gym/Hopper-v5"
SPECS = {
    HOPPER: Spec((11,), 3, 1000),
    "gym/Pendulum-v1": Spec((3,), 1, 200),
    "gym/FetchReach-v4": Spec((13,), 4, 50),
    "metaworld/pick-place-v3": Spec((39,), 4, 500),
}


def recipe_for(out: Path, source: dict[str, Any], task: str = HOPPER, **more: Any) -> BuildRecipe:
    common = {"task": task, "threads": 1, "checkpoint_seconds": 1e-6}
    return BuildRecipe.model_validate({**common, "source": source | {"backend": "envpool"}, "out": out, **more})


def random_episodes(task: str, total: int, horizon: int | None = None, **how: Any) -> list[Episode]:
    spec = replace(SPECS[task], horizon=horizon or SPECS[task].horizon)
    return list(envpool_backend.collect(task, spec, 0, lambda n: RandomPolicy(spec, 0, n), total=total, **how))


def same(ours: Episode, theirs: Episode) -> bool:
    pairs = [(getattr(ours, name), getattr(theirs, name)) for name in ("observations", "actions", "rewards")]
    return all(np.array_equal(a, b) for a, b in pairs) and ours.terminated == theirs.terminated


def plainly(task: str, name: str, total: int, **options: Any) -> list[tuple[list, list, list]]:
    """(observations, rewards, terminations) of each episode, by EnvPool's own loop: everyone steps, always."""
    envpool = pytest.importorskip("envpool")
    spec, slots = SPECS[task], envpool_backend.NUM_SLOTS
    seeds = [int(np.random.SeedSequence([0, slot]).generate_state(1)[0] >> 1) for slot in range(slots)]
    pool = envpool.make_gymnasium(name, num_envs=slots, num_threads=1, env_seed=seeds, **options)
    acts = {number: RandomPolicy(spec, 0, number) for number in range(total + 40 * slots)}
    numbers, first, played = list(range(slots)), envpool_backend._flat(pool.reset()[0]), {}
    for number in numbers:
        played[number] = ([first[number]], [], [])
    over = [False] * slots
    while any(number < total for number in numbers):
        actions = [np.zeros(spec.action_dim)] * slots
        for slot, number in enumerate(numbers):
            if not over[slot]:
                actions[slot] = acts[number](first, len(played[number][1]))
        observations, rewards, terminated, truncated, _ = pool.step(np.array(actions))
        observations = envpool_backend._flat(observations)
        for slot in range(slots):
            if over[slot]:  # the row of the autoreset: no step of any episode
                assert rewards[slot] == 0
                numbers[slot] += slots
                played[numbers[slot]] = ([observations[slot]], [], [])
                over[slot] = False
                continue
            seen, earned, ends = played[numbers[slot]]
            seen.append(observations[slot])
            earned.append(rewards[slot])
            ends.append(bool(terminated[slot]))
            over[slot] = bool(terminated[slot] or truncated[slot])
    pool.close()
    return [played[number] for number in range(total)]


def test_episodes_are_those_of_a_plain_loop_without_the_autoresets_rows() -> None:
    theirs = plainly(HOPPER, "Hopper-v5", 30)
    ours = random_episodes(HOPPER, 30)
    assert len({len(episode) for episode in ours}) > 5
    assert sum(map(len, ours)) == sum(len(earned) for _, earned, _ in theirs)
    for episode, (seen, earned, ends) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(episode.observations, seen)
        np.testing.assert_array_equal(episode.rewards, earned)
        assert episode.terminated and ends[-1] and not any(ends[:-1])
    assert [episode.collected_at for episode in ours] == [0, *np.cumsum([len(episode) for episode in ours])[:-1]]


def test_fetch_is_laid_out_as_ours_and_ends_at_its_limit() -> None:
    task = "gym/FetchReach-v4"
    theirs = plainly(task, "FetchReach-v4", 10)
    for episode, (seen, earned, _) in zip(random_episodes(task, 10), theirs, strict=True):
        assert len(episode) == 50 and not episode.terminated and episode.successes is not None
        np.testing.assert_array_equal(episode.observations, seen)
        np.testing.assert_array_equal(episode.rewards, earned)
        assert ((episode.rewards == 0) == episode.successes).all()
    assert np.ptp(np.stack([seen[0] for seen, _, _ in theirs])[:, -3:], axis=0).min() > 0.05  # goals


def test_the_goal_is_in_the_observation_and_new_in_every_episode() -> None:
    pytest.importorskip("envpool")
    episodes = random_episodes("metaworld/pick-place-v3", 10, horizon=2)
    goals = np.stack([episode.observations[:, 36:] for episode in episodes])
    assert (goals == goals[:, :1]).all() and len(np.unique(goals[:, 0], axis=0)) == 10
    assert all(not episode.terminated and len(episode) == 2 for episode in episodes)


def test_a_death_on_the_last_step_is_no_truncation() -> None:
    pytest.importorskip("envpool")
    whole = random_episodes(HOPPER, 1)[0]
    last = random_episodes(HOPPER, 1, horizon=len(whole))[0]
    before = random_episodes(HOPPER, 1, horizon=len(whole) - 1)[0]
    assert last.terminated and len(last) == len(whole)
    assert not before.terminated and len(before) == len(whole) - 1


def test_actions_are_clipped_and_scaled_as_ours() -> None:
    pytest.importorskip("envpool")
    task = "gym/Pendulum-v1"
    for value in (0.5, 1.0, 3.0):
        episode = next(envpool_backend.collect(task, SPECS[task], 0, lambda n, v=value: lambda o, t: np.array([v])))  # type: ignore[misc]
        env = envs.make(task, 0)
        env.reset(0)
        cosine, sine, speed = episode.observations[0].astype(float)
        env.raw.state = np.array([np.arctan2(sine, cosine), speed])
        observation, reward, *_ = env.step(np.array([value]))
        np.testing.assert_allclose(episode.observations[1], observation, atol=1e-5)
        assert episode.rewards is not None and episode.rewards[0] == pytest.approx(reward, abs=1e-5)
        assert (episode.actions == min(value, 1.0)).all()
    with pytest.raises(CvlctlError, match="NaN"):
        next(envpool_backend.collect(task, SPECS[task], 0, lambda n: lambda o, t: np.array([np.nan])))


def test_an_episode_depends_on_its_number_alone() -> None:
    pytest.importorskip("envpool")
    whole = random_episodes(HOPPER, 37)
    for first in (1, 8, 21):
        assert all(map(same, random_episodes(HOPPER, 30, first=first, threads=3), whole[first:30]))
    endless = envpool_backend.collect(HOPPER, SPECS[HOPPER], 0, lambda n: RandomPolicy(SPECS[HOPPER], 0, n))
    assert all(map(same, itertools.islice(endless, 10), whole))
    other = next(envpool_backend.collect(HOPPER, SPECS[HOPPER], 1, lambda n: RandomPolicy(SPECS[HOPPER], 0, n)))
    assert not same(other, whole[0])


class Killed(BaseException):
    pass


def test_store_provenance_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("envpool")
    source = {"name": "random", "transitions": 300}
    summary = build(recipe_for(tmp_path / "whole.zarr", source))
    whole = open_store(tmp_path / "whole.zarr")
    assert verify_store(whole.path) == []
    assert summary["transitions"] >= 300 > summary["transitions"] - whole.lengths()[-1]
    environment = whole.provenance["environment"]
    assert environment["backend"] == "envpool" and environment["envpool"] and environment["mujoco"].count(".") == 2
    assert "gymnasium" not in environment and summary["environment"].startswith(f"{HOPPER} (envpool ")
    assert whole.provenance["recipe"]["source"]["backend"] == "envpool"
    flush, calls = StoreWriter.flush, itertools.count(1)

    def dying(self: StoreWriter) -> None:
        flush(self)
        if next(calls) == 5:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(StoreWriter, "flush", dying)
        with pytest.raises(Killed):
            build(recipe_for(tmp_path / "cut.zarr", source))
    build(recipe_for(tmp_path / "cut.zarr", source))
    cut = open_store(tmp_path / "cut.zarr")
    assert next(calls) <= whole.num_episodes + 4  # it went on rather than begin again
    assert cut.digest() == whole.digest() and cut.label_digest() == whole.label_digest()
    assert cut.collected_at().tolist() == whole.collected_at().tolist()


@pytest.fixture
def policies(tmp_path: Path) -> list[Path]:
    files = []
    for seed in range(2):
        state = networks.actor_init([seed], 11, 3, (32,))
        state |= networks.normaliser_init([seed], torch.zeros(11), torch.ones(11))
        metadata = {"algorithm": "bc", "spec": asdict(SPECS[HOPPER]), "seeds": [0], "step": 1}
        files.append(tmp_path / f"policy-{seed}.safetensors")
        checkpoints.save(files[-1], state, metadata)
    return files


def test_checkpoints_act_together_as_each_alone(policies: list[Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one, other = map(load_policy, policies)
    sampling, noise = rng.normal(size=(2, 5, 3)).astype(np.float32)
    acts = [PolicyAct(one, None, noise), None, PolicyAct(other, sampling, noise), PolicyAct(one, None, 0 * noise)]
    acts.append(lambda observation, step: observation[:3] * 0 + step / 10)  # type: ignore[arg-type]
    observations, steps = rng.normal(size=(5, 11)).astype(np.float32), [0, 0, 4, 1, 2]
    together = act_together(acts, observations, steps, 3)
    for row, act in enumerate(acts):
        expected = np.zeros(3) if act is None else act(observations[row], steps[row])
        np.testing.assert_allclose(together[row], expected, atol=1e-6)
    pytest.importorskip("envpool")
    source = {"name": "policy", "checkpoints": list(map(str, policies)), "episodes": 5, "greedy": True}
    assert build(recipe_for(tmp_path / "p.zarr", source))["episodes"] == 10
    for number, episode in enumerate(open_store(tmp_path / "p.zarr").episodes()):
        expected = (one if number < 5 else other)(episode.observations[:-1])
        np.testing.assert_allclose(episode.actions, expected, atol=1e-5)


def test_evaluated_episodes_are_those_collected(policies: list[Path]) -> None:
    pytest.importorskip("envpool")
    jobs = [
        PolicyJob("bc", HOPPER, 0, 1, file, gamma=0.9, horizon=horizon) for file in policies for horizon in (9, None)
    ]
    told: list[tuple[int, int]] = []
    rows = envpool_backend.run_episodes(
        jobs, episodes=3, seed=5, threads=1, progress=lambda done, total, row: told.append((done, total))
    )
    assert told == [(done, 12) for done in range(1, 13)]
    for at, job in enumerate(jobs):
        spec, still = replace(SPECS[HOPPER], horizon=job.horizon or 1000), np.zeros((1000, 3))
        act = PolicyAct(load_policy(job.checkpoint), None, still)
        found = envpool_backend.collect(HOPPER, spec, EVALUATION_SEED + 5, lambda n, act=act: act, total=3)  # type: ignore[misc]
        for row, episode in zip(rows[3 * at : 3 * at + 3], found, strict=True):
            assert row.episode_return == episode.rewards.astype(float).sum() and row.length == len(episode)
            assert row.discounted_return == pytest.approx(episode.rewards @ 0.9 ** np.arange(len(episode)), rel=1e-6)
            assert row.success is None
    assert [row.episode for row in rows] == [0, 1, 2] * 4 and {row.length for row in rows[:3]} == {9}
    assert len({row.episode_return for row in rows}) == 12
    some = envpool_backend.run_episodes(jobs[1:2], episodes=[[0, 2]], seed=5)
    assert some == [rows[3], rows[5]]


def test_evaluate_in_envpool(
    policies: list[Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: dict[str, Any] = {"runs": [str(policies[0])], "episodes": 2, "out": tmp_path / "out", "backend": "envpool"}
    for wrong, what in (({"goals": {"from": "x.zarr"}}, "cannot command goals"), ({"device": "cuda"}, "on the CPU")):
        with pytest.raises(ValueError, match=what):
            EvaluateRecipe.model_validate(plain | wrong)
    pytest.importorskip("envpool")
    run = tmp_path / "runs" / "bc" / "checkpoints"
    run.mkdir(parents=True)
    metadata = {"algorithm": "bc", "spec": asdict(SPECS[HOPPER]), "seeds": [0], "step": 1, "task": HOPPER}
    state, _ = checkpoints.load(policies[0])
    checkpoints.save(run / "last.safetensors", state, metadata)
    plain["runs"] = [str(tmp_path / "runs" / "bc")]
    result = evaluate.evaluate(EvaluateRecipe.model_validate(plain))
    assert result["status"] == "evaluated" and result["episodes"] == 2
    (record,) = result["table"]
    assert record["backend"] == "envpool" and "normalised" not in record
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert saved["simulators"][HOPPER]["envpool"] and "gymnasium" not in saved["simulators"][HOPPER]
    assert "simulated by envpool" in (tmp_path / "out" / "table.md").read_text()
    more = evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 3}))
    assert "2 of 3 episodes are evaluated already" in capsys.readouterr().err
    whole = evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 3, "out": tmp_path / "whole"}))
    assert Path(more["rows"]).read_text() == Path(whole["rows"]).read_text()
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes()
    with monkeypatch.context() as patched:  # what is there can be read without EnvPool; more of it needs the same one
        patched.setitem(sys.modules, "envpool", None)
        again = evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 3}))
        assert again["status"] == "finished already"
        with pytest.raises(CvlctlError, match="EnvPool cannot be imported"):
            evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 4}))
    with monkeypatch.context() as patched:
        patched.setattr(envpool_backend.metadata, "version", lambda name: "9.9.9")
        with pytest.raises(
            CvlctlError, match=f"{HOPPER} was simulated by envpool .*, and now would be by envpool 9.9.9"
        ):
            evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 4}))
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == rows
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(evaluate, "run_lockstep", lambda *args, **options: pytest.fail("played in gymnasium"))
    on_gpu = evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 4, "device": "auto"}))
    assert on_gpu["status"] == "evaluated"
    with pytest.raises(CvlctlError, match="backend was envpool, now gymnasium"):
        evaluate.evaluate(EvaluateRecipe.model_validate(plain | {"episodes": 4, "backend": "gymnasium"}))


def test_what_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = {"name": "random", "episodes": 1}
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "envpool", None)
        with pytest.raises(CvlctlError, match="EnvPool cannot be imported") as missing:
            build(recipe_for(tmp_path / "x.zarr", source))
        assert missing.value.hint == "install it: pip install 'cvlctl[envpool]'"
    pytest.importorskip("envpool")
    with pytest.raises(CvlctlError, match="cannot command gym/FetchReach-v4-fixed's goal"):
        build(recipe_for(tmp_path / "x.zarr", source, task="gym/FetchReach-v4-fixed"))
    assert not (tmp_path / "x.zarr").exists()
    with pytest.raises(ValueError, match="envpool"):
        BuildRecipe.model_validate({"task": HOPPER, "source": source | {"backend": "mujoco"}, "out": "x.zarr"})


def test_what_is_known_to_differ_is_said_and_kept(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(envpool_backend.DIFFERENT) <= set(envs.list_tasks())
    pytest.importorskip("envpool")
    monkeypatch.setattr(envpool_backend, "DIFFERENT", {"gym/Pendulum-v1": "gravity is the moon's"})
    monkeypatch.setattr(envpool_backend, "TESTED", envpool_backend.versions(HOPPER)["envpool"])
    build(recipe_for(tmp_path / "p.zarr", {"name": "random", "episodes": 1}, task="gym/Pendulum-v1"))
    assert "in EnvPool, gym/Pendulum-v1's gravity is the moon's; see cvlctl doctor --parity" in capsys.readouterr().err
    assert open_store(tmp_path / "p.zarr").provenance["environment"]["differs"] == "gravity is the moon's"
    monkeypatch.setattr(envpool_backend, "TESTED", "0")
    assert "differs" not in envpool_backend.versions("gym/Pendulum-v1")


def test_every_other_task_has_a_name_in_envpool() -> None:
    envpool = pytest.importorskip("envpool")
    known = set(envpool.list_all_envs())
    for task in envs.list_tasks():
        if not task.endswith("-fixed"):
            assert envpool_backend.name_of(task) in known
