"""Losses of reward models that are learned from success examples. All per example; logits of any shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def binary_cross_entropy(positive: Tensor, unlabelled: Tensor) -> Tensor:
    """mean l+(positives) + mean l-(unlabelled), l+-(x) = softplus(-+x): ORIL's, every unlabelled state a negative.

    At the optimum sigmoid(logit) = p_E / (p_E + p_U), the densities of examples and of the store.

    Args:
        positive, unlabelled: logits (..., P) and (..., U).

    Returns:
        (...).
    """
    return F.softplus(-positive).mean(dim=-1) + F.softplus(unlabelled).mean(dim=-1)


def non_negative_pu(positive: Tensor, unlabelled: Tensor, prior: float) -> Tensor:
    """eta mean l+(positives) + max(0, mean l-(unlabelled) - eta mean l-(positives)): PURL's (Xu and Denil 2019).

    eta is the share of successes among the unlabelled states; what is left of them after the positives' part is
    negative, and the clamp at 0 stops an overfitted network from making it less than nothing.
    """
    negative = F.softplus(unlabelled).mean(dim=-1) - prior * F.softplus(positive).mean(dim=-1)
    return prior * F.softplus(-positive).mean(dim=-1) + torch.relu(negative)
