"""SAC's update against a plain implementation with torch.optim, its replay, its draws, and a task of one step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cvlctl.collect import replay
from cvlctl.data import samplers
from cvlctl.learn import networks
from cvlctl.learn.algorithms import sac, values
from cvlctl.learn.programs import whole_step
from cvlctl.learn.settings import Settings, have_compiler
from cvlctl.types import Goals, Spec, TransitionBatch

SPEC = Spec((3,), 2, 10)
CONFIG, BATCH = sac.Config(hidden=(16, 16)), 8
DRAWS = sac.draws(CONFIG, SPEC, BATCH)
EAGER = Settings("cpu", 1, "float32", False)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_batch(seed: int, members: int = 1) -> tuple[TransitionBatch, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    n = BATCH
    batch = TransitionBatch(
        observation=torch.randn(members, n, 3, generator=g),
        action=torch.rand(members, n, 2, generator=g) * 2 - 1,
        reward=torch.randn(members, n, generator=g),
        discount=0.99 * (torch.rand(members, n, generator=g) < 0.7),
        next_observation=torch.randn(members, n, 3, generator=g),
    )
    return batch, {name: torch.randn(members, n, 2, generator=g) for name in ("action", "next_action")}


class Plain:
    """SAC as textbooks write it: separate critics, autograd, torch.optim.Adam. Weights are (in, out) as ours."""

    def __init__(self, state: networks.State) -> None:
        def net(name: str, *twin: int) -> list[Tensor]:
            picked = [state[f"{name}.{i}.{part}"][(0, *twin)] for i in range(3) for part in ("weight", "bias")]
            return [p.clone().requires_grad_() for p in picked]

        self.actor = net("actor")
        self.critics = [net("critic", i) for i in range(2)]
        self.targets = [net("target/critic", i) for i in range(2)]
        self.log_alpha = state["log_temperature"][0].clone().requires_grad_()
        groups = (self.actor, self.critics[0] + self.critics[1], [self.log_alpha])
        self.optimisers = [torch.optim.Adam(group, lr=CONFIG.learning_rate) for group in groups]

    @staticmethod
    def apply(net: list[Tensor], x: Tensor) -> Tensor:
        for i in range(0, 4, 2):
            x = F.relu(x @ net[i] + net[i + 1])
        return x @ net[4] + net[5]

    def sample(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.apply(self.actor, observation).chunk(2, dim=-1)
        gaussian = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        u = mean + gaussian.scale * noise
        action = torch.tanh(u)
        return action, (gaussian.log_prob(u) - torch.log(1 - action.square())).sum(-1)

    def q(self, critics: list[list[Tensor]], observation: Tensor, action: Tensor) -> Tensor:
        return torch.stack([self.apply(c, torch.cat([observation, action], -1)).squeeze(-1) for c in critics])

    def step(self, batch: TransitionBatch, noise: dict[str, Tensor]) -> None:
        b, alpha = TransitionBatch(*(x[0] for x in batch)), self.log_alpha.detach().exp()
        actor_optimiser, critic_optimiser, alpha_optimiser = self.optimisers
        with torch.no_grad():
            action, log_prob = self.sample(b.next_observation, noise["next_action"][0])
            value = self.q(self.targets, b.next_observation, action).min(0).values - alpha * log_prob
            y = b.reward + b.discount * value
        loss = 0.5 * sum(F.mse_loss(q, y) for q in self.q(self.critics, b.observation, b.action))
        critic_optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        critic_optimiser.step()
        action, log_prob = self.sample(b.observation, noise["action"][0])
        actor_loss = (alpha * log_prob - self.q(self.critics, b.observation, action).min(0).values).mean()
        actor_optimiser.zero_grad()
        actor_loss.backward()
        actor_optimiser.step()
        alpha_optimiser.zero_grad()
        (-self.log_alpha * (log_prob.detach() - 2.0)).mean().backward()
        alpha_optimiser.step()
        with torch.no_grad():
            for target, online in zip(self.targets, self.critics, strict=True):
                for t, o in zip(target, online, strict=True):
                    t.mul_(1 - CONFIG.ema_rate).add_(CONFIG.ema_rate * o)


def test_update_equals_a_plain_implementation() -> None:
    state = sac.init(CONFIG, SPEC, [3])
    start = {name: value.clone() for name, value in state.items()}
    plain = Plain(state)
    for i in range(5):
        batch, noise = random_batch(i)
        plain.step(batch, noise)
        state, _ = whole_step(lambda s, b, n: sac.step(CONFIG, s, b, n), EAGER)(state, batch, noise)
    for i in range(3):
        for j, part in enumerate(("weight", "bias")):
            name, place = f"{i}.{part}", 2 * i + j
            torch.testing.assert_close(state[f"actor.{name}"][0], plain.actor[place].detach(), atol=1e-6, rtol=1e-5)
            for twin in range(2):
                for ours, theirs in (("critic", plain.critics), ("target/critic", plain.targets)):
                    expected = theirs[twin][place].detach()
                    torch.testing.assert_close(state[f"{ours}.{name}"][0, twin], expected, atol=1e-6, rtol=1e-5)
    assert state["log_temperature"].item() == pytest.approx(plain.log_alpha.item(), abs=1e-7)
    still = [name for name in state if torch.equal(state[name], start[name])]
    assert still == ["observation_mean", "observation_std"]


def test_members_learn_alike_alone_and_in_company() -> None:
    both, alone = sac.init(CONFIG, SPEC, [0, 5]), sac.init(CONFIG, SPEC, [5])
    program = whole_step(lambda s, b, n: sac.step(CONFIG, s, b, n), EAGER)
    for i in range(20):
        batch, noise = random_batch(i, members=2)
        own = TransitionBatch(*(x[1:] for x in batch)), {name: value[1:] for name, value in noise.items()}
        both, metrics = program(both, batch, noise)
        alone, _ = program(alone, *own)
    for name, value in alone.items():
        company = both[name] if value.dim() == 0 else both[name][1:]
        torch.testing.assert_close(company, value, atol=1e-5, rtol=0)
    assert all(value.shape == (2,) for value in metrics.values())


@pytest.mark.slow  # half a minute: by default test_programs.py has a compiled step
def test_compiled_update_equals_the_eager_one() -> None:
    if not have_compiler():
        pytest.skip("no C++ compiler")
    settings, config = Settings("cpu", 1, "float32", True), sac.Config(hidden=(16,))
    states = [sac.init(config, SPEC, [0]) for _ in range(2)]
    programs = [whole_step(lambda s, b, n: sac.step(config, s, b, n), s) for s in (EAGER, settings)]
    held = states[1]["actor.0.weight"]
    for i in range(3):
        batch, noise = random_batch(i)
        for state, program in zip(states, programs, strict=True):
            program(state, batch, noise)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)
    assert held.data_ptr() == states[1]["actor.0.weight"].data_ptr()  # in place: the acting policy sees every update


def test_targets_are_clipped() -> None:
    """A target network that says 50: targets are -70 + 0.9 * 50, or with a clip at -30 that; terminal ones stay."""
    state = sac.init(CONFIG, SPEC, [0])
    for name, value in state.items():
        if name.startswith("target/critic."):
            value.zero_()
    state["target/critic.2.bias"].fill_(50.0)
    batch, noise = random_batch(0)
    batch = batch._replace(reward=torch.full((1, BATCH), -70.0), discount=torch.full((1, BATCH), 0.9))
    batch.discount[0, 0] = 0.0
    q = values.q_values(state, networks.normalise(state, batch.observation), batch.action).detach()
    for target_max, targets in ((None, [-70.0] + [-25.0] * 7), (-30.0, [-70.0] + [-30.0] * 7)):
        config = dataclasses.replace(CONFIG, initial_temperature=1e-30, target_max=target_max)
        given = {name: value.clone() for name, value in state.items()}
        given["log_temperature"].fill_(math.log(1e-30))
        _, metrics = sac.step(config, given, batch, noise)
        expected = (q - torch.tensor(targets)).square().sum(dim=1).mean() / 2  # of both critics
        assert metrics["critic/td"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_replay_gives_back_what_was_added() -> None:
    buffer = replay.Replay(4, SPEC)
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=3), rng.normal(size=2), float(i), i == 2, rng.normal(size=3)) for i in range(4)]
    for row in rows:
        buffer.add(*row)
    batch = buffer.gather(torch.tensor([[2, 0, 3]]), gamma=0.9, device="cpu")
    assert batch.reward.tolist() == [[2.0, 0.0, 3.0]]
    assert batch.discount.tolist() == [pytest.approx([0.0, 0.9, 0.9])]  # 2 terminated
    for place, i in enumerate((2, 0, 3)):
        np.testing.assert_allclose(batch.observation[0, place], rows[i][0], rtol=1e-6)
        np.testing.assert_allclose(batch.action[0, place], rows[i][1], rtol=1e-6)
        np.testing.assert_allclose(batch.next_observation[0, place], rows[i][4], rtol=1e-6)


def test_draws_are_a_function_of_seed_and_block() -> None:
    first, again = (replay.draw("sac", DRAWS, SPEC, [7], 3) for _ in range(2))
    for ours, theirs in zip((*first[:4], *first.noise.values()), (*again[:4], *again.noise.values()), strict=True):
        assert np.array_equal(ours, theirs)
    assert not torch.equal(replay.draw("sac", DRAWS, SPEC, [7], 4).place, first.place)
    company = replay.draw("sac", DRAWS, SPEC, [0, 7], 3)
    assert torch.equal(company.place[:, 1:], first.place)
    assert torch.equal(company.noise["action"][:, 1:], first.noise["action"])
    assert not torch.equal(first.noise["action"], first.noise["next_action"])


def test_draws_of_a_seed_stay_as_they_were() -> None:
    """Stores on disk were drawn so: uniform action, exploration, then place, action, next_action of one generator."""
    drawn = replay.draw("sac", DRAWS, SPEC, [7], 3)
    g = samplers.generator(7, "sac/act", 3)
    uniform = 2 * torch.rand(64, 2, generator=g) - 1
    assert np.array_equal(drawn.uniform_action, uniform)
    assert np.array_equal(drawn.exploration, torch.randn(64, 2, generator=g))
    assert np.array_equal(drawn.choice, torch.rand(64, generator=g))
    g = samplers.generator(7, "sac/batch", 3)
    assert torch.equal(drawn.place[:, 0], torch.rand(64, 8, generator=g, dtype=torch.float64))
    for name in ("action", "next_action"):
        assert torch.equal(drawn.noise[name][:, 0], torch.randn(64, 8, 2, generator=g))


def test_batches_are_uniform_over_what_is_there() -> None:
    buffer = replay.Replay(10, SPEC)
    for i in range(5):  # half full: the empty half must never be drawn
        buffer.add(np.full(3, i), np.zeros(2), float(i), False, np.zeros(3))
    wanted = sac.draws(CONFIG, SPEC, 256)
    counts = np.zeros(5)
    for block in range(2):
        draws = replay.draw("sac", wanted, SPEC, [0], block)
        for i in range(replay.BLOCK):
            batch, _ = draws.batch(i, buffer, 0.9)
            counts += np.bincount(batch.reward.flatten().int().numpy(), minlength=5)
    expected = counts.sum() / 5
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-square, 4 degrees of freedom: p = 0.001


GOALS = Goals(achieved=slice(0, 1), desired=slice(-1, None), dense=False)  # of observations (place, other, goal)


def filled(goals: Goals) -> replay.Replay:
    """Two episodes of three steps, at places 0, 1, 2, 3 and 10, 11, 12, 13, both told to be at 99."""
    buffer = replay.Replay(8, SPEC, goals)
    for episode, start in enumerate((0, 10)):
        for place in range(start, start + 3):
            now, after = (np.array([x, 0.5, 99]) for x in (place, place + 1))
            buffer.add(now, np.zeros(2), -1.0, False, after, episode)
    return buffer


def test_hindsight_by_hand() -> None:
    """Row 3 is the second episode's first; what it reaches is 11, and later 12 and 13."""
    index = torch.tensor([[3, 3, 3, 3, 5, 0]])
    later = torch.tensor([[-1, 0.0, 0.5, 0.99, 0.99, 0.34]])
    batch = filled(GOALS).gather(index, 0.9, "cpu", later)
    assert batch.observation[0, :, -1].tolist() == [99, 11, 12, 13, 13, 2]
    assert batch.next_observation[0, :, -1].tolist() == [99, 11, 12, 13, 13, 2]
    assert batch.reward[0].tolist() == [-1, 0, -1, -1, 0, -1]  # 0 where the step itself arrives
    assert batch.observation[0, :, :2].tolist() == [[10, 0.5]] * 4 + [[12, 0.5], [0, 0.5]]
    dense = filled(GOALS._replace(dense=True)).gather(index, 0.9, "cpu", later)
    assert dense.reward[0].tolist() == [-1, 0, -1, -2, 0, -1]  # the first is as it was stored
    buffer = filled(GOALS)
    buffer.gather(index, 0.9, "cpu", later)
    assert buffer.gather(index, 0.9, "cpu").observation[0, :, -1].tolist() == [99] * 6  # the rows stay as they were


