"""Files that survive a kill: replaced whole or not at all, one writer at a time, and the disk's errors in words."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Self, TextIO

from cvlctl.errors import Busy, CvlctlError

LARGEST = 2**31  # bytes of a file that is read at once: documents, and rows by the line
_TEMPORARY = re.compile(r"\.(.+)\.(\d{1,10})\.tmp")  # .NAME.PID.tmp: what `write_atomically` writes before it replaces
_SPACE = "free some space and run the same command again: nothing that was flushed is lost"
_PERMISSION = "choose another place, or change its permissions"
SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EIO)  # whatever is made of them, it is them
_FILES = "raise the limit of open files (ulimit -n 4096), or use fewer workers or processes"
HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "choose another place",
    errno.ENOTDIR: "a file is where a directory should be: choose another path",
    errno.EISDIR: "a directory is where a file should be: choose another path",
    errno.EEXIST: "something else is there already: choose another path",
    errno.ENAMETOOLONG: "choose a shorter path",
    errno.ELOOP: "symbolic links lead in a circle: choose another path, or remove the link",
    errno.EMFILE: _FILES,
    errno.ENFILE: _FILES,
    errno.EIO: "the device reports a fault: look at the disk (dmesg), or choose another place",
}


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into a CvlctlError."""
    try:
        yield
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "check that the path is a directory that you may write to")
        raise CvlctlError(f"cannot write {path}: {error.strerror or error}", hint) from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, durably: what is synced in it is then not lost with it."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in made:
        with contextlib.suppress(PermissionError):  # one that may be written to and not read
            sync(folder.parent)


def sync_all(folder: Path) -> None:
    """`sync` a folder and all that is in it."""
    for root, _, names in os.walk(folder):
        for name in [*names, "."]:
            sync(Path(root) / name)


def named(path: Path) -> Path:
    """A path that ends in a name, which others can stand beside; that of `.` and `..` is found out.

    Raises:
        CvlctlError: the root of the file system has none.
    """
    if path.name in ("", ".."):
        path = Path(os.path.realpath(path))
        if not path.name:
            raise CvlctlError(f"{path} has no name: nothing can be written in its place", "choose another path")
    return path


def real(path: Path) -> Path:
    """What a link leads to, be it there or not; any other path is itself, by its name.

    Raises:
        CvlctlError: a link that leads in a circle, or the root of the file system.
    """
    path = named(path)
    if not path.is_symlink():
        return path
    found = Path(os.path.realpath(path))
    if found.is_symlink():
        raise CvlctlError(f"{path} is a symbolic link that leads in a circle", "remove it, or choose another path")
    return found


def check_place(path: Path) -> None:
    """Refuse to put a result in the place of the current directory, or into a store, whose files it could replace.

    Raises:
        CvlctlError: `path` is such a place.
    """
    place = Path(os.path.realpath(path))
    if Path.cwd().is_relative_to(place):
        raise CvlctlError(f"{path} is the current directory, or holds it", "choose a place of its own")
    for folder in place.parents:
        attributes = (read_json(folder / "zarr.json") or {}).get("attributes")
        if isinstance(attributes, dict) and attributes.get("format") == "cvlctl-store":
            raise CvlctlError(f"{path} lies inside the store {folder}", "choose a place outside of it")


