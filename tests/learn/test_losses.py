"""Every loss by hand: value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvlctl.learn.losses import contrastive, occupancy_q, policy

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def grad_of(value: Tensor, leaf: Tensor) -> list[float]:
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return grad.flatten().tolist()


def logits() -> Tensor:
    """exp(f) = [[3, 1], [1, 1]]."""
    return torch.tensor([[LOG3, 0.0], [0.0, 0.0]], requires_grad=True)


def info_nce(f: Tensor) -> Tensor:
    return contrastive.info_nce(f, contrastive.log_partition(f))


def test_info_nce_by_hand() -> None:
    f = logits()
    loss = info_nce(f)
    assert loss.tolist() == pytest.approx([math.log(4 / 3), LOG2])
    # softmax - one-hot: (3/4 - 1, 1/4), (1/2, 1/2 - 1)
    assert grad_of(loss, f) == pytest.approx([-0.25, 0.25, 0.5, -0.5])


def test_partition_penalty_by_hand() -> None:
    f = logits()
    partition = contrastive.log_partition(f)
    mean, total = contrastive.partition_penalty(partition, 2), contrastive.partition_penalty(partition, 2, "log_sum")
    assert mean.tolist() == pytest.approx([LOG2**2, 0.0], abs=1e-6)  # log(4/2), log(2/2)
    assert total.tolist() == pytest.approx([math.log(4) ** 2, LOG2**2])
    # 2 log(Z) softmax
    assert grad_of(mean, f) == pytest.approx([2 * LOG2 * 0.75, 2 * LOG2 * 0.25, 0.0, 0.0], abs=1e-6)


def test_binary_nce_by_hand() -> None:
    f = logits()
    loss = contrastive.binary_nce(f)
    # row 0: -log sigmoid(log 3) - log(1 - sigmoid(0)) = log(4/3) + log 2; row 1: log 2 + log 2
    assert loss.tolist() == pytest.approx([math.log(4 / 3) + LOG2, 2 * LOG2])
    assert grad_of(loss, f) == pytest.approx([-0.25, 0.5, 0.5, -0.5])


def test_binary_nce_averages_the_negatives_apart() -> None:
    f = torch.zeros(4, 4)
    assert contrastive.binary_nce(f).tolist() == pytest.approx([2 * LOG2] * 4)  # not (1/4 + 3/4) log 2


@pytest.mark.parametrize("loss", [info_nce, contrastive.binary_nce])
def test_log_ratio_is_a_stationary_point(loss) -> None:
    """Three states, exact p(s+|s,a): over every batch of pairs, the expected gradient vanishes at f = log ratio."""
    conditional = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]], dtype=torch.float64)
    marginal = conditional.mean(0)
    f = (conditional / marginal).log().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    # all batches of two (pair, future) drawn independently: pairs uniform, futures from their conditionals
    for a in range(2):
        for b in range(2):
            for i in range(3):
                for j in range(3):
                    probability = 0.25 * conditional[a, i] * conditional[b, j]
                    batch = torch.stack([f[a, [i, j]], f[b, [i, j]]])
                    total = total + probability * loss(batch).mean()
    assert max(map(abs, grad_of(total, f))) < 1e-12
    wrong = (conditional / marginal).log() * 1.5
    wrong.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            for i in range(3):
                for j in range(3):
                    batch = torch.stack([wrong[a, [i, j]], wrong[b, [i, j]]])
                    total = total + 0.25 * conditional[a, i] * conditional[b, j] * loss(batch).mean()
    assert max(map(abs, grad_of(total, wrong))) > 1e-3


def test_q_readouts_by_hand() -> None:
    f = logits()
    rewards = torch.tensor([4.0, 8.0])
    own, raw = occupancy_q.q_self_normalised(f, rewards), occupancy_q.q_raw(f, rewards)
    assert own.tolist() == pytest.approx([5.0, 6.0])  # (3*4 + 1*8) / 4, (4 + 8) / 2
    assert raw.tolist() == pytest.approx([10.0, 6.0])  # (3*4 + 1*8) / 2
    assert occupancy_q.log_q_examples(f).tolist() == pytest.approx([LOG2, 0.0], abs=1e-6)  # log((3 + 1) / 2)
    # d softmax-average / df_j = w_j (r_j - Q): 3/4 (4 - 5), 1/4 (8 - 5)
    assert grad_of(own[:1], f) == pytest.approx([-0.75, 0.75, 0.0, 0.0])
    assert grad_of(raw[:1], f) == pytest.approx([6.0, 4.0, 0.0, 0.0])


def test_q_readouts_survive_large_logits() -> None:
    f = torch.tensor([[500.0, 0.0]])
    assert occupancy_q.q_self_normalised(f, torch.tensor([2.0, 1.0])).item() == pytest.approx(2.0)
    assert occupancy_q.log_q_examples(f).item() == pytest.approx(500 - LOG2)


@pytest.mark.parametrize("form", ["paired", "phase"])
def test_fourier_features_estimate_the_exponential_kernel(form: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = 0.7 * torch.randn(5, 4, generator=g), 0.7 * torch.randn(6, 4, generator=g)
    w = torch.randn(200_000, 4, generator=g)
    b = 2 * torch.pi * torch.rand(200_000, generator=g) if form == "phase" else None
    (fx, sx), (fy, sy) = occupancy_q.fourier_features(x, w, b), occupancy_q.fourier_features(y, w, b)
    estimate = (sx[:, None] + sy[None]).exp() * (fx @ fy.T)
    exact = (x @ y.T).exp()
    peak = (sx[:, None] + sy[None]).exp()  # the error is about peak / sqrt(D)
    assert ((estimate - exact).abs() / peak).max() < 5 / math.sqrt(200_000)


def test_fourier_q_agrees_with_exact_q() -> None:
    g = torch.Generator().manual_seed(1)
    phi, psi = torch.nn.functional.normalize(torch.randn(2, 40, 8, generator=g), dim=-1).unbind(0)
    rewards = torch.rand(40, generator=g)
    w = torch.randn(50_000, 8, generator=g)
    sums, factor = occupancy_q.fourier_sums(*occupancy_q.fourier_features(psi, w), rewards)
    features, scales = occupancy_q.fourier_features(phi, w)
    own = occupancy_q.q_fourier(features, scales, sums, factor)
    raw = occupancy_q.q_fourier(features, scales, sums, factor, "none")
    assert own.tolist() == pytest.approx(occupancy_q.q_self_normalised(phi @ psi.T, rewards).tolist(), abs=0.02)
    assert raw.tolist() == pytest.approx(occupancy_q.q_raw(phi @ psi.T, rewards).tolist(), abs=0.02)


def test_tanh_gaussian_density_against_numerical_integration() -> None:
    mean, log_std = torch.tensor([0.3]), torch.tensor([-0.5])
    grid = torch.linspace(-1 + 1e-6, 1 - 1e-6, 200_001, dtype=torch.float64).unsqueeze(1)
    density = policy.log_prob_tanh(mean.double(), log_std.double(), grid).exp()
    assert torch.trapezoid(density, grid.squeeze(1)).item() == pytest.approx(1.0, abs=1e-4)


def test_sampled_log_prob_is_that_of_the_sampled_action() -> None:
    g = torch.Generator().manual_seed(0)
    mean, log_std, noise = torch.randn(3, 7, 2, dtype=torch.float64, generator=g).unbind(0)
    action, log_prob = policy.sample_tanh(mean, log_std, noise)
    assert log_prob.tolist() == pytest.approx(policy.log_prob_tanh(mean, log_std, action).tolist(), abs=1e-6)


def test_behaviour_cloning_by_hand() -> None:
    """Standard normal before the tanh, action 0: -log N(0). The gradient of the mean is mean - u."""
    mean = torch.tensor([[0.0]], requires_grad=True)
    log_std = torch.tensor([[0.0]], requires_grad=True)
    loss = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, torch.tensor([[0.0]])))
    assert loss.item() == pytest.approx(0.5 * math.log(2 * math.pi))
    assert grad_of(loss, log_std) == pytest.approx([1.0])
    loss = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, torch.tanh(torch.tensor([[0.5]]))))
    assert grad_of(loss, mean) == pytest.approx([-0.5])


def test_saturated_actions_have_finite_gradients() -> None:
    mean = torch.zeros(1, 2, requires_grad=True)
    loss = policy.behaviour_cloning(policy.log_prob_tanh(mean, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])))
    assert all(map(math.isfinite, [loss.item(), *grad_of(loss, mean)]))


def test_boltzmann_kl_by_hand_and_its_minimum() -> None:
    q, log_prob = torch.tensor([[1.0], [3.0]]), torch.tensor([[-0.5], [-1.5]])
    assert policy.boltzmann_kl(q, log_prob, 2.0).item() == pytest.approx(0.5 * ((-1 - 1) + (-3 - 3)))
    # over categorical policies, sum_a pi (tau log pi - Q) is least at softmax(Q / tau)
    values = torch.tensor([0.2, 0.9, -0.4], dtype=torch.float64)
    theta = (values / 0.5).clone().requires_grad_()
    pi = torch.softmax(theta, 0)
    assert max(map(abs, grad_of((pi * (0.5 * pi.log() - values)).sum(), theta))) < 1e-12
