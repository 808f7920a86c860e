"""Contrastive Value Learning (CoRL 2023): a policy from reward labels on futures. Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cvlctl import networks
from cvlctl.algorithms import actors, occupancy
from cvlctl.losses import occupancy_q
from cvlctl.networks import State
from cvlctl.samplers import Data, Draws, generator, reward_statistics
from cvlctl.training import Metrics
from cvlctl.types import OccupancyBatch, Spec

LEARNS_FROM = "rewards"


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets."""

    __pydantic_config__ = {"extra": "forbid"}

    critic: occupancy.Config = field(default_factory=occupancy.Config)  # from scratch only; else the pretrained run's
    mode: Literal["auto", "scratch", "continue", "frozen"] = "auto"  # auto: continue with init_from, else scratch
    readout: Literal["exact", "fourier"] = "exact"  # Eq. 11, Eq. 12
    normaliser: Literal["self", "none"] = "self"  # none is the paper's
    bank_size: int = 1024  # futures with rewards drawn for each step's readout
    num_features: int = 1024  # [d] frequencies of the Fourier readout
    fourier_form: Literal["paired", "phase"] = "paired"  # phase is the paper's (Lemma 1)
    xi_ema_rate: float = 1.0  # [beta] of xi; 1 uses this step's bank alone
    num_actions: int = 1  # [N_a] policy samples a state
    boltzmann_temperature: float = 0.1  # [tau] of Eq. 13, in units of the readout's mean |Q|
    bc_coefficient: float = 0.2  # [lambda_BC] of Eq. 15
    hidden: tuple[int, ...] = (256, 256)
    learning_rate: float = 3e-4

    def __post_init__(self) -> None:
        if min(self.bank_size, self.num_features, self.num_actions) < 1 or not self.hidden:
            raise ValueError("bank_size, num_features and num_actions must be positive, and hidden not empty")
        if self.boltzmann_temperature < 0 or self.bc_coefficient < 0 or self.learning_rate <= 0:
            raise ValueError("boltzmann_temperature and bc_coefficient must be at or above 0, learning_rate above")
        if not 0 < self.xi_ema_rate <= 1:
            raise ValueError("xi_ema_rate must lie in (0, 1]")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    noise = (("action", (config.num_actions, batch_size, spec.action_dim)),)
    train_critic = config.mode != "frozen"
    return Draws(batch_size, config.critic.gamma, futures=train_critic, bank=config.bank_size, noise=noise)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """The critic's state, the actor's, the reward's statistics, and the Fourier readout's frequencies."""
    state = occupancy.init(config.critic, spec, seeds, data)
    state |= actors.init(config.hidden, spec, seeds)
    mean, std = reward_statistics(data, config.critic.gamma)
    state["reward_mean"], state["reward_std"] = (x.cpu().expand(len(seeds), 1).clone() for x in (mean, std))
    if config.readout == "fourier":
        gens = [generator(seed, "fourier", 0) for seed in seeds]
        shape = (config.num_features, config.critic.latent_dim)
        state["fourier_frequencies"] = torch.stack([torch.randn(shape, generator=g) for g in gens])
        phases = torch.stack([2 * torch.pi * torch.rand(shape[0], generator=g) for g in gens])
        state |= {"fourier_phases": phases} if config.fourier_form == "phase" else {}
        if config.xi_ema_rate < 1:
            width = shape[0] * (2 if config.fourier_form == "paired" else 1)
            state["xi"] = torch.zeros(len(seeds), width, 2)
            state["xi_log_factor"] = torch.zeros(len(seeds), 1)
    return state


Readout = Callable[[Tensor], Tensor]  # phi (E, N, latent) -> Q (E, N)


def bank(config: Config, state: State, batch: OccupancyBatch) -> tuple[Tensor, Tensor]:
    """psi (E, M, latent) of this step's bank of futures, and their rewards (E, M) in units of the reward's spread.

    Self-normalised, Q is centred: (Q - mean) / std, the same argmax. Eq. 11 as written is not centred.
    """
    rewards = batch.bank_reward / state["reward_std"]
    if config.normaliser == "self":
        rewards = (batch.bank_reward - state["reward_mean"]) / state["reward_std"]
    return occupancy.bank_psi(config.critic, state, batch.bank_observation), rewards


def exact_readout(config: Config, psi: Tensor, rewards: Tensor) -> Readout:
    """Q over the bank itself (Eq. 11)."""
    read = occupancy_q.q_self_normalised if config.normaliser == "self" else occupancy_q.q_raw
    return lambda phi: read(phi @ psi.mT, rewards)


def fourier_readout(config: Config, state: State, psi: Tensor, rewards: Tensor) -> Readout:
    """Q by random Fourier features of the bank, averaged over steps where `xi_ema_rate` is below 1 (Eq. 12)."""
    frequencies, phases = state["fourier_frequencies"], state.get("fourier_phases")
    sums, log_factor = occupancy_q.fourier_sums(*occupancy_q.fourier_features(psi, frequencies, phases), rewards)
    if config.xi_ema_rate < 1:
        # sums carry the factor e^log_factor: bring old and new to the larger one before averaging
        top = torch.maximum(state["xi_log_factor"], log_factor)
        old = (state["xi_log_factor"] - top).exp().unsqueeze(-1) * state["xi"]
        sums = torch.lerp(old, (log_factor - top).exp().unsqueeze(-1) * sums, config.xi_ema_rate)
        state["xi"].copy_(sums)
        state["xi_log_factor"].copy_(top)
        log_factor = top
    return lambda phi: occupancy_q.q_fourier(
        *occupancy_q.fourier_features(phi, frequencies, phases), sums, log_factor, config.normaliser
    )


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """Algorithm 1, lines 4-12: update the critic (unless frozen), read out Q, update the actor (Eq. 13-15)."""
    metrics: Metrics = {}
    if config.mode != "frozen":
        state, metrics = occupancy.step(config.critic, state, batch, noise)
    psi, rewards = bank(config, state, batch)
    exact = exact_readout(config, psi, rewards)
    q_of_phi = exact if config.readout == "exact" else fourier_readout(config, state, psi, rewards)

    def q(observation: Tensor, action: Tensor) -> Tensor:
        return q_of_phi(occupancy.phi(config.critic, state, observation, action))

    metrics |= actors.improve(
        state, batch, noise["action"], q, boltzmann_temperature=config.boltzmann_temperature,
        q_coefficient=1.0, bc_coefficient=config.bc_coefficient, learning_rate=config.learning_rate,
    )  # fmt: skip
    if config.readout == "fourier":
        metrics["fourier_agreement"] = _agreement(config, state, batch, q_of_phi, exact)
    return state, metrics


def _agreement(config: Config, state: State, batch: OccupancyBatch, fourier: Readout, exact: Readout) -> Tensor:
    """Pearson correlation (E,) of the Fourier readout with the exact one on the first 256 pairs of the batch."""
    observation = networks.normalise(state, batch.observation[:, :256])
    phi = occupancy.phi(config.critic, state, observation, batch.action[:, :256]).detach()
    fast, slow = (q - q.mean(dim=1, keepdim=True) for q in (fourier(phi), exact(phi)))
    return (fast * slow).sum(dim=1) / (fast.norm(dim=1) * slow.norm(dim=1) + 1e-12)
