"""Losses of successor features. Psi(s,a) = E[sum_k gamma^(k-1) c(s_k)] (Barreto et al. 2017, Eq. 3) of features c(s')
in R^d; with a reward r = w . c(s') that is linear in them, Q = w . Psi (its Eq. 4). Twin Psi are (..., 2, B, d)."""

from __future__ import annotations

import torch
from torch import Tensor


def values(successor: Tensor, weight: Tensor) -> Tensor:
    """Q(s,a) = Psi(s,a) . w: successor (..., 2, B, d) and weight (..., d) give (..., 2, B)."""
    return (successor * weight.unsqueeze(-2).unsqueeze(-2)).sum(dim=-1)


def pessimistic(successor: Tensor, weight: Tensor) -> Tensor:
    """Of twin Psi (..., 2, B, d) the one with the smaller Q = Psi . w in each row, (..., B, d): as min_i Q_i for TD."""
    first, second = successor.unbind(dim=-3)
    low = values(successor, weight)
    return torch.where((low[..., 0, :] <= low[..., 1, :]).unsqueeze(-1), first, second)


def successor_target(feature: Tensor, discount: Tensor, next_successor: Tensor) -> Tensor:
    """y = c(s') + gamma (1 - terminated) Psi(s', a'): Bellman's equation with c in the reward's place. (..., B, d).

    Args:
        feature, next_successor: (..., B, d).
        discount: gamma (1 - terminated), (..., B).
    """
    return feature + discount.unsqueeze(-1) * next_successor


def successor_error(successor: Tensor, target: Tensor) -> Tensor:
    """l_i = |Psi_i(s,a) - y|^2 / (2 d): successor (..., 2, B, d), and one target (..., B, d) for both. (..., 2, B)."""
    return 0.5 * (successor - target.unsqueeze(-3)).square().mean(dim=-1)


def reward_error(feature: Tensor, weight: Tensor, reward: Tensor) -> Tensor:
    """l = (w . c(s') - r)^2 / 2 (Barreto et al. 2017, Eq. 2 as a regression).

    Args:
        feature: (..., B, d).
        weight: (..., d).
        reward: (..., B).

    Returns:
        (..., B).
    """
    return 0.5 * ((feature * weight.unsqueeze(-2)).sum(dim=-1) - reward).square()
