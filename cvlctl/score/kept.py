"""What an evaluation keeps on disk, and what of it the next one may use. One process at a time.

<out>/rows.jsonl        one line an episode: what everything else is computed from
<out>/goals.npy         with `goals`: the states (N, O) that policies are sent to; their frames are in goals.npz
<out>/evaluation.json   the recipe, and which checkpoint (by its sha256) each row is of
<out>/table.json        what the command returns; its sha256 is in the record, once all else is there
<out>/videos/           with `video`: episodes as GIF or MP4
<out>/playing/          while it runs: checkpoints of runs in training, which replace their own
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from cvlctl.cell import where
from cvlctl.checkpoints import Saved
from cvlctl.errors import CvlctlError
from cvlctl.files import disk, entries, lock, read_json, read_regular, sweep, temporary_of, write_atomically, write_json
from cvlctl.play.rollout import PolicyJob
from cvlctl.progress import say
from cvlctl.score.recipe import EvaluateRecipe
from cvlctl.score.rows import parse_row, write_rows
from cvlctl.types import EpisodeResult
from cvlctl.version import versions

FORMAT = 1
GOALS, GOAL_FRAMES, VIDEOS = "goals.npy", "goals.npz", "videos"
FILES = (
    "evaluation.json", "rows.jsonl", GOALS, GOAL_FRAMES, "table.csv", "table.md", "table.json", "curves.csv",
    *(f"{name}.{kind}" for name in ("scores", "curves", "profiles") for kind in ("png", "svg")),
)  # fmt: skip
_JOB = {"algorithm": str, "task": str, "seed": int, "step": int, "checkpoint": str, "sha256": str}
_REPLACE = "choose another out, or --force to replace it"

JobRows = dict[PolicyJob, dict[int, EpisodeResult]]  # episodes by their numbers


@contextmanager
def held(out: Path) -> Iterator[None]:
    """`out` for this process alone, rid of what dead ones left half written.

    Raises:
        CvlctlError: another process has it, or it holds something else than an evaluation.
    """
    _has_record(out)
    with closing(lock(out / ".lock")):
        sweep(out, *FILES)
        _remove_copies(out)
        yield


def clear(out: Path) -> None:
    """Remove what evaluations write, but for the record, which makes `out` ours: another is going to replace it."""
    with disk(out):
        for name in FILES[1:]:
            (out / name).unlink(missing_ok=True)
    clear_videos(out)


def clear_videos(out: Path) -> None:
    """Remove the videos that evaluations write, and their folder where nothing else is in it."""
    folder = out / VIDEOS
    if folder.is_symlink() or not folder.is_dir():
        return
    sweep(folder)
    with disk(folder):
        for name in entries(folder):
            if re.fullmatch(r".*_episode-\d+\.(gif|mp4)", name):
                (folder / name).unlink(missing_ok=True)
        if not entries(folder):
            folder.rmdir()


def remove(out: Path) -> list[str]:
    """Remove the evaluation in `out`, which nobody may be at, and the folder where nothing else is in it.

    Returns what is left, by name. CvlctlError where the disk refuses: the same call goes on.
    """
    _remove_copies(out)
    clear(out)
    with disk(out):
        for name in (FILES[0], ".lock"):
            (out / name).unlink(missing_ok=True)
        if not entries(out):
            out.rmdir()
    return sorted(entries(out))


def _has_record(out: Path) -> bool:
    """Whether `out` holds the record of an evaluation; it may hold nothing, but nothing else."""
    if (out / "evaluation.json").exists():
        return True
    if all(name == ".lock" or temporary_of(name) in FILES for name in entries(out)):
        return False
    raise CvlctlError(f"{out} is not empty, and no evaluation", "choose another out: nothing in it was touched")


def read_evaluation(recipe: EvaluateRecipe) -> dict[str, Any] | None:
    """The record in <out>/evaluation.json; None where `out` is empty, or holds one of which nothing was played yet and
    which is another one.

    Raises:
        CvlctlError: where `out` holds something else, or rows of other runs, episodes or seeds.
    """
    out = recipe.out
    if not _has_record(out):
        return None
    before = read_json(out / "evaluation.json")
    if before is None or not is_record(before):
        raise CvlctlError(f"{out}/evaluation.json is damaged", _REPLACE)
    now = recipe.resolved()
    for name in ("runs", "checkpoints", "episodes", "seed", "goals", "horizon", "backend"):
        then = before["recipe"].get(name, EvaluateRecipe.model_fields[name].default)
        more = (
            name == "episodes" and isinstance(then, int) and then < now[name]
        )  # those that are there stay what they are
        if then != now[name] and not more:
            if before["status"] != "finished" and not _holds_rows(out):
                return None  # it was refused, say: a policy that needs a goal
            raise CvlctlError(f"{out} holds another evaluation: {name} was {then}, now {now[name]}", _REPLACE)
    return before | {"recipe": recipe.with_defaults(before["recipe"])}  # of keys that an earlier version had not


def is_record(found: dict[str, Any]) -> bool:
    """Whether it has what is read of it; further keys are those of another version."""
    jobs, by_task = found.get("jobs"), [found.get(key, {}) for key in ("simulators", "environments", "references")]
    return (
        found.get("format") == FORMAT
        and isinstance(found.get("status"), str)
        and isinstance(found.get("recipe"), dict)
        and isinstance(jobs, list)
        and all(isinstance(job, dict) and all(type(job.get(key)) is kind for key, kind in _JOB.items()) for job in jobs)
        and all(isinstance(said, dict) and all(isinstance(one, dict) for one in said.values()) for said in by_task)
        and all(isinstance(one.get(end), int | float) for one in by_task[-1].values() for end in ("min", "max"))
    )


def finished(record: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the earlier evaluation is the one that `record` is about, and finished."""
    return before["status"] == "finished" and record.items() <= before.items()


