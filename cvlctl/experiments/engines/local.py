"""`engine: local`: cells as processes of this machine, as many at once as its CPUs and GPUs are enough for."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvlctl import cell as own
from cvlctl import children
from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines.start import arguments, begin, is_at_work, outcome, state_in, write_recipe
from cvlctl.experiments.engines.waiting import (
    HELD_SECONDS,
    POLL_SECONDS,
    STOP_SECONDS,
    Settled,
    Told,
    cpus_of,
    poll,
    run_all,
)
from cvlctl.experiments.graph import Cell, folder_of
from cvlctl.experiments.plan import state_of
from cvlctl.experiments.recipe import LocalSettings
from cvlctl.files import now_at
from cvlctl.interrupts import interruptible
from cvlctl.machine import num_cpus


@dataclass
class _Running:
    """A cell under way."""

    cell: Cell
    process: subprocess.Popen[str]
    cpus: int
    gpu: int  # -1: none
    began: float  # by the clock of this machine


def run(
    out: Path,
    cells: Sequence[Cell],
    settings: LocalSettings,
    *,
    fail_fast: bool,
    settled: Settled,
    look: Callable[[], None],
) -> None:
    """Run `cells`, each as soon as those that it needs are done and there is room; all of them come to an end.

    Args:
        cells: in order; what they need and is not among them is done.
        settled, look: as `run_all` says.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM, once every cell has saved what it has.
    """
    pool = _Pool(out, cells, settings)
    with interruptible() as interrupted:
        try:
            run_all(pool, interrupted, fail_fast=fail_fast, settled=settled, look=look)
        finally:
            pool.end()


class _Pool:
    """The cells that wait, those that run, and what there is to give to them."""

    def __init__(self, out: Path, cells: Sequence[Cell], settings: LocalSettings) -> None:
        self.out = out
        self.waiting, self.running = list(cells), list[_Running]()
        self._unsettled = {cell.name for cell in cells}
        self._failed: dict[str, str] = {}  # cells that failed or were blocked -> which failed first
        self._look_at: dict[str, float] = {}  # held by others: when to look again
        self._told: dict[str, dict[str, Any]] = {}  # what was said of cells as they were begun here
        self._scan_at = 0.0  # when to look through all that wait though none has ended
        self._cpus = num_cpus()
        self._processes = self._cpus if settings.processes == "auto" else settings.processes
        self._gpus = _gpus_here()

    @property
    def left(self) -> list[Cell]:
        """Those of which nothing has come yet."""
        return [*self.waiting, *(one.cell for one in self.running)]

    def step(self) -> Told:
        """What has ended, after which others have begun."""
        time.sleep(POLL_SECONDS)
        ended = [self._ended(one, *found) for one in list(self.running) if (found := poll(one.process)) is not None]
        told = [(cell, state) for cell, state in ended if state["state"] != "held"]
        for cell, state in told:
            self._settle(cell, None if state["state"] == "done" else cell.name)
        if not ended and time.monotonic() < self._scan_at:
            return told
        self._scan_at = time.monotonic() + HELD_SECONDS
        for cell in list(self.waiting):
            why = next((self._failed[need] for need in cell.needs if need in self._failed), None)
            if why is not None:
                self.waiting.remove(cell)
                self._settle(cell, why)
                told.append((cell, {"state": "blocked", "error": [f"it needs {why}, which failed", ""]}))
            elif not self._unsettled.intersection(cell.needs):
                told += self._begin_if_there_is_room(cell)
        return told

    def _settle(self, cell: Cell, why: str | None) -> None:
        self._unsettled.discard(cell.name)
        if why is not None:
            self._failed[cell.name] = why

    def _begin_if_there_is_room(self, cell: Cell) -> Told:
        """That it runs; or is done, where another process has made it in the meantime."""
        if time.monotonic() < self._look_at.get(cell.name, 0.0):
            return []
        settings, cpus = cell.job.engines["local"], min(cpus_of(cell, self._cpus), self._cpus)
        beside = sum(one.cell.job.stage == cell.job.stage for one in self.running)
        of_stage = self._processes if settings.processes == "auto" else settings.processes
        if len(self.running) >= self._processes or beside >= of_stage:
            return []
        if self.running and sum(one.cpus for one in self.running) + cpus > max(self._cpus, self._processes):
            return []
        gpu = self._free_gpu(cell)
        if gpu is None:
            return []
        folder = folder_of(self.out, cell.name)
        told = state_in(folder)
        if cell.name in self._look_at:  # another process ran it, and may yet
            if is_at_work(folder, told, now_at(folder)):
                self._look_at[cell.name] = time.monotonic() + HELD_SECONDS
                return []
            if not cell.force and state_of(cell.job) == "finished":
                return self._settled(cell, {"state": "done"})
            if told.get("state") == "failed" and told != self._told[cell.name]:  # there, and it would here
                return self._settled(cell, {"state": "failed", "error": told.get("error", ["it failed elsewhere", ""])})
        self._told[cell.name], environment = told, {own.ENGINE: "local"}
        if gpu >= 0:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[gpu]
        try:
            process = begin(folder, arguments(cell, write_recipe(self.out, cell)), environment)
        except CvlctlError as error:  # this one: the others may have room yet
            return self._settled(cell, {"state": "failed", "error": [error.what, error.hint]})
        self.waiting.remove(cell)
        self.running.append(_Running(cell, process, cpus, gpu, time.time()))
        return [(cell, {"state": "running"})]

    def _settled(self, cell: Cell, state: dict[str, Any]) -> Told:
        """What came of one that did not run."""
        self.waiting.remove(cell)
        self._settle(cell, None if state["state"] == "done" else cell.name)
        return [(cell, state)]

    def _free_gpu(self, cell: Cell) -> int | None:
        """Which GPU a cell gets; -1: it needs none; None: all are taken."""
        settings = cell.job.engines["local"]
        here = len(self._gpus) if settings.gpus == "auto" else min(settings.gpus, len(self._gpus))
        if not here or getattr(cell.job.recipe, "device", "cpu") != "cuda":
            return -1
        taken = [sum(one.gpu == number for one in self.running) for number in range(here)]
        least = min(range(here), key=taken.__getitem__)
        return least if taken[least] < settings.cells_per_gpu else None

    def _ended(self, one: _Running, code: int, peak: int) -> tuple[Cell, dict[str, Any]]:
        self.running.remove(one)
        children.close([one.process])
        state = outcome(folder_of(self.out, one.cell.name), code, peak, one.process.pid)
        state |= {"began": one.began, "ended": time.time()}
        if state["state"] == "held":
            self._look_at[one.cell.name] = time.monotonic() + HELD_SECONDS
            self.waiting.insert(0, one.cell)
        if state["state"] == "stopped":  # by somebody else than this command
            state |= {"state": "failed", "error": ["stopped by a signal", "the same command goes on where it was"]}
        return one.cell, state

    def stop(self) -> None:
        """Let the cells save what they have, and wait until they are gone."""
        for one in self.running:
            one.process.terminate()
        until = time.monotonic() + STOP_SECONDS
        while time.monotonic() < until and any(one.process.poll() is None for one in self.running):
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """Whatever still runs is killed."""
        children.end([one.process for one in self.running])
        children.close([one.process for one in self.running])


def _gpus_here() -> list[str]:
    """Names of the GPUs, as CUDA_VISIBLE_DEVICES has them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(number) for number, line in enumerate(listed.stdout.splitlines()) if line.startswith("GPU ")]
