"""Who is at work on an experiment: the processes that start its cells, and how they are told to stop."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.experiments.graph import CELLS
from cvlctl.files import is_running, make_folder, read_json, sweep

_STOP_SECONDS = 90.0


@contextmanager
def noted(out: Path, engine: str) -> Iterator[None]:
    """While it lasts, this process is known to run cells of the experiment at `out`."""
    file = _file(out, {"host": platform.node(), "pid": os.getpid()})
    at_work(out)  # which removes what dead ones left
    sweep(file.parent)
    with suppress(OSError):
        make_folder(file.parent)
        file.write_text(json.dumps({"host": platform.node(), "pid": os.getpid(), "engine": engine}))
    try:
        yield
    finally:
        with suppress(OSError):
            file.unlink()


def at_work(out: Path) -> list[dict[str, Any]]:
    """Those that run, as far as this machine can tell: what dead ones left here is removed."""
    found = []
    for file in sorted((out / CELLS).glob("driver-*.json")):
        about = read_json(file) or {}
        if about.get("host") == platform.node() and not is_running(int(about.get("pid") or 0)):
            with suppress(OSError):
                file.unlink()
        else:
            found.append(about)
    return found


def cancel(out: Path) -> list[dict[str, Any]]:
    """Stop those of this machine, as Ctrl-C does; returns them once they are gone.

    Raises:
        CvlctlError: one is on another machine, or does not end.
    """
    found = at_work(out)
    here = [about for about in found if about.get("host") == platform.node()]
    for about in here:
        with suppress(ProcessLookupError):
            os.kill(int(about["pid"]), signal.SIGTERM)
    until = time.monotonic() + _STOP_SECONDS
    while any(_file(out, about).exists() and is_running(int(about["pid"])) for about in here):
        if time.monotonic() > until:
            raise CvlctlError(f"process {here[0]['pid']} does not end", f"kill -9 {here[0]['pid']} ends it at once")
        time.sleep(0.1)
    if len(here) < len(found):
        hosts = ", ".join(sorted({str(about.get("host")) for about in found if about not in here}))
        raise CvlctlError(f"{out} is run from {hosts}, out of reach from here", "cancel it there")
    return here


def _file(out: Path, about: dict[str, Any]) -> Path:
    return out / CELLS / f"driver-{about['host']}-{about['pid']}.json"
