"""The twin Q-function that every temporal-difference method trains: initialisation, evaluation, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cvlctl.learn import encoders, networks
from cvlctl.learn.losses import td
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, ema_update, value_and_grad
from cvlctl.types import Observation, Spec


def init(hidden: Sequence[int], spec: Spec, seeds: Sequence[int], outputs: int = 1, encoder: bool = True) -> State:
    """Twin critic (E, 2, in, out), its target, and its Adam moments, on the CPU.

    Twins share an encoder of frames; `encoder` off: none is learned here, and features come from elsewhere. The target
    has none: it sees by the critic's own (as in DrQ-v2), so that a next state is encoded once.
    """
    sizes = [spec.observation_shape[0] + spec.action_dim, *hidden, outputs]
    critic = networks.mlp_init("critic", seeds, sizes, copies=2)
    state = critic | {f"target/{name}": value.clone() for name, value in critic.items()}
    state |= encoders.init("critic", spec, seeds) if encoder else {}
    return state | adam_init(state, "critic", names(state))


def names(state: State) -> list[str]:
    return [name for name in state if name.startswith("critic.")]


def target(state: State) -> State:
    """The averaged critic, under the critic's own names."""
    return {name: state[f"target/{name}"] for name in averaged(state)}


def averaged(state: State) -> list[str]:
    """What of the critic has an average: all but encoders."""
    return [name for name in names(state) if f"target/{name}" in state]


def seen(state: State, observation: Observation) -> Tensor:
    """*Normalised* observations (E, B, O) as they are; of frames, the features of the critic's encoder. No gradient."""
    return networks.see(state, "critic", observation)


def q_values(params: State, observation: Observation, action: Tensor) -> Tensor:
    """Twin Q (E, 2, B) of *normalised* observations (E, B, O) and actions (E, B, A)."""
    pair = torch.cat([networks.see(params, "critic", observation), action], dim=-1)
    return networks.mlp(params, "critic", pair.unsqueeze(1)).squeeze(-1)


def q_values_of_many(params: State, observation: Tensor, action: Tensor) -> Tensor:
    """Twin Q (E, 2, B, K) of K actions (E, B, K, A) in each state (E, B, O), *normalised*.

    The first layer sees every state once, and not K times: the sum of its two halves is what it would make of the pair.
    """
    weight, bias = params["critic.0.weight"], params["critic.0.bias"]
    width, (batch_size, count) = observation.shape[-1], action.shape[1:3]
    of_state = networks.linear(observation.unsqueeze(1), weight[..., :width, :], bias)
    no_bias = torch.zeros_like(bias)
    of_action = networks.linear(action.flatten(1, 2).unsqueeze(1), weight[..., width:, :], no_bias)
    x = torch.relu(of_action.unflatten(2, (batch_size, count)) + of_state.unsqueeze(3)).flatten(2, 3)
    return networks.mlp(params, "critic", x, start=1).squeeze(-1).unflatten(2, (batch_size, count))


def update(
    state: State, loss: Callable[[State], tuple[Tensor, Metrics]], learning_rate: float, ema_rate: float
) -> Metrics:
    """One Adam step on the critic, and unless `ema_rate` is 0 one of its average towards it."""
    grads, metrics = value_and_grad(loss, state, names(state))
    adam_update(state, "critic", grads, learning_rate)
    if ema_rate > 0:
        ema_update(state, "target", averaged(state), ema_rate)
    return metrics


def regress(
    state: State, observation: Observation, action: Tensor, y: Tensor, learning_rate: float, ema_rate: float
) -> Metrics:
    """One update on (Q_i(s,a) - y)^2 / 2, both twins towards the same target y (E, B)."""

    def loss(params: State) -> tuple[Tensor, Metrics]:
        q = q_values(params, observation, action)
        error = td.squared_td_error(q, y).mean(dim=-1).sum(dim=-1)
        return error.sum(), {"critic/td": error, "critic/q": q.mean(dim=(1, 2))}

    return update(state, loss, learning_rate, ema_rate)
