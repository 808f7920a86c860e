"""HDF5 files written so that a full disk is an error in words, and Ctrl-C is Ctrl-C: HDF5's library itself crashes
where a write fails."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl.interrupts import interruptible

if TYPE_CHECKING:
    import h5py


@contextlib.contextmanager
def new_hdf5(path: Path, **options: Any) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file, and a function to be called after each block: it raises what befell a write, or Ctrl-C.

    Args:
        options: those of `h5py.File`.
    """
    import h5py

    with interruptible() as stopped, open(path, "w+b", buffering=0) as raw:
        taker = _Taker(raw)

        def check() -> None:
            taker.check()
            if stopped():
                raise KeyboardInterrupt

        with h5py.File(taker, "w", **options) as file:
            yield file, check
        check()


class _Taker(io.RawIOBase):
    """A file that takes whatever HDF5 gives it. What the disk refuses, and all that follows, it keeps in memory.

    HDF5 closes a file in several steps; where one of them fails the next works on memory that was freed. So none is
    allowed to fail: the error waits here until it is asked for.
    """

    def __init__(self, raw: Any) -> None:
        self._raw, self._at, self._kept = raw, 0, list[tuple[int, bytes]]()
        self._error: BaseException | None = None

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += max([self._raw.seek(0, os.SEEK_END), *(at + len(data) for at, data in self._kept)])
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any) -> int:
        content, done = memoryview(data).cast("B"), 0
        try:
            self.check()
            self._raw.seek(self._at)
            while done < len(content):
                done += self._raw.write(content[done:])
        except BaseException as error:  # a second Ctrl-C too
            self._error = self._error or error
            self._kept.append((self._at + done, bytes(content[done:])))
        self._at += len(content)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        into, start = memoryview(buffer).cast("B"), self._at
        self._raw.seek(start)
        read = self._raw.readinto(into)
        for at, data in self._kept:
            low, high = max(at, start), min(at + len(data), start + len(into))
            if low < high:
                into[low - start : high - start] = data[low - at : high - at]
                read = max(read, high - start)
        self._at += read
        return read

    def truncate(self, size: int | None = None, /) -> int:
        size = self._at if size is None else size
        try:
            if self._error is None:
                self._raw.truncate(size)
        except OSError as error:
            self._error = error
        return size

    def flush(self) -> None:
        """Nothing waits here; `files.sync` comes when the file is whole."""
