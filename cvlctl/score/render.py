"""Score tables for people and programs: rich, Markdown, CSV. Nothing is computed here.

Whatever shows a score shows how sure it is, and of how many seeds; notes below say what its intervals mean.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from cvlctl.figures import short_names
from cvlctl.score.rows import METRICS, Record
from cvlctl.terminal import visible

NAMES = {
    "task": "task",
    "of": "settings",
    "chosen": "chosen offline",
    "algorithm": "algorithm",
    "baseline": "against",
    "metric": "metric",
}
_COUNTS = {
    "seed": "seed",
    "updates": "updates",
    "tried": "tried",
    "tasks": "tasks",
    "runs": "seeds",
    "episodes": "episodes",
}
_SCORES = {"return_mean": "return", "success_mean": "success", "normalised_mean": "normalised"}
_OFFLINE = {"offline_mean": "offline estimate", "discounted_mean": "discounted return"}
_AGGREGATES = {"iqm": "IQM", "mean": "mean", "median": "median", "optimality_gap": "optimality gap"}
_COMPARISONS = {"difference": "difference", "probability_of_improvement": "P(better)"}
_RELATIVE = {f"{metric}_over": f"{metric}, % over" for metric in METRICS}
_TUNED = {"return_tuned": "return of the best", "success_tuned": "success of the best"}


def to_rich(records: Sequence[Record], title: str = "") -> Table:
    """A table of any of the records of `tables`; the best of each task is bold. Readable in 100 columns."""
    table = Table(title=title or None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
    table.caption, table.caption_justify, table.caption_style = "\n".join(notes(records)), "left", "dim"
    shown, best = columns(records), best_of(records)
    for key, heading, _ in shown:
        # long names break at hyphens, underscores and spaces; in a narrow window the intervals wrap, never the names
        fixed = key in NAMES or key in _COUNTS
        table.add_column(heading, no_wrap=fixed, overflow="fold", justify="left" if key in NAMES else "right")
    for i, record in enumerate(records):
        texts = ["\n".join(folded(cells[i], 18)) if key in NAMES else cells[i] for key, _, cells in shown]
        if i > 0 and record.get("task") != records[i - 1].get("task"):
            table.add_section()
        elif i > 0 and "task" in record:
            texts[0] = ""
        styles = ["bold" if (i, key) in best else "" for key, _, _ in shown]
        table.add_row(*map(Text, texts, styles))
    return table


def to_markdown(records: Sequence[Record], title: str = "") -> str:
    """A Markdown table, its best scores bold, its notes below."""
    shown, best = columns(records), best_of(records)
    lines = [f"### {title}", ""] if title else []
    lines += ["| " + " | ".join(heading for _, heading, _ in shown) + " |"]
    lines += ["|" + "|".join(" --- " if key in NAMES else " ---: " for key, _, _ in shown) + "|"]
    for i in range(len(records)):
        texts = [(markdown(cells[i]), (i, key) in best) for key, _, cells in shown]
        lines.append("| " + " | ".join(f"**{text}**" if bold else text for text, bold in texts) + " |")
    return "\n".join([*lines, "", *(markdown(note) + "  " for note in notes(records))]).rstrip() + "\n"


def markdown(text: str) -> str:
    """Text out of files on one line of Markdown: it ends no cell, opens no HTML, and shows its control characters."""
    return visible(text.replace("\n", " ")).replace("|", r"\|").replace("<", "&lt;")


def to_csv(records: Sequence[Record]) -> str:
    """Every key of the records, one line each; lists are joined by semicolons, None is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({k: ";".join(map(str, v)) if isinstance(v, list) else v for k, v in record.items()})
    return file.getvalue()


