"""Beyond one step: critics of `td_info_nce` know the occupancy of any policy, and methods that iterate reach the
optimum. Against exact answers, in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import tabular
import torch
from tabular import MDP, Array
from test_learning import greedy, learn

import cvlctl
from cvlctl.data import samplers, statistics
from cvlctl.learn import networks
from cvlctl.learn.algorithms import ALGORITHMS, goal_conditioned, occupancy
from cvlctl.learn.losses import contrastive
from cvlctl.types import Spec

# --- the loss


def test_the_loss_by_hand() -> None:
    logits = torch.tensor([[[1.0, 0.0, -1.0], [0.5, 2.0, 0.0], [0.0, 1.0, 1.0]]])
    target = torch.tensor([[[9.0, 0.0, np.log(3.0)], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]]])
    flags = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
    loss = contrastive.td_info_nce(logits, contrastive.log_partition(logits), target, 0.75, *flags)
    first = np.log(np.exp([1.0, 0.0, -1.0]).sum()) - 1.0
    others = -(0.25 * np.log(1 / (1 + np.exp(-1.0))) + 0.75 * np.log(np.exp(-1.0) / (1 + np.exp(-1.0))))
    ended = np.log(np.exp([0.5, 2.0, 0.0]).sum()) - 2.0
    np.testing.assert_allclose(loss[0].numpy(), [0.25 * first + 0.75 * others, ended, 0.0], rtol=1e-5)


def test_the_spectral_losses_by_hand() -> None:
    f = torch.tensor([[[1.0, 0.5, -1.0], [2.0, 3.0, 0.0], [0.0, 1.0, 2.0]]], requires_grad=True)
    target = torch.tensor([[[9.0, 2.0, 4.0], [1.0, 9.0, 1.0], [1.0, 1.0, 9.0]]])
    flags = torch.tensor([[False, True, False]]), torch.tensor([[False, False, True]])
    loss = contrastive.spectral(f)
    assert loss[0].tolist() == [1.25 / 2 - 2, 4 / 2 - 6, 1 / 2 - 4]
    loss = contrastive.td_spectral(f, target, 0.75, *flags)
    assert loss[0].tolist() == [1.25 / 2 - 2 * (0.25 * 1 + 0.75 * (1 - 4) / 2), 4 / 2 - 6, 0.0]
    loss.sum().backward()
    assert f.grad is not None and f.grad[0, 2].tolist() == [0, 0, 0]
    assert f.grad[0, 0].tolist() == [-0.5, 0.5 - 0.75 * 2, -1 - 0.75 * 4]


def test_no_gradient_where_f_is_the_log_ratio() -> None:
    """Of an MDP of one pair: the next state is one of 3 by p, and stays under the policy; all is the marginal's law."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    f = torch.zeros(3, dtype=torch.float64, requires_grad=True)  # of each state; the log ratio is 0
    g = torch.Generator().manual_seed(0)
    column = torch.multinomial(p, 400 * 64, replacement=True, generator=g).view(400, 64)
    logits = f[column].unsqueeze(1).expand(400, 64, 64)
    none = torch.zeros(400, 64, dtype=torch.bool)
    loss = contrastive.td_info_nce(
        logits, contrastive.log_partition(logits), torch.zeros(400, 64, 64, dtype=torch.float64), 0.9, none, none
    )
    loss.mean().backward()
    assert f.grad is not None and f.grad.abs().max() < 2e-3


# --- what is drawn


