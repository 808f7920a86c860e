"""The occupancy critic against exact answers: the whole path from a store through `pretrain` to `load_critic`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tabular
import torch
from tabular import MDP

import cvlctl
from cvlctl.experiments.commands import load
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.settings import have_compiler

STEPS = 3000
MDPS: list[Callable[[], MDP]] = [tabular.grid_dense, tabular.grid_sparse, tabular.ring, tabular.cliff]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """1000 episodes of at most 120 steps of each MDP's behaviour policy."""
    folder = tmp_path_factory.mktemp("stores")
    found = {}
    for make in MDPS:
        path = folder / f"{make.__name__}.zarr"
        cvlctl.write_store(path, make().episodes(1000, 120, seed=0), task=make.__name__)
        found[make.__name__] = path
    return found


class Trained:
    """A critic of one MDP, with the exact answers beside it."""

    def __init__(self, mdp: MDP, store: Path, out: Path, precision: str, compile: str, critic: dict) -> None:
        path = out / "recipe.yaml"
        path.write_text(f"{{stores: ['{store}'], out: '{out / 'run'}', steps: {STEPS}}}")
        settings = {"gamma": mdp.gamma, "hidden": [128, 128], "latent_dim": 32, **critic}
        overrides = [f"critic.{key}={value}" for key, value in settings.items()]
        overrides += ["batch_size=256", "threads=1", f"compile={compile}", f"precision={precision}"]
        pretrain(load(path, overrides, "pretrain"))
        self.mdp, self.critic = mdp, cvlctl.load_critic(out / "run")
        opened = cvlctl.open_store(store)
        num_states, num_actions = mdp.policy.shape
        self.pairs = (np.repeat(mdp.states, num_actions, 0), np.tile(mdp.actions, (num_states, 1)))
        self.futures, self.rewards = opened.futures(20_000, mdp.gamma, seed=0)
        self.marginal = np.bincount(tabular.state_of(mdp, self.futures), minlength=num_states) / len(self.futures)
        rows = np.delete(tabular.state_of(mdp, opened.observations()), opened.episode_ends() - 1)
        visits = np.bincount(rows, minlength=num_states) / len(rows)
        self.weight = visits[:, None] * mdp.policy

    def log_ratio(self) -> np.ndarray:
        return self.critic.log_ratio(*self.pairs, self.mdp.states).reshape(*self.mdp.policy.shape, -1)

    def q(self, normaliser: str = "self") -> np.ndarray:
        return self.critic.q(*self.pairs, self.futures, self.rewards, normaliser).reshape(self.mdp.policy.shape)

    def total_variation(self, estimate: np.ndarray) -> float:
        return float((self.weight * 0.5 * abs(estimate - self.mdp.occupancy()).sum(-1)).sum())

    def correlation(self, x: np.ndarray, y: np.ndarray) -> float:
        """Visitation-weighted Pearson correlation over state-action pairs."""
        x, y = (v - (self.weight * v).sum() for v in (x, y))
        w = self.weight
        return float((w * x * y).sum() / np.sqrt((w * x * x).sum() * (w * y * y).sum()))


