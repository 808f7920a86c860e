"""Contrastive Value Learning (CoRL 2023): a policy from reward labels on futures. Algorithm 1 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.data.statistics import reward_statistics
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, occupancy, readouts
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Flag, Number, OccupancyBatch, Spec, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "phi"
CALLS = 419


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets."""

    __pydantic_config__ = {"extra": "forbid"}

    critic: occupancy.Config = field(default_factory=occupancy.Config)  # from scratch only; else the pretrained run's
    mode: Literal["auto", "scratch", "continue", "frozen"] = "auto"  # auto: continue with init_from, else scratch
    # iterated: Q is of the policy that is being made, not of the data's; needs a critic of a td_ loss
    improvement: Literal["one_step", "iterated"] = "one_step"
    readout: Literal["exact", "fourier", "coreset"] = "exact"  # Eq. 11, Eq. 12, k-means centres of many banks
    normaliser: Literal["self", "none"] = "self"  # none is the paper's
    bank_size: Whole = 1024  # futures with rewards drawn for each step's readout
    num_features: Whole = 1024  # [d] frequencies of the Fourier readout
    fourier_form: Literal["paired", "phase"] = "paired"  # phase is the paper's (Lemma 1)
    orthogonal: Flag = False  # frequencies at right angles: less spread
    xi_ema_rate: Number = 1.0  # [beta] of xi, and of the coreset's sums; 1 uses this step's bank alone
    time_bins: Whole = 0  # fourier only: above 0, one xi for each such stretch of the episode [xi_0..xi_H]
    coreset_size: Whole = 256  # centres
    num_actions: Whole = 1  # [N_a] policy samples a state
    actor_form: Literal["reparameterised", "sampled"] = "reparameterised"  # sampled: Q is never differentiated
    boltzmann_temperature: Number = 0.1  # [tau] of Eq. 13, in units of the readout's mean |Q|
    bc_coefficient: Number = 0.2  # [lambda_BC] of Eq. 15
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        occupancy.check_improvement(self.improvement, self.mode)
        if min(self.bank_size, self.num_features, self.num_actions) < 1:
            raise ValueError("bank_size, num_features and num_actions must be positive")
        if self.boltzmann_temperature < 0 or self.bc_coefficient < 0 or self.learning_rate <= 0:
            raise ValueError("boltzmann_temperature and bc_coefficient must be at or above 0, learning_rate above")
        if not 0 < self.xi_ema_rate <= 1:
            raise ValueError("xi_ema_rate must lie in (0, 1]")
        if self.time_bins < 0 or (self.time_bins and self.readout != "fourier"):
            raise ValueError("time_bins must be at or above 0, and belongs to readout: fourier")
        if self.readout == "coreset" and not 1 <= self.coreset_size <= self.bank_size:
            raise ValueError("coreset_size must lie between 1 and bank_size")
        if self.actor_form == "sampled" and self.num_actions < 2:
            raise ValueError("actor_form: sampled compares actions of one state: num_actions must be at least 2")
        if (self.critic.twin or occupancy.linear(self.critic)) and self.readout != "exact":
            raise ValueError(
                f"critic.{'twin' if self.critic.twin else 'loss: ' + self.critic.loss} needs readout: exact"
            )


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    train_critic = config.mode != "frozen"
    following = occupancy.following_noise(config.critic, spec, batch_size, config.improvement) if train_critic else ()
    noise = (("action", (config.num_actions, batch_size, spec.action_dim)), *following)
    return Draws(
        batch_size, **occupancy.law(config.critic), futures=train_critic, bank=config.bank_size,
        times=config.time_bins > 0, noise=noise,
    )  # fmt: skip


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """The critic's state, the actor's, the reward's statistics, and the Fourier readout's frequencies."""
    state = occupancy.init(config.critic, spec, seeds, data)
    state |= actors.init(config.hidden, spec, seeds)
    mean, std = reward_statistics(data, **occupancy.law(config.critic))
    state["reward_mean"], state["reward_std"] = (x.cpu().expand(len(seeds), 1).clone() for x in (mean, std))
    if config.readout == "fourier":
        averaged = config.xi_ema_rate < 1 or config.time_bins > 0
        state |= readouts.fourier_init(
            seeds, config.num_features, config.critic.latent_dim, config.fourier_form, config.orthogonal, averaged,
            max(1, config.time_bins),
        )  # fmt: skip
    elif config.readout == "coreset":
        state |= readouts.coreset_init(seeds, config.coreset_size, config.critic.latent_dim)
    if config.time_bins:
        state["horizon"] = torch.full((len(seeds), 1), spec.horizon)
    return state


