"""TD3+BC (Fujimoto and Gu 2021): TD3 whose actor also stays near the logged actions, on normalised observations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, ema_update
from cvlctl.types import Number, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "critic"
PASSES = 4
CALLS = 235


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the defaults are the paper's."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    q_coefficient: Number = 2.5  # [alpha]: weight of Q, divided by its mean absolute value, beside the cloning error
    policy_noise: Number = 0.2  # [sigma] of the target policy's smoothing
    noise_clip: Number = 0.5  # [c]
    actor_every: Whole = 2  # [d] critic updates to one of the actor and of the targets
    ema_rate: Number = 0.005  # [tau]
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1:
            raise ValueError("gamma must lie in [0, 1) and ema_rate in (0, 1]")
        if min(self.q_coefficient, self.policy_noise, self.noise_clip) < 0:
            raise ValueError("q_coefficient, policy_noise and noise_clip must be at or above 0")
        if not 1 <= self.actor_every <= actors.RAREST:
            raise ValueError(f"actor_every must lie in 1 to {actors.RAREST}")
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    noise = (("next_action", (batch_size, spec.action_dim)),)
    return Draws(batch_size, config.gamma, transitions=True, noise=noise)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """Twin critic, deterministic actor (the mean of the tanh-Gaussian network), and averages of both as targets."""
    state = networks.normaliser_of(seeds, data.observation)
    state |= actors.init_deterministic(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)
    return state | {f"target/{name}": state[name].clone() for name in actors.names(state)}


def step(
    config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor], update_actor: bool = True
) -> tuple[State, Metrics]:
    """One update of the critic, and if `update_actor` one of the actor and the targets."""
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    following = values.seen(state, next_observation)

    greedy = actors.greedy(actors.target(state), networks.shown(state, next_observation, following))
    next_action = td.smoothed_action(greedy, noise["next_action"], config.policy_noise, config.noise_clip)
    next_q = values.q_values(values.target(state), following, next_action).amin(dim=1)
    y = td.td_target(batch.reward, batch.discount, next_q)

    ema_rate = config.ema_rate if update_actor else 0.0
    metrics = values.regress(state, observation, batch.action, y, config.learning_rate, ema_rate)
    if not update_actor:
        return state, metrics

    features = values.seen(state, observation)
    shown = networks.shown(state, observation, features)

    def actor_loss(params: State) -> tuple[Tensor, Metrics]:
        action = actors.greedy(params, shown)
        q = values.q_values(state, features, action)[:, 0]
        scale = q.detach().abs().mean(dim=1, keepdim=True) + 1e-8
        cloning = (action - batch.action).square().mean(dim=-1)
        total = (cloning - config.q_coefficient * q / scale).mean(dim=-1)
        return total.sum(), {"actor/bc": cloning.mean(dim=-1)}

    metrics |= actors.update(state, actor_loss, config.learning_rate)
    ema_update(state, "target", actors.names(state), config.ema_rate)
    return state, metrics
