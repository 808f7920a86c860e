"""`cvlctl report`: gather, draw, write."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl.errors import CvlctlError
from cvlctl.experiments.compare import differences, in_short
from cvlctl.experiments.reports import figures, png, svg
from cvlctl.experiments.reports.cards import MOST_FIGURES, card
from cvlctl.experiments.reports.gather import Evaluation, Found, of_experiment, of_folders, run_of
from cvlctl.experiments.reports.marks import Figure, colours
from cvlctl.experiments.reports.page import MARK, page
from cvlctl.figures import can_draw
from cvlctl.files import check_place, open_regular, read_json, real, write_atomically
from cvlctl.folders import replacing
from cvlctl.progress import Progress
from cvlctl.runs import read_metrics
from cvlctl.score.render import to_csv, to_markdown
from cvlctl.score.report import TABLES
from cvlctl.score.typeset import to_latex

if TYPE_CHECKING:
    from rich.console import Console

MOST_DRAWN = 24  # panels of a PNG: no slide holds more, and matplotlib takes a minute for hundreds
MOST_KEYS = 12  # of recipes, in the table of what differs
MANIFEST, KIND = "report.json", "cvlctl-report"  # in the folder of figures: it is ours, and may be replaced


def report(
    places: Sequence[str], out: Path = Path("report.html"), *, figures_in: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Write the report of an experiment (its file, then KEY=VALUE overrides), or of folders with results.

    Args:
        out: the page.
        figures_in: the folder of its figures and tables as files; None: `out`'s name with "-figures", beside it.
        force: replace files at `out` that are no reports.

    Returns:
        status, out, bytes, figures (the folder), files (in it), cells, runs, evaluations, stores (how many), and gaps:
        what the report lacks, a sentence each.

    Raises:
        CvlctlError: there is nothing to report of, or something else is where it would be written.
    """
    if not out.name:
        raise CvlctlError(f"{out} is no name of a file", "choose another --out, such as report.html")
    folder = figures_in if figures_in is not None else out.with_name(f"{out.stem}-figures")
    _check(out, folder, force)
    found = _found(places)
    labels = {run: label for one in found.evaluations for run, label in _labels(one)}
    names = {out: _name(labels, out, run) for out, run in found.runs.items()}
    rows = [row for one in found.evaluations for row in one.rows]
    named = colours([*(row.algorithm for row in rows), *names.values()])
    scored = [(one, _figures_of(one, named, len(found.evaluations) > 1)) for one in found.evaluations]
    training = _training(found, names, named)
    cards = [card(path, digests, draw=i < MOST_FIGURES) for i, (path, digests) in enumerate(found.stores.items())]
    gaps = [*found.gaps, *(f"{one.path}: {one.problem}" for one in cards if one.problem)]
    found = found._replace(gaps=gaps)
    written = page(found, scored, training, cards, _differing(found)).encode()
    drawn = [figure for _, several in scored for figure in several]
    drawn += [training] if training else []
    drawn += [one.figure for one in cards if one.figure]
    files = _write_files(folder, found, drawn)
    write_atomically(real(out), written)
    return {
        "status": "written", "out": str(out), "bytes": len(written), "figures": str(folder), "files": files,
        "cells": len(found.cells), "runs": len(found.runs), "evaluations": len(found.evaluations),
        "stores": len(cards), "gaps": gaps,
    }  # fmt: skip


def render(result: dict[str, Any], console: Console) -> None:
    """Print where the report is, and what it lacks."""
    size = f"{result['bytes'] / 1e6:.1f} MB" if result["bytes"] > 1e5 else f"{result['bytes'] / 1e3:.0f} kB"
    console.print(f"report:  {result['out']} ({size})", markup=False, soft_wrap=True)
    console.print(f"figures: {result['figures']} ({result['files']} files)", markup=False, soft_wrap=True)
    for gap in result["gaps"][:20]:
        console.print(f"lacking: {gap}", markup=False, soft_wrap=True)
    if len(result["gaps"]) > 20:
        console.print(f"lacking: {len(result['gaps']) - 20} more, told of in the page", markup=False)


def _found(places: Sequence[str]) -> Found:
    first = Path(places[0])
    if first.is_file() or first.suffix in (".yaml", ".yml"):
        return of_experiment(first, places[1:])
    wrong = [place for place in places if Path(place).is_file()]
    if wrong:
        raise CvlctlError(f"{wrong[0]} is a file", "an experiment's file comes first and alone; runs are folders")
    return of_folders(places)


def _check(out: Path, folder: Path, force: bool) -> None:
    """Refuse to replace what is no report."""
    place = real(out)
    check_place(place)
    if place.exists() and not (force and place.is_file()):
        if not place.is_file():
            raise CvlctlError(f"{out} is no file", "choose another --out")
        with open_regular(place) as file:
            if MARK.encode() not in file.read(200):
                raise CvlctlError(f"{out} exists, and is no report", "choose another --out, or --force replaces it")
    check_place(real(folder))
    if place in (real(folder), *real(folder).parents):
        raise CvlctlError(f"{out} is the page, and cannot be the folder of its figures", "choose another --figures")
    there = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if there and (read_json(folder / MANIFEST) or {}).get("kind") != KIND:
        raise CvlctlError(f"{folder} holds something else than a report's figures", "choose another --figures")


