"""How fast this machine trains, as measured once: kept in the user's cache, so that plans and decisions repeat."""

from __future__ import annotations

import contextlib
import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.files import read_regular, write_json
from cvlctl.machine import cpu_name
from cvlctl.version import versions

MOST = 1_000_000  # bytes of the cache's file


class Rate(NamedTuple):
    """What a training step takes, eager."""

    flops: float  # floating point operations a second
    call: float  # seconds of a call of PyTorch, however small the tensors

    def by(self, threads: int) -> Rate:
        """Of so many threads, where this is one's: each beyond it is worth half of it, and beyond 16 nothing."""
        return Rate(self.flops * (1 + min(threads, 16)) / 2, self.call)


USUAL = Rate(120e9, 6e-6)  # of a server's core, where nothing has been measured


def kept() -> Rate | None:
    """What was measured of one thread on this processor, with this PyTorch; None: nothing, or it is garbled."""
    found = _read().get(_key())
    if not isinstance(found, dict):
        return None
    rate = Rate(found.get("flops"), found.get("call"))  # type: ignore[arg-type]
    sound = all(type(value) in (int, float) and math.isfinite(value) and value > 0 for value in rate)
    return rate if sound else None


def keep(rate: Rate) -> None:
    """Keep a measured rate, beside those of other machines that share the cache. Where one cannot write, it is not."""
    with contextlib.suppress(OSError, RuntimeError, CvlctlError):
        write_json(_file(), _read() | {_key(): rate._asdict()})


def _file() -> Path:
    """RuntimeError where there is no home."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "cvlctl" / "rates.json"


def _key() -> str:
    return f"{cpu_name()}, torch {versions().get('torch')}"


def _read() -> dict[str, object]:
    try:
        file = _file()
        about = os.stat(file)
        return _content(file, about.st_ino, about.st_mtime_ns)
    except (OSError, ValueError, RecursionError, RuntimeError):
        return {}


@lru_cache(1)  # a plan of thousands of cells asks for each
def _content(file: Path, inode: int, written: int) -> dict[str, object]:
    found = json.loads(read_regular(file, MOST))
    return found if isinstance(found, dict) else {}