def test_next_states_by_hand_and_the_law_of_the_bank() -> None:
    rows = np.arange(9, dtype=np.float32)[:, None]
    episodes = [
        cvlctl.Episode(rows[:4], rows[:3] / 10, [1.0, 2.0, 3.0], terminated=True),
        cvlctl.Episode(rows[4:9], rows[4:8] / 10, [5.0, 6.0, 7.0, 8.0]),
    ]
    data = tabular.data_of(episodes)
    draws = samplers.Draws(4000, gamma=0.75, futures=True, next_states=True, bank=4000)
    indices, _ = samplers.draw(data, draws, [0], 0, 1)
    batch = samplers.gather(data, samplers.Indices(*(x[0] for x in indices)), draws)
    row = batch.observation[0, :, 0].long()
    assert torch.equal(batch.future_observation[0, :, 0].long(), row + 1)
    assert torch.equal(batch.ended[0], row == 2) and torch.equal(batch.cut[0], row == 7)
    follows = ~(batch.ended[0] | batch.cut[0])
    assert torch.equal(batch.next_action[0, follows], data.action[row[follows] + 1])
    state, paid = batch.bank_observation[0, :, 0].long(), batch.bank_reward[0]
    share = torch.bincount(state, minlength=9) / len(state)
    wanted = torch.tensor([0.0, 1, 1, 1, 0, 1, 1, 1, 1]) / 7
    assert (share - wanted).abs().max() < 0.02 and share[[0, 4]].max() == 0
    assert paid[state == 3].unique().tolist() == [0.25 * 3.0] and paid[state == 8].unique().tolist() == [8.0]
    ends, terminated, labelled = np.array([4, 9]), np.array([True, False]), np.array([True, True])
    arrival, absorbed = samplers.marginal_of_next(ends, terminated, labelled, 0.75)
    np.testing.assert_allclose(arrival, wanted.numpy() * np.array([1, 1, 1, 0.25, 1, 1, 1, 1, 1]), rtol=1e-6)
    np.testing.assert_allclose(absorbed, [0, 0, 0, 0.75 / 7, 0, 0, 0, 0, 0])
    mean, _ = statistics.reward_statistics(data, 0.75, next_states=True)
    assert float(mean) == pytest.approx((1 + 2 + 0.75 + 5 + 6 + 7 + 8) / 7, rel=0.02)


def test_a_future_of_each_pair_beside_its_next_state() -> None:
    rows = np.arange(9, dtype=np.float32)[:, None]
    data = tabular.data_of([cvlctl.Episode(x, x[1:] / 10, np.ones(len(x) - 1)) for x in (rows[:4], rows[4:])])
    draws = samplers.Draws(8000, gamma=0.5, futures=True, next_states=True, own_futures=True)
    indices, _ = samplers.draw(data, draws, [0], 0, 1)
    batch = samplers.gather(data, samplers.Indices(*(x[0] for x in indices)), draws)
    row, own = batch.observation[0, :, 0], batch.bank_observation[0, :, 0]
    assert torch.equal(batch.future_observation[0, :, 0], row + 1)
    share = [float((own[row == 4] == k).float().mean()) for k in range(5, 9)]
    np.testing.assert_allclose(share, np.array([8, 4, 2, 1]) / 15, atol=0.04)
    assert (own[row < 3] <= 3).all() and (own[row == 2] == 3).all()


# --- occupancies of policies that nobody followed


def policies(mdp: MDP) -> dict[str, Array]:
    """Greedy for the reward, greedy for minus it, and between them one of Boltzmann."""
    best, worst = mdp.optimal_q(), replace(mdp, reward=-mdp.reward).optimal_q()
    soft = np.exp((best - best.max(-1, keepdims=True)) / (0.5 * best.std()))
    one = np.eye(mdp.policy.shape[1])
    return {"best": one[best.argmax(-1)], "worst": one[worst.argmax(-1)], "soft": soft / soft.sum(-1, keepdims=True)}


class Answer(NamedTuple):
    """Of a learned occupancy: how far off it is (total variation over the data's pairs), and Q's correlation with the
    exact one; and both of the collector's exact occupancy."""

    off: float
    correlation: float
    collector_off: float
    collector_correlation: float
    q: Array  # (S, A), as learned


def answer(
    mdp: MDP, policy: Array | None, loss: str = "td_info_nce", *, quick: bool = False, shuffled: bool = False
) -> Answer:
    steps, batch_size = (1200 if loss.endswith("spectral") else 2000, 256) if quick else (6000, 512)
    episodes = mdp.episodes(1000, 60, seed=0)
    data = tabular.data_of(_single(episodes) if shuffled else episodes)
    small: dict[str, Any] = {"hidden": (128, 128), "latent_dim": 32, "target_rate": 0.02}
    small["learning_rate"] = 1e-3 if quick else 5e-4
    config, spec = occupancy.Config(loss=loss, gamma=mdp.gamma, **small), Spec((8,), mdp.actions.shape[1], 60)
    draws, state = occupancy.draws(config, spec, batch_size), occupancy.init(config, spec, [0], data)
    states, actions = torch.from_numpy(mdp.states), torch.from_numpy(mdp.actions)
    g = torch.Generator().manual_seed(0)
    for _, (indices, noise) in samplers.batches(data, draws, [0], 0, steps):
        batch = samplers.gather(data, indices, draws)
        if policy is not None:
            at = torch.cdist(batch.future_observation[0], states).argmin(-1)
            chosen = torch.multinomial(torch.from_numpy(policy)[at], 1, generator=g)[:, 0]
            batch, noise = occupancy.of_policy(batch, actions[chosen].unsqueeze(0)), {}
        state, _ = occupancy.step(config, state, batch, noise)
    return judged(mdp if policy is None else replace(mdp, policy=policy), mdp, config, state, data)


