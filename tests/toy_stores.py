"""Toy episodes, stores of them, what may be done to a store's files, and what a store must hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cvlctl.data.store import Store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import write_store
from cvlctl.types import Episode


def episode(
    seed: int, length: int = 7, terminated: bool = False, rewards: bool = True, successes: bool = True
) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        rng.normal(size=(length + 1, 3)),
        rng.uniform(-1, 1, (length, 2)),
        rng.normal(size=length) if rewards else None,
        rng.random(length) < 0.3 if successes else None,
        terminated,
        collected_at=100 * seed,
        seed=seed,
    )


def many(count: int) -> list[Episode]:
    return [episode(i, length=1 + (5 * i) % 11, terminated=i % 3 == 0) for i in range(count)]


def numbered(seed: int, length: int, task: str = "", width: int = 3) -> Episode:
    """Each reward is the seed; odd seeds succeed at their last step."""
    rng = np.random.default_rng(seed)
    successes = np.arange(length) == (length - 1 if seed % 2 else -1)
    return Episode(
        rng.normal(size=(length + 1, width)), rng.uniform(-1, 1, (length, 2)), np.full(length, float(seed)), successes,
        seed % 3 == 0, task, 100 * seed, seed,
    )  # fmt: skip


def numbered_episodes(count: int, first: int = 0, task: str = "") -> list[Episode]:
    return [numbered(i, 1 + (5 * i) % 11, task) for i in range(first, first + count)]


def numbered_store(path: Path) -> Path:
    """12 numbered episodes, and where they are from."""
    provenance = {"recipe": {"steps": 3}, "environment": {"mujoco": "3.3.0"}, "seeds": [0]}
    return write_store(path, numbered_episodes(12), task="toy", horizon=20, provenance=provenance).path


def labelled_store(source: Path, path: Path) -> Path:
    """The source with three labels: given, sparse (rewards alone) and zero."""
    from cvlctl.learn.label import label_store

    label_store(source, "sparse", path, rewards="successes")
    label_store(path, "zero", path, rewards="zeros", force=True)
    return path


def moving_point(num: int = 6, length: int = 30, seed: int = 0) -> list[Episode]:
    """A point that moves by its action; reward and success near the origin."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        actions = rng.uniform(-1, 1, size=(length, 2)).astype(np.float32)
        position = np.cumsum(np.concatenate([rng.uniform(-1, 1, size=(1, 2)), 0.3 * actions]), axis=0)
        near = np.exp(-np.square(position[1:]).sum(1))
        found.append(Episode(np.concatenate([position, position**2], 1), actions, near, near > 0.5))
    return found


def assert_same(found: Iterable[Episode], wanted: list[Episode], task: str = "toy") -> None:
    found = list(found)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for name in ("observations", "actions", "rewards", "successes", "sim_state"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None), name
            if x is not None:
                assert x.dtype == y.dtype, name
                np.testing.assert_array_equal(x, y)
        assert list(a.images or {}) == list(b.images or {})
        for camera, frames in (a.images or {}).items():
            assert frames.dtype == np.uint8
            np.testing.assert_array_equal(frames, b.images[camera])
        assert (a.terminated, a.collected_at, a.seed) == (b.terminated, b.collected_at, b.seed)
        assert a.task == (b.task or task)


def assert_holds(found: Store, wanted: list[Episode], task: str = "toy") -> None:
    assert verify_store(found.path) == []
    assert found.num_episodes == len(wanted)
    assert_same(found.episodes(), wanted, task)


def replace_array(path: Path, name: str, values: np.ndarray) -> None:
    """Overwrite an array's values with sound chunks, as a foreign tool could that leaves its list of chunks out."""
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["chunk_crc32c"].pop(name, None)
    (path / "zarr.json").write_text(json.dumps(root))
    import zarr

    zarr.open_array(path / name, mode="r+")[:] = values


def edit_root(path: Path, **changes: object) -> None:
    """Change a store's attributes; None takes one away."""
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"] = {k: v for k, v in (root["attributes"] | changes).items() if v is not None}
    (path / "zarr.json").write_text(json.dumps(root))


def flip(file: Path) -> None:
    """One bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
