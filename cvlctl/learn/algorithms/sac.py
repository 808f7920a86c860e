"""Soft actor-critic (Haarnoja et al. 2018), twin critic and learned temperature: the collector of replay stores.

Observations are not normalised (mean 0, std 1, clipped at +-10): there is no data yet when training starts. From frames
the critic's encoder learns by its TD error, and the actor takes the features without gradient or learns its own, as in
DrQ-v2 (Yarats et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from cvlctl.data.samplers import Draws
from cvlctl.learn import encoders, networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, Spec, TransitionBatch, Whole, check_widths

PASSES = 5
CALLS = 365


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the defaults are the usual ones of public implementations."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99  # discount
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4  # of critic, actor and temperature
    ema_rate: Number = 0.005  # [tau] of the target critic
    target_entropy: Number | None = None  # [H-bar]; None: minus the number of action dimensions
    initial_temperature: Number = 1.0  # [alpha], the entropy's weight, before it is learned
    target_max: Number | None = None  # of TD targets: 0 where no reward is positive (the clip of hindsight replay)

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1:
            raise ValueError("gamma must lie in [0, 1)")
        if self.learning_rate <= 0 or self.initial_temperature <= 0:
            raise ValueError("learning_rate and initial_temperature must be positive")
        if not 0 < self.ema_rate <= 1:
            raise ValueError("ema_rate must lie in (0, 1]")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    action = (batch_size, spec.action_dim)
    return Draws(batch_size, config.gamma, transitions=True, noise=(("action", action), ("next_action", action)))


def init(config: Config, spec: Spec, seeds: Sequence[int]) -> State:
    """Actor, log temperature (E, 1), twin critic and its target, with Adam's moments, on the CPU."""
    state = networks.no_normaliser(seeds, encoders.vector_size(spec))
    state |= actors.init(config.hidden, spec, seeds) | values.init(config.hidden, spec, seeds)
    return state | actors.temperature_init(seeds, config.initial_temperature)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of critic, actor, temperature and target, in that order.

    Args:
        noise: `action` and `next_action`, each (E, B, A) standard normal.
    """
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    temperature = state["log_temperature"].exp()

    following = values.seen(state, next_observation)
    next_shown = networks.shown(state, next_observation, following)
    next_action, next_log_prob = policy.sample_tanh(*networks.actor(state, next_shown), noise["next_action"])
    next_q = values.q_values(values.target(state), following, next_action)
    y = td.td_target(batch.reward, batch.discount, td.soft_value(next_q, next_log_prob, temperature))
    if config.target_max is not None:
        y = y.clamp(max=config.target_max)

    metrics = values.regress(state, observation, batch.action, y, config.learning_rate, config.ema_rate)

    features = values.seen(state, observation)
    shown = networks.shown(state, observation, features)

    def q(action: Tensor) -> Tensor:
        return values.q_values(state, features, action).amin(dim=1)

    metrics |= actors.improve_soft(state, shown, noise["action"], q, config.target_entropy, config.learning_rate)
    return state, metrics
