"""Temporal-difference losses against numbers worked by hand, values and gradients."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import cvlctl
from cvlctl import checkpoints
from cvlctl.data import samplers
from cvlctl.experiments.commands import load
from cvlctl.learn import networks
from cvlctl.learn.algorithms import contrastive_ac, cql, td3_bc, values
from cvlctl.learn.finetune import finetune
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import PolicyAct
from cvlctl.types import Spec, TransitionBatch


def test_soft_value_takes_the_smaller_critic_and_adds_entropy() -> None:
    q = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)  # (2 critics, B = 2)
    log_prob = torch.tensor([-1.0, 0.5], requires_grad=True)
    value = td.soft_value(q, log_prob, torch.tensor([0.2]))
    assert value.tolist() == pytest.approx([1.0 + 0.2, 3.0 - 0.1])
    value.sum().backward()
    assert q.grad is not None and q.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([-0.2, -0.2])


def test_soft_value_keeps_members_apart() -> None:
    q = torch.tensor([[[1.0], [2.0]], [[8.0], [4.0]]])  # (E = 2, 2, B = 1)
    value = td.soft_value(q, torch.ones(2, 1), torch.tensor([[0.5], [2.0]]))
    assert value.tolist() == [[0.5], [2.0]]


def test_td_target_stops_at_terminal_states() -> None:
    y = td.td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.0]), torch.tensor([10.0, 10.0]))
    assert y.tolist() == [10.0, 1.0]


def test_squared_td_error() -> None:
    q = torch.tensor([[1.0, 2.0], [4.0, 0.0]], requires_grad=True)
    target = torch.tensor([2.0, 2.0])
    error = td.squared_td_error(q, target)
    assert error.tolist() == [[0.5, 0.0], [2.0, 2.0]]
    error.sum().backward()
    assert q.grad is not None and q.grad.tolist() == [[-1.0, 0.0], [2.0, -2.0]]


def test_temperature_loss_moves_alpha_towards_the_target_entropy() -> None:
    log_temperature = torch.tensor([0.5], requires_grad=True)
    log_prob = torch.tensor([3.0, -5.0], requires_grad=True)  # entropies -3 (below the target -2: raise alpha) and 5
    loss = td.temperature_loss(log_temperature, log_prob, -2.0)
    assert loss.tolist() == pytest.approx([-0.5 * 1.0, -0.5 * -7.0])
    loss[0].backward(retain_graph=True)
    assert log_temperature.grad is not None and log_temperature.grad.item() == pytest.approx(-1.0)  # descent raises it
    loss[1].backward()
    assert log_temperature.grad.item() == pytest.approx(-1.0 + 7.0)
    assert log_prob.grad is None


def test_smoothed_action_clips_the_noise_and_then_the_action() -> None:
    action = torch.tensor([0.0, 0.0, 0.9, -0.5], requires_grad=True)
    noise = torch.tensor([1.0, -9.0, 9.0, 0.0])
    smoothed = td.smoothed_action(action, noise, 0.2, 0.5)
    assert smoothed.tolist() == pytest.approx([0.2, -0.5, 1.0, -0.5])
    smoothed.sum().backward()
    assert action.grad is not None and action.grad.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_expectile_weighs_the_two_sides() -> None:
    u = torch.tensor([2.0, -2.0, 0.0], requires_grad=True)
    loss = td.expectile(u, 0.9)
    assert loss.tolist() == pytest.approx([3.6, 0.4, 0.0])
    loss.sum().backward()
    assert u.grad is not None and u.grad.tolist() == pytest.approx([3.6, -0.4, 0.0])
    assert td.expectile(u, 0.5).tolist() == pytest.approx([2.0, 2.0, 0.0])


@pytest.mark.parametrize("level", [0.5, 0.7, 0.9])
def test_expectile_is_least_at_the_closed_form(level: float) -> None:
    """Of 0 and 1, the latter with probability p: v = tau p / (tau p + (1 - tau)(1 - p)). In general the v with
    tau E[(x - v)+] = (1 - tau) E[(v - x)+], found here by bisection."""
    p = 0.3
    coin, chance = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.tensor([1 - p, p], dtype=torch.float64)
    closed = level * p / (level * p + (1 - level) * (1 - p))
    values = torch.tensor([-3.0, 0.5, 1.0, 7.0], dtype=torch.float64)
    weights = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    low, high = -3.0, 7.0
    for _ in range(80):
        v = (low + high) / 2
        up, down = ((weights * (sign * (values - v)).clamp_min(0)).sum().item() for sign in (1, -1))
        low, high = (v, high) if level * up > (1 - level) * down else (low, v)
    for x, w, least in ((coin, chance, closed), (values, weights, low)):
        v = torch.tensor(least, dtype=torch.float64, requires_grad=True)
        (w * td.expectile(x - v, level)).sum().backward()
        assert v.grad is not None and v.grad.item() == pytest.approx(0.0, abs=1e-6)  # float32 weights
        there, left, right = ((w * td.expectile(x - y, level)).sum() for y in (least, least - 0.01, least + 0.01))
        assert there < min(left, right)


def test_advantage_weight_is_cut_off_and_passes_no_gradient() -> None:
    advantage = torch.tensor([0.0, 1.0, -1.0, 50.0], requires_grad=True)
    weight = td.advantage_weight(advantage, 2.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(2), math.exp(-2), 100.0], rel=1e-5)
    assert not weight.requires_grad


def test_conservative_penalty_by_hand() -> None:
    """One critic, two uniform actions in [-1, 1], density 1/2 each: log of the mean of 2 e^Q, less Q(s, a)."""
    q_sampled = torch.tensor([[[math.log(3.0), 0.0]]], requires_grad=True)  # (1 critic, B = 1, K = 2)
    log_density = torch.tensor([[math.log(0.5), math.log(0.5)]], requires_grad=True)
    q_data = torch.tensor([[1.5]], requires_grad=True)
    penalty = td.conservative_penalty(q_sampled, log_density, q_data)
    assert penalty.item() == pytest.approx(math.log((6 + 2) / 2) - 1.5)
    penalty.sum().backward()
    assert q_sampled.grad is not None and q_sampled.grad.flatten().tolist() == pytest.approx([0.75, 0.25])
    assert q_data.grad is not None and q_data.grad.item() == -1.0  # over all actions: softmax weights, minus one
    assert log_density.grad is None


def test_conservative_penalty_corrects_for_where_the_actions_come_from() -> None:
    """Three actions, whatever the proposal: the estimate's mean is the sum of e^Q, here with weights that differ."""
    q, none = torch.tensor([1.0, 0.0, -1.0]), torch.zeros(1, 1)
    for rate in (torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.2, 0.6])):
        drawn = [td.conservative_penalty(q[k].reshape(1, 1, 1), rate[k].log().reshape(1, 1), none) for k in range(3)]
        mean = sum(rate[k] * drawn[k].exp() for k in range(3))
        assert float(mean) == pytest.approx(q.exp().sum().item(), rel=1e-5)


