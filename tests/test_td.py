"""Temporal-difference losses against numbers worked by hand, values and gradients."""

from __future__ import annotations

import pytest
import torch

from cvlctl.losses import td


def test_soft_value_takes_the_smaller_critic_and_adds_entropy() -> None:
    q = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)  # (2 critics, B = 2)
    log_prob = torch.tensor([-1.0, 0.5], requires_grad=True)
    value = td.soft_value(q, log_prob, torch.tensor([0.2]))
    assert value.tolist() == pytest.approx([1.0 + 0.2, 3.0 - 0.1])
    value.sum().backward()
    assert q.grad is not None and q.grad.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert log_prob.grad is not None and log_prob.grad.tolist() == pytest.approx([-0.2, -0.2])


def test_soft_value_keeps_members_apart() -> None:
    q = torch.tensor([[[1.0], [2.0]], [[8.0], [4.0]]])  # (E = 2, 2, B = 1)
    value = td.soft_value(q, torch.ones(2, 1), torch.tensor([[0.5], [2.0]]))
    assert value.tolist() == [[0.5], [2.0]]


def test_td_target_stops_at_terminal_states() -> None:
    y = td.td_target(torch.tensor([1.0, 1.0]), torch.tensor([0.9, 0.0]), torch.tensor([10.0, 10.0]))
    assert y.tolist() == [10.0, 1.0]


def test_squared_td_error() -> None:
    q = torch.tensor([[1.0, 2.0], [4.0, 0.0]], requires_grad=True)
    target = torch.tensor([2.0, 2.0])
    error = td.squared_td_error(q, target)
    assert error.tolist() == [[0.5, 0.0], [2.0, 2.0]]
    error.sum().backward()
    assert q.grad is not None and q.grad.tolist() == [[-1.0, 0.0], [2.0, -2.0]]


def test_temperature_loss_moves_alpha_towards_the_target_entropy() -> None:
    log_temperature = torch.tensor([0.5], requires_grad=True)
    log_prob = torch.tensor([3.0, -5.0], requires_grad=True)  # entropies -3 (below the target -2: raise alpha) and 5
    loss = td.temperature_loss(log_temperature, log_prob, -2.0)
    assert loss.tolist() == pytest.approx([-0.5 * 1.0, -0.5 * -7.0])
    loss[0].backward(retain_graph=True)
    assert log_temperature.grad is not None and log_temperature.grad.item() == pytest.approx(-1.0)  # descent raises it
    loss[1].backward()
    assert log_temperature.grad.item() == pytest.approx(-1.0 + 7.0)
    assert log_prob.grad is None
