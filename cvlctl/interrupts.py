"""Ctrl-C and SIGTERM as a flag, so that what is under way comes to a good end before they are obeyed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C and SIGTERM into a flag, so that no update is left half done. A second Ctrl-C stops at once."""
    seen = False

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            raise KeyboardInterrupt
        seen = True

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = [signal.signal(number, handler) for number in signals]
    except ValueError:  # not the main thread: whoever runs us deals with signals
        yield lambda: False
        return
    try:
        yield lambda: seen
    finally:
        for number, old in zip(signals, before, strict=True):
            signal.signal(number, old)
