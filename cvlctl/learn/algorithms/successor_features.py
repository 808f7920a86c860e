"""Successor features, CVL's baseline (its Table 3; Barreto et al. 2017, Filos et al. 2021): what the policy's futures
hold of learned features c(s'), times what a feature is worth.

Three regressions and an actor: c by telling the state that followed a pair from those that followed others (InfoNCE
over next states) and by predicting rewards; w, rewards from features; Psi, discounted sums of features to come under
the actor, by TD. Q = Psi . w.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.data.statistics import labelled_rewards
from cvlctl.errors import CvlctlError
from cvlctl.learn import encoders, networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import contrastive, policy, successor
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.types import Number, Observation, Seeing, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "feature"
PASSES = 8
PASSES_AN_ACTION = 1
CALLS = 650


@dataclass(frozen=True)
class Config:
    """Symbols of the papers in brackets."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    features: Literal["contrastive", "observation"] = "contrastive"  # [phi] learned, or the normalised observation
    feature_dim: Whole = 64  # of contrastive features
    reward_coefficient: Number = 1.0  # of the reward's error beside InfoNCE, in what c learns
    ema_rate: Number = 0.005  # of Psi's target
    num_actions: Whole = 1  # policy samples a state
    bc_coefficient: Number = 0.2  # of behaviour cloning, beside Q in units of its spread over states
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1:
            raise ValueError("gamma must lie in [0, 1) and ema_rate in (0, 1]")
        if min(self.feature_dim, self.num_actions) < 1:
            raise ValueError("feature_dim and num_actions must be positive")
        if min(self.reward_coefficient, self.bc_coefficient) < 0 or self.learning_rate <= 0:
            raise ValueError("reward_coefficient and bc_coefficient must be at or above 0, and learning_rate above it")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    kinds = {
        "action": (config.num_actions, batch_size, spec.action_dim),
        "next_action": (batch_size, spec.action_dim),
    }
    return Draws(batch_size, config.gamma, transitions=True, noise=tuple(kinds.items()))


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """Actor; Psi, twin, as `critic` (E, 2, ...) with its target; encoders of next states `feature` and of pairs `pair`;
    the reward's weights `reward.weight` (E, d + 1), and its scale (E, 1)."""
    (width,) = spec.observation_shape
    if isinstance(spec, Seeing) and config.features == "observation":
        raise CvlctlError("algorithm.features: observation: frames are no features", "take features: contrastive")
    state = networks.normaliser_of(seeds, data.observation) | actors.init(config.hidden, spec, seeds)
    dim = config.feature_dim if config.features == "contrastive" else width
    learned = {"reward.weight": torch.zeros(len(seeds), dim + 1)}
    if config.features == "contrastive":
        learned |= networks.mlp_init("feature", seeds, [width, *config.hidden, dim])
        learned |= encoders.init("feature", spec, seeds)
        learned |= networks.mlp_init("pair", seeds, [width + spec.action_dim, *config.hidden, dim])
    state |= learned | adam_init(learned, "features", learned)
    state |= values.init(config.hidden, spec, seeds, dim + 1, encoder=False)
    scale = labelled_rewards(data).square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6).float()
    return state | {"reward_scale": scale.cpu().expand(len(seeds), 1).clone()}


def seen(params: State, observation: Observation) -> Tensor:
    """*Normalised* observations (E, B, O) as they are; of frames, what the encoder of c makes of them, by which all
    networks see."""
    return networks.see(params, "feature", observation)


def features(config: Config, params: State, observation: Tensor) -> Tensor:
    """c (E, B, d + 1) of *normalised* observations (E, B, O): of norm sqrt(d), and a constant 1 for the reward's mean.

    Psi counts the constant like the others: where an episode terminates, the mean reward ends too.
    """
    x = observation
    if config.features == "contrastive":
        x = F.normalize(networks.mlp(params, "feature", observation), dim=-1) * math.sqrt(config.feature_dim)
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)


def successors(params: State, observation: Tensor, action: Tensor) -> Tensor:
    """Twin (1 - gamma) Psi, (E, 2, B, d + 1), of *normalised* observations (E, B, O) and actions (E, B, A).

    In the scale of the features themselves, whatever gamma is.
    """
    return networks.mlp(params, "critic", torch.cat([observation, action], dim=-1).unsqueeze(1))


def q_values(state: State, observation: Tensor, action: Tensor) -> Tensor:
    """Twin (1 - gamma) Q / reward_scale (E, 2, B), as `successors`."""
    return successor.values(successors(state, observation, action), state["reward.weight"])


def learn_features(
    config: Config, state: State, batch: TransitionBatch, observation: Observation, next_observation: Observation
) -> Metrics:
    """One update of the features (unless they are the observations) and of the reward's weights."""
    reward = batch.reward / state["reward_scale"]

    def loss(params: State) -> tuple[Tensor, Metrics]:
        feature = features(config, params, seen(params, next_observation))
        error = successor.reward_error(feature, params["reward.weight"], reward).mean(dim=-1)
        if config.features == "observation":
            return error.sum(), {"reward/error": error}
        pair = networks.mlp(params, "pair", torch.cat([seen(params, observation), batch.action], dim=-1))
        logits = pair @ feature[..., :-1].mT
        nce = contrastive.info_nce(logits, contrastive.log_partition(logits)).mean(dim=-1)
        total = nce + config.reward_coefficient * error
        return total.sum(), {"features/nce": nce, "reward/error": error}

    names = [name for name in state if name.startswith(("reward.", "feature.", "pair."))]
    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "features", grads, config.learning_rate)
    return metrics


def learn_successors(
    config: Config,
    state: State,
    batch: TransitionBatch,
    observation: Tensor,
    next_observation: Tensor,
    next_action: Tensor,
) -> Metrics:
    """One update of Psi and its target, towards what follows under `next_action` (E, B, A)."""
    ahead = successors(values.target(state), next_observation, next_action)
    ahead = successor.pessimistic(ahead, state["reward.weight"])
    feature = (1 - config.gamma) * features(config, state, next_observation)
    y = successor.successor_target(feature, batch.discount, ahead)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        psi = successors(params, observation, batch.action)
        error = successor.successor_error(psi, y).mean(dim=-1).sum(dim=-1)
        q = successor.values(psi, state["reward.weight"]).mean(dim=(1, 2))
        return error.sum(), {"critic/td": error, "critic/q": q * state["reward_scale"].squeeze(-1) / (1 - config.gamma)}

    return values.update(state, loss, config.learning_rate, config.ema_rate)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of features and reward, of Psi under the actor, and of the actor: greedy on Q = Psi . w, and BC."""
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    metrics = learn_features(config, state, batch, observation, next_observation)
    now, following = (seen(state, x) for x in (observation, next_observation))
    shown = networks.shown(state, next_observation, following)
    next_action, _ = policy.sample_tanh(*networks.actor(state, shown), noise["next_action"])
    metrics |= learn_successors(config, state, batch, now, following, next_action)

    def q(observation: Tensor, action: Tensor) -> Tensor:
        value = q_values(state, observation, action).amin(dim=1)
        # less its mean, which no action changes: `improve` then divides by its spread over states
        return value - value.detach().mean(dim=1, keepdim=True)

    metrics |= actors.improve(
        state, batch, noise["action"], q,
        boltzmann_temperature=0.0, q_coefficient=1.0, bc_coefficient=config.bc_coefficient,
        learning_rate=config.learning_rate, sees_by="feature",
    )  # fmt: skip
    metrics.pop("actor/q")  # of the centred Q: nothing to look at
    return state, metrics
