"""Commands that write stores, killed: the same command again, without --force, ends as if undisturbed.

Run as a script it forks (`killing`): first argument the folder to work in, second the name of a script's function.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from killing import forked, run_script
from toy_stores import labelled_store, many, names, numbered_episodes, numbered_store

from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import formats
from cvlctl.data import writer as writer_module
from cvlctl.data.store import open_store
from cvlctl.data.transform import merge, split, subsample
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import StoreWriter, write_store
from cvlctl.errors import CvlctlError
from cvlctl.learn.label import label_store

POINTS = (2, 4, 9)  # between two renames of one store, of the other, and while tidying up
SCRIPTS: dict[str, Callable[[Path], int]] = {}


def script(function: Callable[[Path], int]) -> Callable[[Path], int]:
    SCRIPTS[function.__name__] = function
    return function


def contents(folder: Path) -> dict[str, str]:
    """What a folder holds, stores by their digest; those that are not sound, or hold more than stores do, say so."""
    found = {}
    for path in sorted(folder.iterdir()):
        found[path.name] = path.suffix
        if path.suffix == ".zarr":
            extra = set(os.listdir(path)) - {"data", "labels", "meta", "zarr.json"}
            found[path.name] = open_store(path).digest() + " ".join([*sorted(extra), *verify_store(path)])
    return found


def in_fork(work: Callable[[], object]) -> None:
    assert not forked(work, 0)


@script
def split_over_its_own_parent(root: Path) -> int:
    """Killed before renames and, after the last, while it tidies up (`test_folders.py` tries every change)."""
    start, here = root / "start", root / "here"
    start.mkdir(parents=True)
    write_store(start / "a-train.zarr", numbered_episodes(8), task="toy")
    write_store(start / "a-validation.zarr", many(3), task="toy")
    os.fsync = lambda _: None

    def command() -> None:
        split(here / "a-train.zarr", out=here / "a", force=True)

    def lay() -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(start, here)

    tops = [f"{here}/a-{part}.zarr{end}" for part in ("train", "validation") for end in ("", ".old", ".partial")]
    kept = {*tops, *(f"{top}/{name}" for top in tops for name in ("lock", "tail.npz", "unfinished.json"))}
    begun = False

    def counts(path: str) -> bool:
        nonlocal begun
        begun = begun or path == tops[0]  # what was there is put aside
        return begun and path in kept

    lay()
    in_fork(command)
    expected = contents(here)
    for point in POINTS:
        lay()
        assert forked(command, point, counts), point
        assert any((here / f"a-train.zarr{end}").exists() for end in ("", ".old")), names(here)
        in_fork(command)
        assert contents(here) == expected, point
    return len(POINTS)


@script
def commands_that_start_over(root: Path) -> int:
    """Killed after some episodes, or when all was written but not yet in place."""
    numbered_store(root / "a.zarr")
    formats.export_store("npz", open_store(root / "a.zarr"), root / "a.npz")
    os.fsync = lambda _: None
    lines = ["import npz A.npz --out O.zarr", "merge A.zarr A.zarr --out O.zarr", "split A.zarr --out O"]
    for line in lines:
        args = [
            "data",
            *(word.replace("A.", f"{root}/a.").replace("O", f"{root}/o") for word in line.split()),
            "--quiet",
        ]
        before = contents(root)
        killed_in("finish" if line.startswith(("split", "import")) else "append", args, root)
        in_fork(partial(run, args))
        in_fork(partial(run, args))  # finds it finished
        made = [name for name in names(root) if name not in before]
        assert made in (["o.zarr"], ["o-train.zarr", "o-validation.zarr"]) and contents(root) | before == contents(root)
        for name in made:
            shutil.rmtree(root / name)
    return len(lines)


def run(args: list[str]) -> None:
    assert execute(app.app, args) == 0


def killed_in(method: str, args: list[str], root: Path) -> None:
    """Run a command that is killed in the third call of a writer's `append`, or the first of its `finish`."""
    if (child := os.fork()) == 0:
        calls = {"append": 3, "finish": 1}[method]
        work = getattr(StoreWriter, method)

        def dies(self: StoreWriter, *args: object, **more: object) -> object:
            nonlocal calls
            calls -= 1
            if not calls:
                self.flush()
                os._exit(9)
            return work(self, *args, **more)

        setattr(StoreWriter, method, dies)
        run(args)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert any(name.endswith(".partial") for name in names(root))


