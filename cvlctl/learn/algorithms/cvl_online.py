"""CVL as an online learner: soft actor-critic, whose Q is read from a critic of its own policy's occupancy.

The paper's footnote 4 and its outlook: the critic learns by temporal differences (`td_info_nce`), from single
transitions of the replay and without rewards, where the policy in the making leads; other transitions are the bank, in
which the rewards are. A bank of another policy's futures would say what that one is worth: so a step of improvement is
clipped, and the occupancy is that of an averaged policy, which changes slowly.

Observations are not normalised: there is no data yet when training starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cvlctl.data.samplers import Draws, arrival_share
from cvlctl.learn import networks
from cvlctl.learn.algorithms import actors, occupancy, readouts
from cvlctl.learn.losses import policy
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, ema_update
from cvlctl.types import Number, OccupancyBatch, Spec, TransitionBatch, Whole, check_widths

PASSES = 11
CALLS = 636


@dataclass(frozen=True)
class Config:
    """Symbols of the paper in brackets; the actor's are SAC's."""

    __pydantic_config__ = {"extra": "forbid"}

    gamma: Number = 0.99  # discount
    hidden: tuple[Whole, ...] = (256, 256)
    latent_dim: Whole = 64
    learning_rate: Number = 3e-4  # of critic, actor and temperature
    target_rate: Number = 0.01  # by which the critic's target follows
    bank_size: Whole = 256  # transitions whose next states and rewards are the bank
    policy_rate: Number = 0.01  # by which the averaged policy, whose occupancy is learned, follows
    clip: Number = 0.5  # how far actions count as better than the averaged policy's, in each dimension
    target_entropy: Number | None = None  # [H-bar]; None: minus the number of action dimensions
    initial_temperature: Number = 1.0  # [alpha], the entropy's weight, before it is learned

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        _ = self.critic  # raises ValueError
        if self.bank_size < 2 or not 0 < self.policy_rate <= 1 or self.clip <= 0 or self.initial_temperature <= 0:
            raise ValueError(
                "bank_size must be at least 2, policy_rate lie in (0, 1], clip and initial_temperature be above 0"
            )

    @property
    def critic(self) -> occupancy.Config:
        """A twin, as SAC's is."""
        return occupancy.Config(
            loss="td_info_nce", gamma=self.gamma, latent_dim=self.latent_dim, hidden=self.hidden,
            learning_rate=self.learning_rate, twin=True, target_rate=self.target_rate,
        )  # fmt: skip


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    """The bank's transitions follow those of the batch."""
    action = (batch_size, spec.action_dim)
    noise = (("action", action), ("next_action", action))
    return Draws(batch_size + config.bank_size, config.gamma, transitions=True, noise=noise)


def init(config: Config, spec: Spec, seeds: Sequence[int]) -> State:
    """Twin critic with its target, actor with its average, log temperature, Adam's moments, on the CPU."""
    state = networks.no_normaliser(seeds, *spec.observation_shape)
    state |= occupancy.learner(config.critic, spec, seeds) | actors.init(config.hidden, spec, seeds)
    state |= {f"target/{name}": state[name].clone() for name in actors.names(state)}
    return state | actors.temperature_init(seeds, config.initial_temperature)


def step(config: Config, state: State, batch: TransitionBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of critic, actor and temperature; `noise` as SAC's."""
    size = noise["action"].shape[1]
    pairs, bank = _part(batch, slice(size)), _part(batch, slice(size, None))
    observation, following = (networks.normalise(state, x) for x in (pairs.observation, pairs.next_observation))
    with torch.no_grad():
        averaged = actors.target(state)
        old, _ = policy.sample_tanh(*networks.actor(averaged, observation), noise["action"])
        next_action, _ = policy.sample_tanh(*networks.actor(averaged, following), noise["next_action"])
    state, metrics = occupancy.step(config.critic, state, _occupancy_batch(pairs, next_action), {})
    read = _readout(config, state, bank)

    def q(action: Tensor) -> Tensor:
        near = old + (action - old).clamp(-config.clip, config.clip)
        return read(occupancy.phi(config.critic, state, observation, near))

    metrics |= actors.improve_soft(state, observation, noise["action"], q, config.target_entropy, config.learning_rate)
    ema_update(state, "target", actors.names(state), config.policy_rate)
    return state, metrics


def _part(batch: TransitionBatch, rows: slice) -> TransitionBatch:
    part: TransitionBatch = tree_map(lambda x: x[:, rows], batch)
    return part


def _occupancy_batch(pairs: TransitionBatch, next_action: Tensor) -> OccupancyBatch:
    """The transitions, with these actions (E, B, A) at their next states, and no bank."""
    ended, none = pairs.discount == 0, pairs.reward[:, :0]
    return OccupancyBatch(
        pairs.observation, pairs.action, pairs.next_observation, none, none, none, none, next_action, ended,
        torch.zeros_like(ended),
    )  # fmt: skip


def _readout(config: Config, state: State, bank: TransitionBatch) -> readouts.Readout:
    """Q over transitions by their rewards."""
    paid = arrival_share(bank.reward, bank.discount == 0, config.gamma)
    rewards = (paid - paid.mean(dim=1, keepdim=True)) / (paid.std(dim=1, keepdim=True) + 1e-6)
    return readouts.exact(occupancy.bank_psi(config.critic, state, bank.next_observation), rewards, "self")
