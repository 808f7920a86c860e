"""Contrastive actor-critic: TD3 that trusts its critic only where a classifier, taught by contrast, finds the data.

Two classifiers tell what was logged from what was not: one of actions in a state, f(s,a), and one of states, g(s). The
contrasted samples grow harder as training goes on. Their scores gate the bootstrap (docs/algorithms.md has the proofs):

    y = r + gamma {w(s') [w(s',a') Q(s',a') + (1 - w(s',a')) V(s')] + (1 - w(s')) V_floor},    w = min(1, k e^f).

V is an expectile of Q over logged actions; V_floor a low quantile of V over the batch's states, since at an unseen
state V is a guess as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.data.statistics import reward_statistics
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, values
from cvlctl.learn.losses import support, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, ema_update, value_and_grad
from cvlctl.types import Number, Spec, TransitionBatch, Whole, check_widths

LEARNS_FROM = "rewards"
PASSES = 14
CALLS = 615


@dataclass(frozen=True)
class Config:
    """Our own method: what the proposal leaves open is decided here. TD3's symbols in brackets, with TD3's defaults."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99
    gate: Literal["contrastive", "actor", "none"] = "contrastive"  # actor: holds it alone, no backup; none: plain TD3
    slack: Number = 4.0  # [k] of the gate w = min(1, k e^f): data are trusted down to 1/k of the contrast's density
    hold_coefficient: Number = 1.0  # of -log w, what the actor pays for an action outside the support
    q_coefficient: Number = 2.5  # of the actor's gated Q, divided by the mean absolute Q, beside it
    contrast_coefficient: Number = 1.0  # of the critic's loss on contrasted actions above V, and states off V_floor
    expectile: Number = 0.7  # of Q over logged actions, the safe value V
    floor_quantile: Number = 0.1  # of V over the batch: the safe value of a state that is itself unseen
    shuffled_share: Number = 0.25  # of contrasted actions, at the curriculum's end: logged in another state
    policy_share: Number = 0.5  # the policy's own, with TD3's smoothing noise; the rest is uniform, at first all are
    far: Number = 2.0  # contrasted states, in standard deviations: at first all are logged ones with this much noise,
    near: Number = 0.3  # in the end a third, with a third this little, and a third mixed of two logged states
    curriculum_steps: Whole = 5_000  # updates over which the contrast hardens
    policy_noise: Number = 0.2  # [sigma] of the target policy's smoothing
    noise_clip: Number = 0.5  # [c]
    actor_every: Whole = 2  # [d] critic updates to one of the actor and of the targets
    ema_rate: Number = 0.005  # [tau]
    hidden: tuple[Whole, ...] = (256, 256)
    learning_rate: Number = 3e-4

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1 or not 0 < self.ema_rate <= 1 or not 0 < self.expectile < 1:
            raise ValueError("gamma must lie in [0, 1), ema_rate in (0, 1] and expectile in (0, 1)")
        if not 0 <= self.floor_quantile <= 1:
            raise ValueError("floor_quantile must lie in [0, 1]")
        if min(self.shuffled_share, self.policy_share) < 0 or self.shuffled_share + self.policy_share > 1:
            raise ValueError("shuffled_share and policy_share must be at or above 0, and at most 1 together")
        if min(self.hold_coefficient, self.q_coefficient, self.contrast_coefficient) < 0:
            raise ValueError("hold_coefficient, q_coefficient and contrast_coefficient must be at or above 0")
        if self.slack <= 0:
            raise ValueError("slack must be above 0")
        if min(self.far, self.near, self.policy_noise, self.noise_clip) < 0:
            raise ValueError("far, near, policy_noise and noise_clip must be at or above 0")
        if self.curriculum_steps < 1 or not 1 <= self.actor_every <= actors.RAREST:
            raise ValueError(f"curriculum_steps must be at least 1, actor_every lie in 1 to {actors.RAREST}")
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be above 0")


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    action, observation = (batch_size, spec.action_dim), (batch_size, spec.observation_shape[0])
    noise = {"next_action": action}
    if config.gate != "none":
        noise |= {
            "policy": action,
            "uniform": action,
            "kind": (2, batch_size),
            "state": observation,
            "mix": observation,
        }
    return Draws(batch_size, config.gamma, transitions=True, noise=tuple(noise.items()))


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """TD3's networks and targets, the state value `value.*`, the classifiers `of_action.*` and `of_state.*`.

    `reward_scale` (E, 1) divides rewards by their root mean square over 1 - gamma, which makes Q of the order of one.
    """
    mean, std = (x.cpu() for x in reward_statistics(data, config.gamma))
    scale = (1 - config.gamma) / (mean.square() + std.square()).sqrt()
    actor = actors.init_deterministic(config.hidden, spec, seeds)
    return networks.normaliser_of(seeds, data.observation) | _init(config, spec, seeds, actor, scale)