if __name__ == "__main__":
    writer_module.CHUNK_ROWS = 20
    print(SCRIPTS[sys.argv[2]](Path(sys.argv[1])))


def test_a_split_over_its_own_parent_loses_nothing_whenever_it_is_killed(tmp_path: Path) -> None:
    assert run_script(__file__, tmp_path, "split_over_its_own_parent") == len(POINTS)


def test_commands_that_cannot_resume_start_over(tmp_path: Path) -> None:
    assert run_script(__file__, tmp_path, "commands_that_start_over") == 3


# -------------------------------------------------------------------------------------------------- what may be resumed


@pytest.mark.usefixtures("no_fsync")
def test_what_a_build_flushed_is_no_leftover(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.zarr"
    with StoreWriter(path, task="toy", provenance={"recipe": {"steps": 3}}) as writer:
        for episode in many(3):
            writer.append(episode)
        writer.flush()
        (writer.partial / "data" / "observation").mkdir(parents=True, exist_ok=True)
        (writer.partial / "data" / "observation" / "zarr.0123.partial").write_text("zarr was killed here")
        (writer.partial / "labels" / "my.partial").mkdir(parents=True)  # a name that labels may have
    with pytest.raises(CvlctlError, match="holds 3 episodes of an unfinished store"):
        write_store(path, many(2), task="toy")
    with StoreWriter(path, task="toy", provenance={"recipe": {"steps": 3}}) as writer:
        assert writer.num_episodes == 3 and capsys.readouterr().err == ""
        store = writer.finish()
    assert not list(store.path.rglob("zarr.*.partial")) and verify_store(path) == []
    with StoreWriter(tmp_path / "b.zarr", task="toy", resume=False) as writer:
        writer.append(many(1)[0])
        writer.flush()
    assert names(tmp_path) == ["a.zarr"]  # nobody could resume it


@pytest.mark.usefixtures("no_fsync")
def test_a_partial_store_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        writer.append(many(1)[0])
        writer.flush()
    (writer.partial / "unfinished.json").unlink()  # there was no such thing
    with StoreWriter(tmp_path / "a.zarr", task="toy") as writer:
        assert writer.num_episodes == 1
        writer.finish()
    assert names(tmp_path) == ["a.zarr"]


# ----------------------------------------------------------------------------------------------- what is somebody's own


@pytest.mark.usefixtures("no_fsync")
def test_force_keeps_somebodys_backup_and_folder(a: Path, tmp_path: Path) -> None:
    out = write_store(tmp_path / "b.zarr", many(2), task="mine").path
    shutil.copytree(out, tmp_path / "b.zarr.old")
    digest = open_store(out).digest()
    subsample(a, out, episodes=3, force=True)
    assert open_store(out).num_episodes == 3 and names(tmp_path) == ["a.zarr", "b.zarr", "b.zarr.old"]
    assert open_store(tmp_path / "b.zarr.old").digest() == digest
    (tmp_path / "c.zarr.partial").mkdir()
    (tmp_path / "c.zarr.partial" / "notes").write_text("mine")
    for force in (False, True):
        with pytest.raises(CvlctlError, match=r"c\.zarr\.partial is in the way"):
            subsample(a, tmp_path / "c.zarr", episodes=3, force=force)
    assert (tmp_path / "c.zarr.partial" / "notes").read_text() == "mine"


@pytest.mark.usefixtures("no_fsync")
def test_force_onto_a_link_replaces_the_store_that_it_leads_to(a: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    write_store(tmp_path / "disk" / "b.zarr", many(2), task="mine")
    (tmp_path / "b.zarr").symlink_to(tmp_path / "disk" / "b.zarr")
    for episodes in (3, 4):
        assert subsample(a, tmp_path / "b.zarr", episodes=episodes, force=True)["path"] == str(tmp_path / "b.zarr")
        assert (tmp_path / "b.zarr").is_symlink() and names(tmp_path / "disk") == ["b.zarr"]
        assert open_store(tmp_path / "disk" / "b.zarr").num_episodes == episodes
    assert names(tmp_path) == ["a.zarr", "b.zarr", "disk"]


# ----------------------------------------------------------------------------------------------------- finished already


@pytest.mark.usefixtures("no_fsync")
def test_the_same_command_on_another_input_is_not_finished(a: Path, tmp_path: Path) -> None:
    out, file = tmp_path / "b.zarr", tmp_path / "r.npy"
    labelled_store(a, tmp_path / "labelled.zarr")
    np.save(file, np.arange(open_store(a).num_transitions, dtype=np.float32))
    commands: list[Callable[..., dict[str, object]]] = [
        lambda **more: merge([a, a], out, **more),
        lambda **more: label_store(a, "mine", out, rewards=str(file), **more),
    ]
    for command in commands:
        assert command(force=True)["status"] == "written"
        before = open_store(out).provenance
        assert command()["status"] == "finished already" and open_store(out).provenance == before
    assert command(force=True)["status"] == "written"
    np.save(file, np.ones(open_store(a).num_transitions))  # the last command's input
    with pytest.raises(CvlctlError, match=r"b\.zarr exists"):
        commands[-1]()
    commands[-1](force=True)
    numbered_store_again = open_store(a).digest()
    shutil.rmtree(a)
    numbered_store(a)  # written anew, of the same content
    assert open_store(a).digest() == numbered_store_again and commands[-1]()["status"] == "finished already"
    shutil.rmtree(a)
    shutil.copytree(tmp_path / "labelled.zarr", a)  # the same episodes, more labels
    with pytest.raises(CvlctlError, match=r"b\.zarr exists"):
        commands[-1]()
    shutil.rmtree(out)
    assert split(a, out=tmp_path / "s")["train"]["status"] == "written"
    shutil.rmtree(tmp_path / "s-validation.zarr")
    with pytest.raises(CvlctlError, match=r"s-train\.zarr exists"):  # one of two is not finished
        split(a, out=tmp_path / "s")


@pytest.mark.usefixtures("no_fsync")
def test_an_import_or_export_of_another_content_is_not_finished(
    a: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["data", "export", str(a), "npz", "--out", str(tmp_path / "a.npz")]
    back = ["data", "import", "npz", str(tmp_path / "a.npz"), "--out", str(tmp_path / "b.zarr")]
    assert execute(app.app, args) == 0 and execute(app.app, args) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"finished already: {tmp_path / 'a.npz'}")
    assert execute(app.app, [*args[:3], "ogbench", *args[4:]]) == 2  # another format under the same name
    assert execute(app.app, back) == 0 and execute(app.app, back) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"finished already: {tmp_path / 'b.zarr'}")
    subsample(a, a, episodes=3, force=True)
    assert execute(app.app, args) == 2 and execute(app.app, [*args, "--force"]) == 0
    assert execute(app.app, back) == 2 and execute(app.app, [*back, "--force"]) == 0
    assert open_store(tmp_path / "b.zarr").num_episodes == 3


def test_ctrl_c_that_comes_too_late_does_not_say_that_nothing_was_written(
    a: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = write_store(tmp_path / "b.zarr", many(2), task="mine").path
    args = ["data", "subsample", str(a), "--out", str(out), "--episodes", "3", "--force"]

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", stopped)
        assert execute(app.app, args) == 130
    said = capsys.readouterr().err
    assert "written all the same" in said and "nothing was written" not in said
    assert execute(app.app, args) == 0 and "finished already" in capsys.readouterr().out
    assert open_store(out).num_episodes == 3 and names(tmp_path) == ["a.zarr", "b.zarr"]