def _figures_of(evaluation: Evaluation, named: Mapping[str, int], several: bool) -> list[Figure]:
    if not evaluation.tables:
        return []
    tables, confidence = evaluation.tables, evaluation.recipe.confidence.model_dump()
    found = [
        figures.intervals(tables["table"], named),
        figures.bars(tables["table"], named),
        figures.profiles(tables["profiles"], tables["efficiency"], named),
        figures.learning(evaluation.rows, named, **confidence),
    ]
    before = f"{_slug(str(evaluation.out))}-" if several else ""
    return [figure._replace(name=before + figure.name) for figure in found if figure]


def _training(found: Found, names: Mapping[str, str], named: Mapping[str, int]) -> Figure | None:
    """Of the first tasks, as many as there is room for: the logs of others are not even read."""
    tasks, series = {out: _task(run) for out, run in found.runs.items()}, {}
    wanted, left = sorted(found.runs, key=tasks.__getitem__), 0
    panels: set[tuple[str, str]] = set()
    with Progress("report", len(wanted), "runs") as progress:
        for i, out in enumerate(wanted, start=1):
            if len(panels) >= figures.MOST_PANELS and tasks[out] not in {task for task, _ in panels}:
                left += 1
                continue
            with suppress(CvlctlError):  # of a run that has logged nothing yet, or whose log is damaged
                if logged := figures.series_of(read_metrics(Path(out))):
                    series[out] = logged
                    panels |= {(tasks[out], metric) for metric in logged}
            progress.update(i)
    return figures.training(series, tasks, names, named, left) if series else None


def _differing(found: Found) -> tuple[list[str], list[list[str]]]:
    """Keys in which the recipes of runs without an experiment differ, the most telling first, and a row a run."""
    if found.source or len(found.runs) < 2:
        return [], []
    rows = [row for row in differences(list(found.runs.values())) if row["of"] == "recipe"]
    rows = sorted(rows, key=lambda row: sum(value is None for value in row["values"]))[:MOST_KEYS]
    values = [[in_short(row["values"][i]) for row in rows] for i in range(len(found.runs))]
    return [row["key"] for row in rows], [[out, *own] for out, own in zip(found.runs, values, strict=True)]


def _name(labels: Mapping[str, str], out: str, run: Mapping[str, Any]) -> str:
    """What a run is called in the tables; one that no evaluation is of, by its algorithm."""
    return labels.get(os.path.realpath(out)) or str(run.get("algorithm") or run["recipe"].get("label") or "critic")


def _task(run: Mapping[str, Any]) -> str:
    return str(run.get("task") or "")


def _labels(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    for job in evaluation.record["jobs"]:
        yield run_of(job), job["algorithm"]


def _write_files(folder: Path, found: Found, drawn: Sequence[Figure]) -> int:
    """Figures as SVG and PNG, tables as CSV, Markdown and LaTeX. Returns how many files."""
    files: dict[str, bytes] = {}
    for figure in drawn:
        name = _free(figure.name, files)
        files[f"{name}.svg"] = svg.of_figure(figure).encode()
        if can_draw() and len(figure.panels) <= MOST_DRAWN:
            files[f"{name}.png"] = png.drawn(figure)
    for evaluation in found.evaluations:
        before = f"{_slug(str(evaluation.out))}-" if len(found.evaluations) > 1 else ""
        for name, title in TABLES.items():
            if records := evaluation.tables.get(name):
                place = _free(before + {"table": "scores"}.get(name, name), files, "csv")
                files[f"{place}.csv"] = to_csv(records).encode()
                files[f"{place}.md"] = to_markdown(records, title).encode()
                files[f"{place}.tex"] = to_latex(records, title).encode()
    files["cells.csv"] = _cells(found.cells).encode()
    with replacing(folder, folder=True) as inside:
        for name, content in {**files, MANIFEST: _manifest(found, files)}.items():
            (inside / name).write_bytes(content)
    return len(files)


def _manifest(found: Found, files: Mapping[str, bytes]) -> bytes:
    return json.dumps({"kind": KIND, "of": found.title, "files": sorted(files)}, indent=1).encode() + b"\n"


def _cells(cells: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    keys = ("cell", "command", "out", "state", "why", "size", "seconds", "host", "engine", "job")
    writer = csv.DictWriter(file, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells)
    return file.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "x"


def _free(name: str, taken: Mapping[str, bytes], ending: str = "svg") -> str:
    """A name for files that no others have."""
    plain, number = _slug(name), 1
    found = plain
    while f"{found}.{ending}" in taken:
        number += 1
        found = f"{plain}-{number}"
    return found
