"""What SLURM says of jobs: asked of squeue, which soon forgets what has ended, and of sacct where there is one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines.sbatch import MOST, Place, SlurmSettings

ANSWER_SECONDS = 120  # SLURM's commands try for some time to reach their controller
ENDED = {  # states that a job does not leave by itself
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
NEVER = "DependencyNeverSatisfied"
_NO_NODE = r"node configuration is not available"
_REFUSALS = (  # what SLURM says, the key of `slurm` that it is about, and what shows what is legal
    (r"invalid account", "account", "sacctmgr show associations user=$USER lists those that you may use"),
    (r"partition", "partition", "sinfo --summarize lists the partitions"),
    (r"invalid qos", "qos", "sacctmgr show qos lists them"),
    (r"time", "time", "sinfo --format='%P %l' shows the longest that each partition allows"),
    (r"memory|--mem", "mem", "sinfo --format='%P %m' shows how many megabytes the nodes have"),
    (r"gres|generic resource", "gpus", "sinfo --format='%P %G' shows those of the nodes"),
    (r"processors|cpu", "cpus", "sinfo --format='%P %c' shows how many CPUs the nodes have"),
    (_NO_NODE, "cpus, mem or gpus", "sinfo --format='%P %c %m %G' shows what the nodes have"),
    (r"option", "more", "sbatch --help lists its options"),
)
_FULL = re.compile(r"MaxSubmit|MaxJobCount|temporarily unavailable", re.IGNORECASE)
_AT_ONCE = 500  # jobs in a command line
_WAITING = {  # reasons in words; others are told as SLURM has them
    "Dependency": "for cells that it needs", "JobArrayTaskLimit": "slurm.parallel others of its stage run",
    "Resources": "for free nodes", "Priority": "for free nodes, after jobs of higher priority",
    "BeginTime": "requeued, begins again soon", "JobHeldUser": "on hold",
}  # fmt: skip
_FAILED = {
    "TIMEOUT": "ran into its time limit, and was killed before it could save: raise slurm.time",
    "NODE_FAIL": "its node failed", "PREEMPTED": "other jobs took its place", "BOOT_FAIL": "its node did not start",
    "DEADLINE": "would not have ended by its deadline",
}  # fmt: skip
_MEMORY = re.compile(r"oom[-_ ]?kill|exceeded (job |step )?memory limit", re.IGNORECASE)
_HAD = re.compile(r"exceeded memory limit \((\d+) > (\d+)\)")


class Said(NamedTuple):
    """What SLURM says of a job."""

    state: str  # in its own words, such as PENDING
    reason: str = ""
    host: str = ""
    is_held: bool = False
    exit_code: str = ""  # only where sacct says it
    memory: str = ""  # likewise: what it had at most, and what it asked for


def call(command: Sequence[str], given: str | None = None) -> str:
    """What one of SLURM's commands prints, `given` some text to read.

    Raises:
        CvlctlError: there is no such command, or it does not answer.
        subprocess.CalledProcessError: it refuses; its stderr says why.
    """
    try:
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, errors="replace", timeout=ANSWER_SECONDS,
            check=True, stdin=None if given is not None else subprocess.DEVNULL,
            process_group=0,  # Ctrl-C is for us: a submission comes to its end, or is taken back
        )  # fmt: skip
    except OSError as error:
        raise CvlctlError(f"SLURM is not here: {command[0]}: {error.strerror}", "engine: local needs none") from None
    except subprocess.TimeoutExpired:
        hint = "run the same command again when it does; scontrol ping shows whether it is there"
        raise CvlctlError(f"SLURM does not answer: {command[0]} took over {ANSWER_SECONDS} s", hint) from None
    return done.stdout


def refusal(error: subprocess.CalledProcessError) -> str:
    """What a command said as it failed, in a line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in str(error.stderr).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines)) or f"exit code {error.returncode}"


def queue(jobs: Collection[str]) -> dict[Place, Said]:
    """What squeue knows of the elements of arrays, by their job ids: those that wait, run, or ended a short time ago.

    Raises:
        CvlctlError: it does not answer.
    """
    if not jobs:
        return {}
    form = "%F|%K|%T|%r|%N|%Q"
    try:
        text = call(["squeue", "--array", "--noheader", "--states=all", f"--format={form}", f"--jobs={','.join(jobs)}"])
    except subprocess.CalledProcessError as error:
        if "Invalid job id" in str(error.stderr):  # what it says of one that it has forgotten
            return {}
        raise CvlctlError(f"squeue fails: {refusal(error)}", "scontrol ping shows whether SLURM is there") from None
    return dict(queued(text))


def queued(text: str) -> Iterable[tuple[Place, Said]]:
    """squeue's lines, read."""
    for line in text.splitlines():
        job, number, state, reason, host, priority = line.strip().split("|")
        if number.isdecimal():
            yield (job, int(number)), Said(state, reason, host, is_held=state == "PENDING" and priority == "0")


def accounts(places: Collection[Place]) -> dict[Place, Said]:
    """What sacct knows of elements of arrays; nothing where the cluster keeps no accounts."""
    if not places:
        return {}
    jobs = ",".join(dict.fromkeys(job for job, _ in places))
    form = "JobID,State,ExitCode,MaxRSS,ReqMem,NodeList"
    try:
        text = call(["sacct", "--noheader", "--parsable2", f"--format={form}", f"--jobs={jobs}"])
    except (CvlctlError, subprocess.CalledProcessError):
        return {}
    found = accounted(text)
    return {place: found[place] for place in places if place in found}


