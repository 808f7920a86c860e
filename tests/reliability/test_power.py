"""Power that is lost at any moment takes nothing that a command had said was saved; and the same command goes on."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reliability.cases import CASES, Case, lay
from reliability.driver import MOMENTS, Runner, count, described, difference
from reliability.power import KINDS

from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError

FEW = 1  # moments of a case in the default run, each in three ways
NAMES = (
    "build random", "build sac", "build sac over another", "pretrain", "finetune oril", "evaluate", "import npz",
    "merge over another", "split over others", "examples over others", "export npz", "export minari", "plot", "fetch",
)  # fmt: skip


def broken_promises(folder: Path, told: dict[str, Any]) -> list[str]:
    """What was saved and is not there."""
    lines = []
    for name, digests in told["saved"].items():
        file = folder / name
        if not file.is_file():
            lines.append(f"saved and gone: {name}")
        elif hashlib.sha256(file.read_bytes()).hexdigest() not in digests:
            lines.append(f"saved and damaged: {name}, {file.stat().st_size} bytes")
    for name, episodes in told["episodes"].items():
        left = flushed(folder / name)
        if left < episodes:
            lines.append(f"flushed and gone: {left} of {episodes} episodes of {name}")
    return lines


def flushed(store: Path) -> int:
    """Episodes of an unfinished store, or of a finished one; -1 where neither can be read."""
    tail = store.with_name(store.name + ".partial") / "tail.npz"
    try:
        if tail.exists():
            with np.load(tail) as file:
                return len(file["episodes"])
        return open_store(store).num_episodes
    except (CvlctlError, ValueError, OSError):
        return -1


def faults(
    case: Case, runner: Runner, inputs: Path, mirror: str, folder: Path, few: int | None
) -> tuple[int, list[str]]:
    """How many losses of power were tried, and what went wrong."""
    args = case.args.replace("MIRROR", mirror).split()
    lay(case, inputs, folder / "whole")
    result = runner(folder / "whole", *args, how="lose", keep="", at=[])
    assert result["code"] == 0, result["err"]
    expected, every = described(folder / "whole"), range(1, len(result["trace"]))
    at = list(every) if few is None else random.Random(case.args).sample(every, min(few, len(every)))
    (folder / "lost").mkdir()
    lay(case, inputs, folder / "recorded")
    runner(folder / "recorded", *args, how="lose", keep=str(folder / "lost"), at=at)  # and its end, in any case
    lines, seen = [], set()
    for number in sorted(int(path.stem) for path in (folder / "lost").glob("*.json")):
        told = json.loads((folder / "lost" / f"{number}.json").read_text())
        for kind in KINDS:
            state = folder / "lost" / f"{number}-{kind}"
            fingerprint = contents(state)
            if fingerprint in seen:
                continue
            seen.add(fingerprint)
            what = broken_promises(state, told)
            again = runner(state, *args)
            if again["code"] != 0:
                what.append(f"again: exit {again['code']}: {again['err'].strip()[-300:]}")
            elif different := difference(expected, described(state)):
                what.append(different)
            if what:
                lines.append("\n".join([f"--- {kind} at {number} of {every.stop}, {told['what']}:", *what]))
            shutil.rmtree(state)
    return len(seen), lines


def contents(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        total.update(str(path.relative_to(folder)).encode() + b"\0" + (path.read_bytes() if path.is_file() else b"/"))
    return total.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_some_losses_of_power(name: str, runner: Runner, inputs: Path, mirror: str, tmp_path: Path) -> None:
    tried, lines = faults(CASES[name], runner, inputs, mirror, tmp_path, FEW)
    count("losses of power", tried, len(lines))
    assert not lines, "\n".join(lines)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in CASES if name != "run"])  # its cells are processes of their own
def test_every_loss_of_power(name: str, runner: Runner, inputs: Path, mirror: str, tmp_path: Path) -> None:
    tried, lines = faults(CASES[name], runner, inputs, mirror, tmp_path, MOMENTS)
    count("losses of power", tried, len(lines))
    assert not lines, f"{len(lines)} of {tried}\n" + "\n".join(lines)
