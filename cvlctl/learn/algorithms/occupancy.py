"""The occupancy critic f(s, a, s+) = phi(s, a) . psi(s+): CVL Eq. 6, 9, 10; LAEO Eq. 5. Learned without rewards.

At its optimum f = log p(s+ | s, a) / p(s+), where p(s+ | s, a) is the discounted state occupancy of the policy that
collected the data; under `td_info_nce` and `td_spectral`, which learn from single transitions, that of any policy whose
actions are put at the next states, and p(s+) is then the law of these. The spectral losses learn the ratio as it is, so
that Q is linear in phi; the others its logarithm. psi sees the final observation for the absorbing state,
with no flag: arriving at a terminal state and staying there have the same ratio (their probabilities differ by the
constant gamma / (1 - gamma), both given (s, a) and in the marginal).

psi may see some columns of a future alone (`future_columns`: a goal, say where the object lies); f is then the log
ratio of those columns' occupancy. Where the observation itself states a commanded goal (`command_columns`), neither phi
nor psi sees the statement: it says what the collector was after, not what the actions do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cvlctl.data.samplers import Data, Draws
from cvlctl.data.statistics import never_varied, observation_statistics
from cvlctl.errors import CvlctlError
from cvlctl.learn import encoders, networks
from cvlctl.learn.algorithms import actors
from cvlctl.learn.losses import contrastive, policy
from cvlctl.learn.networks import State
from cvlctl.learn.updates import Metrics, adam_init, adam_update, ema_update, value_and_grad
from cvlctl.types import Flag, Number, Observation, OccupancyBatch, Seeing, Spec, Whole, check_widths

CALLS = 165
POLICY = "policy"  # networks of a finished policy, in the state of a critic that learns its occupancy


@dataclass(frozen=True)
class Config:
    """Symbols of the papers in brackets."""

    __pydantic_config__ = {"extra": "forbid"}

    # CVL Eq. 9, LAEO Eq. 5, CDPC Eq. 10; spectral ones learn the ratio itself, not its logarithm
    loss: Literal["info_nce", "binary_nce", "td_info_nce", "spectral", "td_spectral"] = "info_nce"
    gamma: Number = 0.99  # discount
    partition_coefficient: Number = 0.01  # [lambda_Partition], of losses with a partition: info_nce, td_info_nce
    penalty: Literal["log_mean", "log_sum"] = "log_mean"  # what Eq. 10 squares; log_sum is the paper's
    features: Literal["free", "unit"] = "free"  # norms of phi and psi
    temperature: Number = 1.0  # of unit features
    latent_dim: Whole = 64
    hidden: tuple[Whole, ...] = (512, 512)
    layer_norm: Flag = False
    learning_rate: Number = 3e-4
    twin: Flag = False  # two critics side by side; readouts take the smaller Q
    ema_rate: Number = 0.0  # [beta] of psi; above 0, readouts use the averaged psi
    target_rate: Number = 0.05  # of td_ losses' targets, an update: they settle in 1 / (target_rate (1 - gamma))
    future_columns: tuple[Whole, ...] | None = None  # of an observation, that make a future (a goal); None: all
    command_columns: tuple[Whole, ...] = ()  # in which the observation states a goal for future_columns, one for one

    def __post_init__(self) -> None:
        check_widths(self.hidden)
        if not 0 <= self.gamma < 1:
            raise ValueError("gamma must lie in [0, 1)")
        if self.temperature <= 0 or self.learning_rate <= 0 or self.latent_dim < 1:
            raise ValueError("temperature, learning_rate and latent_dim must be positive")
        if not 0 <= self.ema_rate <= 1 or self.partition_coefficient < 0:
            raise ValueError("ema_rate must lie in [0, 1] and partition_coefficient at or above 0")
        if not 0 < self.target_rate <= 1:
            raise ValueError("target_rate must lie in (0, 1]")
        if self.features == "free" and self.temperature != 1.0:
            raise ValueError("temperature belongs to features: unit")
        for name, columns in (("future_columns", self.future_columns), ("command_columns", self.command_columns)):
            if columns is not None and (min(columns, default=0) < 0 or len(set(columns)) < len(columns)):
                raise ValueError(f"{name} must be different numbers at or above 0")
        if self.future_columns == ():
            raise ValueError("future_columns must not be empty; leave it out where a future is the whole observation")
        if self.command_columns and len(self.command_columns) != len(self.future_columns or ()):
            raise ValueError(
                "command_columns state a goal for future_columns: give as many of these, in the same order"
            )
        if set(self.command_columns) & set(self.future_columns or ()):
            raise ValueError("command_columns and future_columns must not share a column")


def binary_nce() -> Config:
    """The defaults of methods that read e^f as it is: c(s, a) = 0 at the optimum."""
    return Config(loss="binary_nce")


def by_next(config: Config) -> bool:
    """Whether it learns from single transitions, and stands on the law of next states."""
    return config.loss.startswith("td_")


def linear(config: Config) -> bool:
    """Whether f is the ratio p(s+ | s, a) / p(s+) itself; else it is the ratio's logarithm."""
    return config.loss.endswith("spectral")