@pytest.fixture(scope="module")
def train(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    cache: dict[str, Trained] = {}

    def trained(make: Callable[[], MDP], precision: str = "auto", compile: str = "false", **critic: object) -> Trained:
        key = f"{make.__name__} {precision} {compile} {critic}"
        if key not in cache:
            out = tmp_path_factory.mktemp("run")
            cache[key] = Trained(make(), stores[make.__name__], out, precision, compile, critic)
        return cache[key]

    return trained


ALL = [
    *(pytest.param(make, "info_nce", marks=[pytest.mark.slow] * (make is tabular.grid_sparse)) for make in MDPS),
    *(pytest.param(make, "binary_nce", marks=pytest.mark.slow) for make in MDPS),  # by default: test_tabular_frames.py
]  # fmt: skip


@pytest.mark.parametrize(("make", "loss"), ALL)
def test_critic_recovers_occupancy_and_q(make, loss: str, train, capsys: pytest.CaptureFixture[str]) -> None:
    t = train(make, loss=loss)
    exact_occupancy, exact_q = t.mdp.occupancy(), t.mdp.q()
    ratio = np.exp(t.log_ratio())
    occupancy = ratio * t.marginal
    occupancy /= occupancy.sum(-1, keepdims=True)
    learned, blind = t.total_variation(occupancy), t.total_variation(np.broadcast_to(t.marginal, occupancy.shape))
    q_self, q_raw = t.correlation(t.q(), exact_q), t.correlation(t.q("none"), exact_q)
    examples = t.mdp.reward == t.mdp.reward.max()  # LAEO Eq. 7: the mean of e^f over the examples
    weights = t.marginal[examples] / t.marginal[examples].sum()
    laeo = t.correlation((ratio[..., examples] * weights).sum(-1), exact_occupancy[..., examples].sum(-1))
    line = f"{t.mdp.name}, {loss}: occupancy off by {learned:.3f} (action-blind {blind:.3f}); "
    line += f"correlation of Q {q_self:.3f} (raw Eq. 11 {q_raw:.3f}), of LAEO's Q {laeo:.3f}"
    if loss == "info_nce" and make is tabular.ring:
        paper = train(make, loss=loss, penalty="log_sum")
        line += f"; log-sum penalty: Q {paper.correlation(paper.q(), exact_q):.3f}"
        line += f" (raw {paper.correlation(paper.q('none'), exact_q):.3f})"
    with capsys.disabled():
        print(f"\n  {line}", end="")
    assert blind > 0.2, "actions hardly matter in this MDP: it proves nothing"
    assert learned <= 0.5 * blind
    assert q_self >= 0.95
    assert laeo >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "compile"),
    [*((make, "false") for make in MDPS), (MDPS[0], "true")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_in_bf16_the_critic_is_as_good(make, compile: str, train, capsys: pytest.CaptureFixture[str]) -> None:
    if compile == "true" and not have_compiler():
        pytest.skip("nothing is compiled here")
    found = {}
    for precision in ("auto", "bf16"):
        t = train(make, precision, compile, loss="info_nce")
        occupancy = np.exp(t.log_ratio()) * t.marginal
        off = t.total_variation(occupancy / occupancy.sum(-1, keepdims=True))
        found[precision] = (off, t.correlation(t.q(), t.mdp.q()))
    with capsys.disabled():
        how = "compiled" if compile == "true" else "eager"
        print(f"\n  {t.mdp.name}, {how}: occupancy off, correlation of Q: float32 %.3f %.3f, bf16 %.3f %.3f"
              % (*found["auto"], *found["bf16"]), end="")  # fmt: skip
    assert found["bf16"][0] < found["auto"][0] + 0.02
    assert found["bf16"][1] > found["auto"][1] - 0.01


def test_log_mean_penalty_makes_f_the_log_ratio_itself(train) -> None:
    """Without the normaliser e^f p(s+) must already sum to one; under the paper's log-sum it sums to about 1/B."""
    ours = train(tabular.ring, loss="info_nce")
    paper = train(tabular.ring, loss="info_nce", penalty="log_sum")
    mass = [(np.exp(t.log_ratio()) @ t.marginal * t.weight).sum() for t in (ours, paper)]
    assert mass[0] == pytest.approx(1.0, abs=0.1)
    assert mass[1] < 0.1


@pytest.mark.parametrize("loss", ["info_nce", pytest.param("binary_nce", marks=pytest.mark.slow)])
def test_living_is_ranked_above_dying(loss: str, train) -> None:
    t = train(tabular.cliff, loss=loss)
    q, down, up = t.q(), 1, 3
    edge = slice(8, 12)  # the row above the drop
    assert (q[edge, up] > q[edge, down] + 1.0).all()
    exact = t.mdp.q()
    scale = np.abs(q - exact)[:12].mean() / exact[:12].mean()
    assert scale < 0.15  # the values themselves, not only their order


@pytest.mark.parametrize("temperature", [0.3, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["paired", pytest.param("phase", marks=pytest.mark.slow)])
def test_fourier_readout_agrees_with_the_exact_one(temperature: float, form: str, train) -> None:
    t = train(tabular.grid_dense, loss="info_nce", features="unit", temperature=temperature)
    # at temperature 0.3 the kernel peaks at e^3.3, and the error is about peak / sqrt(features): 2^16 of them for 0.99
    futures, values = t.futures[:1000], t.rewards[:1000]
    phi, psi = t.critic._phi(*t.pairs)[0], t.critic._psi(futures)
    g = torch.Generator().manual_seed(0)
    frequencies = torch.randn(65_536, phi.shape[1], generator=g)
    phases = 2 * torch.pi * torch.rand(65_536, generator=g) if form == "phase" else None
    rewards = torch.from_numpy(values - values.mean())
    sums, factor = occupancy_q.fourier_sums(*occupancy_q.fourier_features(psi, frequencies, phases), rewards)
    q = occupancy_q.q_fourier(*occupancy_q.fourier_features(phi, frequencies, phases), sums, factor)
    exact = t.critic.q(*t.pairs, futures, values)
    fast, slow = (x.reshape(t.mdp.policy.shape) for x in (q.numpy(), exact))
    assert t.correlation(fast, slow) >= 0.99


def test_exact_answers_of_the_tabular_mdps_by_simulation() -> None:
    """The reference itself: occupancy and Q of one pair in the MDP with a terminal state, by Monte Carlo."""
    mdp = tabular.cliff()
    rng = np.random.default_rng(0)
    counts, returns, num = np.zeros(13), 0.0, 4000
    for _ in range(num):
        state, discount, ended = rng.choice(13, p=mdp.transition[5, 0]), 1.0, False
        for _ in range(80):
            counts[state] += (1 - mdp.gamma) * discount
            returns += 0.0 if ended else discount * mdp.reward[state]
            ended = ended or bool(mdp.terminal[state])
            if not ended:
                state = rng.choice(13, p=mdp.policy[state] @ mdp.transition[state])
            discount *= mdp.gamma
    assert 0.5 * abs(counts / num - mdp.occupancy()[5, 0]).sum() < 0.02
    assert returns / num == pytest.approx(mdp.q()[5, 0], rel=0.03)
