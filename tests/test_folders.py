"""Folders that take each other's place: a kill before any change of the file system leaves the old ones or the new, and
whoever comes next puts it right. Nothing that is not ours is touched."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import forked, run_script

from cvlctl import files, folders
from cvlctl.errors import CvlctlError
from cvlctl.folders import Folder, partial_of, put_in_place, put_right, replacing
from cvlctl.interrupts import watched

pytestmark = pytest.mark.usefixtures("no_fsync")
SCENARIOS = {  # what is there before, and what is written
    "one": ("", "a"),
    "one over another": ("a", "a"),
    "two": ("", "a b"),
    "two over others": ("a b", "a b"),
    "two, one over another": ("b", "a b"),
    "a file": ("", "file"),
    "a file over another": ("file", "file"),
    "an export's folder over another": ("folder", "folder"),
}


def lay(root: Path, before: str) -> None:
    """What is there before, beside what is somebody's own."""
    shutil.rmtree(root, ignore_errors=True)
    for name in (*before.split(), "a.old", "x.partial"):
        (root / name).mkdir(parents=True)
        (root / name / "content").write_text("old" if name in before else "mine")
    if "file" in before:
        shutil.rmtree(root / "file")
        (root / "file").write_text("old")


def command(root: Path, outs: str) -> None:
    """What commands with --force do: put right, find the work done, or do it."""
    paths = [root / name for name in outs.split()]
    tidied = [put_right(path) for path in paths]
    if any(tidied) and all(seen(path) == "new" for path in paths):
        return
    if outs in ("file", "folder"):
        with replacing(paths[0], folder=outs == "folder") as place:
            (place / "content" if outs == "folder" else place).write_text("new")
        return
    made: list[Folder] = []
    try:
        for path in paths:
            made.append(Folder(path))
            made[-1].empty()
            (made[-1].partial / "content").write_text("new")
            files.sync_all(made[-1].partial)
        put_in_place(made)
    except BaseException:
        for one in made:
            one.close(discard=True)
        raise


def seen(path: Path) -> str:
    """What is at a path: "old", "new", "" for nothing, and what is left over."""
    if path.is_dir():
        content = (path / "content").read_text() if (path / "content").exists() else "half gone"
        return " ".join([content, *sorted(set(os.listdir(path)) - {"content"})])
    return path.read_text() if path.exists() else ""


def tree(root: Path) -> dict[str, str]:
    return {name: seen(root / name) for name in sorted(os.listdir(root))}


def trials(root: Path, before: str, outs: str, second: int) -> Iterator[tuple[int, int]]:
    """Every number of changes after which the command is killed, and those after which the next one is (0: it is not).

    `second`: every so many changes of the next one; 0: none.
    """
    at = 1
    while True:
        lay(root, before)
        if not forked(lambda: command(root, outs), at):
            return
        yield at, 0
        again = 1
        while second:
            lay(root, before)
            forked(lambda: command(root, outs), at)
            if not forked(lambda: command(root, outs), again):
                break
            yield at, again
            again += second
        at += 1


def check(root: Path, before: str, outs: str, expected: dict[str, str]) -> None:
    """After a kill: nothing is lost, all is put right together, and the same command ends as if undisturbed."""
    names = outs.split()
    for name in names:
        there, old = seen(root / name), name in before
        aside = [seen(path) for path in root.glob(f"{name}.old*") if seen(path) != "mine"]
        if there[:3] not in (["old", "new"] if old else ["", "new"]):
            assert not there and aside == ["old"], (name, tree(root))
    put_right(root / names[-1])
    found = {seen(root / name) for name in names if name in before}
    new = {seen(root / name) for name in names if name not in before}
    assert (found <= {"old"} and new <= {""}) or (found | new) == {"new"}, tree(root)
    command(root, outs)
    assert tree(root) == expected, tree(root)


def main(root: Path, name: str, second: int) -> None:
    before, outs = SCENARIOS[name]
    lay(root, before)
    command(root, outs)
    expected = tree(root)
    assert expected == {**dict.fromkeys(outs.split(), "new"), "a.old": "mine", "x.partial": "mine"}
    tried = 0
    for first, then in trials(root, before, outs, second):
        tried += 1
        try:
            check(root, before, outs, expected)
        except BaseException:
            print(f"killed before change {first}, the next one before change {then}", tree(root))
            raise
    print(tried)


