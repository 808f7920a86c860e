"""Networks as init/apply pairs over flat dicts of tensors with a leading member axis.

Every parameter is (E, ...), every input (E, B, ...): the E seeds of a run are one batched matmul. A twin critic is
one more axis of the same kind: parameters (E, 2, in, out) broadcast against inputs (E, 1, B, in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from cvlctl.data.samplers import generator
from cvlctl.data.statistics import never_varied, observation_statistics
from cvlctl.learn import encoders
from cvlctl.learn.encoders import State
from cvlctl.types import Observation, Views

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
_layer_dtype: torch.dtype | None = None  # that layers multiply in; None: their weights' own
CLIP = 10.0  # of normalised observations: a dimension that hardly varied in the data must not explode at test time
NEVER_VARIED = 2.0**100  # std of an observation's column that had one value: whatever comes in there, networks see 0


def mlp_init(
    name: str, seeds: Sequence[int], sizes: Sequence[int], *, layer_norm: bool = False, copies: int = 0
) -> State:
    """Weights (E, in, out) and biases (E, 1, out), uniform in +-1/sqrt(in), of `<name>.0`, `<name>.1`, ...

    Member k depends on (seeds[k], name) alone, so a seed starts alike alone and in company.

    Args:
        sizes: input, hidden..., output widths.
        layer_norm: add a scale and shift after each hidden layer (LayerNorm before the ReLU).
        copies: with copies = c > 0 each parameter gets an axis (E, c, ...): c independent networks a member.
    """
    params: State = {}
    lead = (copies,) if copies else ()
    gens = [generator(seed, f"init/{name}", 0) for seed in seeds]
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        bound = 1.0 / math.sqrt(fan_in)
        for part, shape in (("weight", (*lead, fan_in, fan_out)), ("bias", (*lead, 1, fan_out))):
            params[f"{name}.{i}.{part}"] = torch.stack([(2 * torch.rand(shape, generator=g) - 1) * bound for g in gens])
        if layer_norm and i < len(sizes) - 2:
            params[f"{name}.{i}.scale"] = torch.ones(len(seeds), *lead, 1, fan_out)
            params[f"{name}.{i}.shift"] = torch.zeros(len(seeds), *lead, 1, fan_out)
    return params


@contextmanager
def layers_in(dtype: torch.dtype) -> Iterator[None]:
    """Within, the layers of all networks multiply in `dtype`. Weights, losses and all else stay float32."""
    global _layer_dtype
    before, _layer_dtype = _layer_dtype, dtype
    try:
        yield
    finally:
        _layer_dtype = before


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W + b for x (E, B, in), W (E, in, out), or with a twin axis: x (E, c or 1, B, in), W (E, c, in, out)."""
    if _layer_dtype is not None:
        x, weight, bias = x.to(_layer_dtype), weight.to(_layer_dtype), bias.to(_layer_dtype)
    if weight.dim() == 4:
        members, copies = weight.shape[:2]
        x = x.expand(members, copies, *x.shape[2:]).flatten(0, 1)
        return linear(x, weight.flatten(0, 1), bias.flatten(0, 1)).unflatten(0, (members, copies))
    if torch.compiler.is_compiling() and weight.shape[-1] > 1:
        # one pass for bias and ReLU, instead of one that fills the result with the bias beforehand: the same bits, but
        # not at width 1, where the compiler makes a sum of the product
        return torch.bmm(x, weight) + bias
    return torch.baddbmm(bias, x, weight)


def mlp(params: State, name: str, x: Tensor, start: int = 0) -> Tensor:
    """ReLU network from layer `start` on; the last layer is linear. (E, B, in) -> (E, B, out)."""
    i = start
    while True:
        x = linear(x, params[f"{name}.{i}.weight"], params[f"{name}.{i}.bias"])
        if f"{name}.{i + 1}.weight" not in params:
            return x.to(params[f"{name}.{i}.bias"].dtype)
        if f"{name}.{i}.scale" in params:
            x = (
                F.layer_norm(x.to(params[f"{name}.{i}.scale"].dtype), x.shape[-1:]) * params[f"{name}.{i}.scale"]
                + params[f"{name}.{i}.shift"]
            )
        x = torch.relu(x)
        i += 1


