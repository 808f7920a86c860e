"""Runs commands in forks of one warm process, each watched at every change of the file system that it is about to make.

    python runner.py INPUTS    requests on standard input, a JSON object a line; one answer a line

The folder INPUTS is filled with what the cases need.

A change is a file opened for writing, a rename, a removal, a folder made or removed, a truncation or a link, anywhere
under the command's current directory. Python's audit hook tells of each just before it happens, so that a process which
ends there leaves what a kill would have left. What C libraries open (HDF5) is not told of: the changes around it are.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import resource
import signal
import sys
import tempfile
import threading
import traceback
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

CRASHED = 86  # exit code of a process that was ended before a change
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# where an event's arguments hold paths, and the folders that these are relative to
PATHS: dict[str, tuple[tuple[int, int], ...]] = {
    "open": ((0, -1),), "os.rename": ((0, 2), (1, 3)), "os.remove": ((0, 1),), "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),), "os.truncate": ((0, -1),), "os.link": ((1, 3),), "os.symlink": ((1, 2),),
}  # fmt: skip


def changed(event: str, args: tuple[Any, ...]) -> list[str]:
    """Absolute paths that an event is about to change; none where it only reads."""
    if event == "open" and (isinstance(args[0], int) or not args[2] & WRITES):
        return []
    found = []
    for at, folder_at in PATHS[event]:
        if isinstance(args[at], int):
            return []
        folder = args[folder_at] if 0 <= folder_at < len(args) else -1
        folder = os.readlink(f"/proc/self/fd/{folder}") if isinstance(folder, int) and folder >= 0 else os.getcwd()
        found.append(os.path.normpath(os.path.join(folder, os.fsdecode(args[at]))))
    return found


class Watch:
    """Counts the changes under `root`, and ends the process ("kill", "torn"), halts it ("stop") or sends it a `number`
    ("signal") before change `at`: the so many-th, or that whose line in the trace ends so.

    "torn" ends it in the middle of the write before: whatever that write made longer is cut to half of what came.
    """

    def __init__(self, root: str, at: int | str, how: str, number: int = signal.SIGINT) -> None:
        self.root, self.at, self.how, self.number = root, at, how, number
        self.trace: list[str] = []
        self._busy, self._lock = threading.local(), threading.Lock()
        self._sizes: dict[str, int] = {}

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in PATHS or getattr(self._busy, "here", False):
            return
        self._busy.here = True
        try:
            paths = changed(event, args)
            if any(path == self.root or path.startswith(self.root + os.sep) for path in paths):
                with self._lock:
                    self._saw(event, args, paths)
        finally:
            self._busy.here = False

    def _saw(self, event: str, args: tuple[Any, ...], paths: list[str]) -> None:
        self.trace.append(" ".join([event, *(os.path.relpath(path, self.root) for path in paths)]))
        if self.how == "torn" and len(self.trace) + 1 == self.at:
            self._sizes = sizes(self.root)
            if event == "open" and ("w" in str(args[1]) or args[2] & os.O_TRUNC):
                self._sizes[paths[0]] = 0
        if len(self.trace) == self.at or (isinstance(self.at, str) and self.trace[-1].endswith(self.at)):
            if self.how in ("stop", "signal"):
                os.kill(os.getpid(), signal.SIGSTOP if self.how == "stop" else self.number)
                return
            # which change is the k-th may differ by one from run to run: what was put in place is not cut
            if self.how == "torn" and self.trace[-2].startswith("open"):
                for path, now in sizes(self.root).items():
                    before = self._sizes.get(path, 0)
                    if now > before:
                        os.truncate(path, before + (now - before) // 2)
            leave(CRASHED, self.trace)


def sizes(root: str) -> dict[str, int]:
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            path = os.path.join(folder, name)
            found[path] = os.lstat(path).st_size
    return found


def leave(code: int, trace: list[str]) -> None:
    """End this fork at once, as a kill does; what it saw goes to the server."""
    os.pwrite(TRACE, json.dumps(trace).encode(), 0)
    os._exit(code)


TRACE = -1  # of a fork: where its trace goes


@cache
def command() -> Any:
    """`cvlctl`: what Typer makes of its functions, made once."""
    from typer.main import get_command

    from cvlctl.cli.app import app

    return get_command(app)


def set_streams(request: dict[str, Any]) -> None:
    """Standard streams as a shell makes them: `closed`, or on a disk that is `full`; by their numbers."""
    for number in request.get("full", ()):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)
    for number in request.get("closed", ()):
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def set_alarm(request: dict[str, Any]) -> None:
    """Let the signal `number` come `after` so many seconds of CPU."""
    signal.signal(signal.SIGPROF, lambda *_: os.kill(os.getpid(), request["number"]))
    signal.setitimer(signal.ITIMER_PROF, request.get("after", 0))


def set_limit(request: dict[str, Any]) -> None:
    """Let only so many more `files` be opened at once."""
    if "files" in request:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        for number in range(3, highest):  # holes would be filled first
            if not os.path.lexists(f"/proc/self/fd/{number}"):
                os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + request["files"], hard))


def work(request: dict[str, Any]) -> None:
    """A fork's life: one command, as `cvlctl.__main__` runs it."""
    from cvlctl import interrupts, streams
    from cvlctl.cli.console import execute

    os.chdir(request["cwd"])
    for name, value in request.get("set", {}).items():  # "module:name" -> value
        module, attribute = name.split(":")
        setattr(import_module(module), attribute, value)
    root = os.path.realpath(request["cwd"])
    watch: Any = None
    if request.get("how") == "lose":
        from reliability.power import Disk

        watch = Disk(root, request["keep"], request["at"])
    else:
        watch = Watch(root, request.get("at", 0), request.get("how", "kill"), request.get("number", signal.SIGINT))
    sys.addaudithook(watch)
    try:
        set_streams(request)
        set_limit(request)
        streams.secure()
        with interrupts.watched(program=True):
            set_alarm(request)
            code = execute(command(), request["args"])
            signal.setitimer(signal.ITIMER_PROF, 0)
        streams.let_go(sys.stdout)
        if request.get("how") == "lose":
            watch.at.add(len(watch.trace) + 1)
            watch.moment("its end")
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stderr.flush()
    leave(code, watch.trace)


