"""`cvlctl runs ls | show | rm`: runs and evaluations with their sizes, what one is, and how it is removed.

Removed is what cvlctl wrote, by name; whatever else lies in a folder stays there. Nothing is reached through a link.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvlctl import runs
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import kind_of
from cvlctl.experiments.reports.gather import evaluations_near, results_below
from cvlctl.figures import short_names
from cvlctl.files import lock, read_json
from cvlctl.runs import read_metrics, read_run
from cvlctl.score import kept
from cvlctl.terminal import print_table

if TYPE_CHECKING:
    from rich.console import Console

_RECORD = {"run": "run.json", "evaluation": "evaluation.json"}


def ls(root: Path) -> list[dict[str, Any]]:
    """Runs and evaluations under `root`: path, command, algorithm, task, seeds, status, size_mb, and problem (None: it
    can be read).

    Raises:
        CvlctlError: there is no such directory.
    """
    if not root.is_dir():
        raise CvlctlError(f"no directory {root}", "name the directory that holds the runs")
    return [_row(kind, out) for kind, out in results_below(str(root)) if kind in _RECORD]


def _row(kind: str, out: str) -> dict[str, Any]:
    row: dict[str, Any] = {"path": out, **dict.fromkeys(("command", "algorithm", "task", "seeds", "status", "problem"))}
    row["size_mb"] = size_mb(Path(out))
    try:
        record = read_run(Path(out)) if kind == "run" else _evaluation(Path(out))
    except CvlctlError as error:
        return row | {"problem": error.what}
    if kind == "evaluation":
        jobs = record["jobs"]
        of = {name: list(dict.fromkeys(job[name] for job in jobs)) for name in ("algorithm", "task", "seed")}
        told: dict[str, Any] = {
            "algorithm": ", ".join(of["algorithm"]),
            "task": ", ".join(of["task"]),
            "seeds": of["seed"],
        }
    else:
        told = {name: record.get(name) or record["recipe"].get(name) for name in ("algorithm", "task", "seeds")}
        if isinstance(told["algorithm"], dict):
            told["algorithm"] = told["algorithm"].get("name")
    return row | {"command": kind_of(record["recipe"]), "status": record["status"], **told}


def _evaluation(out: Path) -> dict[str, Any]:
    record = read_json(out / "evaluation.json")
    if record is None or not kept.is_record(record):
        raise CvlctlError(f"{out}/evaluation.json is damaged", "cvlctl evaluate --force replaces it")
    return record


def size_mb(folder: Path) -> float:
    """Megabytes of the files in a folder; links are not followed."""
    sizes = (os.lstat(os.path.join(at, name)).st_size for at, _, names in os.walk(folder) for name in names)
    return sum(sizes) / 1e6


def show(out: Path) -> dict[str, Any]:
    """All about a run or an evaluation: path, kind, size_mb, record (what its file says), last (of a run: the last line
    of its metrics, or None), evaluations (that scored it), needed_by (what was or is trained on it).

    Raises:
        CvlctlError: it is neither, or its record is damaged.
    """
    kind = _kind(out)
    record = read_run(out) if kind == "run" else _evaluation(out)
    last = None
    if kind == "run" and (out / "metrics.jsonl").exists():
        last = next(reversed(read_metrics(out)), None)
    near = evaluations_near([str(out)]) if kind == "run" else []
    return {
        "path": str(out), "kind": kind, "size_mb": size_mb(out), "record": record, "last": last, "evaluations": near,
        "needed_by": needed_by([out]).get(str(out), []),
    }  # fmt: skip


def _kind(out: Path) -> str:
    """ "run" or "evaluation"."""
    found = next((kind for kind, name in _RECORD.items() if (out / name).is_file()), None)
    if found is None:
        what = f"{out} is neither a run nor an evaluation" if out.is_dir() else f"nothing is at {out}"
        raise CvlctlError(what, "cvlctl runs ls shows what there is")
    return found


def needed_by(outs: Sequence[Path]) -> dict[str, list[str]]:
    """Of each folder the runs and unfinished evaluations elsewhere that read it, as far as they lie near.

    Near: below the folder of the current directory that it is in; of one that lies elsewhere, below the third above it.
    """
    chosen = {os.path.realpath(out): str(out) for out in outs}
    found: dict[str, list[str]] = {}
    for root in dict.fromkeys(map(_near, chosen)):
        for kind, other in results_below(root):
            if kind not in _RECORD or os.path.realpath(other) in chosen:
                continue
            record = read_json(Path(other) / _RECORD[kind]) or {}
            for read in _read_by(kind, record):
                place = os.path.realpath(read)
                above = next((str(one) for one in (Path(place), *Path(place).parents) if str(one) in chosen), None)
                if above is not None and os.path.relpath(other) not in found.setdefault(chosen[above], []):
                    found[chosen[above]].append(os.path.relpath(other))
    return found


def _near(place: str) -> str:
    here = Path(os.path.realpath(Path.cwd()))
    if Path(place).is_relative_to(here):
        return str(here / Path(place).relative_to(here).parts[0])
    return str(list(Path(place).parents)[:3][-1])


def _read_by(kind: str, record: dict[str, Any]) -> Iterator[str]:
    """Paths that a run, or an evaluation that is not finished, reads."""
    recipe = record.get("recipe")
    if kind == "run" and isinstance(recipe, dict):
        yield from _texts({key: value for key, value in recipe.items() if key != "out"})
    elif kind == "evaluation" and record.get("status") != "finished":
        yield from (str(job.get("checkpoint")) for job in record.get("jobs") or () if isinstance(job, dict))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str) and "\0" not in value:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(item)


def check_removal(outs: Sequence[Path], *, force: bool = False) -> list[dict[str, Any]]:
    """What `remove` would remove: path, kind, size_mb. Nothing is touched.

    Raises:
        CvlctlError: one is a link, or no run; or what lies elsewhere needs it (and no `force`).
    """
    for out in outs:
        if out.is_symlink():
            raise CvlctlError(f"{out} is a link: what it leads to would stay", f"name {os.path.realpath(out)}")
    rows = [{"path": str(out), "kind": _kind(out), "size_mb": size_mb(out)} for out in outs]
    needed = {} if force else needed_by(outs)
    for place, others in needed.items():
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        what = f"{place} is needed by {', '.join(others[:3])}{more}"
        raise CvlctlError(what, "remove those first, or together with it; --force removes it nevertheless")
    return rows


def remove(outs: Sequence[Path], *, force: bool = False) -> list[dict[str, Any]]:
    """Remove runs and evaluations. Returns what `check_removal` does, and of each left: names that are not ours.

    Raises:
        CvlctlError: as `check_removal`; or another process is at one of them: those before it are gone then.
    """
    rows = check_removal(outs, force=force)
    for out, row in zip(outs, rows, strict=True):
        with closing(lock(out / ".lock")):
            row["left"] = runs.remove(out) if row["kind"] == "run" else kept.remove(out)
    return rows


def render_ls(result: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the result of `ls`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not result:
        console.print("no runs here: train one with `cvlctl finetune RECIPE`")
        return
    root = os.path.commonpath([os.path.dirname(row["path"]) for row in result])
    total = f"{len(result)} under {root or '.'}, {sum(row['size_mb'] for row in result):,.1f} MB"
    short = short_names(list(dict.fromkeys(str(row["task"]) for row in result)))
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=Text(total), caption_justify="left")
    for heading in ("run", "command", "algorithm", "task"):
        table.add_column(heading, overflow="fold")
    for heading in ("seeds", "status", "MB"):
        table.add_column(heading, justify="left" if heading == "status" else "right", no_wrap=True)
    for row in result:
        name, size = os.path.relpath(row["path"], root or "."), f"{row['size_mb']:.1f}"
        if row["problem"]:
            table.add_row(Text(name), Text("damaged", style="red"), "", "", "", "", size)
            continue
        task = short.get(str(row["task"]), str(row["task"] or "-"))
        seeds = str(len(row["seeds"])) if isinstance(row["seeds"], list) else "-"
        texts = (name, row["command"] or "?", str(row["algorithm"] or "-"), task, seeds, str(row["status"]), size)
        table.add_row(*map(Text, texts))
    print_table(console, table, headings=True)
    for row in result:
        if row["problem"]:
            console.print(row["problem"], markup=False, soft_wrap=True)


def render_show(result: dict[str, Any], console: Console) -> None:
    """Print the result of `show`."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cvlctl.experiments.compare import flat, in_short

    record = result["record"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=False)
    facts = {
        "path": result["path"],
        "kind": result["kind"],
        "status": record["status"],
        "MB": f"{result['size_mb']:.1f}",
    }
    facts |= {"scored in": ", ".join(result["evaluations"]), "needed by": ", ".join(result["needed_by"])}
    if result["kind"] == "evaluation":
        facts["jobs"] = f"{len(record['jobs'])} policies"
    facts |= {f"last {key}": value for key, value in (result["last"] or {}).items()}
    groups = ("where", "settings", "versions", "inputs", "recipe")
    facts |= dict(flat({name: record[name] for name in groups if isinstance(record.get(name), dict)}))
    for name, value in facts.items():
        if value not in ("", None):
            table.add_row(Text(name), Text(in_short(value)))
    console.print(table)


def render_rm(result: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the result of `remove`."""
    for row in result:
        left = f"; left there, since cvlctl did not write it: {', '.join(row['left'][:5])}" if row["left"] else ""
        console.print(f"removed: {row['path']} ({row['size_mb']:.1f} MB){left}", markup=False, soft_wrap=True)