def bank(config: Config, state: State, batch: OccupancyBatch) -> tuple[Tensor, Tensor]:
    """psi (E, M, latent) of this step's bank of futures, and their rewards (E, M) in units of the reward's spread.

    Self-normalised, Q is centred: (Q - mean) / std, the same argmax. Eq. 11 as written is not centred.
    """
    rewards = batch.bank_reward / state["reward_std"]
    if config.normaliser == "self":
        rewards = (batch.bank_reward - state["reward_mean"]) / state["reward_std"]
    return occupancy.bank_psi(config.critic, state, batch.bank_observation), rewards


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """Algorithm 1, lines 4-12: update the critic (unless frozen), read out Q, update the actor (Eq. 13-15)."""
    metrics: Metrics = {}
    if config.mode != "frozen":
        state, metrics = occupancy.step(config.critic, state, batch, noise)
    psi, rewards = bank(config, state, batch)
    read = readouts.exact(psi, rewards, config.normaliser, occupancy.linear(config.critic))
    if config.readout == "coreset":
        read = readouts.coreset(state, psi, rewards, config.normaliser, config.xi_ema_rate)
    elif config.readout == "fourier" and config.time_bins == 0:
        read = readouts.fourier(state, psi, rewards, config.normaliser, config.xi_ema_rate)
    elif config.readout == "fourier":
        bank_bin, pair_bin = (_time_bin(config, state, time) for time in (batch.bank_time, batch.time))
        pair_bin = pair_bin.repeat(1, config.num_actions)
        read = readouts.fourier_by_time(state, psi, rewards, bank_bin, pair_bin, config.normaliser, config.xi_ema_rate)

    def q(observation: Tensor, action: Tensor) -> Tensor:
        return read(occupancy.phi(config.critic, state, observation, action))

    metrics |= actors.improve(
        state, batch, noise["action"], q, boltzmann_temperature=config.boltzmann_temperature,
        q_coefficient=1.0, bc_coefficient=config.bc_coefficient, learning_rate=config.learning_rate,
        sampled=config.actor_form == "sampled",
    )  # fmt: skip
    if config.readout != "exact":
        metrics["readout_agreement"] = _agreement(config, state, batch, q, psi, rewards)
    return state, metrics


def _time_bin(config: Config, state: State, time: Tensor) -> Tensor:
    return (time * config.time_bins // state["horizon"]).clamp(max=config.time_bins - 1)


def _agreement(
    config: Config, state: State, batch: OccupancyBatch, q: readouts.Q, psi: Tensor, rewards: Tensor
) -> Tensor:
    """Pearson correlation (E,) of the readout with the exact one over this step's bank, on the pairs of the batch."""
    observation = occupancy.seen(state, networks.normalise(state, batch.observation)).repeat(1, config.num_actions, 1)
    action = batch.action.repeat(1, config.num_actions, 1)
    phi = occupancy.phi(config.critic, state, observation, action)
    pairs = (q(observation, action), readouts.exact(psi, rewards, config.normaliser)(phi))
    fast, slow = (x.detach() - x.detach().mean(dim=1, keepdim=True) for x in pairs)
    return (fast * slow).sum(dim=1) / (fast.norm(dim=1) * slow.norm(dim=1) + 1e-12)
