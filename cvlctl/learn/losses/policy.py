"""Policy losses, and the tanh-Gaussian they are written for. Mean and log std are (..., A), before the tanh."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTION_CLIP = 1.0 - 1e-5  # atanh of a saturated action in the data


def sample_tanh(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """a = tanh(mean + std * noise) and log pi(a|s) (...,); differentiable in mean and log_std."""
    u = mean + log_std.exp() * noise
    return torch.tanh(u), _log_prob(u, mean, log_std)


def log_prob_tanh(mean: Tensor, log_std: Tensor, action: Tensor) -> Tensor:
    """log pi(a|s) (...,) of actions in [-1, 1], clipped to +-(1 - 1e-5)."""
    return _log_prob(torch.atanh(action.clamp(-ACTION_CLIP, ACTION_CLIP)), mean, log_std)


def _log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    # log N(u) - log|d tanh(u)/du|, with log(1 - tanh^2 u) = 2 (log 2 - u - softplus(-2u)), exact for large |u|
    gaussian = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
    return (gaussian - squash).sum(dim=-1)


def boltzmann_kl(q: Tensor, log_prob: Tensor, temperature: float) -> Tensor:
    """tau KL(pi || exp(Q/tau)/Z) up to log Z, by samples: mean_i(tau log pi(a_i|s) - Q(s,a_i)) (CVL Eq. 13).

    Args:
        q, log_prob: (num_actions, ..., B) of reparameterised samples.

    Returns:
        (..., B).
    """
    return (temperature * log_prob - q).mean(dim=0)


def sampled_boltzmann_kl(q: Tensor, log_prob: Tensor, temperature: float) -> Tensor:
    """mean_i log pi(a_i|s) (c_i - mean_{j != i} c_j), c = tau log pi - Q: its gradient is an estimate of Eq. 13's.

    The score-function form of CVL Eq. 13, c held fixed, with the other samples' mean as the baseline: Q is never
    differentiated. Its value means nothing.

    Args:
        q, log_prob: (num_actions, ..., B), num_actions >= 2, of actions sampled from pi and then held fixed.
    """
    cost = (temperature * log_prob - q).detach()
    count = cost.shape[0]
    others = (cost.sum(dim=0, keepdim=True) - cost) / (count - 1)
    return (log_prob * (cost - others)).mean(dim=0)


def behaviour_cloning(log_prob: Tensor) -> Tensor:
    """-log pi(a|s) of the data's actions (CVL Eq. 14, with the minus sign that minimising it needs; LAEO Eq. 8)."""
    return -log_prob
