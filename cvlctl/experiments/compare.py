"""`cvlctl compare`: what differs between runs, in recipes, data, versions and settings; and their scores side by side.

Scores are of the evaluations that lie near the runs, paired where episodes are shared: of the same number, so of the
same start, and simulated alike.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import kind_of, model
from cvlctl.experiments.reports.gather import Evaluation, evaluation_in, evaluations_near, run_of
from cvlctl.runs import read_run
from cvlctl.score.comparisons import sentences
from cvlctl.score.report import tables_of
from cvlctl.score.rows import Record, final_runs
from cvlctl.terminal import print_table
from cvlctl.types import EpisodeResult

if TYPE_CHECKING:
    from rich.console import Console

_ALIKE = ("seed", "task", "env", "goals", "horizon", "backend")  # of evaluations whose episodes are the same
_WIDEST = 60  # characters of a value that people are shown


def compare(places: Sequence[str]) -> dict[str, Any]:
    """What differs between runs, and their scores.

    Returns:
        runs (name, path, status, command, algorithm, task), differences (of: recipe, data, versions or settings; key;
        values, one a run, None: it has none), scores (a dict for each evaluation protocol: table, pairwise and
        comparison as `cvlctl evaluate` gives them, and shared: `shared_episodes`), and gaps (sentences).

    Raises:
        CvlctlError: fewer than two runs, or a place that is none.
    """
    outs = list(dict.fromkeys(os.path.normpath(place) for place in places))
    if len(outs) < 2:
        raise CvlctlError("compare: two runs at least are to be compared", "cvlctl compare RUN RUN [...]")
    runs = {out: _read(out) for out in outs}
    names = _names(outs)
    about = [
        {"name": names[out], "path": out, "status": run["status"], "command": kind_of(run["recipe"]),
         "algorithm": run.get("algorithm"), "task": run.get("task"), "seeds": run.get("seeds")}
        for out, run in runs.items()
    ]  # fmt: skip
    gaps = [f"{out}: its training is not finished" for out, run in runs.items() if run["status"] != "finished"]
    scores, lacking = _scores(outs, names)
    tasks = {str(run.get("task")) for run in runs.values()}
    if len(tasks) > 1:
        gaps.append(
            f"they are of different tasks ({', '.join(sorted(tasks))}): scores stand beside each other, unpaired"
        )
    return {"runs": about, "differences": differences(list(runs.values())), "scores": scores, "gaps": [*gaps, *lacking]}


def _read(out: str) -> dict[str, Any]:
    if not Path(out, "run.json").exists():
        below = [str(path.parent) for path in sorted(Path(out).glob("*/run.json"))[:5]] if Path(out).is_dir() else []
        hint = f"runs below it: {', '.join(below)}" if below else "cvlctl runs ls shows what there is"
        raise CvlctlError(f"{out} is not a run: it has no run.json", hint)
    return read_run(Path(out))


def _names(outs: Sequence[str]) -> dict[str, str]:
    """Of each path as few of its last parts as tell it apart."""
    parts = [Path(os.path.abspath(out)).parts for out in outs]
    depth = next((n for n in range(1, max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts)), 0)
    return {out: "/".join(part[-depth:]) for out, part in zip(outs, parts, strict=True)}


def differences(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Everything in which records of runs differ, but for where they lie: of, key and values, one a run."""
    sides = {
        "recipe": [dict(flat(_filled(run["recipe"]))) for run in runs],
        "data": [run["inputs"] for run in runs],
        "versions": [_mapping(run.get("versions")) for run in runs],
        "settings": [dict(flat(_mapping(run.get("settings")))) | _mapping(run.get("where")) for run in runs],
    }
    found = []
    for of, columns in sides.items():
        for key in dict.fromkeys(key for column in columns for key in column):
            values = [column.get(key) for column in columns]
            if any(value != values[0] for value in values) and key != "out":
                found.append({"of": of, "key": key, "values": values})
    return found


