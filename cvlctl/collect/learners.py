"""Online learners: where they differ beside their modules, and how they act."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvlctl.collect.replay import Instants
from cvlctl.collect.source_recipes import ContrastiveSource, OnlineSource
from cvlctl.learn import networks
from cvlctl.learn.algorithms import ONLINE, actors, contrastive_ac, values
from cvlctl.learn.networks import State
from cvlctl.play.policies import NumpyPolicy
from cvlctl.types import Spec

Act = Callable[[np.ndarray, np.ndarray | None], np.ndarray]  # observation (O,), noise (A,) or None: greedy -> (A,)


class Learner(NamedTuple):
    """Where online learners differ, beside their module's `draws` and `step`."""

    module: ModuleType
    config: Any
    init: Callable[[Spec, list[int]], State]
    explore: Callable[[Act, np.ndarray, np.ndarray], np.ndarray]  # how it acts: observation (O,), noise (A,)


def learner_of(source: OnlineSource) -> Learner:
    """The learner that a recipe asks for."""
    module, config = ONLINE[source.name], source.config
    if isinstance(source, ContrastiveSource):
        scale = source.exploration_noise
        return Learner(
            module, config,
            init=lambda spec, seeds: contrastive_ac.init_online(config, spec, seeds, scale),
            explore=lambda act, observation, noise: disturbed(act(observation, None), scale, noise),
        )  # fmt: skip
    return Learner(
        module, config,
        init=partial(module.init, config),
        explore=lambda act, observation, noise: act(observation, noise),
    )  # fmt: skip


def disturbed(action: np.ndarray, scale: float, noise: np.ndarray) -> np.ndarray:
    """The action (A,) with Gaussian noise of standard deviation `scale` on it, inside [-1, 1]."""
    return np.clip(action + np.float32(scale) * noise, -1.0, 1.0)


def acting(state: State, spec: Spec, instants: Instants | None = None) -> Act:
    """The policy of member 0. It follows the weights as they change. With `instants` it sees the latest of them."""
    depth = len(actors.names(state)) // 2
    names = [(f"actor.{i}.weight", f"actor.{i}.bias") for i in range(depth)]
    if instants is None and state["actor.0.weight"].device.type == "cpu":  # numpy on the same memory: no copy
        layers = [(state[w][0].numpy(), state[b][0, 0].numpy()) for w, b in names]
        return NumpyPolicy(layers, state["observation_mean"][0].numpy(), state["observation_std"][0].numpy(), spec)

    @torch.inference_mode()
    def act(observation: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        given = networks.normalise(state, _on(state, observation) if instants is None else instants.latest())
        mean, log_std = networks.actor(state, networks.shown(state, given, values.seen(state, given)))
        if noise is not None:
            mean = mean + log_std.exp() * _on(state, noise)
        return torch.tanh(mean)[0, 0].cpu().numpy()

    return act


def _on(state: State, array: np.ndarray) -> Tensor:
    return torch.from_numpy(array).to(state["actor.0.weight"].device)[None, None]