def judged(exact: MDP, mdp: MDP, config: occupancy.Config, state: networks.State, data: samplers.Data) -> Answer:
    """What a critic learned, held to the occupancy of `exact`; the data were collected in `mdp`."""
    num_states, num_actions = mdp.policy.shape
    states, where = torch.from_numpy(mdp.states), data.layout
    pairs = (
        torch.from_numpy(np.repeat(mdp.states, num_actions, 0)).unsqueeze(0),
        torch.from_numpy(np.tile(mdp.actions, (num_states, 1))).unsqueeze(0),
    )
    with torch.no_grad():
        phi = occupancy.phi(config, state, networks.normalise(state, pairs[0]), pairs[1])
        f = (phi @ occupancy.psi(config, state, networks.normalise(state, states.unsqueeze(0))).mT)[0]
    row = tabular.state_of(mdp, data.observation.numpy())
    ends, ended = np.append(where.first[1:], len(row)), where.terminated[where.row + 1 == where.last].numpy()
    law = samplers.marginal_of_next if occupancy.by_next(config) else samplers.marginal
    mass = sum(law(ends, ended, np.ones(len(ends), bool), mdp.gamma))
    ratio = f.numpy() if occupancy.linear(config) else np.exp(f.numpy())
    learned = ratio.reshape(*mdp.policy.shape, -1) * np.bincount(row, weights=mass, minlength=num_states)
    learned /= learned.sum(-1, keepdims=True)
    visits = np.bincount(row[where.row.numpy()], minlength=num_states) / len(where.row)
    weight = visits[:, None] * mdp.policy

    def off(found: Array) -> float:
        return float((weight * 0.5 * abs(found - exact.occupancy()).sum(-1)).sum())

    def correlation(q: Array) -> float:
        x, y = (v - (weight * v).sum() for v in (q, exact.q()))
        return float((weight * x * y).sum() / np.sqrt((weight * x * x).sum() * (weight * y * y).sum()))

    pays = np.where(mdp.terminal, (1 - mdp.gamma) * mdp.reward, mdp.reward)
    q = learned @ pays / (1 - mdp.gamma)
    return Answer(off(learned), correlation(q), off(mdp.occupancy()), correlation(mdp.q()), q)


def _single(episodes: list[cvlctl.Episode]) -> list[cvlctl.Episode]:
    """Each transition as an episode of its own, in any order."""
    pieces = [
        cvlctl.Episode(e.observations[t : t + 2], e.actions[t : t + 1], e.rewards[t : t + 1],
                       terminated=e.terminated and t == len(e) - 1)
        for e in episodes for t in range(len(e))
    ]  # fmt: skip
    return [pieces[i] for i in np.random.default_rng(0).permutation(len(pieces))]


MDPS = [tabular.grid_dense, tabular.ring, tabular.cliff, tabular.grid_sparse]
QUICK = (tabular.ring, "worst")
OTHERS = [
    pytest.param(*pair, marks=[] if pair == QUICK else pytest.mark.slow)
    for pair in ((make, name) for make in MDPS for name in ("best", "worst", "soft"))
]


