"""What the papers claim of their estimates, checked where the answer is exact: on critics that know the occupancy.

The tests of the claims as the algorithms compute them take the Q that an algorithm hands to its actor update.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tabular
import torch
from torch import Tensor

from cvlctl.data.samplers import Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, cvl, goal_conditioned, laeo, occupancy
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.networks import State
from cvlctl.types import OccupancyBatch, Spec

MAKE = [tabular.grid_dense, tabular.grid_sparse, tabular.ring, tabular.cliff]


def exact_critic(mdp: tabular.MDP) -> tuple[np.ndarray, np.ndarray]:
    """(S, A, S) log ratio at its optimum, and the marginal p(s+) of pairs drawn uniformly among the living states."""
    occupancy = mdp.occupancy()
    marginal = occupancy[~mdp.terminal].mean(axis=(0, 1))
    with np.errstate(divide="ignore"):
        return np.log(occupancy / marginal), marginal


# --- LAEO and goals


@pytest.mark.parametrize("make", MAKE)
def test_a_single_example_is_a_goal(make) -> None:
    """log Q of LAEO with one example is f itself, and ranks actions by how soon and how surely they arrive there."""
    mdp = make()
    f = exact_critic(mdp)[0]
    for goal in range(len(mdp.reward)):
        column = torch.from_numpy(f[..., goal : goal + 1])
        log_q = occupancy_q.log_q_examples(column).numpy()
        assert np.array_equal(log_q, f[..., goal])
        reaching = replace(mdp, reward=np.eye(len(mdp.reward))[goal])
        q, living = reaching.q(), ~mdp.terminal
        arrived_ever = np.exp(log_q[living]).ravel()
        assert np.corrcoef(arrived_ever, q[living].ravel())[0, 1] == pytest.approx(1.0, abs=1e-9)


SPEC = Spec((3,), 2, 10)
CRITIC = occupancy.Config(gamma=0.9, hidden=(32, 32), latent_dim=8)


def state_for(module: ModuleType, config: Any, critic: State, **extra: Tensor) -> State:
    """An algorithm's state on a given critic; statistics as they would be after `init`."""
    actor = actors.init((16,), SPEC, [0, 1])
    return {**critic, **actor, "reward_mean": torch.full((2, 1), 0.3), "reward_std": torch.full((2, 1), 0.4), **extra}


def given_critic() -> State:
    """Some critic: what follows holds for any, learned or not."""
    state = networks.critic_init([0, 1], 3, 2, CRITIC.hidden, CRITIC.latent_dim, False)
    state = {name: 2 * value for name, value in state.items()}
    return state | networks.normaliser_init([0, 1], torch.tensor([0.1, 0.0, -0.2]), torch.tensor([1.0, 0.5, 2.0]))


def batch_with(bank: Tensor, rewards: Tensor) -> OccupancyBatch:
    g = torch.Generator().manual_seed(0)
    observation = torch.randn(2, 12, 3, generator=g)
    fields = {
        "observation": observation,
        "action": torch.rand(2, 12, 2, generator=g) * 2 - 1,
        "future_observation": observation,
        "bank_observation": bank,
        "bank_reward": rewards,
    }
    empty = {name: torch.zeros(2, 0, dtype=torch.int64) for name in OccupancyBatch._fields if name not in fields}
    return OccupancyBatch(**fields, **empty)


def q_of(module: ModuleType, config: Any, state: State, batch: OccupancyBatch, monkeypatch) -> Tensor:
    """Q (E, B) of the batch's own pairs, as the algorithm hands it to its actor."""
    found: list[Tensor] = []

    def improve(state: State, batch: OccupancyBatch, noise: Tensor, q: Any, **_: Any) -> dict[str, Tensor]:
        found.append(q(networks.normalise(state, batch.observation), batch.action))
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(actors, "improve", improve)
        module.step(config, state, batch, {"action": torch.zeros(2, 1, 12, 2)})
    return found[0]


def f_of(state: State, batch: OccupancyBatch, future: Tensor) -> Tensor:
    """f (E, B, M), written out."""
    pair = torch.cat([networks.normalise(state, batch.observation), batch.action], dim=-1)
    return networks.mlp(state, "phi", pair) @ networks.mlp(state, "psi", networks.normalise(state, future)).mT


