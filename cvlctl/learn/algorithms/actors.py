"""The tanh-Gaussian actor that every method trains: one initialisation, one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cvlctl.learn import encoders, networks
from cvlctl.learn.losses import policy, td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.types import Observation, OccupancyBatch, Seeing, Spec, TransitionBatch

RAREST = 10_000  # critic updates to one of the actor: as many programs stand in a list


def init(hidden: Sequence[int], spec: Spec, seeds: Sequence[int]) -> State:
    """The actor's weights, those of an encoder of its own where it has one, and its Adam moments."""
    state = networks.actor_init(seeds, spec.observation_shape[0], spec.action_dim, hidden)
    if isinstance(spec, Seeing) and spec.observe.actor_encoder == "own":
        state |= encoders.init("actor", spec, seeds)
    return state | adam_init(state, "actor", list(state))


def init_deterministic(hidden: Sequence[int], spec: Spec, seeds: Sequence[int], std: float = 0.0) -> State:
    """The same for a method that trains the mean alone: the standard deviation before the tanh is `std` in every state.

    No loss ever moves it: whoever samples the policy's actions later gets them with this noise, and not with that of an
    untrained head. At least e^-5, about 0.007 (`networks.LOG_STD_MIN`).
    """
    state, last = init(hidden, spec, seeds), f"actor.{len(hidden)}"
    state[f"{last}.weight"][..., spec.action_dim :] = 0.0
    state[f"{last}.bias"][..., spec.action_dim :] = math.log(max(std, math.exp(networks.LOG_STD_MIN)))
    return state


def names(state: State) -> list[str]:
    return [name for name in state if name.startswith("actor.")]


def target(state: State) -> State:
    """The averaged actor, under the actor's own names."""
    return {name: state[f"target/{name}"] for name in names(state)}


def greedy(params: State, observation: Observation, name: str = "actor") -> Tensor:
    """tanh of the mean (E, B, A), of *normalised* observations (E, B, O)."""
    return torch.tanh(networks.actor(params, observation, name)[0])


def update(state: State, loss: Callable[[State], tuple[Tensor, Metrics]], learning_rate: float) -> Metrics:
    """One Adam step on the actor."""
    grads, metrics = value_and_grad(loss, state, names(state))
    adam_update(state, "actor", grads, learning_rate)
    return metrics


def improve(
    state: State,
    batch: OccupancyBatch | TransitionBatch,
    noise: Tensor,
    q: Callable[[Tensor, Tensor], Tensor],
    *,
    boltzmann_temperature: float,
    q_coefficient: float,
    bc_coefficient: float,
    learning_rate: float,
    sampled: bool = False,
    sees_by: str = "phi",
) -> Metrics:
    """One actor step on q_coefficient KL(pi || exp(Q / tau)) + bc_coefficient BC (CVL Eq. 15; LAEO Eq. 9 with tau = 0).

    Q is divided by its detached mean absolute value, so that one bc_coefficient serves rewards and ratios of any scale.

    Args:
        noise: (E, num_actions, B, A) standard normal.
        q: *normalised* observations (E, N, O) and actions (E, N, A) -> (E, N), for N = num_actions * B.
        sampled: the gradient by the likelihood of the sampled actions, not through Q; needs several of them a state.
        sees_by: the network whose encoder Q takes its features from.
    """
    observation = networks.normalise(state, batch.observation)
    features = networks.see(state, sees_by, observation)
    shown = networks.shown(state, observation, features)
    num_actions, batch_size = noise.shape[1:3]
    tiled = features.repeat(1, num_actions, 1)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = networks.actor(params, shown)
        action, log_prob = policy.sample_tanh(mean.unsqueeze(1), log_std.unsqueeze(1), noise)
        if sampled:
            action = action.detach()
            log_prob = policy.log_prob_tanh(mean.unsqueeze(1), log_std.unsqueeze(1), action)
        values = q(tiled, action.flatten(1, 2)).unflatten(1, (num_actions, batch_size))
        scale = values.detach().abs().mean(dim=(1, 2), keepdim=True) + 1e-8
        divergence = policy.sampled_boltzmann_kl if sampled else policy.boltzmann_kl
        kl = divergence((values / scale).movedim(1, 0), log_prob.movedim(1, 0), boltzmann_temperature)
        cloning = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, batch.action))
        total = (q_coefficient * kl + bc_coefficient * cloning).mean(dim=-1)
        metrics = {
            "actor/q": values.mean(dim=(1, 2)),
            "actor/bc": cloning.mean(dim=-1),
            "actor/entropy": -log_prob.mean(dim=(1, 2)),
        }
        return total.sum(), metrics

    return update(state, loss, learning_rate)


def temperature_init(seeds: Sequence[int], initial: float) -> State:
    """The entropy's weight that is learned beside a soft actor: its logarithm (E, 1), with Adam moments."""
    state = {"log_temperature": torch.full((len(seeds), 1), initial).log()}
    return state | adam_init(state, "temperature", state)


def improve_soft(
    state: State,
    observation: Observation,
    noise: Tensor,
    q: Callable[[Tensor], Tensor],
    target_entropy: float | None,
    learning_rate: float,
) -> Metrics:
    """One actor step on E[alpha log pi(a|s) - Q(s,a)], then one of alpha towards the target entropy (SAC Eq. 7, 18).

    Args:
        observation: (E, B, O), *normalised*.
        noise: (E, B, A) standard normal.
        q: the smaller of the twin Q-values, actions (E, B, A) -> (E, B).
        target_entropy: None: minus the number of action dimensions.
    """
    temperature = state["log_temperature"].exp()
    target = -float(noise.shape[-1]) if target_entropy is None else target_entropy

    def actor_loss(params: State) -> tuple[Tensor, Metrics]:
        action, log_prob = policy.sample_tanh(*networks.actor(params, observation), noise)
        value = q(action) - temperature * log_prob
        return -value.mean(dim=-1).sum(), {"log_prob": log_prob}

    log_prob = update(state, actor_loss, learning_rate)["log_prob"]

    def temperature_loss(params: State) -> tuple[Tensor, Metrics]:
        loss = td.temperature_loss(params["log_temperature"], log_prob, target)
        return loss.mean(dim=-1).sum(), {}

    grads, _ = value_and_grad(temperature_loss, state, ["log_temperature"])
    adam_update(state, "temperature", grads, learning_rate)
    return {"actor/entropy": -log_prob.mean(dim=-1), "temperature": temperature.squeeze(-1)}