@pytest.mark.parametrize(("make", "name"), OTHERS)
def test_the_occupancy_of_another_policy(
    make: Callable[[], MDP], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mdp = make()
    found = answer(mdp, policies(mdp)[name], quick=(make, name) == QUICK)
    with capsys.disabled():
        line = f"{mdp.name}, {name}: off by {found.off:.3f}, the collector's by {found.collector_off:.3f}; correlation "
        line += f"of Q {found.correlation:.3f}, of the collector's {found.collector_correlation:.3f}"
        print(f"\n  {line}", end="")
    assert found.collector_off >= 0.2, "the policy does what the collector did: it proves nothing"
    assert found.off <= 0.06 and found.off <= 0.2 * found.collector_off
    assert found.correlation >= 0.97 and found.correlation > found.collector_correlation


RATIOS = [(make, loss, name) for make in MDPS for loss, name in (("spectral", None), ("td_spectral", "worst"))]


@pytest.mark.parametrize(
    ("make", "loss", "name"),
    [pytest.param(*one, marks=pytest.mark.slow) for one in RATIOS],
)
def test_the_ratio_itself_can_be_learned(
    make: Callable[[], MDP], loss: str, name: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What CVL's authors tried in vain: features whose inner product is the ratio, and a Q that is linear in them."""
    mdp = make()
    found = answer(mdp, None if name is None else policies(mdp)[name], loss, quick=(make, name) == QUICK)
    with capsys.disabled():
        line = f"{mdp.name}, {loss}: off by {found.off:.3f}, the collector's by {found.collector_off:.3f}; correlation "
        print(f"\n  {line}of Q {found.correlation:.3f}", end="")
    assert found.off <= 0.1 and found.correlation >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("make", MDPS)
def test_of_the_data_s_own_policy_it_is_as_good_as_info_nce(make: Callable[[], MDP], capsys: Any) -> None:
    by_td, by_futures = (answer(make(), None, loss) for loss in ("td_info_nce", "info_nce"))
    with capsys.disabled():
        print(f"\n  {make().name}: off by {by_td.off:.3f}, info_nce by {by_futures.off:.3f}", end="")
    assert by_td.off <= by_futures.off + 0.02


@pytest.mark.slow
def test_single_transitions_in_any_order_are_enough() -> None:
    mdp = tabular.ring()
    whole, pieces = (answer(mdp, policies(mdp)["worst"], shuffled=shuffled) for shuffled in (False, True))
    assert pieces.off <= whole.off + 0.02 and pieces.correlation >= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("make", [tabular.ring, tabular.cliff])
def test_five_improvements_by_learned_critics(make: Callable[[], MDP], capsys: pytest.CaptureFixture[str]) -> None:
    """pi_(k+1) proportional to pi_k e^(Q/tau), Q of critics that learn each policy's occupancy from the same data."""
    mdp = make()
    exact, learned, tau = mdp.policy, mdp.policy, 0.5 * mdp.q().std()
    values = [mdp.value(exact).mean()]
    for _ in range(5):
        q, found = replace(mdp, policy=exact).q(), answer(mdp, learned, quick=True).q
        exact, learned = (p * np.exp((x - x.max(-1, keepdims=True)) / tau) for p, x in ((exact, q), (learned, found)))
        exact, learned = (p / p.sum(-1, keepdims=True) for p in (exact, learned))
        values.append(mdp.value(learned).mean())
    goal = mdp.value(exact).mean()
    with capsys.disabled():
        print(f"\n  {mdp.name}: {', '.join(f'{value:.2f}' for value in values)}; exactly {goal:.2f}", end="")
    assert values[-1] >= goal - 0.05 * (goal - values[0])


# --- methods that iterate


class Task(NamedTuple):
    mdp: MDP
    data: samplers.Data


def crossroads() -> Task:
    mdp = tabular.crossroads()
    return Task(mdp, tabular.data_of(mdp.episodes(300, 40, seed=0, spread=True), mdp.states[[mdp.reward.argmax()]]))


def corridor() -> Task:
    """Seven places in a row, the last one pays. Episodes are cut off at the fourth when they come from the left, and
    behind it when they come from the right: none goes from the first half to the prize, and no action is logged where
    the halves meet."""
    index = np.arange(7)
    transition = np.zeros((7, 2, 7))
    transition[index, 0, np.maximum(index - 1, 0)] = transition[index, 1, np.minimum(index + 1, 6)] = 1.0
    reward = np.where(index == 6, 1.0, 0.0).astype(np.float32)
    states = np.random.default_rng(6).normal(size=(7, 8)).astype(np.float32)
    actions = np.array([[-1.0], [1.0]], np.float32)
    mdp = MDP("corridor", transition, np.full((7, 2), 0.5), reward, np.zeros(7, bool), states, actions, 0.8)
    rng, episodes = np.random.default_rng(0), []
    for i in range(600):
        left = i % 2 == 0
        at, moves = [int(rng.integers(0, 3) if left else rng.integers(3, 7))], []
        while len(moves) < 12 and ((at[-1] < 3) if left else (at[-1] > 2)):
            moves.append(rng.uniform(-1, 1))
            at.append(int(np.clip(at[-1] + (1 if moves[-1] > 0 else -1), 0, 6)))
        episodes.append(cvlctl.Episode(states[at], np.array(moves)[:, None], reward[at[1:]], reward[at[1:]] > 0))
    return Task(mdp, tabular.data_of(episodes, states[[6]]))


def learned(task: Task, name: str, loss: str, improvement: str, steps: int) -> Array:
    """The policy (S, A)."""
    default = ALGORITHMS[name].Config()
    critic = replace(
        default.critic, loss=loss, hidden=(64, 64), latent_dim=16, learning_rate=1e-3, gamma=task.mdp.gamma,
        target_rate=0.02,
    )  # fmt: skip
    more = {"bank_size": 256} if name == "cvl" else {}
    config = replace(default, critic=critic, hidden=(64, 64), learning_rate=1e-3, bc_coefficient=0.05, **more,
                     improvement=improvement)  # fmt: skip
    state = learn(name, config, task.data, steps)
    goals = np.repeat(task.mdp.states[[task.mdp.reward.argmax()]], len(task.mdp.states), axis=0)
    return task.mdp.greedy(greedy(name, config, state, task.mdp.states, goals))


def test_iterating_looks_past_the_collector_s_mistakes_at_the_crossroads() -> None:
    task = crossroads()
    once, iterated = (learned(task, "cvl", "td_info_nce", way, 500)[:2].tolist() for way in ("one_step", "iterated"))
    assert once == [[1.0, 0.0], [0.0, 1.0]] and iterated == [[0.0, 1.0], [0.0, 1.0]]


def random_goal_policy(mdp: MDP, config: goal_conditioned.Config, state: networks.State, goals: Array) -> Array:
    """The policy (S, A) of actions drawn for goals (G, O), each as likely."""
    num, generator = len(mdp.states), torch.Generator().manual_seed(0)
    at, told = (networks.normalise(state, torch.from_numpy(x).unsqueeze(0)) for x in (
        mdp.states.repeat(len(goals), axis=0), np.tile(goals, (num, 1))))  # fmt: skip
    with torch.no_grad():
        mean, log_std = networks.actor(state, goal_conditioned.command(config, at, told))
        action = torch.tanh(mean + log_std.exp() * torch.randn(mean.shape, generator=generator))
    taken = mdp.action_of(action[0].numpy()).reshape(num, -1)
    return np.stack([(taken == a).mean(axis=1) for a in range(len(mdp.actions))], axis=1)


def test_the_critic_of_a_goal_conditioned_policy_knows_its_own_random_goals(capsys: pytest.CaptureFixture[str]) -> None:
    mdp = tabular.ring()
    mdp = replace(mdp, policy=np.tile([0.8, 0.1, 0.1], (len(mdp.states), 1)))
    data = tabular.data_of(mdp.episodes(300, 40, seed=0, spread=True))
    small: dict[str, Any] = {"hidden": (64, 64), "latent_dim": 32, "target_rate": 0.02, "learning_rate": 1e-3}
    config = goal_conditioned.Config(
        critic=occupancy.Config(loss="td_info_nce", gamma=mdp.gamma, **small), improvement="iterated", hidden=(64, 64),
        learning_rate=1e-3, bc_coefficient=0.01,
    )  # fmt: skip
    state = learn("goal_conditioned", config, data, 1000)
    law = samplers.future(data.layout, *_uniform(len(data.layout.row)), mdp.gamma).row
    policy = random_goal_policy(mdp, config, state, data.observation[law].numpy())
    found = judged(replace(mdp, policy=policy), mdp, config.critic, state, data)
    with capsys.disabled():
        print(f"\n  random goals: off by {found.off:.3f}, the collector's by {found.collector_off:.3f}", end="")
    assert found.collector_off >= 0.15 and found.off <= 0.5 * found.collector_off


def _uniform(num: int) -> tuple[torch.Tensor, torch.Tensor]:
    """500 transitions, and what draws their futures."""
    g = torch.Generator().manual_seed(0)
    return torch.randint(num, (500,), generator=g), torch.rand(500, generator=g, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cvl", "laeo"])
def test_stitching(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """From the first places to the prize, which no episode shows: whole futures do not lead there."""
    task = corridor()
    best = task.mdp.value(np.eye(2)[task.mdp.optimal_q().argmax(-1)])[:3].mean()
    default = ALGORITHMS[name].Config().critic.loss
    ways = {"whole futures": (default, "one_step"), "the data's policy": ("td_info_nce", "one_step"),
            "iterated": ("td_info_nce", "iterated")}  # fmt: skip
    share = {way: float(task.mdp.value(learned(task, name, *how, 600))[:3].mean() / best) for way, how in ways.items()}
    with capsys.disabled():
        print(f"\n  corridor, {name}: {', '.join(f'{way} {x:.2f}' for way, x in share.items())} of the optimum", end="")
    assert share["iterated"] >= 0.95 and share["the data's policy"] >= 0.95 and share["whole futures"] < 0.5
