"""Encoders of frames in front of networks: pure functions over flat dicts of tensors with a leading member axis.

A network that learns from frames keeps its encoder's weights under its own name: `critic.camera0.small.2.weight` (E,
...) is the third layer of a `small` encoder of the first camera. So whatever is done to a network (its moments, its
average, taking it over from another run) is done to its encoder too. `features` is where frames become features, by the
weights it is handed: inside a loss the encoder learns, outside it does not, and with a vector nothing happens at all.

A member's convolutions run one after the other, channels last: on a CPU twice as fast as grouped ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from cvlctl.data.samplers import generator
from cvlctl.errors import CvlctlError
from cvlctl.play import convolutions
from cvlctl.types import Observation, Observe, Seeing, Spec, Views

State = dict[str, Tensor]
TABLES = ("phi", "psi")  # whose features stand side by side where those of all frames were computed beforehand


def seeing(spec: Spec, observe: Observe | None) -> Spec:
    """What networks are to be made for: the spec as it is, or with the width of what encoders make of its cameras."""
    if observe is None:
        return spec
    width = spec.observation_shape[0] + observe.features * len(observe.cameras)
    return Seeing(**{**asdict(spec), "observation_shape": (width,)}, observe=observe)


def vector_size(spec: Spec) -> int:
    """How many columns of a vector are seen, beside any features."""
    (width,) = spec.observation_shape
    return width - spec.observe.features * len(spec.observe.cameras) if isinstance(spec, Seeing) else width


def init(name: str, spec: Spec, seeds: Sequence[int]) -> State:
    """The encoders in front of a network, of each camera; none where a vector is all that is seen.

    Weights are uniform with the variance 2 / fan-in (1 / fan-in of the last, linear layer), biases 0: the features of
    different frames differ from the first. Member k depends on (seeds[k], name) alone.

    Raises:
        CvlctlError: frames are too small for the encoder.
    """
    if not isinstance(spec, Seeing):
        return {}
    state: State = {}
    see = spec.observe
    for i, camera in enumerate(see.cameras):
        shapes = convolutions.shapes(see.encoder, spec.cameras[camera], see.stack, see.features)
        if not shapes[-1][0]:
            height, width, _ = spec.cameras[camera]
            what = f"observe.encoder: {see.encoder}: the frames of camera {camera}, {height}x{width}, are too small"
            raise CvlctlError(what, "take encoder: small, which sees frames of any size")
        stem = f"{name}.camera{i}.{see.encoder}"
        gens = [generator(seed, f"init/{stem}", 0) for seed in seeds]
        for j, shape in enumerate(shapes):
            fan_in, out = (math.prod(shape[1:]), shape[0]) if len(shape) == 4 else shape
            bound = math.sqrt((6 if len(shape) == 4 else 3) / fan_in)
            weight = [(2 * torch.rand(shape, generator=g) - 1) * bound for g in gens]
            state[f"{stem}.{j}.weight"], state[f"{stem}.{j}.bias"] = torch.stack(weight), torch.zeros(len(seeds), out)
    return state


def features(params: Mapping[str, Tensor], name: str, observation: Observation, dtype: torch.dtype | None) -> Tensor:
    """What a network sees (E, B, F): the vector, and the features of each camera by the encoder in front of it. A
    vector, or features, are what they are.

    Args:
        observation: as `networks.normalise` gives it.
        dtype: in which layers multiply; None: their weights' own.
    """
    if not isinstance(observation, Views):
        return observation
    return torch.cat([observation.vector, *_cameras(params, name, observation.frames, dtype)], dim=-1)


def _cameras(
    params: Mapping[str, Tensor], name: str, frames: tuple[Tensor, ...], dtype: torch.dtype | None
) -> list[Tensor]:
    if all(camera.dim() == 3 for camera in frames):  # computed beforehand
        return [camera.chunk(len(TABLES), dim=-1)[TABLES.index(name)] for camera in frames]
    found = []
    for i, camera in enumerate(frames):
        kind, layers = convolutions.layers_of(params, f"{name}.camera{i}")
        members = [list(zip(*(part.unbind(0) for part in layer), strict=True)) for layer in layers]
        found.append(
            torch.stack([
                convolutions.encode(kind, [layer[k] for layer in members], stacks, dtype)
                for k, stacks in enumerate(camera.unbind(0))
            ])
        )  # fmt: skip
    return found


def has(params: Mapping[str, Tensor], name: str) -> bool:
    """Whether a network has encoders of its own."""
    return any(part.startswith(f"{name}.camera") for part in params)
