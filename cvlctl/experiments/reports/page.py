"""A report as one HTML page: no file beside it, no network, and nothing that comes from data is markup.

The page's own script is named by its digest in the page's security policy, so that a browser runs no other.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from typing import Any

from cvlctl.experiments.reports import svg
from cvlctl.experiments.reports.cards import Card
from cvlctl.experiments.reports.gather import Evaluation, Found, records_in
from cvlctl.experiments.reports.marks import Figure
from cvlctl.progress import clock
from cvlctl.score.comparisons import sentences
from cvlctl.score.report import TABLES
from cvlctl.score.typeset import html, to_html
from cvlctl.version import __version__

MARK = "<!-- cvlctl report -->"  # in the first line: such a file may be replaced by the next report
FEW_PANELS = 12  # of what training logged: more are shown on a click
_FOLDED = ("pairwise", "runs", "offline")  # tables that are shown on a click
_VERSIONS = ("cvlctl", "python", "torch", "numpy", "zarr", "mujoco", "metaworld", "gymnasium")


def page(found: Found, scored: Sequence[tuple[Evaluation, Sequence[Figure]]], training: Figure | None,
         cards: Sequence[Card], differing: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:  # fmt: skip
    """The page.

    Args:
        scored: evaluations with their figures.
        differing: keys in which the runs' recipes differ, and a row a run: its folder, then the values.
    """
    parts = {
        ("Failures" if _failed(found) else "What is lacking"): _failures(found),
        **{_heading(scored, one): _scores(one, figures) for one, figures in scored},
        "Data": "".join(map(_card, cards)),
        "Training": _training(training) if training else "",
        "What was run": _run(found, differing),
    }
    parts = {name: body for name, body in parts.items() if body}
    links = "".join(f'<a href="#s{i}">{html(name)}</a>' for i, name in enumerate(parts))
    sections = "".join(f'<section id="s{i}"><h2>{html(name)}</h2>{body}</section>'
                       for i, (name, body) in enumerate(parts.items()))  # fmt: skip
    script = _file("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!doctype html>{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html(found.title)}: report</title><style>{_file('page.css')}{_file('figures.css')}</style></head>"
        f"<body><main><header><h1>{html(found.title)}</h1><p class=\"sub\">{html(_summary(found))}</p>"
        f"<nav>{links}</nav></header>{sections}"
        f"<footer>Written by cvlctl {__version__} on {time.strftime('%d %B %Y, %H:%M')}. "
        "Click a table's heading to sort by it; hover over a figure for its numbers.</footer></main>"
        f"<script>{script}</script></body></html>\n"
    )  # fmt: skip


def _file(name: str) -> str:
    return resources.files("cvlctl.experiments.reports").joinpath(name).read_text()


def _heading(scored: Sequence[tuple[Evaluation, Sequence[Figure]]], one: Evaluation) -> str:
    return "Scores" if len(scored) == 1 else f"Scores: {one.out}"


def _summary(found: Found) -> str:
    rows = [row for evaluation in found.evaluations for row in evaluation.rows]
    counts = [
        _count(len(found.cells), "cell"),
        _count(len({row.task for row in rows}), "task"),
        _count(len({row.algorithm for row in rows}), "method"),
        _count(len({(row.algorithm, row.task, row.seed) for row in rows}), "policy", "policies"),
        _count(len(rows), "episode"),
    ]
    seconds = [row["seconds"] for row in found.cells if row.get("seconds") is not None]
    about = f"{clock(sum(seconds))} of work" if seconds else ""
    return " · ".join([*(text for text in counts if not text.startswith("0 ")), *([about] if about else [])])


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _failed(found: Found) -> list[dict[str, Any]]:
    return [row for row in found.cells if row["state"] in ("failed", "blocked", "stopped")]


def _failures(found: Found) -> str:
    failed = _failed(found)
    left = [row for row in found.cells if row["state"] in ("waiting", "running")]
    parts = []
    if failed:
        rows = [[row["cell"], row["state"], row["why"]] for row in failed]
        parts.append(_table(("cell", "state", "why"), rows, wide=2))
        parts += [f"<details><summary>the end of what {html(row['cell'])} said</summary><pre>{_lines(row['log'])}</pre>"
                  "</details>" for row in failed if row["log"]]  # fmt: skip
    gaps = [*found.gaps, *([f"{_count(len(left), 'cell')} of {len(found.cells)} not run yet"] if left else [])]
    if gaps:
        listed = "".join(f"<li>{html(gap)}</li>" for gap in gaps[:50])
        more = f"<li>and {len(gaps) - 50} more</li>" if len(gaps) > 50 else ""
        parts.append(f'<div class="warn"><ul>{listed}{more}</ul></div>')
    return "".join(parts)


def _scores(evaluation: Evaluation, figures: Sequence[Figure]) -> str:
    if not evaluation.tables:
        return f"<p>No scores: {html(evaluation.problem or 'no episode has been played')}.</p>"
    drawn = {figure.name.rpartition("-")[2]: figure for figure in figures}
    tables, parts = evaluation.tables, list[str]()
    said = "".join(f"<li>{html(text)}</li>" for text in sentences(tables["comparison"]))
    parts.append(f'<ul class="said">{said}</ul>' if said else "")
    for name, title in TABLES.items():
        if tables.get(name):
            table = to_html(tables[name])
            heading = title[0].upper() + title[1:] if name != "table" else ""  # the section's own
            parts.append(
                f"<details><summary>{heading} ({len(tables[name])} rows)</summary>{table}</details>"
                if name in _FOLDED
                else f"{f'<h3>{heading}</h3>' if heading else ''}{table}"
            )
        for after, figure in (("table", "scores"), ("table", "bars"), ("aggregate", "profiles")):
            if after == name and figure in drawn:
                parts.append(_figure(drawn[figure]))
    if "learning" in drawn:
        parts.append(f"<h3>Learning curves</h3>{_figure(drawn['learning'])}")
    if videos := tables.get("videos"):
        listed = "".join(f"<li>{html(video['path'])}</li>" for video in videos)
        parts.append(f"<details><summary>Videos ({len(videos)} files)</summary><ul>{listed}</ul></details>")
    return "".join(parts)


def _figure(figure: Figure) -> str:
    names = "".join(f'<li><i class="{svg.kind(colour)}"></i>{html(name)}</li>' for name, colour in figure.legend)
    legend = f'<ul class="legend">{names}</ul>' if names else ""
    panels = "".join(map(svg.of_panel, figure.panels))
    about = f"<figcaption>{html(figure.caption)}</figcaption>" if figure.caption else ""
    return f'<figure>{legend}<div class="panels">{panels}</div>{about}</figure>'


def _training(figure: Figure) -> str:
    if len(figure.panels) <= FEW_PANELS:
        return _figure(figure)
    return f"<details><summary>{len(figure.panels)} panels of what training logged</summary>{_figure(figure)}</details>"


def _card(card: Card) -> str:
    problem = f'<div class="warn">{html(card.problem)}</div>' if card.problem else ""
    more = f"<details><summary>Provenance</summary>{_facts(card.provenance)}</details>" if card.provenance else ""
    figure = _figure(card.figure) if card.figure else ""
    frames = base64.b64encode(card.frames).decode()
    seen = f'<figure><img class="frames" alt="frames" src="data:image/png;base64,{frames}"></figure>' if frames else ""
    return f"<h3>{html(card.path)}</h3>{problem}{_facts(card.facts)}{seen}{figure}{more}"


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    listed = "".join(f"<dt>{html(name)}</dt><dd>{html(text)}</dd>" for name, text in facts)
    return f'<dl class="facts">{listed}</dl>'


def _run(found: Found, differing: tuple[Sequence[str], Sequence[Sequence[str]]]) -> str:
    parts = [f"<p><code>{html(found.command)}</code></p>"] if found.command else []
    rows = [[row["cell"], row["command"], row["state"], row["size"],
             (clock(row["seconds"]) if row["seconds"] is not None else "-", row["seconds"]),
             " ".join(str(row[name]) for name in ("host", "engine", "job") if row.get(name))]
            for row in found.cells]  # fmt: skip
    heads = ("cell", "command", "state", "size", "wall time", "where")
    many = len(rows) > 30
    table = _table(heads, rows, numbers=(4,))
    parts.append(f"<details><summary>All {len(rows)} cells</summary>{table}</details>" if many else table)
    keys, values = differing
    if keys and not found.source:
        table = _table(("run", *keys), values)
        parts.append(f"<details><summary>What differs between the runs' recipes</summary>{table}</details>")
    parts.append(f"<h3>Versions</h3>{_table(('', *_VERSIONS, 'results'), _versions(found), fixed=True)}")
    if found.source:
        parts.append(f"<details><summary>The experiment's file</summary><pre>{_lines(found.source)}</pre></details>")
    commands = "".join(f"{html(line)}\n" for line in _commands(found))
    parts.append(f"<details><summary>The cells' commands</summary><pre>{commands}</pre></details>" if commands else "")
    return "".join(parts)


def _commands(found: Found) -> Iterator[str]:
    """What each cell's process was started with, where an engine has noted it."""
    for row in found.cells:
        if row.get("recipe"):
            yield f"cvlctl {row['command']} {row['recipe']}"


