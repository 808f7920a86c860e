"""What the tests of this folder share: the warm process that runs commands, and folders described for comparison."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines.start import LOG
from cvlctl.files import read_json

HERE = Path(__file__).parent
# true of one run alone
PASSING = ("created", "versions", "platform", "git_commit", "seconds", "updates_per_second", "pid", "began", "ended",
           "progress")  # fmt: skip


class Runner:
    """`runner.py` in a process of its own: commands in forks of it. It fills the folder `inputs`."""

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "runner.py"), str(inputs)], env=environment, **pipes
        )
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def __call__(self, cwd: Path, *args: str, **more: Any) -> dict[str, Any]:
        """Run `cvlctl ARGS` in `cwd`: {"code", "trace", "out", "err"}, or {"pid"} where it was halted."""
        return self.ask({"cwd": str(cwd), "args": list(args), **more})

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def described(folder: Path) -> dict[str, Any]:
    """Everything under a folder by its relative path, in what two runs of the same commands have in common."""
    found: dict[str, Any] = {}
    pending = [folder]
    while pending:
        here = pending.pop()
        for path in sorted(here.iterdir()):
            name = str(path.relative_to(folder))
            if path.is_symlink():
                found[name] = os.readlink(path)
            elif not path.is_dir():
                found[name] = _file(path)
            elif (attributes := (read_json(path / "zarr.json") or {}).get("attributes", {})).get("checksums"):
                try:
                    found[name] = _store(path, attributes)
                except CvlctlError:  # what was replaced, and is half removed
                    found[name] = "a store in part"
            else:
                found[name + "/"] = "folder"
                pending.append(path)
    return found


def _store(path: Path, attributes: dict[str, Any]) -> Any:
    """A store: its digests, its attributes, what it is made of, and what is wrong with it."""
    store = open_store(path)
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*"))
    labels = {label: store.label_digest(label) for label in store.labels}
    return [store.digest(), labels, lasting(attributes), names, verify_store(path)]


def _file(path: Path) -> Any:
    if path.suffix == ".json":
        with contextlib.suppress(ValueError):  # damaged: its bytes tell
            return lasting(json.loads(path.read_text()))
    if path.name == LOG:
        return "a log"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lasting(value: Any) -> Any:
    """Plain data without what is true of one run alone."""
    if isinstance(value, dict):
        return {key: lasting(one) for key, one in value.items() if key not in PASSING}
    return [lasting(one) for one in value] if isinstance(value, list) else value


def difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """What two described folders differ in, in words; "" where in nothing."""
    lines = [f"missing: {name}" for name in expected if name not in found]
    lines += [f"left over: {name}" for name in found if name not in expected]
    for name, value in expected.items():
        if name in found and found[name] != value:
            lines.append(f"{name}: {_first(value, found[name])}")
    return "\n".join(lines)


def _first(a: Any, b: Any, at: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first(a.get(key), b.get(key), f"{at}.{key}")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x != y:
                return _first(x, y, f"{at}[{i}]")
    return f"{at} was {str(a)[:200]}, is {str(b)[:200]}"


# moments of a case in a soak of power and of two at once: SOAK_MOMENTS=20 make soak; else all
MOMENTS = int(os.environ.get("SOAK_MOMENTS", "0")) or None
COUNTS: dict[str, tuple[int, int]] = {}  # of what was tried: how often, and how often it failed


def count(what: str, tried: int, failed: int) -> None:
    before = COUNTS.get(what, (0, 0))
    COUNTS[what] = (before[0] + tried, before[1] + failed)
