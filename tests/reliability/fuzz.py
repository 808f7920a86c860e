"""Hostile files by the thousand: sound ones are damaged, used, and must end in success or a CvlctlError, nothing else.

    python tests/reliability/fuzz.py KIND FIRST COUNT ...    cases of one kind, by seed, and of the next
    python tests/reliability/fuzz.py corpus/NAME.json        one case again, from its description

A case is a kind of `fuzz_kinds.py`, a use of it, and a list of operations of `damage.py`, plain data: what fails is
printed as such, and belongs into `corpus/` with the name of what was wrong. Cases run in a process of their own, for
what C libraries do to damaged files cannot be caught from inside: with an address space, a size of files and a deadline
for each case.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from reliability.damage import Op

HERE = Path(__file__).parent
CORPUS = sorted((HERE / "corpus").glob("*.json"))
MEMORY = Path("/dev/shm")  # files there are no load on a disk
CPU_SECONDS, SECONDS = 20, 200  # of a case; the second for what waits for ever, on a machine with much else to do
ADDRESS_SPACE = 6 * 2**30  # of which torch takes two
FILE_SIZE = 2**27
GROWTH_MB = 200  # of the process's memory, beyond what one sound case of each use took
SAID = 4_000  # characters of an error and its hint; 500 of what was wrong, and paths
PRINTED = 100_000  # characters that a command prints
HARMLESS = re.compile("[\t\n\x20-\x7e\xa0-\u200d\u2010-\u2027\u202f-\u2065\u206a-\ud7ff\ue000-\U0010ffff]*")

DRAWN = 8  # one case of so many draws its pictures: they are most of the time, and nothing of what is tried


class Kind(NamedTuple):
    """One sort of input."""

    make: Callable[[Path], None]  # sound ones, in a fresh folder, once
    damage: Callable[[str, random.Random], list[Op]]  # what to do to a copy of them, which lies here, before a use
    uses: dict[str, Callable[[], int | None]]  # in the folder; returns a command's exit code, or raises
    refused: float = 0.25  # at least that share must be noticed: else the cases are no test


# -------------------------------------------------------------------------------------------------------------- cases


class Printed(io.StringIO):
    """What a command prints, up to a limit."""

    def write(self, words: str) -> int:
        if self.tell() + len(words) > PRINTED:
            raise AssertionError(f"more than {PRINTED:,} characters were printed: {words[:200]}")
        return super().write(words)


def command(*args: str) -> int:
    """`cvlctl ARGS` in this process; its exit code."""
    from reliability.runner import command as cvlctl

    from cvlctl.cli.console import execute

    return execute(cvlctl(), args)


def attempt(use: Callable[[], int | None]) -> tuple[str, str]:
    """Use what lies in the current directory: "done" or "refused", and what was said; AssertionError if neither."""
    from cvlctl.errors import CvlctlError

    printed, code, said = Printed(), None, ""
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = use()
        except CvlctlError as error:
            code, said = 2, f"{error.what}\n{error.hint}"
    out = printed.getvalue()
    assert code in (None, 0, 1, 2), f"exit code {code}\n{out}"
    assert "Traceback" not in out and "out of memory" not in out, out
    for_people = [] if out.startswith(("{", "[")) else out.split("\n")  # --json says whole what is there
    assert len(said) <= SAID and all(len(line) <= SAID for line in for_people), f"a long text: {said}{out}"
    assert HARMLESS.fullmatch(out), f"control characters: {out!r}"
    return "refused" if code else "done", said + out


def memory_mb() -> int:
    """The most memory that this process has held; getrusage would count what its parent held when it forked."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


def drawing(whether: bool) -> Any:
    """A context in which figures are drawn when they are saved; or else files without content stand for them."""
    return contextlib.nullcontext() if whether else mock.patch("matplotlib.figure.Figure.savefig")


def run(name: str, cases: Callable[[Kind], Any]) -> dict[str, int]:
    """Run cases (label, use, what makes the operations, drawn) of a kind; what fails is said on stderr."""
    from reliability.damage import apply
    from reliability.fuzz_kinds import KINDS

    kind, outcomes = KINDS[name], {"done": 0, "refused": 0, "failed": 0}
    with tempfile.TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as place:
        sound, here = Path(place, "sound"), Path(place, "case")
        sound.mkdir()
        os.chdir(sound)
        with drawing(False), contextlib.redirect_stdout(sys.stderr):
            kind.make(sound)
            for use_name, use in kind.uses.items():
                fresh(sound, here)
                outcome, said = attempt(use)
                assert outcome == "done", f"{name}, {use_name}, undamaged: {said}"
        before = memory_mb()
        for label, use_name, ops_of, drawn in cases(kind):
            fresh(sound, here)
            ops = ops_of()
            case = json.dumps({"kind": name, "use": use_name, "ops": ops})
            print(f"{label}: {case[:2000]}", file=sys.stderr)  # the last line tells which it was that hung or crashed
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                apply(ops)
                with drawing(drawn):
                    outcomes[attempt(kind.uses[use_name])[0]] += 1
            except Exception:
                outcomes["failed"] += 1
                print(f"FAILED {label}: {traceback.format_exc()}{case}", file=sys.stderr)
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_PROF, 0)
        os.chdir("/")
    return outcomes | {"grown_mb": memory_mb() - before}


def fresh(sound: Path, here: Path) -> None:
    """A copy of the sound files as the current directory."""
    os.chdir("/")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(sound, here, symlinks=True)
    os.chdir(here)


def by_seed(name: str, first: int, count: int) -> dict[str, int]:
    """What once failed of this kind, and `count` new cases."""

    def cases(kind: Kind) -> Any:
        yield from described(name, kind, CORPUS)
        for seed in range(first, first + count):
            rng = random.Random(f"{name} {seed}")
            use = rng.choice(list(kind.uses))
            yield f"{name} {seed}", use, lambda use=use, rng=rng: kind.damage(use, rng), seed % DRAWN == 0

    return run(name, cases)


def read_case(file: Path) -> dict[str, Any]:
    case: dict[str, Any] = json.loads(file.read_text())
    return case


def described(name: str, kind: Kind, files: Iterable[Path]) -> Iterator[Any]:
    """The cases of a kind in JSON files; of every use where they name none."""
    for file in files:
        case = read_case(file)
        if case["kind"] == name:
            for use in [case["use"]] if "use" in case else kind.uses:
                yield file.name, use, lambda case=case: case["ops"], True


def by_description(file: Path) -> dict[str, int]:
    name = read_case(file)["kind"]
    return run(name, lambda kind: described(name, kind, [file]))


def check(counts: dict[str, int], first: int) -> dict[str, dict[str, int]]:
    """Run this file for cases of several kinds; what it found of each, or AssertionError with what it said."""
    line = [sys.executable, __file__, *(str(word) for kind, count in counts.items() for word in (kind, first, count))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, errors="replace")
    said = done.stderr[done.stderr.find("FAILED") :][:6000]
    assert done.returncode == 0, f"exit {done.returncode} of {' '.join(line[1:])}\n{said}"
    found = dict(zip(counts, map(json.loads, done.stdout.splitlines()), strict=True))
    assert not any(one["failed"] for one in found.values()), said
    assert all(one["grown_mb"] < GROWTH_MB for one in found.values()), found
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    os.fsync = lambda handle: None  # no power is lost here
    faulthandler.register(signal.SIGPROF, chain=True)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    if len(sys.argv) == 2:
        print(json.dumps(by_description(Path(sys.argv[1]).absolute())))
    for kind, first, count in zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=False):
        print(json.dumps(by_seed(kind, int(first), int(count))), flush=True)
