"""Temporal-difference losses. Twin Q-values are (..., 2, B): critics before the batch."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def soft_value(q: Tensor, log_prob: Tensor, temperature: Tensor) -> Tensor:
    """V(s) = min_i Q_i(s,a) - alpha log pi(a|s), a ~ pi (SAC Eq. 3, with the smaller of two critics). (..., B).

    The actor's loss is -V, differentiated through a.

    Args:
        q: (..., 2, B) of the sampled actions.
        log_prob: (..., B).
        temperature: alpha (..., 1), entropy's weight.
    """
    return q.amin(dim=-2) - temperature * log_prob


def td_target(reward: Tensor, discount: Tensor, next_value: Tensor) -> Tensor:
    """y = r + gamma (1 - terminated) V(s') (SAC Eq. 2). All (..., B); `discount` is gamma (1 - terminated)."""
    return reward + discount * next_value


def squared_td_error(q: Tensor, target: Tensor) -> Tensor:
    """l_i = (Q_i(s,a) - y)^2 / 2 (SAC Eq. 5): q (..., 2, B), and one target (..., B) for both. (..., 2, B)."""
    return 0.5 * (q - target.unsqueeze(-2)).square()


def temperature_loss(log_temperature: Tensor, log_prob: Tensor, target_entropy: float) -> Tensor:
    """l = -log alpha (log pi(a|s) + H_target) (SAC Eq. 18, in log alpha as public code has it). (..., B).

    Alpha grows while the policy's entropy -log pi is below H_target. The gradient reaches log alpha (..., 1) alone.
    """
    return -log_temperature * (log_prob.detach() + target_entropy)


def smoothed_action(action: Tensor, noise: Tensor, scale: float, limit: float) -> Tensor:
    """clip(pi(s') + clip(scale * noise, +-limit), +-1): TD3's target policy smoothing (TD3 Eq. 14)."""
    return (action + (scale * noise).clamp(-limit, limit)).clamp(-1.0, 1.0)


def expectile(difference: Tensor, level: float) -> Tensor:
    """L_2^tau(u) = |tau - 1(u < 0)| u^2 (IQL Eq. 4), u = Q(s,a) - V(s): at level 1/2 half the squared error."""
    weight = torch.where(difference < 0, 1.0 - level, level)
    return weight * difference.square()


def advantage_weight(advantage: Tensor, inverse_temperature: float, limit: float = 100.0) -> Tensor:
    """min(e^(beta A), limit), without gradient: the weight of each logged action's likelihood (IQL Eq. 7)."""
    return (inverse_temperature * advantage.detach()).clamp(max=math.log(limit)).exp()


def conservative_penalty(q_sampled: Tensor, log_density: Tensor, q_data: Tensor) -> Tensor:
    """log 1/K sum_k e^Q(s,a_k) / p(a_k) - Q(s,a): CQL(H) (CQL Eq. 4), the integral of e^Q by importance sampling.

    Args:
        q_sampled: (..., 2, B, K) of actions drawn from known densities.
        log_density: (..., B, K) of those actions; no gradient passes.
        q_data: (..., 2, B) of the logged actions.

    Returns:
        (..., 2, B).
    """
    weighted = q_sampled - log_density.detach().unsqueeze(-3)
    return torch.logsumexp(weighted, dim=-1) - math.log(q_sampled.shape[-1]) - q_data
