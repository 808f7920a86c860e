"""`cvlctl build-dataset` of several tasks at once: a process a task, one table of how far they are.

Each process is a plain interpreter that builds one store as the command alone would, so that a killed build resumes,
and a task that fails, whatever way, leaves the others alone. It says how far it is in JSON lines on its standard
output; what it has to say to people goes to standard error and is passed on, under the task's name. It lives in a
process group of its own: Ctrl-C reaches the parent alone, which sends SIGTERM, and waits until each has saved what it
has; it ends with its standard input too, so also where the parent was killed.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from cvlctl import children
from cvlctl.collect.build import build, finished
from cvlctl.collect.recipe import BuildManyRecipe, BuildRecipe
from cvlctl.errors import CvlctlError
from cvlctl.interrupts import interruptible, watched
from cvlctl.machine import num_cpus
from cvlctl.progress import Progress, Screen, clock, how_far, say

if TYPE_CHECKING:
    from rich.console import Console

_COMMAND = "from cvlctl.collect import build_many as b; b.serve()"
_REPORT_SECONDS = 0.5
_STOP_SECONDS = 60.0  # that workers have to save what they have: a compiler or a slow disk may be in between

Event = tuple["_Job", str, Any]  # "message" with a JSON object, "line" with text, "closed" as a stream ends


@dataclass
class _Job:
    """One task: waiting, running, or with its result."""

    recipe: BuildRecipe
    result: dict[str, Any] | None = None
    process: subprocess.Popen[str] | None = None
    begin: float = 0.0
    progress: dict[str, Any] = field(default_factory=dict)  # what, total, unit, start, since, done, text
    last_line: str = ""
    open_streams: int = 2

    @property
    def task(self) -> str:
        return self.recipe.task

    @property
    def running(self) -> bool:
        return self.process is not None and self.result is None

    @property
    def failed(self) -> bool:
        return self.result is not None and self.result["status"] == "failed"

    def rate(self) -> float:
        """Units a second since its process began to count."""
        told = self.progress
        seconds = time.monotonic() - told["since"] if told else 0.0
        return (told["done"] - told["start"]) / seconds if seconds > 0 else 0.0

    def fail(self, what: str, hint: str) -> None:
        self.result = {"status": "failed", "path": str(self.recipe.out), "error": what, "hint": hint}


def build_many(recipe: BuildManyRecipe, *, force: bool = False) -> list[dict[str, Any]]:
    """Build every task's store, so many at a time as `recipe.processes` says.

    Returns:
        For each task in order: its name, and the summary of `build_dataset.build`, or status "failed", path, error and
        hint.
    """
    jobs = [_Job(one) for one in recipe.recipes]
    count = recipe.processes if recipe.processes != "auto" else num_cpus()
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    try:
        with interruptible() as interrupted, _Screen(jobs) as screen:
            for job in jobs:
                if not force and job.recipe.out.exists():  # no process is needed to see that it is finished
                    _settle(job)
            while any(job.result is None for job in jobs):
                if interrupted():
                    _stop([job for job in jobs if job.running], events, screen)
                    raise KeyboardInterrupt
                running = [job for job in jobs if job.running]
                for job in [job for job in jobs if job.process is None and job.result is None][: count - len(running)]:
                    _start(job, force, max(1, num_cpus() // count), events)
                with suppress(queue.Empty):
                    _handle(*events.get(timeout=_REPORT_SECONDS), screen)
                screen.update()
    except KeyboardInterrupt:
        say("stopped; the same command goes on where each task was saved last")
        raise
    finally:
        begun = [job.process for job in jobs if job.process is not None]
        children.end(begun)
        children.close(begun)
    return [{"task": job.task} | (job.result or {}) for job in jobs]


def _settle(job: _Job) -> None:
    try:
        job.result = finished(job.recipe)
    except CvlctlError as error:
        job.fail(error.what, error.hint)


def _start(job: _Job, force: bool, workers: int, events: queue.SimpleQueue[Event]) -> None:
    job.process = children.begin(_COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace")
    job.begin = time.monotonic()
    assert job.process.stdin and job.process.stdout and job.process.stderr
    for stream, kind in ((job.process.stdout, "message"), (job.process.stderr, "line")):
        threading.Thread(target=_read, args=(job, stream, kind, events), daemon=True).start()
    request = {"recipe": job.recipe.resolved(), "force": force, "workers": workers}
    with suppress(OSError):  # it died at once: its streams tell
        job.process.stdin.write(json.dumps(request) + "\n")
        job.process.stdin.flush()


def _read(job: _Job, stream: IO[str], kind: str, events: queue.SimpleQueue[Event]) -> None:
    with suppress(ValueError, OSError):  # closed as the build was stopped
        for line in stream:
            events.put((job, kind, line.rstrip()))
    events.put((job, "closed", None))


def _handle(job: _Job, kind: str, content: Any, screen: _Screen) -> None:
    if kind == "line":
        job.last_line = content or job.last_line
        screen.say(f"{job.task}: {content}")
    elif kind == "message":
        message = _message(content)
        if "result" in message:
            job.result = message["result"]
        elif "error" in message:
            job.fail(*message["error"])
        elif "total" in message:
            job.progress = message | {"since": time.monotonic(), "done": message["start"], "text": ""}
        else:
            job.progress |= message
    else:
        job.open_streams -= 1
        if job.open_streams == 0 and job.result is None:
            job.fail(
                f"its process died: {job.last_line or 'without a word'}",
                "build this task alone to see more (task=... on the command line); memory may be short: processes=1",
            )
    if job.result is not None and kind != "line":
        screen.settled(job)


def _message(line: str) -> dict[str, Any]:
    """A worker's message; nothing where it died amid one."""
    with suppress(ValueError):
        return dict(json.loads(line))
    return {}


