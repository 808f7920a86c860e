"""Rows of finished evaluations that stand beside those of an evaluation's own runs (`beside`): their policies are not
played again, and need not be here any more."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.files import read_json
from cvlctl.play.rollout import PolicyJob
from cvlctl.progress import say
from cvlctl.score import kept
from cvlctl.score.find_runs import places
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.report import SIMULATOR
from cvlctl.score.rows import rows_file, rows_in
from cvlctl.types import check_text
from cvlctl.version import versions

ALIKE = ("seed", "goals", "horizon", "backend")  # in which evaluations agree whose episodes are the same


class Joined(NamedTuple):
    """What stands beside: rows by policy, and what the records of their evaluations say."""

    rows: kept.JobRows
    jobs: list[dict[str, Any]]  # of the records, in the order of `rows`, each with where it was found (`beside`)
    told: dict[str, dict[str, Any]]  # environments and references, each task's
    digests: dict[str, str]  # of each file of rows


def joined(recipe: EvaluateRecipe, own: Sequence[PolicyJob], told: dict[str, dict[str, Any]]) -> Joined:
    """The rows of the evaluations that `beside` names, the first `episodes` of each policy that is not among `own`.

    Args:
        told: what is said of the tasks of `own`: by environments and references.

    Raises:
        CvlctlError: a place that is no finished evaluation, one whose episodes are not those of this one (of another
            seed, horizon, simulator or environment, or fewer), two policies of one name, or nothing to show at all.
    """
    found = Joined({}, [], {name: dict(by_task) for name, by_task in told.items()}, {})
    seen = {(job.sha256, job.task, job.seed) for job in own}
    names = {(job.algorithm, job.task, job.seed) for job in own}
    played = {job.task: told["environments"].get(job.task) for job in own}  # in which environment; None: the built-in
    for out in _outs(recipe):
        record = read_json(out / "evaluation.json")
        if record is None or not kept.is_record(record) or record["status"] != "finished":
            hint = "give its evaluate command again, or leave it out"
            raise CvlctlError(f"beside: {out} holds no finished evaluation", hint)
        _check(recipe, out, record, found, played)
        names |= _add(recipe, out, record, found, seen, names)
    if not own and not found.rows:
        raise CvlctlError("beside: there is nothing to show", "name other evaluations than the one in out, or runs")
    return found


def _outs(recipe: EvaluateRecipe) -> Iterator[Path]:
    """The evaluations that `beside` names, less the one that is made."""
    for pattern in recipe.beside:
        outs = [place for place in places(pattern)[1] if os.path.isfile(place / "evaluation.json")]
        if not outs:
            hint = "name the out of a finished evaluation: a folder with an evaluation.json"
            raise CvlctlError(f"beside: no evaluation matches {pattern!r}", hint)
        yield from (out for out in outs if os.path.realpath(out) != os.path.realpath(recipe.out))


def _check(
    recipe: EvaluateRecipe, out: Path, record: dict[str, Any], found: Joined, played: dict[str, dict[str, Any] | None]
) -> None:
    now = recipe.resolved()
    for name in ALIKE:
        then = record["recipe"].get(name, EvaluateRecipe.model_fields[name].default)
        if then != now[name]:
            what = f"beside: {out} has played other episodes: its {name} was {then}, and is {now[name]} here"
            raise CvlctlError(what, "evaluate with the same one, or leave that evaluation out")
    own = {job["task"]: record.get("environments", {}).get(job["task"]) for job in record["jobs"]}
    for task, environment in own.items():
        _require_same(played.setdefault(task, environment), environment, "environments", task, out)
    for name, by_task in found.told.items():
        for task, said in record.get(name, {}).items():
            _require_same(by_task.setdefault(task, said), said, name, task, out)
    simulated: Any = record.get("versions")
    for name in SIMULATOR if isinstance(simulated, dict) else ():
        if simulated.get(name) != versions().get(name):
            say(f"{out}: played with {name} {simulated.get(name)}, and here is {versions().get(name)}")


def _require_same(one: Any, other: Any, name: str, task: str, out: Path) -> None:
    if one != other:
        what = f"beside: the {name} of {task} in {out} differ from those elsewhere"
        raise CvlctlError(what, "the scores are not of one kind: leave that evaluation out")


def _add(
    recipe: EvaluateRecipe, out: Path, record: dict[str, Any], found: Joined, seen: set[Any], names: set[Any]
) -> set[Any]:
    """Take in the rows of an evaluation; returns (algorithm, task, seed) of its policies. Those of a run that is there
    already, at another step, go on with its curve."""
    file, known = out / "rows.jsonl", defaultdict[Any, dict[int, Any]](dict)
    content = rows_file(file)
    for row in rows_in(content, file):
        known[row.algorithm, row.task, row.seed, row.step][row.episode] = row
    policies = [(job["sha256"], job["task"], job["seed"]) for job in record["jobs"]]
    called = [(job["algorithm"], job["task"], job["seed"]) for job in record["jobs"]]
    same = {name for name, policy in zip(called, policies, strict=True) if policy in seen}
    for job, name, policy in zip(record["jobs"], called, policies, strict=True):
        algorithm, task, seed = name
        check_text(f"{out}: a name", algorithm + task)
        rows = {at: row for at, row in known[(*name, job["step"])].items() if at in range(recipe.episodes)}
        if len(rows) < recipe.episodes:
            what = f"beside: {out} has {len(rows)} episodes of {algorithm} on {task}, seed {seed}"
            raise CvlctlError(what, f"{recipe.episodes} are asked: choose fewer episodes, or evaluate it for more")
        if name in names and name not in same:
            what = f"beside: {out} has a run called {algorithm} on {task}, seed {seed}, which is there already"
            raise CvlctlError(what, "two policies need two names: give one of the runs another label")
        if policy not in seen:
            seen.add(policy)
            found.rows[PolicyJob(algorithm, task, seed, job["step"], Path(job["checkpoint"]), sha256=policy[0])] = rows
            found.jobs.append({"beside": str(out), **job})
    found.digests[str(out)] = hashlib.sha256(content).hexdigest()
    return set(called)