def test_hindsight_replaces_its_share_by_what_came_later() -> None:
    buffer, wanted = filled(GOALS), sac.draws(CONFIG, SPEC, 256)
    counts, rows = {place: np.zeros(100) for place in range(20)}, 0
    for block in range(2):
        draws = replay.draw("sac", wanted, SPEC, [0], block, hindsight=0.8)
        for i in range(replay.BLOCK):
            batch, _ = draws.batch(i, buffer, 0.9)
            for place, goal in batch.observation[0][:, [0, -1]].int().tolist():
                counts[place][goal] += 1
                rows += 1
    assert sum(count[99] for count in counts.values()) / rows == pytest.approx(0.2, abs=0.01)
    for place, goals in ((10, (11, 12, 13)), (11, (12, 13)), (12, (13,)), (0, (1, 2, 3))):
        found = counts[place][:99]
        assert np.flatnonzero(found).tolist() == list(goals)
        assert found[list(goals)] / found.sum() == pytest.approx(1 / len(goals), abs=0.03)
    plain, more = (replay.draw("sac", wanted, SPEC, [7], 3, hindsight) for hindsight in (0.0, 0.8))
    assert plain.later is None and torch.equal(plain.place, more.place)  # stores on disk were drawn so
    company = replay.draw("sac", wanted, SPEC, [0, 7], 3, 0.8).later
    assert company is not None and more.later is not None and torch.equal(company[:, 1:], more.later)