@pytest.mark.parametrize("readout", ["posterior", "ratio"])
def test_laeo_with_one_example_reaches_for_it(readout: str, monkeypatch) -> None:
    critic = given_critic()
    goal = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(3))
    config = laeo.Config(critic=CRITIC, mode="frozen", readout=readout, hidden=(16,))
    batch = batch_with(goal, torch.ones(2, 1))
    q = q_of(laeo, config, state_for(laeo, config, critic), batch, monkeypatch)
    f = f_of(critic, batch, goal).squeeze(-1)
    assert f.std() > 0.5
    log_ratio = f - f.amax(dim=1, keepdim=True)  # a factor common to all pairs keeps it in range
    assert (q - (torch.sigmoid(f) if readout == "posterior" else log_ratio.exp())).abs().max() < 1e-5
    # and it is what goal-conditioned RL maximises for this goal
    psi = occupancy.bank_psi(CRITIC, critic, goal.expand(2, 12, 3))
    own = goal_conditioned.Config(critic=CRITIC, mode="frozen", hidden=(16,))
    seen = networks.normalise(critic, batch.observation)
    assert (goal_conditioned.f(own, critic, seen, batch.action, psi) - f).abs().max() < 1e-5


# --- LAEO's Assumption 1: rewards are how often a state is an example


@pytest.mark.parametrize("make", MAKE)
def test_rewards_and_examples_are_two_ways_to_say_the_same(make) -> None:
    """p_*(s) = r(s) p(s+ = s) / E[r], any r >= 0: E_p*[e^f] = E_p[e^f r] / E_p[r], which is (1 - gamma) Q / E_p[r]."""
    mdp = make()
    f, marginal = exact_critic(mdp)
    f, living = np.where(np.isfinite(f), f, -1e3), ~mdp.terminal
    paid = np.where(mdp.terminal, 0.0, mdp.reward)  # the absorbing state pays nothing, and is no example
    examples = paid * marginal / (paid * marginal).sum()
    q_laeo = np.exp(f) @ examples
    q_cvl = np.exp(f) @ (marginal * paid)
    assert np.allclose(q_cvl[living], (1 - mdp.gamma) * replace(mdp, reward=paid).q()[living])
    assert np.allclose(q_laeo[living] * (marginal * paid).sum(), q_cvl[living])


@pytest.mark.parametrize("times", [1, 3])
def test_cvl_paid_for_the_examples_is_laeo(times: int, monkeypatch) -> None:
    """A bank from p(s+), reward 1 on its successes and 0 elsewhere, `normaliser: none`: LAEO's estimate from those
    successes as examples, times a constant. Exact for every critic. So for rewards 0, 1, ..., `times`, where a future
    is as many examples as its reward."""
    g = torch.Generator().manual_seed(1)
    futures = torch.randn(2, 40, 3, generator=g)
    rewards = torch.randint(0, times + 1, (40,), generator=g).float()
    examples = futures.repeat_interleave(rewards.long(), dim=1)
    assert 5 < examples.shape[1] != 40
    critic = given_critic()
    as_rewards = cvl.Config(critic=CRITIC, mode="frozen", normaliser="none", bank_size=40, hidden=(16,))
    as_examples = laeo.Config(critic=CRITIC, mode="frozen", readout="ratio", hidden=(16,))
    batch = batch_with(futures, rewards.expand(2, 40))
    q_cvl = q_of(cvl, as_rewards, state_for(cvl, as_rewards, critic), batch, monkeypatch)
    batch = batch_with(examples, torch.ones(2, examples.shape[1]))
    q_laeo = q_of(laeo, as_examples, state_for(laeo, as_examples, critic), batch, monkeypatch)
    quotient = q_cvl / q_laeo
    assert q_cvl.log().std() > 0.3
    assert (quotient / quotient[:, :1] - 1).abs().max() < 1e-4
    # the constant, too: reward's unit, the share of examples, and the factor that keeps LAEO's exponentials in range
    exponential = f_of(critic, batch, examples).exp().mean(dim=-1)
    share = examples.shape[1] / 40 / 0.4
    assert (q_cvl / (share * exponential) - 1).abs().max() < 1e-4
    # self-normalised they part: there the partition function of each pair divides
    config = replace(as_rewards, normaliser="self")
    batch = batch_with(futures, rewards.expand(2, 40))
    other = q_of(cvl, config, state_for(cvl, config, critic), batch, monkeypatch)
    assert torch.corrcoef(torch.stack([other[0], q_laeo[0]]))[0, 1] < 0.999


