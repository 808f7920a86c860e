"""Forks that end before their k-th change of the file system. For scripts: a test's own process has threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
KILLED = 9


def watch(see: Callable[[str], None]) -> None:
    """Call `see` before each change of the file system that this process makes, with its path; to the process's end."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        wrote = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or wrote:
            see(os.fsdecode(args[0]) if isinstance(args[0], str | bytes) else str(args[0]))

    sys.addaudithook(hook)


def forked(work: Callable[[], object], die_before: int, counts: Callable[[str], bool] = lambda _: True) -> bool:
    """Whether `work`, in a fork, was killed before its k-th change of a path that counts (0: it is not)."""
    if (child := os.fork()) == 0:
        left = die_before

        def see(path: str) -> None:
            nonlocal left
            left -= counts(path)
            if left == 0 and die_before:
                os._exit(KILLED)

        watch(see)
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED), code
    return code == KILLED


def run_script(script: str, *args: str | Path) -> int:
    """Run a test's file as a script; the number that it prints last."""
    command = [sys.executable, script, *map(str, args)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return int(done.stdout.split()[-1])