SPEC = Spec((3,), 2, 10)


def batch_of(num: int, members: int = 2) -> TransitionBatch:
    g = torch.Generator().manual_seed(0)
    observation, following = torch.randn(2, members, num, 3, generator=g)
    action = torch.rand(members, num, 2, generator=g) * 2 - 1
    return TransitionBatch(
        observation, action, torch.randn(members, num, generator=g), torch.full((members, num), 0.9), following
    )


def state_of(module: ModuleType, config: Any) -> State:
    none = torch.zeros(1, 3)
    batch = batch_of(16)
    data = samplers.Data(
        batch.observation[0], batch.action[0], batch.reward[:1], samplers.layout(np.array([16]), np.array([False])),
        torch.arange(15), none[:0],
    )  # fmt: skip
    return module.init(config, SPEC, [0, 1], data)


def noise_of(module: ModuleType, config: Any, num: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(2, *shape, generator=g) for name, shape in module.draws(config, SPEC, num).noise}


def test_q_values_of_many_are_q_values_of_each() -> None:
    state = values.init((16, 16), SPEC, [0, 1])
    batch = batch_of(5)
    many = torch.rand(2, 5, 7, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1
    together = values.q_values_of_many(state, batch.observation, many)
    apart = torch.stack([values.q_values(state, batch.observation, many[:, :, k]) for k in range(7)], dim=-1)
    assert together.shape == (2, 2, 5, 7)
    assert (together - apart).abs().max() < 1e-6
    assert together.std() > 1e-2


def test_the_target_is_that_of_the_smaller_averaged_critic_at_the_smoothed_action() -> None:
    """TD3's update, its target worked out here: where Q is fitted to it already, the critic's gradient vanishes."""
    config = td3_bc.Config(hidden=(16,), gamma=0.9)
    state, batch = state_of(td3_bc, config), batch_of(8)
    for name in list(state):  # target networks of their own, so that the test knows which are read
        if name.startswith("target/"):
            state[name] = state[name] + 0.3 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(3))
    noise = noise_of(td3_bc, config, 8)
    seen, following = (networks.normalise(state, x) for x in (batch.observation, batch.next_observation))
    averaged = {name.removeprefix("target/"): x for name, x in state.items() if name.startswith("target/")}
    action = torch.tanh(networks.actor(averaged, following)[0])
    action = (action + (0.2 * noise["next_action"]).clamp(-0.5, 0.5)).clamp(-1, 1)
    pair = torch.cat([following, action], dim=-1).unsqueeze(1)
    ahead = networks.mlp(averaged, "critic", pair).squeeze(-1).min(dim=1).values
    q = values.q_values(state, seen, batch.action)
    wanted = 0.5 * (q - (batch.reward + batch.discount * ahead).unsqueeze(1)).square()
    _, metrics = td3_bc.step(config, state, batch, noise, update_actor=False)
    assert metrics["critic/td"].tolist() == pytest.approx(wanted.mean(dim=2).sum(dim=1).tolist(), rel=1e-5)


