"""What "auto" becomes in an experiment's cells: decided by the machine that first runs any, the same for every engine.

Each decision is a function of the cell's recipe and of a few facts of that machine, which are kept in the experiment's
folder. So cells compute the same bits wherever they run, today or when the experiment goes on elsewhere.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl import rates
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.errors import CvlctlError
from cvlctl.experiments.graph import CELLS, Cell, needed_by
from cvlctl.files import read_json, write_json
from cvlctl.machine import num_cpus, total_memory
from cvlctl.rates import Rate
from cvlctl.recipes.estimates import compiling_pays
from cvlctl.recipes.values import Computed, Others

FILE = "machine.json"


class Machine(NamedTuple):
    """What decides."""

    device: str  # "cuda" where cells are given GPUs, else "cpu"
    cpus: int
    precision: str  # what a CPU's "auto" is
    compiles: bool
    memory_gb: float  # half of what there is, shared by as many cells as there are CPUs
    flops: float  # floating point operations a second of one thread
    call: float  # seconds of a call of PyTorch


def machine_of(out: Path, gpus: bool | None, *, keep: bool) -> Machine:
    """The facts that the experiment at `out` goes by: those of its first run, or of this machine.

    Args:
        gpus: whether its engine gives GPUs to cells; None: where this machine has some.
        keep: whether it is about to run.

    Raises:
        CvlctlError: they are garbled.
    """
    path = out / CELLS / FILE
    if path.exists():
        try:
            machine = Machine(**(read_json(path) or {}))
            if [type(value) for value in machine] != [str, int, str, bool, float, float, float]:
                raise TypeError
            if not all(0 < value < 1e30 for value in (machine.cpus, machine.memory_gb, machine.flops, machine.call)):
                raise TypeError
        except TypeError:
            raise CvlctlError(f"{path} is damaged", "delete it: what runs already stays what it is") from None
        return machine
    machine = _here(gpus) if keep else _guess(gpus)
    if not keep:
        return machine
    mine = path.with_name(f"machine-{platform.node()}-{os.getpid()}.json")
    write_json(mine, machine._asdict())
    try:
        os.link(mine, path)
    except FileExistsError:  # another host began at the same time, and was first: it decides for both
        return machine_of(out, gpus, keep=False)
    except OSError:  # a file system without links
        write_json(path, machine._asdict())
    finally:
        mine.unlink(missing_ok=True)
    return machine


def _guess(gpus: bool | None) -> Machine:
    """What a plan goes by: found without importing torch."""
    cpus, rate = num_cpus(), rates.kept() or rates.USUAL
    share = max(0.1, round(total_memory() / 2e9 / cpus, 1))
    return Machine("cuda" if gpus else "cpu", cpus, "auto", True, share, rate.flops, rate.call)


def _here(gpus: bool | None) -> Machine:
    import torch

    from cvlctl.learn.settings import have_compiler, resolve_settings, triton_lacks

    if gpus is None:
        gpus = torch.cuda.is_available()
    seen = gpus and torch.cuda.is_available()
    settings = resolve_settings(
        device="cpu", threads=1, precision="auto", compile="false", steps=1, say=lambda line: None
    )
    compiles = not triton_lacks("cuda") if seen else gpus or have_compiler()
    return _guess(gpus)._replace(precision=settings.precision, compiles=compiles)


def fitted(cells: Sequence[Cell], has_gpus: Callable[[Cell], bool]) -> list[Cell]:
    """The cells, with `device: cpu` in the place of auto where their engine is asked for no GPU."""

    def fit(cell: Cell) -> Cell:
        recipe = cell.job.recipe
        if has_gpus(cell) or getattr(recipe, "device", None) != "auto":
            return cell
        return cell._replace(job=cell.job._replace(recipe=recipe.model_copy(update={"device": "cpu"})))

    return [fit(cell) for cell in cells]


def fixed(cells: Sequence[Cell], machine: Machine) -> list[Cell]:
    """The cells, with a decision in the place of every "auto" that decides about bits.

    `threads` is one where a stage has as many cells as there are CPUs, all of them where it has one: cells that run
    side by side leave no CPU idle, and share none.
    """
    needed, counts = needed_by(cells), Counter(cell.job.stage for cell in cells)
    return [
        cell._replace(job=job._replace(recipe=_fixed(job.recipe, needed[cell.name], machine, counts[job.stage])))
        for cell, job in ((cell, cell.job) for cell in cells)
    ]


def _fixed(recipe: Any, others: Others, machine: Machine, cells: int) -> Any:
    if not isinstance(recipe, Computed):
        return recipe  # an evaluation: its rows do not depend on how they are computed
    learning, decided = recipe.learning(others), dict[str, Any]()
    threads = 1 if recipe.few_threads else max(1, machine.cpus // cells)
    if recipe.threads == "auto":
        decided["threads"] = threads
    else:
        threads = recipe.threads
    device = recipe.device
    if device == "auto":  # an online learner of vectors belongs on the CPU, where its environment is
        by_vector = isinstance(recipe, BuildRecipe) and recipe.sees is None
        device = decided["device"] = "cpu" if by_vector else machine.device
    on_cpu = device == "cpu"
    if recipe.precision == "auto":
        decided["precision"] = machine.precision if on_cpu else "float32"
    if recipe.compile == "auto" and learning is not None:
        pays = not on_cpu or compiling_pays(*learning, Rate(machine.flops, machine.call).by(threads))
        decided["compile"] = "true" if pays and machine.compiles else "false"
    if getattr(recipe, "memory_gb", None) == "auto" and on_cpu:
        decided["memory_gb"] = machine.memory_gb
    return recipe.model_copy(update=decided | _decided_before(recipe, decided))


def _decided_before(recipe: Computed, keys: Iterable[str]) -> dict[str, Any]:
    """What was decided of these keys for the result that is there: begun by another experiment, or another machine."""
    places = [Path(place) for place in recipe.writes() if os.path.isdir(place)]
    records = [read_json(place / "run.json") or _provenance(place) for place in reversed(places)]
    then: dict[str, Any] = next((found["recipe"] for found in records if isinstance(found.get("recipe"), dict)), {})
    kinds = {"threads": int, "device": str, "precision": str, "compile": str, "memory_gb": float}
    return {key: then[key] for key in keys if type(then.get(key)) is kinds[key] and then[key] != "auto"}


def _provenance(store: Path) -> dict[str, Any]:
    attributes = (read_json(store / "zarr.json") or {}).get("attributes")
    found = attributes.get("provenance") if isinstance(attributes, dict) else None
    return found if isinstance(found, dict) else {}