def test_learns_a_task_of_one_step() -> None:
    """Reward -(a - 0.6)^2 - (a' + 0.3)^2, then the end: the greedy action is (0.6, -0.3), and Q the reward alone."""
    config = sac.Config(hidden=(32, 32), learning_rate=3e-3, target_entropy=-6.0)
    state = sac.init(config, SPEC, [0])
    program = whole_step(lambda s, b, n: sac.step(config, s, b, n), EAGER)
    g = torch.Generator().manual_seed(0)
    best = torch.tensor([0.6, -0.3])
    for _ in range(600):
        action = torch.rand(1, 64, 2, generator=g) * 2 - 1
        observation = torch.randn(1, 64, 3, generator=g)
        reward = -(action - best).square().sum(-1)
        batch = TransitionBatch(observation, action, reward, torch.zeros(1, 64), observation)
        noise = {name: torch.randn(1, 64, 2, generator=g) for name in ("action", "next_action")}
        state, metrics = program(state, batch, noise)
    mean, _ = networks.actor(state, torch.randn(1, 100, 3, generator=g))
    assert (torch.tanh(mean) - best).abs().mean() < 0.1
    q = values.q_values(state, torch.zeros(1, 1, 3), best.expand(1, 1, 2))
    assert q.abs().max() < 0.15
    assert math.isfinite(float(metrics["temperature"])) and float(metrics["temperature"]) < 0.2