@overload
def normalise(state: State, observation: Tensor) -> Tensor: ...
@overload
def normalise(state: State, observation: Observation) -> Observation: ...
def normalise(state: State, observation: Observation) -> Observation:
    """clip((s - mean) / std, +-10) with the statistics of the training data, saved beside the weights. (E, B, O); of
    what cameras show beside a vector, the vector alone."""
    if isinstance(observation, Views):
        return observation._replace(vector=normalise(state, observation.vector))
    mean, std = state["observation_mean"].unsqueeze(1), state["observation_std"].unsqueeze(1)
    return ((observation - mean) / std).clamp(-CLIP, CLIP)


def see(params: State, name: str, observation: Observation) -> Tensor:
    """What the network `name` sees (E, B, F) of *normalised* observations: vectors, or features, as they are; of frames
    what its encoder makes of them, which learns where `params` are those of a loss."""
    return encoders.features(params, name, observation, _layer_dtype)


def shown(state: State, observation: Observation, features: Tensor) -> Observation:
    """What the actor is shown: the critic's features, through which no gradient goes back, or where it has an encoder
    of its own the *normalised* observation. Of vectors both are the same."""
    return observation if encoders.has(state, "actor") else features


def normaliser_init(seeds: Sequence[int], mean: Tensor, std: Tensor, constant: Tensor | None = None) -> State:
    """`observation_mean` and `observation_std` (E, O) from (O,); a dimension that hardly varied gets std 1.

    Args:
        constant: (O,) bool, those that never varied. Nothing is learned of them, and nothing may come of them.
    """
    std = torch.where(std < 1e-4, torch.ones_like(std), std)
    if constant is not None:
        std = torch.where(constant, torch.full_like(std, NEVER_VARIED), std)
    return {
        "observation_mean": mean.expand(len(seeds), -1).clone(),
        "observation_std": std.expand(len(seeds), -1).clone(),
    }


def no_normaliser(seeds: Sequence[int], observation_dim: int) -> State:
    """Observations as they are, but for the clip: where there are no data yet to take statistics of."""
    return normaliser_init(seeds, torch.zeros(observation_dim), torch.ones(observation_dim))


def normaliser_of(seeds: Sequence[int], observation: Tensor) -> State:
    """The normaliser of all rows (rows, O), on the CPU."""
    mean, std = observation_statistics(observation)
    return normaliser_init(seeds, mean.cpu(), std.cpu(), never_varied(observation).cpu())


def actor_init(
    seeds: Sequence[int], observation_dim: int, action_dim: int, hidden: Sequence[int], name: str = "actor"
) -> State:
    """Tanh-Gaussian actor; its last layer gives mean and log standard deviation before the tanh."""
    return mlp_init(name, seeds, [observation_dim, *hidden, 2 * action_dim])


def actor(params: State, observation: Observation, name: str = "actor") -> tuple[Tensor, Tensor]:
    """Mean and log std (E, B, A) before the tanh, from *normalised* observations (E, B, O), of frames by an encoder of
    its own."""
    mean, log_std = mlp(params, name, see(params, name, observation)).chunk(2, dim=-1)
    return mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


def critic_init(
    seeds: Sequence[int],
    observation_dim: int,
    action_dim: int,
    hidden: Sequence[int],
    latent_dim: int,
    layer_norm: bool,
    future_dim: int | None = None,
    copies: int = 0,
) -> State:
    """The occupancy critic's two encoders: `phi` of (observation, action) and `psi` of a future observation.

    `future_dim`: how many columns of a future psi sees; None: all.
    """
    widths = {"phi": observation_dim + action_dim, "psi": future_dim or observation_dim}
    state: State = {}
    for name, width in widths.items():
        state |= mlp_init(name, seeds, [width, *hidden, latent_dim], layer_norm=layer_norm, copies=copies)
    return state


def encode(params: State, name: str, x: Tensor, *, unit: bool, temperature: float) -> Tensor:
    """phi or psi, (E, B, in) -> (E, B, latent), divided by sqrt(temperature), so that f = phi . psi in both forms.

    With unit features f = cos(phi, psi) / temperature, which cannot represent ratios beyond exp(1 / temperature).
    """
    z = mlp(params, name, x)
    if unit:
        return F.normalize(z, dim=-1) / math.sqrt(temperature)
    return z