def saved_result(out: Path, before: dict[str, Any]) -> dict[str, Any] | None:
    """What is in table.json; None where that is not what the record tells of. Those of earlier versions do not tell."""
    with suppress(OSError, ValueError, RecursionError):
        written = read_regular(out / "table.json")
        found = json.loads(written)
        if before.get("tables") in (None, hashlib.sha256(written).hexdigest()) and isinstance(found, dict):
            return found
    return None


def reusable(recipe: EvaluateRecipe, jobs: Iterable[PolicyJob], before: dict[str, Any] | None) -> JobRows:
    """For each job the rows that are there already, of the very checkpoint and of the episodes wanted."""
    have = _rows_by_checkpoint(recipe.out, before)
    rows: JobRows = {}
    for job in jobs:  # what it is called may have changed since, how many episodes are wanted too
        known = have.get((job.sha256, job.task, job.seed), {})
        rows[job] = {
            at: replace(row, algorithm=job.algorithm) for at, row in known.items() if at in range(recipe.episodes)
        }
    return rows


def _rows_by_checkpoint(
    out: Path, before: dict[str, Any] | None
) -> dict[tuple[str | None, str, int], dict[int, EpisodeResult]]:
    """(sha256 of the checkpoint, task, seed) -> the episodes that an earlier evaluation saved."""
    path = out / "rows.jsonl"
    if before is None or not path.is_file():
        return {}
    by_key: dict[tuple[str, str, int, int], dict[int, EpisodeResult]] = defaultdict(dict)
    for row in _sound_rows(path):
        by_key[row.algorithm, row.task, row.seed, row.step][row.episode] = row
    return {
        (job["sha256"], job["task"], job["seed"]): by_key[job["algorithm"], job["task"], job["seed"], job["step"]]
        for job in before["jobs"]
    }


def _holds_rows(out: Path) -> bool:
    path = out / "rows.jsonl"
    return path.exists() and path.stat().st_size > 0


def has_rows(out: Path, task: str) -> bool:
    """Whether an earlier evaluation saved an episode of the task."""
    path = out / "rows.jsonl"
    return path.is_file() and any(row.task == task for row in _sound_rows(path))


def _sound_rows(path: Path) -> list[EpisodeResult]:
    """The rows in a file, less damaged lines: their episodes can be played again."""
    rows, broken = [], 0
    try:
        lines = read_regular(path).split(b"\n")
    except OSError as error:
        raise CvlctlError(f"cannot read {path}: {error.strerror}", _REPLACE) from error
    for line in lines:
        try:
            rows += [parse_row(line)] if line.strip() else []
        except (ValueError, TypeError, LookupError, RecursionError):
            broken += 1
    if broken:
        say(f"{path}: {broken} damaged {'line' if broken == 1 else 'lines'} dropped; what they held runs again")
    return rows


def save(out: Path, record: dict[str, Any], rows: JobRows) -> None:
    """Save rows. They come first: what they are of was true of the old record too."""
    write_rows(out / "rows.jsonl", [row for done in rows.values() for _, row in sorted(done.items())])
    write_record(out, record)


def write_record(out: Path, record: dict[str, Any], status: str = "started") -> None:
    write_json(out / "evaluation.json", {**record, "status": status, "versions": versions(), "where": where()})


def finish(out: Path, record: dict[str, Any], result: dict[str, Any]) -> None:
    """Keep what the command returns, and say that all is there: the last things that are written."""
    written = (json.dumps(result, indent=1) + "\n").encode()
    write_atomically(out / "table.json", written)
    write_record(out, record | {"tables": hashlib.sha256(written).hexdigest()}, "finished")


# --- checkpoints of runs in training


def copy_of(out: Path, saved: Saved) -> Path:
    """Where the copy of a checkpoint lies while it is played."""
    return out / "playing" / f"{saved.sha256}.safetensors"


@contextmanager
def copies(out: Path, checkpoints: Iterable[Saved]) -> Iterator[None]:
    """Copies of `checkpoints` for those who play them: the run that wrote one may have replaced it by then."""
    try:
        for saved in checkpoints:
            write_atomically(copy_of(out, saved), *saved.content)
        yield
    finally:
        _remove_copies(out)


def _remove_copies(out: Path) -> None:
    folder = out / "playing"
    if folder.is_symlink():
        return
    with suppress(OSError):
        sweep(folder)
        for name in entries(folder):
            if re.fullmatch(r"[0-9a-f]{64}\.safetensors", name):
                (folder / name).unlink()
        folder.rmdir()
