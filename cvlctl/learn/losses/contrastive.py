"""Contrastive losses of the occupancy critic. Logits f are (..., B, N): row i is a pair (s, a), column j a future;
the positives are on the diagonal (N = B). Every function returns one value a row, (..., B)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log_partition(logits: Tensor) -> Tensor:
    """log sum_j e^f_ij: what InfoNCE and its penalty share, computed once."""
    return torch.logsumexp(logits, dim=-1)


def info_nce(logits: Tensor, partition: Tensor) -> Tensor:
    """l_i = log sum_j e^f_ij - f_ii (CVL Eq. 6 and 9). At the optimum f = log p(s+|s,a)/p(s+) + c(s,a), c free."""
    return partition - logits.diagonal(dim1=-2, dim2=-1)


def partition_penalty(partition: Tensor, num_futures: int, form: str = "log_mean") -> Tensor:
    """(log 1/N sum_j e^f_ij)^2, the log-mean form, or (log sum_j e^f_ij)^2, the paper's log-sum (CVL Eq. 10).

    Log-mean fixes c(s,a) = 0, which makes f the log ratio; log-sum pulls f towards log ratio - log N instead.
    """
    return (partition - math.log(num_futures) if form == "log_mean" else partition).square()


def td_info_nce(logits: Tensor, partition: Tensor, target: Tensor, gamma: float, ended: Tensor, cut: Tensor) -> Tensor:
    """l_i = (1 - gamma) (log sum_j e^f_ij - f_ii) - gamma sum_{j != i} w_ij log softmax_{j != i}(f_i)_j, with
    w_i = softmax_{j != i} of the target f(s'_i, a'_i, s'_j): Contrastive Difference Predictive Coding (arXiv
    2310.20141). At the optimum f = log p^pi(s+|s,a)/p(s') + c(s,a) for a' of pi, and p(s') the law of the next states.

    Column j is the next state of row j: the positive of its own row, and a random state to all others.

    Args:
        target: (..., B, B) without gradient.
        ended: (..., B) bool: s' is terminal, and itself the target of both terms.
        cut: (..., B) bool: no a' is known; the row counts for nothing.
    """
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    first = info_nce(logits, partition)
    weight = torch.softmax(target.masked_fill(own, -torch.inf), dim=-1)
    others = torch.log_softmax(logits.masked_fill(own, -torch.inf), dim=-1).masked_fill(own, 0.0)
    second = torch.where(ended, first, -(weight * others).sum(dim=-1))
    return torch.where(cut, 0.0, (1 - gamma) * first + gamma * second)


def spectral(f: Tensor) -> Tensor:
    """l_i = mean_{j != i} f_ij^2 - 2 f_ii (HaoChen et al. 2021, Eq. 6). At the optimum f = p(s+|s,a)/p(s+): the ratio
    itself, not its logarithm."""
    own = f.diagonal(dim1=-2, dim2=-1)
    return (f.square().sum(dim=-1) - own.square()) / (f.shape[-1] - 1) - 2 * own


def td_spectral(f: Tensor, target: Tensor, gamma: float, ended: Tensor, cut: Tensor) -> Tensor:
    """l_i = mean_{j != i} f_ij^2 - 2 ((1 - gamma) f_ii + gamma mean_{j != i} g_ij f_ij), with g_i the target
    f(s'_i, a'_i, s'_j). At the optimum f = p^pi(s+|s,a)/p(s') for a' of pi: the Bellman equation of the occupancy,
    (1 - gamma) p(s'|s,a) + gamma E p^pi(s+|s',a'), in its least squares. Arguments are those of `td_info_nce`."""
    own = torch.eye(f.shape[-1], dtype=torch.bool, device=f.device)
    positive = f.diagonal(dim1=-2, dim2=-1)
    following = (target * f).masked_fill(own, 0.0).sum(dim=-1) / (f.shape[-1] - 1)
    following = torch.where(ended, positive, following)
    return torch.where(cut, 0.0, spectral(f) + 2 * gamma * (positive - following))


def binary_nce(logits: Tensor) -> Tensor:
    """l_i = softplus(-f_ii) + mean_{j != i} softplus(f_ij) (LAEO Eq. 5). At the optimum f = log p(s+|s,a)/p(s+).

    Positives and negatives are averaged apart: the mean over all N^2 logits weights the negatives N - 1 times too much.
    """
    positive = logits.diagonal(dim1=-2, dim2=-1)
    negatives = F.softplus(logits).sum(dim=-1) - F.softplus(positive)
    return F.softplus(-positive) + negatives / (logits.shape[-1] - 1)
