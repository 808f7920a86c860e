"""Learning to Achieve Examples Offline (L4DC 2023): a policy from success examples, without rewards. Its Algorithm 1.

Q(s,a) = mean over examples of e^f (Eq. 7). Averaged over states as it is (Eq. 8), the few that have all but succeeded
hold most of the sum: on a real replay a tenth of the states held 79 % of it, and the others were left to behaviour
cloning. The default maximises Q / (1 + Q) instead: increasing in Q, so that the best action of every state stays the
best, and bounded. It is the posterior of Eq. 5's classifier that a success was drawn from this pair's future rather
than from the marginal. `readout: ratio` is the paper's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn.algorithms import actors, occupancy
from cvlctl.learn.losses import occupancy_q
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, OccupancyBatch, Spec, Whole, check_widths

LEARNS_FROM = "examples"
SEES_BY = "phi"
CALLS = 409


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets."""

    __pydantic_config__ = {"extra": "forbid"}

    critic: occupancy.Config = field(default_factory=occupancy.binary_nce)  # from scratch; else the pretrained run's
    mode: Literal["auto", "scratch", "continue", "frozen"] = "auto"  # auto: continue with init_from, else scratch
    # iterated: Q is of the policy that is being made, not of the data's; needs a critic of a td_ loss
    improvement: Literal["one_step", "iterated"] = "one_step"
    readout: Literal["posterior", "ratio"] = "posterior"  # Q / (1 + Q), or Q itself, the paper's (Eq. 7 to 9)
    num_examples: Whole = 200  # success examples in each step's average; all of them where there are fewer
    num_actions: Whole = 1  # policy samples a state
    bc_coefficient: Number = 0.2  # [lambda]; Q has the weight 1 - lambda
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        occupancy.check_improvement(self.improvement, self.mode)
        if self.num_examples < 1 or self.num_actions < 1:
            raise ValueError("num_examples and num_actions must be positive")
        if not 0 <= self.bc_coefficient <= 1 or self.learning_rate <= 0:
            raise ValueError("bc_coefficient must lie in [0, 1] and learning_rate above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    train_critic = config.mode != "frozen"
    following = occupancy.following_noise(config.critic, spec, batch_size, config.improvement) if train_critic else ()
    noise = (("action", (config.num_actions, batch_size, spec.action_dim)), *following)
    return Draws(
        batch_size, **occupancy.law(config.critic), futures=train_critic, examples=config.num_examples, noise=noise
    )


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    return occupancy.init(config.critic, spec, seeds, data) | actors.init(config.hidden, spec, seeds)


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """Update the critic (Eq. 5, unless frozen), then the actor on Q(s,a) = mean over examples of e^f (Eq. 7, 9)."""
    metrics: Metrics = {}
    if config.mode != "frozen":
        state, metrics = occupancy.step(config.critic, state, batch, noise)
    psi = occupancy.bank_psi(config.critic, state, batch.bank_observation)

    def q(observation: Tensor, action: Tensor) -> Tensor:
        if occupancy.linear(config.critic):
            ratio = (occupancy.phi(config.critic, state, observation, action) @ psi.mT).mean(dim=-1)
            ratio = ratio.amin(dim=1) if config.critic.twin else ratio
            return F.softsign(ratio) if config.readout == "posterior" else ratio  # Q / (1 + |Q|): it may be below 0
        log_q = occupancy_q.log_q_examples(occupancy.phi(config.critic, state, observation, action) @ psi.mT)
        log_q = log_q.amin(dim=1) if config.critic.twin else log_q
        if config.readout == "posterior":
            return torch.sigmoid(log_q)
        # what is averaged over states is e^f and not f; a common factor keeps exp in range, and `improve` rescales
        return (log_q - log_q.detach().amax(dim=-1, keepdim=True)).exp()

    metrics |= actors.improve(
        state, batch, noise["action"], q, boltzmann_temperature=0.0,
        q_coefficient=1.0 - config.bc_coefficient, bc_coefficient=config.bc_coefficient,
        learning_rate=config.learning_rate,
    )  # fmt: skip
    return state, metrics
