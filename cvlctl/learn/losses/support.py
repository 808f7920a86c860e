"""Contrastive support: is this action, or this state, one of the data's? And what a backup makes of the answer.

The log-odds f come from a classifier that tells the data from contrasted samples; (..., B), as all that is returned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def classification(logged: Tensor, contrasted: Tensor) -> Tensor:
    """l_i = softplus(-f(x_i)) + softplus(f(z_i)): binary NCE, as many contrasted z as logged x.

    At the optimum f = log p(x) / q(x), the densities of the data and of the contrasted samples, with no free constant:
    InfoNCE would leave one for each state, and a gate needs to know where 0 is.
    """
    return F.softplus(-logged) + F.softplus(contrasted)


def gate(log_odds: Tensor, slack: float = 1.0) -> Tensor:
    """w = min(1, k e^f) = min(1, k p / q), in [0, 1]: full trust where data are at least 1/k as dense as contrast.

    k = `slack` above 1 keeps a contrast that is concentrated (a policy on its favourite action) from passing for the
    absence of data.
    """
    return (log_odds + math.log(slack)).clamp(max=0.0).exp()


def hold(log_odds: Tensor, slack: float = 1.0) -> Tensor:
    """-log w = max(0, -f - log k): what the actor pays for an action; nothing inside the support, log-odds outside."""
    return torch.relu(-log_odds - math.log(slack))


def gated_value(value: Tensor, safe: Tensor, trust: Tensor) -> Tensor:
    """w Q(s,a) + (1 - w) V_safe(s), w = `trust` in [0, 1]."""
    return torch.lerp(safe, value, trust)


def ceiling(q: Tensor, bound: Tensor, trust: Tensor) -> Tensor:
    """l = (1 - w) max(0, Q(s,z) - V_safe(s))^2 / 2: a contrasted action is worth no more than the data's own.

    Args:
        q: (..., 2, B), twin.
        bound, trust: (..., B), without gradient.

    Returns:
        (..., 2, B).
    """
    excess = torch.relu(q - bound.unsqueeze(-2))
    return (1.0 - trust).unsqueeze(-2) * 0.5 * excess.square()


def anchor(q: Tensor, value: Tensor, trust: Tensor) -> Tensor:
    """l = (1 - w) (Q(z,a) - V_floor)^2 / 2: of a contrasted state nothing is known, and the floor is what it is worth.

    From both sides: where gates are half open, a critic that drifts below the floor would drag its neighbours down.
    Shapes as for `ceiling`.
    """
    return (1.0 - trust).unsqueeze(-2) * 0.5 * (q - value.unsqueeze(-2)).square()


def curriculum(count: Tensor, steps: int, easy: Tensor, hard: Tensor) -> Tensor:
    """easy + (hard - easy) min(1, count / steps): shares of the kinds of contrasted samples, (K,)."""
    return torch.lerp(easy, hard, (count / steps).clamp(max=1.0))


def mixture(kinds: Tensor, u: Tensor, shares: Tensor) -> Tensor:
    """One sample a row, of kind k with probability shares[k].

    Args:
        kinds: (K, ..., B, D), a sample of each kind.
        u: (..., B), uniform in [0, 1].
        shares: (K,), which sum to one.

    Returns:
        (..., B, D).
    """
    index = (u.unsqueeze(-1) >= shares.cumsum(0)[:-1]).sum(dim=-1)
    return torch.take_along_dim(kinds, index[None, ..., None], dim=0).squeeze(0)
