"""The tanh-Gaussian actor that every method trains: one initialisation, one update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from cvlctl import networks
from cvlctl.losses import policy
from cvlctl.networks import State
from cvlctl.training import Metrics, adam_init, adam_update, value_and_grad
from cvlctl.types import OccupancyBatch, Spec


def init(hidden: Sequence[int], spec: Spec, seeds: Sequence[int]) -> State:
    """The actor's weights and its Adam moments."""
    state = networks.actor_init(seeds, spec.observation_shape[0], spec.action_dim, hidden)
    return state | adam_init(state, "actor", list(state))


def update(state: State, loss: Callable[[State], tuple[Tensor, Metrics]], learning_rate: float) -> Metrics:
    """One Adam step on the actor."""
    names = [name for name in state if name.startswith("actor.")]
    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "actor", grads, learning_rate)
    return metrics


def improve(
    state: State,
    batch: OccupancyBatch,
    noise: Tensor,
    q: Callable[[Tensor, Tensor], Tensor],
    *,
    boltzmann_temperature: float,
    q_coefficient: float,
    bc_coefficient: float,
    learning_rate: float,
) -> Metrics:
    """One actor step on q_coefficient KL(pi || exp(Q / tau)) + bc_coefficient BC (CVL Eq. 15; LAEO Eq. 9 with tau = 0).

    Q is divided by its detached mean absolute value, so that one bc_coefficient serves rewards and ratios of any scale.

    Args:
        noise: (E, num_actions, B, A) standard normal.
        q: *normalised* observations (E, N, O) and actions (E, N, A) -> (E, N), for N = num_actions * B.
    """
    observation = networks.normalise(state, batch.observation)
    num_actions, batch_size = noise.shape[1:3]
    tiled = observation.repeat(1, num_actions, 1)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = networks.actor(params, observation)
        action, log_prob = policy.sample_tanh(mean.unsqueeze(1), log_std.unsqueeze(1), noise)
        values = q(tiled, action.flatten(1, 2)).unflatten(1, (num_actions, batch_size))
        scale = values.detach().abs().mean(dim=(1, 2), keepdim=True) + 1e-8
        kl = policy.boltzmann_kl((values / scale).movedim(1, 0), log_prob.movedim(1, 0), boltzmann_temperature)
        cloning = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, batch.action))
        total = (q_coefficient * kl + bc_coefficient * cloning).mean(dim=-1)
        metrics = {
            "actor/q": values.mean(dim=(1, 2)),
            "actor/bc": cloning.mean(dim=-1),
            "actor/entropy": -log_prob.mean(dim=(1, 2)),
        }
        return total.sum(), metrics

    return update(state, loss, learning_rate)
