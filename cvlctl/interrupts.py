"""Ctrl-C, SIGTERM and a terminal that is gone: nothing is left half done, and no signal is swallowed.

Who watches gets a KeyboardInterrupt at once, wherever the main thread is; but inside `held` it waits for the end. A
second signal stops at once there too. Should something on the way swallow the exception (a bare `except` of a library,
a destructor), `check` raises it again.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN_SECONDS = 0.5  # shells and launchers pass on what the terminal has sent: two so close together are one

_program = False
_came = 0.0  # when the first one came; 0: none has
_held = 0


def _handler(number: int, frame: FrameType | None) -> None:
    global _came
    now = time.monotonic()
    first = _came == 0.0
    _came = _came or now
    if first and _program:
        _hush()
    waits = _held > 0 if first else now - _came < AGAIN_SECONDS
    if not waits:
        raise KeyboardInterrupt


def _hush() -> None:
    """Objects and threads that the exception leaves half made would complain as they go; what matters is told by us."""
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    warnings.simplefilter("ignore")
    if "logging" in sys.modules:
        sys.modules["logging"].disable()


@contextmanager
def watched(program: bool = False) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP (unless it is ignored, as under nohup) raise KeyboardInterrupt.

    In other threads than the main one nothing changes: whoever runs us deals with signals.

    Args:
        program: the process ends with this; after a signal no library speaks any more.
    """
    global _came, _program
    if not _is_main() or signal.getsignal(signal.SIGINT) is _handler:  # an outer one watches
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    _came, _program = 0.0, program
    if program:  # where a launcher ignores it, exit codes of children would be lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for number in before:
            signal.signal(number, _handler)
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) is _handler:  # else released
                signal.signal(number, signal.SIG_DFL if old is None else old)
        _came, _program = 0.0, False


def release() -> None:
    """From here on signals end the process as it is: nothing is left to lose, and nobody to catch an exception."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """Let what is inside come to its end before the first signal raises KeyboardInterrupt."""
    global _held
    if not _is_main():
        yield
        return
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    check()


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """For a loop that looks whether a signal came, between two updates that must not be cut; held, and watched."""
    main = _is_main()
    with watched(), held():
        yield lambda: main and _came > 0.0


def check() -> None:
    """Raise KeyboardInterrupt if a signal came since the watch began, and is not waiting in an outer `held`."""
    if _came and not _held and _is_main():
        raise KeyboardInterrupt


def _is_main() -> bool:
    return threading.current_thread() is threading.main_thread()
