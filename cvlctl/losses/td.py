"""Temporal-difference losses with an entropy bonus. Twin Q-values are (..., 2, B): critics before the batch."""

from __future__ import annotations

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
