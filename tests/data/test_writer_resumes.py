"""Writers that are killed, abandoned or out of disk: nothing that was flushed is lost, and the same store comes out."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from toy_stores import assert_same, episode, many

from cvlctl.data import writer as writer_module
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

pytestmark = pytest.mark.usefixtures("no_fsync")


# ------------------------------------------------------------------------------------------------------ kill and resume


def test_an_abandoned_writer_loses_only_what_was_not_flushed(tmp_path: Path, small_chunks: None) -> None:
    episodes = many(20)
    path = tmp_path / "a.zarr"
    first = StoreWriter(path, task="toy")
    for item in episodes[:9]:
        first.append(item)
    first.flush()
    for item in episodes[9:14]:  # passes chunk boundaries, so that uncommitted chunks lie on disk
        first.append(item)
    uncommitted = len(list((first.partial / "data/observation/c").iterdir()))
    first.close()
    with StoreWriter(path, task="toy") as second:
        assert second.num_episodes == 9 and second.num_transitions == sum(len(e) for e in episodes[:9])
        assert len(list((second.partial / "data/observation/c").iterdir())) < uncommitted
        assert_same(second.episodes(), episodes[:9])
        for item in episodes[9:]:
            second.append(item)
        assert_same(second.episodes(), episodes)
        store = second.finish()
    assert_same(store.episodes(), episodes)
    assert store.digest() == write_store(tmp_path / "b.zarr", episodes, task="toy").digest()
    assert verify_store(path) == []


SPOTS = [("fsync", 9), ("replace", 3), ("replace", 40), ("create_array", 7), ("_checksum", 1)]
SPOTS += [("rename", 0), ("rename", 1)]


KILLED = """
import json, os, signal, sys
import numpy as np
import cvlctl.data.writer as w
from cvlctl.types import Episode
w.CHUNK_ROWS = 50
calls = 0
def die_there(original, after):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return wrapped
def write(path, spot, after):
    module = {"fsync": os, "replace": os, "rename": os, "create_array": w.zarr, "_checksum": w}[spot]
    flushed = open(os.path.dirname(path) + ".flushed", "w")
    writer = w.StoreWriter(path, task="toy", force=True)
    setattr(module, spot, die_there(getattr(module, spot), after))
    for i in range(writer.num_episodes, 30):
        writer.append(Episode(np.full((12, 2), i), np.zeros((11, 1)), np.full(11, i)))
        if i % 4 == 3:
            writer.flush()
            print(i + 1, file=flushed, flush=True)
    writer.finish()
