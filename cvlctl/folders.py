"""Files and folders that take the place of others, one or several at once: a kill leaves the old ones or the new.

What will be at `<path>` is written in the folder `<path>.partial`. Two files tell that it is ours: `lock`, locked for
as long as its writer lives, and `unfinished.json`, the marker, which says whether another writer may go on there.
Before the first rename the marker also says what belongs together, and under which name and inode what there was is put
aside. So a kill between two renames can be undone, and nothing is ever removed that is not ours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from cvlctl import files
from cvlctl.errors import CvlctlError, Exists
from cvlctl.interrupts import held
from cvlctl.progress import say

P = ParamSpec("P")
R = TypeVar("R")
LOCK, MARKER, TAIL = "lock", "unfinished.json", "tail.npz"
KIND = "cvlctl-unfinished"  # in the marker
CONTENT = "content"  # in the folder of an unfinished file: the file


def again_where_it_exists(work: Callable[P, R]) -> Callable[P, R]:
    """`work`, given again where something is in its place: another process may have finished the very same since `work`
    looked, and is then found finished. Whatever else is there is refused by the second time too."""

    @wraps(work)
    def given(*args: P.args, **options: P.kwargs) -> R:
        try:
            return work(*args, **options)
        except Exists:
            return work(*args, **options)

    return given


def partial_of(path: Path) -> Path:
    """Where what will be at `path` is written: beside what a link leads to."""
    path = files.real(path)
    return path.with_name(path.name + ".partial")


class Folder:
    """A folder on its way to `path`, for this process alone until `close` or `put_in_place`.

    Whatever a writer that may be resumed left in `partial` is still there; `empty` removes it.

    Raises:
        CvlctlError: another process is at work there, something that is not ours is in the way, or
            it is no place for it.
    """

    def __init__(self, path: Path) -> None:
        files.check_place(files.real(path))
        put_right(path)
        self.path, self.partial = files.real(path), partial_of(path)
        if os.path.lexists(self.partial) and not _is_ours(self.partial):
            what = f"{self.partial} is in the way: it is nothing that cvlctl wrote"
            raise CvlctlError(what, "give it another name, or choose another path")
        self._lock: files.Lock | None = files.lock(self.partial / LOCK)

    @property
    def is_open(self) -> bool:
        return self._lock is not None

    def mark(self, *, resumes: bool) -> None:
        """Say that the folder is ours, and whether another writer may go on with what will be in it."""
        if (_marker(self.partial) or {}).get("resumes") is not resumes:
            files.write_json(self.partial / MARKER, {"kind": KIND, "resumes": resumes})

    def empty(self) -> None:
        """Remove what an earlier writer left."""
        self.mark(resumes=False)
        _empty(self.partial)

    def close(self, *, discard: bool) -> None:
        """Let go of the folder, and remove it (`discard`), unless it is in place by now."""
        if self._lock is not None:
            if discard:
                _remove(self.partial)
            self._lock.close()
            self._lock = None


@contextlib.contextmanager
def replacing(path: Path, *, folder: bool = False, force: bool = True) -> Iterator[Path]:
    """Where to write a file (or a folder, made already) that takes the place of `path` at the end, or leaves no trace.

    Raises:
        Exists: something is at `path`, and no `force`.
        CvlctlError: the disk refuses, or another process is at work there; what was at `path` is still there.
    """
    work = Folder(path)
    try:
        if not force and os.path.lexists(work.path):  # perhaps since the caller looked
            raise Exists(path)
        files.sweep(work.path.parent, work.path.name)  # earlier versions wrote there
        work.empty()
        with files.disk(path):
            yield work.partial if folder else work.partial / CONTENT
            files.sync_all(work.partial)
            if folder:
                put_in_place([work])
            else:
                os.replace(work.partial / CONTENT, work.path)
                files.sync(work.path.parent)
    finally:
        work.close(discard=True)


def put_in_place(folders: Sequence[Folder]) -> None:
    """Let finished folders take their places, all of them or none; what was there goes once all of them have.

    Raises:
        CvlctlError: the disk refuses. Everything is as it was, the folders still in `partial`.
        KeyboardInterrupt: when it is done, with a word to that effect. A second one, before the last rename: everything
            is as it was.
    """
    parent = folders[0].path.parent
    if any(one.path.parent != parent for one in folders):
        what = f"{folders[0].path} and {folders[1].path} lie in different folders: they cannot be replaced together"
        raise CvlctlError(what, "choose another out: these are links")
    names, together = [one.path.name for one in folders], os.urandom(8).hex()
    placed = False
    try:
        with held():
            _swap_all(folders, names, together)
            placed = True
            with contextlib.suppress(OSError):  # the next command on one of these paths tries again
                _settle(parent, names, together)
    except KeyboardInterrupt as error:
        if placed:
            raise KeyboardInterrupt("written all the same") from error
        raise
    finally:
        if placed:
            for one in folders:
                one.close(discard=False)


def put_right(path: Path) -> bool:
    """Put right what killed commands left at `path` and beside it; what may be resumed stays.

    Returns:
        Whether the last of them had done all its work at `path`, but for this.

    Raises:
        CvlctlError: another process is at work there, or the disk refuses.
    """
    path, done = files.real(path), False
    with files.disk(path):
        found = _marker(path) or _marker(partial_of(path))
        if found and path.name in found["names"]:
            with contextlib.ExitStack() as locks:
                for name in found["names"]:
                    for place in (path.with_name(name), partial_of(path.with_name(name))):
                        if _marker(place, found["together"]):
                            locks.enter_context(files.lock(place / LOCK))
                done = _settle(path.parent, found["names"], found["together"])
        partial = partial_of(path)
        if os.path.lexists(partial) and _is_ours(partial) and not _resumes(partial):
            with files.lock(partial / LOCK):
                if set(os.listdir(partial)) - {LOCK, MARKER}:
                    say(f"{partial}: what a stopped command left there is discarded")
                _remove(partial)
    return done


def put_aside(path: Path) -> Path | None:
    """What was at `path` before a command that was killed between two renames."""
    marker = _marker(partial_of(path))
    return _old(files.real(path), marker) if marker else None


def _announce(one: Folder, names: list[str], together: str) -> None:
    there = os.path.lexists(one.path)
    about = {
        "kind": KIND, "resumes": _resumes(one.partial), "names": names, "together": together,
        "old": _free_name(one.path) if there else None, "inode": os.lstat(one.path).st_ino if there else None,
    }  # fmt: skip
    files.write_json(one.partial / MARKER, about)


def _swap_all(folders: Sequence[Folder], names: list[str], together: str) -> None:
    """All of them, or none."""
    try:
        with files.disk(folders[0].path.parent):
            for one in folders:
                _announce(one, names, together)
            for one in folders:
                _swap(one.path, together)
    except BaseException:
        try:
            for one in folders:
                _put_back(one.path, together)
        except BaseException:  # all stays as it lies: the next command on one of these paths tries again
            for one in folders:
                one.close(discard=False)
        raise


def _swap(path: Path, together: str) -> None:
    marker = _marker(partial_of(path), together)
    if marker and marker["old"]:
        os.rename(path, path.with_name(marker["old"]))
        files.sync(path.parent)
    os.rename(partial_of(path), path)
    files.sync(path.parent)


def _settle(parent: Path, names: list[str], together: str) -> bool:
    """Where all have taken their places, remove what was there (True); else put all of it back (False)."""
    paths = [parent / name for name in names]
    markers = {path: _marker(path, together) for path in paths}
    old = [found for path, marker in markers.items() if marker and (found := _old(path, marker))]
    # markers go after the last of what was put aside: where there still is any, each must have its own
    waiting = any(_marker(partial_of(path), together) for path in paths)
    if waiting or (old and not all(markers.values())):
        for path in paths:
            _put_back(path, together)
        return False
    for one in old:
        shutil.rmtree(one, ignore_errors=True) if one.is_dir() else one.unlink()
    if old:
        files.sync(parent)  # they are gone for good before the markers go, which tell that they were ours
    left = [one for one in old if one.exists()]
    for one in left:
        say(f"{one}: was replaced, and cannot be removed now: the next command that writes there tries again")
    if left:
        return True
    for path, marker in markers.items():
        if marker:
            for name in (TAIL, LOCK, MARKER):
                (path / name).unlink(missing_ok=True)
    return True


def _put_back(path: Path, together: str) -> None:
    if _marker(path, together):
        os.rename(path, partial_of(path))
    marker = _marker(partial_of(path), together)
    old = _old(path, marker) if marker else None
    if old and not os.path.lexists(path):
        os.rename(old, path)
    files.sync(path.parent)


def _old(path: Path, marker: dict[str, Any]) -> Path | None:
    """What was at `path`, where it was put aside: by its inode, lest it is a copy that somebody made."""
    old = path.with_name(marker["old"]) if marker["old"] else None
    return old if old and os.path.lexists(old) and os.lstat(old).st_ino == marker["inode"] else None


def _free_name(path: Path) -> str:
    """`<name>.old`; another number where somebody keeps something under that name."""
    number = 1
    while os.path.lexists(path.with_name(name := f"{path.name}.old{number if number > 1 else ''}")):
        number += 1
    return name


def _marker(folder: Path, together: str = "") -> dict[str, Any] | None:
    """The marker of a folder, if there is one of ours (`together`: and of these); what it lacks is filled in."""
    file = folder / MARKER
    found = files.read_json(file) if file.is_file() and not (file.is_symlink() or folder.is_symlink()) else None
    if not found or found.get("kind") != KIND:
        return None
    marker = {"resumes": False, "names": [], "together": "", "old": None, "inode": None} | found
    words = [*marker["names"], *filter(None, [marker["old"]])] if isinstance(marker["names"], list) else [None]
    if not all(isinstance(word, str) and Path(word).name == word for word in words):
        return None
    return marker if together in ("", marker["together"]) else None


def _is_ours(folder: Path) -> bool:
    """Whether we wrote a folder, or began to: by its marker, or for holding nothing yet. `TAIL`: earlier versions."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {name for name in os.listdir(folder) if files.temporary_of(name) is None}
    return _marker(folder) is not None or names <= {LOCK} or names >= {LOCK, TAIL}


def _resumes(partial: Path) -> bool:
    marker = _marker(partial)
    return bool(marker["resumes"]) if marker else (partial / TAIL).exists()


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.name not in (LOCK, MARKER):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _remove(folder: Path) -> None:
    """The marker goes after everything else, so that what a kill leaves is still ours."""
    with contextlib.suppress(OSError):  # what cannot be removed stays, and the marker with it
        _empty(folder)
        if not set(os.listdir(folder)) - {LOCK, MARKER}:
            (folder / MARKER).unlink(missing_ok=True)
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()
