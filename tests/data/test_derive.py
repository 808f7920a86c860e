"""Derived stores: their parents and commands are recorded, nothing half-written stays, bad parents are named."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from toy_stores import assert_holds, edit_root, flip, names, numbered, numbered_episodes

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import arrays as arrays_module
from cvlctl.data import writer as writer_module
from cvlctl.data.criteria import Criteria
from cvlctl.data.examples import examples
from cvlctl.data.store import open_store
from cvlctl.data.transform import drop_rewards, filter_episodes, merge, split, subsample
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.label import label_store

pytestmark = pytest.mark.usefixtures("no_fsync", "small_chunks")


def call(*args: str | Path) -> int:
    return execute(app.app, [str(arg) for arg in args])


# ----------------------------------------------------------------------------------------------------- what is recorded


def test_every_derived_store_records_its_parents_and_the_command(a: Path, tmp_path: Path) -> None:
    b = write_store(
        tmp_path / "b.zarr", numbered_episodes(3, 30), task="toy", provenance={"environment": {"mujoco": "3.7.0"}}
    ).path
    store = open_store(merge([a, b], tmp_path / "my c.zarr")["path"])
    parents = store.provenance["parents"]
    assert [parent["path"] for parent in parents] == [str(a), str(b)]
    assert [parent["digest"] for parent in parents] == [open_store(path).digest() for path in (a, b)]
    assert parents[0]["labels"] == {"given": open_store(a).label_digest()}
    assert parents[0]["provenance"]["recipe"] == {"steps": 3}
    assert "environment" not in store.provenance and "recipe" not in store.provenance  # the parents disagree
    assert shlex.split(store.provenance["command"]) == [
        "cvlctl", "data", "merge", str(a), str(b), "--out", str(tmp_path / "my c.zarr")
    ]  # fmt: skip
    small = open_store(subsample(a, tmp_path / "d.zarr", episodes=3)["path"])
    assert small.provenance["environment"] == {"mujoco": "3.3.0"} and small.provenance["seeds"] == [0]
    grandchild = open_store(drop_rewards(small.path, tmp_path / "e.zarr")["path"])
    assert grandchild.provenance["parents"][0]["provenance"]["parents"][0]["path"] == str(a)


def test_the_recorded_command_does_it_again(a: Path, tmp_path: Path) -> None:
    results = [
        split(a, train=0.5, seed=2, out=tmp_path / "s")["train"],
        filter_episodes(a, tmp_path / "f.zarr", Criteria(min_return=2.5, success=False, tasks=("toy",))),
        subsample(a, tmp_path / "n.zarr", fraction=0.5, seed=7),
        drop_rewards(a, tmp_path / "d.zarr", labels=["given"]),
        label_store(a, "x", tmp_path / "l.zarr", rewards="zeros"),
        merge([a, a], tmp_path / "m.zarr", task="two words"),
    ]
    for result in results:
        first = open_store(result["path"])
        command = shlex.split(first.provenance["command"])
        assert command[0] == "cvlctl" and call(*command[1:], "--force", "--quiet") == 0
        second = open_store(result["path"])
        assert second.provenance["command"] == first.provenance["command"] and second.digest() == first.digest()
        assert [second.label_digest(x) for x in second.labels] == [first.label_digest(x) for x in first.labels]


def test_extra_attributes_stay_where_the_parents_agree(tmp_path: Path) -> None:
    paths = []
    for name, collector in (("a", "sac"), ("b", "random")):
        with StoreWriter(tmp_path / f"{name}.zarr", task="toy") as writer:
            writer.append(numbered(1, 3))
            paths.append(writer.finish(collector=collector, reference_scores={"max": 2}).path)
    alone = open_store(subsample(paths[0], tmp_path / "c.zarr", episodes=1)["path"])
    assert alone.attributes["collector"] == "sac"
    both = open_store(merge(paths, tmp_path / "d.zarr")["path"])
    assert both.attributes["reference_scores"] == {"max": 2} and "collector" not in both.attributes
    assert [parent["attributes"]["collector"] for parent in both.provenance["parents"]] == ["sac", "random"]


# ------------------------------------------------------------------------------------------------- nothing half-written


@pytest.mark.parametrize(
    ("where", "name", "calls"),
    [
        (StoreWriter, "append", 0),
        (StoreWriter, "append", 5),
        (StoreWriter, "append", 11),
        (arrays_module, "write_arrays", 1),  # chunks of episodes or of labels
        (arrays_module, "write_arrays", 4),
        (writer_module, "_checksum", 3),
    ],
)
def test_an_interruption_leaves_no_trace_and_says_so(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    where: Any, name: str, calls: int,
) -> None:  # fmt: skip
    before = subsample(a, tmp_path / "b.zarr", episodes=2)["digest"]
    work, done = getattr(where, name), 0

    def stopped(*args: Any) -> Any:
        nonlocal done
        if done == calls:
            raise KeyboardInterrupt
        done += 1
        return work(*args)

    commands: list[list[str | Path]] = [
        ["merge", a, a, "--out", tmp_path / "c.zarr"],
        ["filter", a, "--out", tmp_path / "b.zarr", "--force", "--min-length", "1", "--quiet"],
        ["label", a, "new", "--rewards", "zeros", "--out", tmp_path / "c.zarr", "--json"],
        ["split", a],
    ]
    monkeypatch.setattr(where, name, stopped)
    for command in commands:
        done = 0
        assert call("data", *command) == 130
        assert done == calls
        assert names(tmp_path) == ["a.zarr", "b.zarr"] and open_store(tmp_path / "b.zarr").digest() == before
        assert "nothing was written: the same command starts over" in capsys.readouterr().err
    monkeypatch.setattr(where, name, work)
    for command in commands[:2]:
        assert call("data", *command) == 0
        assert "nothing was written" not in capsys.readouterr().err


def test_nothing_is_replaced_unless_forced(a: Path, tmp_path: Path) -> None:
    out = write_store(tmp_path / "b.zarr", numbered_episodes(2), task="mine").path
    commands: list[Callable[[bool], Any]] = [
        lambda force: merge([a, a], out, force=force),
        lambda force: filter_episodes(a, out, Criteria(min_length=3), force=force),
        lambda force: subsample(a, out, episodes=4, force=force),
        lambda force: drop_rewards(a, out, force=force),
        lambda force: label_store(a, "x", out, rewards="zeros", force=force),
    ]
    before = open_store(out).provenance
    for command in commands:
        with pytest.raises(CvlctlError, match=r"b\.zarr exists") as caught:
            command(False)
        assert "--force" in caught.value.hint and open_store(out).provenance == before
    for command in commands:
        command(True)
        assert verify_store(out) == []
    assert names(tmp_path) == ["a.zarr", "b.zarr"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(CvlctlError, match="not a cvlctl store"):
        subsample(a, tmp_path / "thesis", episodes=4, force=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years"


def test_a_store_may_replace_its_parent(a: Path) -> None:
    digest = open_store(a).digest()
    filter_episodes(a, a, Criteria(success=True), force=True)
    assert_holds(open_store(a), [e for e in numbered_episodes(12) if e.seed % 2])
    assert open_store(a).provenance["parents"][0]["digest"] == digest


def test_a_second_writer_is_refused_and_harms_nothing(a: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.zarr"
    code = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from cvlctl.data import transform
        from cvlctl.data.writer import StoreWriter
        append = StoreWriter.append
        def waits(self, episode):
            append(self, episode)
            if self.num_episodes == 2:
                print("half way", flush=True)
                sys.stdin.read()
        StoreWriter.append = waits
        transform.drop_rewards(Path({str(a)!r}), Path({str(out)!r}))
    """)
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "half way\n"
        for force in (False, True):
            with pytest.raises(CvlctlError, match=r"another process is writing .*b\.zarr\.partial"):
                subsample(a, out, episodes=3, force=force)
        _, said = first.communicate("")
        assert first.returncode == 0, said
    store = open_store(out)
    assert verify_store(out) == [] and store.num_episodes == 12 and store.labels == []


