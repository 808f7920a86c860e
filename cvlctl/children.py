"""Child interpreters: nothing is imported from the current directory, where a `json.py` may lie, and none is left over.

They live in a process group of their own, so that Ctrl-C reaches the parent alone, and end with the thread that began
them, also where that was killed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TextIO

import cvlctl
from cvlctl import streams

# the package is found by its file: it may lie where nothing else is to be imported from
_BEGIN = """
import importlib.util, json, sys
sys.path[:], package, parent = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("cvlctl", package)
sys.modules["cvlctl"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["cvlctl"])
from cvlctl import children
children.settle(parent)
"""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def begin(code: str, *arguments: str, more: Mapping[str, str] | None = None, **pipes: Any) -> subprocess.Popen[str]:
    """Start an interpreter that runs `code`, with `arguments` from sys.argv[2] on, and ends with this thread.

    One thread for its numerics: the parallelism is between processes, and their libraries' threads would only fight for
    the CPUs. `more` is added to its environment.
    """
    about = json.dumps([import_path(), cvlctl.__file__, os.getpid()])
    command = [sys.executable, "-P", "-c", _BEGIN + code, about, *arguments]
    environment = os.environ | dict.fromkeys(_THREADS, "1") | dict(more or {})
    return subprocess.Popen(command, env=environment, process_group=0, text=True, stdin=subprocess.PIPE, **pipes)


def import_path() -> list[str]:
    """Where this process imports from, less the current directory by whatever name; the rest by absolute ones."""

    def is_here(path: str) -> bool:
        with suppress(OSError):
            return os.path.samefile(path or ".", ".")
        return False

    return [os.path.abspath(path) for path in sys.path if not is_here(path)]


def settle(parent: int) -> None:
    """In a child, before anything heavy is imported: end with the parent, and keep clear of closed streams."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: also amid an import or a long episode
    if os.getppid() != parent:  # it died before
        os._exit(1)
    streams.secure()


def end(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Kill them, with whatever they have started, and wait until they are gone."""
    for process in processes:
        if process.poll() is None:  # else its number may be another's by now
            with suppress(ProcessLookupError, PermissionError):  # it has ended since; by macOS's name for that
                os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def close(processes: Sequence[subprocess.Popen[str]]) -> None:
    """Close the pipes of children that have ended."""
    for process in processes:
        for pipe in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError, ValueError):  # what was never read
                if pipe is not None:
                    pipe.close()


def take_stdout() -> TextIO:
    """What was stdout, for answers alone; whatever a library prints goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return answers
