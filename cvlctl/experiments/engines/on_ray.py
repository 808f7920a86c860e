"""`engine: ray`: cells as tasks of Ray Core, on one machine or a cluster whose nodes see the same files.

A cell is one task, which starts the same command as any other engine and waits for it. It takes what came of the cells
that it needs as arguments, so that Ray does the waiting. Where a worker or a node dies, Ray runs the task again, and
the command goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cvlctl import cell as own
from cvlctl import children
from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines.ray_cluster import first_line, joined
from cvlctl.experiments.engines.ray_work import by_value
from cvlctl.experiments.engines.start import arguments, is_at_work, state_in, write_recipe
from cvlctl.experiments.engines.waiting import HELD_SECONDS, STOP_SECONDS, Settled, Told, cpus_of, run_all
from cvlctl.experiments.graph import Cell, folder_of
from cvlctl.experiments.plan import state_of
from cvlctl.experiments.recipe import RaySettings
from cvlctl.files import now_at
from cvlctl.interrupts import interruptible

LOOK_SECONDS = 0.5
_AT_ONCE = 64  # cells that are given to Ray, or looked at whether they have begun, between two looks at the others
_DONE = {"state": "done"}


def run(
    out: Path,
    cells: Sequence[Cell],
    settings: RaySettings,
    *,
    fail_fast: bool,
    settled: Settled,
    look: Callable[[], None],
) -> None:
    """Run `cells` as `local.run` does, wherever Ray has room for them.

    Raises:
        CvlctlError: Ray is not installed, no cluster answers, or a cell asks for more than any of its nodes has.
        KeyboardInterrupt: Ctrl-C or SIGTERM, once every cell has saved what it has.
    """
    for cell in cells:
        if cell.job.engines["ray"].address != settings.address:
            what = f"stage {cell.job.stage} has a ray.address of its own"
            raise CvlctlError(what, "an experiment runs on one cluster: say address in its own `ray` alone")
    with interruptible() as interrupted, joined(settings.address) as ray:
        run_all(_Tasks(ray, out, cells), interrupted, fail_fast=fail_fast, settled=settled, look=look)


def has_gpus(cell: Cell) -> bool:
    """Whether Ray is asked for GPUs for a cell, or parts of one."""
    return bool(cell.job.engines["ray"].num_gpus)


def asked_of(cell: Cell, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What a cell's task asks of Ray: num_cpus, num_gpus, max_retries.

    Args:
        nodes: what each node of the cluster has: "CPU", "GPU".

    Raises:
        CvlctlError: no node has that: it would wait for ever.
    """
    settings, stage = cell.job.engines["ray"], cell.job.stage
    most = int(max((node.get("CPU", 0) for node in nodes), default=0))
    cpus = settings.num_cpus or cpus_of(cell, max(1, most))
    on_gpu = getattr(cell.job.recipe, "device", "cpu") == "cuda"
    gpus = settings.num_gpus if on_gpu else 0
    if on_gpu and not gpus:
        what = f"stage {stage} computes on a GPU (device: cuda), and ray.num_gpus gives it none"
        raise CvlctlError(what, "say ray: {num_gpus: 1}, or a part of one, or device: cpu")
    if not any(cpus <= node.get("CPU", 0) and gpus <= node.get("GPU", 0) for node in nodes):
        known = "; ".join(sorted({f"{node.get('CPU', 0):g} CPUs, {node.get('GPU', 0):g} GPUs" for node in nodes}))
        what = f"{cell.name} asks Ray for {cpus:g} CPUs and {gpus:g} GPUs, and no node has them (there are: {known})"
        raise CvlctlError(what, f"say less in threads, or in stages.{stage}.ray.num_cpus and num_gpus")
    return {"num_cpus": cpus, "num_gpus": gpus, "max_retries": settings.max_retries}


