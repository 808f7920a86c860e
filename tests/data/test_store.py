"""The store: round trip, kills at any instant, damage that is named, and the reward-free guarantee."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import Zstd
from scipy import stats

from cvlctl import files
from cvlctl.data import chunks
from cvlctl.data import store as store_module
from cvlctl.data import writer as writer_module
from cvlctl.data.store import Store, open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode


def episode(
    seed: int, length: int = 7, terminated: bool = False, rewards: bool = True, successes: bool = True
) -> Episode:
    rng = np.random.default_rng(seed)
    return Episode(
        rng.normal(size=(length + 1, 3)),
        rng.uniform(-1, 1, (length, 2)),
        rng.normal(size=length) if rewards else None,
        rng.random(length) < 0.3 if successes else None,
        terminated,
        collected_at=100 * seed,
        seed=seed,
    )


def many(count: int) -> list[Episode]:
    return [episode(i, length=1 + (5 * i) % 11, terminated=i % 3 == 0) for i in range(count)]


def assert_same(found: Iterator[Episode] | list[Episode], wanted: list[Episode], task: str = "toy") -> None:
    found = list(found)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for name in ("observations", "actions", "rewards", "successes"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None) == (y is None), name
            if x is not None:
                assert x.dtype == y.dtype, name
                np.testing.assert_array_equal(x, y)
        assert (a.terminated, a.collected_at, a.seed) == (b.terminated, b.collected_at, b.seed)
        assert a.task == (b.task or task)


@pytest.fixture(autouse=True, scope="module")
def no_fsync() -> Iterator[None]:
    """No power is lost in this process, and fsync is most of the time. The writers that are killed do call it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda _: None)
        yield


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", 20)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "a.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "CHUNK_ROWS", 20)
        write_store(path, many(12), task="toy")
    return path


@pytest.fixture
def written(tmp_path: Path, template: Path) -> Path:
    """A fresh copy of a store of 12 episodes in chunks of 20 rows."""
    shutil.copytree(template, tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def replace_array(path: Path, name: str, values: np.ndarray) -> None:
    """Overwrite an array's values with sound chunks, as a foreign tool could."""
    zarr.open_array(path / name, mode="r+")[:] = values


# ---------------------------------------------------------------------------------------------------------- round trip


@st.composite
def episode_lists(draw: st.DrawFn) -> list[Episode]:
    pixels, rewards, successes = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    shape, actions = draw(st.sampled_from([(1,), (4,), (2, 3)])), draw(st.integers(1, 3))
    result = []
    for _ in range(draw(st.integers(1, 4))):
        length = draw(st.integers(1, 9))
        values = st.floats(-1e6, 1e6, width=32)
        observations = (
            hnp.arrays(np.uint8, (length + 1, *shape))
            if pixels
            else hnp.arrays(np.float32, (length + 1, *shape), elements=values)
        )
        result.append(
            Episode(
                draw(observations),
                draw(hnp.arrays(np.float32, (length, actions), elements=st.floats(-1, 1, width=32))),
                draw(hnp.arrays(np.float32, length, elements=values)) if rewards else None,
                draw(hnp.arrays(bool, length)) if successes else None,
                draw(st.booleans()),
                draw(st.sampled_from(["", "a", "b/c"])),
                draw(st.integers(0, 2**40)),
                draw(st.integers(0, 2**31)),
            )
        )
    return result


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(episodes=episode_lists(), chunk=st.integers(4, 30), flush_every=st.integers(1, 3))
def test_round_trip_and_digest_do_not_depend_on_how_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, episodes: list[Episode], chunk: int, flush_every: int
) -> None:
    for name in ("one.zarr", "many.zarr"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    monkeypatch.setattr(writer_module, "CHUNK_ROWS", chunk)
    whole = write_store(tmp_path / "one.zarr", iter(episodes), task="toy")
    assert_same(whole.episodes(), episodes)
    assert verify_store(whole.path) == []

    for i, item in enumerate(episodes):  # a new process's worth of writer for every episode
        with StoreWriter(tmp_path / "many.zarr", task="toy") as writer:
            assert writer.num_episodes == i
            writer.append(item)
            if i % flush_every == 0:  # then abandoned with something appended after the flush, and tried again
                writer.flush()
                writer.append(item)
                continue
            writer.flush()
    with StoreWriter(tmp_path / "many.zarr", task="toy") as writer:
        assert_same(writer.episodes(), episodes)
        pieces = writer.finish()
    assert_same(pieces.episodes(), episodes)
    assert pieces.digest() == whole.digest()
    assert pieces.labels == whole.labels
    for label in whole.labels:
        assert pieces.label_digest(label) == whole.label_digest(label)


def test_layout_of_rows(tmp_path: Path) -> None:
    episodes = [episode(0, 3, terminated=True), episode(1, 5)]
    store = write_store(tmp_path / "a.zarr", episodes, task="toy", horizon=9)
    assert (len(store), store.num_transitions, store.num_episodes) == (8, 8, 2)
    assert (store.task, store.spec.observation_shape, store.spec.action_dim, store.spec.horizon) == ("toy", (3,), 2, 9)
    assert store.episode_ends().tolist() == [4, 10]
    assert store.lengths().tolist() == [3, 5]
    assert store.terminated().tolist() == [True, False]
    assert store.collected_at().tolist() == [0, 100]
    assert store.seeds().tolist() == [0, 1]
    assert store.episode_tasks() == ["toy", "toy"]
    np.testing.assert_array_equal(store.observations()[3], episodes[0].observations[3])  # the final observation
    assert (
        not store.actions()[[3, 9]].any() and not store.rewards()[[3, 9]].any() and not store.successes()[[3, 9]].any()
    )
    np.testing.assert_array_equal(store.rewards()[4:9], episodes[1].rewards)
    dtypes = (store.observations().dtype, store.actions().dtype, store.rewards().dtype, store.successes().dtype)
    assert dtypes == (np.float32, np.float32, np.float32, np.bool_)


def test_horizon_is_the_longest_episode_unless_given(written: Path) -> None:
    assert open_store(written).spec.horizon == max(len(e) for e in many(12))


def test_pixels_get_smaller_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "CHUNK_BYTES", 64 * 10)
    pixels = np.arange(41 * 64, dtype=np.uint8).reshape(41, 8, 8, 1)
    store = write_store(tmp_path / "a.zarr", [Episode(pixels, np.zeros((40, 1)))], task="toy")
    assert store.spec.pixels and store.observations().dtype == np.uint8
    assert zarr.open_array(store.path / "data/observation", mode="r").chunks == (10, 8, 8, 1)
    np.testing.assert_array_equal(store.observations(), pixels)


