"""The benchmarks of evaluation, collection, stores and files, and of Mountain Car, in small."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_stores import many

import cvlctl
from cvlctl import cell as own
from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildManyRecipe
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import function, load
from cvlctl.experiments.graph import folder_of
from cvlctl.experiments.run import planned
from cvlctl.learn.finetune import finetune
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.recipe import FinetuneRecipe, PretrainRecipe
from cvlctl.play import envs
from cvlctl.play.rollout import collect_episode
from cvlctl.types import Episode

Script = Callable[[str], Any]


def test_evaluation_script_plays_the_same_episodes(script: Script, tmp_path: Path) -> None:
    evaluation = script("evaluation")
    evaluation.main(
        ["--tasks", "gym/Pendulum-v1", "--episodes", "3", "--rounds", "1", "--threads", "1",
         "--json", str(tmp_path / "found.json")]
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())
    with_sb3 = importlib.util.find_spec("stable_baselines3") is not None
    with_envpool = importlib.util.find_spec("envpool") is not None
    assert len(found["disagreement"]) == 1 + with_sb3
    assert len(found["comparisons"]) == (1 + with_sb3) * (1 + with_envpool)
    assert all(difference < 1e-3 for difference in found["disagreement"].values())
    assert all(row["ours"] > 0 and row["unit"] == "seconds" for row in found["comparisons"])


def episode(length: int, terminated: bool) -> Episode:
    rewards = np.zeros(length, dtype=np.float32)
    rewards[-1] = 100.0
    return Episode(np.zeros((length + 1, 2)), np.zeros((length, 1)), rewards, terminated=terminated)


def test_returns_by_hand_and_steps_near_a_time_limit_left_out(script: Script) -> None:
    mountain_car = script("mountain_car")
    found = mountain_car.discounted_returns(np.array([1.0, 2.0, 4.0]), 0.5)
    assert found.tolist() == [3.0, 4.0, 4.0]
    pairs = mountain_car.pairs_of([episode(3, True), episode(400, False)], 0.99)
    assert (pairs.episode == 0).sum() == 3
    assert (pairs.episode == 1).sum() == 400 - 390 + 1  # 0.99^390 < 2 % < 0.99^389
    assert pairs.returns[:3] == pytest.approx([98.01, 99.0, 100.0])


def test_correlations_of_a_perfect_and_a_reversed_estimate(script: Script) -> None:
    mountain_car = script("mountain_car")
    rng = np.random.default_rng(0)
    observations = np.stack([np.repeat([-1.0, -0.5, 0.0, 0.3], 50), rng.uniform(0.001, 0.009, 200)], axis=1)
    returns = observations[:, 0] + rng.uniform(0, 0.1, 200)
    pairs = mountain_car.Pairs(observations, np.zeros((200, 1)), returns, np.arange(200) % 5)
    for sign in (1, -1):
        found = mountain_car.correlations(sign * returns, pairs, 10)
        assert [found[kind] for kind in mountain_car.KINDS] == [sign, sign, sign]
        assert found["spearman_interval"] == [sign, sign]


def test_mountain_car_script(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mountain_car = script("mountain_car")
    monkeypatch.chdir(tmp_path)
    env = envs.make("gym/MountainCarContinuous-v0", 0)
    pushes = [collect_episode(env, lambda o, _: np.sign(o[1:] + 1e-9), number) for number in range(10)]
    cvlctl.write_store("swings.zarr", pushes, task=env.task, horizon=env.spec.horizon)
    arguments = [
        "--store", "swings.zarr", "--out", "run", "--pairs", "300", "--bank", "500", "--resamples", "5",
        "--json", "found.json", "--set", "steps=20", "batch_size=32", "critic.hidden=[16]", "seeds=[0]",
        "compile=false", "threads=1",
    ]  # fmt: skip
    mountain_car.main(arguments)
    mountain_car.main(arguments)  # finds replay and critic finished
    found = json.loads(Path("found.json").read_text())
    assert found["episodes_at_the_goal"] == 10
    assert found["pairs"] > 100
    assert found["correlation"]["yardstick: nearest training returns"]["spearman"] > 0
    assert Path("run/mountain-car.png").stat().st_size > 10_000
    assert "normaliser self, seed 0" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        mountain_car.main([*arguments, "batch_size=16"])
    assert left.value.code == 2


def test_maps_of_mountain_car_from_the_recipe_in_a_tiny_form(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    maps = script("mountain_car_maps")
    recipe = Path(maps.__file__).parents[1] / "recipes" / "papers" / "cvl-figure-8.yaml"
    monkeypatch.chdir(tmp_path)
    size = "sizes.tiny={frames: 1_050, starts: 1_000, updates: 3, q_updates: 3, seeds: [0]}"
    plain = [f"stages.{stage}.compile=false" for stage in ("data", "critic", "q")]
    jobs = load(recipe, [size, "size=tiny", *plain, "stages.critic.critic.hidden=[16]"]).jobs
    for job in jobs:
        function(job.command)(job.recipe, force=False)
    store, critic, q = (str(job.recipe.out) for job in jobs)
    arguments = ["--store", store, "--critic", critic, "--pairs", "300", "--q"]
    maps.main([*arguments, q])
    assert Path("build/mountain-car-maps.png").stat().st_size > 10_000
    assert "Q of SAC's last policy, fitted" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        maps.main([*arguments, critic])
    assert left.value.code == 2


class Known:
    """A critic whose Q is a function of observations (N, 1) and actions (N, 1)."""

    gamma, by_next = 0.9, False

    def __init__(self, q: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._q = q

    def q(self, observations: np.ndarray, actions: np.ndarray, *_: Any) -> np.ndarray:
        return self._q(observations[:, 0], actions[:, 0])

    def log_ratio(self, observations: np.ndarray, _: np.ndarray, futures: np.ndarray) -> np.ndarray:
        return np.where(np.arange(len(futures)) < 10, 0.0, -np.inf) * np.ones((len(observations), 1))


def test_what_of_a_critic_can_be_trusted_by_critics_that_are_known(script: Script, tmp_path: Path) -> None:
    trust = script("trust")
    episodes = [  # in the k-th, the action is k / 10, and so is the only reward
        Episode(np.linspace(0, 1, 6)[:, None], np.full((5, 1), k / 10), np.eye(5)[4] * k / 10, terminated=True)
        for k in range(1, 10)
    ]
    store = cvlctl.write_store(tmp_path / "a.zarr", episodes, task="t")
    near = trust.choices(store, states=40, actions=9)
    assert near.actions.shape == (40, 9, 1)
    np.testing.assert_allclose(near.actions[..., 0], near.returns, rtol=1e-6)  # one of each episode, at every state
    assert (np.sort(near.returns, axis=1) == np.sort(near.returns[0])).all()
    of_action = trust.trusted(Known(lambda s, a: a), store, near, lambda o: np.full((len(o), 1), 0.9))
    assert (of_action["action"], of_action["episode"], of_action["states"]) == pytest.approx((1, 1, 10))
    spread = near.actions.std()
    away = 0.9 - near.actions[:, 0, 0]
    assert of_action["moved"] == pytest.approx(np.sqrt(np.mean(away**2)) / spread, rel=1e-5)
    assert of_action["gain"] == pytest.approx(away.mean() / spread, rel=1e-5)
    against = trust.trusted(Known(lambda s, a: s - a), store, near)
    assert against["episode"] == pytest.approx(-1) and 0 < against["action"] < 1 and "moved" not in against
    exact = trust.trusted(Known(lambda s, a: a * 0.9 ** (4 - 5 * s)), store, near)
    assert exact["returns"] == pytest.approx(1)


def test_trust_of_runs(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trust = script("trust")
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    episodes = [
        Episode(rng.standard_normal((6, 3)), rng.uniform(-1, 1, (5, 2)), rng.random(5), terminated=True)
        for _ in range(20)
    ]
    cvlctl.write_store("a.zarr", episodes, task="t")
    small = {"stores": ["a.zarr"], "steps": 2, "batch_size": 4, "seeds": [0, 1], "compile": False, "threads": 1}
    pretrain(PretrainRecipe.model_validate({**small, "critic": {"hidden": [8]}, "out": "critic"}))
    finetune(FinetuneRecipe.model_validate({**small, "init_from": "critic", "algorithm": "cvl", "out": "policy"}))
    found = trust.main(["critic", "policy", "--json", "found.json"])
    assert json.loads(Path("found.json").read_text()) == found
    assert "moved" not in found[0] and found[1]["moved"] > 0 and found[1]["seeds"] == 2
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("returns", "critic", "policy"))
    with pytest.raises(CvlctlError, match=r"a\.zarr is no run"):
        trust.measure("a.zarr", {})


@pytest.mark.slow
def test_streaming_and_memory_train_the_same_store(script: Script) -> None:
    found = script("streaming").benchmark(rows=100_000, share=0.3, updates=20, rounds=1)
    assert found["data_megabytes"] == 23 and found["allowed_megabytes"] == 7
    streamed, whole = (found["rounds"][name][0] for name in ("streamed", "in memory"))
    (row,) = found["comparisons"]
    assert row["ours"] == pytest.approx(streamed["updates_per_second"], rel=1e-3)
    assert row["theirs"] == pytest.approx(whole["updates_per_second"], rel=1e-3)
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=1e-2)


def test_benchmark_of_imports(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)  # put back afterwards: the script sets it
    importing = script("importing")
    write_store(tmp_path / "a.zarr", many(5), task="toy")
    out = tmp_path / "found.json"
    importing.main(["--transitions", "3000", "--store", str(tmp_path / "a.zarr"), "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["import"]["times"][importing.RAW]["ratio"] == 1.0
    assert found["import"]["times"][importing.IMPORT]["seconds"] > 0
    assert found["load"]["times"][importing.LOAD]["size_mb"] >= 0
    assert (importing.MINARI in found["load"]["times"]) == bool(importlib.util.find_spec("minari"))
    assert "cvlctl imports" in capsys.readouterr().out


def test_the_benchmark_builds_the_same_both_ways(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    building = script("building")
    asked = []

    def in_process(recipe: BuildManyRecipe) -> list[dict[str, Any]]:
        asked.append(recipe.processes)
        return [{"task": one.task, **build(one)} for one in recipe.recipes]

    monkeypatch.setattr(building, "build_many", in_process)
    source = {"name": "sac", "steps": 30, "learning_starts": 20, "hidden": [8], "batch_size": 8}
    found = building.benchmark(["gym/Pendulum-v1", "gym/MountainCarContinuous-v0"], source, 1, False)
    assert asked == [1, 2] and found["same_stores"] and found["comparisons"][0]["ratio"] > 0


def test_benchmark_of_engines(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = script("engines")
    asked, clock = [], itertools.count()

    def in_process(loaded: Any) -> dict[str, Any]:
        """Each cell takes three seconds by its record."""
        asked.append((loaded.engine, loaded.local.processes))
        for cell in planned(loaded, keep=True):
            assert function(cell.job.command)(cell.job.recipe, force=False)["status"] == "trained"
            folder = folder_of(loaded.out, cell.name)
            folder.mkdir(parents=True)
            own.write(folder, {"ended": 3 * next(clock)})
        return {"status": "done", "cells": []}

    monkeypatch.setattr(engines, "run_experiment", in_process)
    monkeypatch.setattr(engines, "find_spec", lambda name: True)
    monkeypatch.setattr(engines, "num_cpus", lambda: 2)
    shown: list[list[str]] = []
    monkeypatch.setattr(engines, "_command", lambda line: shown.append(line) if line[0] == "run" else None)
    out = tmp_path / "found.json"
    small = ["--cells", "2", "--steps", "1", "--rounds", "1", "--hidden", "8", "--more", "2", "--rows", "1000"]
    small += ["--many", "3"]
    engines.main([*small, "--json", str(out)])
    found = json.loads(out.read_text())
    assert asked == [("local", 1), ("ray", 1), ("local", 2), ("local", 1), ("local", 1)]
    assert found["same_weights"]
    limits = ["a limit of 0.5 s", "a limit of 1.5 s", "a limit of 5 s", "a limit of 5 s"]
    assert [row["peer"] for row in found["comparisons"][2:]] == limits
    assert sorted(line[-1] for line in shown) == ["--dry-run", "--status"]
    for row in found["comparisons"][2:4]:
        assert row["ours"] == pytest.approx(3, abs=0.1)
    assert "the same weights" in capsys.readouterr().out


def test_benchmark_of_reports(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporting = script("reporting")
    monkeypatch.setattr(reporting, "SHAPES", {"2 methods, 3 seeds": (2, 3)})
    monkeypatch.setattr("cvlctl.experiments.reports.report.can_draw", lambda: False)
    out = tmp_path / "found.json"
    reporting.main(["--tasks", "2", "--lines", "3", "--rounds", "1", "--json", str(out)])
    seconds, size = json.loads(out.read_text())["comparisons"]
    assert seconds["work"] == "report of 12 runs (2 methods, 3 seeds)" and seconds["theirs"] == 60
    assert 0.01 < size["ours"] < 1 and size["ratio"] == pytest.approx(10 / size["ours"], rel=0.01)


def test_benchmark_of_backends(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("envpool")
    backends = script("backends")
    small = ["--tasks", "gym/Pendulum-v1", "--episodes", "2", "--rounds", "1"]
    backends.main([*small, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    rates = found["tasks"][0]["steps_per_second"]
    assert list(rates) == ["gymnasium", "processes", "envpool"] and min(map(min, rates.values())) > 0
    done = backends.play({"task": "gym/Pendulum-v1", "episodes": [0, 1]})
    assert done["steps"] == 400 and found["machine"]["cpus"] >= 1


def test_benchmark_of_frames(script: Script, tmp_path: Path) -> None:
    small = ["--threads", "1", "--rounds", "1", "--updates", "1", "--rows", "1100", "--size", "16", "--batch-size", "8"]
    script("frames").main([*small, "--eager-only", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["comparisons"]
    assert [row["unit"] for row in found] == ["updates/s"] * 3 and all(row["ours"] > 0 for row in found)
    assert "frozen critic of 3 stacked frames" in found[2]["work"]


@pytest.mark.usefixtures("renders")
def test_benchmark_of_rendering(script: Script, tmp_path: Path) -> None:
    small = ["--tasks", "gym/FetchPush-v4", "--frames", "2", "--size", "16", "--rounds", "1"]
    script("rendering").main([*small, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tasks"][0]["frames_per_cpu_second"] > 0 and found["comparisons"][0]["unit"] == "frames/s"


@pytest.mark.usefixtures("renders")
def test_benchmark_of_what_sees_plays_the_same_episodes(script: Script, tmp_path: Path) -> None:
    small = ["--episodes", "2", "--horizon", "3", "--size", "24", "--rounds", "1", "--workers", "1"]
    script("seeing").main(["--tasks", "gym/FetchReach-v4", *small, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["disagreement"]["gym/FetchReach-v4"] < 1e-3 and found["comparisons"][0]["ours"] > 0


@pytest.mark.slow
def test_benchmark_of_explaining(script: Script, tmp_path: Path) -> None:
    small = ["--rows", "1500", "--hidden", "16", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    script("explaining").main(small)
    found = json.loads((tmp_path / "found.json").read_text())["comparisons"]
    assert ["psi kept" in found[0]["work"], "the first time" in found[1]["work"]] == [True, True]
    assert all(row["ours"] > 0 for row in found)


def test_benchmark_of_intervals(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("rliable")
    small = ["--runs", "3", "--tasks", "2", "--resamples", "5", "--rounds", "1"]
    script("intervals").main([*small, "--json", str(tmp_path / "found.json")])
    rows = json.loads((tmp_path / "found.json").read_text())["comparisons"]
    assert len(rows) == 4 and all(row["peer"] == "rliable" and row["ratio"] > 1 for row in rows)


def test_references_are_measured(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = script("measure_references")
    monkeypatch.setattr(measured, "RANDOM_EPISODES", 1)
    monkeypatch.setattr(measured, "SCRIPTED_EPISODES", 1)
    row = measured.measure({"task": "metaworld/drawer-close-v3"})["row"]
    assert row["scripted_success"] == 1.0 and row["max"] > row["min"]


def test_latency_of_policies(script: Script) -> None:
    found = script("latency").main(["--hidden", "8", "--calls", "20"])
    assert {"load_policy (numpy)", "npz"} <= set(found) and all(0 < median <= late for median, late in found.values())


def test_latency_of_policies_that_see(script: Script) -> None:
    found = script("latency").main(["--hidden", "8", "--encoder", "small", "--calls", "5"])
    assert {"load_policy (torch)", "torch"} <= set(found) and "npz" not in found
