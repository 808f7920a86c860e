"""imitation's npz of trajectories: `obs` (sum(T+1)), `acts` (sum(T)), `terminal` (episodes), where it has them `rews`.

`indices` are the numbers of actions before each episode but the first. `infos` are pickles, and never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from cvlctl.data.formats.archives import open_npz
from cvlctl.data.formats.npz import episodes_of, integers, renamed
from cvlctl.data.formats.sources import Facts, Told
from cvlctl.types import Episode
from cvlctl.units import Bounds

KEYS = {"observations": "obs", "actions": "acts", "rewards": "rews", "terminated": "terminal"}
REQUIRED = ("obs", "acts", "indices")


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    horizon: int | None = None,
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
) -> Iterator[Episode]:
    """The trajectories of a file.

    Args:
        horizon: the time limit: trajectories of that length were cut off, whatever `terminal` says of them.
    """
    with open_npz(Path(path)) as arrays:
        arrays.need(*REQUIRED)
        ends = [*integers(arrays.column("indices")), len(arrays.column("acts"))]
        ours = renamed(arrays, {name: theirs for name, theirs in KEYS.items() if theirs in arrays.names})
        for episode in episodes_of(ours, ends, told, action_bounds, clip_actions):
            yield replace(episode, terminated=False) if len(episode) == horizon else episode


def facts(path: Path) -> Facts:
    """The number of actions; the file names no task."""
    with open_npz(path) as arrays:
        arrays.need(*REQUIRED)
        return Facts(len(arrays.column("acts")))
