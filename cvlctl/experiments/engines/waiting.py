"""What the engines share that wait for their cells: the loop, and what they ask of a cell and its process."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Sized
from typing import Any, Protocol

from cvlctl.experiments.graph import Cell
from cvlctl.progress import say

POLL_SECONDS = 0.05
HELD_SECONDS = 5.0  # between two looks at a cell that another process runs
STOP_SECONDS = 60.0  # that cells have to save what they have: a compiler or a slow disk may be in between

Told = list[tuple[Cell, dict[str, Any]]]  # cells, and what is known of them now: state, and error (with its hint)
Settled = Callable[[Cell, dict[str, Any]], None]


class Tasks(Protocol):
    """The cells that an engine has."""

    @property
    def left(self) -> Sized:
        """Those of which nothing has come yet."""

    def step(self) -> Told:
        """What has begun, and what has ended, after a while at most."""

    def stop(self) -> None:
        """Take back what waits, let what runs save what it has, and wait until it is gone."""


def run_all(
    tasks: Tasks,
    interrupted: Callable[[], bool],
    *,
    fail_fast: bool,
    settled: Settled,
    look: Callable[[], None],
) -> None:
    """Step until nothing is left.

    Args:
        settled: is told of every cell that it is "running", and what came of it: state ("done", "failed" or "blocked"),
            error (with its hint), began and ended.
        look: is called again and again, for those who watch.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once every cell has saved what it has.
    """
    while tasks.left:
        if interrupted():
            say("stopping: cells save what they have (once more stops them at once)")
            tasks.stop()
            say("stopped; the same command goes on where each cell was saved last")
            raise KeyboardInterrupt
        for cell, told in tasks.step():
            settled(cell, told)
            if fail_fast and told["state"] == "failed":
                tasks.stop()
                return
        look()


def cpus_of(cell: Cell, cpus: int) -> int:
    """How many CPUs a cell keeps busy, of so many: players of episodes take all that they are given."""
    recipe = cell.job.recipe
    workers = getattr(recipe, "workers", None)
    if workers is not None:
        return cpus if workers == "auto" else max(1, workers)
    return int(recipe.num_threads)


def poll(process: subprocess.Popen[str]) -> tuple[int, int] | None:
    """Exit code and most bytes of memory of a process that has ended, else None.

    The memory is 0 where it was less than this process has taken: the kernel then tells of that, from before the
    child's own program began.
    """
    if process.returncode is not None:
        return process.returncode, 0
    found, status, used = os.wait4(process.pid, os.WNOHANG)
    if not found:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    own_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return process.returncode, used.ru_maxrss * 1024 if used.ru_maxrss > own_peak else 0
