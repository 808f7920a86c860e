"""What a report is of, found on disk: cells, runs, evaluations, and stores. Nothing is written.

What is missing, half finished or damaged is told of (`gaps`), and the rest is shown.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import kind_of, load
from cvlctl.experiments.engines.start import last_lines, state_in
from cvlctl.experiments.graph import CELLS, folder_of
from cvlctl.experiments.plan import plan
from cvlctl.experiments.run import planned
from cvlctl.experiments.status import status
from cvlctl.files import read_json, sha256
from cvlctl.runs import read_run
from cvlctl.score import kept
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.report import can_be_shown, estimates_in, tables_of
from cvlctl.score.rows import read_rows
from cvlctl.types import EpisodeResult

TABLES = (
    "table",
    "aggregate",
    "pairwise",
    "relative",
    "comparison",
    "profiles",
    "efficiency",
    "runs",
    "offline",
    "tuning",
)
_NEAR = 3  # folders above a run in which its evaluation is looked for
_LOGS = 20  # failures whose last lines are shown
_NAMED = 3  # runs that are gone, each by name


class Evaluation(NamedTuple):
    """An evaluation: its tables by name (none where `problem` says why), its rows, and what they are of."""

    out: Path
    recipe: EvaluateRecipe
    record: Mapping[str, Any]
    tables: Mapping[str, Any]
    rows: Sequence[EpisodeResult]
    problem: str = ""


class Found(NamedTuple):
    """All that a report shows."""

    title: str
    command: str  # that runs it all; "": there is no such
    source: str  # the experiment's file
    cells: list[dict[str, Any]]  # cell, command, out, state, why, size, seconds, host, engine, job, versions, log
    evaluations: list[Evaluation]
    runs: dict[str, dict[str, Any]]  # what each run.json says, by its folder
    stores: dict[str, dict[str, list[str]]]  # path -> digest that was trained on -> runs
    gaps: list[str]


def of_experiment(file: Path, overrides: Sequence[str]) -> Found:
    """An experiment, as far as it is.

    Raises:
        CvlctlError: no recipe of an experiment, or nothing of it has run yet.
    """
    experiment = load(file, overrides, "run")
    cells = planned(experiment, keep=False)
    rows = status(experiment.out, cells)
    sizes = {row["cell"]: row["size"] for row in plan(cells)}
    if all(row["state"] == "waiting" for row in rows):
        raise CvlctlError(f"{file}: nothing of it has run yet, in {experiment.out}", f"cvlctl run {file}")
    logs = 0
    for row in rows:
        folder = folder_of(experiment.out, row["cell"])
        row |= _times(state_in(folder)) | {"size": sizes[row["cell"]], "log": "", "recipe": _recipe_in(folder)}
        if row["state"] == "failed" and logs < _LOGS:
            row["log"], logs = last_lines(folder), logs + 1
    there = {"run": [row["out"] for row in rows if row["command"] in ("pretrain", "finetune")],
             "evaluation": [row["out"] for row in rows if row["command"] == "evaluate"]}  # fmt: skip
    builds = [cell.job for cell in cells if cell.job.command == "build-dataset"]
    built = [place for job in builds for place in job.recipe.writes() if Path(place, "zarr.json").is_file()]
    line = " ".join(["cvlctl run", str(file), *overrides])
    return _read(file.stem, line, file.read_text(encoding="utf-8", errors="replace"), rows, there, built, set())


def of_folders(places: Sequence[str]) -> Found:
    """Runs, evaluations and stores: those folders, or all that lie below them. `places` may be patterns.

    An evaluation of a run is looked for in the folders around it.

    Raises:
        CvlctlError: there is nothing of that kind.
    """
    there: dict[str, list[str]] = {"run": [], "evaluation": [], "store": []}
    for place in places:
        matched = sorted(glob.glob(place, recursive=True)) if not os.path.lexists(place) else [place]
        found = [pair for one in matched for pair in results_below(one)]
        if not found:
            what = f"{place}: no run, evaluation or store is there" if matched else f"nothing is at {place}"
            raise CvlctlError(what, "name an experiment's file, or folders that cvlctl wrote, such as runs/quickstart")
        for kind, out in found:
            there[kind] += [out] if out not in there[kind] else []
    runs = there["run"]
    chosen = set() if there["evaluation"] else {os.path.realpath(run) for run in runs}
    there["evaluation"] = there["evaluation"] or evaluations_near(runs)
    rows = [_row(kind, out) for kind in there for out in there[kind] if kind != "store"]
    title = Path(places[0]).name if len(places) == 1 else f"{len(runs)} runs"
    return _read(title, "", "", rows, there, there["store"], chosen)


def results_below(place: str) -> Iterator[tuple[str, str]]:
    """(kind, folder) of runs, evaluations and stores at a place, and below it."""
    kinds = dict(zip(("run.json", "evaluation.json", "zarr.json"), ("run", "evaluation", "store"), strict=True))
    for folder, children, files in os.walk(place):
        found = next((kind for name, kind in kinds.items() if name in files), None)
        children[:] = [] if found else sorted(set(children) - {CELLS, "checkpoints"})
        if found and not folder.endswith((".partial", ".old")):
            yield found, folder


def evaluations_near(runs: Sequence[str]) -> list[str]:
    """Folders of evaluations which have played any of the runs: beside them, and beside the folders above them."""
    wanted, found = {os.path.realpath(run) for run in runs}, list[str]()
    around = dict.fromkeys(above for run in wanted for above in list(Path(run).parents)[:_NEAR])
    for record in dict.fromkeys(record for above in around for record in sorted(above.glob("*/evaluation.json"))):
        jobs = (read_json(record) or {}).get("jobs")
        if isinstance(jobs, list) and wanted & {run_of(job) for job in jobs if isinstance(job, dict)}:
            found.append(os.path.relpath(record.parent))
    return found


def run_of(job: Mapping[str, Any]) -> str:
    """The folder of the run that a job of an evaluation's record played; "" where it is another evaluation's."""
    if job.get("beside"):
        return ""
    return os.path.realpath(Path(str(job.get("checkpoint"))).parent.parent)


def _row(kind: str, out: str) -> dict[str, Any]:
    """What is known of a folder's cell: its engine's word where there is one, else what it says itself."""
    record = read_json(Path(out) / {"run": "run.json", "evaluation": "evaluation.json"}[kind]) or {}
    command = "evaluate" if kind == "evaluation" else kind_of(record.get("recipe")) or "another command"
    state = "done" if record.get("status") == "finished" else "half finished"
    told = next(
        (state_in(above / CELLS / Path(out).relative_to(above)) for above in Path(out).parents
         if (above / CELLS).is_dir()), {})  # fmt: skip
    there = _times(told) if told.get("state") == "done" else dict.fromkeys(("seconds", "versions"))
    where = record.get("where", {}) if isinstance(record.get("where"), dict) else {}
    return {
        "cell": out, "command": command, "out": out, "state": state, "why": "", "size": "", "log": "", **there,
        **{name: where.get(name) for name in ("host", "engine", "job")},
    }  # fmt: skip


def _recipe_in(folder: Path) -> str:
    """The recipe file that a cell was started on last; "": none was."""
    found = sorted(folder.glob("recipe-*.yaml"), key=lambda file: file.stat().st_mtime)
    return str(found[-1]) if found else ""


def _times(told: Mapping[str, Any]) -> dict[str, Any]:
    both = "began" in told and "ended" in told and told.get("state") in ("done", "failed")
    found = told.get("versions")
    return {
        "seconds": max(0.0, told["ended"] - told["began"]) if both else None,
        "versions": found if isinstance(found, dict) else None,
    }


def _read(
    title: str, command: str, source: str, cells: list[dict[str, Any]], there: Mapping[str, Sequence[str]],
    built: Sequence[str], chosen: Set[str],
) -> Found:  # fmt: skip
    gaps, runs = list[str](), dict[str, dict[str, Any]]()
    for out in there["run"]:
        try:
            runs[out] = read_run(Path(out))
        except CvlctlError as error:
            if Path(out, "run.json").exists():
                gaps.append(error.what)
            continue
        if runs[out]["status"] != "finished":
            gaps.append(f"{out}: its training is not finished")
    by_out = {row["out"]: row for row in cells}
    for out, run in runs.items():
        if out in by_out and not by_out[out].get("versions"):
            by_out[out]["versions"] = run.get("versions")
    evaluations = []
    for out in there["evaluation"]:
        found = evaluation_in(Path(out), chosen)
        if isinstance(found, str):
            gaps += [found] if found else []
            continue
        evaluations.append(found)
        gaps += [found.problem] if found.problem else []
        gaps += _trained_since(found)
    stores: dict[str, dict[str, list[str]]] = {path: {} for path in built}
    for out, run in runs.items():
        for path, digest in trained_on(run):
            stores.setdefault(path, {}).setdefault(digest, []).append(out)
    return Found(title, command, source, cells, evaluations, runs, stores, gaps)


def trained_on(run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(path, digest) of the stores that a run was trained on."""
    used = run["recipe"].get("stores")
    for store in used if isinstance(used, list) else ():
        path = store.get("path") if isinstance(store, dict) else None
        if isinstance(path, str) and isinstance(run["inputs"].get(path), str):
            yield path, run["inputs"][path]


