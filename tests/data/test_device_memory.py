"""What of a machine's memory data may take: the host's and a GPU's, and how much reading them takes."""

from __future__ import annotations

import tracemalloc
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from cvlctl.data import load, stream
from cvlctl.data.recipe import StoreUse
from cvlctl.data.samplers import Data
from cvlctl.data.store import Store, open_store
from cvlctl.data.stream import row_bytes, window_rows
from cvlctl.data.writer import write_store
from cvlctl.types import Episode

ROWS, WIDTH = 2_000, 100


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Store]:
    """Four, of 2,000 rows each."""
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    made = []
    for i in range(4):
        episodes = [
            Episode(rng.normal(size=(200, WIDTH)), rng.uniform(-1, 1, (199, 2)), np.full(199, 10.0 * i + k))
            for k in range(ROWS // 200)
        ]
        made.append(open_store(write_store(folder / f"{i}.zarr", episodes, task="toy", horizon=199).path))
    return made


def test_memory_that_pytorch_keeps_on_a_gpu_is_free(stores: list[Store], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a stage after another of the same process streams what the first had in memory, and sees other batches."""
    size = row_bytes(stores[0])
    memory = {"mem_get_info": (4 * ROWS * size, 10**12), "memory_reserved": 10**6, "memory_allocated": 10**6}
    for name in memory:
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name: memory[name])
    monkeypatch.setattr(stream, "free_memory", lambda: 2**40)
    assert window_rows(stores, "auto", "cuda") == 2 * ROWS
    kept = 3 * ROWS * size  # of the memory that was free a stage before
    memory |= {"mem_get_info": (ROWS * size, 10**12), "memory_reserved": 10**6 + kept}
    assert window_rows(stores, "auto", "cuda") == 2 * ROWS
    monkeypatch.setattr(stream, "free_memory", lambda: 2 * ROWS * size)  # of the host, where it is read first
    assert window_rows(stores, "auto", "cuda") == ROWS
    assert window_rows(stores, 1.0, "cuda") == 0


def test_stores_are_joined_one_at_a_time(stores: list[Store]) -> None:
    uses = [StoreUse(path=store.path, top=top) for store, top in zip(stores, (1.0, 0.5, 1.0, 0.2), strict=True)]
    parts = [load.read_part(store, use, True) for store, use in zip(stores, uses, strict=True)]
    data = load.join(stores, uses, None, True)
    for name in ("observation", "action", "arrival_reward"):
        wanted = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(getattr(data, name).squeeze(0).numpy(), wanted)
    lengths = np.concatenate([np.diff(part.episode_ends, prepend=0) for part in parts])
    assert data.layout.first.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    assert len(data.labelled) == len(data.layout.row) == (lengths - 1).sum() == 27 * 199

    uses = [StoreUse(path=store.path) for store in stores]
    tracemalloc.start()
    data = load.join(stores, uses, None, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.7 * 4 * ROWS * WIDTH * 4  # and not twice as much


def test_what_went_to_the_device_does_not_stay_on_the_host(
    stores: list[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    def elsewhere(data: Data, device: str) -> Data:
        read.append(weakref.ref(data.observation))
        return data._replace(observation=data.observation.clone())

    monkeypatch.setattr(load, "to_device", elsewhere)
    reading = load.Reading(stores[:1], [StoreUse(path=stores[0].path)])
    with load.opened(reading, 0, 1, "cuda") as data:
        assert isinstance(data, Data) and len(data.observation) == ROWS
        assert read[0]() is None