def init_online(config: Config, spec: Spec, seeds: Sequence[int], exploration_noise: float) -> State:
    """The same where there are no data yet: observations and rewards as they are.

    Whoever samples the policy's actions later gets about what the collection did.
    """
    actor = actors.init_deterministic(config.hidden, spec, seeds, exploration_noise)
    normaliser = networks.no_normaliser(seeds, *spec.observation_shape)
    return normaliser | _init(config, spec, seeds, actor, torch.ones(1, 1))


def _init(config: Config, spec: Spec, seeds: Sequence[int], actor: State, scale: Tensor) -> State:
    state = actor | values.init(config.hidden, spec, seeds)
    state |= {f"target/{name}": state[name].clone() for name in actors.names(state)}
    state["reward_scale"] = scale.expand(len(seeds), 1).clone()
    if config.gate == "none":
        return state
    observation_dim, (action_dim, hidden) = spec.observation_shape[0], (spec.action_dim, config.hidden)
    of_action = networks.mlp_init("of_action", seeds, [observation_dim + action_dim, *hidden, 1])
    of_state = networks.mlp_init("of_state", seeds, [observation_dim, *hidden, 1])
    state |= of_action | of_state
    state |= adam_init(state, "support", [*of_action, *of_state])
    if config.gate == "actor":
        return state
    value = networks.mlp_init("value", seeds, [observation_dim, *hidden, 1])
    return state | value | adam_init(value, "value", value)


def action_log_odds(params: State, observation: Tensor, action: Tensor) -> Tensor:
    """f(s,a) (E, B): log of the logged actions' density over the contrasted ones', at *normalised* observations."""
    return networks.mlp(params, "of_action", torch.cat([observation, action], dim=-1)).squeeze(-1)


def state_log_odds(params: State, observation: Tensor) -> Tensor:
    """g(s) (E, B): log of the logged states' density over the contrasted ones', at *normalised* observations."""
    return networks.mlp(params, "of_state", observation).squeeze(-1)


def state_value(params: State, observation: Tensor) -> Tensor:
    """V(s) (E, B) of *normalised* observations."""
    return networks.mlp(params, "value", observation).squeeze(-1)


