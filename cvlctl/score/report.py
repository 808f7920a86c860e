"""What an evaluation shows: tables and pictures of its rows, in files and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cvlctl.errors import CvlctlError
from cvlctl.files import read_json, write_atomically
from cvlctl.play import envs
from cvlctl.recipes.explain import nearest
from cvlctl.score.comparisons import comparison_table, relative_table, sentences
from cvlctl.score.find_runs import Checkpoint
from cvlctl.score.pictures import plot_curves, plot_profiles, plot_scores
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.render import to_csv, to_markdown, to_rich
from cvlctl.score.rows import with_failures
from cvlctl.score.tables import (
    OfflineEstimate,
    aggregate_table,
    curve_table,
    efficiency_table,
    offline_table,
    pairwise,
    profile_table,
    run_table,
    score_table,
)
from cvlctl.score.tuning import tuning_table
from cvlctl.score.typeset import to_latex
from cvlctl.types import EpisodeResult
from cvlctl.version import versions

if TYPE_CHECKING:
    from rich.console import Console

SIMULATOR = ("mujoco", "metaworld", "gymnasium")  # physics, and with them scores, differ between versions
TABLES = {
    "table": "scores", "aggregate": "over all tasks", "pairwise": "against the baseline",
    "relative": "per cent over the baseline", "offline": "offline estimates", "tuning": "tuning budget",
    "curves": "over training", "runs": "single runs",
}  # fmt: skip

NOTHING: Mapping[str, Any] = MappingProxyType({})

Estimates = Mapping[tuple[str, str, int], OfflineEstimate]  # of (algorithm, task, seed)


def report(
    recipe: EvaluateRecipe,
    rows: Sequence[EpisodeResult],
    estimates: Estimates,
    baseline: str,
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """Write tables and pictures of `rows`; returns the number of episodes, the pictures' paths, and the tables."""
    rows = with_failures(rows)
    tables = tables_of(recipe, rows, estimates, baseline, record)
    return {"episodes": len(rows), "plots": _write_tables(recipe, list(rows), tables), **tables}


def baseline_of(recipe: EvaluateRecipe, names: Sequence[str]) -> str:
    """What the others are compared to. CvlctlError where the recipe names a run that is not there."""
    if recipe.baseline is not None and recipe.baseline not in names:
        raise CvlctlError(f"baseline: no run is called {recipe.baseline!r}", nearest(recipe.baseline, names, "names"))
    return recipe.baseline or "bc"


def estimates_of(found: Sequence[Checkpoint], labels: Mapping[Path, str]) -> Estimates:
    """What finished runs of fitted Q evaluation expect of their policies."""
    return {
        (labels[checkpoint.run], checkpoint.task, seed): estimate
        for checkpoint in found
        for seed, estimate in estimates_in(checkpoint.run).items()
    }


def estimates_in(run: Path) -> dict[int, OfflineEstimate]:
    """What a finished run of fitted Q evaluation expects of its policies, by seed; nothing of other runs."""
    record = read_json(run / "run.json") or {}
    try:
        gamma, values = float(record["recipe"]["algorithm"]["gamma"]), record["metrics"]["estimate"]
        return {seed: OfflineEstimate(x, gamma) for seed, x in zip(record["seeds"], values, strict=True)}
    except (KeyError, TypeError, ValueError):
        return {}


def tables_of(
    recipe: EvaluateRecipe,
    rows: Sequence[EpisodeResult],
    estimates: Estimates,
    baseline: str,
    record: Mapping[str, Any] = NOTHING,
) -> dict[str, Any]:
    """All tables of an evaluation, as lists of records, by the names that its result has.

    Args:
        record: in evaluation.json; of what it says the environments and references count.
    """
    rows = with_failures(rows)
    tasks = dict.fromkeys(row.task for row in rows) if recipe.backend == "gymnasium" else {}
    known = {task: _reference(task, recipe, record) for task in tasks}
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
        "relative": relative_table(rows, baseline=baseline, references=references, **confidence),
        "comparison": comparison_table(rows, baseline=baseline, **confidence),
        "profiles": profile_table(rows, references=references, **confidence),
        "efficiency": efficiency_table(rows, references=references, **confidence),
        "curves": curve_table(rows, **confidence),
        "runs": run_table(rows, references=references, **confidence),
        "offline": offline_table(rows, estimates, **confidence),
        "tuning": tuning_table(rows, recipe.tuning, estimates, **confidence),
    }


def _reference(task: str, recipe: EvaluateRecipe, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The reference returns of a task: as the record says, else those of a built-in one that was played as it is."""
    kept = record.get("references", {}).get(task)
    return kept or (None if task in record.get("environments", {}) else envs.references(task, recipe.horizon))


def _write_tables(recipe: EvaluateRecipe, rows: list[EpisodeResult], tables: dict[str, Any]) -> list[str]:
    out, confidence = recipe.out, recipe.confidence.model_dump()
    write_atomically(out / "table.csv", to_csv(tables["table"]).encode())
    write_atomically(out / "table.md", as_text(tables, "markdown").encode())
    if tables["curves"]:
        write_atomically(out / "curves.csv", to_csv(tables["curves"]).encode())
    curves = plot_curves(rows, out / "curves.png", **confidence)
    profiles = plot_profiles(tables["profiles"], tables["efficiency"], out / "profiles.png")
    plots = [plot_scores(tables["table"], out / "scores.png"), curves, profiles]
    return [str(plot) for plot in plots if plot]


def as_text(result: dict[str, Any], form: str) -> str:
    """The tables of a result: "markdown" and "latex" have all of them, "csv" the score table alone."""
    if form == "csv":
        return to_csv(result["table"])
    if form == "latex":
        return "\n".join(to_latex(result[name], title) for name, title in TABLES.items() if result.get(name))
    texts = [to_markdown(result[name], title) for name, title in TABLES.items() if result.get(name)]
    told = [f"* {sentence}\n" for sentence in sentences(result.get("comparison", []))]
    return "\n".join([*texts, *(["".join(told)] if told else [])])


def can_be_shown(result: dict[str, Any]) -> bool:
    """Whether `result`, as it was read from a file, has what people and programs are shown of it."""
    try:
        as_text(result, "csv"), as_text(result, "markdown")
        paths = [*result["plots"], *(video["path"] for video in result.get("videos", ()))]
        return type(result["episodes"]) is int and all(isinstance(path, str) for path in paths)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
        return False


def render(result: dict[str, Any], console: Console) -> None:
    """Print the tables (single runs left to the files), and where the files are."""
    for name, title in TABLES.items():
        if result.get(name) and name != "runs":  # one of an earlier version may lack a table
            console.print(to_rich(result[name], title))
    for sentence in sentences(result.get("comparison", [])):
        console.print(sentence, markup=False, highlight=False)
    videos = [video["path"] for video in result.get("videos", ())]
    for name, places in {"rows": [result["rows"]], "plots": result["plots"], "videos": videos}.items():
        if places:
            console.print(f"{name + ':':8}{' '.join(places)}", markup=False, soft_wrap=True)
