"""A run's directory, and what people see while it works.

<out>/run.json              what it is, of which inputs, how it computes, and how far it is
<out>/recipe.yaml           the resolved recipe
<out>/metrics.jsonl         one line every `log_every_steps` updates; metrics.png once finished
<out>/checkpoints/          last.safetensors, and step-000005000.safetensors where asked for
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml

from cvlctl.errors import CvlctlError
from cvlctl.files import entries, lock, write_atomically, write_json
from cvlctl.version import versions

PLAIN_LINE_SECONDS = 10.0


def say(line: str) -> None:
    """One plain line for people, on stderr."""
    print(line, file=sys.stderr, flush=True)


LABELS_FILE = "labels.safetensors"  # in a run: rewards that it learned


class Run:
    """One run directory, held by one process at a time.

    Args:
        out: the directory.
        recipe: the resolved recipe, as plain data.
        inputs: digest of every input by name: with the recipe, what makes two runs the same.
        refill: fills defaults of keys that have come since into the recipe of a run that an earlier version started.
    """

    def __init__(
        self,
        out: Path,
        recipe: dict[str, Any],
        inputs: dict[str, str],
        refill: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.out, self.recipe, self.inputs, self._refill = out, recipe, inputs, refill
        self.checkpoints = out / "checkpoints"
        self._lock: TextIO | None = None

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    def open(self, *, force: bool = False) -> str:
        """Take the directory. Returns "fresh", "resume" or "finished".

        Another recipe than that of a run without any checkpoint yet just starts: there is nothing to lose.

        Args:
            force: start a run over that is there: what runs write is deleted, and nothing else.

        Raises:
            CvlctlError: where another recipe, other inputs or another process has it, or it is no run's (also with
                `force`: what is in it may be anything).
        """
        is_run = (self.out / "run.json").exists()
        if not is_run and set(entries(self.out)) - {".lock"}:
            raise CvlctlError(f"{self.out} is not empty and not a run", "choose another out: nothing in it was touched")
        before = read_run(self.out) if is_run and not force else None
        if before is not None and (before["status"] == "finished" or self._has_checkpoints()):
            # a directory that was moved or copied is still the same run
            then, now = ({**recipe, "out": None} for recipe in (self._refill(before.get("recipe", {})), self.recipe))
            changed = _difference(then, now) or _difference(before["inputs"], self.inputs)
            if changed:
                raise CvlctlError(
                    f"{self.out} holds another run: {changed}", "choose another out, or --force to start it over"
                )
        self._lock = lock(self.out / ".lock")
        if is_run and force:
            self._clear()
        if before is not None and before["status"] == "finished":
            self.close()
            return "finished"
        if before is not None and self.last.exists():
            return "resume"
        self._write("started", {})
        write_atomically(self.out / "recipe.yaml", yaml.safe_dump(self.recipe, sort_keys=False).encode())
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        return "fresh"

    def _has_checkpoints(self) -> bool:
        return any(self.checkpoints.glob("*.safetensors"))

    def _clear(self) -> None:
        # first of all it becomes a run like no other: a kill in here leaves nothing that could be taken for ours
        write_json(self.out / "run.json", {"status": "replaced", "inputs": {}, "recipe": {}})
        for file in [*self.checkpoints.glob("*.safetensors"), self.out / "metrics.jsonl", self.out / "metrics.png"]:
            file.unlink(missing_ok=True)

    def _write(self, status: str, more: dict[str, Any]) -> None:
        record = {"status": status, **more, "inputs": self.inputs, "versions": versions(), "recipe": self.recipe}
        write_json(self.out / "run.json", record)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def cut_metrics(self, step: int) -> None:
        """On resume: drop the lines logged after the checkpoint, which are about to be logged again."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(self.out) if line["step"] <= step]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def finish(self, **more: Any) -> None:
        """Mark the run as finished: the last thing that it writes."""
        self._write("finished", more)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def read_run(out: Path) -> dict[str, Any]:
    """The record in <out>/run.json."""
    path = out / "run.json"
    try:
        record = json.loads(path.read_text())
        record["status"], record["inputs"]
    except FileNotFoundError as error:
        raise CvlctlError(f"{out} is not a run: it has no run.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CvlctlError(f"{path}: damaged: {error}", "--force starts the run over") from error
    return record


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    lines = []
    for line in (out / "metrics.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _difference(before: Any, now: Any, key: str = "") -> str:
    """The first difference between two pieces of plain data, in words; "" where there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(n for n in now if n not in before)]:
            found = _difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return ""
    return "" if before == now else f"{key} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


class Progress:
    """A bar with rate and ETA where stderr is a terminal, else one plain line every ten seconds. A context manager.

    Args:
        what: what is being done, e.g. "pretrain".
        total: number of units; `unit` names them in the rate.
        start: units done before (a resumed run).
    """

    def __init__(self, what: str, total: int, unit: str, start: int = 0) -> None:
        self.what, self.total, self.unit, self.start = what, total, unit, start
        self._begin = self._said = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Task, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress
            from rich.table import Column
            from rich.text import Text

            class Rest(TextColumn):
                """Text that gets the room that is left: cut short, never wrapped."""

                def render(self, task: Task) -> Text:
                    text = super().render(task)
                    text.no_wrap, text.overflow = True, "ellipsis"
                    return text

            # on a narrow terminal the bar and the text shrink: count, rate and time left are what people look for
            self._bar = RichProgress(
                TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(table_column=Column(no_wrap=True)),
                Rest("{task.fields[text]}", markup=False, table_column=Column()),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.start, rate="", text="")
        return self

    def update(self, done: int, text: str = "") -> None:
        """Report `done` units out of the total."""
        now = time.monotonic()
        rate = (done - self.start) / max(now - self._begin, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{rate:.0f} {self.unit}/s", text=text)
        elif now - self._said >= PLAIN_LINE_SECONDS:
            self._said = now
            left = (self.total - done) / max(rate, 1e-9)
            say(f"{self.what}: {done}/{self.total} {self.unit}, {rate:.0f}/s, {clock(left)} left{text and '  '}{text}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def clock(seconds: float) -> str:
    """A duration, as 2m03s."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
