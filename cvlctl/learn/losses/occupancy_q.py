"""Q-values read out of an occupancy critic. f is (..., N, M): N state-action pairs against a bank of M futures drawn
from the marginal p(s+), with the rewards (..., M) received on arriving there. All return (..., N), without the constant
1/(1-gamma)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def q_self_normalised(logits: Tensor, rewards: Tensor) -> Tensor:
    """Q(s,a) = sum_j softmax_j(f_j) r_j: CVL Eq. 11 divided by the same average with r = 1.

    The quotient cancels every error of the learned partition function, which Eq. 11 multiplies by the mean reward.
    """
    return (torch.softmax(logits, dim=-1) @ rewards.unsqueeze(-1)).squeeze(-1)


def q_raw(logits: Tensor, rewards: Tensor) -> Tensor:
    """Q(s,a) = 1/M sum_j exp(f_j) r_j (CVL Eq. 11 as written)."""
    return (logits.exp() @ rewards.unsqueeze(-1)).squeeze(-1) / logits.shape[-1]


def q_linear(phi: Tensor, psi: Tensor, rewards: Tensor, normaliser: str, weights: Tensor | None = None) -> Tensor:
    """Q(s,a) = phi . xi_r / phi . xi_1 (`self`), or phi . xi_r (`none`), of a critic whose f is the ratio itself: the
    bank is one mean vector, xi_r = 1/M sum_j psi_j r_j.

    Args:
        phi, psi, rewards: (..., N, d), (..., M, d), (..., M).
        weights: (M,) of mean 1: what the futures count for; None: all alike.
    """
    columns = torch.stack([rewards, torch.ones_like(rewards)], dim=-1)
    if weights is not None:
        columns = columns * weights.unsqueeze(-1)
    sums = psi.mT.to(columns.dtype) @ columns / rewards.shape[-1]
    none = phi.new_zeros(1)
    return q_fourier(phi.to(columns.dtype), none, sums, none, normaliser)


def log_q_examples(logits: Tensor) -> Tensor:
    """log Q(s,a) = log 1/M sum_j exp(f_j) over success examples (LAEO Eq. 7), in log space against overflow."""
    return torch.logsumexp(logits, dim=-1) - math.log(logits.shape[-1])


def fourier_features(x: Tensor, frequencies: Tensor, phases: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """exp(x.y) ~ e^(|x|^2/2 + |y|^2/2) F(x).F(y): random features F(x) (..., N, D') and log-scales |x|^2/2 (..., N).

    CVL Lemma 1, freed from unit norms. Features from `encode` are divided by sqrt(temperature) already, so W ~ N(0, I).

    Args:
        x: (..., N, d).
        frequencies: W, (..., D, d).
        phases: b (..., D) for the paper's form sqrt(2/D) cos(Wx + b), D' = D; None for the paired form
            sqrt(1/D) (cos Wx, sin Wx), D' = 2D, whose error vanishes at x = y.
    """
    projected = x @ frequencies.transpose(-1, -2)
    scale = 0.5 * x.square().sum(dim=-1)
    if phases is not None:
        return math.sqrt(2 / frequencies.shape[-2]) * torch.cos(projected + phases.unsqueeze(-2)), scale
    paired = torch.cat([torch.cos(projected), torch.sin(projected)], dim=-1)
    return paired / math.sqrt(frequencies.shape[-2]), scale


def fourier_sums(features: Tensor, scales: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """xi = 1/M sum_j e^(scale_j) F(psi_j) (r_j, 1), (..., D', 2), and the log of the factor taken out of it, (..., 1).

    The two columns are Eq. 12's xi and the same sum with r = 1, which the self-normalised form divides by.
    """
    top = scales.amax(dim=-1, keepdim=True)
    weighted = features * (scales - top).exp().unsqueeze(-1)
    columns = torch.stack([rewards, torch.ones_like(rewards)], dim=-1)
    return weighted.transpose(-1, -2) @ columns / rewards.shape[-1], top


def q_fourier(features: Tensor, scales: Tensor, sums: Tensor, log_factor: Tensor, normaliser: str = "self") -> Tensor:
    """Q(s,a) = F(phi).xi_r / F(phi).xi_1 (`self`), or e^(scales) F(phi).xi_r (`none`, CVL Eq. 12).

    Args:
        features, scales: of the pairs, (..., N, D') and (..., N).
        sums, log_factor: (..., D', 2) for all pairs, or (..., N, D', 2) for each its own; (..., 1).
    """
    if sums.dim() > features.dim():
        reward, one = (features.unsqueeze(-2) @ sums).squeeze(-2).unbind(dim=-1)
    else:
        reward, one = (features @ sums).unbind(dim=-1)
    if normaliser == "self":
        # the estimate of a positive sum can come out at or below zero where the features are too few
        floor = 1e-3 * one.detach().abs().mean(dim=-1, keepdim=True) + 1e-30
        return reward / torch.maximum(one, floor)
    return reward * (scales + log_factor).exp()
