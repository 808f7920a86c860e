"""How any engine starts a cell: one of the four commands, on a file with its resolved recipe; and what came of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cvlctl import cell as own
from cvlctl import children
from cvlctl.errors import CvlctlError
from cvlctl.experiments.graph import Cell, folder_of
from cvlctl.files import disk, is_running, open_regular, read_json, write_atomically

LOG = "log.txt"
_CODE = "import sys; sys.argv[1:2] = []; from cvlctl.__main__ import main; main()"
_LAST_LINES = 15
_TAIL = 8_000  # bytes that hold them


def write_recipe(out: Path, cell: Cell) -> Path:
    """The cell's resolved recipe as a file, named by its content: what runs or waits elsewhere keeps its own.

    JSON, which is YAML that leaves nothing to be guessed.
    """
    text = json.dumps(cell.job.recipe.resolved(), indent=1)
    head = f"# cvlctl {cell.job.command}: {cell.name}, of the experiment at {out}\n".encode("utf-8", "replace")
    path = folder_of(out, cell.name) / f"recipe-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    if not path.exists():
        write_atomically(path, head, text.encode() + b"\n")
    return path


def arguments(cell: Cell, recipe: Path) -> list[str]:
    """Of `cvlctl`: its command line."""
    options = {"--unfinished": cell.unfinished, "--force": cell.force}
    return [cell.job.command, str(recipe), *(option for option, wanted in options.items() if wanted)]


def begin(folder: Path, line: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start `cvlctl` with a command line, as the cell of a folder; what it says goes into the log there.

    Raises:
        CvlctlError: the disk, or the machine, has no room for it.
    """
    with disk(folder / LOG):
        log = open(folder / LOG, "a")  # noqa: SIM115 (closed just below)
    with log:
        more = {own.FOLDER: str(folder), **environment}
        try:
            return children.begin(_CODE, *line, stdout=log, stderr=subprocess.STDOUT, more=more)
        except OSError as error:
            raise CvlctlError(f"cannot start a process: {error.strerror}", "fewer processes at once") from error


def outcome(folder: Path, code: int, peak: int | None = None, pid: int | None = None) -> dict[str, Any]:
    """What came of a cell whose process has ended: state ("done", "failed", "held" or "stopped"), and error and hint.

    Args:
        code: its exit code; below 0: the signal that killed it.
        peak: bytes of memory that it took at most, where that is known.
        pid: of its process, where that is known: what an earlier one said of itself is then not taken for its word.
    """
    states = {0: "done", own.HELD: "held", 130: "stopped"}
    told = state_in(folder)
    if pid is not None and told.get("pid") != pid:
        told = {}
    if code in states:
        return {**told, "state": states[code], "code": code}
    if code < 0 or code > 128:  # it could not say anything any more
        number = -code if code < 0 else code - 128
        own.write(folder, told := {**told, "state": "failed", "code": code, "error": _killed(number, peak)})
    what, hint = told.get("error") or [last_lines(folder, 1) or "it died without a word", ""]
    return {**told, "state": "failed", "code": code, "error": [what, hint]}


def state_in(folder: Path) -> dict[str, Any]:
    """What a cell said last of itself, as far as it makes sense; nothing where it never ran."""
    told = read_json(folder / own.STATE) or {}
    return {name: value for name, value in told.items() if name not in _LEGAL or _LEGAL[name](value)}


def is_at_work(folder: Path, told: Mapping[str, Any], now: float) -> bool:
    """Whether the process that said this last of a cell is at it still. Nothing is locked to find out: whoever looks is
    never in the way of one that begins.

    Args:
        now: by the clock of the file system that the folder is on.
    """
    if told.get("state") != "running" or (told.get("host") == platform.node() and not is_running(told.get("pid", 0))):
        return False
    with suppress(OSError):
        return abs(now - (folder / own.STATE).stat().st_mtime) < own.SILENT_SECONDS
    return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -1e15 < value < 1e15  # of which NaN is none


def _is_progress(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("unit"), str) and all(
        _is_number(value.get(name)) for name in ("done", "total", "rate"))  # fmt: skip


_LEGAL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("state", "host", "engine", "job"), lambda value: isinstance(value, str)),
    **dict.fromkeys(("began", "ended"), _is_number),
    "pid": lambda value: type(value) is int and value > 0,
    "error": lambda value: isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value),
    "progress": _is_progress,
}


def tail(path: Path, most: int) -> str:
    """The end of a log, `most` bytes of it.

    Raises:
        OSError: there is none.
    """
    with open_regular(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most).decode(errors="replace")


def end_of(path: Path) -> str:
    """The last lines of a log; nothing where there is none."""
    with suppress(OSError):
        return tail(path, _TAIL)
    return ""


def last_lines(folder: Path, number: int = _LAST_LINES) -> str:
    """The last lines of a cell's log; none where there is none."""
    return "\n".join(end_of(folder / LOG).rstrip().splitlines()[-number:])


def _killed(number: int, peak: int | None) -> list[str]:
    name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    took = f"; it had taken {peak / 2**30:.1f} GiB" if peak else ""
    if number == signal.SIGKILL:
        hint = "where memory is short: fewer processes at once, or a lower memory_gb; it goes on where it was saved"
        return [f"killed ({name}), most likely because memory ran out{took}", hint]
    return [f"killed by {name}{took}", "the same command goes on where it was saved last"]
