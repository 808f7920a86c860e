"""Children: none imports from the current directory, and none outlives whoever began it, whatever it is doing."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cvlctl
from cvlctl import children
from cvlctl.play import workers

ROOT = Path(__file__).parents[1]


def test_nothing_is_imported_from_the_current_directory(hostile: Path) -> None:
    """Not even where the parent does, as an interactive session does."""
    answers = dict(workers.share_out("cvlctl.children:import_path", [], 1))
    assert answers == {}
    process = children.begin("import json\nprint(json.dumps([sys.path, sys.argv[2]]))", "x", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    path, argument = json.loads(out)
    assert argument == "x" and process.returncode == 0
    assert path and all(os.path.isabs(place) and Path(place) != hostile for place in path)
    assert dict(workers.share_out("numpy:sqrt", [4], 1)) == {0: 2.0}
    assert not (hostile / "sprung").exists()
    trapped = [sys.executable, "-c", "import json"]  # no -P: the traps work
    subprocess.run(trapped, check=False)
    assert (hostile / "sprung").read_text() == "json "


def test_children_run_the_parents_package_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a checkout that is the current directory, of which nothing else may be imported."""
    monkeypatch.chdir(Path(cvlctl.__file__).parents[1])
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    process = children.begin("print(children.__file__)", stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=60)
    assert Path(out.strip()) == Path(children.__file__)


@pytest.mark.parametrize("folder", ["cvlctl", "tests", "benchmarks", "docs"])
def test_every_interpreter_that_the_project_starts_keeps_clear_of_it(folder: str) -> None:
    """`python -c` and `python -m` import from the current directory, unless it is `python -P`."""
    bad = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.List | ast.Tuple):
                words = [ast.unparse(element) for element in node.elts]
                if "sys.executable" in words[:1] and words[1:2] in (["'-c'"], ["'-m'"]):
                    bad.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    bad = [place for place in bad if "test_children" not in place]  # the trap itself, above
    assert not bad


# --- orphans

STARTS = """
import sys, time
from cvlctl import children
started = [children.begin(code) for code in sys.argv[1:]]
print(*(child.pid for child in started), flush=True)
time.sleep(600)
"""
BUSY = {
    "asleep": "import time; time.sleep(600)",
    "computing": "while True: pass",
    "importing": "import torch, zarr, mujoco, matplotlib.pyplot; import time; time.sleep(600)",
    "reading": "sys.stdin.read()",
    "deaf": "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)",
}


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; elsewhere they end with their standard input")
def test_none_lives_two_seconds_after_its_parent_was_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-P", "-c", STARTS, *BUSY.values()], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = dict(zip(BUSY, map(int, parent.stdout.readline().split()), strict=True))
    assert all(map(alive, pids.values()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 2
    while left := [name for name, pid in pids.items() if alive(pid)]:
        assert time.monotonic() < until, f"still alive: {left}"
        time.sleep(0.02)


def test_one_whose_parent_died_before_it_could_look_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children.os, "getpid", lambda: 2**22 + 1)  # of nobody
    process = children.begin("print('alive')", stdout=subprocess.PIPE)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == 1


def test_ending_them_ends_what_they_started() -> None:
    code = "import subprocess, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)"
    process = children.begin(code, stdout=subprocess.PIPE)
    assert process.stdout
    grandchild = int(process.stdout.readline())
    children.end([process])
    assert process.returncode == -signal.SIGKILL
    until = time.monotonic() + 10
    while Path(f"/proc/{grandchild}").exists() and alive(grandchild):
        assert time.monotonic() < until
        time.sleep(0.02)
    children.end([process])  # twice is once
    children.close([process])
    assert process.stdout.closed


def test_a_child_keeps_its_answers_apart_where_streams_are_closed(tmp_path: Path) -> None:
    """With stderr closed, what a library prints would have gone among the answers, or into the next file opened."""
    script = (
        "import json, sys\nfrom cvlctl.play import workers\n"
        "json.dump(sorted(workers.share_out('builtins:print', ['a', 'b'], 2)), open(sys.argv[1], 'w'))\n"
    )
    command: list[Any] = [sys.executable, "-P", "-c", script, tmp_path / "answers"]
    for closed in ("<&-", "2>&-", ">&- 2>&- <&-", "2>/dev/full"):
        subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *map(str, command)], check=True, timeout=60)
        assert json.loads((tmp_path / "answers").read_text()) == [[0, None], [1, None]]
