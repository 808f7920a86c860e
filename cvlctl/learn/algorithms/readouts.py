"""CVL's readouts: Q of state-action pairs from a bank of futures with rewards. One function each; see cvl.Config."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlctl.data.samplers import generator
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.networks import State

Readout = Callable[[Tensor], Tensor]  # phi (E, N, latent) -> Q (E, N)
Q = Callable[[Tensor, Tensor], Tensor]  # *normalised* observations (E, N, O) and actions (E, N, A) -> Q (E, N)


def exact(psi: Tensor, rewards: Tensor, normaliser: str, linear: bool = False) -> Readout:
    """Q over the bank itself (CVL Eq. 11): psi (E, M, latent), rewards (E, M); twin critics give the smaller Q.

    `linear`: f is the ratio itself (`occupancy.linear`).
    """
    if linear:
        shared = rewards if psi.dim() == 3 else rewards.unsqueeze(1).expand(-1, psi.shape[1], -1)
        return lambda phi: _smaller(occupancy_q.q_linear(phi, psi, shared, normaliser))
    read = occupancy_q.q_self_normalised if normaliser == "self" else occupancy_q.q_raw
    if psi.dim() == 3:
        return lambda phi: read(phi @ psi.mT, rewards)
    both = rewards.unsqueeze(1).expand(-1, psi.shape[1], -1)
    return lambda phi: _smaller(read(phi @ psi.mT, both))


def _smaller(q: Tensor) -> Tensor:
    return q.amin(dim=1) if q.dim() == 3 else q


def fourier_init(
    seeds: Sequence[int], num_features: int, latent_dim: int, form: str, orthogonal: bool, averaged: bool, bins: int
) -> State:
    """Frequencies W (E, D, latent), phases (E, D) of the phase form, and where sums are averaged over steps, those.

    Orthogonal: blocks of `latent` rows at right angles, with the lengths of Gaussian rows: the same mean, less spread.
    """
    state: State = {}
    gens = [generator(seed, "fourier", 0) for seed in seeds]
    frequencies = [torch.randn((num_features, latent_dim), generator=g) for g in gens]
    if orthogonal:
        frequencies = [torch.cat([_at_right_angles(rows) for rows in w.split(latent_dim)]) for w in frequencies]
    state["fourier_frequencies"] = torch.stack(frequencies)
    if form == "phase":
        state["fourier_phases"] = torch.stack([2 * torch.pi * torch.rand(num_features, generator=g) for g in gens])
    if averaged:
        width = num_features * (2 if form == "paired" else 1)
        state["xi"] = torch.zeros(len(seeds), bins, width, 2)
        state["xi_log_factor"] = torch.zeros(len(seeds), 1)
    return state


def _at_right_angles(rows: Tensor) -> Tensor:
    """Orthogonal rows (n <= d, d) of the same lengths."""
    return torch.linalg.qr(rows.T)[0].T * rows.norm(dim=1, keepdim=True)


def fourier(state: State, psi: Tensor, rewards: Tensor, normaliser: str, ema_rate: float) -> Readout:
    """Q by random Fourier features of the bank, averaged over steps where `ema_rate` is below 1 (CVL Eq. 12)."""
    frequencies, phases = state["fourier_frequencies"], state.get("fourier_phases")
    sums, log_factor = occupancy_q.fourier_sums(*occupancy_q.fourier_features(psi, frequencies, phases), rewards)
    if "xi" in state:
        sums, log_factor = _average(state, sums.unsqueeze(1), log_factor, torch.ones_like(log_factor), ema_rate)
        sums = sums.squeeze(1)
    return lambda phi: occupancy_q.q_fourier(
        *occupancy_q.fourier_features(phi, frequencies, phases), sums, log_factor, normaliser
    )


def fourier_by_time(
    state: State, psi: Tensor, rewards: Tensor, bank_bin: Tensor, pair_bin: Tensor, normaliser: str, ema_rate: float
) -> Readout:
    """Q by one average of features for each stretch of the episode: the memory bank xi_0..xi_H of CVL section 4.2.

    Args:
        bank_bin: (E, M) int64: the stretch in which the transition lay whose future each bank entry is.
        pair_bin: (E, N) int64: the stretch of each pair that will be asked for.
    """
    frequencies, phases = state["fourier_frequencies"], state.get("fourier_phases")
    features, scales = occupancy_q.fourier_features(psi, frequencies, phases)
    top = scales.amax(dim=-1, keepdim=True)
    weight = (scales - top).exp().unsqueeze(1) * F.one_hot(bank_bin, state["xi"].shape[1]).mT  # (E, T, M)
    count = F.one_hot(bank_bin, state["xi"].shape[1]).sum(dim=1)  # (E, T)
    columns = [(weight * column.unsqueeze(1)) @ features for column in (rewards, torch.ones_like(rewards))]
    sums = torch.stack(columns, dim=-1) / count.clamp_min(1)[..., None, None]
    sums, top = _average(state, sums, top, (count > 0).float(), ema_rate)

    def read(phi: Tensor) -> Tensor:
        of_phi, scale = occupancy_q.fourier_features(phi, frequencies, phases)
        own = torch.gather(sums, 1, pair_bin[..., None, None].expand(-1, -1, *sums.shape[2:]))  # (E, N, D', 2)
        return occupancy_q.q_fourier(of_phi, scale, own, top, normaliser)

    return read


def _average(state: State, sums: Tensor, log_factor: Tensor, seen: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Move `xi` (E, T, D', 2) towards `sums` where `seen` (E, T), and give it with its factor e^(E, 1).

    Sums carry the factor e^log_factor: old and new are brought to the larger one first.
    """
    top = torch.maximum(state["xi_log_factor"], log_factor)
    old = (state["xi_log_factor"] - top).exp()[..., None, None] * state["xi"]
    new = (log_factor - top).exp()[..., None, None] * sums
    averaged = old + (rate * seen)[..., None, None] * (new - old)
    state["xi"].copy_(averaged)
    state["xi_log_factor"].copy_(top)
    return averaged, top


