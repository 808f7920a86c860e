"""What a Q stands on: exact weights against the tabular MDPs' answers, `critic.q`, and the Q that an actor received."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tabular
import torch
import toy_runs
from scipy.stats import spearmanr
from tabular import MDP
from toy_stores import flip, many

import cvlctl
from cvlctl.data import samplers
from cvlctl.experiments.commands import load
from cvlctl.learn.algorithms import actors, cvl
from cvlctl.learn.attribution import Readout, Shares, States, by_group, kept_psi, psi_of
from cvlctl.learn.finetune import finetune
from cvlctl.learn.pretrain import pretrain


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
def test_the_marginal_is_the_law_that_banks_are_drawn_by(gamma: float) -> None:
    episodes = many(12)
    data = tabular.data_of(episodes)
    ends = np.cumsum([len(one) + 1 for one in episodes])
    ended = np.array([one.terminated for one in episodes])
    labelled = np.arange(12) % 4 != 1
    arrival, absorbed = samplers.marginal(ends, ended, labelled, gamma)
    assert arrival.sum() + absorbed.sum() == pytest.approx(1, abs=1e-12)
    assert absorbed[np.setdiff1d(np.arange(ends[-1]), ends[ended & labelled] - 1)].max() == 0
    of = np.searchsorted(ends, data.layout.row.numpy(), side="right")
    pool = torch.from_numpy(np.flatnonzero(labelled[of]))
    g = torch.Generator().manual_seed(0)
    pick = pool[torch.randint(len(pool), (400_000,), generator=g)]
    drawn = samplers.future(data.layout, pick, torch.rand(len(pick), generator=g, dtype=torch.float64), gamma)
    for mass, chosen in ((arrival, ~drawn.absorbed), (absorbed, drawn.absorbed)):
        seen = np.bincount(drawn.row[chosen].numpy(), minlength=len(mass)) / len(pick)
        assert abs(seen - mass).max() < 5 * np.sqrt(mass.max() / len(pick)) + 1e-12


# --- a critic of an MDP, beside the MDP's own answers


class Explained:
    """A critic of one MDP, read out of all states of its store."""

    def __init__(self, mdp: MDP, folder: Path, twin: bool, steps: int) -> None:
        store = cvlctl.write_store(folder / "mdp.zarr", mdp.episodes(300, 60, seed=0), task="mdp")
        path = folder / "recipe.yaml"
        path.write_text(f"{{stores: ['{store.path}'], out: '{folder / 'run'}', steps: {steps}}}")
        critic = f"critic={{gamma: {mdp.gamma}, hidden: [64, 64], latent_dim: 16, twin: {str(twin).lower()}}}"
        pretrain(load(path, [critic, "batch_size=128", "threads=1", "compile=false", "seeds=[0]"], "pretrain"))
        self.mdp, self.store, self.critic = mdp, store, cvlctl.load_critic(folder / "run")
        self.observations, self.ends = store.observations(), store.episode_ends()
        every = np.ones(store.num_episodes, dtype=bool)
        arrival, absorbed = samplers.marginal(self.ends, store.terminated(), every, mdp.gamma)
        reward = np.zeros(len(self.observations))
        reward[1:] = store.rewards()[:-1]
        self.states = States(psi_of(self.critic, self.observations), arrival, absorbed, reward)
        self.readout = Readout(self.critic, self.states)
        num_states, num_actions = mdp.policy.shape
        self.pairs = (np.repeat(mdp.states, num_actions, 0), np.tile(mdp.actions, (num_states, 1)))
        self.state = tabular.state_of(mdp, self.observations)
        rows = np.delete(self.state, self.ends - 1)
        self.visits = (np.bincount(rows, minlength=num_states) / len(rows))[:, None] * mdp.policy

    def shares(self) -> list[Shares]:
        return [self.readout.shares(*pair) for pair in zip(*self.pairs, strict=True)]


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Explained]:
    made: dict[tuple, Explained] = {}

    def of(make: Callable[[], MDP], twin: bool = False, steps: int = 1000) -> Explained:
        if (make, twin) not in made:
            made[make, twin] = Explained(make(), tmp_path_factory.mktemp("mdp"), twin, steps)
        return made[make, twin]

    return of


@pytest.mark.parametrize("make", [pytest.param(tabular.grid_corner, marks=pytest.mark.slow), tabular.cliff])
def test_weights_are_the_exact_occupancy_within_the_critics_own_error(
    make, explained, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explained(make)
    mdp, shares = found.mdp, found.shares()
    weight = np.array([np.bincount(found.state, x.arrival + x.absorbed, len(mdp.reward)) for x in shares])
    exact = mdp.occupancy().reshape(len(shares), -1)
    # the critic's own error: its e^f at the MDP's states, on the states' share of the data, beside the exact occupancy
    marginal = np.bincount(found.state, found.states.arrival + found.states.absorbed, len(mdp.reward))
    own = np.exp(found.critic.log_ratio(*found.pairs, mdp.states)) * marginal
    own /= own.sum(axis=1, keepdims=True)
    off, error = (0.5 * abs(x - exact).sum(axis=1) @ found.visits.ravel() for x in (weight, own))
    blind = 0.5 * abs(marginal - exact).sum(axis=1) @ found.visits.ravel()
    q, truth = np.array([x.q for x in shares]), mdp.q().ravel()
    alive = ~np.repeat(mdp.terminal, mdp.policy.shape[1])
    correlation = np.corrcoef(q[alive], truth[alive])[0, 1]
    with capsys.disabled():
        print(f"\n  {mdp.name}: weights off the exact occupancy by {off:.3f}, the critic's f by {error:.3f}, blind "
              f"{blind:.3f}; correlation of Q {correlation:.3f}", end="")  # fmt: skip
    assert abs(off - error) < 1e-4
    assert off < 0.5 * blind
    assert correlation > 0.95


def test_absorbed_mass_is_that_of_the_states_beyond_death(explained) -> None:
    found = explained(tabular.cliff)
    exact = found.mdp.gamma * found.mdp.occupancy()[..., 12].ravel()  # arriving is the rest of the terminal state's
    absorbed = np.array([one.absorbed.sum() for one in found.shares()])
    assert abs(absorbed - exact) @ found.visits.ravel() < 0.05
    assert np.corrcoef(absorbed[:48], exact[:48])[0, 1] > 0.95


@pytest.mark.parametrize("twin", [False, True])
@pytest.mark.parametrize("normaliser", ["self", "none"])
def test_shares_sum_to_the_critics_q_on_the_same_weighted_states(normaliser: str, twin: bool, explained) -> None:
    found = explained(tabular.grid_corner, twin, 20)
    readout = Readout(found.critic, found.states, normaliser)
    seen = found.states.arrival > 0
    futures, rewards, weights = found.observations[seen], found.states.reward[seen], found.states.arrival[seen]
    wanted = found.critic.q(*found.pairs, futures, rewards, normaliser, weights)
    np.testing.assert_allclose(readout.q(*found.pairs), wanted, rtol=1e-6)
    for i in range(0, len(wanted), 7):
        shares = readout.shares(found.pairs[0][i], found.pairs[1][i])
        scale = (1 if normaliser == "self" else shares.mass) / (1 - found.critic.gamma)
        assert (shares.arrival + shares.absorbed).sum() == pytest.approx(1, abs=1e-12)
        assert scale * (shares.arrival @ found.states.reward) == pytest.approx(wanted[i], rel=1e-6)
        assert shares.q == pytest.approx(wanted[i], rel=1e-6)
        assert 1 <= shares.effective() <= seen.sum()


def test_without_an_episode_q_is_that_of_a_bank_without_it(explained) -> None:
    found = explained(tabular.cliff)
    begins = np.concatenate([[0], found.ends])
    every = np.ones(len(found.ends), dtype=bool)
    mass = by_group(found.states.arrival + found.states.absorbed, begins)
    for normaliser in ("self", "none"):
        shares = Readout(found.critic, found.states, normaliser).shares(*(x[5] for x in found.pairs))
        without = Readout(found.critic, found.states, normaliser).without(shares, begins, mass)
        for out in (0, 7):
            kept = every & (np.arange(len(every)) != out)
            law = samplers.marginal(found.ends, found.store.terminated(), kept, found.mdp.gamma)
            rest = Readout(found.critic, found.states._replace(arrival=law[0], absorbed=law[1]), normaliser)
            assert without[out] == pytest.approx(rest.q(*(x[5:6] for x in found.pairs))[0], rel=1e-6)
    only = Readout(found.critic, found.states)
    nothing = only.without(shares, np.array([0, found.ends[-1]]), np.ones(1))
    assert np.isnan(nothing[0])


class Counted:
    """The optimum of InfoNCE on a store, in closed form: e^f from how often the data's pairs have which futures."""

    gamma: float

    def __init__(self, mdp: MDP, occupancy: np.ndarray) -> None:
        self.gamma = mdp.gamma
        marginal = occupancy.sum(axis=(0, 1)) / occupancy.sum()
        of_pair = occupancy / np.maximum(occupancy.sum(axis=-1, keepdims=True), 1e-30)
        self._log = torch.from_numpy(np.log(np.maximum(of_pair / np.maximum(marginal, 1e-30), 1e-30))).float()
        self._mdp = mdp

    def _phi(self, observations: np.ndarray, actions: np.ndarray) -> list[torch.Tensor]:
        return [self._log[tabular.state_of(self._mdp, observations), self._mdp.action_of(actions)].unsqueeze(0)]