class _Tasks:
    """The cells that Ray has, and what came of those that have ended."""

    def __init__(self, ray: Any, out: Path, cells: Sequence[Cell]) -> None:
        self._ray, self._out = ray, out
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._asked = {cell.name: asked_of(cell, nodes) for cell in cells}
        self._remote = ray.remote(by_value(children.import_path(), os.getcwd()))
        self._new = list(cells)  # not given to Ray yet
        self.left = {cell.name: cell for cell in cells}  # in order
        self._refs: dict[str, Any] = {}  # what will come of a cell
        self._begun, self._failed = set[str](), dict[str, str]()  # failed or blocked -> which failed first
        self._look_at: dict[str, float] = {}  # held by others: when to look again

    def _submit(self, cell: Cell) -> None:
        """Give a cell to Ray, after those that it needs."""
        folder = Path(os.path.abspath(folder_of(self._out, cell.name)))
        line = arguments(cell, Path(os.path.abspath(write_recipe(self._out, cell))))
        needs = [self._refs[need] for need in cell.needs if need in self._refs]
        task = self._remote.options(name=f"cvlctl {cell.name}", **self._asked[cell.name])
        self._refs[cell.name] = task.remote(str(folder), line, *needs)

    def step(self) -> Told:
        """What has begun, and what has ended, after a while at most; at first the cells are given to Ray."""
        for cell in self._new[:_AT_ONCE]:
            self._submit(cell)
        del self._new[:_AT_ONCE]
        if self._new:
            return []
        told = self._blocked() + self._free_again()
        due = {self._refs[cell.name]: cell for cell in self._due()}
        if not due:
            time.sleep(LOOK_SECONDS if self.left and not told else 0)
            return told
        if self._ray.wait(list(due), timeout=0 if told else LOOK_SECONDS)[0]:
            for ref in self._ray.wait(list(due), num_returns=len(due), timeout=0)[0]:
                told += self._ended(due.pop(ref))
        return [*told, *((cell, {"state": "running"}) for cell in self._newly_begun(due))]

    def _due(self) -> list[Cell]:
        """Cells that may run or have ended: what they need is done."""
        return [
            cell for cell in self.left.values()
            if cell.name not in self._look_at and not any(need in self.left for need in cell.needs)
        ]  # fmt: skip

    def _blocked(self) -> Told:
        found = []
        for cell in list(self.left.values()):
            why = next((self._failed[need] for need in cell.needs if need in self._failed), None)
            if why is not None:
                self._failed[cell.name] = why
                found.append(
                    (self.left.pop(cell.name), {"state": "blocked", "error": [f"it needs {why}, which failed", ""]})
                )
        return found

    def _free_again(self) -> Told:
        """Cells that another process ran, and has made; others that it let go are given to Ray once more."""
        found = []
        for name in [name for name, at in self._look_at.items() if time.monotonic() >= at]:
            cell = self.left[name]
            folder = folder_of(self._out, name)
            if is_at_work(folder, state_in(folder), now_at(folder)):
                self._look_at[name] = time.monotonic() + HELD_SECONDS
                continue
            del self._look_at[name]
            if not cell.force and state_of(cell.job) == "finished":
                self._refs[name] = _DONE
                found.append((self.left.pop(name), _DONE))
            else:
                self._submit(cell)
        return found

    def _ended(self, cell: Cell) -> Told:
        told = self._result(cell)
        if told["state"] == "waits":  # what it needs was held by another process
            self._submit(cell)
            return []
        if told["state"] == "held":
            self._look_at[cell.name] = time.monotonic() + HELD_SECONDS
            return []
        del self.left[cell.name]
        if told["state"] != "done":
            self._failed[cell.name] = cell.name
        return [(cell, told)]

    def _result(self, cell: Cell) -> dict[str, Any]:
        """What came of a cell: what its task says, or Ray where that cannot."""
        folder = folder_of(self._out, cell.name)
        try:
            told: dict[str, Any] = self._ray.get(self._refs[cell.name])
        except self._ray.exceptions.RayError as error:  # the cell could not say anything any more
            told = {**state_in(folder), "state": "failed", "error": _in_words(error)}
            own.write(folder, told)
        if told["state"] == "stopped":  # by somebody else than this command
            told |= {"state": "failed", "error": ["stopped by a signal", "the same command goes on where it was"]}
        return told

    def _newly_begun(self, due: Mapping[Any, Cell]) -> list[Cell]:
        """Of cells that may run, those that say so: Ray begins them about in order."""
        looks, found = 0, []
        for ref, cell in due.items():
            if cell.name not in self._begun and looks < _AT_ONCE:
                if state_in(folder_of(self._out, cell.name)).get("job") == ref.task_id().hex():
                    self._begun.add(cell.name)
                    found.append(cell)
                else:
                    looks += 1
        return found

    def stop(self) -> None:
        """Take back what waits, let what runs save what it has, and wait until it is gone."""
        refs = [self._refs[name] for name in self.left if name in self._refs]
        for ref in refs:
            self._ray.cancel(ref)
        if refs:
            self._ray.wait(refs, num_returns=len(refs), timeout=STOP_SECONDS)


def _in_words(error: Exception) -> list[str]:
    """What to say of a task that Ray could not bring to its end."""
    name = type(error).__name__
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ImportError):
        return [f"a node of the Ray cluster cannot import cvlctl: {cause}", "install the same version on every node"]
    if name in ("WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError"):
        what = "its worker or node died, more often than ray.max_retries allows"
        return [what, "give it more; it goes on where it was saved"]
    if name == "OutOfMemoryError":
        what = f"Ray ended it, since memory ran out: {first_line(error)}"
        return [what, "fewer cells at once: a higher ray.num_cpus"]
    return [f"Ray: {name}: {first_line(cause)}", "the same command goes on where it was"]
