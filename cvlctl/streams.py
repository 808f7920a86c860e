"""Standard streams that are closed, full or gone: what people would have read never stops the work, nor spoils it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from cvlctl.terminal import visible


def secure() -> None:
    """Give closed standard streams a place, and let stderr forget what cannot be written. For whole programs alone.

    A number that is closed would be given to the next file that is opened, and what a library prints would end up in a
    store or a checkpoint. On stdout, which holds results, errors stay errors.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is this one
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    encoding = sys.stderr.encoding if sys.stderr else None
    raw = io.BufferedWriter(_Forgetful(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, errors="replace", line_buffering=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows ? for what it lacks


class _Forgetful(io.FileIO):
    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            return super().write(data) or len(data)  # None where a terminal that does not block has no room
        return len(data)


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """What is printed meanwhile, by a library in C too, goes to stderr: stdout is for results."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).fflush(None)  # what C keeps for later would follow the result
        os.dup2(results, 1)
        os.close(results)


def tell(line: str) -> None:
    """One plain line for people, on stderr, or nowhere."""
    with contextlib.suppress(OSError, ValueError):  # a full disk, a lost terminal, a closed stream
        if sys.stderr is not None:  # where it is, print would take stdout
            print(visible(line), file=sys.stderr, flush=True)


def let_go(stream: TextIO) -> None:
    """Flush a stream for the last time; where that fails, drop the rest, or the interpreter complains as it exits."""
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def is_terminal(stream: TextIO | None) -> bool:
    """Whether people see `stream` as it is written; not where it is closed."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:
        return False