def _filled(recipe: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that have come since."""
    kind = kind_of(recipe)
    return model(kind).with_defaults(recipe) if kind in ("pretrain", "finetune") else recipe


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def flat(value: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings, and lists of them, as dotted keys."""
    for key, item in value.items():
        if isinstance(item, list) and item and all(isinstance(one, dict) for one in item):
            item = {str(i): one for i, one in enumerate(item)}
        if isinstance(item, dict) and item:
            yield from flat(item, f"{before}{key}.")
        else:
            yield f"{before}{key}", item


def _scores(outs: Sequence[str], names: Mapping[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Of each way to evaluate the tables; of runs in several evaluations that are alike the newest counts."""
    real = {os.path.realpath(out): out for out in outs}
    folders = sorted(evaluations_near(outs), key=lambda out: Path(out, "evaluation.json").stat().st_mtime)
    groups: dict[str, dict[str, tuple[Evaluation, list[EpisodeResult]]]] = {}
    gaps, scored = list[str](), set[str]()
    for folder in folders:
        found = evaluation_in(Path(folder), set(real))
        if isinstance(found, str):
            gaps += [found] if found else []
            continue
        gaps += [found.problem] if found.problem else []
        alike = groups.setdefault(
            json.dumps([found.record.get("environments"), *(found.record["recipe"].get(key) for key in _ALIKE)]), {}
        )
        for run, rows in _rows_of(found, real).items():
            alike[run] = found, [replace(row, algorithm=names[run]) for row in rows]
            scored.add(run)
    gaps += [f"{out}: no evaluation near it has scored it" for out in outs if out not in scored]
    return [_tables([alike[out] for out in outs if out in alike]) for alike in groups.values() if alike], gaps


def _rows_of(evaluation: Evaluation, real: Mapping[str, str]) -> dict[str, list[EpisodeResult]]:
    """Of each run the rows of its last step."""
    keys = {
        (job["algorithm"], job["task"]): real[run_of(job)] for job in evaluation.record["jobs"] if run_of(job) in real
    }
    found: dict[str, list[EpisodeResult]] = {}
    for (task, algorithm), seeds in final_runs(evaluation.rows).items():
        if (algorithm, task) in keys:
            found.setdefault(keys[algorithm, task], []).extend(row for run in seeds.values() for row in run)
    return found


def _tables(several: Sequence[tuple[Evaluation, Sequence[EpisodeResult]]]) -> dict[str, Any]:
    """What `cvlctl evaluate` would print of these runs, the first as the baseline."""
    rows, recipe = [row for _, own in several for row in own], several[-1][0].recipe
    baseline = several[0][1][0].algorithm if several[0][1] else ""
    tables = tables_of(recipe.model_copy(update={"tuning": ()}), rows, {}, baseline, several[-1][0].record)
    return {
        "evaluations": list(dict.fromkeys(str(evaluation.out) for evaluation, _ in several)),
        **{name: tables[name] for name in ("table", "pairwise", "comparison")},
        "shared": shared_episodes(rows, baseline),
    }


def shared_episodes(rows: Sequence[EpisodeResult], baseline: str) -> list[Record]:
    """Each algorithm beside the baseline, episode by episode: those of the same number, so of the same start.

    An episode's score is its mean over the seeds that played it. Keys: task, algorithm, baseline, metric, episodes (how
    many are shared), above and below (on how many the algorithm is), difference (of the means over them).
    """
    groups, records = final_runs(rows), list[Record]()
    for (task, algorithm), runs in groups.items():
        others = groups.get((task, baseline), {})
        for metric in ("return", "success") if algorithm != baseline else ():
            ours, theirs = (_by_episode(x, metric) for x in (runs.values(), others.values()))
            common = sorted(ours.keys() & theirs.keys())
            if common:
                gaps = np.array([ours[episode] - theirs[episode] for episode in common])
                record: Record = {"task": task, "algorithm": algorithm, "baseline": baseline, "metric": metric}
                record |= {"episodes": len(common), "above": int((gaps > 0).sum()), "below": int((gaps < 0).sum())}
                records.append(record | {"difference": float(gaps.mean())})
    return records


def _by_episode(runs: Any, metric: str) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for run in runs:
        for row in run:
            value = row.episode_return if metric == "return" else row.success
            if value is not None:
                found.setdefault(row.episode, []).append(float(value))
    return {episode: float(np.mean(values)) for episode, values in found.items()}


def in_words(records: Sequence[Record]) -> list[str]:
    """Records of `shared_episodes`, a sentence each."""
    found = []
    for record in records:
        metric, difference = record["metric"], record["difference"]
        size = f"{100 * difference:+.0f} points" if metric == "success" else f"{difference:+.4g}"
        even = record["episodes"] - record["above"] - record["below"]
        found.append(
            f"{record['algorithm']} is above {record['baseline']} on {record['above']} of {record['episodes']} shared "
            f"episodes of {record['task'].rsplit('/', 1)[-1]} by {metric}, below on {record['below']}"
            + (f", even on {even}" if even else "") + f"; on average {size}"
        )  # fmt: skip
    return found


def render(result: dict[str, Any], console: Console) -> None:
    """Print what differs, then the scores."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cvlctl.score.render import to_rich

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title="what differs", title_justify="left")
    for heading in ("of", "", *(run["name"] for run in result["runs"])):
        table.add_column(Text(heading), overflow="fold")
    before = ""
    for row in result["differences"]:
        values = (Text(in_short(value)) for value in row["values"])
        table.add_row(row["of"] if row["of"] != before else "", Text(row["key"]), *values)
        before = row["of"]
    if result["differences"]:
        print_table(console, table, key=1, headings=True)
    else:
        console.print("nothing differs but where they lie")
    for scored in result["scores"]:
        console.print(to_rich(scored["table"], "scores"))
        if scored["pairwise"]:
            console.print(to_rich(scored["pairwise"], f"against {scored['pairwise'][0]['baseline']}"))
        for line in (*in_words(scored["shared"]), *sentences(scored["comparison"])):
            console.print(line, markup=False, highlight=False)
    for gap in result["gaps"]:
        console.print(f"lacking: {gap}", markup=False, soft_wrap=True)


def in_short(value: Any) -> str:
    """A value of a recipe or record on one line; digests by their beginning."""
    text = "-" if value is None else value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return text[:16]
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."