def coreset_init(seeds: Sequence[int], size: int, latent_dim: int) -> State:
    """Sums of psi (E, K, latent), of rewards and of ones (E, K, 2): empty, filled from the first banks."""
    return {
        "coreset_psi": torch.zeros(len(seeds), size, latent_dim),
        "coreset_sums": torch.zeros(len(seeds), size, 2),
    }


def coreset(state: State, psi: Tensor, rewards: Tensor, normaliser: str, ema_rate: float) -> Readout:
    """Q over K weighted centres of many steps' banks: k-means in psi, one pass a step, with decaying sums.

    Each bank entry goes to its nearest centre, whose psi, rewards and weight are averages over the last 1 / ema_rate
    steps. A centre that has lost its weight starts again from an entry of this bank; one that found no member (with
    ema_rate 1, where others are nearer to all entries) has no weight, and no part in this Q.
    """
    size = state["coreset_psi"].shape[1]
    one = torch.stack([rewards, torch.ones_like(rewards)], dim=-1)  # (E, M, 2)
    weight = state["coreset_sums"][..., 1:]
    lost = weight < 0.01 / size
    share = 1.0 / psi.shape[1]
    sums = torch.where(lost, share * one[:, :size], state["coreset_sums"])
    centre_sums = torch.where(lost, share * psi[:, :size], state["coreset_psi"])
    centres = _average_of(centre_sums, sums[..., 1:])
    nearest = (psi @ centres.mT - 0.5 * centres.square().sum(dim=-1).unsqueeze(1)).argmax(dim=-1)
    member = F.one_hot(nearest, size).to(psi.dtype).mT * share  # (E, K, M)
    centre_sums = torch.lerp(centre_sums, member @ psi, ema_rate)
    sums = torch.lerp(sums, member @ one, ema_rate)
    state["coreset_psi"].copy_(centre_sums)
    state["coreset_sums"].copy_(sums)
    centres, (reward, weight) = _average_of(centre_sums, sums[..., 1:]), sums.unbind(dim=-1)

    def read(phi: Tensor) -> Tensor:
        logits = phi @ centres.mT
        if normaliser == "self":
            return occupancy_q.q_self_normalised(logits + weight.log().unsqueeze(1), _average_of(reward, weight))
        return (logits.exp() @ reward.unsqueeze(-1)).squeeze(-1) / weight.sum(dim=-1, keepdim=True)

    return read


def _average_of(total: Tensor, weight: Tensor) -> Tensor:
    """total / weight, and 0 where nothing has any weight."""
    return torch.where(weight > 0, total / weight, 0.0)
