"""Losses of the data's support, by hand; and the gated backup against exact answers, on tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvlctl.learn.losses import support, td

LOG2, LOG3 = math.log(2.0), math.log(3.0)


def grad_of(value: Tensor, leaf: Tensor) -> list[float]:
    (grad,) = torch.autograd.grad(value.sum(), leaf, retain_graph=True)
    return grad.flatten().tolist()


# ------------------------------------------------------------------------------------------------------- losses by hand


def test_classification_by_hand() -> None:
    logged = torch.tensor([LOG3, 0.0], requires_grad=True)
    contrasted = torch.tensor([-LOG3, LOG3], requires_grad=True)
    loss = support.classification(logged, contrasted)
    assert loss.tolist() == pytest.approx([2 * math.log(4 / 3), LOG2 + math.log(4)])
    assert grad_of(loss, logged) == pytest.approx([-0.25, -0.5])
    assert grad_of(loss, contrasted) == pytest.approx([0.25, 0.75])


def test_gate_and_hold_by_hand() -> None:
    f = torch.tensor([-LOG2, -LOG3, 1.0, -50.0], requires_grad=True)
    assert support.gate(f).tolist() == pytest.approx([1 / 2, 1 / 3, 1.0, 0.0])
    assert grad_of(support.gate(f), f) == pytest.approx([1 / 2, 1 / 3, 0.0, 0.0])
    assert support.hold(f).tolist() == pytest.approx([LOG2, LOG3, 0.0, 50.0])
    assert grad_of(support.hold(f), f) == [-1.0, -1.0, 0.0, -1.0]  # outside it pulls, however far
    # slack 2: 2 e^f is 1, 2/3, ...
    assert support.gate(f[1:], 2.0).tolist() == pytest.approx([2 / 3, 1.0, 0.0])
    assert support.hold(f[1:], 2.0).tolist() == pytest.approx([math.log(1.5), 0.0, 50 - LOG2])


def test_gated_value_by_hand() -> None:
    q, trust = torch.tensor([4.0, 4.0], requires_grad=True), torch.tensor([0.25, 1.0], requires_grad=True)
    safe = torch.tensor([2.0, 100.0], requires_grad=True)
    value = support.gated_value(q, safe, trust)
    assert value.tolist() == [2.5, 4.0]
    assert grad_of(value, q) == [0.25, 1.0]
    assert grad_of(value, safe) == [0.75, 0.0]
    assert grad_of(value, trust) == [2.0, -96.0]


def test_ceiling_by_hand() -> None:
    q = torch.tensor([[3.0, 1.0, 9.0], [5.0, 2.0, 9.0]], requires_grad=True)  # (2 critics, B = 3)
    loss = support.ceiling(q, torch.full((3,), 2.0), torch.tensor([0.5, 0.0, 1.0]))
    # half trusted: (1 - 1/2) excess^2 / 2; below the bound, or trusted: nothing
    assert loss.tolist() == [[0.25, 0.0, 0.0], [2.25, 0.0, 0.0]]
    assert grad_of(loss, q) == [0.5, 0.0, 0.0, 1.5, 0.0, 0.0]


def test_anchor_by_hand() -> None:
    q = torch.tensor([[3.0, 1.0, 9.0], [5.0, 2.0, 9.0]], requires_grad=True)
    loss = support.anchor(q, torch.full((3,), 2.0), torch.tensor([0.5, 0.0, 1.0]))
    assert loss.tolist() == [[0.25, 0.5, 0.0], [2.25, 0.0, 0.0]]  # as the ceiling, and from below
    assert grad_of(loss, q) == [0.5, -1.0, 0.0, 1.5, 0.0, 0.0]


def test_curriculum_is_a_line_that_ends() -> None:
    easy, hard = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.8])
    shares = [support.curriculum(torch.tensor(float(n)), 10, easy, hard).tolist() for n in (0, 5, 10, 99)]
    for found, exact in zip(shares, ([1.0, 0.0], [0.6, 0.4], [0.2, 0.8], [0.2, 0.8]), strict=True):
        assert found == pytest.approx(exact)


def test_mixture_takes_each_kind_by_its_share() -> None:
    kinds = torch.tensor([0.0, 1.0, 2.0])[:, None, None, None].expand(3, 1, 5, 2)
    u = torch.tensor([[0.0, 0.19, 0.2, 0.5, 1.0]])
    chosen = support.mixture(kinds, u, torch.tensor([0.2, 0.3, 0.5]))
    assert chosen.tolist() == [[[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]]


def test_log_density_ratio_is_the_classifiers_optimum() -> None:
    """Exact expectation over a table of densities: the gradient vanishes at log p/q, and there alone."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    zero = torch.zeros(4, dtype=torch.float64)

    def gradient(f: Tensor) -> Tensor:
        f = f.clone().requires_grad_()
        loss = (p * support.classification(f, zero)).sum() + (q * support.classification(zero, f)).sum()
        return torch.tensor(grad_of(loss, f))

    exact = (p / q).log()
    assert gradient(exact).abs().max() < 1e-7
    for wrong in (1.3 * exact, exact + 0.3, zero):
        assert gradient(wrong).abs().max() > 0.02


