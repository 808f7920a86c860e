"""Who is at work on an experiment: the processes that start its cells, and how they are told to stop."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cvlctl.cell import HEARTBEAT_SECONDS, SILENT_SECONDS
from cvlctl.errors import CvlctlError
from cvlctl.experiments.graph import CELLS
from cvlctl.files import is_running, make_folder, now_at, open_regular, read_json, sweep

_STOP_SECONDS = 90.0


@contextmanager
def noted(out: Path, engine: str) -> Iterator[None]:
    """While it lasts, this process is known to run cells of the experiment at `out`.

    Its file is locked, since numbers of processes are given again; and touched, for hosts that do not see the lock.
    """
    about = {"host": platform.node(), "pid": os.getpid(), "engine": engine}
    over, end = threading.Event(), ExitStack()
    file = out / CELLS / f"driver-{about['host']}-{about['pid']}.json"
    at_work(out)  # which removes what dead ones left
    sweep(file.parent)

    def beat() -> None:
        while not over.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)

    with suppress(OSError):
        make_folder(file.parent)
        temporary = file.with_name(f".{file.name}.{about['pid']}.tmp")
        handle = end.enter_context(open(temporary, "w"))  # noqa: SIM115
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        handle.write(json.dumps(about))
        handle.flush()
        os.replace(temporary, file)  # nobody sees it before it is locked
        threading.Thread(target=beat, daemon=True).start()
    with end:
        end.callback(over.set)
        end.callback(lambda: file.unlink(missing_ok=True))
        yield


def at_work(out: Path) -> list[dict[str, Any]]:
    """Those that run, as far as this machine can tell: host, pid and engine. What dead ones left is removed."""
    found = []
    for file in sorted((out / CELLS).glob("driver-*.json")):
        about = read_json(file) or {}
        if type(about.get("pid")) is int and _is_alive(file, about):
            found.append(about)
        else:
            with suppress(OSError):
                file.unlink()
    return found


def _is_alive(file: Path, about: dict[str, Any]) -> bool:
    try:
        if about.get("host") != platform.node():
            return abs(now_at(file.parent) - file.stat().st_mtime) < SILENT_SECONDS
        with open_regular(file) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # it has ended since
        return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return is_running(about["pid"])
    return False


def cancel(out: Path) -> list[dict[str, Any]]:
    """Stop those of this machine, as Ctrl-C does; returns them once they are gone.

    Raises:
        CvlctlError: one is on another machine, or somebody else's, or does not end.
    """
    found = at_work(out)
    here = [about for about in found if about.get("host") == platform.node()]
    for pid in [about["pid"] for about in here]:
        try:
            os.kill(pid, signal.SIGTERM)
        except PermissionError as error:
            raise CvlctlError(f"process {pid} runs {out}, and is somebody else's", "let them cancel it") from error
        except ProcessLookupError:
            pass
    until = time.monotonic() + _STOP_SECONDS
    while left := [about["pid"] for about in at_work(out) if about in here]:
        if time.monotonic() > until:
            raise CvlctlError(f"process {left[0]} does not end", f"kill -9 {left[0]} ends it at once")
        time.sleep(0.1)
    if len(here) < len(found):
        hosts = ", ".join(sorted({str(about.get("host")) for about in found if about not in here}))
        raise CvlctlError(f"{out} is run from {hosts}, out of reach from here", "cancel it there")
    return here
