"""In a worker of Ray: one cell, from the start of its command to what came of it."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlctl import cell as own
from cvlctl import children
from cvlctl.experiments.engines.start import begin, outcome, state_in
from cvlctl.experiments.engines.waiting import POLL_SECONDS, STOP_SECONDS, poll
from cvlctl.interrupts import interruptible


def by_value(path: list[str], here: str) -> Callable[..., dict[str, Any]]:
    """`work`, for workers that know nothing of cvlctl yet: they import as the caller does, where it can be found."""
    module = __name__

    def cell(folder: str, line: list[str], *needs: dict[str, Any]) -> dict[str, Any]:
        import importlib
        import sys

        import ray

        job = ray.get_runtime_context().get_task_id()
        sys.path[:] = [*path, *(one for one in sys.path if one not in path)]
        told: dict[str, Any] = importlib.import_module(module).work(here, job, folder, line, *needs)
        return told

    return cell


def work(here: str, job: str, folder: str, line: Sequence[str], *needs: Mapping[str, Any]) -> dict[str, Any]:
    """In a worker of Ray: run a cell, if those that it needs are done. Returns what `start.outcome` says of it.

    Args:
        here: the current directory, which its paths may be relative to.
        job: its name as a task.
        folder: of the cell; `line` is its command line.
        needs: what came of the cells that it needs.
    """
    if any(need["state"] != "done" for need in needs):
        return {"state": "waits"}
    try:
        os.chdir(here)
        os.stat(line[1])
    except OSError as error:
        what = f"{platform.node()} lacks {error.filename}, which the experiment is run with: {error.strerror}"
        hint = "run it from a folder that every node of the cluster sees, and into one"
        return {"state": "failed", "error": [what, hint]}
    if state_in(Path(folder)).get("job") == job:  # its worker died: what was saved since then is not thrown away
        line = [word for word in line if word != "--force"]
    began = time.time()
    process = begin(Path(folder), line, {own.ENGINE: "ray", own.JOB: job})
    try:
        with interruptible() as interrupted:
            ended = _awaited(process, interrupted)
    except KeyboardInterrupt:  # by ray.cancel; or this worker is to end, and Ray runs the cell elsewhere
        raise SystemExit(1) from None
    finally:
        children.end([process])
        children.close([process])
    return outcome(Path(folder), *ended) | {"began": began, "ended": time.time()}


def _awaited(process: subprocess.Popen[str], interrupted: Callable[[], bool]) -> tuple[int, int]:
    """Exit code and most bytes of memory of a process; once interrupted it is to save what it has, and to end soon."""
    until = float("inf")
    while (ended := poll(process)) is None and time.monotonic() < until:
        if interrupted() and until == float("inf"):
            process.terminate()
            until = time.monotonic() + STOP_SECONDS
        time.sleep(POLL_SECONDS)
    return ended or (-signal.SIGKILL, 0)