if __name__ == "__main__":
    os.fsync = lambda _: None  # a kill is not a loss of power
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_kill_before_any_change_leaves_the_old_or_the_new(tmp_path: Path, name: str) -> None:
    assert run_script(__file__, tmp_path / "root", name, "0") >= 8


def test_the_command_that_puts_it_right_may_be_killed_too(tmp_path: Path) -> None:
    assert run_script(__file__, tmp_path / "root", "two over others", "23") >= 50


# -------------------------------------------------------------------------------------------- what is nobody's business


def new(path: Path, *, resumes: bool = False) -> Folder:
    folder = Folder(path)
    folder.mark(resumes=resumes)
    (folder.partial / "content").write_text("new")
    return folder


def test_a_folder_that_is_not_ours_is_in_the_way_and_stays(tmp_path: Path) -> None:
    for mine in ("content", "tail.npz", "unfinished.json"):
        partial = tmp_path / mine / "x.partial"
        partial.mkdir(parents=True)
        (partial / mine).write_text('{"kind": "mine"}')
        assert put_right(tmp_path / mine / "x") is False
        with pytest.raises(CvlctlError, match=r"x\.partial is in the way: it is nothing that cvlctl wrote"):
            Folder(tmp_path / mine / "x")
        assert [path.name for path in partial.iterdir()] == [mine]
    elsewhere = tmp_path / "elsewhere"
    new(tmp_path / "y").close(discard=False)
    os.rename(tmp_path / "y.partial", elsewhere)
    os.symlink(elsewhere, tmp_path / "y.partial")  # ours, but somebody else's link to it
    with pytest.raises(CvlctlError, match=r"y\.partial is in the way"):
        Folder(tmp_path / "y")
    assert (elsewhere / "content").exists()
    (tmp_path / "z.partial").write_text("a file")
    with pytest.raises(CvlctlError, match=r"z\.partial is in the way"):
        Folder(tmp_path / "z")


def test_what_may_be_resumed_stays_and_the_rest_is_discarded_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new(tmp_path / "a", resumes=True).close(discard=False)
    assert put_right(tmp_path / "a") is False and capsys.readouterr().err == ""
    folder = Folder(tmp_path / "a")
    assert (folder.partial / "content").read_text() == "new"
    with pytest.raises(CvlctlError, match=r"another process is writing .*a\.partial"):
        Folder(tmp_path / "a")
    folder.close(discard=True)
    assert os.listdir(tmp_path) == []
    folder = new(tmp_path / "a")
    with pytest.raises(CvlctlError, match=r"another process is writing .*a\.partial"):  # alive: not discarded
        put_right(tmp_path / "a")
    folder.close(discard=False)
    assert put_right(tmp_path / "a") is False and os.listdir(tmp_path) == []
    assert "a.partial: what a stopped command left there is discarded" in capsys.readouterr().err