# ---------------------------------------------------------------------------------------------------------- bad parents


@pytest.mark.parametrize(("name", "file"), [("data/observation", "c/1/0"), ("labels/given/reward", "c/1")])
def test_a_damaged_parent_is_named_and_nothing_is_written(a: Path, tmp_path: Path, name: str, file: str) -> None:
    flip(a / name / file)
    with pytest.raises(CvlctlError, match=rf"a\.zarr: {name} chunk 1 \(rows 20-39\): checksum/crc fails") as caught:
        subsample(a, tmp_path / "b.zarr", fraction=1.0)
    assert "cvlctl data verify" in caught.value.hint
    assert names(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data/observation", np.nan, "NaN or infinity"),
        ("data/action", 2.0, r"actions outside \[-1, 1\]"),
        ("labels/given/reward", np.inf, "NaN or infinity"),
    ],
)
def test_bad_values_in_a_parent_are_not_handed_on(
    a: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    zarr.open_array(a / name, mode="r+")[30] = value
    with pytest.raises(CvlctlError, match=rf"a\.zarr: {name} chunk 1 \(rows 20-39\): {message}"):
        merge([a, a], tmp_path / "b.zarr")
    assert names(tmp_path) == ["a.zarr"]


def unfinished(path: Path) -> None:
    shutil.rmtree(path)
    with StoreWriter(path, task="toy") as writer:
        writer.append(numbered(0, 3))
        writer.flush()


PARENTS: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: edit_root(path, version=3), "is a store of version 3; this cvlctl reads 2"),
    (unfinished, "is not finished: it is still being written"),
    (lambda path: (path / "zarr.json").write_text("{"), "is not a cvlctl store"),
    (lambda path: shutil.rmtree(path / "data/action"), "data/action: the array is missing"),
    (shutil.rmtree, "no store at"),
    (
        lambda path: edit_root(path, counts={"episodes": 12, "transitions": 60, "rows": 1}),
        "data/observation: is float32",
    ),
]


