"""Features of all frames of stores, computed once: where encoders are frozen and nothing is shifted, an actor trains
on them as on vectors. They lie beside the run, and are read as they are asked for: what is larger than memory stays on
the disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cvlctl.data.load import Reading
from cvlctl.data.shown import FRAMES, pieces
from cvlctl.files import read_json, write_json
from cvlctl.learn import networks
from cvlctl.learn.algorithms import occupancy
from cvlctl.learn.encoders import TABLES
from cvlctl.learn.networks import State
from cvlctl.progress import Progress
from cvlctl.runs import FEATURES
from cvlctl.types import Views


def encoded(reading: Reading, critic: occupancy.Config, state: State, out: Path, device: str) -> Reading:
    """The reading with features in the place of frames: (rows, E, K) for each store, mapped from a file in `out`, and
    of the success examples (X, 1, E, K). K: those of phi, then those of psi, of each camera.

    Args:
        state: weights of the critic, of all members.
    """
    assert reading.observe is not None
    params = {name: value.to(device) for name, value in _weights(critic, state).items()}
    file, digest = out / FEATURES[0], _digest(reading, params)
    counts = [store.num_rows for store in reading.stores]
    shape = (sum(counts), len(next(iter(params.values()))), reading.observe.features * len(reading.observe.cameras) * 2)
    if (read_json(file.with_suffix(".json")) or {}).get("digest") != digest or not _whole(file, shape):
        _write(file, shape, reading, params, device)
        write_json(file.with_suffix(".json"), {"digest": digest})
    table = np.load(file, mmap_mode="c", allow_pickle=False)  # never written to
    ends = np.cumsum(counts)
    parts = [table[end - count : end] for end, count in zip(ends.tolist(), counts, strict=True)]
    if (examples := reading.examples) is not None:
        frames = [examples.images[camera] for camera in reading.observe.cameras]
        examples = examples._replace(images={"features": _of_examples(frames, params, device)})
    return reading._replace(features=parts, examples=examples)


def _weights(critic: occupancy.Config, state: State) -> State:
    """Of both encoders, psi's averaged ones where readouts use these."""
    found = {name: value for name, value in state.items() if name.startswith(tuple(f"{t}.camera" for t in TABLES))}
    if critic.ema_rate > 0:
        found |= {name: state[f"ema/{name}"] for name in found if name.startswith("psi.")}
    return found


def _digest(reading: Reading, params: State) -> str:
    total = hashlib.sha256(json.dumps([[store.digest() for store in reading.stores], repr(reading.observe)]).encode())
    for name in sorted(params):
        total.update(name.encode() + params[name].cpu().numpy().tobytes())
    return total.hexdigest()


def _whole(file: Path, shape: tuple[int, ...]) -> bool:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return False
    return bool(found.shape == shape and found.dtype == np.float32)


def _write(file: Path, shape: tuple[int, ...], reading: Reading, params: State, device: str) -> None:
    part, done = file.with_suffix(".part"), 0
    table = np.lib.format.open_memmap(part, "w+", np.float32, shape)
    with Progress("features of all frames", shape[0], "rows") as progress:
        assert reading.observe is not None
        for seen in pieces(reading.stores, replace(reading.observe, vector=False)):
            assert isinstance(seen, Mapping)
            found = _features(tuple(map(torch.from_numpy, seen.values())), params, device)
            table[done : done + len(found)] = found
            done += len(found)
            progress.update(done)
    table.flush()
    del table
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    os.replace(part, file)


def _features(stacks: tuple[torch.Tensor, ...], params: State, device: str) -> np.ndarray:
    """(n, E, K) of stacks (n, S, H, W, C) of each camera."""
    members = len(next(iter(params.values())))
    frames = tuple(camera.to(device).expand(members, *camera.shape) for camera in stacks)
    seen = Views(torch.zeros(*frames[0].shape[:2], 0, device=device), frames)
    with torch.no_grad():
        both = torch.cat([networks.see(params, name, seen) for name in TABLES], dim=-1)
    return both.transpose(0, 1).cpu().numpy()


def _of_examples(frames: list[np.ndarray], params: State, device: str) -> np.ndarray:
    """(X, 1, E, K) of stacks (X, S, H, W, C) of each camera."""
    stacks = tuple(map(torch.from_numpy, frames))
    parts = zip(*(camera.split(FRAMES) for camera in stacks), strict=True)
    return np.concatenate([_features(part, params, device) for part in parts])[:, None]