# ------------------------------------------------------------------------------------------ the gated backup, on tables


class Table:
    """A random MDP of 5 states and 3 actions, a behaviour, a policy and gates in [0, 1]."""

    def __init__(self, seed: int, expectile: float = 0.5, state_gate: bool = True) -> None:
        g = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, dtype=torch.float64).square().softmax(-1)

        self.gamma, self.expectile = 0.9, expectile
        self.next, self.behaviour, self.policy = rows(5, 3, 5), rows(5, 3), rows(5, 3)
        self.reward = torch.randn(5, 3, generator=g, dtype=torch.float64)
        self.of_action = torch.rand(5, 3, generator=g, dtype=torch.float64)
        self.of_state = torch.rand(5, generator=g, dtype=torch.float64) if state_gate else torch.ones(5).double()

    def value(self, q: Tensor) -> Tensor:
        """The expectile of q under the behaviour: the mean under weights that depend on it, by iteration."""
        v = (self.behaviour * q).sum(-1)
        for _ in range(30):
            weight = self.behaviour * torch.where(q < v[:, None], 1 - self.expectile, self.expectile)
            v = (weight * q).sum(-1) / weight.sum(-1)
        return v

    def backup(self, q: Tensor, v: Tensor) -> Tensor:
        inside = (self.policy * support.gated_value(q, v[:, None], self.of_action)).sum(-1)
        return self.reward + self.gamma * self.next @ support.gated_value(inside, v.sort().values[1], self.of_state)

    def fixed_point(self) -> Tensor:
        q = torch.zeros(5, 3, dtype=torch.float64)
        for _ in range(150):
            q = self.backup(q, self.value(q))
        return q


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_gated_backup_is_a_contraction_with_its_safe_values(expectile: float) -> None:
    worst, g = 0.0, torch.Generator().manual_seed(9)
    for seed in range(5):
        table = Table(seed, expectile)
        for _ in range(4):
            a, b = 5 * torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
            gap = (table.backup(a, table.value(a)) - table.backup(b, table.value(b))).abs().max()
            worst = max(worst, float(gap / (a - b).abs().max()))
            # V of its own: gamma times the larger of the two gaps
            v, u = 5 * torch.randn(2, 5, generator=g, dtype=torch.float64)
            gap = (table.backup(a, v) - table.backup(b, u)).abs().max()
            assert gap <= 0.9 * max((a - b).abs().max(), (v - u).abs().max()) + 1e-9
            assert (table.value(a) - table.value(b)).abs().max() <= (a - b).abs().max() + 1e-9
        shifted = table.backup(a + 1, table.value(a + 1)) - table.backup(a, table.value(a))
        assert (shifted - 0.9).abs().max() < 1e-9
    assert worst <= 0.9 + 1e-9


def test_gated_backup_evaluates_a_policy_that_falls_back_on_the_behaviour() -> None:
    """Expectile 1/2, every state trusted: Q is that of w pi + (1 - E_pi w) b, a policy one could run."""
    table = Table(3, state_gate=False)
    rest = 1 - (table.policy * table.of_action).sum(-1, keepdim=True)
    mixed = table.policy * table.of_action + rest * table.behaviour
    assert (mixed.sum(-1) - 1).abs().max() < 1e-12
    transition = (table.next[:, :, :, None] * mixed[None, None]).reshape(15, 15)
    exact = torch.linalg.solve(torch.eye(15).double() - 0.9 * transition, table.reward.flatten())
    assert (table.fixed_point().flatten() - exact).abs().max() < 1e-6


def test_a_closed_gate_keeps_values_below_the_best_within_the_data() -> None:
    """A third action that nobody took seems to pay 100: with its gate shut, the others' values never hear of it."""
    for seed in range(5):
        table = Table(seed, 0.9, state_gate=False)
        table.behaviour[:, 2] = 0
        table.behaviour /= table.behaviour.sum(-1, keepdim=True)
        table.reward[:, 2], table.of_action[:, 2] = 100.0, 0.0
        best = torch.zeros(5, 3, dtype=torch.float64)
        for _ in range(200):
            best = table.reward + 0.9 * table.next @ best[:, :2].amax(-1)
        assert (table.fixed_point() <= best + 1e-6)[:, :2].all()
        table.of_action[:, 2] = 1.0
        assert (table.fixed_point() > best + 10)[:, :2].all()  # ungated, they do


def test_a_gate_that_moves_with_q_breaks_the_contraction() -> None:
    """Where it stops holding: two Q-values 1e-3 apart, a gate that opens on the sign of one, targets 9 apart."""
    safe, targets = torch.tensor([10.0]), []
    for q in (torch.tensor([5e-4]), torch.tensor([-5e-4])):
        value = support.gated_value(q, safe, (q > 0).float())
        targets.append(td.td_target(torch.zeros(1), torch.tensor([0.9]), value))
    assert abs(targets[0] - targets[1]).item() > 8.9