def check_improvement(improvement: str, mode: str) -> None:
    """Raise a ValueError where a method cannot learn the occupancy of its own policy."""
    if improvement == "iterated" and mode == "frozen":
        raise ValueError("improvement: iterated goes on learning the critic: mode must not be frozen")


def of_policy(batch: OccupancyBatch, action: Tensor) -> OccupancyBatch:
    """The batch with these actions (E, B, A) at its next observations: none of them is unknown."""
    return batch._replace(next_action=action, cut=torch.zeros_like(batch.cut))


def draws(config: Config, spec: Spec, batch_size: int) -> Draws:
    return Draws(batch_size, **law(config), futures=True, noise=following_noise(config, spec, batch_size))


def following_noise(
    config: Config, spec: Spec, batch_size: int, improvement: str = "one_step"
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """What a step of a td_ loss needs for actions at the next states: those of the actor, where a method iterates;
    else, where an episode was cut off and none is logged, those of a policy that is cloned from the data alongside."""
    name = "next_action" if improvement == "iterated" else "behaviour"
    return ((name, (batch_size, spec.action_dim)),) if by_next(config) else ()


def law(config: Config) -> dict[str, Any]:
    """What of `Draws` says which futures a critic stands on."""
    return {"gamma": config.gamma, "next_states": by_next(config)}


def init(config: Config, spec: Spec, seeds: Sequence[int], data: Data) -> State:
    """Weights, Adam's moments and the observation normaliser, on the CPU.

    Raises:
        CvlctlError: future_columns or command_columns name a column that an observation does not have.
    """
    (observation_dim,) = spec.observation_shape
    columns = config.future_columns
    if isinstance(spec, Seeing) and (columns or config.command_columns):
        what = "critic: future_columns and command_columns are of vectors, and critics that see frames have none"
        raise CvlctlError(what, "leave them out, or leave out observe")
    if max((*(columns or ()), *config.command_columns), default=0) >= observation_dim:
        what = f"critic: future_columns {columns}, command_columns {config.command_columns}"
        raise CvlctlError(f"{what}: observations have {observation_dim} columns", "columns count from 0")
    state = learner(config, spec, seeds)
    if by_next(config):
        cloned = networks.actor_init(seeds, observation_dim, spec.action_dim, config.hidden, "behaviour")
        state |= cloned | adam_init(cloned, "behaviour", list(cloned))
    mean, std = observation_statistics(data.observation)
    constant = never_varied(data.observation)
    for command, column in zip(config.command_columns, columns or (), strict=False):
        # a goal stated is normalised as one reached: where the data were collected for a single goal it never varies
        mean[command], std[command], constant[command] = mean[column], std[column], constant[column]
    return state | networks.normaliser_init(seeds, mean.cpu(), std.cpu(), constant.cpu())


def learner(config: Config, spec: Spec, seeds: Sequence[int]) -> State:
    """The weights as they begin, with what an update needs beside them: Adam's moments, averages and targets."""
    state = weights(config, spec, seeds)
    names = list(state)
    state |= adam_init(state, "critic", names)
    if config.ema_rate > 0:
        state |= {f"ema/{name}": state[name].clone() for name in names if name.startswith("psi.")}
    if by_next(config):
        state |= {f"target/{name}": state[name].clone() for name in names}
    return state


def weights(config: Config, spec: Spec, seeds: Sequence[int]) -> State:
    """The weights of phi and psi as they begin, each with an encoder of its own where there are frames."""
    (observation_dim,) = spec.observation_shape
    state = networks.critic_init(
        seeds, observation_dim, spec.action_dim, config.hidden, config.latent_dim, config.layer_norm,
        None if config.future_columns is None else len(config.future_columns), copies=2 if config.twin else 0,
    )  # fmt: skip
    for name in ("phi", "psi"):
        state |= encoders.init(name, spec, seeds)
    return state


def parameter_names(state: State) -> list[str]:
    return [name for name in state if name.startswith(("phi.", "psi."))]


def goal_of(config: Config, observation: Tensor) -> Tensor:
    """The columns of a future that psi sees: (E, B, O) -> (E, B, G)."""
    if config.future_columns is None:
        return observation
    return torch.stack([observation[..., column] for column in config.future_columns], dim=-1)


def seen(state: State, observation: Observation) -> Tensor:
    """*Normalised* observations (E, B, O) as they are; of frames, the features of phi's encoder. No gradient."""
    return networks.see(state, "phi", observation)


def phi(config: Config, params: State, observation: Observation, action: Tensor) -> Tensor:
    """(E, B, O) *normalised*, (E, B, A) -> (E, B, latent), or (E, 2, B, latent) of a twin critic."""
    observation = networks.see(params, "phi", observation)
    if config.command_columns:
        observation = observation.clone()
        for column in config.command_columns:
            observation[..., column].zero_()
    pair = torch.cat([observation, action], dim=-1)
    pair = pair.unsqueeze(1) if config.twin else pair
    return networks.encode(params, "phi", pair, unit=config.features == "unit", temperature=config.temperature)


def psi(config: Config, params: State, observation: Observation) -> Tensor:
    """(E, B, O) *normalised* -> (E, B, latent), or (E, 2, B, latent) of a twin critic."""
    goal = goal_of(config, networks.see(params, "psi", observation))
    goal = goal.unsqueeze(1) if config.twin else goal
    return networks.encode(params, "psi", goal, unit=config.features == "unit", temperature=config.temperature)


def bank_psi(config: Config, state: State, observation: Observation) -> Tensor:
    """psi for readouts, by the averaged weights where `ema_rate` is on. Observations as they are; no gradient."""
    return psi(config, _read_by(config, state), networks.normalise(state, observation)).detach()


def goal_seen(config: Config, state: State, goal: Observation) -> Tensor:
    """*Normalised* goals (E, B, O) as they are; of frames, the features of the psi that readouts use. No gradient."""
    return networks.see(_read_by(config, state), "psi", goal)


def _read_by(config: Config, state: State) -> State:
    """The psi that readouts use, averaged where `ema_rate` is on."""
    if config.ema_rate == 0:
        return state
    return {name.removeprefix("ema/"): value for name, value in state.items() if name.startswith("ema/psi.")}


def step(config: Config, state: State, batch: OccupancyBatch, noise: dict[str, Tensor]) -> tuple[State, Metrics]:
    """One update of phi and psi. Under a td_ loss they learn the occupancy of the policy of `batch.next_action`: of
    the one that collected the data where these are the logged ones."""
    observation = networks.normalise(state, batch.observation)
    future_observation = networks.normalise(state, batch.future_observation)
    cloning: Metrics = {}
    if f"{POLICY}.0.weight" in state:
        batch = of_policy(batch, _greedy(state, future_observation))
    elif "next_action" in noise:
        shown = networks.shown(state, future_observation, seen(state, future_observation))
        batch = of_policy(batch, _drawn(state, "actor", shown, noise["next_action"]))
    elif "behaviour" in noise:
        batch, cloning = _cloned(
            config, state, batch, seen(state, observation), seen(state, future_observation), noise["behaviour"]
        )
    target = _target(config, state, future_observation, batch.next_action) if by_next(config) else None
    each_twin = (lambda flags: flags.unsqueeze(1)) if config.twin else (lambda flags: flags)

    def loss(params: State) -> tuple[Tensor, Metrics]:
        logits = phi(config, params, observation, batch.action) @ psi(config, params, future_observation).mT
        total, nce, mean_ratio = _errors(config, logits, target, *(each_twin(x) for x in (batch.ended, batch.cut)))
        positive = logits.diagonal(dim1=-2, dim2=-1)
        metrics = {
            "critic/nce": nce.mean(dim=-1),
            "critic/accuracy": (positive >= logits.amax(dim=-1)).float().mean(dim=-1),
            **mean_ratio,
        }
        if config.twin:
            metrics = {name: value.mean(dim=1) for name, value in metrics.items()}
        return total.mean(dim=-1).sum(), metrics

    names = parameter_names(state)
    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "critic", grads, config.learning_rate)
    if config.ema_rate > 0:
        ema_update(state, "ema", [name for name in names if name.startswith("psi.")], config.ema_rate)
    if target is not None:
        ema_update(state, "target", names, config.target_rate)
    return state, metrics | cloning


