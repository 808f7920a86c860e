"""The benchmarks of single learners, in small: they run, and both sides of a comparison do the same work."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cvlctl
from cvlctl.data import samplers, statistics
from cvlctl.data.samplers import batches
from cvlctl.learn.algorithms import occupancy, td3_bc
from cvlctl.learn.programs import programs_of, whole_step
from cvlctl.learn.settings import Settings
from cvlctl.types import Episode

Script = Callable[[str], Any]


def test_the_plain_critic_learns_what_ours_learns(script: Script) -> None:
    critic = script("critic")
    config = occupancy.Config(hidden=(32, 32), latent_dim=8)
    data = critic.common.synthetic(2_000)
    data = data._replace(observation=data.observation.clamp(-3, 3))
    state = occupancy.init(config, critic.SPEC, critic.SEEDS, data)
    program = whole_step(lambda s, b, n: occupancy.step(config, s, b, n), Settings("cpu", 1, "float32", False))
    plain = []
    for member in range(2):
        net = critic.PlainCritic(critic.SPEC, config.hidden, config.latent_dim)
        net.load(state, member)
        plain.append((net, torch.optim.Adam(net.parameters(), lr=config.learning_rate)))
    mean, std = statistics.observation_statistics(data.observation)
    draws = occupancy.draws(config, critic.SPEC, 64)
    for _, (indices, noise) in batches(data, draws, critic.SEEDS, 0, 5):
        batch = samplers.gather(data, indices, draws)
        for member, (net, optimiser) in enumerate(plain):
            seen = [(x[member] - mean) / std for x in (batch.observation, batch.future_observation)]
            critic.plain_update(net, optimiser, seen[0], batch.action[member], seen[1])
        program(state, batch, noise)
    for member, (net, _) in enumerate(plain):
        for name in ("phi", "psi"):
            found = getattr(net, name)[4].weight.T
            torch.testing.assert_close(found, state[f"{name}.2.weight"][member], atol=1e-5, rtol=0)


def test_critic_script(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    critic = script("critic")
    small = ["--threads", "1", "--rounds", "1", "--updates", "1", "--rows", "2000", "--eager-only"]
    for name, value in (
        ("BATCH", 16),
        ("CVL_BATCH", 16),
        ("CRITIC", occupancy.Config(hidden=(16,))),
        ("HIDDEN", [(16,), (8,)]),
    ):
        monkeypatch.setattr(critic, name, value)
    critic.main([*small, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    peers = ["plain eager PyTorch, as shipped", "plain eager PyTorch, our matmul setting"]
    assert [row["peer"] for row in found["comparisons"]] == [*peers, "by info_nce", "by info_nce"]
    assert [row["least"] for row in found["comparisons"]] == [2, None, 0.5, 0.5]
    forms = {name: numbers for name, *numbers in found["curves"][0]["rows"]}
    assert list(forms) == [*peers, "cvlctl, eager"]
    assert forms[peers[0]][1:] == [1.0, 1.0, 1.0]
    wholes = [f"{name}'s whole update, critic {size}" for name in ("CVL", "LAEO") for size in (16, 8)]
    assert [curve["title"].split(", batch")[0] for curve in found["curves"][1:]] == wholes
    assert forms["cvlctl, eager"][1] == pytest.approx(found["comparisons"][0]["ratio"], abs=0.01)
    assert found["settings"]["threads"] == 1
    assert found["machine"]["versions"]["torch"]
    assert "cvlctl, eager" in capsys.readouterr().out


def test_frames_a_second_leave_out_the_warm_up(script: Script) -> None:
    pytest.importorskip("gymnasium")
    sac = script("sac")
    # 100 frames of no learning, 30 seconds of compiling, then 50 frames a second
    seen = [(n, n / 1000 + (n > 100) * (30 + (n - 100) / 50)) for n in range(50, 2001, 50)]
    rate, warm_up = sac.steady(seen, 100)
    assert rate == pytest.approx(1400 / (1.4 + 28))
    assert warm_up == pytest.approx(30)


def test_sac_script(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("stable_baselines3")
    sac = script("sac")
    for name, value in (("TASK", "gym/Pendulum-v1"), ("WARM_UP", 50)):
        monkeypatch.setattr(sac, name, value)
    monkeypatch.setattr(script("sb3_peer"), "FILLED", 500)
    sac.main(
        ["--threads", "1", "--rounds", "1", "--updates", "1", "--frame-rounds", "1", "--frames", "300",
         "--learning-starts", "100", "--hidden", "16", "--eager-only", "--json", str(tmp_path / "found.json")]
    )  # fmt: skip
    rows = json.loads((tmp_path / "found.json").read_text())["comparisons"]
    assert [(row["unit"], row["least"], row["aim"]) for row in rows] == [
        ("updates/s", 2.2, 3), ("updates/s", None, None), ("frames/s", 2, 2.5), ("frames/s", None, None)
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in rows)


def pushes(num: int, horizon: int) -> list[Episode]:
    """Episodes of a made-up task: all but the first are cut off, and every reward is another."""
    rng = np.random.default_rng(0)
    return [
        Episode(rng.standard_normal((horizon + 1, 3)), rng.uniform(-1, 1, (horizon, 1)), rng.standard_normal(horizon),
                terminated=number == 0)
        for number in range(num)
    ]  # fmt: skip


def test_both_libraries_learn_from_the_same_transitions(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("d3rlpy")
    td_peers, td_learning = script("td_peers"), script("td_learning")
    path = tmp_path / "pushes.zarr"
    cvlctl.write_store(path, pushes(3, 4), task="gym/Pendulum-v1", horizon=4)
    recipe = td_learning.recipe_of("td3_bc", td3_bc.Config(gamma=0.5), path, 1, 0, 1, tmp_path / "run")
    data = td_learning.join([td_learning.open_store(path)], recipe.stores, None, True)
    draws = samplers.Draws(12, 0.5, transitions=True)
    row = data.layout.row.unsqueeze(0)
    none = row[:, :0]
    ends = (data.layout.terminated & (data.layout.row + 1 == data.layout.last)).unsqueeze(0)
    batch = samplers.gather(data, samplers.Indices(row, ends, none, none, none.bool(), none), draws)
    buffer = td_peers.peer_buffer(data)
    theirs = [buffer.transition_picker(e, i) for e in buffer.episodes for i in range(e.transition_count)]
    assert len(theirs) == 12
    for i, transition in enumerate(theirs):
        assert transition.observation.tolist() == batch.observation[0, i].tolist()
        assert transition.action.tolist() == batch.action[0, i].tolist()
        assert transition.reward[0] == batch.reward[0, i]
        assert 0.5 * (1 - transition.terminal) == batch.discount[0, i]
        if not transition.terminal:
            assert transition.next_observation.tolist() == batch.next_observation[0, i].tolist()
    assert [t.terminal for t in theirs] == [0, 0, 0, 1, *[0] * 8]


def test_both_libraries_have_networks_of_the_same_sizes(script: Script) -> None:
    pytest.importorskip("d3rlpy")
    td_learners = script("td_learners")
    data = td_learners.common.synthetic(1_100)
    for method in td_learners.METHODS:
        config = td_learners.default_config(method, 4)
        state = td_learners.ALGORITHMS[method].init(config, td_learners.common.SPEC, [0], data)
        algo = td_learners.peer(method, config, data)
        algo.build_with_dataset(td_learners.peer_buffer(data))
        modules = algo.impl.modules
        theirs = {"critic": modules.q_funcs} | ({"value": modules.value_func} if method == "iql" else {})
        for name, module in theirs.items():
            numbers = sum(value.numel() for key, value in state.items() if key.startswith(f"{name}."))
            assert sum(p.numel() for p in module.parameters()) == numbers


def test_the_plain_td3_bc_learns_what_ours_learns(script: Script) -> None:
    td_learners = script("td_learners")
    config = td3_bc.Config(hidden=(16, 16))
    data = td_learners.common.synthetic(2_000)
    data = data._replace(observation=data.observation.clamp(-3, 3))
    state = td3_bc.init(config, td_learners.common.SPEC, [0], data)
    learner = script("td_peers").PlainTD3BC(td_learners.common.SPEC, config)
    actor, *critics = learner.modules
    for module, target in zip(learner.modules, learner.targets, strict=True):
        copy = module is not actor and critics.index(module)
        for i in range(3):
            layer = module[2 * i]
            if module is actor:  # of ours the deterministic policy is the mean's half
                weight, bias = state[f"actor.{i}.weight"][0], state[f"actor.{i}.bias"][0, 0]
            else:
                weight, bias = (state[f"critic.{i}.{name}"][0, copy] for name in ("weight", "bias"))
            outputs = layer.weight.shape[0]
            layer.weight.data.copy_(weight.T[:outputs])
            layer.bias.data.copy_(bias.flatten()[:outputs])
        target.load_state_dict(module.state_dict())
    mean, std = statistics.observation_statistics(data.observation)
    draws = td3_bc.draws(config, td_learners.common.SPEC, 64)
    programs = programs_of(td3_bc, config, Settings("cpu", 1, "float32", False))
    for step, (indices, noise) in batches(data, draws, [0], 0, 4):
        batch = samplers.gather(data, indices, draws)
        observation, after = ((x[0] - mean) / std for x in (batch.observation, batch.next_observation))
        learner.update(observation, batch.action[0], batch.reward[0], batch.discount[0], after, noise["next_action"][0])
        programs[(step + 1) % 2](state, batch, noise)
    torch.testing.assert_close(actor[0].weight.T, state["actor.0.weight"][0], atol=1e-5, rtol=0)
    for i, (critic, target) in enumerate(zip(critics, learner.targets[1:], strict=True)):
        torch.testing.assert_close(critic[2].weight.T, state["critic.1.weight"][0, i], atol=1e-5, rtol=0)
        torch.testing.assert_close(target[2].weight.T, state["target/critic.1.weight"][0, i], atol=1e-5, rtol=0)


def test_td_learners_script(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    td_learners = script("td_learners")
    cvlctl.write_store(tmp_path / "pushes.zarr", pushes(3, 40), task="gym/Pendulum-v1", horizon=200)
    with_d3rlpy = importlib.util.find_spec("d3rlpy") is not None
    libraries = list(td_learners.LIBRARIES) if with_d3rlpy else ["cvlctl"]
    small = ["--methods", "td3_bc", "iql", "--threads", "1", "--json", str(tmp_path / "found.json")]
    learn = [*small, "--learn", "--stores", str(tmp_path / "pushes.zarr"), "--steps", "2", "--episodes", "2"]
    td_learners.main([*learn, "--seeds", "0", "--only", *libraries])
    first = json.loads((tmp_path / "found.json").read_text())
    monkeypatch.setattr(
        script("td_learning"), "EVALUATION_SEED", 0
    )  # a run that is played again now would score otherwise
    td_learners.main([*learn, "--seeds", "0", "1", "--only", *libraries])
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(first["runs"]) == 2 * len(libraries) == len(found["runs"]) / 2
    assert first["runs"].items() <= found["runs"].items()
    assert all(record["runs"] == 2 and record["episodes"] == 4 for record in found["scores"])
    assert len(found["differences"]) == (2 if with_d3rlpy else 0)
    assert "td3_bc, cvlctl" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another budget"):
        td_learners.main([*learn, "--steps", "3"])
    if with_d3rlpy:
        td_learners.main([*small, "--rounds", "1", "--updates", "1", "--rows", "1100", "--eager-only"])
        speed = json.loads((tmp_path / "found.json").read_text())
        assert [(row["peer"], row["least"]) for row in speed["comparisons"] if row["least"]] == [
            ("d3rlpy, as shipped", 2.8), ("plain eager PyTorch, as shipped", 1.8), ("d3rlpy, as shipped", 3.0)
        ]  # fmt: skip
        assert [curve["columns"][-2:] for curve in speed["curves"]] == [["GFLOP", "share"]] * 2
        for curve in speed["curves"]:  # the same work, less what d3rlpy does twice
            gflop = {row[0]: row[-2] for row in curve["rows"]}
            assert 0.8 < gflop["cvlctl, eager"] / gflop["d3rlpy, as shipped"] <= 1
            assert gflop.get("plain eager PyTorch, as shipped", 0) <= gflop["cvlctl, eager"]
