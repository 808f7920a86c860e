"""Ctrl-C and SIGTERM at any moment, closed and full streams, killed parents: nothing is lost, and nothing left over."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from reliability.cases import CASES, Case, lay
from reliability.driver import Runner, count, described, difference

FEW, MANY = 1, 40  # moments of a case, of either kind: before a change of the file system; by the clock
SIGNALS = [signal.SIGINT, signal.SIGTERM]
NAMES = [name for name in CASES if name != "fetch"]
CVLCTL = [sys.executable, "-P", "-m", "cvlctl"]
STREAMS: dict[str, dict[str, list[int]]] = {
    "<&-": {"closed": [0]}, ">&-": {"closed": [1]}, "2>&-": {"closed": [2]}, ">&- 2>&- <&-": {"closed": [0, 1, 2]},
    ">/dev/full": {"full": [1]}, "2>/dev/full": {"full": [2]},
}  # fmt: skip


class Trial:
    """One case, and what becomes of it undisturbed."""

    def __init__(self, case: Case, runner: Runner, inputs: Path, folder: Path) -> None:
        self.case, self.runner, self.inputs, self.folder = case, runner, inputs, folder
        self.args = case.args.split()
        lay(case, inputs, folder / "whole")
        self.whole = runner(folder / "whole", *self.args)
        assert self.whole["code"] == 0, self.whole["err"]
        self.expected = described(folder / "whole")

    def fresh(self) -> Path:
        here = self.folder / "here"
        shutil.rmtree(here, ignore_errors=True)
        lay(self.case, self.inputs, here)
        return here

    def faults(self, moment: dict[str, Any]) -> str:
        """What is wrong after a signal at a moment and the same command again; "" if nothing."""
        here = self.fresh()
        first = self.runner(here, *self.args, **moment)
        wrong = []
        came = "after" not in moment and len(first["trace"]) >= moment["at"]
        if first["code"] != 130 and (came or first["code"] != 0):
            wrong.append(f"ended with {first['code']}: {first['err'].strip()[-300:]}")
        if "Traceback" in first["err"] or "ignored" in first["err"]:
            wrong.append(first["err"])
        again = self.runner(here, *self.args)
        if again["code"] != 0:
            wrong.append(f"again: {again['code']}: {again['err'].strip()[-300:]}")
        elif different := difference(self.expected, described(here)):
            wrong.append(different)
        at = f", {first['trace'][moment['at'] - 1]}" if came else ""
        return "\n".join([f"--- {moment}{at}:", *wrong]) if wrong else ""

    def run(self, few: int, chance: random.Random) -> list[str]:
        changes, seconds = len(self.whole["trace"]), self.whole["cpu"]
        moments: list[dict[str, Any]] = [
            {"how": "signal", "at": at} for at in chance.sample(range(1, changes + 1), min(few, changes))
        ]
        moments += [{"after": max(1e-4, chance.uniform(0, seconds))} for _ in range(few)]
        failed = [fault for one in moments if (fault := self.faults(one | {"number": int(chance.choice(SIGNALS))}))]
        count("signals", len(moments), len(failed))
        return failed


@pytest.fixture
def trial(request: pytest.FixtureRequest, runner: Runner, inputs: Path, tmp_path: Path) -> Trial:
    return Trial(CASES[request.param], runner, inputs, tmp_path)


SOME = [pytest.param(n, n, marks=[pytest.mark.slow] * (n == "run"), id=n) for n in NAMES]  # `run` takes half a minute


@pytest.mark.parametrize(("trial", "name"), SOME, indirect=["trial"])
def test_a_signal_at_some_moment(trial: Trial, name: str) -> None:
    failed = trial.run(FEW, random.Random(name))
    assert not failed, "\n".join(failed)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("trial", NAMES, indirect=True)
def test_a_signal_at_many_moments(trial: Trial) -> None:
    failed = trial.run(MANY, random.Random())
    assert not failed, f"{len(failed)} failed\n" + "\n".join(failed)


def test_one_to_an_experiment_reaches_its_cell_and_begins_no_other(
    runner: Runner, inputs: Path, tmp_path: Path
) -> None:
    trial = Trial(CASES["run"], runner, inputs, tmp_path)
    here = trial.fresh()
    first = runner(here, *trial.args, at=" e/cells/a.zarr/log.txt", how="signal", number=int(signal.SIGTERM))
    assert first["code"] == 130 and "the same command goes on" in first["err"], first["err"]
    assert "2/2" not in first["err"] and not (here / "e" / "critic").exists()
    again = runner(here, *trial.args)
    assert again["code"] == 0, again["err"]
    assert difference(trial.expected, described(here)) == ""


def test_one_on_the_last_update_is_not_swallowed(runner: Runner, inputs: Path, tmp_path: Path) -> None:
    case = CASES["pretrain"]
    trial = Trial(case._replace(args=f"{case.args} steps=1"), runner, inputs, tmp_path)
    here, last = trial.fresh(), " run/checkpoints/last.safetensors"
    first = runner(here, *trial.args, at=last, how="signal", number=int(signal.SIGTERM))
    assert first["code"] == 130 and "run: stopped at step 1" in first["err"], first["err"]
    again = runner(here, *trial.args)
    assert again["code"] == 0 and "run: resuming at step 1" in again["err"], again["err"]
    assert difference(trial.expected, described(here)) == ""


# --- while it starts

INTERRUPTED = """
import os, signal, sys
left = int(sys.argv.pop(1))
class Finder:
    def find_spec(name, path=None, target=None):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder)
