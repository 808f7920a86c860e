"""Stand-ins for cells' commands: they do what they are told, and no more, so that a pool can be watched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvlctl.experiments.engines import start

# "name": what it does instead of its command, "; " between; the others end at once
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from cvlctl import cell, interrupts
from cvlctl.errors import CvlctlError
folder = Path(os.environ[cell.FOLDER])
root = next(one for one in folder.parents if one.name == "cells")
name, began = str(folder.relative_to(root)), time.monotonic()
def note(word):
    with open(root.parent / "journal.jsonl", "a") as file:
        file.write(json.dumps({"cell": name, "what": word, "argv": sys.argv[2:], "gpu": os.environ.get(
            "CUDA_VISIBLE_DEVICES"), "threads": os.environ["OMP_NUM_THREADS"]}) + chr(10))
try:
    cell.begin()
except CvlctlError:
    sys.exit(cell.HELD)
acts, code = json.loads((root.parent / "acts.json").read_text()).get(name, ""), 0
try:
    with interrupts.watched(program=True):
        note("begun")
        cell.progress("work", 1, 4, "steps", 2.0)
        for act in acts.split("; "):
            if act.startswith("sleep"):
                time.sleep(float(act.split()[1]))
            if act.startswith("until"):  # all of these have begun: no clock decides what a busy machine shows
                while set(act.split()[1:]) - {json.loads(line)["cell"] for line in open(root.parent / "journal.jsonl")}:
                    time.sleep(0.02)
                    if time.monotonic() - began > 60:
                        sys.exit(3)
            if act == "grow":  # beyond whatever began it, of whose memory the kernel tells else
                grown = b"x" * 400_000_000
            if act == "fail":
                print("a line before the end")
                cell.failed("it cannot be", "do something else")
                code = 2
            if act in ("die", "kill"):  # itself, or who began it
                os.kill(os.getpid() if act == "die" else os.getppid(), signal.SIGKILL)
                time.sleep(60)
except KeyboardInterrupt:
    code = 130
note("ended")
cell.end(code)
sys.exit(code)
"""


@pytest.fixture
def acts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what cells of the experiment at tmp_path/e do; the journal there tells what they did."""
    monkeypatch.setattr(start, "_CODE", STAND_IN)

    def say(**what: str) -> None:
        (tmp_path / "e").mkdir(exist_ok=True)
        (tmp_path / "e" / "acts.json").write_text(json.dumps(what))

    say()
    return say


@pytest.fixture
def journal(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What stand-ins have noted, in order."""

    def read() -> list[dict[str, Any]]:
        path = tmp_path / "e" / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    return read