def evaluation_in(out: Path, chosen: Set[str] = frozenset()) -> Evaluation | str:
    """The evaluation in a folder, of the `chosen` runs alone (real paths; none: of all). A text says why not."""
    record = read_json(out / "evaluation.json")
    if record is None:
        return f"{out}: evaluation.json is damaged" if (out / "evaluation.json").exists() else ""
    recipe = _recipe(record) if kept.is_record(record) else None
    if recipe is None:
        return f"{out}: evaluation.json is damaged"
    jobs = [job for job in record["jobs"] if not chosen or run_of(job) in chosen]
    try:
        rows = read_rows(out / "rows.jsonl")
    except CvlctlError as error:
        return Evaluation(out, recipe, record, {}, [], error.what)
    wanted = {(job["algorithm"], job["task"], job["seed"], job["step"]) for job in jobs}
    mine = [row for row in rows if (row.algorithm, row.task, row.seed, row.step) in wanted]
    lacking = len(wanted) * recipe.episodes - len(mine)
    problem = f"{out}: {lacking} of {len(wanted) * recipe.episodes} episodes are not played yet" if lacking > 0 else ""
    saved = None
    if len(jobs) == len(record["jobs"]) and record["status"] == "finished":
        saved = kept.saved_result(out, record)
    if saved is None or not all(name in saved for name in TABLES) or not can_be_shown(saved):
        estimates = {(job["algorithm"], job["task"], seed): estimate for job in jobs if run_of(job)
                     for seed, estimate in estimates_in(Path(run_of(job))).items()}  # fmt: skip
        asked = recipe if len(jobs) == len(record["jobs"]) else recipe.model_copy(update={"tuning": ()})
        saved = tables_of(asked, mine, estimates, recipe.baseline or "bc", record) if mine else {}
    return Evaluation(out, recipe, record, saved, mine, problem)


