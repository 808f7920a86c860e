"""Encoders of camera frames, forward: what an image policy plays by, and what `learn.encoders` stacks over members.

Three kinds, all followed by a linear layer, LayerNorm and tanh, so that features lie in (-1, 1):
`small`: four 3x3 convolutions of stride 2, 16-32-64-64, on a CPU eight times as fast as `drq`.
`drq`: four 3x3 convolutions of 32, the first of stride 2, without padding (Yarats et al. 2021).
`impala`: three blocks of 16, 32 and 32, a convolution and a max-pooling followed by two residual pairs (Espeholt et al.
2018; CVL's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = tuple[Tensor, Tensor]  # weight (out, in, 3, 3) or (in, out), and bias (out,)

SMALL, DRQ, IMPALA = (16, 32, 64, 64), (32, 32, 32, 32), (16, 32, 32)


def pixels(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Stacks of frames (N, S, H, W, C) uint8 as a network sees them: (N, S C, H, W) in [-1/2, 1/2], channels last."""
    stacked = torch.stack(frames.unbind(1), dim=3) if frames.shape[1] > 1 else frames.squeeze(1)
    flat = stacked.flatten(3)  # frame by frame: three times as fast as to permute
    return (flat.to(dtype) * (1 / 255) - 0.5).permute(0, 3, 1, 2)


def encode(kind: str, layers: Sequence[Layer], frames: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Features (N, F) float32 of stacks of frames (N, S, H, W, C) uint8.

    Args:
        layers: as `shapes` says.
        dtype: in which layers multiply; None: their weights' own.
    """
    own = layers[0][0].dtype
    rest = iter([(weight.to(dtype or own), bias.to(dtype or own)) for weight, bias in layers])
    x = _BODIES[kind](pixels(frames, dtype or own), rest)
    weight, bias = next(rest)
    x = torch.addmm(bias, x.permute(0, 2, 3, 1).flatten(1), weight).to(own)
    return torch.tanh(F.layer_norm(x, x.shape[-1:]))


def layers_of(params: Mapping[str, Tensor], stem: str) -> tuple[str, list[Layer]]:
    """Which kind the encoder at `stem` ("phi.camera0") of a state is, and its layers, of all members."""
    kind = next(kind for kind in _BODIES if f"{stem}.{kind}.0.weight" in params)
    found: list[Layer] = []
    while (name := f"{stem}.{kind}.{len(found)}") + ".weight" in params:
        found.append((params[f"{name}.weight"], params[f"{name}.bias"]))
    return kind, found


def shapes(kind: str, frame: tuple[int, int, int], stack: int, features: int) -> list[tuple[int, ...]]:
    """The shapes of the layers' weights: of convolutions (out, in, 3, 3), and of the linear layer (in, out).

    Args:
        frame: (H, W, C).
    """
    height, width, channels = frame
    found: list[tuple[int, ...]] = []
    before = stack * channels
    for i, out in enumerate(_WIDTHS[kind]):
        found.append((out, before, 3, 3))
        found += [(out, out, 3, 3)] * (4 if kind == "impala" else 0)
        halved = kind != "drq" or i == 0
        height, width = (_after(size, halved, kind != "drq") for size in (height, width))
        before = out
    return [*found, (before * max(height, 0) * max(width, 0), features)]


def _after(size: int, halved: bool, padded: bool) -> int:
    """What a 3x3 convolution or pooling leaves of a side."""
    return (size - (1 if padded else 3)) // (2 if halved else 1) + 1


def _conv(x: Tensor, layer: Layer, stride: int, padding: int) -> Tensor:
    weight, bias = layer
    return F.conv2d(x, weight.to(memory_format=torch.channels_last), bias, stride, padding)


def _small(x: Tensor, rest: Iterator[Layer]) -> Tensor:
    for _ in SMALL:
        x = _conv(x, next(rest), 2, 1).relu()
    return x


def _drq(x: Tensor, rest: Iterator[Layer]) -> Tensor:
    for i in range(len(DRQ)):
        x = _conv(x, next(rest), 1 if i else 2, 0).relu()
    return x


def _impala(x: Tensor, rest: Iterator[Layer]) -> Tensor:
    for _ in IMPALA:
        x = F.max_pool2d(_conv(x, next(rest), 1, 1), 3, 2, 1)
        for _ in range(2):
            inner = _conv(x.relu(), next(rest), 1, 1)
            x = x + _conv(inner.relu(), next(rest), 1, 1)
    return x.relu()


_BODIES: dict[str, Callable[[Tensor, Iterator[Layer]], Tensor]] = {"small": _small, "drq": _drq, "impala": _impala}
_WIDTHS = {"small": SMALL, "drq": DRQ, "impala": IMPALA}