def folded(name: str, width: int) -> list[str]:
    """Lines of at most `width`, broken after hyphens, underscores, dots and spaces, never within a word."""
    lines = [""]
    for piece in re.findall(r"[^-_. ]+[-_. ]?|[-_. ]", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def columns(records: Sequence[Record]) -> list[tuple[str, str, list[str]]]:
    """(key, heading, cells), without the columns that are empty throughout."""
    short = short_names([record["task"] for record in records if "task" in record])
    found = []
    for key, heading in (
        NAMES | _COUNTS | _SCORES | _OFFLINE | _AGGREGATES | _COMPARISONS | _RELATIVE | _TUNED
    ).items():
        if any(record.get(key) is not None for record in records):
            plain = key in NAMES or key in _COUNTS
            cells = [
                ("-" if r.get(key) is None else str(short.get(r[key], r[key]))) if plain else cell(r, key)
                for r in records
            ]
            found.append((key, heading, cells))
    return found or [("", "nothing to show", [])]


def cell(record: Record, key: str) -> str:
    """An estimate as the tables show it: "2840 [2681, 2963]"."""
    value, low, high = (record.get(key + end) for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    if key in _RELATIVE:
        text, *interval = (f"{x:+.0f}%".replace("-0%", "+0%") for x in (value, low, high) if x is not None)
        return _sure(text, [x.removesuffix("%") for x in interval], record)
    percent = (
        key in ("success_mean", "success_tuned", "probability_of_improvement") or record.get("metric") == "success"
    )
    # one number of digits a cell: percents whole, returns above 100 whole, the rest by their size
    size = max(abs(x) for x in (value, low, high) if x is not None)
    digits = 0 if percent or size > 100 else 1 if size > 1 else 3
    shown = [round(100 * x if percent else x, digits) + 0.0 for x in (value, low, high) if x is not None]  # no -0
    text, *interval = (f"{x:.{digits}f}" for x in shown)
    text += "%" * percent
    if key == "probability_of_improvement" and len(set(interval)) == 1:
        interval = []  # nothing left to resample
    return _sure(text, interval, record)


def _sure(text: str, interval: Sequence[str], record: Record) -> str:
    """A score with how sure it is."""
    if interval:
        return f"{text} [{', '.join(interval)}]"
    return f"{text} (1 run)" if 1 in (record.get("runs"), record.get("baseline_runs")) else text


def best_of(records: Sequence[Record]) -> set[tuple[int, str]]:
    """(number of a record, key) of the best scores of each task, where there are several."""
    found = set()
    for key in _SCORES | _OFFLINE | _AGGREGATES:
        groups: dict[Any, list[int]] = {}
        for i, record in enumerate(records):
            if record.get(key) is not None and "seed" not in record:
                groups.setdefault(record.get("task"), []).append(i)
        for group in (group for group in groups.values() if len(group) > 1):
            best = (min if key == "optimality_gap" else max)(records[i][key] for i in group)
            found |= {(i, key) for i in group if records[i][key] == best}
    return found


def notes(records: Sequence[Record]) -> list[str]:
    """What the numbers of a table mean, and where they say little."""
    if not records:
        return []
    level = f"in brackets: {100 * records[0].get('level', 0.95):g}% interval"
    if "seed" in records[0]:
        return [f"{level} over one policy's episodes (Wilson's for success); it says nothing of other seeds"]
    runs = [record[key] for record in records for key in ("runs", "baseline_runs") if key in record]
    seeds = "bootstrap over seeds, which all meet the same starts; each run's last checkpoint"
    found = [f"{level}, {seeds}" if max(runs, default=2) > 1 else "one seed: no intervals"]
    if any(1 < num < 5 for num in runs):
        found.append("fewer than five seeds: the intervals are narrower than the truth")
    found += dict.fromkeys(
        f"offline: the discounted return (gamma {r['gamma']:g}) that fitted Q evaluation expects, from the store alone"
        for r in records
        if "gamma" in r
    )
    found += dict.fromkeys(f"episodes cut off at {r['horizon']} steps" for r in records if "horizon" in r)
    found += dict.fromkeys(
        f"simulated by {r['backend']}: the starts are not those of gymnasium's episodes"
        for r in records
        if "backend" in r
    )
    found += _of_relative(records) + _of_tuning(records)
    found += dict.fromkeys(_reference(r) for r in records if r.get("reference_min") is not None)
    found += [f"{r['algorithm']} on {r['task']}: seeds end at unequal steps" for r in records if r.get("uneven_steps")]
    return found + [f"{r['algorithm']}: too few runs on {', '.join(r['missing'])}" for r in records if r.get("missing")]


def _of_relative(records: Sequence[Record]) -> list[str]:
    """Where a percentage says little, or could not be told."""
    records = [record for record in records if "small_base" in record]
    small: list[str] = []
    unsure: list[str] = []
    for record in records:
        place = f"{record['baseline']} on {record['task'].rsplit('/', 1)[-1]}"
        known = [metric for metric in METRICS if record.get(f"{metric}_over") is not None]
        resampled = record["runs"] > 1 < record["baseline_runs"]
        unbounded = [metric for metric in known if resampled and record[f"{metric}_over_low"] is None]
        small += [f"{place} ({', '.join(record['small_base'])})"] if record["small_base"] else []
        unsure += [f"{place} ({', '.join(unbounded)})"] if unbounded else []
    texts = {
        "near random actions, and a percentage over next to nothing says little": small,
        "no interval, since as far as its seeds go the base may be 0 or less": unsure,
    }
    return [f"{text}: {', '.join(dict.fromkeys(places))}" for text, places in texts.items() if places]


def _of_tuning(records: Sequence[Record]) -> list[str]:
    if not any("tried" in record for record in records):
        return []
    notes = [
        "tried: so many of the settings, drawn at random; what one seed's half of the episodes chooses is scored by"
        " the other half of the other seeds' (of one seed: its own)"
    ]
    if any(record["tried"] and record["runs"] == 2 for record in records):
        notes.append("two seeds make one pair to choose and to score: no intervals of the best")
    if any(not record["tried"] for record in records):
        notes.append("tried 0: the setting that fitted Q evaluation's estimate prefers, by all of its episodes")
    return notes


def _reference(record: Record) -> str:
    """What 0 and 100 of the normalised score are: a table without its floor can hide that random actions do as well."""
    low, high = f"{record['reference_min']:.0f}", f"{record['reference_max']:.0f}"
    if record["random_success"] is not None and record["scripted_success"] is not None:
        low += f" (random actions, {record['random_success']:.0%} success)"
        high += f" (scripted expert, {record['scripted_success']:.0%})"
    played = f" ({record['simulator']})" if record.get("simulator") else ""
    return f"{record['task'].rsplit('/', 1)[-1]}{played}: normalised 0 is return {low}, 100 is {high}"
