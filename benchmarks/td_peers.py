"""Beside our TD learners: d3rlpy's, set to our hyper-parameters, and TD3+BC as a plain eager PyTorch loop."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import common
import numpy as np
import torch
import torch.nn.functional as F
from common import SPEC, Contestant
from torch import Tensor, nn

from cvlctl.data import statistics
from cvlctl.data.samplers import Data
from cvlctl.learn.algorithms import ALGORITHMS, cql, iql, td3_bc
from cvlctl.learn.settings import Settings
from cvlctl.types import Spec

BATCH = 256  # of all sides


def library() -> ModuleType:
    """d3rlpy, without gym's notice and its own log of every buffer."""
    with contextlib.redirect_stderr(io.StringIO()):
        import d3rlpy
    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    return d3rlpy


def default_config(method: str, num_actions: int) -> Any:
    """cvlctl's own defaults; CQL draws `num_actions` of each kind."""
    return cql.Config(num_actions=num_actions) if method == "cql" else ALGORITHMS[method].Config()


def peer(method: str, config: Any, data: Data) -> Any:
    """d3rlpy's learner with the hyper-parameters of `config` and the statistics of `data`; not built yet.

    Its squared TD error has no factor 1/2, so that the weight of CQL's penalty beside it is twice that of CQL Eq. 4.
    """
    d3rlpy = library()
    mean, std = (x.numpy() for x in statistics.observation_statistics(data.observation))
    encoder = d3rlpy.models.VectorEncoderFactory(list(config.hidden))
    settings: dict[str, Any] = {
        "observation_scaler": d3rlpy.preprocessing.StandardObservationScaler(mean, std),
        "batch_size": BATCH,
        "gamma": config.gamma,
        "tau": config.ema_rate,
        "actor_learning_rate": config.learning_rate,
        "critic_learning_rate": config.learning_rate,
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
    }
    if isinstance(config, td3_bc.Config):
        settings |= {
            "alpha": config.q_coefficient,
            "target_smoothing_sigma": config.policy_noise,
            "target_smoothing_clip": config.noise_clip,
            "update_actor_interval": config.actor_every,
        }
        return d3rlpy.algos.TD3PlusBCConfig(**settings).create(device="cpu")
    if isinstance(config, iql.Config):
        scale = iql.RETURN_RANGE / float(statistics.return_range(data))
        settings |= {
            "expectile": config.expectile,
            "weight_temp": config.inverse_temperature,
            "reward_scaler": d3rlpy.preprocessing.MultiplyRewardScaler(scale),
            "value_encoder_factory": encoder,
        }
        return d3rlpy.algos.IQLConfig(**settings).create(device="cpu")
    settings |= {
        "actor_learning_rate": config.actor_learning_rate,
        "temp_learning_rate": config.actor_learning_rate,
        "conservative_weight": 2 * config.conservative_weight,
        "alpha_learning_rate": 0.0,  # the weight stays: no Lagrange multiplier
        "initial_alpha": 1.0,
        "n_action_samples": config.num_actions,
        "soft_q_backup": False,
    }
    return d3rlpy.algos.CQLConfig(**settings).create(device="cpu")


def peer_buffer(data: Data) -> Any:
    """d3rlpy's replay buffer of the same transitions.

    Of n rows it makes n - 1 transitions where an episode was cut off, and n where it terminated, the last of these
    without a next observation: so the final observation goes in, with its padding action, or stays out.
    """
    d3rlpy = library()
    observation, action = data.observation.numpy(), data.action.numpy()
    received = np.append(data.arrival_reward[0, 1:].numpy(), np.float32(0))  # after the action of the row
    where = data.layout
    last, first = np.unique(where.last.numpy(), return_index=True)
    episodes = []
    for start, end, terminated in zip(where.row.numpy()[first], last, where.terminated.numpy()[first], strict=True):
        rows = slice(start, end if terminated else end + 1)
        reward = received[rows].copy()
        if not terminated:
            reward[-1] = 0.0  # the padding row's, which belongs to the next episode
        episodes.append(
            d3rlpy.dataset.Episode(observation[rows], action[rows], reward[:, None], terminated=bool(terminated))
        )
    return d3rlpy.dataset.ReplayBuffer(d3rlpy.dataset.InfiniteBuffer(), episodes=episodes)


