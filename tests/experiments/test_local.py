"""The local engine: order, room, failures, and what else is at work; by stand-ins of the cells' commands."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cvlctl import cell as own
from cvlctl.cli.console import console
from cvlctl.errors import CvlctlError
from cvlctl.experiments import drivers, look, show, status
from cvlctl.experiments.commands import load
from cvlctl.experiments.engines import local, start, waiting
from cvlctl.experiments.graph import folder_of
from cvlctl.experiments.run import run_experiment
from cvlctl.files import lock
from cvlctl.terminal import console as printed

TEXT = """\
out: OUT
matrix: {task: [a, b]}
stages:
  critic: {command: pretrain, stores: ["${task}.zarr"], steps: 9, threads: 1, out: "${out}/critic/${task}"}
  policy: {command: finetune, stores: ["${task}.zarr"], steps: 9, threads: 1, init_from: "${out}/critic/${task}",
    algorithm: cvl, out: "${out}/policy/${task}"}
  both: {command: finetune, stores: [a.zarr], steps: 9, threads: 2, init_from: "${out}/critic/a", algorithm: cvl,
    out: "${out}/both"}
"""
CRITICS = ["critic/a", "critic/b", "critic/c"]
CELLS = ["critic/a", "critic/b", "policy/a", "policy/b", "both"]
Journal = Callable[[], list[dict[str, Any]]]
Acts = Callable[..., None]


@pytest.fixture
def experiment(tmp_path: Path, acts: Acts, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    path = tmp_path / "e.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "e")))
    monkeypatch.setattr(local, "num_cpus", lambda: 2)
    return lambda *overrides: load(path, overrides, "run")


def states(result: dict[str, Any]) -> dict[str, str]:
    return {row["cell"]: row["state"] for row in result["cells"]}


def most_at_once(journal: Journal) -> int:
    now, most = 0, 0
    for line in journal():
        now += 1 if line["what"] == "begun" else -1
        most = max(most, now)
    return most


def test_each_cell_runs_once_after_those_that_it_needs(experiment: Any, acts: Acts, journal: Journal) -> None:
    acts(**{"critic/a": "until policy/b", "critic/b": "until critic/a"})
    result = run_experiment(experiment())
    assert result["status"] == "done"
    assert states(result) == dict.fromkeys(CELLS, "finished")
    lines = [(line["cell"], line["what"]) for line in journal()]
    assert sorted(lines) == sorted((name, what) for name in CELLS for what in ("begun", "ended"))
    for name, need in (("policy/a", "critic/a"), ("policy/b", "critic/b"), ("both", "critic/a")):
        assert lines.index((need, "ended")) < lines.index((name, "begun"))
    assert lines.index(("policy/b", "begun")) < lines.index(("critic/a", "ended"))  # it need not wait for that
    assert most_at_once(journal) == 2
    (argv,) = {tuple(line["argv"][:1]) for line in journal() if line["cell"].startswith("policy")}
    assert argv == ("finetune",)
    assert {line["threads"] for line in journal()} == {"1"}


TOGETHER = {"critic/a": "until critic/b", "critic/b": "until critic/a"}
APART = {"critic/b": "until policy/a", "policy/a": "until critic/b"}  # whichever begins first


@pytest.mark.parametrize(
    ("overrides", "most", "waits"),
    [([], 2, TOGETHER), (["local.processes=1"], 1, {}),
     (["local.processes=3", "matrix.task=[a,b,c]"], 3, dict.fromkeys(CRITICS, "until critic/a critic/b critic/c")),
     (["stages.critic.local={processes: 1}", "stages.policy.local={processes: 1}"], 2, APART),
     (["stages.critic.threads=2", "stages.policy.threads=2"], 1, {})],
)  # fmt: skip
def test_cells_share_the_cpus(
    experiment: Any, acts: Acts, journal: Journal, overrides: list[str], most: int, waits: dict[str, str]
) -> None:
    acts(**waits)
    assert run_experiment(experiment(*overrides))["status"] == "done"
    assert most_at_once(journal) == most
    critics = [line["what"] for line in journal() if line["cell"] in CRITICS]
    if any("critic.local" in override for override in overrides):
        assert critics == ["begun", "ended"] * 2


def test_gpus_are_dealt_out(experiment: Any, acts: Acts, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(local, "num_cpus", lambda: 8)
    acts(**TOGETHER)
    on_gpu = [f"stages.{stage}.device=cuda" for stage in ("critic", "policy")]
    result = run_experiment(experiment(*on_gpu, "stages.both.device=cpu", "local.cells_per_gpu=1"))
    assert result["status"] == "done"
    begun = {line["cell"]: line["gpu"] for line in journal() if line["what"] == "begun"}
    assert {begun["critic/a"], begun["critic/b"]} == {"4", "7"}
    busy = dict.fromkeys(("4", "7"), 0)
    for line in journal():
        if line["cell"] != "both":
            busy[line["gpu"]] += 1 if line["what"] == "begun" else -1
            assert busy[line["gpu"]] <= 1


def test_a_failure_stays_where_it_happens(
    experiment: Any, acts: Acts, journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    acts(**{"critic/a": "fail"})
    result = run_experiment(experiment())
    assert result["status"] == "failed"
    assert states(result) == {"critic/a": "failed", "critic/b": "finished", "policy/a": "blocked",
                              "policy/b": "finished", "both": "blocked"}  # fmt: skip
    assert (result["cells"][0]["error"], result["cells"][0]["hint"]) == ("it cannot be", "do something else")
    assert result["cells"][2]["error"] == "it needs critic/a, which failed"
    show.render(result, console())
    out = capsys.readouterr().out
    assert "a line before the end" in out
    assert "hint: do something else" in out
    acts()
    # the same command again starts what failed and what waited for it; stand-ins leave no runs, so all of them here
    assert states(run_experiment(experiment())) == dict.fromkeys(CELLS, "finished")


def test_unfinished_is_for_cells_that_begin_from_a_run(experiment: Any, journal: Journal) -> None:
    run_experiment(experiment(), only="cell=policy/a", unfinished=True)
    assert {line["cell"]: line["argv"][2:] for line in journal()} == {"critic/a": [], "policy/a": ["--unfinished"]}


def test_force_is_for_what_was_chosen_and_what_that_needs_goes_on(
    experiment: Any, acts: Acts, journal: Journal
) -> None:
    result = run_experiment(experiment(), only="cell=policy/a", force=True)
    assert states(result) == {"critic/a": "finished", "policy/a": "finished"}
    assert {line["cell"]: line["argv"][2:] for line in journal()} == {"critic/a": [], "policy/a": ["--force"]}


@pytest.mark.parametrize(("width", "terminal"), [(200, True), (80, True), (60, True), (30, False)])
def test_a_plan_and_a_status_break_no_name_however_narrow_it_is(experiment: Any, width: int, terminal: bool) -> None:
    name = "policies/fetch-push-with-a-long-name/learning-from-examples"
    found = experiment("stages.both.out=${out}/" + name)
    file = io.StringIO()
    screen = printed(file=file, width=width, force_terminal=terminal)
    show.render(run_experiment(found, dry_run=True), screen)
    look.render(look.look(found), screen)
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert sum(name in words for words in lines) == 2
    whole = [words for words in lines if words[:2] == ["both:", "finetune"] and name in words]
    assert len(whole) == (1 if width == 200 or not terminal else 0)  # in a line
    assert "a factor of two" in file.getvalue()


def test_of_thousands_that_wait_a_status_is_one_line() -> None:
    row = {"cell": "a", "state": "waiting", "why": "", "progress": "", "host": None, "engine": None, "job": None}
    file = io.StringIO()
    status.render([row] * 5_000, printed(file=file, width=80))
    assert file.getvalue() == "0 of 5000 cells done, 5000 waiting\n"
    failed = {**row, "state": "failed", "why": "no"}
    status.render([failed] + [row] * 5_000, printed(file=file, width=80))
    assert file.getvalue().endswith("\n0 of 5001 cells done, 5000 waiting, 1 failed\n")


def test_fail_fast_stops_the_others(experiment: Any, acts: Acts, journal: Journal) -> None:
    acts(**{"critic/a": "until critic/b; fail", "critic/b": "sleep 60"})
    begin = time.monotonic()
    result = run_experiment(experiment(), fail_fast=True)
    assert time.monotonic() - begin < 30
    assert result["status"] == "failed"
    assert states(result)["critic/b"] == states(result)["both"] == "stopped"
    assert ("critic/b", "ended") in [(line["cell"], line["what"]) for line in journal()]  # it could save what it had


def test_a_kill_is_told_of_with_the_memory_that_it_took(experiment: Any, acts: Acts, tmp_path: Path) -> None:
    acts(**{"critic/b": "die"})
    result = run_experiment(experiment())
    assert states(result)["critic/b"] == "failed"
    assert states(result)["policy/b"] == "blocked"
    why = result["cells"][1]["error"]
    assert why.startswith("killed (SIGKILL), most likely because memory ran out")
    told = start.outcome(folder_of(tmp_path / "e", "critic/b"), -signal.SIGKILL, 3 * 2**30)
    assert told["error"][0].endswith("because memory ran out; it had taken 3.0 GiB")
    why = told["error"][0]
    found = look.look(experiment())
    assert {row["cell"]: row["why"] for row in found["cells"]}["critic/b"] == why


def test_what_another_process_runs_is_left_to_it(
    experiment: Any, acts: Acts, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HELD_SECONDS", 0.2)
    held = lock(folder_of(tmp_path / "e", "critic/a") / own.LOCK)

    def let_go() -> None:
        while "policy/b" not in {line["cell"] for line in journal()}:
            time.sleep(0.05)
        held.close()

    threading.Thread(target=let_go).start()
    assert run_experiment(experiment())["status"] == "done"
    begun = [line["cell"] for line in journal() if line["what"] == "begun"]
    assert sorted(begun) == sorted(CELLS)
    assert begun[:2] == ["critic/b", "policy/b"]  # these went on meanwhile


def test_who_looks_at_a_cell_is_never_in_the_way_of_one_that_begins(
    experiment: Any, acts: Acts, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pool that waits for another's cell looks at it all the time; meanwhile its lock can be taken at any."""
    monkeypatch.setattr(local, "HELD_SECONDS", 0.0)
    monkeypatch.setattr(local, "POLL_SECONDS", 0.0)
    folder = folder_of(tmp_path / "e", "critic/a")
    held = lock(folder / own.LOCK)
    own.write(folder, {"state": "running", "pid": os.getpid(), **own.where()})
    looks, tried = threading.Event(), threading.Event()
    plain = local.is_at_work

    def is_at_work(*arguments: Any) -> bool:
        looks.set()
        return plain(*arguments)

    def begin_again_and_again() -> None:
        nonlocal held
        looks.wait()
        for _ in range(500):
            held.close()
            held = lock(folder / own.LOCK)  # which fails where anybody else has it
        held.close()
        own.write(folder, {"state": "stopped"})
        tried.set()

    monkeypatch.setattr(local, "is_at_work", is_at_work)
    threading.Thread(target=begin_again_and_again).start()
    assert run_experiment(experiment(), only="stage=critic")["status"] == "done"
    assert tried.is_set()


