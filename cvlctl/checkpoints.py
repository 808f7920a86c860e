"""Training state on disk: one safetensors file, metadata as JSON in its header. Written atomically; no pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from cvlctl.errors import CvlctlError
from cvlctl.files import CHECKPOINT_FORMAT, CHECKPOINT_KEY, write_atomically


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write `state` and `metadata` to `path`: a reader sees the old file or the new one, whole."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    header = json.dumps({"format": CHECKPOINT_FORMAT, **metadata})
    write_atomically(path, to_bytes(tensors, metadata={CHECKPOINT_KEY: header}))


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and metadata that `save` wrote.

    Raises:
        CvlctlError: where the file is missing, damaged, or not one of ours. Nothing in it is ever executed.
    """
    if not path.is_file():
        raise CvlctlError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CvlctlError(
            f"{path}: not a readable checkpoint: {error}", "the file is damaged or not safetensors"
        ) from error
    metadata = _parse(path, header)
    broken = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise CvlctlError(f"{path}: {broken[0]} holds NaN or infinity", "training diverged; lower the learning rate")
    return {name: value.to(device) for name, value in state.items()}, metadata


def _parse(path: Path, header: dict[str, str]) -> dict[str, Any]:
    try:
        metadata = json.loads(header[CHECKPOINT_KEY])
        if metadata["format"] > CHECKPOINT_FORMAT:
            raise CvlctlError(f"{path}: written by a newer version (format {metadata['format']})", "upgrade cvlctl")
    except (KeyError, TypeError, ValueError) as error:
        raise CvlctlError(f"{path}: a safetensors file, but not a cvlctl checkpoint") from error
    return metadata
