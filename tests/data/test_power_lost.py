"""A store whose writer lost power: what was flushed is there, whatever became of the files that came after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cvlctl.data.arrays import write_arrays
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter
from cvlctl.types import Episode


def episodes(count: int) -> list[Episode]:
    draw = np.random.default_rng(0)
    return [
        Episode(
            draw.normal(size=(8, 3)).astype(np.float32), draw.uniform(-1, 1, (7, 2)).astype(np.float32),
            draw.normal(size=7).astype(np.float32), terminated=bool(i % 2), seed=i,
        )
        for i in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("flushed", [1, 2, 9])
def test_files_that_were_cut_off_are_no_obstacle(
    tmp_path: Path, flushed: int, small_chunks: None, no_fsync: None
) -> None:
    """After the last flush chunks and documents were written, and the store nearly finished: all of it torn by half."""
    whole, torn = tmp_path / "whole.zarr", tmp_path / "torn.zarr"
    with StoreWriter(whole, task="t") as writer:
        for episode in episodes(12):
            writer.append(episode)
        writer.finish()
    with StoreWriter(torn, task="t") as writer:
        for episode in episodes(12)[:flushed]:
            writer.append(episode)
        writer.flush()
        kept = {path: path.read_bytes() for path in writer.partial.rglob("c/**/*") if path.is_file()}
        tail = (writer.partial / "tail.npz").read_bytes()
        for episode in episodes(12)[flushed:]:
            writer.append(episode)
        for waiting in writer._waiting.values():
            waiting.write_rest(writer.partial)
        write_arrays(writer.partial, 0, {"meta/seed": np.arange(12)}, 12)
        (writer.partial / "meta" / "task").mkdir()
        (writer.partial / "meta" / "task" / "zarr.json.0123.partial").write_bytes(b"{")
    for path in torn.with_name("torn.zarr.partial").rglob("*"):
        if path.is_file() and path not in kept and path.name not in ("lock", "unfinished.json"):
            path.write_bytes(tail if path.name == "tail.npz" else path.read_bytes()[: path.stat().st_size // 2])
    with StoreWriter(torn, task="t") as writer:
        assert writer.num_episodes == flushed
        for episode in episodes(12)[flushed:]:
            writer.append(episode)
        writer.finish()
    assert verify_store(torn) == []
    assert open_store(torn).digest() == open_store(whole).digest()
    names = [sorted(str(path.relative_to(store)) for path in store.rglob("*")) for store in (whole, torn)]
    assert names[0] == names[1]