def test_a_driver_that_plans_yet_is_found_and_stopped(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []
    canceller = threading.Thread(target=lambda: stopped.append(look.cancel(experiment())["stopped"]))

    def here(gpus: bool | None) -> Any:  # PyTorch is imported: that takes seconds
        canceller.start()
        time.sleep(60)

    monkeypatch.setattr("cvlctl.experiments.fixed._here", here)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment())
    canceller.join()
    assert stopped == [1]


def test_status_while_it_runs_and_cancel(experiment: Any, acts: Acts, tmp_path: Path, journal: Journal) -> None:
    acts(**{"critic/a": "sleep 60", "critic/b": "fail"})
    code = (
        "import sys, tests.experiments.conftest as c; from cvlctl.experiments.engines import start;"
        "start._CODE = c.STAND_IN;"
        "from cvlctl.__main__ import main; main()"
    )
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, "run", str(tmp_path / "e.yaml")],
        env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until = time.monotonic() + 60
    while {row["state"] for row in look.look(experiment())["cells"]} != {"running", "failed", "blocked", "waiting"}:
        assert time.monotonic() < until
        assert process.poll() is None
    found = {row["cell"]: row for row in look.look(experiment())["cells"]}
    assert found["critic/a"]["progress"].startswith("25% of 4 steps, 2/s, 1s left")
    assert (found["critic/a"]["engine"], found["critic/b"]["why"]) == ("local", "it cannot be")
    assert {name: row["state"] for name, row in found.items()} == {
        "critic/a": "running", "critic/b": "failed", "policy/a": "waiting", "policy/b": "blocked", "both": "waiting",
    }  # fmt: skip
    assert look.look(experiment())["status"] == "running"
    assert look.cancel(experiment())["stopped"] == 1
    assert process.wait(30) == 130
    assert process.stderr is not None
    assert "the same command goes on" in process.stderr.read()
    process.stderr.close()
    assert {row["cell"]: row["state"] for row in look.look(experiment())["cells"]}["critic/a"] == "stopped"
    assert look.cancel(experiment())["stopped"] == 0
    assert "a line before the end" in look.logs(experiment(), "critic/b")["text"]
    with pytest.raises(CvlctlError, match="no cell critic/c"):
        look.logs(experiment(), "critic/c")
    with pytest.raises(CvlctlError, match="policy/a has said nothing"):
        look.logs(experiment(), "policy/a")


