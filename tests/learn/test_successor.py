"""Successor features: losses by hand, against the exact (I - gamma P_pi)^-1, and as a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from torch import Tensor

import cvlctl
from cvlctl import checkpoints
from cvlctl.data import samplers
from cvlctl.data.samplers import batches
from cvlctl.experiments.commands import load
from cvlctl.learn import networks
from cvlctl.learn.algorithms import successor_features
from cvlctl.learn.finetune import finetune
from cvlctl.learn.losses import successor
from cvlctl.learn.networks import State
from cvlctl.types import Spec

# --- losses: twins (2, B = 2, d = 2)

PSI = [[[1.0, 2.0], [0.0, 1.0]], [[2.0, 0.0], [3.0, -1.0]]]


def test_values() -> None:
    psi, weight = torch.tensor(PSI, requires_grad=True), torch.tensor([1.0, 2.0])
    q = successor.values(psi, weight)
    assert q.tolist() == [[5.0, 2.0], [2.0, 1.0]]
    q.sum().backward()
    assert psi.grad is not None and psi.grad.tolist() == [[[1.0, 2.0]] * 2] * 2


def test_pessimistic_takes_the_whole_vector_of_the_smaller_value() -> None:
    psi = torch.tensor(PSI)
    assert successor.pessimistic(psi, torch.tensor([1.0, 2.0])).tolist() == [[2.0, 0.0], [3.0, -1.0]]
    assert successor.pessimistic(psi, torch.tensor([-1.0, 0.0])).tolist() == [[2.0, 0.0], [3.0, -1.0]]
    assert successor.pessimistic(psi, torch.tensor([1.0, 0.0])).tolist() == [[1.0, 2.0], [0.0, 1.0]]


def test_values_keep_members_apart() -> None:
    psi, weight = torch.tensor([PSI, PSI]), torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    assert successor.values(psi, weight).tolist() == [[[5.0, 2.0], [2.0, 1.0]], [[1.0, 0.0], [2.0, 3.0]]]
    assert successor.pessimistic(psi, weight).tolist() == [[[2.0, 0.0], [3.0, -1.0]], [[1.0, 2.0], [0.0, 1.0]]]


def test_successor_target_stops_at_terminal_states() -> None:
    feature, ahead = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[10.0, 20.0], [10.0, 20.0]])
    assert successor.successor_target(feature, torch.tensor([0.5, 0.0]), ahead).tolist() == [[6.0, 12.0], [3.0, 4.0]]


def test_successor_error() -> None:
    psi = torch.tensor(PSI, requires_grad=True)
    error = successor.successor_error(psi, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    # differences (0, 2), (-1, 0); (1, 0), (2, -2); squares summed over d, by 2 d = 4
    assert error.tolist() == [[1.0, 0.25], [0.25, 2.0]]
    error.sum().backward()
    assert psi.grad is not None and psi.grad.tolist() == [[[0.0, 1.0], [-0.5, 0.0]], [[0.5, 0.0], [1.0, -1.0]]]


def test_reward_error() -> None:
    feature = torch.tensor([[1.0, 2.0], [3.0, 0.0]], requires_grad=True)
    weight = torch.tensor([1.0, -1.0], requires_grad=True)
    error = successor.reward_error(feature, weight, torch.tensor([1.0, 2.0]))
    assert error.tolist() == [2.0, 0.5]  # (-1 - 1)^2 / 2, (3 - 2)^2 / 2
    error.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [-2.0 + 3.0, -4.0]
    assert feature.grad is not None and feature.grad.tolist() == [[-2.0, 2.0], [1.0, -1.0]]


# --- against exact answers


def policy_of(mdp: tabular.MDP, name: str) -> tabular.Array:
    """(S, A): that of the data, or the one that is greedy on the data's Q."""
    return mdp.policy if name == "behaviour" else np.eye(mdp.policy.shape[1])[mdp.q().argmax(1)]


def evaluated(mdp: tabular.MDP, policy: tabular.Array, config: Any, steps: int) -> State:
    """Features, rewards and successor features under `policy`, whose actions are drawn here: there is no actor."""
    torch.set_num_threads(1)
    data = tabular.data_of(mdp.episodes(400, 60, seed=0))
    spec = Spec((mdp.states.shape[1],), 2, 60)
    state, rng = successor_features.init(config, spec, [0], data), np.random.default_rng(0)
    draws, cumulative = successor_features.draws(config, spec, 128), policy.cumsum(1)
    with torch.no_grad():
        for _, (indices, _) in batches(data, draws, [0], 0, steps):
            batch = samplers.gather(data, indices, draws)
            arrived = tabular.state_of(mdp, batch.next_observation[0].numpy())
            chosen = (rng.random(len(arrived))[:, None] > cumulative[arrived]).sum(1).clip(max=policy.shape[1] - 1)
            seen = [networks.normalise(state, x) for x in (batch.observation, batch.next_observation)]
            successor_features.learn_features(config, state, batch, *seen)
            next_action = torch.from_numpy(mdp.actions[chosen]).unsqueeze(0)
            successor_features.learn_successors(config, state, batch, *seen, next_action)
    return state


def pairs(mdp: tabular.MDP, state: State) -> tuple[Tensor, Tensor]:
    """All (s, a) of states that are not terminal, s normalised: (1, N, O), (1, N, A)."""
    live, count = mdp.states[~mdp.terminal], len(mdp.actions)
    observation = torch.from_numpy(np.repeat(live, count, 0)).unsqueeze(0)
    return networks.normalise(state, observation), torch.from_numpy(np.tile(mdp.actions, (len(live), 1))).unsqueeze(0)


