"""`cvlctl evaluate`: episodes of every seed of every run, then tables and pictures of their scores.

    <out>/rows.jsonl          one line an episode: what everything else is computed from
    <out>/goals.npy           with `goals`: the states (N, O) that policies are sent to
    <out>/evaluation.json     the recipe, and which checkpoint (by its sha256) each row is of
    <out>/table.csv, table.md, table.json, scores.png, and curves.png with `checkpoints: all`

Rows are saved every half minute and at Ctrl-C, and reused wherever the checkpoint is still the same file: after an
interruption, for more episodes, or when a glob finds another run, only what is missing runs.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.files import entries, read_json, sha256, write_atomically, write_json
from cvlctl.play import envpool, envs
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.players import run_episodes
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import Episodes, GoalUse, PolicyJob
from cvlctl.play.rollout import Progress as OnEpisode
from cvlctl.progress import Progress, say
from cvlctl.recipes.explain import nearest
from cvlctl.score import find_runs
from cvlctl.score.pictures import plot_curves, plot_scores
from cvlctl.score.recipe import EvaluateRecipe, EvaluationGoals
from cvlctl.score.render import to_csv, to_markdown, to_rich
from cvlctl.score.rows import parse_row, write_rows
from cvlctl.score.tables import OfflineEstimate, aggregate_table, offline_table, pairwise, run_table, score_table
from cvlctl.types import EpisodeResult
from cvlctl.version import versions

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1
SIMULATOR = ("mujoco", "metaworld", "gymnasium")  # physics, and with them scores, differ between versions
SAVE_SECONDS = 30.0  # between two saves: what a kill may cost
TABLES = {
    "table": "scores", "aggregate": "over all tasks", "pairwise": "against the baseline",
    "offline": "offline estimates", "runs": "single runs",
}  # fmt: skip
FILES = (
    "evaluation.json", "rows.jsonl", "goals.npy", "table.csv", "table.md", "table.json", "scores.png", "curves.png",
)  # fmt: skip

_RowKey = tuple[str, str, int, int]  # algorithm, task, seed, step
_Rows = dict[tuple[str, str, int], dict[int, EpisodeResult]]  # (sha256 of the checkpoint, task, seed) -> episodes
_JobRows = dict[PolicyJob, dict[int, EpisodeResult]]


def evaluate(recipe: EvaluateRecipe, *, force: bool = False) -> dict[str, Any]:
    """Run what is missing, and compute the tables.

    Returns:
        status ("evaluated" or "finished already"), out, rows (a path), episodes, plots (paths), and lists of records:
        table (`scores.score_table`), aggregate, pairwise, offline, runs.

    Raises:
        CvlctlError: no such runs, no policies in them, or an `out` that holds something else (`force` replaces it).
    """
    found = find_runs.checkpoints(recipe)
    labels = find_runs.labels(found)
    baseline = _baseline(recipe, labels)
    estimates = {
        (labels[checkpoint.run], checkpoint.task, seed): estimate
        for checkpoint in found
        for seed, estimate in _estimates(checkpoint.run).items()
    }
    goals, use = None if recipe.goals is None else _goals(recipe.goals, found), _goal_use(recipe)
    jobs = [
        PolicyJob(
            *key, checkpoint.step, checkpoint.file, estimates[key].gamma if key in estimates else None, use,
            recipe.horizon,
        )
        for checkpoint in found
        for key in ((labels[checkpoint.run], checkpoint.task, seed) for seed in checkpoint.seeds)
    ]  # fmt: skip
    digests = {checkpoint.file: sha256(checkpoint.file) for checkpoint in found}
    record = {
        "format": FORMAT,
        "recipe": recipe.resolved(),
        "jobs": [
            {"algorithm": job.algorithm, "task": job.task, "seed": job.seed, "step": job.step,
             "checkpoint": str(job.checkpoint), "sha256": digests[job.checkpoint]}
            for job in jobs
        ],
        **({} if goals is None else {"goals": hashlib.sha256(goals.tobytes()).hexdigest()}),
    }  # fmt: skip
    before = _open(recipe, force)
    if before and before.get("goals") != record.get("goals"):
        raise CvlctlError(f"{recipe.out}: the goals have changed since", "choose another out, or --force to replace it")
    paths = {"out": str(recipe.out), "rows": str(recipe.out / "rows.jsonl")}
    if before and before["status"] == "finished" and all(before[name] == record[name] for name in record):
        saved = read_json(recipe.out / "table.json")
        if saved is not None:
            return {"status": "finished already", **paths, **saved}
    if recipe.backend == "envpool":
        record["simulators"] = _simulators(recipe, jobs, before)

    have = _reusable(recipe, before)
    rows: _JobRows = {}
    for job in jobs:  # what it is called may have changed since, how many episodes are wanted too
        known = have.get((digests[job.checkpoint], job.task, job.seed), {})
        rows[job] = {
            at: replace(row, algorithm=job.algorithm) for at, row in known.items() if at in range(recipe.episodes)
        }
    if before is None:
        _write_record(recipe.out, record, "started")
    if goals is not None and use is not None:
        buffer = io.BytesIO()
        np.save(buffer, goals)
        write_atomically(use.file, buffer.getvalue())
    _save(recipe.out, record, rows, "started")  # rows first: what they are of was true of the old record too
    _play(recipe, record, rows)
    everything = [row for job in jobs for _, row in sorted(rows[job].items())]
    tables = _tables(everything, recipe, baseline)
    tables["offline"] = offline_table(everything, estimates, **recipe.confidence.model_dump())
    plots = _write_tables(recipe, everything, tables)
    result = {"episodes": len(everything), "plots": plots, **tables}
    write_json(recipe.out / "table.json", result)
    _save(recipe.out, record, rows, "finished")
    return {"status": "evaluated", **paths, **result}


def _goals(source: EvaluationGoals, found: Sequence[find_runs.Checkpoint]) -> np.ndarray:
    """The states (N, O) to arrive at: of the shape that all policies see."""
    from cvlctl.data.examples import success_examples  # torch and zarr: not without need

    specs = [load_policy(checkpoint.file, checkpoint.seeds[0]).spec for checkpoint in found]
    states = [success_examples(source, spec, "goals") for spec in dict.fromkeys(specs)]
    bad = [column for column in source.columns or () if column >= states[0].shape[1]]
    if bad:
        raise CvlctlError(f"goals.columns: {bad} of states with {states[0].shape[1]} columns", "columns count from 0")
    return states[0]


def _goal_use(recipe: EvaluateRecipe) -> GoalUse | None:
    goals = recipe.goals
    return None if goals is None else GoalUse(recipe.out / "goals.npy", goals.columns, goals.within)


def _simulators(
    recipe: EvaluateRecipe, jobs: Sequence[PolicyJob], before: dict[str, Any] | None
) -> dict[str, dict[str, str]]:
    """What simulates each task; it has to be what simulated the rows that are there already."""
    tasks = dict.fromkeys(job.task for job in jobs)
    found = {task: envpool.announced_versions(task, str(recipe.out)) for task in tasks}
    for task, then in (before or {}).get("simulators", {}).items():
        if then != found.get(task, then):
            what = f"{recipe.out}: {task} was simulated by {_named(then)}, and now would be by {_named(found[task])}"
            raise CvlctlError(what, "choose another out, or --force to replace it")
    return found


def _named(simulator: dict[str, str]) -> str:
    return ", ".join(f"{name} {simulator[name]}" for name in ("envpool", "mujoco") if name in simulator)


def _play(recipe: EvaluateRecipe, record: dict[str, Any], rows: _JobRows) -> None:
    """Run the episodes that `rows` lacks, into it; saved now and then, and however it ends."""
    wanted = {job: [at for at in range(recipe.episodes) if at not in done] for job, done in rows.items()}
    missing = {job: numbers for job, numbers in wanted.items() if numbers}
    total, start = len(rows) * recipe.episodes, sum(map(len, rows.values()))
    if not missing:
        return
    if start:
        say(f"{recipe.out}: {start} of {total} episodes are evaluated already")
    job_of: dict[_RowKey, PolicyJob] = {(job.algorithm, job.task, job.seed, job.step): job for job in rows}
    saved = time.monotonic()

    def keep(played: int, _: int, row: EpisodeResult) -> None:
        nonlocal saved
        rows[job_of[row.algorithm, row.task, row.seed, row.step]][row.episode] = row
        progress.update(start + played)
        if time.monotonic() - saved >= SAVE_SECONDS:
            _save(recipe.out, record, rows, "started")
            saved = time.monotonic()

    with Progress("evaluate", total, "episodes", start) as progress:
        player = _player(recipe)
        try:
            player(list(missing), list(missing.values()), keep)
        finally:
            _save(recipe.out, record, rows, "started")


def _baseline(recipe: EvaluateRecipe, labels: dict[Path, str]) -> str:
    names = list(dict.fromkeys(labels.values()))
    if recipe.baseline is not None and recipe.baseline not in names:
        raise CvlctlError(f"baseline: no run is called {recipe.baseline!r}", nearest(recipe.baseline, names, "names"))
    return recipe.baseline or "bc"


def _open(recipe: EvaluateRecipe, force: bool) -> dict[str, Any] | None:
    if not force:
        return read_evaluation(recipe)
    if entries(recipe.out) and not (recipe.out / "evaluation.json").exists():
        raise _no_evaluation(recipe.out)
    for name in reversed(FILES):  # and nothing that is not ours; the record last, or a kill leaves files of nobody
        (recipe.out / name).unlink(missing_ok=True)
    return None


def _no_evaluation(out: Path) -> CvlctlError:
    return CvlctlError(f"{out} is not empty, and no evaluation", "choose another out: nothing in it was touched")


def read_evaluation(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """The record in <out>/evaluation.json; None where `out` is empty.

    Raises:
        CvlctlError: where `out` holds something else, or rows of other runs, episodes or seeds.
    """
    out = recipe.out
    if not entries(out):
        return None
    if not (out / "evaluation.json").exists():
        raise _no_evaluation(out)
    before = read_json(out / "evaluation.json")
    if not before or before.get("format") != FORMAT or not {"status", "recipe", "jobs"} <= before.keys():
        raise CvlctlError(f"{out}/evaluation.json is damaged", "choose another out, or --force to replace it")
    now = recipe.resolved()
    for name in ("runs", "checkpoints", "episodes", "seed", "goals", "horizon", "backend"):
        then = before["recipe"].get(name, EvaluateRecipe.model_fields[name].default)
        more = (
            name == "episodes" and isinstance(then, int) and then < now[name]
        )  # those that are there stay what they are
        if then != now[name] and not more:
            what = f"{out} holds another evaluation: {name} was {then}, now {now[name]}"
            raise CvlctlError(what, "choose another out, or --force to replace it")
    return before


def _reusable(recipe: EvaluateRecipe, before: dict[str, Any] | None) -> _Rows:
    """Rows that an earlier evaluation saved, by the checkpoint that they are of."""
    path = recipe.out / "rows.jsonl"
    if before is None or not path.is_file():
        return {}
    by_key: dict[_RowKey, dict[int, EpisodeResult]] = defaultdict(dict)
    for row in _sound_rows(path):
        by_key[row.algorithm, row.task, row.seed, row.step][row.episode] = row
    return {
        (job["sha256"], job["task"], job["seed"]): by_key[job["algorithm"], job["task"], job["seed"], job["step"]]
        for job in before["jobs"]
    }


def _sound_rows(path: Path) -> list[EpisodeResult]:
    """The rows in a file, less damaged lines: their episodes can be played again."""
    rows, broken = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            rows += [parse_row(line)] if line.strip() else []
        except (ValueError, TypeError, LookupError, RecursionError):
            broken += 1
    if broken:
        say(f"{path}: {broken} damaged {'line' if broken == 1 else 'lines'} dropped; what they held runs again")
    return rows


def _save(out: Path, record: dict[str, Any], rows: _JobRows, status: str) -> None:
    write_rows(out / "rows.jsonl", [row for done in rows.values() for _, row in sorted(done.items())])
    _write_record(out, record, status)


def _write_record(out: Path, record: dict[str, Any], status: str) -> None:
    write_json(out / "evaluation.json", {**record, "status": status, "versions": versions()})


def _player(recipe: EvaluateRecipe) -> Callable[[Sequence[PolicyJob], Episodes, OnEpisode], list[EpisodeResult]]:
    workers = None if recipe.workers == "auto" else recipe.workers
    if recipe.backend == "envpool":
        return lambda jobs, episodes, progress: envpool.run_episodes(
            jobs, episodes=episodes, seed=recipe.seed, threads=workers, progress=progress
        )
    device = recipe.device
    if device != "cpu":
        import torch

        if device.startswith("cuda") and not torch.cuda.is_available():
            raise CvlctlError(f"device: {device}, but PyTorch sees no GPU", "use device: cpu")
        device = "cuda" if device == "auto" and torch.cuda.is_available() else device
    if device.startswith("cuda"):
        return lambda jobs, episodes, progress: run_lockstep(
            jobs, episodes=episodes, seed=recipe.seed, device=device, progress=progress
        )
    return lambda jobs, episodes, progress: run_episodes(
        jobs, episodes=episodes, seed=recipe.seed, workers=workers, progress=progress
    )


def _tables(rows: list[EpisodeResult], recipe: EvaluateRecipe, baseline: str) -> dict[str, Any]:
    tasks = dict.fromkeys(row.task for row in rows)
    known = {task: envs.references(task, recipe.horizon) for task in tasks if recipe.backend == "gymnasium"}
    played = ", ".join(f"{name} {versions()[name]}" for name in SIMULATOR if name in versions())
    references: Any = {task: {**reference, "simulator": played} for task, reference in known.items() if reference}
    confidence: Any = recipe.confidence.model_dump()
    told: dict[str, Any] = {} if recipe.horizon is None else {"horizon": recipe.horizon}
    if recipe.backend != "gymnasium":
        told["backend"] = recipe.backend
    table = score_table(rows, references=references, aggregates=recipe.aggregate, **confidence)
    return {
        "table": [record | told for record in table],
        "aggregate": aggregate_table(rows, references=references, aggregates=recipe.aggregate, **confidence),
        "pairwise": pairwise(rows, baseline=baseline, **confidence),
        "runs": run_table(rows, references=references, **confidence),
    }


def _estimates(run: Path) -> dict[int, OfflineEstimate]:
    """What a finished run of fitted Q evaluation expects of its policies, by seed; nothing of other runs."""
    record = read_json(run / "run.json") or {}
    try:
        gamma, values = float(record["recipe"]["algorithm"]["gamma"]), record["metrics"]["estimate"]
        return {seed: OfflineEstimate(x, gamma) for seed, x in zip(record["seeds"], values, strict=True)}
    except (KeyError, TypeError, ValueError):
        return {}


def _write_tables(recipe: EvaluateRecipe, rows: list[EpisodeResult], tables: dict[str, Any]) -> list[str]:
    out, confidence = recipe.out, recipe.confidence.model_dump()
    write_atomically(out / "table.csv", to_csv(tables["table"]).encode())
    write_atomically(out / "table.md", as_text(tables, "markdown").encode())
    curves = plot_curves(rows, out / "curves.png", **confidence)
    plots = [plot_scores(tables["table"], out / "scores.png"), curves]
    return [str(plot) for plot in plots if plot]


def as_text(result: dict[str, Any], form: str) -> str:
    """The tables of a result: "markdown" has all of them, "csv" the score table alone."""
    if form == "csv":
        return to_csv(result["table"])
    return "\n".join(to_markdown(result[name], title) for name, title in TABLES.items() if result.get(name))


def render(result: dict[str, Any], console: Console) -> None:
    """Print the tables (single runs left to the files), and where the files are."""
    for name, title in TABLES.items():
        if result.get(name) and name != "runs":  # one of an earlier version may lack a table
            console.print(to_rich(result[name], title))
    for name in ("rows", *(["plots"] if result["plots"] else [])):
        places = [result[name]] if isinstance(result[name], str) else result[name]
        console.print(f"{name + ':':8}{' '.join(places)}", markup=False, soft_wrap=True)