from cvlctl.__main__ import main
main()
"""


def start(left: int) -> subprocess.CompletedProcess[str]:
    """`cvlctl --version`, with Ctrl-C amid the so many-th import."""
    command = [sys.executable, "-P", "-c", INTERRUPTED, str(left), "--version"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("left", [random.Random(at).randint(6, 300) for at in range(4)])
def test_ctrl_c_while_it_starts_is_an_exit_code(left: int) -> None:
    done = start(left)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("error: interrupted") and "Traceback" not in done.stderr


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ctrl_c_amid_every_import() -> None:
    failed, left = [], 6  # before it is cvlctl itself that is found
    while (done := start(left)).returncode != 0:
        if (done.returncode, "Traceback" in done.stderr) != (130, False):
            failed.append((left, done.stderr))
        left += 1
    count("signals amid imports", left - 6, len(failed))
    assert not failed


# --- streams


@pytest.mark.parametrize("name", ["build random", "pretrain", "evaluate", "merge"])
@pytest.mark.parametrize("closed", STREAMS)
def test_closed_and_full_streams_change_nothing(
    closed: str, name: str, runner: Runner, inputs: Path, tmp_path: Path
) -> None:
    trial = Trial(CASES[name], runner, inputs, tmp_path)
    here = trial.fresh()
    done = runner(here, *trial.args, **STREAMS[closed])
    assert done["code"] == (2 if closed == ">/dev/full" else 0), done["err"]  # done all the same, but not told
    assert "Traceback" not in done["err"]
    assert difference(trial.expected, described(here)) == ""


@pytest.mark.parametrize("closed", STREAMS)
def test_a_program_of_its_own_with_closed_streams(closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", *CVLCTL]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=120)
    full = closed == ">/dev/full"
    assert done.returncode == (2 if full else 0)
    assert done.stdout.startswith("cvlctl") == (">" not in closed or closed.startswith("2"))
    assert done.stderr.startswith("error: No space left on device") if full else not done.stderr
    wrong = subprocess.run([*command, "data", "info", "no", "--json"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


# --- several processes


def children_of(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for children in lists for child in children.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(there: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "too late"
        time.sleep(0.02)


BUILD = {
    "task": ["gym/Pendulum-v1", "gym/MountainCarContinuous-v0"], "source": {"name": "random", "episodes": 10**6},
    "out": "${task}.zarr", "horizon": 50, "processes": 2, "checkpoint_seconds": 0.2,
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "working"), [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, True)],
    ids=["killed as they start", "killed as they work", "interrupted"],
)  # fmt: skip
def test_no_build_outlives_its_parent_and_ctrl_c_saves_them_all(
    number: signal.Signals, working: bool, tmp_path: Path
) -> None:
    (tmp_path / "many.yaml").write_text(json.dumps(BUILD))
    command = [*CVLCTL, "build-dataset", "many.yaml"]
    parent = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0)
    assert parent.stderr
    until(lambda: len(children_of(parent.pid)) == 2 or parent.poll() is not None, 120)
    children = children_of(parent.pid)
    if working:
        until(lambda: len(list(tmp_path.glob("gym/*.partial/tail.npz"))) == 2 or parent.poll() is not None, 120)
    os.killpg(parent.pid, number)  # as a terminal's Ctrl-C does
    told = parent.stderr.read() if number == signal.SIGINT else ""
    assert parent.wait(120) == (130 if number == signal.SIGINT else -number)
    parent.stderr.close()
    until(lambda: not any(map(alive, children)), 2)
    if number == signal.SIGINT:
        assert told.count("the same command goes on from there") == 2 and "Traceback" not in told
        assert len(list(tmp_path.glob("gym/*.partial/tail.npz"))) == 2
