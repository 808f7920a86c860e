"""What of a store's data is sound and yet seems amiss, in words: what no checksum tells, and training would believe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from cvlctl.data.columns import ROUNDING
from cvlctl.data.derive import bounds, whole
from cvlctl.data.store import Column, Store
from cvlctl.data.units import units_of

LISTED = 12  # names


def concerns(store: Store, *, duplicates: bool = True) -> list[str]:
    """Of how episodes end, of duplicates (which reads all of it), and what was said when the data were imported: a
    sentence each."""
    return [*_ends(store), *(_duplicates(store) if duplicates else ()), *units_of(store).remarks]


def never_varied(names: Sequence[str], low: Sequence[float], high: Sequence[float]) -> list[str]:
    """A sentence that names the columns of one value; none where there are none."""
    values = zip(names, low, high, strict=True)
    found = [(name, least) for name, least, most in values if most - least <= ROUNDING * max(abs(least), abs(most))]
    if not found:
        return []
    told = ", ".join(f"{name} ({value:.4g})" for name, value in found[:LISTED])
    more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
    return [
        f"{len(found)} of {len(names)} columns never varied, and are zeroed before a policy sees them: {told}{more}"
    ]


def _ends(store: Store) -> Iterator[str]:
    lengths = store.lengths()
    if len(lengths) > 1 and lengths[0] > 1 and store.terminated().all() and (lengths == lengths[0]).all():
        yield (
            f"all {len(lengths):,} episodes are terminated, each after {lengths[0]:,} steps: if that is a time limit, "
            "it belongs into timeouts, for nothing is learned of what comes after a terminal state"
        )


def _duplicates(store: Store) -> Iterator[str]:
    """Episodes of the same observations and actions; read twice where their ends look alike, else once."""
    first: dict[tuple[object, ...], list[int]] = {}
    rows = list(bounds(whole(store)))
    seen = [Column(store, name) for name in ("data/observation", *map(store.camera_array, store.spec.cameras))]
    columns = [*seen, Column(store, "data/action")]
    for number, (start, end) in enumerate(rows):
        if end - start > 2:  # of a single step many may be alike
            ends = [c.rows(start, start + 1) for c in columns] + [c.rows(end - 1, end) for c in seen]
            first.setdefault((end - start, *(part.tobytes() for part in ends)), []).append(number)
    originals: dict[bytes, int] = {}
    copies = []
    for number in sorted(number for alike in first.values() if len(alike) > 1 for number in alike):
        start, end = rows[number]
        digest = hashlib.sha256()
        for column in columns:
            digest.update(column.rows(start, end).tobytes())
        original = originals.setdefault(digest.digest(), number)
        if original != number:
            copies.append((number, original))
    if copies:
        number, original = copies[0]
        yield (
            f"{len(copies):,} of {len(rows):,} episodes are copies of others, step for step: "
            f"episode {number} is episode {original}"
        )