for case in json.loads(sys.argv[1]):
    if os.fork() == 0:
        write(*case)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """For each spot a directory with an old store, and what its writer left there when it was killed at that spot."""
    root = tmp_path_factory.mktemp("killed")
    folders = {(spot, after): root / f"{spot}-{after}" for spot, after in SPOTS}
    old = [Episode(np.full((3, 2), -7), np.zeros((2, 1)))]
    for folder in folders.values():
        write_store(folder / "a.zarr", old, task="old")
    cases = json.dumps([(str(folder / "a.zarr"), *spot) for spot, folder in folders.items()])
    done = subprocess.run([sys.executable, "-P", "-c", KILLED, cases], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(SPOTS), done.stdout + done.stderr
    return folders


@pytest.mark.parametrize("spot", SPOTS)
def test_sigkill_at_awkward_places(
    killed: dict[tuple[str, int], Path], spot: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process killed inside flush, inside a chunk, inside finish and between the two renames of --force."""
    folder = killed[spot]
    path = folder / "a.zarr"
    flushed = int((folder.with_name(folder.name + ".flushed").read_text().split() or ["0"])[-1])
    survivor = path if path.exists() else path.with_name("a.zarr.old")
    assert next(open_store(survivor).episodes()).observations.tolist() == [[-7, -7]] * 3
    if survivor != path:
        with pytest.raises(CvlctlError, match="not finished") as caught:
            open_store(path)
        assert str(survivor) in caught.value.hint
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 50)
    with StoreWriter(path, task="toy", force=True) as writer:
        assert writer.num_episodes in (flushed, flushed + 4, 30)
        assert writer.num_episodes >= flushed
        for i in range(writer.num_episodes, 30):
            writer.append(Episode(np.full((12, 2), i), np.zeros((11, 1)), np.full(11, i)))
        store = writer.finish()
    assert verify_store(path) == []
    assert [e.observations[0, 0] for e in store.episodes()] == list(range(30))
    assert sorted(p.name for p in folder.iterdir()) == ["a.zarr"]


def test_second_writer_is_refused_and_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    code = textwrap.dedent(f"""
        import sys
        from cvlctl.data.writer import StoreWriter
        writer = StoreWriter({str(path)!r}, task="toy")
        print("ready", flush=True)
        sys.stdin.read()
    """)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        with pytest.raises(CvlctlError, match="another process is writing"):
            StoreWriter(path, task="toy", force=True)
        other.kill()
    first = StoreWriter(path, task="toy")
    with pytest.raises(CvlctlError, match="another process is writing"):
        StoreWriter(path, task="toy")
    first.close()
    assert not first.partial.exists()  # nothing was flushed: nothing stays behind
    with pytest.raises(CvlctlError, match="closed"):
        first.append(episode(0))


def test_resume_refuses_another_task_or_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.zarr"
    with StoreWriter(path, task="toy", provenance={"recipe": {"seed": 0}}) as writer:
        writer.append(episode(0))
        writer.flush()
    for changed in ({"provenance": {"recipe": {"seed": 1}}}, {"horizon": 50}, {"label": "other"}, {"task": "toy2"}):
        settings_: dict[str, Any] = {"task": "toy", "provenance": {"recipe": {"seed": 0}}, **changed}
        with pytest.raises(CvlctlError, match="another") as caught:
            StoreWriter(path, **settings_)
        assert "delete" in caught.value.hint and "--force" in caught.value.hint
    with pytest.raises(CvlctlError, match="unfinished"):
        write_store(path, many(2), task="toy", provenance={"recipe": {"seed": 0}})
    with StoreWriter(path, task="toy", provenance={"recipe": {"seed": 0}}) as writer:
        assert writer.num_episodes == 1  # nobody harmed it
    with StoreWriter(path, task="toy2", force=True) as writer:
        assert writer.num_episodes == 0
        writer.append(episode(5))
        store = writer.finish()
    assert_same(store.episodes(), [episode(5)], task="toy2")


def test_a_flush_replaces_the_tail_whole(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        writer.flush()
        with (writer.partial / "tail.npz").open("rb") as before:
            content = before.read()
            writer.append(episode(1))
            writer.flush()
            before.seek(0)
            assert before.read() == content  # the old file was never written to
        assert (writer.partial / "tail.npz").read_bytes() != content


def test_a_damaged_tail_is_an_error_or_discarded_by_force(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        writer.flush()
    tail = writer.partial / "tail.npz"
    tail.write_bytes(tail.read_bytes()[:100])
    with pytest.raises(CvlctlError, match=r"tail\.npz cannot be read"):
        StoreWriter(tmp_path / "a.zarr", task="toy")
    assert tail.exists()
    with StoreWriter(tmp_path / "a.zarr", task="toy", force=True) as writer:
        assert writer.num_episodes == 0


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize(("chunk", "limit"), [(20, 200), (100_000, 5_000)])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, limit: int
) -> None:
    """The kernel itself refuses a chunk, or the tail, by a limit on file sizes. Afterwards the writer goes on."""
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", chunk)
    path, episodes = tmp_path / "a.zarr", many(30)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StoreWriter(path, task="toy") as writer:
        for item in episodes[:2]:
            writer.append(item)
        writer.flush()
        tail = (writer.partial / "tail.npz").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(CvlctlError, match=r"cannot write .*a\.zarr\.partial") as caught:
                for item in episodes[2:]:
                    writer.append(item)
                writer.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "nothing that was flushed is lost" in caught.value.hint
        assert (writer.partial / "tail.npz").read_bytes() == tail
        kept = writer.num_episodes
        writer.flush()
    with StoreWriter(path, task="toy") as again:
        assert again.num_episodes == kept > 2
        store = again.finish()
    assert_same(store.episodes(), episodes[:kept])
    assert verify_store(path) == []


def test_a_disk_that_fails_in_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        with monkeypatch.context() as patch, pytest.raises(CvlctlError, match="No space left"):
            patch.setattr(writer_module, "_checksum", full)
            writer.finish()
        assert not (tmp_path / "a.zarr").exists()
        writer.append(episode(1))
        store = writer.finish()
    assert_same(store.episodes(), [episode(0), episode(1)])
    assert verify_store(store.path) == []


def test_write_store_leaves_no_trace_where_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "_checksum", full)
    with pytest.raises(CvlctlError, match="No space left"):
        write_store(tmp_path / "a.zarr", many(2), task="toy")
    assert list(tmp_path.iterdir()) == []


def test_writes_under_way_beside_the_one_that_failed_leave_nothing_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zarr writes several files at once; a slow one would make its folder anew after the store was removed."""
    put = zarr.storage._local._put

    def slow_or_failed(path: Path, value: Any, exclusive: bool = False) -> Any:
        if path.parent.name == "observation":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)
        return put(path, value, exclusive)

    monkeypatch.setattr(zarr.storage._local, "_put", slow_or_failed)
    with pytest.raises(CvlctlError, match="No space left"):
        write_store(tmp_path / "a.zarr", many(2), task="toy")
    time.sleep(0.5)
    assert list(tmp_path.iterdir()) == []
