"""Data that leave a quotient without a divisor: equal rewards, none, one episode, centres without members.

Every method must train on them with finite metrics; where data are sound, no bit depends on the guards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cvlctl.data import samplers, statistics
from cvlctl.learn import labellers
from cvlctl.learn.algorithms import ALGORITHMS, cvl, iql, readouts
from cvlctl.learn.networks import State
from cvlctl.types import Spec

SPEC = Spec((3,), 2, 20)
SMALL: dict[str, Any] = {"hidden": (8,)}


def data(rewards: str, episodes: int = 4) -> samplers.Data:
    """Episodes of 20 steps; half of them terminate unless there is but one."""
    g = torch.Generator().manual_seed(0)
    rows = 21 * episodes
    observation, action = torch.randn(rows, 3, generator=g), torch.rand(rows, 2, generator=g) * 2 - 1
    observation[:, 2] = 5.0  # a column that never varies
    given = {
        "zero": torch.zeros(rows),
        "equal": torch.full((rows,), 0.1),
        "rounding": torch.full((rows,), 1e4) + 1e-3 * torch.arange(rows).remainder(2),
        "tiny": 1e-30 * torch.randn(rows, generator=g),
        "sound": torch.randn(rows, generator=g),
    }
    where = samplers.layout(np.arange(21, rows + 1, 21), np.arange(episodes) % 2 > 0)
    return samplers.Data(observation, action, given[rewards][None], where, torch.arange(20 * episodes), observation[:5])


def train(name: str, config: Any, d: samplers.Data, steps: int = 2) -> tuple[State, dict[str, Tensor]]:
    module: Any = ALGORITHMS[name]
    draws = module.draws(config, SPEC, 16)
    state = module.init(config, SPEC, [0, 1], d)
    indices, noise = samplers.draw(d, draws, [0, 1], 0, steps)
    for i in range(steps):
        batch = samplers.gather(d, samplers.Indices(*(x[i] for x in indices)), draws)
        with torch.no_grad():
            state, metrics = module.step(config, state, batch, {k: v[i] for k, v in noise.items()})
        assert all(torch.isfinite(value).all() for value in metrics.values()), metrics
    assert all(torch.isfinite(value).all() for value in state.values())
    return state, metrics


@pytest.mark.parametrize("rewards", ["zero", "equal", "rounding", "tiny"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_method_stays_finite_where_rewards_do_not_vary(name: str, rewards: str) -> None:
    state, _ = train(name, ALGORITHMS[name].Config(**SMALL), data(rewards))
    if name in ("iql", "contrastive_ac"):  # where it is a factor
        assert state["reward_scale"].max() <= 1.0
    if name in ("cvl", "successor_features"):  # where it is a divisor
        assert state.get("reward_std", state.get("reward_scale")).min() >= 1e-6


@pytest.mark.parametrize("normaliser", ["self", "none"])
@pytest.mark.parametrize("readout", ["exact", "fourier", "coreset"])
@pytest.mark.parametrize("rewards", ["zero", "equal", "sound"])
def test_every_readout_stays_finite_with_its_defaults(readout: str, normaliser: str, rewards: str) -> None:
    bins = [0, 3] if readout == "fourier" else [0]
    for time_bins in bins:
        config = cvl.Config(readout=readout, normaliser=normaliser, time_bins=time_bins, num_features=16, **SMALL)  # type: ignore[arg-type]
        train("cvl", config, data(rewards))


@pytest.mark.parametrize("normaliser", ["self", "none"])
def test_centres_without_members_take_no_part(normaliser: str) -> None:
    g = torch.Generator().manual_seed(1)
    psi, phi = (0.5 * torch.randn(2, n, 4, generator=g) for n in (8, 5))
    psi, rewards = psi.repeat(1, 4, 1), torch.randn(2, 32, generator=g)  # 8 places, 32 entries, 16 centres
    state = readouts.coreset_init([0, 1], 16, 4)
    for _ in range(3):
        read = readouts.coreset(state, psi, rewards, normaliser, 1.0)
    assert (state["coreset_sums"][..., 1] == 0).sum(dim=1).tolist() == [8, 8]
    leaf = phi.clone().requires_grad_()
    with torch.enable_grad():
        q = read(leaf)
        (grad,) = torch.autograd.grad(q.sum(), leaf)
    assert torch.allclose(q, readouts.exact(psi, rewards, normaliser)(phi), atol=1e-5)
    assert torch.isfinite(grad).all()
    assert grad.abs().min() > 0


def test_the_guards_change_no_bit_of_sound_data() -> None:
    total, weight = torch.randn(2, 5, 3), torch.rand(2, 5, 1) + 1e-3
    assert torch.equal(readouts._average_of(total, weight), total / weight)
    d = data("sound")
    pick = samplers.generator(0, "reward_statistics", 0)
    index = torch.randint(80, (65_536,), generator=pick)
    u = torch.rand(index.shape, generator=pick, dtype=torch.float64)
    drawn = samplers.future(d.layout, index, u, 0.9)
    reward = torch.where(drawn.absorbed, 0.0, d.arrival_reward[:, drawn.row]).double()
    mean, std = statistics.reward_statistics(d, 0.9)
    assert torch.equal(std, reward.std(dim=1, keepdim=True).float())
    assert torch.equal(mean, reward.mean(dim=1, keepdim=True).float())
    returns = torch.stack([d.arrival_reward[0, 21 * k + 1 : 21 * (k + 1)].double().sum() for k in range(4)])
    assert statistics.return_range(d).item() == pytest.approx((returns.max() - returns.min()).item(), rel=1e-6)


@pytest.mark.parametrize("rewards", ["zero", "equal", "rounding", "tiny"])
def test_iql_leaves_rewards_as_they_are_where_returns_have_no_range(rewards: str) -> None:
    for episodes in (1, 4):
        state = iql.init(iql.Config(**SMALL), SPEC, [0, 1], data(rewards, episodes))
        assert state["reward_scale"].tolist() == [[1.0], [1.0]]
    state = iql.init(iql.Config(**SMALL), SPEC, [0, 1], data("sound", 1))
    assert state["reward_scale"].tolist() == [[1.0], [1.0]]  # a single episode
    sound = data("sound")
    state = iql.init(iql.Config(**SMALL), SPEC, [0], sound)
    assert state["reward_scale"].item() == (iql.RETURN_RANGE / statistics.return_range(sound)).item()


def test_each_member_has_its_own_range_where_labels_are_learned() -> None:
    d = data("sound")
    learned = torch.cat([d.arrival_reward, torch.zeros_like(d.arrival_reward)])
    state = iql.init(iql.Config(**SMALL), SPEC, [0, 1], d._replace(arrival_reward=learned))
    assert state["reward_scale"][0].item() > 1.0
    assert state["reward_scale"][1].item() == 1.0


@pytest.mark.parametrize("name", labellers.LABELLERS)
def test_labels_of_examples_that_are_all_alike_are_finite(name: str) -> None:
    d = data("zero")
    same = d.observation[:1].repeat(3, 1)
    config = labellers.Config(steps=5, batch_size=8, hidden=(8,))
    for observation, examples in ((d.observation, same), (same, same)):
        shown = d._replace(observation=observation, examples=examples)
        label = labellers.learn(name, config, SPEC, shown, [0, 1], "cpu")
        assert torch.isfinite(label).all()
