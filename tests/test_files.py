"""Files replaced whole or not at all, one writer at a time, and errors in words."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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


def test_a_file_in_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert files.entries(tmp_path) == ["a"]
    assert files.entries(tmp_path / "none") == []
    with pytest.raises(CvlctlError, match="a is not a directory"):
        files.entries(tmp_path / "a")
    with pytest.raises(CvlctlError, match="cannot write") as caught:
        files.write_atomically(tmp_path / "a" / "b", b"")
    assert "choose another path" in caught.value.hint
