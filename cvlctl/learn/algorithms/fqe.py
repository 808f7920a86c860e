"""Fitted Q evaluation (Le et al. 2019): what a finished policy is worth, told from a store, without an environment.

The policy is another run's (`init_from`) and stays as it is; Q is fitted to r + gamma Q(s', pi(s')), pi greedy, as it
is evaluated. The estimate is Q(s0, pi(s0)), averaged over the store's first observations: what the discounted return
of an episode would be. It can be off by as much as Q is beyond the store's actions: rank policies by it, with care.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from cvlctl.data.samplers import NO_SHIFT, Data, Draws, generator, observed
from cvlctl.data.statistics import labelled_rewards
from cvlctl.learn import encoders, networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics
from cvlctl.types import Number, Observation, Spec, TransitionBatch, Views, Whole, check_widths

LEARNS_FROM = "rewards"
SEES_BY = "critic"
PASSES = 4
CALLS = 200
STARTS_FROM = "policy"  # what init_from must hold, and what is taken over


@dataclass(frozen=True)
class Config:
    """What is wrong at first in Q fades as e^(-steps ema_rate (1 - gamma)): some 5 times 1 / that, or the estimate is
    still on its way (the metric `estimate` shows it)."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    ema_rate: Number = 0.02  # of the target
    num_initial: Whole = 512  # first observations of episodes, at most, that the estimate averages over
    hidden: tuple[Whole, ...] = (256, 256)
    policy_hidden: tuple[Whole, ...] = (256, 256)  # of the policy: init_from brings it
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        check_widths(self.policy_hidden, "policy_hidden")
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1:
            raise ValueError("gamma must lie in [0, 1) and ema_rate in (0, 1]")
        if self.num_initial < 1 or self.learning_rate <= 0:
            raise ValueError("num_initial and learning_rate must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    return Draws(batch_size, config.gamma, transitions=True)


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """Twin critic with its target, a policy to be replaced, `initial_observation` (E, n, O), beside it what cameras
    show, `initial_frames0` (E, n, S, H, W, C), and `value_scale` (E, 1)."""
    state = networks.normaliser_of(seeds, data.observation)
    state |= networks.actor_init(seeds, spec.observation_shape[0], spec.action_dim, config.policy_hidden)
    state |= encoders.init("actor", spec, seeds)
    vector, *frames = tree_leaves(initial_observations(data, config.num_initial))
    names = ("initial_observation", *(f"initial_frames{i}" for i in range(len(frames))))
    for name, value in zip(names, (vector, *frames), strict=True):
        state[name] = value.cpu().expand(len(seeds), *value.shape).clone()
    reward = labelled_rewards(data)
    scale = reward.square().mean(dim=1, keepdim=True).sqrt().clamp_min(1e-6) / (1 - config.gamma)
    state["value_scale"] = scale.float().cpu().expand(len(seeds), 1).clone()
    state |= values.init(config.hidden, spec, seeds)
    # Q starts at what the mean reward for ever is worth: what it would else learn last
    level = (reward.mean(dim=1, keepdim=True) / (1 - config.gamma) / scale).float().cpu().view(-1, 1, 1, 1)
    bias = f"critic.{len(config.hidden)}.bias"
    for name in (bias, f"target/{bias}"):
        state[name] = state[name] + level
    return state


def initial_observations(data: Data, num: int) -> Observation:
    """The first observations (n, O) of at most `num` labelled episodes: a fixed choice, in the order of the rows."""
    row, last = data.layout.row[data.labelled], data.layout.last[data.labelled]
    first = torch.ones_like(last, dtype=torch.bool)
    first[1:] = last[1:] != last[:-1]
    rows = row[first]
    chosen = torch.randperm(len(rows), generator=generator(0, "initial", 0))[:num].sort().values
    return tree_map(lambda x: x[0], observed(data, rows[chosen.to(rows.device)].unsqueeze(0), NO_SHIFT))


def estimate(state: State) -> Tensor:
    """Mean over the initial observations of the averaged critic's Q(s0, pi(s0)), (E,), in units of the return."""
    seen: Observation = state["initial_observation"]
    if frames := [state[name] for name in state if name.startswith("initial_frames")]:
        seen = Views(state["initial_observation"], tuple(frames))
    observation = networks.normalise(state, seen)
    features = values.seen(state, observation)
    action = actors.greedy(state, networks.shown(state, observation, features))
    q = values.q_values(values.target(state), features, action)
    return q.mean(dim=(1, 2)) * state["value_scale"].squeeze(-1)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of the critic and its target. The twins bootstrap apart: their mean is the estimate, and not their
    minimum, which would be too low."""
    observation = networks.normalise(state, batch.observation)
    next_observation = networks.normalise(state, batch.next_observation)
    following = values.seen(state, next_observation)
    next_action = actors.greedy(state, networks.shown(state, next_observation, following))
    next_q = values.q_values(values.target(state), following, next_action)
    reward = batch.reward / state["value_scale"]
    y = td.td_target(reward.unsqueeze(1), batch.discount.unsqueeze(1), next_q)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        q = values.q_values(params, observation, batch.action)
        error = td.squared_td_error(q.unsqueeze(2), y).mean(dim=-1).sum(dim=(1, 2))
        return error.sum(), {"critic/td": error, "critic/q": q.mean(dim=(1, 2)) * state["value_scale"].squeeze(-1)}

    metrics = values.update(state, loss, config.learning_rate, config.ema_rate)
    return state, metrics | {"estimate": estimate(state)}