@pytest.mark.parametrize(("make", "policy"), [(tabular.grid_sparse, "behaviour"), (tabular.cliff, "greedy")])
def test_successor_features_of_fixed_features_are_exact(make: Any, policy: str, capsys: Any) -> None:
    """Observations one-hot: Psi of the one-hot features is (I - gamma P_pi)^-1 itself, up to the normaliser."""
    mdp = make()
    mdp = dataclasses.replace(mdp, states=np.eye(len(mdp.reward), dtype=np.float32))
    pi = policy_of(mdp, policy)
    config = successor_features.Config(
        mdp.gamma, features="observation", ema_rate=0.1, hidden=(64, 64), learning_rate=2e-3
    )
    state = evaluated(mdp, pi, config, 1200)
    under = np.einsum("sa,sat->st", pi, mdp.transition)
    under[mdp.terminal] = 0
    series = np.linalg.inv(np.eye(len(under)) - mdp.gamma * under)
    features = successor_features.features(config, state, networks.normalise(state, torch.from_numpy(mdp.states)[None]))
    exact = ((1 - mdp.gamma) * mdp.transition @ series @ features[0].numpy())[~mdp.terminal]
    learned = successor_features.successors(state, *pairs(mdp, state))[0].mean(0).numpy().reshape(exact.shape)
    off, spread = abs(learned - exact).mean(), abs(exact - exact.mean((0, 1))).mean()
    with capsys.disabled():
        print(f"\n  {mdp.name}, {policy}: Psi off by {off:.4f}, spread over pairs {spread:.4f}", end="")
    assert off < 0.2 * spread


@pytest.mark.parametrize("make", [pytest.param(tabular.grid_dense, marks=pytest.mark.slow), tabular.cliff])
def test_q_of_learned_features_is_the_exact_q(make: Any, capsys: Any) -> None:
    mdp = make()
    pi = policy_of(mdp, "greedy")
    config = successor_features.Config(mdp.gamma, feature_dim=16, ema_rate=0.1, hidden=(64, 64), learning_rate=2e-3)
    state = evaluated(mdp, pi, config, 800)
    exact = dataclasses.replace(mdp, policy=pi).q()[~mdp.terminal].ravel()
    scale = state["reward_scale"].item() / (1 - mdp.gamma)
    learned = successor_features.q_values(state, *pairs(mdp, state))[0].mean(0).numpy() * scale
    correlation, off = np.corrcoef(exact, learned)[0, 1], abs(learned - exact).mean() / abs(exact).mean()
    with capsys.disabled():
        print(f"\n  {mdp.name}: correlation of Q {correlation:.3f}, off by {off:.1%}", end="")
    assert correlation > 0.93
    assert off < 0.1


# --- as a run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "ring.zarr"
    cvlctl.write_store(path, tabular.ring().episodes(6, 30, seed=0), task="ring")
    return path


CONTRASTIVE = "{name: successor_features, hidden: [32], feature_dim: 8, gamma: 0.9, num_actions: 2}"
OBSERVATION = "{name: successor_features, hidden: [32], features: observation, gamma: 0.9}"


def run(store: Path, out: Path, algorithm: str, *overrides: str) -> dict[str, Any]:
    path = out.with_name(f"{out.name}.yaml")
    common = "steps: 60, batch_size: 32, compile: false, threads: 1, log_every_steps: 10"
    path.write_text(f"{{stores: ['{store}'], out: '{out}', algorithm: {algorithm}, {common}}}")
    return finetune(load(path, list(overrides), "finetune"))


def state_of(out: Path) -> State:
    return checkpoints.load(out / "checkpoints" / "last.safetensors")[0]


@pytest.mark.parametrize("algorithm", [CONTRASTIVE, OBSERVATION])
def test_a_seed_trains_alike_alone_and_in_company(algorithm: str, store: Path, tmp_path: Path) -> None:
    run(store, tmp_path / "alone", algorithm, "seeds=[3]")
    run(store, tmp_path / "together", algorithm, "seeds=[0,3]")
    alone, together = state_of(tmp_path / "alone"), state_of(tmp_path / "together")
    assert alone.keys() == together.keys()
    assert all((value[0] - together[key][1]).abs().max() < 1e-5 for key, value in alone.items() if value.dim())
    assert (together["actor.0.weight"][0] - together["actor.0.weight"][1]).abs().max() > 1e-2


def test_the_step_is_one_graph() -> None:
    """Compiled as a whole, without a break, it does what it does eager."""
    data = tabular.data_of(tabular.ring().episodes(6, 30, seed=0))
    config, spec = successor_features.Config(feature_dim=8, hidden=(16,)), Spec((8,), 2, 30)
    draws = successor_features.draws(config, spec, 16)
    indices, noise = samplers.draw(data, draws, [0, 1], 0, 1)
    noise = {name: value[0] for name, value in noise.items()}
    batch = samplers.gather(data, samplers.Indices(*(x[0] for x in indices)), draws)
    whole = torch.compile(lambda *a: successor_features.step(config, *a), fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled, _ = whole(successor_features.init(config, spec, [0, 1], data), batch, noise)
        eager, _ = successor_features.step(config, successor_features.init(config, spec, [0, 1], data), batch, noise)
    for name, value in eager.items():
        assert torch.allclose(value, compiled[name], atol=1e-4), name