def write_atomically(path: Path, *data: bytes | memoryview) -> None:
    """Replace `path` by `data`, durably: a reader sees the old file or the new one, whole. Makes the folder it needs.

    Raises:
        CvlctlError: the disk refuses; the old file is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        make_folder(path.parent)
        with _taken(temporary) as file:
            try:
                file.writelines(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
                sync(path.parent)
            finally:
                temporary.unlink(missing_ok=True)


def write_result(path: Path, data: bytes | memoryview, *, force: bool) -> str:
    """Write what a command makes, a file that fits in memory. Returns "written", or "finished already" where it is
    there, byte for byte.

    Args:
        force: replace another file; where a link leads to one, that one.

    Raises:
        CvlctlError: something else is there, it is no place for it, or the disk refuses.
    """
    place = real(path)
    check_place(place)
    sweep(place.parent, place.name)
    if place.is_file() and not force and place.stat().st_size == len(data) and place.read_bytes() == data:
        return "finished already"
    if place.exists() and not (force and place.is_file()):
        hint = "choose another path" + "; --force (in Python, force=True) replaces it" * place.is_file()
        raise CvlctlError(f"{path} exists", hint)
    write_atomically(place, data)
    return "written"


def _taken(temporary: Path) -> IO[bytes]:
    """A temporary file, empty, and locked until it is closed: that is how `sweep` knows the living from the dead."""
    while True:
        file = open(temporary, "ab")  # noqa: SIM115 (the caller closes it)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(temporary)):
                file.truncate(0)  # of a dead process with our number
                return file
        file.close()  # swept, or replaced by another thread, between opening and locking


def temporary_of(name: str) -> str | None:
    """The name of the file that `write_atomically` was writing into a temporary called `name`; None: it is none."""
    found = _TEMPORARY.fullmatch(name)
    return found and found[1]


def sweep(folder: Path, *names: str) -> None:
    """Remove the temporary files in `folder` of processes that are dead, and nothing else.

    Args:
        names: of the files that were being written. None given: whatever they were; for folders that are ours.
    """
    with contextlib.suppress(OSError):  # what cannot be read or removed stays
        for found in entries(folder):
            if (name := temporary_of(found)) and (not names or name in names):
                _remove_if_abandoned(folder / found)


def _remove_if_abandoned(temporary: Path) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        if not stat.S_ISREG(temporary.lstat().st_mode):
            return
        with open(temporary, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return  # somebody is writing it
            except OSError:  # a file system without locks
                if is_running(int(temporary.name.split(".")[-2])):
                    return
            if os.path.samestat(os.fstat(file.fileno()), temporary.lstat()):  # else replaced meanwhile
                temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Replace `path` by a JSON document, as `write_atomically` does."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, to be read. A device or a pipe, or a link to one, may never come to an end.

    Raises:
        OSError: it is anything else, or cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # of a pipe, the opening alone would wait
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(handle, "rb")


def read_regular(path: Path, most: int = LARGEST) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it is anything else, is larger than `most` bytes, or cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EINVAL, f"{size:,} bytes are too many for what it should hold", str(path))
        return file.read(size)


class Lock:
    """A file that this process has alone, until `close` or its end, however it ends."""

    def __init__(self, handle: TextIO, *, noted: bool) -> None:
        self._handle, self._noted = handle, noted

    def close(self) -> None:
        if self._noted and not self._handle.closed:
            with contextlib.suppress(OSError):
                self._handle.truncate(0)
        self._handle.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def lock(file: Path) -> Lock:
    """Lock `file` for this process alone. Its folder is made where there is none.

    Where the file system has no locks, a line in the file says who has it. Two processes that begin at the same
    instant are then not told apart, nor is whether a process of another machine still runs.

    Raises:
        Busy: another process has it.
        CvlctlError: the file cannot be made.
    """
    with disk(file.parent):
        handle = _opened(file)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            noted = False
        except BlockingIOError:
            raise _busy(file) from None
        except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP: there are none
            with disk(file.parent):
                noted = _note(handle, file)
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                return Lock(handle, noted=noted)
        raise _busy(file)  # its last owner finished in between and took the file along
    except BaseException:
        handle.close()
        raise


def _opened(file: Path) -> TextIO:
    for _ in range(100):
        with contextlib.suppress(FileNotFoundError, FileExistsError):  # the folder's last owner takes it along
            make_folder(file.parent)
            return open(file, "a+")
    raise _busy(file)


def _busy(file: Path) -> Busy:
    return Busy(f"another process is writing {file.parent}", "wait until it is done, or choose another path")


def _note(handle: TextIO, file: Path) -> bool:
    """Write host and number of this process into a lock's file, unless there are those of one that may be running."""
    handle.seek(0)
    host, _, number = handle.read(300).strip().rpartition(" ")
    if number.isdecimal():
        if host != platform.node():
            what = f"process {number} on {host} is writing {file.parent}, or was: this file system has no locks"
            raise Busy(what, f"wait until it is done; where it is none any more, delete {file}")
        if is_running(int(number)):
            raise Busy(f"another process is writing {file.parent}", f"wait until {number} is done; {file} names it")
    handle.truncate(0)
    handle.write(f"{platform.node()} {os.getpid()}")
    handle.flush()
    return True


def is_running(process: int) -> bool:
    """Whether a process of this machine is running; below 1 are numbers of groups, or of all processes."""
    if process < 1:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def now_at(folder: Path) -> float:
    """The time by the clock of the file system that a folder is on, which those of hosts differ from."""
    probe = folder / f".now.{os.getpid()}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def entries(folder: Path) -> list[str]:
    """The names in a directory; none where there is no such directory. CvlctlError where a file is in its place."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError as error:
        raise CvlctlError(f"{folder} is not a directory: a file is in the way", HINTS[errno.ENOTDIR]) from error


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CvlctlError(f"{path}: {error.strerror}") from error