def test_the_draws_behind_assumption_1_are_of_one_law() -> None:
    """CVL's bank is drawn from p(s+): its successes are distributed as LAEO's examples must be."""
    from cvlctl.data import samplers

    mdp = tabular.grid_sparse()
    data = tabular.data_of(mdp.episodes(400, 60, seed=0))
    draws = Draws(64, mdp.gamma, bank=2048)
    indices, _ = samplers.draw(data, draws, [0], 0, 32)
    states = tabular.state_of(mdp, data.observation[indices.bank_row.flatten()].numpy())
    reward = data.arrival_reward[0, indices.bank_row.flatten()].numpy()
    assert (reward[states == 11] == 10).all() and (reward[states != 11] == 0).all()
    own, visits = np.bincount(states, minlength=12) / len(states), np.zeros((12, 4))
    rows = data.layout.row
    taken = (tabular.state_of(mdp, data.observation[rows].numpy()), mdp.action_of(data.action[rows].numpy()))
    np.add.at(visits, taken, 1 / len(rows))
    exact = np.einsum("sa,sat->t", visits, mdp.occupancy())
    assert 0.5 * abs(own - exact).sum() < 0.03


# --- CVL's Lemma 2: the Boltzmann policy of Q^mu is at least as good as mu, at every state and action

TEMPERATURES = (0.01, 0.1, 1.0, 10.0)
NUM, STATES, ACTIONS, GAMMA = 200, 8, 4, 0.9
Array = np.ndarray


def value_and_q(transition: np.ndarray, policy: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact V (N, S) and Q (N, S, A) of N MDPs: transition (N, S, A, S), policy (N, S, A), reward on arrival (N, S)."""
    under_policy = np.einsum("nsa,nsat->nst", policy, transition)
    arrived = np.linalg.solve(np.eye(policy.shape[1]) - 0.9 * under_policy, reward[..., None])
    q = (transition @ arrived[:, None]).squeeze(-1)
    return (policy * q).sum(-1), q


def test_five_steps_of_improvement_on_200_random_mdps(capsys: pytest.CaptureFixture[str]) -> None:
    """pi_(k+1) proportional to pi_k e^(Q/tau) loses at no state; e^(Q/tau) alone (CVL Eq. 16) may."""
    rng = np.random.default_rng(0)
    transition, begun = rng.dirichlet(np.full(8, 0.2), size=(200, 8, 3)), rng.dirichlet(np.ones(3), size=(200, 8))
    reward, falls = rng.normal(size=(200, 8)), dict[tuple[float, bool], int]()
    for temperature in (0.01, 0.1, 1.0, 10.0):
        for from_policy in (True, False):
            policy, lost = begun, np.zeros(200, bool)
            value, q = value_and_q(transition, policy, reward)
            for _ in range(5):
                tilted = np.exp((q - q.max(-1, keepdims=True)) / temperature) * (policy if from_policy else 1.0)
                policy, before = tilted / tilted.sum(-1, keepdims=True), value
                value, q = value_and_q(transition, policy, reward)
                lost |= (value < before - 1e-9).any(-1)
            falls[temperature, from_policy] = int(lost.sum())
    with capsys.disabled():
        told = ", ".join(f"{count} at {temperature:g}" for (temperature, kept), count in falls.items() if not kept)
        print(f"\n  a state lost in five steps of e^(Q/tau) without the policy before: {told}; of 200 MDPs", end="")
    assert not any(count for (_, kept), count in falls.items() if kept)
    assert falls[10.0, False] > 0, "the form without it never fell: the MDPs prove nothing"