def test_config_refuses_nonsense() -> None:
    for wrong in (
        {"gamma": 1.0},
        {"learning_rate": 0.0},
        {"initial_temperature": 0.0},
        {"ema_rate": 0.0},
        {"hidden": ()},
    ):
        with pytest.raises(ValueError):
            sac.Config(**wrong)


def test_updates_are_those_of_stable_baselines3(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the same weights, batches and noise: critics, target, actor and temperature after thirty updates."""
    pytest.importorskip("stable_baselines3")
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.type_aliases import ReplayBufferSamples

    config, spec, batch_size = sac.Config(), Spec((3,), 1, 200), 256
    model = SAC("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10, learning_starts=0)
    model.set_logger(Logger(None, []))
    state = sac.init(config, spec, [0])

    def linears(modules: Any) -> list[torch.nn.Linear]:
        return [module for module in modules if isinstance(module, torch.nn.Linear)]

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Their parameter, ours in its layout."""
        nets = [("", "critic", model.critic), ("target/", "critic", model.critic_target)]
        for prefix, name, critic in nets:
            for copy, net in enumerate((critic.qf0, critic.qf1)):
                for i, layer in enumerate(linears(net)):
                    yield layer.weight, state[f"{prefix}{name}.{i}.weight"][0, copy].T
                    yield layer.bias, state[f"{prefix}{name}.{i}.bias"][0, copy, 0]
        actor, width = model.actor, spec.action_dim
        for i, layer in enumerate(linears(actor.latent_pi)):
            yield layer.weight, state[f"actor.{i}.weight"][0].T
            yield layer.bias, state[f"actor.{i}.bias"][0, 0]
        for head, part in ((actor.mu, slice(None, width)), (actor.log_std, slice(width, None))):
            yield head.weight, state["actor.2.weight"][0].T[part]
            yield head.bias, state["actor.2.bias"][0, 0, part]
        yield model.log_ent_coef, state["log_temperature"][0]

    for theirs, mine in pairs():
        theirs.data.copy_(mine)
    started = [mine.clone() for _, mine in pairs()]
    g = torch.Generator().manual_seed(0)
    program, given = whole_step(lambda s, b, n: sac.step(config, s, b, n), EAGER), []
    monkeypatch.setattr(torch.distributions.Normal, "rsample", lambda self: self.loc + self.scale * given.pop(0))
    for _ in range(30):
        observation, after = torch.randn((2, 1, batch_size, 3), generator=g)
        action, reward = 2 * torch.rand((1, batch_size, 1), generator=g) - 1, torch.rand((1, batch_size), generator=g)
        ended = (torch.rand((1, batch_size), generator=g) < 0.1).float()
        noise = {name: torch.randn((1, batch_size, 1), generator=g) for name in ("action", "next_action")}
        sample = ReplayBufferSamples(observation[0], action[0], after[0], ended[0, :, None], reward[0, :, None])
        monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, sample=sample, **__: sample)
        given += [noise["action"][0], noise["next_action"][0]]
        model.train(1, batch_size)
        batch = TransitionBatch(observation, action, reward, config.gamma * (1 - ended), after)
        state, _ = program(state, batch, noise)
        assert not given
    # as a whole: Adam makes a step of a single weight's rounding error
    for before, (theirs, mine) in zip(started, pairs(), strict=True):
        assert (theirs.data - mine).norm() < 0.01 * (mine - before).norm() > 0
