"""Job arrays for SLURM: what a recipe may ask of it, which cells are one array, what they wait for, and the script.

Pure functions; `slurm` is what talks to SLURM.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from cvlctl.errors import CvlctlError
from cvlctl.recipes.values import Count, Strict, checked

MOST = 1_000  # elements of an array: its script, which names all its cells, stays below SLURM's limit of 4 MB
WARNING_SECONDS = 90  # before the time limit: SLURM looks every half minute, and a cell has to save what it has
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_OWN_KEYS = {"partition", "account", "qos", "time", "mem", "cpus-per-task"}  # of `more`: they have keys of their own
_OURS = {  # of `more`: without them cells could not be told apart, found again, or ordered
    "array", "chdir", "clusters", "dependency", "error", "hold", "job-name", "kill-on-invalid-dep",
    "ntasks", "open-mode", "output", "parsable", "test-only", "wait", "wrap",
}  # fmt: skip


def _text(value: Any) -> Any:
    return str(value) if type(value) is int else value


def _line(text: str) -> str:
    if "\n" in text or "\r" in text:
        raise CvlctlError(f"{text!r} is more than a line", "say it in one")
    return text


def _time(text: str) -> str:
    if text != "infinite" and not _TIME.fullmatch(text):
        raise CvlctlError(f"{text!r} is no time limit", 'say minutes, "HH:MM:SS", "D-HH" or "D-HH:MM:SS"')
    return text


def _mem(text: str) -> str:
    if not re.fullmatch(r"\d+[KMGTkmgt]?", text):
        raise CvlctlError(f"{text!r} is no amount of memory", "say 8G, or megabytes: 8000")
    return text


def _gpus(text: str) -> str:
    if not re.fullmatch(r"([\w.-]+:)?\d+", text):
        raise CvlctlError(f"{text!r} is no number of GPUs", "say 1, or a100:1")
    return text


def _more(more: dict[str, Any]) -> dict[str, Any]:
    for key, value in more.items():
        if key in _OWN_KEYS:
            raise ValueError(f"holds {key}, which is a key of `slurm` itself: {key.split('-')[0]}")
        if key in _OURS:
            raise ValueError(f"holds {key}, which cvlctl sets itself")
        if not re.fullmatch(r"[a-z][a-z0-9-]*", key):
            raise ValueError(f"holds {key!r}, which is no long option of sbatch: say it as in --mail-type, without --")
        if not str(value).isprintable():
            raise ValueError(f"holds more than a line for {key}: {value!r}")
    return more


Text = Annotated[str, BeforeValidator(_text), Field(min_length=1), AfterValidator(checked(_line))]


class SlurmSettings(Strict):
    """`engine: slurm`: what is asked of it for each cell. What is not said is as the cluster has it."""

    partition: Text | None = None  # sbatch --partition
    account: Text | None = None  # --account
    qos: Text | None = None  # --qos
    time: Annotated[Text, AfterValidator(checked(_time))] | None = None  # of a job; a cell may take several
    mem: Annotated[Text, AfterValidator(checked(_mem))] | None = None  # of a cell: 8G, or megabytes
    cpus: Count | None = None  # None: as many as the cell has threads or workers
    gpus: Annotated[Text, AfterValidator(checked(_gpus))] | None = None  # a number, or kind:number
    parallel: Count | None = None  # cells of a stage at once
    setup: tuple[Annotated[str, AfterValidator(checked(_line))], ...] = ()  # lines of bash before the command
    # other options of sbatch by their long names: {mail-type: FAIL}
    more: Annotated[dict[str, StrictBool | StrictInt | StrictFloat | StrictStr], AfterValidator(_more)] = {}


class Task(NamedTuple):
    """What SLURM is told of a cell."""

    name: str
    stage: str
    command: str
    recipe: Path  # its resolved recipe, in the cell's folder
    needs: tuple[str, ...]  # names of the cells whose results it reads
    cpus: int
    settings: SlurmSettings
    force: bool = False  # what there is of its result is replaced; but not where SLURM requeues its job
    unfinished: bool = False  # a run that its `init_from` names need not have come to its end


class Array(NamedTuple):
    """Cells that are one job array; element 1 is the first."""

    name: str  # of its job and its files, unlike all others of the experiment
    tasks: tuple[Task, ...]
    parallel: int | None  # elements at once


class Waits(NamedTuple):
    """What an array waits for, as --dependency has it: all of it, or each element something of its own."""

    whole: str = ""
    elements: tuple[str, ...] = ()  # none: the whole says it all


Place = tuple[str, int]  # a cell in SLURM: job id of its array, number of its element


def arrays(tasks: Sequence[Task], largest: int, first: int, mark: str) -> list[Array]:
    """The tasks as arrays: one a stage, or several where they are more than `largest`, or need different machines.

    Several share what the stage may run at once.

    Args:
        first: number of the first array, in its name.
        mark: of the experiment, in every name.
    """
    kinds: dict[tuple[str, ...], list[Task]] = {}
    for task in tasks:
        kind = (
            task.stage,
            task.command,
            str(task.cpus),
            str(task.force),
            str(task.unfinished),
            task.settings.model_dump_json(),
        )
        kinds.setdefault(kind, []).append(task)
    size = min(largest, MOST)
    parts = [tuple(kind[at : at + size]) for kind in kinds.values() for at in range(0, len(kind), size)]
    found = []
    for number, part in enumerate(parts, start=first):
        beside = sum(other[0].stage == part[0].stage for other in parts)
        parallel = part[0].settings.parallel
        share = None if parallel is None else max(1, parallel // beside)
        stage = re.sub(r"[^\w.-]", "_", part[0].stage)
        found.append(Array(f"{stage}-{number}-{mark}", part, share))
    return found


def waits(array: Array, places: Mapping[str, Place], sizes: Mapping[str, int], *, singly: bool = False) -> Waits:
    """What an array waits for, in as few words as possible.

    Args:
        places: where cells are that SLURM has not finished; a need that is not there is done.
        sizes: of arrays, by job id: how many elements each has.
        singly: each element for itself.
    """
    needs = [{places[need] for need in task.needs if need in places} for task in array.tasks]
    common = set.intersection(*needs)
    own = [each - common for each in needs]
    if not singly and not any(own):
        return Waits(_after(common, sizes))
    beside = {job for job, _ in own[0]}
    corresponds = all(each == {(job, number) for job in beside} for number, each in enumerate(own, start=1))
    if not singly and corresponds and all(sizes[job] == len(array.tasks) for job in beside):
        each_its_own = [f"aftercorr:{job}" for job in sorted(beside, key=_age)]
        return Waits(",".join(filter(None, [_after(common, sizes), *each_its_own])))
    return Waits("", tuple(_after(each, sizes) for each in needs))


def _after(needs: set[Place], sizes: Mapping[str, int]) -> str:
    """ "afterok:12:14_3": all of array 12, and an element of 14."""
    words = []
    for job in sorted({job for job, _ in needs}, key=_age):
        numbers = sorted(number for other, number in needs if other == job)
        words += [job] if len(numbers) == sizes[job] else [f"{job}_{number}" for number in numbers]
    return ":".join(["afterok", *words]) if words else ""


def _age(job: str) -> tuple[int, str]:
    """Orders job ids as numbers."""
    return len(job), job


def seconds_of(time: str) -> float:
    """Of a time limit as sbatch has it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    found = _TIME.fullmatch(time)
    if found is None:
        return float("inf")
    days, *rest = found.groups()
    numbers = [int(number) for number in rest if number is not None]
    units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def options(array: Array, folder: Path, here: Path) -> list[str]:
    """Of sbatch: all that is known before anything is submitted. On its command line they win over its environment."""
    task, settings = array.tasks[0], array.tasks[0].settings
    warning = WARNING_SECONDS
    if settings.time:
        warning = int(max(1, min(warning, seconds_of(settings.time) // 3)))
    own: dict[str, Any] = {
        "job-name": array.name,
        "array": f"1-{len(array.tasks)}" + (f"%{array.parallel}" if array.parallel else ""),
        "partition": settings.partition, "account": settings.account, "qos": settings.qos, "time": settings.time,
        "ntasks": 1, "cpus-per-task": task.cpus, "mem": settings.mem,
        "gres": f"gpu:{settings.gpus}" if settings.gpus not in (None, "0") else None,
        "chdir": here, "output": f"{str(folder).replace('%', '%%')}/{array.name}-%a.txt", "open-mode": "append",
        "kill-on-invalid-dep": "yes", "requeue": True, "signal": f"B:USR1@{warning}",
    }  # fmt: skip
    if settings.more.get("no-requeue"):
        del own["requeue"]
    found = []
    for key, value in {**own, **settings.more}.items():
        if value is not None and value is not False:
            found.append(_line(f"--{key}" if value is True else f"--{key}={value}"))
    return found


_BODY = """\
cd -- {here} || exit 2
recipe=${{cells[SLURM_ARRAY_TASK_ID - 1]}}
export CVLCTL_CELL=${{recipe%/*}} CVLCTL_ENGINE=slurm CVLCTL_JOB=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
# SLURM warns before the time limit, and when it preempts or cancels: the command saves what it has
code=130 stopped= child=
trap 'stopped=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' USR1 TERM
{setup}for _ in {{1..60}}; do
  [ -z "$stopped" ] || break
  child=
  {command} </dev/null >>"$CVLCTL_CELL/log.txt" 2>&1 &
  child=$!
  [ -z "$stopped" ] || kill -TERM "$child" 2>/dev/null # it was warned before it was known which child that is for
  while kill -0 "$child" 2>/dev/null; do wait "$child"; done
  wait "$child"; code=$?
  [ "$code" = 75 ] || break # another process is at this cell: look again in a minute
  sleep 60 & child=$!; wait "$child"
done
trap '' USR1 TERM
# requeued, it goes on with the same bits; but what was cancelled stays so
if [ -n "$stopped" ] && [ "$code" != 0 ] && [ "$(squeue --noheader --format=%T --jobs="$CVLCTL_JOB")" = RUNNING ]; then
  scontrol requeue "$CVLCTL_JOB" && sleep 60
fi
exit "$code"
"""


def script(array: Array, folder: Path, here: Path, *, about: Sequence[str] = ()) -> str:
    """An array's batch script, whole: every element finds its cell in it.

    Args:
        folder: where its output goes.
        here: the directory that relative paths of the recipes start from.
        about: comments.
    """
    begin = f'{shlex.quote(sys.executable)} -P -m cvlctl {array.tasks[0].command} "$recipe"'
    if array.tasks[0].unfinished:
        begin += " --unfinished"
    if array.tasks[0].force:
        begin += ' $([ "${SLURM_RESTART_COUNT:-0}" != 0 ] || echo --force)'
    directives = [f"#SBATCH {_quoted(option)}" for option in options(array, folder, here)]
    cells = [f"  {shlex.quote(str(task.recipe))}" for task in array.tasks]
    setup = "".join(f"{line}\n" for line in array.tasks[0].settings.setup)
    body = _BODY.format(here=shlex.quote(str(here)), setup=setup, command=begin)
    comments = [f"# {line}" for line in about]
    return "\n".join(["#!/bin/bash", *comments, *directives, "cells=(", *cells, ")", body])


def _quoted(option: str) -> str:
    """As sbatch reads it in a script: bare, or in double quotes."""
    return option if re.fullmatch(r"[\w=:,.@%/+*-]+", option) else '"' + re.sub(r'(["\\])', r"\\\1", option) + '"'
