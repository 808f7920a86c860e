"""Contrastive actor-critic: its classifiers against Bayes, and what the gate is for: no value for actions and states
that nobody logged."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.data.samplers import Data, batches, layout
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, contrastive_ac, values
from cvlctl.learn.losses import support
from cvlctl.learn.networks import State
from cvlctl.learn.programs import programs_of
from cvlctl.learn.settings import Settings
from cvlctl.learn.updates import adam_init
from cvlctl.types import Spec, TransitionBatch

# ---------------------------------------------------------------------------------------- the classifiers against Bayes


def classifier(config: contrastive_ac.Config, observation_dim: int) -> State:
    """What `learn_support` touches: actor and classifiers, observations as they are."""
    sizes = {"of_action": [observation_dim + 1, 64, 64, 1], "of_state": [observation_dim, 64, 64, 1]}
    state = networks.actor_init([0], observation_dim, 1, (8,))
    nets = [networks.mlp_init(name, [0], size) for name, size in sizes.items()]
    state |= nets[0] | nets[1]
    return state | adam_init(state, "support", [*nets[0], *nets[1]])


def learn(config: contrastive_ac.Config, state: State, sample: Any, steps: int) -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        observation, action = sample(512, g)
        shapes = contrastive_ac.draws(config, Spec(tuple(observation.shape[1:]), 1, 1), 512).noise
        noise = {name: torch.randn((1, *shape), generator=g) for name, shape in shapes}
        contrastive_ac.learn_support(config, state, observation[None], action[None], noise)


def test_action_classifier_finds_the_density_ratio() -> None:
    """Two states, logged actions of piecewise constant density; contrast: half uniform, half another state's."""
    density = torch.tensor([[0.8, 0.15, 0.05, 0.0], [0.05, 0.05, 0.2, 0.7]])  # of the quarters of [-1, 1]

    def sample(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        state = torch.randint(2, (count,), generator=g)
        quarter = torch.multinomial(density[state], 1, generator=g).squeeze(1)
        action = (quarter + torch.rand(count, generator=g)) / 2 - 1
        return torch.eye(2)[state], action[:, None]

    config = contrastive_ac.Config(shuffled_share=0.5, policy_share=0.0, curriculum_steps=1, learning_rate=2e-3)
    state = classifier(config, 2)
    learn(config, state, sample, 500)
    centres = torch.tensor([-0.75, -0.25, 0.25, 0.75])
    found = contrastive_ac.action_log_odds(
        state, torch.eye(2).repeat_interleave(4, 0)[None], centres.repeat(2)[None, :, None]
    )
    exact = density / (0.5 * 0.25 + 0.5 * density.mean(0))
    assert (support.gate(found).view(2, 4) - exact.clamp(max=1.0)).abs().max() < 0.15
    in_data = density > 0
    assert (found.view(2, 4) - exact.log())[in_data].abs().max() < 0.4


def test_state_classifier_finds_the_density_ratio() -> None:
    """Logged states uniform in two intervals; contrast: half a Gaussian blur, exactly known, half two states mixed."""

    def sample(count: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        side = torch.randint(2, (count, 1), generator=g) * 2.0 - 1
        return side * (0.5 + torch.rand(count, 1, generator=g)), torch.zeros(count, 1)

    config = contrastive_ac.Config(far=0.5, near=0.5, curriculum_steps=1, learning_rate=2e-3)
    state = classifier(config, 1)
    learn(config, state, sample, 500)
    x = torch.tensor([-2.5, -1.0, 0.0, 1.0, 2.5])
    cdf = torch.special.ndtr
    blurred = 0.5 * sum(cdf((x - low) / 0.5) - cdf((x - low - 1) / 0.5) for low in (-1.5, 0.5))
    logged = 0.5 * ((x.abs() > 0.5) & (x.abs() < 1.5)).float()
    # one coordinate leaves nothing to mix: that third of the contrast is a logged state
    exact = logged / (2 / 3 * blurred + 1 / 3 * logged)
    found = support.gate(contrastive_ac.state_log_odds(state, x[None, :, None]))[0]
    assert (found - exact.clamp(max=1.0)).abs().max() < 0.15


def test_contrast_hardens_with_the_updates() -> None:
    config = contrastive_ac.Config(policy_noise=0.0, curriculum_steps=100, shuffled_share=0.25, policy_share=0.5)
    state = classifier(config, 3)
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(1, 4096, 3, generator=g)
    action = torch.full((1, 4096, 1), 0.125)
    shapes = contrastive_ac.draws(config, Spec((3,), 1, 1), 4096).noise
    noise = {name: torch.randn((1, *shape), generator=g) for name, shape in shapes}
    own = actors.greedy(state, observation)
    for count, share in ((0, 0.0), (50, 0.5), (100, 1.0), (1000, 1.0)):
        state["adam/support/count"].fill_(count)
        actions, states = contrastive_ac.contrasted(config, state, observation, action, noise)
        assert (actions == own).float().mean().item() == pytest.approx(0.5 * share, abs=0.03)
        assert (actions == action).float().mean().item() == pytest.approx(0.25 * share, abs=0.03)
        little = ((states - observation) / config.near - noise["state"]).abs().amax(-1) < 1e-3
        assert little.float().mean().item() == pytest.approx(share / 3, abs=0.03)
        assert actions.abs().max() <= 1


# ------------------------------------------------------------------------------------------------------- what it is for


def data_of(episodes: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Data:
    """Observations (T+1, O), actions (T, 1), rewards (T,) of each episode, cut off by a time limit."""
    observation = np.concatenate([o for o, _, _ in episodes]).astype(np.float32)
    action = np.concatenate([np.append(a, np.zeros((1, 1)), 0) for _, a, _ in episodes]).astype(np.float32)
    reward = np.concatenate([np.append(0.0, r) for _, _, r in episodes]).astype(np.float32)
    where = layout(np.cumsum([len(o) for o, _, _ in episodes]), np.zeros(len(episodes), bool))
    everything = torch.arange(len(where.row))
    parts = map(torch.from_numpy, (observation, action, reward))
    o, a, r = parts
    return Data(o, a, r[None], where, everything, o[:0])


def trained(data: Data, gate: str, steps: int = 400, seeds: tuple[int, ...] = (0,), compiled: bool = False) -> State:
    torch.set_num_threads(1)
    config = contrastive_ac.Config(
        gate=gate,
        gamma=0.8,
        hidden=(32, 32),
        learning_rate=3e-3,
        ema_rate=0.05,
        curriculum_steps=200,  # type: ignore[arg-type]
    )
    spec = Spec((data.observation.shape[1],), 1, 20)
    draws, state = contrastive_ac.draws(config, spec, 64), contrastive_ac.init(config, spec, seeds, data)

    def run(state: State, batch: TransitionBatch, noise: dict[str, Tensor], update_actor: bool) -> tuple[State, Any]:
        return contrastive_ac.step(config, state, batch, noise, update_actor)

    program = torch.compile(run, fullgraph=True, backend="eager") if compiled else run
    with torch.no_grad():
        for i, (indices, noise) in batches(data, draws, list(seeds), 0, steps):
            batch = samplers.gather(data, indices, draws)
            assert isinstance(batch, TransitionBatch)
            state, metrics = program(state, batch, noise, i % 2 == 0)
    assert all(value.shape == (len(seeds),) for value in metrics.values())
    return state


def q_of(state: State, observation: Tensor, action: Tensor) -> Tensor:
    """The twin's mean, in units of the reward, (N,) of (N, O) and (N, 1)."""
    q = values.q_values(state, networks.normalise(state, observation[None]), action[None]).mean(dim=1)[0]
    return q / state["reward_scale"][0]


@cache
def bandit() -> Data:
    """States that do not matter; the reward is the action; actions above 0.2 were never tried."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1.0, 0.2, (40, 20, 1))
    return data_of([(rng.uniform(-1, 1, (21, 1)), a, a[:, 0]) for a in actions])


def test_values_of_actions_nobody_tried_stay_below() -> None:
    state_of = {gate: trained(bandit(), gate) for gate in ("contrastive", "none")}
    logged, unseen = torch.linspace(-1, 0.2, 13)[:, None], torch.linspace(0.4, 1, 7)[:, None]
    q = {gate: (q_of(s, 0 * logged, logged), q_of(s, 0 * unseen, unseen)) for gate, s in state_of.items()}
    best = 0.2 / (1 - 0.8)  # of all policies within the data
    inside, outside = q["contrastive"]
    assert outside.max() < inside.max() <= best + 0.1
    assert inside.mean() > -1 / (1 - 0.8)
    inside, outside = q["none"]
    assert outside.max() > inside.max() > best + 0.4  # it believes in them, and by them overestimates what it knows
    zero = torch.zeros(1, 1, 1)
    action = {gate: actors.greedy(s, zero).item() for gate, s in state_of.items()}
    assert -0.6 < action["contrastive"] < 0.3 < 0.9 < action["none"]


@cache
def merged() -> Data:
    """Two tasks' stores. Ours (y = 0) moves right and is cut off at x > 0, paying 0.1 a step; the other's (y = 1) goes
    on there, where it pays 1. Nothing starts at x > 0, y = 0: those states are arrived at, and bootstrapped from."""
    rng = np.random.default_rng(0)
    episodes = []
    for _ in range(60):
        x = [rng.uniform(-1, -0.3)]
        while x[-1] <= 0:
            x.append(x[-1] + rng.uniform(0.05, 0.3))
        other = [rng.uniform(-1, 1)]
        while len(other) < 8:
            other.append(float(np.clip(other[-1] + rng.uniform(-0.3, 0.3), -1, 1)))
        for y, path in ((0.0, np.array(x)), (1.0, np.array(other))):
            reward = (path[1:] > 0).astype(float) if y else np.full(len(path) - 1, 0.1)
            observation = np.stack([path, np.full(len(path), y)], 1)
            episodes.append((observation, rng.uniform(-1, 1, (len(reward), 1)), reward))
    return data_of(episodes)


def test_values_of_states_nobody_was_in_stay_below() -> None:
    data = merged()
    logged = data.observation[data.layout.row]
    x = torch.linspace(0.15, 1, 6)
    unseen = torch.stack([x, torch.zeros(6)], 1)
    found = {}
    for gate in ("contrastive", "none"):
        state = trained(data, gate)
        greedy = actors.greedy(state, networks.normalise(state, unseen[None]))[0]
        found[gate] = q_of(state, unseen, greedy), q_of(state, logged, data.action[data.layout.row])
    most = 0.1 / (1 - 0.8)  # of what our task can pay in all
    outside, inside = found["contrastive"]
    assert outside.max() < min(inside.mean(), most)
    assert outside.min() > -most  # nor does it fall without end
    assert found["none"][0].mean() > most + 0.2  # it lends them the other task's rewards


# --------------------------------------------------------------------------------------------------- the loop's demands


def test_seeds_alone_and_in_company() -> None:
    alone, together = trained(bandit(), "contrastive", 20, (3,)), trained(bandit(), "contrastive", 20, (0, 3))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        if value.dim():
            assert (value[0] - together[name][1]).abs().max() < 1e-5, name
    assert (together["of_action.0.weight"][0] - together["of_action.0.weight"][1]).abs().max() > 1e-2


def test_the_step_is_one_graph() -> None:
    """No branch on data: it is captured whole, and the graph does what the eager step does."""
    eager, graph = trained(bandit(), "contrastive", 1), trained(bandit(), "contrastive", 1, compiled=True)
    assert eager.keys() == graph.keys()
    assert all((value - graph[name]).abs().max() < 1e-4 for name, value in eager.items())


@pytest.mark.parametrize("gate", ["actor", "none"])
def test_ablations_train_what_they_need(gate: str) -> None:
    state = trained(bandit(), gate, 4)
    assert ("of_action.0.weight" in state) == (gate == "actor")
    assert "value.0.weight" not in state


# --------------------------------------------------------------------------------------------------------------- online


def test_online_starts_without_data() -> None:
    config, spec = contrastive_ac.Config(hidden=(8, 8)), Spec((3,), 2, 10)
    state = contrastive_ac.init_online(config, spec, [0, 1], 0.1)
    offline = contrastive_ac.init(contrastive_ac.Config(hidden=(8, 8)), Spec((1,), 1, 20), [0, 1], bandit())
    assert state.keys() == offline.keys()
    assert torch.equal(networks.normalise(state, torch.full((2, 1, 3), 7.0)), torch.full((2, 1, 3), 7.0))
    assert state["reward_scale"].tolist() == [[1.0], [1.0]]
    for params in (state, actors.target(state)):
        _, log_std = networks.actor(params, torch.randn(2, 5, 3))
        torch.testing.assert_close(log_std.exp(), torch.full((2, 5, 2), 0.1))
    _, log_std = networks.actor(contrastive_ac.init_online(config, spec, [0], 0.0), torch.randn(1, 5, 3))
    assert (log_std == networks.LOG_STD_MIN).all()


def test_without_the_gate_it_is_td3() -> None:
    """Against autograd and torch.optim, delayed actor and all."""
    config, spec = contrastive_ac.Config(gate="none", hidden=(16,), learning_rate=1e-3), Spec((3,), 2, 10)
    state = contrastive_ac.init_online(config, spec, [3], 0.1)

    def net(name: str, *twin: int) -> list[Tensor]:
        picked = [state[f"{name}.{i}.{part}"][(0, *twin)] for i in range(2) for part in ("weight", "bias")]
        return [p.clone().requires_grad_() for p in picked]

    def apply(weights: list[Tensor], *x: Tensor) -> Tensor:
        return torch.relu(torch.cat(x, -1) @ weights[0] + weights[1]) @ weights[2] + weights[3]

    actor, target_actor = net("actor"), net("target/actor")
    critics, targets = ([net(f"{name}critic", i) for i in range(2)] for name in ("", "target/"))
    of_actor, of_critics = (torch.optim.Adam(weights, lr=1e-3) for weights in (actor, critics[0] + critics[1]))
    g = torch.Generator().manual_seed(0)
    programs = programs_of(contrastive_ac, config, Settings("cpu", 1, "float32", False))
    for update in range(1, 6):
        o, o2, r = (torch.randn(8, n, generator=g) for n in (3, 3, 1))
        a, n = torch.rand(8, 2, generator=g) * 2 - 1, torch.randn(8, 2, generator=g)
        discount = 0.99 * (torch.rand(8, 1, generator=g) < 0.7)
        batch = TransitionBatch(*(x[None] for x in (o, a, r[:, 0], discount[:, 0], o2)))
        state, _ = programs[update % 2](state, batch, {"next_action": n[None]})
        with torch.no_grad():
            smoothed = (torch.tanh(apply(target_actor, o2)[:, :2]) + (0.2 * n).clamp(-0.5, 0.5)).clamp(-1, 1)
            y = r + discount * torch.minimum(*(apply(t, o2, smoothed) for t in targets))
        of_critics.zero_grad()
        (0.5 * sum((apply(c, o, a) - y).square().mean() for c in critics)).backward()  # type: ignore[union-attr]
        of_critics.step()
        if update % 2 == 0:
            q = apply(critics[0], o, torch.tanh(apply(actor, o)[:, :2]))
            of_actor.zero_grad()
            (-2.5 * q / q.detach().abs().mean()).mean().backward()
            of_actor.step()
            with torch.no_grad():
                for average, weights in ((target_actor, actor), *zip(targets, critics, strict=True)):
                    for old, new in zip(average, weights, strict=True):
                        old.lerp_(new, 0.005)
    for name, ours in (("actor", actor), ("target/actor", target_actor)):
        for theirs, found in zip(net(name), ours, strict=True):
            torch.testing.assert_close(theirs, found, atol=1e-6, rtol=1e-5)
    for i in range(2):
        for name, found in (("critic", critics[i]), ("target/critic", targets[i])):
            for one, other in zip(net(name, i), found, strict=True):
                torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


BAD = [("gamma", 1.0), ("shuffled_share", 0.6), ("floor_quantile", -0.1), ("curriculum_steps", 0), ("near", -1.0)]
BAD += [("expectile", 1.0), ("hold_coefficient", -1.0), ("learning_rate", 0.0), ("slack", 0.0)]


@pytest.mark.parametrize(("key", "value"), BAD)
def test_bad_settings_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=key):
        contrastive_ac.Config(**{key: value})  # type: ignore[arg-type]
