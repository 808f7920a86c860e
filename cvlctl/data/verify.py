"""Whether a store is what its checksums and its contract say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from cvlctl.data.attributes import read_attributes
from cvlctl.data.chunks import chunks, read_array, read_chunk
from cvlctl.data.layout import LABEL_ARRAYS, SIM
from cvlctl.data.store import Store
from cvlctl.errors import CvlctlError


def verify_store(path: str | Path) -> list[str]:
    """Re-read a store chunk by chunk and compare it with its checksums and its contract; one line a problem."""
    store = Store(Path(path), read_attributes(Path(path)))
    labels = [f"labels/{label}/{array}" for label in store.labels for array in LABEL_ARRAYS]
    names = [*store.arrays, *(name for name in labels if name in store._checksums or (store.path / name).exists())]
    names += [SIM] if store.has_sim_state else []
    problems = [line for name in names for line in _verify_array(store, name)]
    try:
        for name in ("meta/episode_ends", "meta/task"):
            values = read_array(store.path, name, store._open(name), store._listed(name))
            if problem := store._problem(name, values):
                problems.append(f"{name}: {problem}")
        lengths = store.lengths()
    except CvlctlError:  # said above
        return problems
    if int(lengths.sum()) != store.num_transitions:
        problems.append(f"attributes: {store.num_transitions} transitions recorded, {int(lengths.sum())} found")
    elif int(lengths.max()) > store.spec.horizon:
        problems.append(f"attributes: horizon {store.spec.horizon}, but an episode has {int(lengths.max())} steps")
    return problems


def _verify_array(store: Store, name: str) -> Iterator[str]:
    def bare(error: CvlctlError) -> str:
        return error.what.removeprefix(f"{store.path}: ")

    try:
        array = store._open(name)
    except CvlctlError as error:
        yield bare(error)
        return
    total, readable = hashlib.sha256(), True
    for chunk in chunks(store.path, name, array, store._listed(name)):
        try:
            rows = read_chunk(array, chunk)
        except CvlctlError as error:
            yield bare(error)
            readable = False
            continue
        total.update(rows.tobytes())
        if rows.dtype.kind == "f" and (problem := store._problem(name, rows)):
            yield f"{chunk.name}: {problem}"
    if readable and store._checksums.get(name) != total.hexdigest():
        yield f"{name}: {store.mismatch(name)}"
