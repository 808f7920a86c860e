"""Rows of finished evaluations that stand beside those of an evaluation's own runs (`beside`): their policies are not
played again, and need not be here any more."""

from __future__ import annotations

import glob
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.files import read_json, sha256
from cvlctl.play.rollout import PolicyJob
from cvlctl.progress import say
from cvlctl.score import kept
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.report import SIMULATOR
from cvlctl.score.rows import read_rows
from cvlctl.version import versions

ALIKE = ("seed", "goals", "horizon", "backend")  # in which evaluations agree whose episodes are the same


class Joined(NamedTuple):
    """What stands beside: rows by policy, and what the records of their evaluations say."""

    rows: kept.JobRows
    jobs: list[dict[str, Any]]  # of the records, in the order of `rows`
    told: dict[str, dict[str, Any]]  # environments and references, each task's
    digests: dict[str, str]  # of each file of rows


def joined(recipe: EvaluateRecipe, own: Sequence[PolicyJob], told: dict[str, dict[str, Any]]) -> Joined:
    """The rows of the evaluations that `beside` names, the first `episodes` of each policy that is not among `own`.

    Args:
        told: what is said of the tasks of `own`: by environments and references.

    Raises:
        CvlctlError: a place that is no finished evaluation, or one whose episodes are not those of this one: of another
            seed, horizon, simulator or environment, or fewer.
    """
    found = Joined({}, [], {name: dict(by_task) for name, by_task in told.items()}, {})
    seen = {(job.sha256, job.task, job.seed) for job in own}
    names = {(job.algorithm, job.task, job.seed) for job in own}
    for out in _places(recipe):
        record = read_json(out / "evaluation.json")
        if record is None or not kept.is_record(record) or record["status"] != "finished":
            hint = "give its evaluate command again, or leave it out"
            raise CvlctlError(f"beside: {out} holds no finished evaluation", hint)
        _check(recipe, out, record, found)
        added = _add(recipe, out, record, found, seen)
        if twice := sorted(names & added):
            algorithm, task, seed = twice[0]
            what = f"beside: {out} has a run called {algorithm} on {task}, seed {seed}, which is there already"
            raise CvlctlError(what, "two policies need two names: give one of the runs another label")
        names |= added
    return found


def _places(recipe: EvaluateRecipe) -> Iterator[Path]:
    for pattern in recipe.beside:
        places = [pattern] if Path(pattern).is_dir() else sorted(glob.glob(pattern, recursive=True))
        outs = [Path(place) for place in places if Path(place, "evaluation.json").is_file()]
        if not outs:
            hint = "name the out of a finished evaluation: a folder with an evaluation.json"
            raise CvlctlError(f"beside: no evaluation matches {pattern!r}", hint)
        yield from (out for out in outs if out.resolve() != recipe.out.resolve())


def _check(recipe: EvaluateRecipe, out: Path, record: dict[str, Any], found: Joined) -> None:
    now = recipe.resolved()
    for name in ALIKE:
        then = record["recipe"].get(name, EvaluateRecipe.model_fields[name].default)
        if then != now[name]:
            what = f"beside: {out} has played other episodes: its {name} was {then}, and is {now[name]} here"
            raise CvlctlError(what, "evaluate with the same one, or leave that evaluation out")
    for name, by_task in found.told.items():
        for task, said in record.get(name, {}).items():
            if by_task.setdefault(task, said) != said:
                what = f"beside: the {name} of {task} in {out} are not those that it has elsewhere"
                raise CvlctlError(what, "the scores are not of one kind: leave that evaluation out")
    simulated: Any = record.get("versions")
    for name in SIMULATOR if isinstance(simulated, dict) else ():
        if simulated.get(name) != versions().get(name):
            say(f"{out}: played with {name} {simulated.get(name)}, and here is {versions().get(name)}")


def _add(
    recipe: EvaluateRecipe, out: Path, record: dict[str, Any], found: Joined, seen: set[Any]
) -> set[tuple[str, str, int]]:
    """Take in the rows of an evaluation; returns (algorithm, task, seed) of those that were not there yet."""
    file, known, added = out / "rows.jsonl", defaultdict[Any, dict[int, Any]](dict), set[tuple[str, str, int]]()
    for row in read_rows(file):
        known[row.algorithm, row.task, row.seed, row.step][row.episode] = row
    for job in record["jobs"]:
        algorithm, task, seed, step, digest = (job[key] for key in ("algorithm", "task", "seed", "step", "sha256"))
        rows = {at: row for at, row in known[algorithm, task, seed, step].items() if at < recipe.episodes}
        if len(rows) < recipe.episodes:
            what = f"beside: {out} has {len(rows)} episodes of {algorithm} on {task}, seed {seed}"
            raise CvlctlError(what, f"{recipe.episodes} are asked: choose fewer episodes, or evaluate it for more")
        if (digest, task, seed) not in seen:
            seen.add((digest, task, seed))
            added.add((algorithm, task, seed))
            found.rows[PolicyJob(algorithm, task, seed, step, Path(job["checkpoint"]), sha256=digest)] = rows
            found.jobs.append(job)
    found.digests[str(out)] = sha256(file)
    return added