def test_a_copy_of_what_was_put_aside_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before tidying up; meanwhile somebody keeps a copy under the name of what the killed command put aside."""
    lay(tmp_path / "root", "a")
    path, old = tmp_path / "root" / "a", tmp_path / "root" / "a.old2"
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_settle", lambda *_: True)
        put_in_place([new(path)])
    assert seen(old) == "old" and seen(path) == "new lock unfinished.json"
    shutil.copytree(old, tmp_path / "copy")
    shutil.rmtree(old)
    os.rename(tmp_path / "copy", old)
    assert put_right(path) is True
    assert tree(tmp_path / "root") == {"a": "new", "a.old": "mine", "a.old2": "old", "x.partial": "mine"}
    shutil.copytree(path, tmp_path / "root" / "b")  # nor is a copy of a folder, with its marker, the folder itself
    assert put_right(tmp_path / "root" / "b") is False


@pytest.mark.parametrize(
    "change", [{"names": ["../a"]}, {"old": "../a"}, {"names": "a"}, {"old": ["a"]}, {"names": [1]}]
)
def test_markers_that_name_other_places_are_none(tmp_path: Path, change: dict[str, object]) -> None:
    (tmp_path / "a").mkdir()
    inode = (tmp_path / "a").stat().st_ino
    for place in (tmp_path / "in" / "a", tmp_path / "in" / "a.partial"):
        place.mkdir(parents=True)
        about = {
            "kind": folders.KIND,
            "names": ["a"],
            "together": "1",
            "old": "a.old",
            "inode": inode,
            "resumes": False,
        }
        (place / "unfinished.json").write_text(json.dumps(about | change))
    assert put_right(tmp_path / "in" / "a") is False
    assert tree(tmp_path / "in") == dict.fromkeys(("a", "a.partial"), "half gone unfinished.json")
    assert (tmp_path / "a").exists()


# -------------------------------------------------------------------------------------------------- all of them or none


@pytest.mark.parametrize("fails", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_where_a_rename_fails_everything_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int, error: BaseException
) -> None:
    lay(tmp_path / "root", "a b")
    made = [new(tmp_path / "root" / name) for name in "ab"]
    rename, calls = os.rename, []

    def failing(*args: Path) -> None:
        calls.append(args)
        if len(calls) == fails:
            raise error
        rename(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", failing)
        with pytest.raises(CvlctlError if isinstance(error, OSError) else KeyboardInterrupt):
            put_in_place(made)
    assert [seen(tmp_path / "root" / name) for name in "ab"] == ["old", "old"]
    put_in_place(made)  # they are still there, and locked
    assert tree(tmp_path / "root") == {"a": "new", "a.old": "mine", "b": "new", "x.partial": "mine"}


def test_ctrl_c_waits_until_all_have_their_places(tmp_path: Path) -> None:
    lay(tmp_path / "root", "a b")
    made = [new(tmp_path / "root" / name) for name in "ab"]
    rename = os.rename

    def interrupted(*args: Path) -> None:
        os.rename = rename
        os.kill(os.getpid(), signal.SIGTERM)
        rename(*args)

    with watched(), pytest.raises(KeyboardInterrupt, match="written all the same"):
        os.rename = interrupted
        put_in_place(made)
    assert tree(tmp_path / "root") == {"a": "new", "a.old": "mine", "b": "new", "x.partial": "mine"}


def test_ctrl_c_after_the_last_rename_comes_too_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path / "root", "a")
    folder = new(tmp_path / "root" / "a")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="written all the same"):

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(shutil, "rmtree", stopped)
        put_in_place([folder])
    folder.close(discard=True)  # what is in place is not discarded
    assert seen(tmp_path / "root" / "a") == "new lock unfinished.json"
    assert put_right(tmp_path / "root" / "a") is True
    assert tree(tmp_path / "root") == {"a": "new", "a.old": "mine", "x.partial": "mine"}


# ---------------------------------------------------------------------------------------------------------------- links


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    lay(tmp_path / "disk", "a")
    here = tmp_path / "here"
    here.mkdir()
    for name, to in (("a", "a"), ("later", "b")):  # `later` leads to what is not there yet
        os.symlink(tmp_path / "disk" / to, here / name)
        for _ in range(2):
            assert partial_of(here / name) == tmp_path / "disk" / f"{to}.partial"
            put_in_place([new(here / name)])
            assert (here / name).is_symlink() and seen(here / name) == "new"
    assert tree(tmp_path / "disk") == {"a": "new", "a.old": "mine", "b": "new", "x.partial": "mine"}
    assert sorted(os.listdir(here)) == ["a", "later"]
    with pytest.raises(CvlctlError, match="lie in different folders"):
        put_in_place([new(here / "a"), new(tmp_path / "b")])
    os.symlink(here / "two", here / "one")
    os.symlink(here / "one", here / "two")
    with pytest.raises(CvlctlError, match="leads in a circle"):
        Folder(here / "one")
    os.symlink(tmp_path / "disk" / "a" / "content", here / "file")
    with replacing(here / "file") as place:
        place.write_text("newer")
    assert (here / "file").is_symlink() and seen(tmp_path / "disk" / "a") == "newer"
    assert files.write_result(here / "file", b"newest", force=True) == "written"
    assert (here / "file").is_symlink() and seen(tmp_path / "disk" / "a") == "newest"
