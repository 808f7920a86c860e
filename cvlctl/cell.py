"""What a command says of itself where it is a cell of an experiment: where it runs, how far it is, and how it ended.

The engine that starts it names a folder in the environment. There the command keeps state.json, which anybody who sees
the folder can read, and a lock: what runs anywhere is not begun again elsewhere. Nothing here stops the work: where the
disk is full, the others know less.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

from cvlctl.files import Lock, lock, sweep
from cvlctl.version import versions

FOLDER, ENGINE, JOB = "CVLCTL_CELL", "CVLCTL_ENGINE", "CVLCTL_JOB"  # in the environment
STATE, LOCK = "state.json", ".lock"
HELD = 75  # exit code: another process is at it (EX_TEMPFAIL)
HEARTBEAT_SECONDS, SILENT_SECONDS = 10.0, 60.0  # between two writes at the most; who is silent for so long is dead
_PROGRESS_SECONDS = 1.0  # between two writes at the least

_is_one = False
_folder: Path | None = None
_lock: Lock | None = None
_told: dict[str, Any] = {}
_written = 0.0
_writing = threading.Lock()


def where() -> dict[str, Any]:
    """Where this process runs: host, and engine and job where there are any."""
    environment = os.environ
    job = environment.get(JOB) or environment.get("SLURM_JOB_ID")
    about = {"host": platform.node(), "engine": environment.get(ENGINE), "job": job}
    return {name: value for name, value in about.items() if value}


def begin() -> None:
    """Say that the command runs; nothing where it is no cell. Its own children are none.

    Raises:
        Busy: another process runs this cell.
    """
    global _is_one, _folder, _lock, _told
    if FOLDER not in os.environ:
        return
    _is_one = True
    folder = Path(os.environ.pop(FOLDER))
    _lock = lock(folder / LOCK)
    sweep(folder)
    _folder = folder
    _told = {"state": "running", "pid": os.getpid(), "began": time.time(), **where(), "versions": versions()}
    _write()
    threading.Thread(target=_beat, daemon=True).start()


def is_one() -> bool:
    """Whether this process is a cell."""
    return _is_one


def progress(what: str, done: int, total: int, unit: str, rate: float) -> None:
    """Say how far the command is: `done` of `total` units, `rate` of them a second."""
    if _folder is not None:
        first = "progress" not in _told
        _told["progress"] = {"what": what, "done": done, "total": total, "unit": unit, "rate": round(rate, 3)}
        if first or time.monotonic() - _written >= _PROGRESS_SECONDS:
            _write()


def failed(what: str, hint: str) -> None:
    """Say why."""
    if _folder is not None:
        _told["error"] = [what, hint]


def end(code: int) -> None:
    """Say how it ended, and let the cell go."""
    global _folder, _lock
    if _folder is not None and _lock is not None:
        states = {0: "done", HELD: "held", 130: "stopped"}
        _told.update(state=states.get(code, "failed"), code=code, ended=time.time())
        _write()
        _folder = None
        _lock.close()


def write(folder: Path, state: dict[str, Any]) -> None:
    """Put a state into a cell's folder. Whole or not at all, and not synced: it is news, not work."""
    temporary = folder / f".{STATE}.{os.getpid()}.tmp"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps(state))
        os.replace(temporary, folder / STATE)


def _write() -> None:
    global _written
    with _writing:
        if _folder is not None:
            _written = time.monotonic()
            write(_folder, dict(_told))


def _beat() -> None:
    while _folder is not None:
        time.sleep(HEARTBEAT_SECONDS / 4)
        if time.monotonic() - _written >= HEARTBEAT_SECONDS / 2:
            _write()