def test_a_cell_that_died_without_a_word_is_seen(experiment: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", "critic/a")
    folder.mkdir(parents=True)
    gone = subprocess.run([sys.executable, "-P", "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    here = {"state": "running", "pid": int(gone.stdout), **own.where()}
    own.write(folder, here)
    assert look.look(experiment())["cells"][0]["why"].startswith("its process died without a word")
    own.write(folder, {**here, "host": "elsewhere"})  # there it may well run
    assert look.look(experiment())["cells"][0]["state"] == "running"
    os.utime(folder / own.STATE, (time.time() - 100,) * 2)  # but it says nothing any more
    assert look.look(experiment())["cells"][0]["state"] == "failed"


@pytest.mark.parametrize(
    "damage",
    [{"progress": 3}, {"progress": {}}, {"progress": {"done": 1, "total": 2, "unit": "s", "rate": float("nan")}},
     {"progress": {"done": 1, "total": 2, "unit": "s", "rate": 1e-300}}, {"progress": {"done": 10**400}},
     {"pid": "text"}, {"pid": [1]}, {"pid": -1}, {"pid": 0}, {"pid": 1e300}, {"pid": 10**30}, {"host": [1]},
     {"state": "failed", "error": 3}, {"state": "failed", "error": []}, {"state": {}}],
)  # fmt: skip
def test_a_damaged_state_says_nothing(experiment: Any, tmp_path: Path, damage: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "e", "critic/a")
    folder.mkdir(parents=True)
    own.write(folder, {"state": "running", "pid": os.getpid(), **own.where(), **damage})
    found = look.look(experiment())["cells"][0]
    gone = "failed" if "pid" in damage or "state" in damage else "running"
    assert found["state"] == ("waiting" if damage == {"state": {}} else gone)
    look.render({"status": "", "cells": [found]}, console())


def test_a_log_is_read_from_its_end_and_never_waited_for(experiment: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "e", "critic/a")
    folder.mkdir(parents=True)
    with open(folder / "log.txt", "wb") as file:
        file.truncate(2**40)
        file.seek(0, os.SEEK_END)
        file.write(b"\xff\x00the end")
    assert look.logs(experiment(), "critic/a")["text"].endswith("the end")
    (folder / "log.txt").unlink()
    os.mkfifo(folder / "log.txt")
    with pytest.raises(CvlctlError, match="critic/a has said nothing"):
        look.logs(experiment(), "critic/a")


def test_a_cell_that_cannot_begin_leaves_the_others_alone(experiment: Any, tmp_path: Path, acts: Acts) -> None:
    (tmp_path / "e" / "cells" / "critic").mkdir(parents=True)
    (tmp_path / "e" / "cells" / "critic" / "a").touch()  # a file in its folder's place: as on a full disk
    result = run_experiment(experiment())
    assert states(result) == {"critic/a": "failed", "critic/b": "finished", "policy/a": "blocked",
                              "policy/b": "finished", "both": "blocked"}  # fmt: skip
    assert "cannot write" in result["cells"][0]["error"]


def test_what_an_earlier_process_said_is_not_what_this_one_died_of(
    experiment: Any, tmp_path: Path, acts: Acts, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "e", "critic/a")
    folder.mkdir(parents=True)
    own.write(folder, {"state": "failed", "pid": 1, "code": 1, "error": ["an old story", ""]})
    monkeypatch.setattr(start, "_CODE", "import sys; print('a new one'); sys.exit(1)")
    assert run_experiment(experiment(), only="cell=critic/a")["cells"][0]["error"] == "a new one"


def test_what_failed_elsewhere_meanwhile_is_not_tried_again(
    experiment: Any, acts: Acts, journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HELD_SECONDS", 0.2)
    folder = folder_of(tmp_path / "e", "critic/a")
    held = lock(folder / own.LOCK)
    own.write(folder, {"state": "running", "pid": os.getpid(), **own.where()})

    looks = threading.Event()
    plain = local.is_at_work
    monkeypatch.setattr(local, "is_at_work", lambda *arguments: looks.set() or plain(*arguments))

    def fail() -> None:
        looks.wait()
        own.write(folder, {"state": "failed", "error": ["it cannot be", "there either"]})
        held.close()

    threading.Thread(target=fail).start()
    result = run_experiment(experiment(), only="stage=critic")
    assert states(result) == {"critic/a": "failed", "critic/b": "finished"}
    assert (result["cells"][0]["error"], result["cells"][0]["hint"]) == ("it cannot be", "there either")
    assert [line["cell"] for line in journal() if line["what"] == "begun"] == ["critic/b"]


def test_nobody_is_stopped_who_has_the_number_of_a_driver_that_died(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-P", "-c", "input()"], stdin=subprocess.PIPE)
    folder = tmp_path / "cells"
    folder.mkdir()
    for pid in (other.pid, -1, 0, "text", 10**30):
        about = {"host": own.where()["host"], "pid": pid, "engine": "local"}
        (folder / f"driver-here-{pid}.json").write_text(json.dumps(about))
    (folder / "driver-x.json").write_text("[]")
    assert drivers.cancel(tmp_path) == []
    assert other.poll() is None
    assert list(folder.iterdir()) == []
    other.communicate(b"")


def test_a_driver_of_another_host_that_is_silent_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "cells" / "driver-far-1.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"host": "far", "pid": 1, "engine": "local"}))
    assert len(drivers.at_work(tmp_path)) == 1
    for ago in (100, -100):  # its clock does not matter
        file.write_text(json.dumps({"host": "far", "pid": 1, "engine": "local"}))
        os.utime(file, (time.time() - ago,) * 2)
        assert drivers.at_work(tmp_path) == []


def test_who_is_at_work_is_known_as_long_as_they_are(tmp_path: Path) -> None:
    with drivers.noted(tmp_path, "local"):
        assert [about["pid"] for about in drivers.at_work(tmp_path)] == [os.getpid()]
    assert drivers.at_work(tmp_path) == []
    far = {"host": "far", "pid": 1, "engine": "local"}
    (tmp_path / "cells" / "driver-far-1.json").write_text(json.dumps(far))
    assert drivers.at_work(tmp_path) == [far]
    with pytest.raises(CvlctlError, match="is run from far, out of reach"):
        drivers.cancel(tmp_path)


def interrupt_amid(experiment: Any, acts: Acts, journal: Journal, number: signal.Signals) -> None:
    """A signal once two cells have begun: both hear of it, no other begins."""
    acts(**{"critic/a": "sleep 60", "critic/b": "sleep 60"})

    def interrupt() -> None:
        while len(journal()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment())
    lines = [(line["cell"], line["what"]) for line in journal()]
    assert sorted(lines) == [(name, what) for name in ("critic/a", "critic/b") for what in ("begun", "ended")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_reaches_every_cell(
    experiment: Any, acts: Acts, journal: Journal, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:  # these tests run under nohup
        signal.signal(number, signal.SIG_DFL)
    try:
        interrupt_amid(experiment, acts, journal, number)
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err
    assert "stopping: cells save what they have" in said
    assert "stopped; the same command goes on" in said


def test_an_experiment_that_is_edited_while_it_runs_goes_on_as_it_began(
    experiment: Any, acts: Acts, journal: Journal, tmp_path: Path
) -> None:
    acts(**{"critic/a": "until critic/b"})
    began = run_experiment(experiment())
    files = {line["cell"]: line["argv"][1] for line in journal()}
    edited = run_experiment(experiment("stages.policy.steps=10"))
    assert began["status"] == edited["status"] == "done"
    again = {line["cell"]: line["argv"][1] for line in journal()}
    assert {name for name in CELLS if files[name] != again[name]} == {"policy/a", "policy/b"}
    assert all(Path(file).is_file() for file in (*files.values(), *again.values()))  # each as it was planned


def test_the_memory_of_a_process_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(own_kb: int) -> int:
        monkeypatch.setattr(waiting.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=own_kb))
        process = subprocess.Popen([sys.executable, "-P", "-c", "bytearray(b'1') * 2**26"])
        while (found := waiting.poll(process)) is None:
            time.sleep(0.02)
        assert found[0] == 0
        return found[1]

    assert peak(1) > 2**26
    assert peak(2**40) == 0  # it was a copy of a larger one at first: what the kernel tells is of that
