"""What people see of long work, on stderr: plain lines, and a bar with rate and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from cvlctl import cell, streams
from cvlctl.terminal import console, visible

PLAIN_LINE_SECONDS = 10.0


def say(line: str) -> None:
    """One plain line for people, on stderr; none where that is closed or full: the work matters more."""
    streams.tell(line)


class Progress:
    """A bar with rate and ETA where stderr is a terminal, else one plain line every ten seconds. A context manager.

    Args:
        what: what is being done, e.g. "pretrain".
        total: number of units; `unit` names them in the rate.
        start: units done before (a resumed run).
        slow: how many of the first units take long, each a program of its own that is compiled: rates count from there.
    """

    def __init__(self, what: str, total: int, unit: str, start: int = 0, slow: int = 1) -> None:
        self.what, self.total, self.unit, self.start = visible(what), total, unit, start
        self._begin = self._said = time.monotonic()
        self._slow = start + slow
        self._first: tuple[int, float] | None = None  # how much was done when these were over, and when
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if streams.is_terminal(sys.stderr):
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
                TextColumn("{task.description}", markup=False), BarColumn(20),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[rate]}"), TimeRemainingColumn(table_column=Column(no_wrap=True)),
                Rest("{task.fields[text]}", markup=False, table_column=Column()),
                console=console(stderr=True), transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.start, rate="", text="")
        return self

    def update(self, done: int, text: str = "") -> None:
        """Report `done` units out of the total."""
        now = time.monotonic()
        if self._first is None and done >= self._slow:
            self._first = done, now
        # what was waited for before, compiling say, is not waited for again
        before, since = self._first if self._first and done > self._first[0] else (self.start, self._begin)
        rate = (done - before) / max(now - since, 1e-9)
        cell.progress(self.what, done, self.total, self.unit, rate)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate=f"{_number(rate)} {self.unit}/s", text=visible(text))
        elif now - self._said >= PLAIN_LINE_SECONDS:
            self._said = now
            say(f"{self.what}: {done}/{self.total} {self.unit}, {_pace(done, self.total, rate)}{text and '  '}{text}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class Screen:
    """Several jobs at once: one table on a terminal; else a line every ten seconds. A context manager.

    Args:
        heading: what the jobs are, in the singular.
        rows: gives name, how far it is in words, and whether it failed, of every job that runs or failed.
        counts: gives a line about all of them.
    """

    def __init__(
        self, heading: str, rows: Callable[[], Sequence[tuple[str, str, bool]]], counts: Callable[[], str]
    ) -> None:
        self._heading, self._rows, self._counts, self._said = heading, rows, counts, time.monotonic()
        self._live: Any = None

    def __enter__(self) -> Self:
        if streams.is_terminal(sys.stderr):
            from rich.live import Live

            self._live = Live(self.table(), console=console(stderr=True), transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str) -> None:
        """A line for people, above the table."""
        if self._live is None:
            say(line)
        else:
            self._live.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def update(self) -> None:
        """Show how far they are."""
        if self._live is not None:
            self._live.update(self.table())
        elif time.monotonic() - self._said >= PLAIN_LINE_SECONDS:
            self._said = time.monotonic()
            say("; ".join([self._counts(), *(f"{name} {words}" for name, words, failed in self._rows() if not failed)]))

    def table(self) -> Any:
        """The jobs that run and those that failed; of the others the number."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=self._counts(), caption_justify="left")
        table.add_column(self._heading, no_wrap=True)
        table.add_column("progress", overflow="ellipsis", no_wrap=True)
        for name, words, failed in self._rows():
            table.add_row(Text(name), Text(words, style="red" if failed else ""))
        return table


def how_far(done: int, total: int, unit: str, rate: float, text: str = "") -> str:
    """ "40% of 6000 updates, 31/s, 1m56s left"."""
    return f"{done / max(total, 1):.0%} of {total} {unit}, {_pace(done, total, rate)}{text and '  '}{text}"


def _pace(done: int, total: int, rate: float) -> str:
    """ "31/s, 1m56s left"."""
    left = f", {clock((total - done) / rate)} left" if rate > 1e-9 else ""
    return f"{_number(rate)}/s{left}"


def _number(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 9.5 or rate == 0 else f"{rate:.1g}"


def clock(seconds: float) -> str:
    """A duration, as 2m03s, or 3h05m."""
    minutes, seconds = divmod(int(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
