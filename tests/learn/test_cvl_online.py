"""CVL online: its step in parts, by hand. That it learns: tests/collect/test_online.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cvlctl.learn.algorithms import actors, cvl_online, occupancy, readouts
from cvlctl.learn.losses import policy
from cvlctl.learn.networks import State
from cvlctl.learn.networks import actor as actor_of
from cvlctl.types import OccupancyBatch, Spec, TransitionBatch

SPEC, SIZE, BANK = Spec((3,), 2, 10), 8, 6


def drawn(config: cvl_online.Config) -> tuple[TransitionBatch, dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    draws = cvl_online.draws(config, SPEC, SIZE)
    assert draws.batch_size == SIZE + BANK
    seen, after = torch.randn(2, 1, SIZE + BANK, 3, generator=g)
    action = torch.rand(1, SIZE + BANK, 2, generator=g) * 2 - 1
    discount = torch.full((1, SIZE + BANK), config.gamma)
    discount[0, [2, SIZE + 1]] = 0.0
    reward = torch.randn(1, SIZE + BANK, generator=g)
    return TransitionBatch(seen, action, reward, discount, after), {
        name: torch.randn(1, *shape, generator=g) for name, shape in draws.noise
    }


def stepped(monkeypatch: pytest.MonkeyPatch | None = None, **change: Any) -> tuple[State, list[OccupancyBatch]]:
    """The state after a step of a policy whose average is another one; and what the critic learned from."""
    config = cvl_online.Config(hidden=(8,), latent_dim=4, bank_size=BANK, **change)
    state, given = cvl_online.init(config, SPEC, [0]), []
    state["actor.1.bias"].add_(0.3)
    batch, noise = drawn(config)
    if monkeypatch:
        step = occupancy.step
        monkeypatch.setattr(occupancy, "step", lambda c, s, b, n: (given.append(b), step(c, s, b, n))[1])
    return cvl_online.step(config, state, batch, noise)[0], given


def test_the_critic_learns_of_the_averaged_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = cvl_online.Config(hidden=(8,), latent_dim=4, bank_size=BANK)
    batch, noise = drawn(config)
    before = cvl_online.init(config, SPEC, [0])
    _, (given,) = stepped(monkeypatch)
    following, _ = policy.sample_tanh(*actor_of(before, batch.next_observation[:, :SIZE]), noise["next_action"])
    torch.testing.assert_close(given.next_action, following)
    assert torch.equal(given.observation, batch.observation[:, :SIZE])
    assert torch.equal(given.future_observation, batch.next_observation[:, :SIZE])
    assert given.ended.nonzero().tolist() == [[0, 2]] and not given.cut.any()


def test_actions_beyond_the_clip_are_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing may be improved the actor follows its entropy alone, as where Q is flat."""
    held, free = (stepped(clip=clip)[0] for clip in (1e-9, 2.0))
    monkeypatch.setattr(readouts, "exact", lambda *_: lambda phi: 0.0 * phi.sum(dim=(1, 3)))
    flat, _ = stepped()
    differ = [not torch.equal(held[name], free[name]) for name in actors.names(held)]
    assert any(differ)
    for name in actors.names(held):
        torch.testing.assert_close(held[name], flat[name])


def test_rewards_of_the_bank_by_hand() -> None:
    config = cvl_online.Config(hidden=(8,), latent_dim=4, bank_size=BANK, gamma=0.75)
    state = cvl_online.init(config, SPEC, [0])
    batch, _ = drawn(config)
    bank = TransitionBatch(*(x[:, SIZE:] for x in batch))
    phi = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    psi = occupancy.bank_psi(config.critic, state, bank.next_observation)
    paid = bank.reward[0].numpy() * np.array([1, 0.25, 1, 1, 1, 1])
    rewards = (paid - paid.mean()) / paid.std(ddof=1)
    weights = np.exp((phi @ psi.mT)[0].numpy())
    expected = (weights @ rewards / weights.sum(-1)).min(0)
    np.testing.assert_allclose(cvl_online._readout(config, state, bank)(phi)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"policy_rate": 0.0}, {"bank_size": 1}, {"gamma": 1.0}])
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|lie"):
        cvl_online.Config(**wrong)