def test_provenance_and_attributes(tmp_path: Path) -> None:
    recipe = {"task": "toy", "steps": 3}
    with StoreWriter(tmp_path / "a.zarr", task="toy", provenance={"recipe": recipe, "simulator": "mujoco"}) as writer:
        writer.append(episode(0))
        store = writer.finish(reference_scores={"random": 1.5})
    assert store.provenance["recipe"] == recipe and store.provenance["simulator"] == "mujoco"
    assert store.provenance["versions"]["zarr"] == zarr.__version__
    assert {"python", "numpy", "torch"} <= set(store.provenance["versions"])
    assert open_store(store.path).attributes["reference_scores"] == {"random": 1.5}
    assert not list(tmp_path.glob("*.partial")) and sorted(p.name for p in store.path.iterdir()) == [
        "data",
        "labels",
        "meta",
        "zarr.json",
    ]


def test_the_callers_arrays_may_change_after_append(tmp_path: Path) -> None:
    buffer = np.zeros((4, 3), np.float32)
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(Episode(buffer, np.zeros((3, 1))))
        buffer += 1.0
        store = writer.finish()
    assert not store.observations().any()


def test_a_refused_episode_leaves_the_writer_as_it_was(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        with pytest.raises(CvlctlError, match="episode 1: collected_at or seed is no 64-bit integer"):
            writer.append(dataclasses.replace(episode(1), seed=2**70, task="another"))
        writer.append(episode(1))
        store = writer.finish()
    assert_same(store.episodes(), [episode(0), episode(1)])
    assert store.task_names == ["toy"]


def test_digest_tells_content_apart(tmp_path: Path) -> None:
    base = write_store(tmp_path / "a.zarr", many(3), task="toy")
    again = write_store(tmp_path / "b.zarr", many(3), task="toy", provenance={"note": "other words"})
    other = write_store(tmp_path / "c.zarr", [*many(2), episode(9)], task="toy")
    relabelled = [dataclasses.replace(e, rewards=2 * np.asarray(e.rewards)) for e in many(3)]
    labels = write_store(tmp_path / "d.zarr", relabelled, task="toy")
    assert base.digest() == again.digest() == labels.digest() != other.digest()
    assert base.label_digest() == again.label_digest() != labels.label_digest()


# ----------------------------------------------------------------------------------------------------- kill and resume


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
    module = {"fsync": w.os, "replace": w.os, "rename": w.os, "create_array": w.zarr, "_checksum": w}[spot]
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
    done = subprocess.run([sys.executable, "-c", KILLED, cases], capture_output=True, text=True, timeout=60)
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
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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


# -------------------------------------------------------------------------------------------------- all or nothing


def test_existing_store_needs_force_and_stays_until_the_new_one_is_complete(written: Path) -> None:
    before = open_store(written).digest()
    with pytest.raises(CvlctlError, match="exists") as caught:
        write_store(written, many(3), task="toy")
    assert "--force" in caught.value.hint and "force=True" in caught.value.hint

    def watched() -> Iterator[Episode]:
        for item in many(3):
            assert open_store(written).digest() == before
            yield item
        raise RuntimeError("collector fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_store(written, watched(), task="toy", force=True)
    assert open_store(written).digest() == before and [p.name for p in written.parent.iterdir()] == ["a.zarr"]
    assert_same(write_store(written, many(3), task="toy", force=True).episodes(), many(3))
    assert [p.name for p in written.parent.iterdir()] == ["a.zarr"]


def test_force_never_removes_what_is_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        write_store(tmp_path / "thesis", many(1), task="toy", force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


def test_a_generator_that_raises_leaves_no_trace(tmp_path: Path) -> None:
    def broken() -> Iterator[Episode]:
        yield from many(3)
        raise ValueError("bad file")

    with pytest.raises(ValueError, match="bad file"):
        write_store(tmp_path / "a.zarr", broken(), task="toy")
    assert list(tmp_path.iterdir()) == []


def test_no_episodes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="no episodes"):
        write_store(tmp_path / "a.zarr", [], task="toy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            Episode(np.zeros((3, 4)), np.zeros((2, 2)), np.zeros(2), np.zeros(2)),
            r"episode 1 has observations of shape \(4,\)",
        ),
        (
            Episode(np.zeros((3, 3)), np.zeros((2, 1)), np.zeros(2), np.zeros(2)),
            r"episode 1 has actions of shape \(1,\)",
        ),
        (
            Episode(np.zeros((3, 1, 3), np.uint8), np.zeros((2, 2)), np.zeros(2), np.zeros(2)),
            r"episode 1 has observations .*uint8",
        ),
        (episode(1, rewards=False), "episode 1 has no rewards; those before it have"),
        (episode(1, successes=False), "episode 1 has no successes"),
        (episode(1, length=30), "episode 1 has 30 steps; the horizon is 20"),
        ("not an episode", "episode 1 is a str"),
    ],
)
def test_episodes_must_agree(tmp_path: Path, second: Episode, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        write_store(tmp_path / "a.zarr", [episode(0), second], task="toy", horizon=20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error")
def test_what_users_hand_over_by_mistake(tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match=r"episodes is of type Episode, not a list.*\n.*\[episode\]"):
        write_store(tmp_path / "a.zarr", episode(0), task="toy")  # type: ignore[arg-type]
    for task in ("", "  ", None):
        with pytest.raises(CvlctlError, match="is not the name of a task"):
            write_store(tmp_path / "a.zarr", many(1), task=task)  # type: ignore[arg-type]
    with pytest.raises(CvlctlError, match="rewards hold NaN or infinity"):
        Episode(np.zeros((2, 3)), np.zeros((1, 2)), np.array([1e300]))
    assert list(tmp_path.iterdir()) == []


def test_an_episode_with_labels_after_one_without(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0, rewards=False, successes=False))
        with pytest.raises(CvlctlError, match="episode 1 has rewards; those before it have no rewards"):
            writer.append(episode(1, successes=False))
        writer.append(episode(1, rewards=False, successes=False))  # the refused one left nothing behind
        store = writer.finish()
    assert_same(store.episodes(), [episode(i, rewards=False, successes=False) for i in (0, 1)])
    assert store.labels == []


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


def test_a_store_that_appears_meanwhile_is_not_replaced(tmp_path: Path, template: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(episode(0))
        shutil.copytree(template, tmp_path / "a.zarr")
        with pytest.raises(CvlctlError, match="exists"):
            writer.finish()
    assert open_store(tmp_path / "a.zarr").num_episodes == 12


def test_unwritable_places_and_values(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CvlctlError, match="cannot write"):
        write_store(tmp_path / "file" / "a.zarr", many(1), task="toy")
    with pytest.raises(CvlctlError, match="JSON"):
        write_store(tmp_path / "a.zarr", many(1), task="toy", provenance={"recipe": {"x": np.zeros(2)}})
    with pytest.raises(CvlctlError, match="plain name"):
        write_store(tmp_path / "a.zarr", many(1), task="toy", label="../up")
    with (
        StoreWriter(tmp_path / "a.zarr", task="toy") as writer,
        pytest.raises(CvlctlError, match="own attribute 'task'"),
    ):
        writer.append(episode(0))
        writer.finish(task="mine")


# ------------------------------------------------------------------------------------------------------------- opening


def test_open_errors(written: Path, tmp_path: Path) -> None:
    with pytest.raises(CvlctlError, match="no store at") as caught:
        open_store(tmp_path / "aa.zar")
    assert "a.zarr?" in caught.value.hint
    with pytest.raises(CvlctlError, match="no store at"):
        open_store(tmp_path / "nowhere" / "deep.zarr")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(tmp_path)
    (tmp_path / "x.zarr").write_text("a file")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(tmp_path / "x.zarr")
    with StoreWriter(tmp_path / "b.zarr", task="toy") as writer:
        writer.append(episode(0))
        writer.flush()
    with pytest.raises(CvlctlError, match="not finished") as caught:
        open_store(tmp_path / "b.zarr")
    assert "b.zarr.partial" in caught.value.hint


def edit_root(path: Path, **changes: object) -> None:
    root = json.loads((path / "zarr.json").read_text())
    for key, value in changes.items():
        if value is None:
            del root["attributes"][key]
        else:
            root["attributes"][key] = value
    (path / "zarr.json").write_text(json.dumps(root))


def test_open_refuses_newer_versions_garbled_attributes_and_missing_arrays(written: Path) -> None:
    keep = (written / "zarr.json").read_text()
    edit_root(written, version=2)
    with pytest.raises(CvlctlError, match="version 2"):
        open_store(written)
    for key in ("spec", "counts", "checksums", "task", "provenance", "tasks"):
        (written / "zarr.json").write_text(keep)
        edit_root(written, **{key: None})
        with pytest.raises(CvlctlError, match=f"lack or garble '{key}'"):
            open_store(written)
    (written / "zarr.json").write_text(keep[:-40])
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        open_store(written)
    (written / "zarr.json").write_text(keep)
    shutil.rmtree(written / "data/action")
    with pytest.raises(CvlctlError, match="data/action: the array is missing"):
        open_store(written)
    assert verify_store(written) == ["data/action: the array is missing"]


def test_missing_labels_say_which_exist(tmp_path: Path) -> None:
    store = write_store(tmp_path / "a.zarr", [episode(0, successes=False)], task="toy", label="human")
    assert store.labels == ["human"] and store.has_label("human") and not store.has_label("human", "success")
    for call in (store.rewards, store.successes, store.label_digest, lambda: store.futures(3, 0.9, 0)):
        with pytest.raises(CvlctlError, match="no label 'given'") as caught:
            call()
        assert "human/reward" in caught.value.hint
    with pytest.raises(CvlctlError, match="no label 'humam'"):
        next(store.episodes("humam"))
    assert next(store.episodes()).rewards is None
    assert_same(store.episodes("human"), [episode(0, successes=False)])


# ---------------------------------------------------------------------------------------- the reward-free guarantee


def read_everything_but_labels(store: Store) -> list[bytes]:
    arrays = (
        store.observations(),
        store.actions(),
        store.episode_ends(),
        store.terminated(),
        store.collected_at(),
        store.seeds(),
    )
    return [a.tobytes() for a in arrays] + [
        repr(store.episode_tasks()).encode(),
        store.digest().encode(),
        bytes(len(store)),
    ]


def test_a_store_without_its_labels_is_still_whole(written: Path) -> None:
    before = read_everything_but_labels(open_store(written))
    shutil.rmtree(written / "labels")
    store = open_store(written)
    assert read_everything_but_labels(store) == before
    assert store.labels == [] and not store.has_label("given") and next(store.episodes()).rewards is None
    assert verify_store(written) == []
    with pytest.raises(CvlctlError, match="no label"):
        store.rewards()


def test_reading_data_touches_no_file_under_labels(written: Path) -> None:
    """The interpreter's own audit of file opens, listings and more, in a fresh process: `labels` is in none of them."""
    code = textwrap.dedent(f"""
        import sys
        seen = []
        sys.addaudithook(lambda event, args: seen.append((event, str(args))) if "a.zarr" in str(args) else None)
        from cvlctl.data.store import open_store
        store = open_store({str(written)!r})
        store.observations(), store.actions(), store.episode_ends(), store.terminated(), store.lengths()
        store.collected_at(), store.seeds(), store.episode_tasks(), store.digest(), store.spec, len(store), repr(store)
        quiet = list(seen)
        store.rewards()
        print(len(quiet), sum("labels" in args for _, args in quiet), sum("labels" in args for _, args in seen))
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    opened, forbidden, with_rewards = map(int, done.stdout.split())
    assert opened > 10 and forbidden == 0 and with_rewards > 0  # last: the hook does see labels


# -------------------------------------------------------------------------------------------------------------- damage


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(bytes(data))


def damage_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def damage_empty(file: Path) -> None:
    file.write_bytes(b"")


def damage_gone(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize("harm", [flip, damage_cut, damage_empty, damage_gone])
@pytest.mark.parametrize(("name", "file"), [("data/observation", "c/1/0"), ("labels/given/reward", "c/1")])
def test_a_damaged_chunk_is_named(written: Path, harm: Callable[[Path], None], name: str, file: str) -> None:
    harm(written / name / file)
    store = open_store(written)
    read = store.observations if name.startswith("data") else store.rewards
    with pytest.raises(CvlctlError, match=rf"{name} chunk 1 \(rows 20-39\): ") as caught:
        read()
    assert "cvlctl data verify" in caught.value.hint
    problems = verify_store(written)
    assert len(problems) == 1 and problems[0].startswith(f"{name} chunk 1 (rows 20-39): ")
    assert ("missing" if harm is damage_gone else "checksum/crc fails") in problems[0]


def test_every_damaged_chunk_is_listed(written: Path) -> None:
    flip(written / "data/action/c/0/0")
    flip(written / "data/action/c/2/0")
    damage_gone(written / "labels/given/success/c/0")
    assert [p.split(":")[0] for p in verify_store(written)] == [
        "data/action chunk 0 (rows 0-19)",
        "data/action chunk 2 (rows 40-59)",
        "labels/given/success chunk 0 (rows 0-19)",
    ]


def test_verify_finds_wrong_values_behind_sound_chunks(written: Path) -> None:
    store = open_store(written)
    actions, observations = store.actions().copy(), store.observations().copy()
    actions[25, 0], observations[45, 1] = 1.5, np.nan
    replace_array(written, "data/action", actions)
    replace_array(written, "data/observation", observations)
    problems = verify_store(written)
    assert "data/action chunk 1 (rows 20-39): actions outside [-1, 1]" in problems
    assert "data/observation chunk 2 (rows 40-59): NaN or infinity" in problems
    assert sum("recorded checksum" in p for p in problems) == 2 and len(problems) == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("meta/episode_ends", lambda x: np.where(np.arange(12) == 3, x[2] + 1, x), "episode 3 has fewer than 2 rows"),
        ("meta/episode_ends", lambda x: np.where(np.arange(12) == 11, x + 5, x), "the last episode ends at row"),
        ("meta/task", lambda x: x + 7, "indices outside the 1 task names"),
    ],
)
def test_verify_checks_the_episode_table(
    written: Path, name: str, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    replace_array(written, name, change(open_store(written)._array(name)))
    assert any(p.startswith(name) and message in p for p in verify_store(written))


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("data/observation", 30, np.nan, "NaN or infinity"),
        ("data/action", 30, -np.inf, "NaN or infinity"),
        ("data/action", 30, -1.5, r"actions outside \[-1, 1\]"),
        ("labels/given/reward", 30, np.inf, "NaN or infinity"),
        ("meta/episode_ends", 3, 1, "episode 3 has fewer than 2 rows"),
        ("meta/episode_ends", 0, 1, "episode 0 has fewer than 2 rows"),
        ("meta/episode_ends", 11, 10**6, "the last episode ends at row 1000000 of"),
        ("meta/task", 2, -1, "indices outside the 1 task names"),
    ],
)
def test_values_that_would_garble_training_are_refused_when_read(
    written: Path, name: str, row: int, value: float, message: str
) -> None:
    values = open_store(written)._array(name).copy()
    values[row] = value
    replace_array(written, name, values)
    store = open_store(written)
    with pytest.raises(CvlctlError, match=f"{written}: {name}: {message}") as caught:
        list(store.episodes())
    assert f"cvlctl data verify {written}" in caught.value.hint
    if not name.startswith("labels/"):
        assert store.rewards().shape == (store.num_rows,)  # the others can still be read


def test_verify_checks_shapes_counts_and_lost_labels(written: Path) -> None:
    keep = (written / "zarr.json").read_text()
    edit_root(written, counts={**open_store(written).attributes["counts"], "transitions": 5})
    assert any("5 transitions recorded" in p for p in verify_store(written))
    (written / "zarr.json").write_text(keep)
    edit_root(written, spec={**open_store(written).attributes["spec"], "horizon": 2})
    assert any("horizon 2, but an episode has" in p for p in verify_store(written))
    (written / "zarr.json").write_text(keep)
    zarr.open_array(written / "labels/given/reward", mode="r+").resize((30,))
    assert any(p.startswith("labels/given/reward: is float32 (30,), expected") for p in verify_store(written))
    with pytest.raises(CvlctlError, match=r"labels/given/reward: is float32 \(30,\), expected"):
        open_store(written).rewards()
    shutil.rmtree(written / "labels/given/reward")
    assert verify_store(written) == ["labels/given/reward: the array is missing"]


# ------------------------------------------------------------------------------------------------------------- futures


def exact_futures(store: Store, gamma: float, renormalise_terminated: bool = False) -> dict[tuple[int, float], float]:
    """Probability of each (row, reward) under a uniform transition and its discounted future, by the definition."""
    law: dict[tuple[int, float], float] = {}
    start = 0
    for end, terminated in zip(store.episode_ends().tolist(), store.terminated().tolist(), strict=True):
        last = end - 1
        for row in range(start, last):
            steps = last - row
            mass = np.array([(1 - gamma) * gamma ** (k - 1) for k in range(1, steps + 1)])
            if not terminated or renormalise_terminated:
                mass = mass / mass.sum()
            outcomes = [((row + k, float(store.rewards()[row + k - 1])), mass[k - 1]) for k in range(1, steps + 1)]
            for key, p in [*outcomes, ((last, 0.0), 1.0 - mass.sum())]:
                law[key] = law.get(key, 0.0) + p / store.num_transitions
        start = end
    return {key: p for key, p in law.items() if p > 1e-12}


def future_p_value(store: Store, law: dict[tuple[int, float], float], gamma: float, num: int = 20_000) -> float:
    observations, rewards = store.futures(num, gamma, seed=3)
    assert observations.shape == (num, 1) and rewards.shape == (num,) and rewards.dtype == np.float32
    keys = sorted(law)
    drawn = [(int(o), float(r)) for o, r in zip(observations[:, 0], rewards, strict=True)]
    assert set(drawn) <= set(keys)
    counts = [drawn.count(key) for key in keys]
    return float(stats.chisquare(counts, [law[key] * num for key in keys]).pvalue)


@pytest.mark.parametrize("terminated", [(False, True), (True, True), (False, False)])
def test_futures_follow_the_samplers_law(tmp_path: Path, terminated: tuple[bool, bool]) -> None:
    episodes, row = [], 0
    for length, flag in zip((4, 3), terminated, strict=True):  # observations are row numbers
        observations = np.arange(row, row + length + 1, dtype=np.float32)[:, None]
        episodes.append(
            Episode(observations, np.zeros((length, 1)), np.arange(row + 1, row + length + 1), terminated=flag)
        )
        row += length + 1
    store = write_store(tmp_path / "a.zarr", episodes, task="toy")
    law = exact_futures(store, 0.8)
    assert sum(law.values()) == pytest.approx(1.0)
    assert future_p_value(store, law, 0.8) > 1e-3
    shifted = {key: law[other] for key, other in zip(law, reversed(law), strict=True)}
    assert future_p_value(store, shifted, 0.8) < 1e-6
    if all(terminated):
        wrong = exact_futures(store, 0.8, renormalise_terminated=True)
        padded = {key: wrong.get(key, 1e-9) for key in law}
        assert future_p_value(store, {key: p / sum(padded.values()) for key, p in padded.items()}, 0.8) < 1e-6


def test_futures_repeat_under_a_seed_and_refuse_nonsense(written: Path) -> None:
    store = open_store(written)
    first, again, other = store.futures(50, 0.9, 1), store.futures(50, 0.9, 1), store.futures(50, 0.9, 2)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])
    assert np.array_equal(store.futures(1, 0.0, 0)[0].shape, (1, 3))
    for num, gamma, seed in ((0, 0.9, 0), (5, 1.0, 0), (5, -0.1, 0), (5, float("nan"), 0), (5, 0.9, -1)):
        with pytest.raises(CvlctlError):
            store.futures(num, gamma, seed)


def test_a_large_store_loads_fast(tmp_path: Path) -> None:
    """In CPU seconds, with some ten times of room: it catches a reader that goes by small pieces."""
    rows = np.zeros((100_001, 39), np.float32)
    store = write_store(tmp_path / "a.zarr", [Episode(rows, np.zeros((100_000, 4)))], task="toy")
    store = open_store(store.path)
    start = time.process_time()
    assert store.observations().shape == rows.shape
    assert time.process_time() - start < 0.5
    assert os.path.getsize(store.path / "data/observation/c/0/0") < 100_000


def test_chunks_of_other_codecs_are_read_too(written: Path) -> None:
    """Docs name the codecs; what zarr reads besides is read, and its damage named, at zarr's own speed."""
    wanted = open_store(written).observations()
    shutil.rmtree(written / "data/observation")
    codecs = [zarr.codecs.BloscCodec(cname="lz4"), zarr.codecs.Crc32cCodec()]
    shape = {"shape": wanted.shape, "dtype": wanted.dtype, "chunks": (20, 3)}
    array = zarr.create_array(written, name="data/observation", compressors=codecs, **shape)
    array[:] = wanted
    np.testing.assert_array_equal(open_store(written).observations(), wanted)
    assert verify_store(written) == []
    flip(written / "data/observation/c/2/0")
    with pytest.raises(CvlctlError, match=r"data/observation chunk 2 \(rows 40-59\): checksum/crc fails"):
        open_store(written).observations()


def test_zarr_reads_what_the_store_reads(written: Path) -> None:
    store = open_store(written)
    for name in (*store_module.DATA, "labels/given/reward", "labels/given/success"):
        values = store._array(name)
        np.testing.assert_array_equal(values, zarr.open_array(written / name, mode="r")[:])
        assert values.flags.writeable and values.flags.c_contiguous


def test_a_sound_chunk_of_the_wrong_length_is_damage(written: Path) -> None:
    """Its checksum holds, but it would fill a part of the rows alone: memory as it was found must not pass for data."""
    for content in (np.ones((19, 3), np.float32), np.ones((21, 3), np.float32), np.ones((0, 3), np.float32)):
        packed = np.frombuffer(Zstd(level=3).encode(content), np.uint8)
        checksum = google_crc32c.value(packed).to_bytes(4, "little")
        (written / "data/observation/c/1/0").write_bytes(packed.tobytes() + checksum)
        with pytest.raises(CvlctlError, match=r"data/observation chunk 1 \(rows 20-39\)"):
            open_store(written).observations()


@pytest.mark.parametrize("size", [1, 255, 256, 300, 65_791, 65_792, 200_000])
def test_the_length_in_a_frames_header(size: int) -> None:
    assert chunks._unpacked_bytes(Zstd(level=3).encode(np.zeros(size, np.uint8))) == size
    streamed = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x58])  # a header that leaves the length out
    assert chunks._unpacked_bytes(streamed) == chunks._unpacked_bytes(b"") == 0