@pytest.mark.parametrize(("harm", "message"), PARENTS)
def test_parents_that_cannot_be_read(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], object], message: str
) -> None:
    b = tmp_path / "b.zarr"
    shutil.copytree(a, b)
    harm(b)
    before = names(tmp_path)
    for args in (
        ["merge", a, b, "--out", tmp_path / "c.zarr"],
        ["split", b],
        ["subsample", b, "--fraction", "0.5", "--out", tmp_path / "c.zarr"],
        ["examples", b, "--out", tmp_path / "c.npy"],
        ["plot", b, "--out", tmp_path / "c.png"],
        ["info", b],
    ):
        assert call("data", *args) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err and "b.zarr" in err and "Traceback" not in err
    assert names(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------- disks


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's powers, whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_directory_that_may_not_be_written_to() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_store(folder / "a.zarr", numbered_episodes(3), task="toy").path
        write_store(folder / "b.zarr", numbered_episodes(2), task="toy")
        folder.chmod(0o555)
        with nobody():
            for out, force in ((folder / "c.zarr", False), (folder / "b.zarr", True)):
                with pytest.raises(CvlctlError, match=r"cannot write .*\.partial: Permission denied") as caught:
                    subsample(source, out, episodes=2, force=force)
                assert "permissions" in caught.value.hint
            with pytest.raises(CvlctlError, match=r"cannot write .*x\.npy: Permission denied"):
                examples(source, folder / "x.npy", rule="last")
        folder.chmod(0o755)
        assert names(folder) == ["a.zarr", "b.zarr"] and verify_store(folder / "b.zarr") == []


def test_a_read_only_file_system(a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(CvlctlError, match=r"cannot write .*b\.zarr\.partial: Read-only file system") as caught:
        drop_rewards(a, tmp_path / "b.zarr")
    assert caught.value.hint == "choose another place" and names(tmp_path) == ["a.zarr"]


@pytest.mark.parametrize("limit", [100, 1000, 3000])
def test_a_full_disk_leaves_the_parents_and_nothing_else(a: Path, tmp_path: Path, limit: int) -> None:
    """The kernel refuses to let any file grow further: at once, in a chunk, or in what is written last."""
    before = subsample(a, tmp_path / "b.zarr", episodes=2)["digest"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for out, force in ((tmp_path / "c.zarr", False), (tmp_path / "b.zarr", True)):
            with pytest.raises(CvlctlError, match=r"cannot write .*\.partial") as caught:
                merge([a, a], out, force=force)
            assert "free some space" in caught.value.hint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == ["a.zarr", "b.zarr"] and open_store(tmp_path / "b.zarr").digest() == before
    assert verify_store(a) == [] and verify_store(tmp_path / "b.zarr") == []
    assert merge([a, a], tmp_path / "c.zarr")["episodes"] == 24


def test_a_disk_that_fills_up_while_labels_are_written(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = arrays_module.write_arrays

    def full(folder: Path, start: int, rows: dict[str, np.ndarray], chunk_rows: int) -> None:
        if any(name.startswith("labels/") for name in rows):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(folder, start, rows, chunk_rows)

    monkeypatch.setattr(arrays_module, "write_arrays", full)
    with pytest.raises(CvlctlError, match=r"cannot write .*b\.zarr\.partial: No space left"):
        merge([a, a], tmp_path / "b.zarr")
    assert names(tmp_path) == ["a.zarr"]
