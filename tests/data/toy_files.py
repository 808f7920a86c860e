"""Toy episodes as files of other projects' layouts, and what is read back of them."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from cvlctl.data import formats
from cvlctl.data.store import Store
from cvlctl.types import Episode

WRITTEN = {"d4rl": "out.hdf5", "minari": "out-v0", "ogbench": "out.npz", "npz": "out.npz"}


Arrays = dict[str, Any]


def episodes(count: int = 5, **changes: Any) -> list[Episode]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        length = 1 + (5 * i) % 11
        parts: Arrays = {
            "observations": rng.normal(size=(length + 1, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (length, 2)), "rewards": rng.normal(size=length),
            "successes": rng.random(length) < 0.3, "terminated": i % 3 == 0, "task": "ab"[i % 2],
            "collected_at": 100 * i, "seed": i,
        }  # fmt: skip
        made.append(Episode(**(parts | changes)))
    return made


def rows(count: int = 5, dtype: type = np.float32) -> Arrays:
    """The arrays of D4RL's layout, of the same episodes."""
    made = episodes(count)
    last = [np.arange(len(e)) == len(e) - 1 for e in made]
    join = np.concatenate
    return {
        "observations": join([e.observations[:-1] for e in made]).astype(dtype),
        "next_observations": join([e.observations[1:] for e in made]).astype(dtype),
        "actions": join([e.actions for e in made]).astype(dtype),
        "rewards": join([e.rewards for e in made if e.rewards is not None]).astype(dtype),
        "terminals": join([end & e.terminated for e, end in zip(made, last, strict=True)]),
        "timeouts": join([end & (not e.terminated) for e, end in zip(made, last, strict=True)]),
    }


def plain(count: int = 5) -> Arrays:
    made = episodes(count)
    return {
        "observations": np.concatenate([e.observations for e in made]),
        "actions": np.concatenate([e.actions for e in made]), "rewards": rows(count)["rewards"],
        "episode_ends": np.cumsum([len(e) for e in made]),
    }  # fmt: skip


def changed(arrays: Arrays, **changes: Any) -> Arrays:
    return {name: values for name, values in (arrays | changes).items() if values is not None}


def hdf5(path: Path, arrays: Arrays, **attributes: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file[name] = values
        file.attrs.update(attributes)
    return path


def npz(path: Path, arrays: Arrays) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def minari_folder(folder: Path, made: list[Arrays], **metadata: Any) -> Path:
    """A dataset as Minari lays it out."""
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number, arrays in enumerate(made):
            group = file.create_group(f"episode_{number}")
            group.attrs["seed"] = 7 + number
            for name, values in arrays.items():
                group[name] = values
    about = {"total_episodes": len(made), "total_steps": sum(len(a["actions"]) for a in made), "data_format": "hdf5",
             "dataset_id": "some/set-v0", "minari_version": "0.5.4"}  # fmt: skip
    (folder / "data" / "metadata.json").write_text(json.dumps(about | metadata))
    return folder


def minari_episode(length: int = 4, **changes: Any) -> Arrays:
    rng, last = np.random.default_rng(length), np.arange(length) == length - 1
    arrays = {"observations": rng.normal(size=(length + 1, 2)), "actions": rng.uniform(-1, 1, (length, 1)),
              "rewards": np.arange(length, dtype=np.float64), "terminations": last, "truncations": ~last}  # fmt: skip
    return arrays | changes


def robomimic_file(path: Path, count: int = 11, **changes: Any) -> Path:
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1})
        for i in range(count):
            rng, last = np.random.default_rng(i), np.arange(i + 2) == i + 1
            states = rng.normal(size=(i + 3, 5))
            arrays = {
                "actions": rng.uniform(-1, 1, (i + 2, 2)), "rewards": last.astype(float), "dones": last * (i % 2),
                "obs/b": states[:-1, :3], "obs/a": states[:-1, 3:], "next_obs/b": states[1:, :3],
                "next_obs/a": states[1:, 3:], "obs/image": np.full((i + 2, 8, 9, 3), i, np.uint8),
                "next_obs/image": np.full((i + 2, 8, 9, 3), i + 1, np.uint8), "states": states[:-1],
            }  # fmt: skip
            for name, values in (arrays | changes).items():
                if values is not None:
                    data[f"demo_{i}/{name}"] = values
    return path


def sb3_arrays(steps: int = 12, width: int = 2) -> Arrays:
    rng = np.random.default_rng(0)
    states = rng.normal(size=(steps + 1, width, 3))
    clock = np.arange(steps)[:, None] * np.ones((1, width), int)
    arrays = {"observations": states[:-1].copy(), "next_observations": states[1:].copy(),
              "actions": rng.uniform(-1, 1, (steps, width, 2)), "rewards": rng.normal(size=(steps, width)),
              "dones": (clock % 5 == 4).astype(np.float32), "timeouts": (clock == 9).astype(np.float32)}  # fmt: skip
    after_a_reset = rng.normal(size=(steps, width, 3))
    ends = arrays["dones"][:-1] == 1
    arrays["observations"][1:][ends] = after_a_reset[1:][ends]
    return arrays


def read(format: str, path: Path, **options: Any) -> list[Episode]:
    return list(formats.FORMATS[format].read(path, **options))


def same(found: list[Episode], wanted: list[Episode], *names: str) -> None:
    assert [len(e) for e in found] == [len(e) for e in wanted]
    for a, b in zip(found, wanted, strict=True):
        for name in names or ("observations", "actions", "rewards", "terminated"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def same_store(a: Store, b: Store) -> None:
    assert a.digest() == b.digest()
    assert (a.spec, a.task, a.labels) == (b.spec, b.task, b.labels)
    for label in a.labels:
        assert a.label_digest(label) == b.label_digest(label)


def package_functions(package: str, file: str, *names: str) -> dict[str, Callable[..., Any]]:
    """Functions of an installed package, without importing it: what it pulls in may crash, and is not needed."""
    try:
        source = Path(str(importlib.metadata.distribution(package).locate_file(file))).read_text()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    module = ast.parse(source)
    module.body = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name in names]
    import collections

    space: dict[str, Any] = {"np": np, "collections": collections}
    exec(compile(module, file, "exec"), space)
    return {name: space[name] for name in names}