class Server:
    """Answers requests: "run" waits for the end or the halt of a fork, "go on" wakes a halted one and waits again."""

    def __init__(self) -> None:
        self.forks: dict[int, list[Any]] = {}  # pid -> files of its trace, stdout and stderr

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "pid" in request:
            os.kill(request["pid"], signal.SIGCONT)
            return self.wait(request["pid"])
        return self.wait(self.start(request))

    def start(self, request: dict[str, Any]) -> int:
        global TRACE
        files = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115 (closed by `wait`)
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(files[1].fileno(), 1)
                os.dup2(files[2].fileno(), 2)
                TRACE = files[0].fileno()
                work(request)
            finally:
                traceback.print_exc()
                os._exit(70)
        self.forks[pid] = files
        return pid

    def wait(self, pid: int) -> dict[str, Any]:
        _, status, used = os.wait4(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            return {"pid": pid}
        texts = []
        for file in self.forks.pop(pid):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        trace = json.loads(texts[0] or "[]")
        cpu = round(used.ru_utime + used.ru_stime, 3)
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "trace": trace, "out": texts[1], "err": texts[2], "cpu": cpu}


def warm(folder: Path) -> None:
    """Import everything, and make the cases' inputs: caches fill that every fork would fill anew."""
    from reliability.cases import make_inputs

    import cvlctl
    from cvlctl.cli.console import execute

    for module in pkgutil.walk_packages(cvlctl.__path__, "cvlctl."):
        if not module.name.endswith(("__main__", "envpool")):
            import_module(module.name)
    here = Path.cwd()
    os.chdir(folder)
    make_inputs(folder, lambda args: execute(command(), args))
    os.chdir(here)


def draw(figure: Any, target: Any, **_: Any) -> None:
    """In place of drawing, which takes longer than all the rest: pictures are files like others here."""
    (target.write if hasattr(target, "write") else Path(target).write_bytes)(b"a picture, in some bytes")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import matplotlib.figure
    import torch

    torch.set_num_threads(1)
    matplotlib.figure.Figure.savefig = draw  # type: ignore[method-assign]
    os.fsync = lambda handle: None  # a kill loses nothing of what was written; power.py is for what does
    warm(Path(sys.argv[1]))
    gc.collect()
    gc.freeze()  # else every fork's first collection copies all of it
    server = Server()
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