def _versions(found: Found) -> list[list[Any]]:
    """A row for each set of versions, and host, with how many results are of it."""
    counts: dict[tuple[str, ...], int] = {}
    for record in records_in(found):
        told, where = record.get("versions"), record.get("where")
        if isinstance(told, dict):
            host = where.get("host") if isinstance(where, dict) else record.get("host")
            key = (str(host or "-"), *(str(told.get(name, "-")) for name in _VERSIONS))
            counts[key] = counts.get(key, 0) + 1
    return [[*key, str(number)] for key, number in counts.items()]


def _table(heads: Iterable[str], rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = (), wide: int | None = None,
           fixed: bool = False) -> str:  # fmt: skip
    """A table of texts; of columns in `numbers` (text, value) pairs; `wide`: one whose lines break."""
    kinds = dict.fromkeys(numbers, ' class="n"') | ({wide: ' class="wrap"'} if wide is not None else {})
    head = "".join(f'<th scope="col"{kinds.get(i, "")}>{html(name)}</th>' for i, name in enumerate(heads))
    lines = []
    for row in rows:
        cells = [(text, "") if not isinstance(text, tuple) else (text[0], _sortable(text[1])) for text in row]
        lines.append(
            "".join(f"<td{kinds.get(i, '')}{value}>{html(text)}</td>" for i, (text, value) in enumerate(cells))
        )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    kind = ' class="fixed"' if fixed else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _sortable(value: float | None) -> str:
    return "" if value is None else f' data-v="{value!r}"'


def _lines(text: str) -> str:
    return "\n".join(html(line) for line in text.splitlines())
