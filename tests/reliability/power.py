"""What a disk holds where power is lost: contents as they were last synced, names as their folder was.

`Disk` watches a command from inside (an audit hook, and os.fsync replaced), and lays down what a loss of power would
have left at the moments that it was asked for, in up to three ways:

    least   nothing that was not synced is there
    names   all names are there, but contents that were not synced are cut to half
    mixed   for every folder and every file one or the other, by a seeded draw
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
import sys
import threading
from pathlib import Path
from typing import Any

from reliability.runner import PATHS, changed

from cvlctl.files import read_json

MARKER = "unfinished.json"  # of folders that take the place of others (cvlctl/folders.py)
KINDS = ("least", "names", "mixed")


class Disk:
    """A model of the disk under `root`; states go to `keep`/NUMBER-KIND, beside them NUMBER.json: what was saved."""

    def __init__(self, root: str, keep: str, at: list[int]) -> None:
        self.root, self.keep, self.at = root, Path(keep), set(at)
        self.trace: list[str] = []
        self.contents: dict[int, bytes] = {}  # inode of a file -> what was synced of it
        self.names: dict[int, dict[str, int]] = {}  # inode of a folder -> its names, as synced
        self.held: dict[int, int] = {}  # inode -> a handle, so that no number is given to another file
        self.saved: dict[str, list[str]] = {}  # file -> digests of which it must have one
        self.episodes: dict[str, int] = {}  # store -> how many were flushed
        self._busy, self._lock = threading.local(), threading.RLock()
        self.top = self.hold(root)
        for folder, _, files in os.walk(root):
            self.sync(os.open(folder, os.O_RDONLY))
            for name in files:
                self.sync(os.open(os.path.join(folder, name), os.O_RDONLY))
        os.fsync = self.fsync
        promises(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in PATHS or getattr(self._busy, "here", False):
            return
        self._busy.here = True
        try:
            paths = changed(event, args)
            if any(path.startswith(self.root + os.sep) for path in paths):
                with self._lock:
                    self.moment(" ".join([event, *(os.path.relpath(path, self.root) for path in paths)]))
                    if event in ("os.remove", "os.rename"):  # the command's own wish: no longer a promise
                        self.saved.pop(os.path.relpath(paths[0], self.root), None)
        finally:
            self._busy.here = False

    def fsync(self, handle: int) -> None:
        """In place of os.fsync: now it is on the disk."""
        self._busy.here = True
        try:
            with self._lock:
                self.sync(os.dup(handle))
                self.moment("fsync " + os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), self.root))
        finally:
            self._busy.here = False

    def sync(self, handle: int) -> None:
        about = os.fstat(handle)
        self.held.setdefault(about.st_ino, handle)
        if stat.S_ISDIR(about.st_mode):
            self.names[about.st_ino] = self.now(about.st_ino)
        else:
            self.contents[about.st_ino] = self.content(about.st_ino)

    def hold(self, path: str) -> int:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        inode = os.fstat(handle).st_ino
        if self.held.setdefault(inode, handle) != handle:
            os.close(handle)
        return inode

    def now(self, folder: int) -> dict[str, int]:
        """The names in a folder, synced or not."""
        place = f"/proc/self/fd/{self.held[folder]}"
        return {name: self.hold(os.path.join(place, name)) for name in os.listdir(self.held[folder])}

    def content(self, inode: int) -> bytes:
        with open(f"/proc/self/fd/{self.held[inode]}", "rb") as file:
            return file.read()

    def moment(self, what: str) -> None:
        """Something is about to change, or was just synced: lay down what is left if power goes now."""
        self.trace.append(what)
        number = len(self.trace)
        if number not in self.at or not self.keep.name:
            return
        for kind in KINDS:
            laid: dict[int, Path] = {}
            self.lay(self.top, self.keep / f"{number}-{kind}", kind, random.Random(f"{number}"), laid)
            renumber(laid)
        told = {"what": what, "saved": self.saved, "episodes": self.episodes}
        (self.keep / f"{number}.json").write_text(json.dumps(told))

    def lay(self, inode: int, path: Path, kind: str, chance: random.Random, laid: dict[int, Path]) -> None:
        laid[inode] = path
        if stat.S_ISDIR(os.fstat(self.held[inode]).st_mode):
            path.mkdir()
            keep = kind == "least" or (kind == "mixed" and chance.random() < 0.5)
            names = self.names.get(inode, {}) if keep else self.now(inode)
            for name in sorted(names):
                self.lay(names[name], path / name, kind, chance, laid)
            return
        synced, now = self.contents.get(inode, b""), self.content(inode)
        half = now[: len(now) // 2]
        left = {"least": synced, "names": synced if synced == now else half, "mixed": chance.choice([synced, now])}
        path.write_bytes(left[kind])


def renumber(laid: dict[int, Path]) -> None:
    """A disk keeps its inodes, a copy of it does not: markers that name one of them name the copy's."""
    for path in laid.values():
        about = read_json(path) if path.name == MARKER else None
        if about and about.get("inode") in laid:
            path.write_text(json.dumps(about | {"inode": laid[about["inode"]].stat().st_ino}))


def promises(disk: Disk) -> None:
    """Note what the command itself takes for saved: files that were replaced durably, episodes that were flushed."""
    from cvlctl import files
    from cvlctl.data import writer

    plain, flush = files.write_atomically, writer.StoreWriter.flush

    def write(path: Path, *data: bytes | memoryview) -> None:
        name, digest = os.path.relpath(os.path.abspath(path), disk.root), hashlib.sha256(b"".join(data)).hexdigest()
        before = disk.saved.get(name, [])
        if before:
            disk.saved[name] = [*before, digest]
        plain(path, *data)
        if ".partial" not in name:  # of a store that is being written the number of episodes tells
            disk.saved[name] = [digest]

    def flushed(self: writer.StoreWriter) -> None:
        flush(self)
        disk.episodes[os.path.relpath(os.path.abspath(self.path), disk.root)] = self.num_episodes

    for module in list(sys.modules.values()):
        if getattr(module, "write_atomically", None) is plain:
            module.write_atomically = write  # type: ignore[attr-defined]
    writer.StoreWriter.flush = flushed  # type: ignore[method-assign]