def _errors(
    config: Config, f: Tensor, target: Tensor | None, ended: Tensor, cut: Tensor
) -> tuple[Tensor, Tensor, Metrics]:
    """Of f (E, [2,] B, B) what each row is charged (E, [2,] B), of that the loss alone, and the mean ratio it has."""
    if linear(config):
        loss = contrastive.spectral(f)
        if target is not None:
            loss = contrastive.td_spectral(f, target, config.gamma, ended, cut)
        return loss, loss, {"critic/mean_ratio": f.mean(dim=(-2, -1))}  # 1 where f is the ratio
    partition = contrastive.log_partition(f)
    mean_ratio = {"critic/log_mean_ratio": partition.mean(dim=-1) - math.log(f.shape[-1])}  # 0 where f is the log ratio
    if config.loss == "binary_nce":
        loss = contrastive.binary_nce(f)
        return loss, loss, mean_ratio
    loss = contrastive.info_nce(f, partition)
    if target is not None:
        loss = contrastive.td_info_nce(f, partition, target, config.gamma, ended, cut)
    penalty = contrastive.partition_penalty(partition, f.shape[-1], config.penalty)
    return loss + config.partition_coefficient * penalty, loss, mean_ratio


def _cloned(
    config: Config, state: State, batch: OccupancyBatch, observation: Tensor, following: Tensor, noise: Tensor
) -> tuple[OccupancyBatch, Metrics]:
    """The batch with an action wherever none is logged, of the policy that is cloned here by one update. It sees by
    phi's encoder."""

    def loss(params: State) -> tuple[Tensor, Metrics]:
        mean, log_std = networks.actor(params, observation, "behaviour")
        error = policy.behaviour_cloning(policy.log_prob_tanh(mean, log_std, batch.action)).mean(dim=-1)
        return error.sum(), {"behaviour/bc": error}

    names = [name for name in state if name.startswith("behaviour.")]
    grads, metrics = value_and_grad(loss, state, names)
    adam_update(state, "behaviour", grads, config.learning_rate)
    drawn = _drawn(state, "behaviour", following, noise)
    return of_policy(batch, torch.where(batch.cut.unsqueeze(-1), drawn, batch.next_action)), metrics


def _drawn(state: State, name: str, observation: Observation, noise: Tensor) -> Tensor:
    """Actions (E, B, A) of a policy of the state, as it is. No gradient."""
    with torch.no_grad():
        return policy.sample_tanh(*networks.actor(state, observation, name), noise)[0]


def _greedy(state: State, observation: Observation) -> Tensor:
    """Actions (E, B, A) of the finished policy that stands in the state, as it is evaluated. No gradient."""
    with torch.no_grad():
        return actors.greedy(state, observation, POLICY)


def _target(config: Config, state: State, following: Observation, action: Tensor) -> Tensor:
    """f of the averaged weights at next states (*normalised*) and actions there, over all of these states; of twins the
    smaller, for both. No gradient."""
    averaged = {name.removeprefix("target/"): value for name, value in state.items() if name.startswith("target/")}
    with torch.no_grad():
        f = phi(config, averaged, following, action) @ psi(config, averaged, following).mT
        return f.amin(dim=1, keepdim=True) if config.twin else f