def counted(mdp: MDP, episode: cvlctl.Episode) -> tuple[np.ndarray, np.ndarray]:
    """Of one episode, (S, A, S) each: the mass of the futures of its pairs, all of it and what arrives (and pays)."""
    state, action = tabular.state_of(mdp, episode.observations), mdp.action_of(episode.actions)
    arriving, beyond = np.zeros((2, *mdp.transition.shape))
    for t in range(len(episode)):
        left = len(episode) - t
        law = (1 - mdp.gamma) * mdp.gamma ** np.arange(left)
        rest = mdp.gamma**left
        np.add.at(arriving[state[t], action[t]], state[t + 1 :], law if episode.terminated else law / (1 - rest))
        beyond[state[t], action[t], state[-1]] += rest if episode.terminated else 0.0
    return arriving + beyond, arriving


@pytest.mark.parametrize("make", [tabular.grid_dense, tabular.ring, tabular.cliff])
def test_leaving_an_episode_out_moves_q_as_retraining_says(make, capsys: pytest.CaptureFixture[str]) -> None:
    """Retrained is the optimum without the episode, by counting anew. A fixed critic knows the change of the marginal:
    over the data's pairs that is all there is, at a single pair what the pair saw of the episode comes beside it."""
    mdp = make()
    episodes = mdp.episodes(60, 40, seed=0)
    parts = [counted(mdp, episode) for episode in episodes]
    occupancy, arriving = (np.sum([part[i] for part in parts], axis=0) for i in (0, 1))
    critic: Any = Counted(mdp, occupancy)
    begins = np.concatenate([[0], np.cumsum([len(one) + 1 for one in episodes])])
    data = tabular.data_of(episodes)
    ended, every = np.array([one.terminated for one in episodes]), np.ones(len(episodes), dtype=bool)
    arrival, absorbed = samplers.marginal(begins[1:], ended, every, mdp.gamma)
    psi = np.eye(len(mdp.reward), dtype=np.float32)[tabular.state_of(mdp, data.observation.numpy())]
    readout = Readout(critic, States(psi[None], arrival, absorbed, data.arrival_reward[0].double().numpy()))
    mass, visits = by_group(arrival + absorbed, begins), occupancy.sum(axis=-1)
    often = np.argwhere(visits > 20)

    def q(all_of_it: np.ndarray, paid: np.ndarray) -> np.ndarray:
        return (paid @ mdp.reward)[tuple(often.T)] / all_of_it.sum(-1)[tuple(often.T)] / (1 - mdp.gamma)

    before = q(occupancy, arriving)
    retrained = np.array([q(occupancy - whole, arriving - paid) for whole, paid in parts]) - before
    explained = []
    for s, a in often:
        shares = readout.shares(mdp.states[s], mdp.actions[a])
        assert shares.q == pytest.approx(before[len(explained)], rel=1e-4)  # the optimum's Q is what the data collected
        explained.append(readout.without(shares, begins, mass) - shares.q)
    fixed, weight = np.array(explained).T, visits[tuple(often.T)]
    together = spearmanr(retrained @ weight, fixed @ weight).statistic
    single = np.mean([spearmanr(x, y).statistic for x, y in zip(retrained.T, fixed.T, strict=True)])
    with capsys.disabled():
        print(f"\n  {mdp.name}: Q's change without an episode, retrained and with the critic fixed: rank correlation "
              f"{together:.2f} over the data's pairs, {single:.2f} at single ones", end="")  # fmt: skip
    assert together > 0.85
    assert single > 0.25


