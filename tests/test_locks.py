"""Locks, on file systems that have them and on those that have none."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from toy_stores import many

from cvlctl import files
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError


@pytest.fixture(params=[errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refused)


def test_without_locks_the_file_names_its_owner(tmp_path: Path, no_locks: None) -> None:
    file = tmp_path / "out" / ".lock"
    first = files.lock(file)
    assert file.read_text() == f"{platform.node()} {os.getpid()}"
    with pytest.raises(CvlctlError, match=r"another process is writing .*out"):
        files.lock(file)
    first.close()
    first.close()
    with files.lock(file), pytest.raises(CvlctlError, match="another process"):
        files.lock(file)
    assert file.read_text() == ""


def test_without_locks_a_dead_owner_has_nothing(tmp_path: Path, no_locks: None) -> None:
    dead = subprocess.run([sys.executable, "-P", "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    for owner in (f"{platform.node()} {dead.stdout.strip()}", f"{platform.node()} {2**70}", "damaged", ""):
        (tmp_path / "lock").write_text(owner)
        files.lock(tmp_path / "lock").close()


def test_without_locks_an_owner_on_another_machine_may_be_alive(tmp_path: Path, no_locks: None) -> None:
    (tmp_path / "lock").write_text("elsewhere 12")
    with pytest.raises(CvlctlError, match=r"process 12 on elsewhere is writing .*no locks") as caught:
        files.lock(tmp_path / "lock")
    assert f"delete {tmp_path / 'lock'}" in caught.value.hint
    (tmp_path / "lock").unlink()
    files.lock(tmp_path / "lock").close()


@pytest.mark.usefixtures("no_fsync")
def test_stores_are_written_where_there_are_no_locks(tmp_path: Path, no_locks: None) -> None:
    assert write_store(tmp_path / "a.zarr", many(2), task="toy").num_episodes == 2
    assert write_store(tmp_path / "a.zarr", many(3), task="toy", force=True).num_episodes == 3
    assert os.listdir(tmp_path) == ["a.zarr"]
    assert sorted(os.listdir(tmp_path / "a.zarr")) == ["data", "labels", "meta", "zarr.json"]