def test_the_conservative_penalty_reaches_the_critic() -> None:
    """The update with the penalty is another than without, in every layer and both critics; and it lowers what the
    policy's actions are worth beside the logged ones."""

    def gap(state: State, batch: TransitionBatch) -> float:
        seen = networks.normalise(state, batch.observation)
        other = torch.rand(batch.action.shape, generator=torch.Generator().manual_seed(5)) * 2 - 1
        return float((values.q_values(state, seen, other) - values.q_values(state, seen, batch.action)).mean())

    found, gaps = [], []
    for weight in (0.0, 5.0):
        config = cql.Config(hidden=(16, 16), conservative_weight=weight, num_actions=4, learning_rate=1e-2)
        state, batch = state_of(cql, config), batch_of(32)
        with torch.no_grad():
            for _ in range(60):
                state, _ = cql.step(config, state, batch, noise_of(cql, config, 32))
        found.append({name: state[name].clone() for name in values.names(state)})
        gaps.append(gap(state, batch))
    for name in found[0]:
        difference = (found[0][name] - found[1][name]).abs()
        assert (difference.flatten(2).amax(dim=2) > 1e-4).all(), name
    assert gaps[1] < gaps[0] - 0.3


def test_conservative_penalty_has_a_gradient_of_its_own() -> None:
    """With nothing to learn (targets met, no discount) the penalty alone moves the critic."""
    for weight, moves in ((0.0, False), (1.0, True)):
        config = cql.Config(hidden=(16,), gamma=0.0, conservative_weight=weight, num_actions=2)
        state, batch = state_of(cql, config), batch_of(8)
        q = values.q_values(state, networks.normalise(state, batch.observation), batch.action)
        state["critic.1.weight"][:, 1], state["critic.1.bias"][:, 1] = (
            state["critic.1.weight"][:, 0], state["critic.1.bias"][:, 0],
        )  # fmt: skip
        state["critic.0.weight"][:, 1], state["critic.0.bias"][:, 1] = (
            state["critic.0.weight"][:, 0], state["critic.0.bias"][:, 0],
        )  # fmt: skip
        batch = batch._replace(reward=q[:, 0], discount=torch.zeros_like(batch.discount))
        before = {name: state[name].clone() for name in values.names(state)}
        with torch.no_grad():
            state, metrics = cql.step(config, state, batch, noise_of(cql, config, 8))
        assert metrics["critic/td"].abs().max() < 1e-10
        moved = max(float((state[name] - before[name]).abs().max()) for name in before)
        assert (moved > 1e-5) is moves, (weight, moved)


def test_the_backup_is_at_a_drawn_action_or_at_the_mean() -> None:
    for backup in ("sample", "mean"):
        config = cql.Config(hidden=(16,), gamma=0.9, num_actions=2, backup=backup)  # type: ignore[arg-type]
        state, batch = state_of(cql, config), batch_of(8)
        noise = noise_of(cql, config, 8)
        assert ("next_action" in noise) is (backup == "sample")
        seen, following = (networks.normalise(state, x) for x in (batch.observation, batch.next_observation))
        mean, log_std = networks.actor(state, following)
        action = torch.tanh(mean + (log_std.exp() * noise["next_action"] if backup == "sample" else 0.0))
        ahead = values.q_values(values.target(state), following, action).amin(dim=1)
        q = values.q_values(state, seen, batch.action)
        wanted = 0.5 * (q - (batch.reward + batch.discount * ahead).unsqueeze(1)).square()
        _, metrics = cql.step(config, state, batch, noise)
        assert metrics["critic/td"].tolist() == pytest.approx(wanted.mean(dim=2).sum(dim=1).tolist(), rel=1e-5)


