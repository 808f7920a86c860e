"""Files replaced whole or not at all, one writer at a time, and errors in words."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvlctl import files
from cvlctl.errors import CvlctlError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "a.json"
    files.write_atomically(path, b"old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CvlctlError, match=r"cannot write .*a\.json: No space left") as caught:
        files.write_atomically(path, b"new")
    assert "free some space" in caught.value.hint
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_sweeping_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    ours = tmp_path / ".run.json.7.tmp"
    kept = [".run.json.tmp", "run.json.7.tmp", ".run.json.7.tmp.bak", "..7.tmp", ".a.7b.tmp", "run.json"]
    for name in [ours.name, *kept]:
        (tmp_path / name).write_text("x")
    (tmp_path / ".folder.8.tmp").mkdir()
    (tmp_path / ".link.9.tmp").symlink_to(tmp_path / "run.json")
    kept += [".folder.8.tmp", ".link.9.tmp"]
    files.sweep(tmp_path, "other.json")
    with open(ours, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as its writer does
        files.sweep(tmp_path)
        assert set(files.entries(tmp_path)) == {ours.name, *kept}
    files.sweep(tmp_path, "run.json")
    assert set(files.entries(tmp_path)) == set(kept)
    files.sweep(tmp_path / "none")


def test_nobody_sweeps_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even between the writer's opening a temporary and its locking it, nor what a process of our number left."""
    path = tmp_path / "a.json"
    (tmp_path / f".a.json.{os.getpid()}.tmp").write_bytes(b"of a dead process, and longer")
    flock, fsync = fcntl.flock, os.fsync
    swept: list[str] = []

    def swept_before(file: Any, operation: int) -> None:
        if operation == fcntl.LOCK_EX and len(swept) < 2:
            swept.append("before locking")
            files.sweep(tmp_path)
        flock(file, operation)

    def swept_while(handle: int) -> None:
        swept.append("while writing")
        files.sweep(tmp_path)
        fsync(handle)

    monkeypatch.setattr(fcntl, "flock", swept_before)
    monkeypatch.setattr(os, "fsync", swept_while)
    files.write_atomically(path, b"whole")
    assert swept[:3] == ["before locking", "before locking", "while writing"]
    assert path.read_bytes() == b"whole"
    assert files.entries(tmp_path) == ["a.json"]


def test_a_lock_has_one_owner_until_it_is_closed(tmp_path: Path) -> None:
    owner = files.lock(tmp_path / "run" / ".lock")
    with pytest.raises(CvlctlError, match=r"another process is writing .*run"):
        files.lock(tmp_path / "run" / ".lock")
    owner.close()
    files.lock(tmp_path / "run" / ".lock").close()


def test_sha256_of_a_file_and_of_none(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1
    with pytest.raises(CvlctlError, match="No such file"):
        files.sha256(tmp_path / "b")


@pytest.mark.parametrize("read", [files.read_regular, files.sha256, files.read_json])
def test_what_is_no_file_is_not_waited_for(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless", "."):
        try:
            assert read(tmp_path / name) is None
        except (OSError, CvlctlError) as error:
            assert "regular file" in str(error) or "directory" in str(error)


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert files.entries(tmp_path) == ["a"]
    assert files.entries(tmp_path / "none") == []
    with pytest.raises(CvlctlError, match="a is not a directory"):
        files.entries(tmp_path / "a")
    with pytest.raises(CvlctlError, match="cannot write") as caught:
        files.write_atomically(tmp_path / "a" / "b", b"")
    assert "choose another path" in caught.value.hint


def test_folders_are_made_durably(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder whose list of names got longer is synced, and no other."""
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    files.make_folder(tmp_path / "a" / "b")
    assert sorted(synced) == [tmp_path, tmp_path / "a"]
    synced.clear()
    files.make_folder(tmp_path / "a" / "b")
    assert synced == []
    monkeypatch.chdir(tmp_path)
    files.make_folder(Path("c"))
    assert synced == [Path()]