def theirs(algo: Any, buffer: Any, settings: Settings) -> Contestant:
    """What d3rlpy's `fit` does at each step, less its log and progress bar."""
    algo.build_with_dataset(buffer)

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):
            algo.update(buffer.sample_transition_batch(BATCH))

    return run


class PlainTD3BC:
    """TD3+BC as people write it: a module a network, copies as targets, one update after the other."""

    def __init__(self, spec: Spec, config: td3_bc.Config) -> None:
        (width,), self.config, self.count = spec.observation_shape, config, 0
        self.actor = nn.Sequential(*self._layers(width, config.hidden, spec.action_dim), nn.Tanh())
        self.critic_1 = nn.Sequential(*self._layers(width + spec.action_dim, config.hidden, 1))
        self.critic_2 = nn.Sequential(*self._layers(width + spec.action_dim, config.hidden, 1))
        self.modules = [self.actor, self.critic_1, self.critic_2]
        self.targets = [copy.deepcopy(module) for module in self.modules]
        both = [*self.critic_1.parameters(), *self.critic_2.parameters()]
        self.critic_optimiser = torch.optim.Adam(both, lr=config.learning_rate)
        self.actor_optimiser = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)

    @staticmethod
    def _layers(width: int, hidden: Sequence[int], outputs: int) -> list[nn.Module]:
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        return [*layers, nn.Linear(width, outputs)]

    def update(
        self, observation: Tensor, action: Tensor, reward: Tensor, discount: Tensor, after: Tensor, noise: Tensor
    ) -> None:
        """One update on (B, ...), observations normalised; the actor and the targets every `actor_every`-th time."""
        config, (actor_target, *critic_targets) = self.config, self.targets
        self.count += 1
        with torch.no_grad():
            disturbance = (noise * config.policy_noise).clamp(-config.noise_clip, config.noise_clip)
            pair = torch.cat([after, (actor_target(after) + disturbance).clamp(-1, 1)], dim=1)
            next_q = torch.min(*[critic(pair) for critic in critic_targets]).squeeze(1)
            y = reward + discount * next_q
        pair = torch.cat([observation, action], dim=1)
        loss = F.mse_loss(self.critic_1(pair).squeeze(1), y) + F.mse_loss(self.critic_2(pair).squeeze(1), y)
        self.critic_optimiser.zero_grad()
        loss.backward()
        self.critic_optimiser.step()
        if self.count % config.actor_every:
            return
        chosen = self.actor(observation)
        q = self.critic_1(torch.cat([observation, chosen], dim=1))
        loss = F.mse_loss(chosen, action) - config.q_coefficient / q.abs().mean().detach() * q.mean()
        self.actor_optimiser.zero_grad()
        loss.backward()
        self.actor_optimiser.step()
        for module, target in zip(self.modules, self.targets, strict=True):
            for weight, average in zip(module.parameters(), target.parameters(), strict=True):
                average.data.copy_(config.ema_rate * weight.data + (1 - config.ema_rate) * average.data)


def plain(config: td3_bc.Config, data: Data, settings: Settings) -> Contestant:
    """PlainTD3BC on batches indexed from tensors in memory, as wide as ours."""
    mean, std = statistics.observation_statistics(data.observation)
    row, ends = data.layout.row, data.layout.terminated & (data.layout.row + 1 == data.layout.last)
    observations, actions = (data.observation[row] - mean) / std, data.action[row]
    next_observations, rewards = (data.observation[row + 1] - mean) / std, data.arrival_reward[0, row + 1]
    discounts = config.gamma * (~ends).float()
    learner = PlainTD3BC(SPEC, config)

    def run(updates: int) -> None:
        common.configure(settings)
        for _ in range(updates):
            index = torch.randint(len(row), (BATCH,))
            action = actions[index]
            learner.update(
                observations[index], action, rewards[index], discounts[index], next_observations[index],
                torch.randn_like(action),
            )  # fmt: skip

    return run
