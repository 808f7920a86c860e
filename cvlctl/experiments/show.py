"""What people see of an experiment: its plan, and at its end scores, where everything lies, and what failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl.experiments.engines import on_slurm
from cvlctl.experiments.engines.start import LOG, last_lines
from cvlctl.experiments.graph import folder_of
from cvlctl.experiments.plan import LEFT, in_all, rough, threads_of
from cvlctl.progress import clock
from cvlctl.recipes.matrix import text_of
from cvlctl.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

WHOLE = 200  # cells of a plan that each have a line
MANY = 20  # cells beyond that are told of by their number


def render(result: dict[str, Any], console: Console) -> None:
    """Print the plan, or the scores, where everything lies, and what failed."""
    if result["status"] in ("planned", "submitted"):
        if result["status"] == "planned":
            _render_plan(result, console)
        for line in on_slurm.lines(result, result["status"] == "planned") if "arrays" in result else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    for scored in result["scores"]:
        from cvlctl.score import evaluate  # and scipy, which a plan need not wait for

        evaluate.render(scored, console)
    for name, commands in (("stores", ("build-dataset",)), ("runs", ("pretrain", "finetune"))):
        done = [row for row in result["cells"] if row["command"] in commands and row["state"] == "finished"]
        for row in done if len(done) <= MANY else ():
            about = _store_facts(row) if name == "stores" else ""
            console.print(f"{name + ':':8}{row['out']}{about}", markup=False, soft_wrap=True)
        if len(done) > MANY:
            console.print(f"{name + ':':8}{len(done)} under {result['out']}", markup=False, soft_wrap=True)
    console.print(f"time:   {_times(result)}", markup=False, soft_wrap=True)
    if result["status"] == "failed":
        _render_failures(result, console)


def _render_plan(result: dict[str, Any], console: Console) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table, many = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), len(result["cells"]) > WHOLE
    for heading in ("stage", "cells", "state") if many else ("stage", "of", "out", "state", "size"):
        table.add_column(heading, overflow="fold")
    table.add_column("about", justify="right", no_wrap=True)
    for texts in _stages_of(result["cells"]) if many else _cells_of(result):
        table.add_row(*map(Text, texts))
    print_table(console, table, key=0 if many else 2)
    if many:
        console.print("every cell: --json; fewer of them: --only 'stage=... KEY=...'", markup=False, soft_wrap=True)
    console.print(f"out: {result['out']}", markup=False, soft_wrap=True)
    console.print(f"to do: {in_all(result['cells'], result['at_once'])}", markup=False, soft_wrap=True)
    refused = [row["refused"] for row in result["cells"] if row.get("refused")]
    for what, _ in refused[:MANY]:
        console.print(f"refused: {what}", markup=False, soft_wrap=True)
    if len(refused) > MANY:
        console.print(f"refused: {len(refused) - MANY} more", markup=False, soft_wrap=True)
    if refused:
        console.print(f"hint: {refused[0][1]}", markup=False, soft_wrap=True)
    for line in threads_of(result["cells"]):
        console.print(line, markup=False, soft_wrap=True)


def _cells_of(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in result["cells"]:
        of = " ".join(text_of(value).split("/")[-1] for value in row["combination"].values())
        out = row["out"].removeprefix(result["out"].rstrip("/") + "/")
        about = rough(row["estimate_seconds"]) if row["state"] in LEFT else ""
        yield f"{row['stage']}: {row['command']}", of, out, row["state"], row["size"], about


def _stages_of(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """Of many cells a line for each stage: how many are in which state, and how long what is left takes in all."""
    for stage in dict.fromkeys(row["stage"] for row in cells):
        rows = [row for row in cells if row["stage"] == stage]
        states = Counter(row["state"] for row in rows)
        left = [row["estimate_seconds"] for row in rows if row["state"] in LEFT]
        about = rough(sum(left)) if left else ""
        yield (
            f"{stage}: {rows[0]['command']}",
            f"{len(rows):,}",
            ", ".join(f"{n:,} {s}" for s, n in states.items()),
            about,
        )


def _render_failures(result: dict[str, Any], console: Console) -> None:
    """What failed, with its last lines; what waits for it; and how to go on."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("cell", "", "why"):
        table.add_column(heading, overflow="fold")
    for row in result["cells"]:
        if row["state"] != "finished":
            table.add_row(*map(Text, (row["cell"], row["state"], row.get("error", "") or "")))
    print_table(console, table)
    for row in [row for row in result["cells"] if row["state"] == "failed"][:5]:
        if row.get("refused"):  # it did not run: its log is of another time
            console.print(f"{row['cell']}: hint: {row['hint']}", markup=False, soft_wrap=True)
            continue
        folder = folder_of(Path(result["out"]), row["cell"])
        console.print(f"{row['cell']}, the end of {folder / LOG}:", markup=False, soft_wrap=True)
        lines = last_lines(folder).splitlines()
        for line in lines:
            console.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)
        if row.get("hint") and f"hint: {row['hint']}" not in lines:  # of a process that could not say it
            console.print(f"    hint: {row['hint']}", markup=False, soft_wrap=True)
    if any(row["state"] in ("failed", "stopped") and not row.get("refused") for row in result["cells"]):
        console.print("the same command runs what is missing or failed", markup=False)


def _times(result: Mapping[str, Any]) -> str:
    """Where the time of this call went: "1m50s: data 20s, finetune cvl 1m30s"; what was finished before took none."""
    rows = result["cells"]
    worked = [row for row in rows if row.get("seconds") is not None]
    if not worked:
        return "none, nothing was started" if result["status"] == "failed" else "none, all was finished already"
    total = f"{clock(result['seconds'])} in all"
    if len(worked) > MANY:
        return f"{total}, {clock(sum(row['seconds'] for row in worked))} of {len(worked)} cells"
    return f"{total}: " + ", ".join(f"{_shortest(row, rows)} {clock(row['seconds'])}" for row in worked)


def _shortest(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The stage's name, and of its combination what tells its cells apart."""
    same = [other["combination"] for other in rows if other["stage"] == row["stage"]]
    own = {key: value for key, value in row["combination"].items() if any(one[key] != value for one in same)}
    return " ".join([row["stage"], *(text_of(value).split("/")[-1] for value in own.values())])


def _store_facts(row: Mapping[str, Any]) -> str:
    """What a store's episodes achieve; beside a normalised score what it is of."""
    about, facts = row.get("result") or {}, []
    if about.get("return_mean") is not None:
        facts.append(f"return {about['return_mean']:.4g}")
    if about.get("success_rate") is not None:
        facts.append(f"success {about['success_rate']:.1%}")
    if about.get("normalised") is not None:
        facts.append(f"normalised {about['normalised']:.1f} on {about['environment']}")
    return f"  {', '.join(facts)}" if facts else ""