def _stop(running: Sequence[_Job], events: queue.SimpleQueue[Event], screen: _Screen) -> None:
    """Let the workers save what they have, and pass on what they say of it."""
    screen.say(f"stopping: {len(running)} tasks save what they have (once more stops them at once)")
    processes = [job.process for job in running if job.process is not None]
    for process in processes:
        process.terminate()
    until = time.monotonic() + _STOP_SECONDS
    while time.monotonic() < until:
        try:
            job, kind, content = events.get(timeout=_REPORT_SECONDS)
        except queue.Empty:
            if all(process.poll() is not None for process in processes):
                return
            continue
        if kind == "line":
            screen.say(f"{job.task}: {content}")


# --- what people see


class _Screen(Screen):
    """How far the tasks are, and a line as one ends."""

    def __init__(self, jobs: Sequence[_Job]) -> None:
        def rows() -> list[tuple[str, str, bool]]:
            return [(job.task, _in_words(job), not job.running) for job in jobs if job.running or job.failed]

        super().__init__("task", rows, lambda: _counts(jobs))
        self._told: set[str] = set()

    def settled(self, job: _Job) -> None:
        """Say once that a task has its result."""
        if job.task not in self._told:
            self._told.add(job.task)
            self.say(f"{job.task}: {_in_words(job)}")


def _counts(jobs: Sequence[_Job]) -> str:
    results = [job.result["status"] for job in jobs if job.result]
    failed = f", {results.count('failed')} failed" if "failed" in results else ""
    waiting = sum(job.result is None and job.process is None for job in jobs)
    return f"{len(results)} of {len(jobs)} tasks done{failed}" + (f", {waiting} waiting" if waiting else "")


def _in_words(job: _Job) -> str:
    """How far a task is, or what came of it."""
    if job.result is not None:
        if job.result["status"] == "failed":
            return f"failed: {job.result['error']}"
        seconds = f" in {clock(time.monotonic() - job.begin)}" if job.process else ""
        return f"{job.result['status']}{seconds}, {_scores(job.result)}"
    told = job.progress
    if not told:
        return "starting"
    return how_far(told["done"], told["total"], told["unit"], job.rate(), told["text"])


def _scores(result: dict[str, Any]) -> str:
    success = "" if result["success_rate"] is None else f", success {result['success_rate']:.0%}"
    return f"return {result['return_mean']:.4g}{success}"


def render(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what became of every task."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("task", "store", "status"):
        table.add_column(heading, overflow="fold")
    for heading in ("episodes", "transitions", "return", "success", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in results:
        cells = [one["task"], one["path"], one["status"]]
        if one["status"] != "failed":
            success = "" if one["success_rate"] is None else f"{one['success_rate']:.0%}"
            numbers = (f"{one['episodes']:,}", f"{one['transitions']:,}", f"{one['return_mean']:.4g}")
            cells += [*numbers, success, f"{one['seconds']:.0f}"]
        table.add_row(*map(Text, cells))
    console.print(table)
    for one in results:
        if one["status"] == "failed":
            console.print(f"{one['task']} failed: {one['error']}", markup=False, soft_wrap=True)
            if one["hint"]:
                console.print(f"  hint: {one['hint']}", markup=False, soft_wrap=True)


# --- in a worker


class _Reported(Progress):
    """Progress as JSON lines, at most two a second."""

    def __enter__(self) -> _Reported:
        _tell({"what": self.what, "total": self.total, "unit": self.unit, "start": self.start})
        return self

    def update(self, done: int, text: str = "") -> None:
        now = time.monotonic()
        if now - self._said >= _REPORT_SECONDS:
            self._said = now
            _tell({"done": done, "text": text})


def _tell(message: dict[str, Any]) -> None:
    try:
        _answers.write(json.dumps(message) + "\n")
        _answers.flush()
    except OSError:
        os._exit(1)  # the parent was killed; without a word, for its shell's sake


_answers: IO[str] = sys.stdout


def serve() -> None:
    """A worker's life: one recipe on standard input, then its progress and its result on what was standard output."""
    global _answers
    _answers = children.take_stdout()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    recipe = BuildRecipe.model_validate(request["recipe"])
    try:
        with watched(program=True):
            result = build(recipe, force=request["force"], progress=_Reported, workers=request["workers"])
    except KeyboardInterrupt:  # SIGTERM of the parent's, by now everything is saved
        sys.exit(130)
    except CvlctlError as error:
        _tell({"error": [error.what, error.hint]})
    except OSError as error:
        _tell({"error": [f"{error.filename or recipe.out}: {error.strerror or error}", ""]})
    else:
        _tell({"result": result})


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)