def test_importance_weights_are_those_of_the_actions_themselves() -> None:
    """Uniform actions have the density 2^-A; those of the policy its own, under the state that they were drawn in."""
    config = cql.Config(hidden=(16,), num_actions=6)
    state, batch = state_of(cql, config), batch_of(4)
    seen, following = (networks.normalise(state, x) for x in (batch.observation, batch.next_observation))
    actions, densities = cql.sampled_actions(state, seen, following, noise_of(cql, config, 4))
    assert actions.shape == (2, 4, 18, 2) and densities.shape == (2, 4, 18)
    assert actions.abs().max() <= 1 and actions[:, :, :6].std() > 0.4
    assert densities[:, :, :6].tolist() == pytest.approx(torch.full((2, 4, 6), -2 * math.log(2.0)))
    for part, where in ((slice(6, 12), seen), (slice(12, 18), following)):
        mean, log_std = networks.actor(state, where)
        exact = policy.log_prob_tanh(mean.unsqueeze(2), log_std.unsqueeze(2), actions[:, :, part])
        assert (densities[:, :, part] - exact).abs().max() < 1e-3


def test_the_actor_learns_every_second_step_alone(tmp_path: Path) -> None:
    """TD3's delay, through the command's loop: critic moves at each step, actor and targets at the 2nd, 4th, ..."""
    rng = np.random.default_rng(0)
    steps = [
        cvlctl.Episode(rng.normal(size=(9, 3)), rng.uniform(-1, 1, (8, 2)), rewards=rng.normal(size=8))
        for _ in range(4)
    ]
    cvlctl.write_store(tmp_path / "s.zarr", steps, task="noise")
    text = f"stores: ['{tmp_path / 's.zarr'}'], out: '{tmp_path / 'run'}', steps: 5, batch_size: 8, compile: false"
    text += ", threads: 1, checkpoint_every_steps: 1, algorithm: {name: td3_bc, hidden: [8], actor_every: 2}"
    (tmp_path / "r.yaml").write_text(f"{{{text}}}")
    finetune(load(tmp_path / "r.yaml", [], "finetune"))
    states = [checkpoints.load(tmp_path / f"run/checkpoints/step-{i:09d}.safetensors")[0] for i in range(1, 6)]

    def moved(name: str) -> list[bool]:
        return [not torch.equal(a[name], b[name]) for a, b in pairwise(states)]

    assert moved("critic.0.weight") == [True, True, True, True]
    for name in ("actor.0.weight", "target/actor.0.weight", "target/critic.0.weight"):
        assert moved(name) == [True, False, True, False], name  # from step 1 to 2, 2 to 3, ...


# --- what is sampled of a policy that has no spread


@pytest.mark.parametrize(("module", "spread"), [(td3_bc, False), (contrastive_ac, False), (cql, True)])
def test_sampled_actions_of_a_deterministic_policy_are_its_greedy_ones(
    tmp_path: Path, module: ModuleType, spread: bool
) -> None:
    """`source: {name: policy}` samples: nobody trained the standard deviation of an actor whose mean alone learns."""
    config = module.Config(hidden=(16,), learning_rate=1e-2)
    state, batch, noise = state_of(module, config), batch_of(32), noise_of(module, config, 32)
    before = state["actor.1.weight"].clone()
    for _ in range(20):
        state, _ = module.step(config, state, batch, noise)
    assert (state["actor.1.weight"][..., :2] - before[..., :2]).abs().max() > 1e-3  # the mean learns
    about = {"algorithm": "x", "task": "toy", "spec": dataclasses.asdict(SPEC), "seeds": [0, 1], "step": 20}
    checkpoints.save(tmp_path / "last.safetensors", state, about)
    rng = np.random.default_rng(0)
    for seed in (0, 1):
        policy = load_policy(tmp_path / "last.safetensors", seed)
        act = PolicyAct(policy, rng.standard_normal((50, 2)), np.zeros((50, 2), np.float32))
        observations = rng.standard_normal((50, 3)).astype(np.float32)
        away = np.stack([act(observations[t], t) - policy(observations[t]) for t in range(50)]).std()
        assert (away > 0.1) if spread else (away < 0.01)
