"""CVL's readouts against the exact one, and the twin critic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from cvlctl.data import samplers
from cvlctl.learn.algorithms import cvl, laeo, occupancy, readouts
from cvlctl.learn.losses import policy
from cvlctl.types import Spec

LATENT, SPEC = 8, Spec((3,), 2, 20)


def bank(num: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """phi (2, 50, d), psi (2, num, d), rewards (2, num) that psi tells."""
    g = torch.Generator().manual_seed(seed)
    phi, psi = (0.35 * torch.randn(2, n, LATENT, generator=g) for n in (50, num))
    return phi, psi, psi[..., 0] + 0.1 * torch.randn(2, num, generator=g)


def correlation(x: Tensor, y: Tensor) -> float:
    return float(np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1])


def data() -> samplers.Data:
    g = torch.Generator().manual_seed(0)
    where = samplers.layout(np.arange(21, 211, 21), np.zeros(10, dtype=bool))
    observation, action = torch.randn(210, 3, generator=g), torch.rand(210, 2, generator=g) * 2 - 1
    return samplers.Data(
        observation, action, observation[:, 0].unsqueeze(0), where, torch.arange(200), observation[:5].clone()
    )


def train(config: cvl.Config | laeo.Config, steps: int = 3) -> dict[str, Tensor]:
    module = cvl if isinstance(config, cvl.Config) else laeo
    d, draws = data(), module.draws(config, SPEC, 32)  # type: ignore[arg-type]
    state = module.init(config, SPEC, [0, 1], d)  # type: ignore[arg-type]
    indices, noise = samplers.draw(d, draws, [0, 1], 0, steps)
    for i in range(steps):
        batch = samplers.gather(d, samplers.Indices(*(x[i] for x in indices)), draws)
        with torch.no_grad():
            state, metrics = module.step(config, state, batch, {k: v[i] for k, v in noise.items()})  # type: ignore
    assert all(torch.isfinite(value).all() for value in metrics.values())
    return metrics


@pytest.mark.parametrize("normaliser", ["self", "none"])
def test_coreset_of_the_whole_bank_is_the_exact_readout(normaliser: str) -> None:
    phi, psi, rewards = bank(64)
    state = readouts.coreset_init([0, 1], 64, LATENT)
    q = readouts.coreset(state, psi, rewards, normaliser, 1.0)(phi)
    assert torch.allclose(q, readouts.exact(psi, rewards, normaliser)(phi), atol=1e-4)


def test_coreset_gathers_many_banks_in_few_centres() -> None:
    phi, large, rewards = bank(64 * 256, seed=1)
    state = readouts.coreset_init([0, 1], 64, LATENT)
    for some, paid in zip(large.split(256, dim=1), rewards.split(256, dim=1), strict=True):
        read = readouts.coreset(state, some, paid, "self", 0.05)
    exact = readouts.exact(large, rewards, "self")(phi)
    one_bank = readouts.exact(some[:, :64], paid[:, :64], "self")(phi)  # as many entries, read exactly
    assert correlation(read(phi), exact) > 0.97
    assert correlation(read(phi), exact) > correlation(one_bank, exact)


@pytest.mark.parametrize("form", ["paired", "phase"])
def test_orthogonal_frequencies_estimate_better(form: str) -> None:
    phi, psi, rewards = bank(200)
    exact, errors = readouts.exact(psi, rewards, "self")(phi), {}
    for orthogonal in (False, True):
        error = []
        for seed in range(10):
            state = readouts.fourier_init([seed, seed + 100], 512, LATENT, form, orthogonal, False, 1)
            error.append(1 - correlation(readouts.fourier(state, psi, rewards, "self", 1.0)(phi), exact))
        errors[orthogonal] = np.mean(error)
    assert errors[False] < 0.2
    assert errors[True] < 0.8 * errors[False]
    rows = state["fourier_frequencies"][0, :LATENT]
    assert torch.allclose((rows @ rows.T).fill_diagonal_(0), torch.zeros(LATENT, LATENT), atol=1e-4)


def test_one_stretch_of_time_is_the_plain_average() -> None:
    phi, psi, rewards = bank(100)
    zero = torch.zeros(2, 100, dtype=torch.int64)
    plain = readouts.fourier_init([0, 1], 2048, LATENT, "paired", False, True, 1)
    timed = {name: value.clone() for name, value in plain.items()}
    for part in (slice(0, 50), slice(50, 100)):
        one = readouts.fourier(plain, psi[:, part], rewards[:, part], "self", 0.3)(phi)
        two = readouts.fourier_by_time(timed, psi[:, part], rewards[:, part], zero[:, part], zero[:, :50], "self", 0.3)(
            phi
        )
    assert torch.allclose(one, two, atol=1e-4)


def test_each_stretch_of_time_has_its_own_average() -> None:
    phi, psi, rewards = bank(100)
    stretch = (torch.arange(100) >= 60).long().expand(2, -1)
    state = readouts.fourier_init([0, 1], 2048, LATENT, "paired", False, True, 2)
    of_pair = (torch.arange(50) % 2).expand(2, -1)
    q = readouts.fourier_by_time(state, psi, rewards, stretch, of_pair, "self", 1.0)(phi)
    fresh = readouts.fourier_init([0, 1], 2048, LATENT, "paired", False, False, 1)
    early = readouts.fourier(fresh, psi[:, :60], rewards[:, :60], "self", 1.0)(phi)
    late = readouts.fourier(fresh, psi[:, 60:], rewards[:, 60:], "self", 1.0)(phi)
    assert torch.allclose(q, torch.where(of_pair == 0, early, late), atol=1e-3)


def test_times_count_from_the_start_of_each_episode() -> None:
    d, draws = data(), samplers.Draws(64, gamma=0.9, bank=32, times=True)
    indices, _ = samplers.draw(d, draws, [0], 0, 1)
    batch = samplers.gather(d, samplers.Indices(*(x[0] for x in indices)), draws)
    assert torch.equal(batch.time, indices.row[0] % 21)
    assert torch.equal(batch.bank_time, indices.bank_source[0] % 21)
    assert (indices.bank_row[0] > indices.bank_source[0]).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"readout": "coreset", "coreset_size": 16, "xi_ema_rate": 0.1},
        {"readout": "fourier", "xi_ema_rate": 0.1, "orthogonal": True},
        {"readout": "fourier", "time_bins": 4, "xi_ema_rate": 0.1, "num_actions": 2},
        {"actor_form": "sampled", "num_actions": 8},
        {"critic": occupancy.Config(hidden=(16,), latent_dim=8, twin=True)},
    ],
)
def test_every_form_trains(settings: dict) -> None:
    settings = {"critic": occupancy.Config(hidden=(16,), latent_dim=8), **settings}
    metrics = train(cvl.Config(bank_size=64, num_features=32, hidden=(16,), **settings))
    assert ("readout_agreement" in metrics) == ("readout" in settings)


def test_twin_critics_are_independent_and_the_smaller_value_counts() -> None:
    config = occupancy.Config(hidden=(16,), latent_dim=8, twin=True)
    state = occupancy.init(config, SPEC, [0], data())
    observation, action = torch.randn(1, 6, 3), torch.rand(1, 6, 2)
    phi = occupancy.phi(config, state, observation, action)
    assert phi.shape == (1, 2, 6, 8)
    assert not torch.allclose(phi[:, 0], phi[:, 1])
    psi, rewards = occupancy.bank_psi(config, state, torch.randn(1, 40, 3)), torch.rand(1, 40)
    q = readouts.exact(psi, rewards, "self")(phi)
    each = [readouts.exact(psi[:, i], rewards, "self")(phi[:, i]) for i in (0, 1)]
    assert torch.allclose(q, torch.minimum(*each), atol=1e-6)
    train(laeo.Config(critic=occupancy.Config(hidden=(16,), latent_dim=8, loss="binary_nce", twin=True), hidden=(16,)))


def test_sampled_kl_has_the_gradient_of_the_reparameterised_one_on_average() -> None:
    """Q(a) = 3 a_0 - a_1^2, tau = 0.5: the two estimators agree in the limit of many samples."""
    mean, log_std = torch.tensor([0.2, -0.3]), torch.tensor([-0.5, 0.1])
    noise = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    grads = []
    for sampled in (False, True):
        m, s = mean.clone().requires_grad_(), log_std.clone().requires_grad_()
        action, log_prob = policy.sample_tanh(m, s, noise)
        if sampled:
            action = action.detach()
            log_prob = policy.log_prob_tanh(m, s, action)
        q = 3 * action[:, 0] - action[:, 1].square()
        loss = (policy.sampled_boltzmann_kl if sampled else policy.boltzmann_kl)(q, log_prob, 0.5)
        grads.append(torch.cat(torch.autograd.grad(loss, [m, s])))
    assert torch.allclose(*grads, atol=0.03)
    assert grads[0].abs().max() > 1


def test_sampled_kl_by_hand() -> None:
    log_prob = torch.tensor([0.0, -1.0], requires_grad=True)
    loss = policy.sampled_boltzmann_kl(torch.tensor([1.0, 3.0]), log_prob, 2.0)
    # costs -1 and -5: advantages 4 and -4; loss = (0 * 4 + -1 * -4) / 2, gradient (2, -2)
    assert loss.item() == pytest.approx(2.0)
    assert torch.autograd.grad(loss, log_prob)[0].tolist() == [2.0, -2.0]