def accounted(text: str) -> dict[Place, Said]:
    """sacct's lines, read. Those of a job's steps come after its own, and tell its memory."""
    found: dict[Place, Said] = {}
    for line in text.splitlines():
        name, state, code, most, asked, host = line.strip().split("|")
        match = re.fullmatch(r"(\d+)_(\d+)(\..+)?", name)
        if match is None:
            continue
        place = (match[1], int(match[2]))
        if match[3] is None:
            memory = f"asked for {asked}" if asked else ""
            found[place] = Said(state.split()[0] if state else "", "", host, exit_code=code, memory=memory)
        elif most and place in found:
            found[place] = found[place]._replace(memory=", ".join(filter(None, [f"had {most}", found[place].memory])))
    return found


def in_words(said: Said, output: str = "") -> tuple[str, str]:
    """A job's state ("waiting", "running", "ended", "failed", "blocked" or "cancelled"), and why.

    Args:
        output: the end of its output, where SLURM's daemon writes, too.
    """
    if said.reason == NEVER:
        return "blocked", "a cell that it needs failed or was cancelled"
    if said.state == "PENDING":
        return "waiting", _WAITING.get(said.reason, "" if said.reason == "None" else said.reason)
    if said.state not in ENDED:
        return "running", ""
    if said.state == "COMPLETED":
        return "ended", ""
    if said.state == "OUT_OF_MEMORY" or _MEMORY.search(output):
        return "failed", _memory(said, output)
    if said.state == "CANCELLED":
        return "cancelled", "cancelled in SLURM"
    code = f": exit code {said.exit_code.split(':')[0]}" if said.exit_code else ""
    return "failed", _FAILED.get(said.state, f"it was killed, or failed before it could say why{code}")


def _memory(said: Said, output: str) -> str:
    had = _HAD.findall(output)
    if had:
        took, allowed = (int(number) / 2**20 for number in had[-1])
        facts = f"it had {took:.0f} MiB where it may have {allowed:.0f}"
    else:
        facts = said.memory
    return f"killed for memory{facts and ': '}{facts}; raise slurm.mem, or lower batch_size or memory_gb"


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs back, "12" or "12_3": what runs saves what it has.

    Raises:
        CvlctlError: SLURM does not answer.
    """
    for at in range(0, len(jobs), _AT_ONCE):
        try:
            call(["scancel", *jobs[at : at + _AT_ONCE]])
        except subprocess.CalledProcessError as error:
            if "Invalid job id" not in str(error.stderr) and "already" not in str(error.stderr):  # it ended since
                raise CvlctlError(f"scancel fails: {refusal(error)}", "squeue --me shows what is left") from None


def scontrol(lines: Iterable[str], *, strict: bool = True) -> None:
    """Give scontrol lines to carry out, all in one process.

    Raises:
        CvlctlError: it refuses, unless not `strict`.
    """
    text = "".join(f"{line}\n" for line in lines)
    if text:
        try:
            call(["scontrol"], text)
        except subprocess.CalledProcessError as error:
            if strict:
                hint = "scontrol ping shows whether SLURM is there"
                raise CvlctlError(f"scontrol fails: {refusal(error)}", hint) from None


def check_nodes(stage: str, settings: SlurmSettings, line: Sequence[str]) -> None:
    """Refuse what no node will ever have: of a job on hold, SLURM itself does not say so.

    Args:
        line: of sbatch: options and script.

    Raises:
        CvlctlError: there is no such node.
    """
    try:
        call(["sbatch", "--test-only", *line])
    except subprocess.CalledProcessError as error:
        if re.search(_NO_NODE, str(error.stderr)):  # whatever else it minds may pass, or is said when it is submitted
            raise refused(stage, settings, error) from None


def largest_array() -> int:
    """How many elements an array may have here."""
    try:
        text = call(["scontrol", "show", "config"])
    except subprocess.CalledProcessError as error:
        hint = "scontrol ping shows whether it is there"
        raise CvlctlError(f"SLURM does not answer: {refusal(error)}", hint) from None
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text, re.MULTILINE)
    return max(1, int(found[1]) - 1) if found else MOST


def is_full(error: subprocess.CalledProcessError) -> bool:
    """Whether sbatch refuses because this user or the cluster has too many jobs in it."""
    return _FULL.search(str(error.stderr)) is not None


def refused(stage: str, settings: SlurmSettings, error: subprocess.CalledProcessError) -> CvlctlError:
    """What to say where sbatch refuses an array: the key at fault, where its words tell."""
    said, why = str(error.stderr), refusal(error)
    legal = [(key, hint) for words, key, hint in _REFUSALS if re.search(words, said, re.IGNORECASE)]
    if is_full(error):
        return CvlctlError(f"stage {stage}: SLURM takes no more jobs now: {why}", "later, the same command goes on")
    if not legal:
        return CvlctlError(f"stage {stage}: sbatch fails: {why}", "scontrol ping shows whether SLURM is there")
    key, hint = legal[0]
    value = getattr(settings, key, None)
    named = f"slurm.{key}: {value}" if isinstance(value, str | int) else f"slurm.{key}"
    return CvlctlError(f"stage {stage}: SLURM refuses {named}: {why}", hint)