def contrasted(
    config: Config, state: State, observation: Tensor, action: Tensor, noise: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Contrasted actions (E, B, A) for the states, and contrasted states (E, B, O), as hard as the updates so far ask.

    Actions: uniform, logged in another state, the policy's. States: a logged one with much noise; coordinates of two;
    one with little noise.
    """
    count = state["adam/support/count"]
    of_action, of_state = torch.special.ndtr(noise["kind"]).unbind(dim=1)
    uniform = torch.special.ndtr(noise["uniform"]) * 2 - 1
    own = td.smoothed_action(actors.greedy(state, observation), noise["policy"], config.policy_noise, config.noise_clip)
    easy, a_third = _shares(count, 1.0, 0.0, 0.0), _shares(count, 1 / 3, 1 / 3, 1 / 3)
    uniform_share = 1 - config.shuffled_share - config.policy_share
    hard = _shares(count, uniform_share, config.shuffled_share, config.policy_share)
    shares = support.curriculum(count, config.curriculum_steps, easy, hard)
    actions = support.mixture(torch.stack([uniform, action.roll(1, dims=1), own]), of_action, shares)

    far, near = observation + config.far * noise["state"], observation + config.near * noise["state"]
    mixed = torch.where(noise["mix"] > 0, observation, observation.roll(1, dims=1))
    shares = support.curriculum(count, config.curriculum_steps, easy, a_third)
    return actions, support.mixture(torch.stack([far, mixed, near]), of_state, shares)


def _shares(like: Tensor, *shares: float) -> Tensor:
    """The numbers (K,) as a tensor, filled in on its device: copying them there from the host would wait for a GPU."""
    return torch.cat([like.new_full((1,), share) for share in shares])


def learn_support(
    config: Config, state: State, observation: Tensor, action: Tensor, noise: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Metrics]:
    """One update of both classifiers: contrasted actions, contrasted states, and how far to trust each (E, B)."""
    z_action, z_state = contrasted(config, state, observation, action, noise)
    twice, actions = observation.repeat(1, 2, 1), torch.cat([action, z_action], dim=1)
    states = torch.cat([observation, z_state], dim=1)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        of_action, z_of_action = action_log_odds(params, twice, actions).chunk(2, dim=1)
        of_state, z_of_state = state_log_odds(params, states).chunk(2, dim=1)
        action_loss = support.classification(of_action, z_of_action).mean(dim=-1)
        state_loss = support.classification(of_state, z_of_state).mean(dim=-1)
        metrics = {
            "support/action": action_loss,
            "support/state": state_loss,
            "z": torch.stack([z_of_action, z_of_state]),
        }
        return (action_loss + state_loss).sum(), metrics

    names = [name for name in state if name.startswith(("of_action.", "of_state."))]
    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "support", grads, config.learning_rate)
    of_action, of_state = support.gate(metrics.pop("z"), config.slack)
    return z_action, z_state, of_action, of_state, metrics


def learn_value(config: Config, state: State, observation: Tensor, action: Tensor) -> Metrics:
    """One update of V towards the expectile of Q over logged actions: no other action is asked for."""
    q = values.q_values(values.target(state), observation, action).amin(dim=1)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        expectile = td.expectile(q - state_value(params, observation), config.expectile).mean(dim=-1)
        return expectile.sum(), {"critic/expectile": expectile}

    grads, metrics = value_and_grad(loss, state, [name for name in state if name.startswith("value.")])
    adam_update(state, "value", grads, config.learning_rate)
    return metrics


def step(
    config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor], update_actor: bool = True
) -> tuple[State, Metrics]:
    """One update of classifiers, V and critic, and if `update_actor` one of the actor and the targets."""
    observation, next_observation = (
        values.seen(state, networks.normalise(state, x)) for x in (batch.observation, batch.next_observation)
    )
    batch_size = batch.action.shape[1]
    metrics: Metrics = {}

    greedy = actors.greedy(actors.target(state), next_observation)
    next_action = td.smoothed_action(greedy, noise["next_action"], config.policy_noise, config.noise_clip)
    next_q = values.q_values(values.target(state), next_observation, next_action).amin(dim=1)
    observations, actions = observation, batch.action
    if config.gate != "none":
        z_action, z_state, z_of_action, z_of_state, metrics = learn_support(config, state, observation, actions, noise)
    if config.gate == "contrastive":
        metrics |= learn_value(config, state, observation, actions)
        value, next_value = state_value(state, torch.cat([observation, next_observation], dim=1)).chunk(2, dim=1)
        lowest = round(config.floor_quantile * (batch_size - 1))
        floor = value.sort(dim=1).values[:, lowest : lowest + 1].expand_as(value)
        of_action = support.gate(action_log_odds(state, next_observation, next_action), config.slack)
        of_state = support.gate(state_log_odds(state, next_observation), config.slack)
        next_q = support.gated_value(support.gated_value(next_q, next_value, of_action), floor, of_state)
        metrics |= {"gate/action": of_action.mean(dim=-1), "gate/state": of_state.mean(dim=-1)}
        # contrasted actions in logged states, then logged actions in contrasted states
        observations = torch.cat([observation, observation, z_state], dim=1)
        actions = torch.cat([batch.action, z_action, batch.action], dim=1)
    y = td.td_target(batch.reward * state["reward_scale"], batch.discount, next_q)

    def critic_loss(params: State) -> tuple[Tensor, Metrics]:
        q = values.q_values(params, observations, actions)
        logged = q[..., :batch_size]
        error = td.squared_td_error(logged, y).mean(dim=-1).sum(dim=-1)
        metrics = {"critic/td": error, "critic/q": logged.mean(dim=(1, 2))}
        if config.gate != "contrastive":
            return error.sum(), metrics
        of_actions, of_states = q[..., batch_size:].chunk(2, dim=-1)
        excess = support.ceiling(of_actions, value, z_of_action) + support.anchor(of_states, floor, z_of_state)
        excess = excess.mean(dim=-1).sum(dim=-1)
        return (error + config.contrast_coefficient * excess).sum(), metrics | {"critic/contrasted": excess}

    ema_rate = config.ema_rate if update_actor else 0.0
    metrics |= values.update(state, critic_loss, config.learning_rate, ema_rate)
    if not update_actor:
        return state, metrics

    def actor_loss(params: State) -> tuple[Tensor, Metrics]:
        action = actors.greedy(params, observation)
        q = values.q_values(state, observation, action)[:, 0]
        scale = q.detach().abs().mean(dim=1, keepdim=True) + 1e-8
        held = torch.zeros_like(q)
        if config.gate != "none":
            log_odds = action_log_odds(state, observation, action)
            held = support.hold(log_odds, config.slack)
            if config.gate == "contrastive":
                q = support.gated_value(q, value, support.gate(log_odds, config.slack))
        total = (config.hold_coefficient * held - config.q_coefficient * q / scale).mean(dim=-1)
        return total.sum(), {"actor/q": q.mean(dim=-1), "actor/hold": held.mean(dim=-1)}

    metrics |= actors.update(state, actor_loss, config.learning_rate)
    ema_update(state, "target", actors.names(state), config.ema_rate)
    return state, metrics