# --- the Q that an actor received


@pytest.mark.parametrize(
    ("critic", "normaliser"), [("", "self"), ("twin: true, ", "self"), ("ema_rate: 0.1, ", "self"), ("", "none")]
)
def test_with_a_steps_own_bank_it_is_the_q_that_its_actor_received(
    critic: str, normaliser: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    received: dict[str, torch.Tensor] = {}
    improve = actors.improve

    def watched(state: Any, batch: Any, noise: Any, q: Any, **options: Any) -> Any:
        observation = (batch.observation - state["observation_mean"].unsqueeze(1)) / state["observation_std"].unsqueeze(
            1
        )
        received.update(q=q(observation.clamp(-10, 10), batch.action), o=batch.observation, a=batch.action)
        return improve(state, batch, noise, q, **options)

    monkeypatch.setattr(cvl.actors, "improve", watched)
    text = f"{{name: cvl, normaliser: {normaliser}, hidden: [16], bank_size: 64, critic: {{{critic}gamma: 0.9, "
    text = f"steps: 20, seeds: [3, 5], algorithm: {text}hidden: [16], latent_dim: 8}}}}"
    finetune(toy_runs.load("finetune", store, tmp_path / "run", text))
    opened = cvlctl.open_store(store)
    data = tabular.data_of(list(opened.episodes()))
    config = cvl.Config(bank_size=64)
    indices, _ = samplers.draw(data, samplers.Draws(32, 0.9, futures=True, bank=64), [3, 5], 0, samplers.BLOCK)
    state = toy_runs.state_of(tmp_path / "run")
    for member, seed in enumerate((3, 5)):
        rows, count = np.unique(indices.bank_row[19, member].numpy(), return_counts=True)
        assert not indices.bank_absorbed.any()
        assert count.sum() == config.bank_size
        critic_of_seed = cvlctl.load_critic(tmp_path / "run", seed=seed)
        states = States(
            psi_of(critic_of_seed, data.observation[rows].numpy()), count / 64, np.zeros(len(rows)),
            data.arrival_reward[0, rows].double().numpy(),
        )  # fmt: skip
        pairs = received["o"][member].numpy(), received["a"][member].numpy()
        q = Readout(critic_of_seed, states, normaliser).q(*pairs)
        std, mean = (float(state[f"reward_{name}"][member]) for name in ("std", "mean"))
        raw = received["q"][member].double().numpy() * std + (mean if normaliser == "self" else 0.0)
        np.testing.assert_allclose(q * (1 - 0.9), raw, rtol=1e-5)
        one = Readout(critic_of_seed, states, normaliser).shares(pairs[0][0], pairs[1][0])
        assert one.q * (1 - 0.9) == pytest.approx(raw[0], rel=1e-5)


# --- psi of the whole store, kept


def pipe(file: Path) -> None:
    """Who opens it to read would wait for somebody to write."""
    file.unlink()
    os.mkfifo(file)


def test_psi_is_computed_once_and_anew_where_it_is_another_or_damaged(store: Path, tmp_path: Path) -> None:
    toy_runs.run("occupancy", store, tmp_path / "run", "steps=2", "seeds=[0]")
    critic = cvlctl.load_critic(tmp_path / "run")
    observations = cvlctl.open_store(store).observations()
    wanted, file, computed = psi_of(critic, observations), tmp_path / "kept" / "psi-0.npy", []

    def of(digest: str) -> np.ndarray:
        def read() -> Any:
            computed.append(digest)
            yield from np.array_split(observations, 3)

        return kept_psi(critic, len(observations), read, file, digest)

    for digest in ("a", "a", "b", "b"):
        np.testing.assert_allclose(of(digest), wanted, rtol=1e-5, atol=1e-6)
    assert computed == ["a", "b"]
    about = file.with_suffix(".json")
    for damage in (lambda: flip(file), lambda: file.write_bytes(b"x"), file.unlink, about.unlink, lambda: pipe(file)):
        damage()
        np.testing.assert_allclose(of("b"), wanted, rtol=1e-5, atol=1e-6)
        assert computed.pop() == "b"
        of("b")
        assert computed == ["a", "b"][: len(computed)]
    assert sorted(path.name for path in file.parent.iterdir()) == ["psi-0.json", "psi-0.npy"]


def test_where_psi_cannot_be_kept_the_answer_is_the_same(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy_runs.run("occupancy", store, tmp_path / "run", "steps=2", "seeds=[0]")
    critic, observations = cvlctl.load_critic(tmp_path / "run"), cvlctl.open_store(store).observations()
    (tmp_path / "file").touch()
    found = kept_psi(critic, len(observations), lambda: iter([observations]), tmp_path / "file" / "psi.npy", "a")
    np.testing.assert_allclose(found, psi_of(critic, observations), rtol=1e-5, atol=1e-6)
    assert "psi is not kept" in capsys.readouterr().err