def _recipe(record: Mapping[str, Any]) -> EvaluateRecipe | None:
    """What tables are made by, None where it makes no sense; not what was played, which need not be here any more."""
    told = {key: value for key, value in record["recipe"].items() if key not in ("task", "env", "goals", "out")}
    with suppress(ValidationError):
        legal = {key: value for key, value in told.items() if key in EvaluateRecipe.model_fields}
        return EvaluateRecipe.model_validate({**legal, "out": "somewhere"})
    return None


def _trained_since(evaluation: Evaluation) -> list[str]:
    """Checkpoints that are gone, or newer than the evaluation of them and no longer what was played."""
    played = (evaluation.out / "evaluation.json").stat().st_mtime
    gone, other = dict[str, None](), dict[str, None]()
    for job in evaluation.record["jobs"]:
        if not (place := run_of(job)):
            continue
        file, run = Path(job["checkpoint"]), os.path.relpath(place)
        if not file.is_file():
            gone[run] = None
        elif file.stat().st_mtime > played and run not in other and sha256(file) != job["sha256"]:
            other[run] = None
    lacking = [f"{run} was scored in {evaluation.out} and is gone since, or lies elsewhere" for run in gone]
    if len(gone) > _NAMED:
        lacking = [f"{len(gone)} runs were scored in {evaluation.out} and are gone since, or lie elsewhere"]
    return [*lacking,
            *(f"{run} was trained further since its scores in {evaluation.out}" for run in other)]  # fmt: skip


def records_in(found: Found) -> Iterator[Mapping[str, Any]]:
    """Everything that says which versions made it, and where."""
    yield from found.cells
    yield from found.runs.values()
    yield from (evaluation.record for evaluation in found.evaluations)
