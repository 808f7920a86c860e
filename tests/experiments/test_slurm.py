"""What SLURM is told and what it says: arrays, dependencies, scripts and refusals. Nothing here needs a SLURM."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.experiments.engines import on_slurm, sbatch, slurm, squeue
from cvlctl.experiments.engines.sbatch import MOST, Array, SlurmSettings, Task, Waits, arrays, options, script, waits
from cvlctl.experiments.run import run_experiment
from cvlctl.recipes.yamlfile import Source


def task(name: str, *needs: str, cpus: int = 1, **settings: Any) -> Task:
    recipe = Path("/e/cells", name, "recipe-1f.yaml")
    return Task(name, name.split("/")[0], "finetune", recipe, needs, cpus, SlurmSettings(**settings))


def tasks(stage: str, number: int, *needs: str, **settings: Any) -> list[Task]:
    return [task(f"{stage}/{i}", *(need.format(i) for need in needs), **settings) for i in range(number)]


def read(**data: Any) -> SlurmSettings:
    return SlurmSettings.read(data, Source("e.yaml", {}))


# --- settings


@pytest.mark.parametrize(
    "fault, words",
    [
        ({"partitoin": "gpu"}, "partition"),
        ({"time": "two hours"}, "no time limit"),
        ({"mem": "much"}, "no amount of memory"),
        ({"gpus": "all"}, "no number of GPUs"),
        ({"cpus": 0}, "cpus"),
        ({"more": {"array": "1-9"}}, "array, which cvlctl sets itself"),
        ({"more": {"mem": "8G"}}, "mem, which is a key of `slurm` itself"),
        ({"more": {"--exclusive": True}}, "no long option"),
        ({"more": {"comment": "a\n#SBATCH --wrap=x"}}, "more than a line"),
        ({"partition": "gpu\nrm -r /"}, "more than a line"),
    ],
)
def test_a_fault_in_what_is_asked_is_told_before_anything_is_submitted(fault: dict[str, Any], words: str) -> None:
    with pytest.raises(CvlctlError, match=words):
        read(**fault)


@pytest.mark.parametrize(
    "time, seconds",
    [("30", 1800), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-0:30", 88200), ("1-0:0:5", 86405)],
)
def test_time_limits_as_sbatch_has_them(time: str, seconds: float) -> None:
    assert sbatch.seconds_of(time) == seconds
    assert read(time=time).time == time


def test_numbers_are_legal_where_sbatch_has_text() -> None:
    settings = read(time=30, mem=8000, gpus=1, account=1234)
    assert (settings.time, settings.mem, settings.gpus, settings.account) == ("30", "8000", "1", "1234")


# --- arrays


def test_one_array_a_stage_with_a_limit_on_how_many_run() -> None:
    found = arrays([*tasks("data", 3, parallel=2), task("scores")], 1000, 5, "ab")
    assert [(one.name, len(one.tasks), one.parallel) for one in found] == [
        ("data-5-ab", 3, 2),
        ("scores-6-ab", 1, None),
    ]


def test_a_large_stage_is_split_and_shares_its_limit() -> None:
    found = arrays(tasks("data", 10, parallel=6), 4, 1, "ab")
    assert [[one.name for one in part.tasks] for part in found] == [
        ["data/0", "data/1", "data/2", "data/3"], ["data/4", "data/5", "data/6", "data/7"], ["data/8", "data/9"],
    ]  # fmt: skip
    assert [part.parallel for part in found] == [2, 2, 2]
    assert [part.parallel for part in arrays(tasks("data", 10, parallel=2), 4, 1, "ab")] == [1, 1, 1]
    assert max(len(part.tasks) for part in arrays(tasks("data", 2 * MOST + 1), 10**6, 1, "ab")) == MOST


def test_cells_that_need_other_machines_are_other_arrays() -> None:
    found = arrays([task("fit/0"), task("fit/1", gpus=1), task("fit/2", cpus=4), task("fit/3")], 1000, 1, "ab")
    assert [[one.name for one in part.tasks] for part in found] == [["fit/0", "fit/3"], ["fit/1"], ["fit/2"]]


# --- dependencies


def array(cells: list[Task]) -> Array:
    return Array("one", tuple(cells), None)


PLACES = {f"data/{i}": ("9", i + 1) for i in range(3)} | {f"fit/{i}": ("10", i + 1) for i in range(3)}
SIZES = {"9": 3, "10": 3}


@pytest.mark.parametrize(
    "cells, expected",
    [
        (tasks("a", 3), Waits()),
        (tasks("a", 3, "finished"), Waits()),
        (tasks("a", 3, "data/{}"), Waits("aftercorr:9")),
        (tasks("a", 3, "data/{}", "fit/{}"), Waits("aftercorr:9,aftercorr:10")),
        (tasks("a", 3, "data/{}", "fit/2"), Waits("afterok:10_3,aftercorr:9")),
        (tasks("a", 2, "data/1"), Waits("afterok:9_2")),
        ([task("a", "data/0", "data/1", "data/2", "fit/1")], Waits("afterok:9:10_2")),
        # fewer than there are: SLURM's aftercorr is of equal arrays
        (tasks("a", 2, "data/{}"), Waits("", ("afterok:9_1", "afterok:9_2"))),
        ([task("a", "data/1"), task("b", "data/0"), task("c", "data/2")],
         Waits("", ("afterok:9_2", "afterok:9_1", "afterok:9_3"))),
        # one has nothing to wait for: what it needs was finished before
        ([task("a"), task("b", "data/1"), task("c", "data/2")], Waits("", ("", "afterok:9_2", "afterok:9_3"))),
    ],
)  # fmt: skip
def test_what_an_array_waits_for(cells: list[Task], expected: Waits) -> None:
    assert waits(array(cells), PLACES, SIZES) == expected


def test_a_cell_may_wait_for_one_of_its_own_array() -> None:
    chain = [task("a/0"), task("a/1", "a/0")]
    places = {"a/0": ("7", 1), "a/1": ("7", 2)}
    assert waits(array(chain), places, {"7": 2}, singly=True).elements == ("", "afterok:7_1")


# --- scripts, carried out by bash alone


def test_options_say_what_the_recipe_says_and_nothing_twice() -> None:
    settings: dict[str, Any] = {"partition": "p", "time": "4:00:00", "mem": "2G", "gpus": "a100:1", "parallel": 2}
    found = options(
        arrays(tasks("a", 3, **settings, more={"exclusive": True, "nice": 5, "x": False}), 9, 1, "ab")[0],
        Path("/e/50%"), Path("/here"),
    )  # fmt: skip
    assert found == [
        "--job-name=a-1-ab", "--array=1-3%2", "--partition=p", "--time=4:00:00", "--ntasks=1", "--cpus-per-task=1",
        "--mem=2G", "--gres=gpu:a100:1", "--chdir=/here", "--output=/e/50%%/a-1-ab-%a.txt", "--open-mode=append",
        "--kill-on-invalid-dep=yes", "--requeue", "--signal=B:USR1@90", "--exclusive", "--nice=5",
    ]  # fmt: skip
    short = options(arrays(tasks("a", 1, time="1", more={"no-requeue": True}), 9, 1, "ab")[0], Path("/e"), Path("/"))
    assert "--signal=B:USR1@20" in short  # later than halfway, however SLURM rounds
    assert "--requeue" not in short


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands on the PATH, as far as a script calls them, and an interpreter that runs recipes as bash."""
    folder = tmp_path / "bin"
    folder.mkdir()
    texts = {
        "python it": 'echo "$@" >>"$CVLCTL_CELL/called"; exec bash "$5"', "squeue": "echo $STATE", "sleep": "exit 0",
        "scontrol": f'echo "$@" >>"{tmp_path}/scontrol"',
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(folder / "python it"))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    return folder


def begin(
    tmp_path: Path, recipe: str, *, number: int = 2, state: str = "RUNNING", setup: str = "", force: bool = False
) -> Any:
    """Element `number` of an array of three, whose recipe is a bash script."""
    cells = [tmp_path / "it's cells" / name for name in ("a/0", "a/1", "a/2")]
    for cell in cells:
        cell.mkdir(parents=True, exist_ok=True)
        (cell / "recipe-1f.yaml").write_text(recipe)
    settings = SlurmSettings(setup=("export FROM_SETUP=yes", setup))
    part = array([Task(f"a/{i}", "a", "fit", cells[i] / "recipe-1f.yaml", (), 1, settings, force) for i in range(3)])
    (tmp_path / "s.sh").write_text(script(part, tmp_path, tmp_path))
    about = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_ARRAY_JOB_ID": "12", "STATE": state}
    return subprocess.Popen(["bash", str(tmp_path / "s.sh")], env=os.environ | about, stderr=subprocess.PIPE, text=True)


def ended(process: Any) -> int:
    assert process.communicate(timeout=30)[1] == ""
    return int(process.returncode)


def test_an_element_runs_its_own_cell(fake: Path, tmp_path: Path) -> None:
    assert ended(begin(tmp_path, "echo $FROM_SETUP $CVLCTL_ENGINE $CVLCTL_JOB $OMP_NUM_THREADS; exit 2")) == 2
    cell = tmp_path / "it's cells" / "a/1"
    assert (cell / "called").read_text() == f"-P -m cvlctl fit {cell}/recipe-1f.yaml\n"
    assert (cell / "log.txt").read_text() == "yes slurm 12_2 1\n"
    assert not (tmp_path / "scontrol").exists()


def test_force_is_for_the_first_run_of_a_job_alone(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "it's cells" / "a/1" / "called"
    assert ended(begin(tmp_path, "exit 0", force=True)) == 0
    assert called.read_text().endswith(" --force\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # it would throw away what the job has saved
    assert ended(begin(tmp_path, "exit 0", force=True)) == 0
    assert called.read_text().endswith("recipe-1f.yaml\n")


SAVES = "trap 'echo saved; exit 130' TERM; echo ready; while :; do /bin/sleep 0.05; done"


@pytest.mark.parametrize(
    "number, state, requeued",
    [(signal.SIGUSR1, "RUNNING", True), (signal.SIGTERM, "RUNNING", True), (signal.SIGTERM, "CANCELLED", False)],
)
def test_a_warning_lets_it_save_and_begin_again_but_not_what_was_cancelled(
    fake: Path, tmp_path: Path, number: int, state: str, requeued: bool
) -> None:
    process = begin(tmp_path, SAVES, state=state)
    log = tmp_path / "it's cells" / "a/1" / "log.txt"
    until = time.monotonic() + 20
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    assert ended(process) == 130
    assert log.read_text() == "ready\nsaved\n"
    assert (tmp_path / "scontrol").exists() is requeued
    if requeued:  # this element, and not the array, whose id is that of its last element, too
        assert (tmp_path / "scontrol").read_text() == "requeue 12_2\n"


def test_a_warning_before_the_command_begins_is_not_lost(fake: Path, tmp_path: Path) -> None:
    process = begin(tmp_path, "exit 0", setup=f"touch '{tmp_path}/sets'; /bin/sleep 0.5")
    until = time.monotonic() + 20
    while not (tmp_path / "sets").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == 130
    assert (tmp_path / "scontrol").read_text() == "requeue 12_2\n"
    assert not (tmp_path / "it's cells" / "a/1" / "called").exists()


def test_a_warning_as_the_command_begins_is_not_lost(fake: Path, tmp_path: Path) -> None:
    amid = r"trap 'case $BASH_COMMAND in child=\$!) kill -TERM $$ ;; esac' DEBUG"  # it runs, and is not known yet
    process = begin(tmp_path, SAVES, setup=amid)
    assert ended(process) in (130, 128 + signal.SIGTERM)  # of a shell that had set no trap yet
    assert (tmp_path / "scontrol").read_text() == "requeue 12_2\n"


def test_a_cell_that_another_process_is_at_is_tried_again(fake: Path, tmp_path: Path) -> None:
    assert ended(begin(tmp_path, '[ "$(wc -l <"$CVLCTL_CELL/called")" = 3 ] || exit 75')) == 0


# --- what SLURM says


@pytest.mark.parametrize(
    "said, output, words",
    [
        (squeue.Said("PENDING", "Dependency"), "", ("waiting", "for cells that it needs")),
        (squeue.Said("PENDING", "Licenses, and so on"), "", ("waiting", "Licenses, and so on")),
        (squeue.Said("COMPLETING"), "", ("running", "")),
        (squeue.Said("COMPLETED"), "exceeded memory limit", ("ended", "")),
        (squeue.Said("CANCELLED", "DependencyNeverSatisfied"), "",
         ("blocked", "a cell that it needs failed or was cancelled")),
        (squeue.Said("FAILED", exit_code="2:0"), "",
         ("failed", "it was killed, or failed before it could say why: exit code 2")),
        (squeue.Said("FAILED"), "error: StepId=3.batch exceeded memory limit (176160768 > 104857600), being killed",
         ("failed", "killed for memory: it had 168 MiB where it may have 100; raise slurm.mem, or lower batch_size or "
                    "memory_gb")),
        (squeue.Said("OUT_OF_MEMORY", memory="had 2097152K"), "",
         ("failed", "killed for memory: had 2097152K; raise slurm.mem, or lower batch_size or memory_gb")),
    ],
)  # fmt: skip
def test_states_in_words(said: squeue.Said, output: str, words: tuple[str, str]) -> None:
    assert squeue.in_words(said, output) == words


def test_what_sacct_says_is_read_with_the_memory_of_its_steps() -> None:
    text = """\
12_1|COMPLETED|0:0||2G|n1
12_1.batch|COMPLETED|0:0|1048576K||n1
12_1.extern|COMPLETED|0:0|||n1
12_2|CANCELLED by 1000|0:0||2G|None assigned
12_3|OUT_OF_MEMORY|0:125||2G|n2
12_3.batch|OUT_OF_MEMORY|0:125|2097000K||n2
13|RUNNING|0:0||2G|n2
"""
    found = squeue.accounted(text)
    assert list(found) == [("12", 1), ("12", 2), ("12", 3)]
    assert (found["12", 2].state, found["12", 3].host) == ("CANCELLED", "n2")
    assert found["12", 3].memory == "had 2097000K, asked for 2G"


def test_what_squeue_says_is_read_and_jobs_of_others_are_left_out() -> None:
    text = "12|1|RUNNING|None|n1|100\n12|2|PENDING|JobHeldUser||0\n14|N/A|RUNNING|None|n1|7\n"
    assert dict(squeue.queued(text)) == {
        ("12", 1): squeue.Said("RUNNING", "None", "n1"),
        ("12", 2): squeue.Said("PENDING", "JobHeldUser", "", is_held=True),
    }


@pytest.mark.parametrize(
    "said, words",
    [
        ("sbatch: error: invalid partition specified: p\nsbatch: error: Batch job submission failed: Invalid partition "
         "name specified", r"stage a: SLURM refuses slurm.partition: p: invalid partition specified: p;"),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         r"SLURM refuses slurm.account: Batch"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
         "accounting/QOS policy", r"SLURM takes no more jobs now: QOSMaxSubmitJobPerUserLimit"),
        ("sbatch: unrecognized option '--nosuch'", r"SLURM refuses slurm.more: "),
        ("sbatch: error: something new", r"sbatch fails: something new"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_key(said: str, words: str) -> None:
    error = subprocess.CalledProcessError(1, ["sbatch"], stderr=said)
    with pytest.raises(CvlctlError, match=words):
        raise squeue.refused("a", SlurmSettings(partition="p"), error)


# --- without SLURM

EXPERIMENT = """\
out: OUT
engine: slurm
slurm: {partition: cpu, time: 60, setup: [module load python]}
matrix: {task: [a, b, c]}
stages:
  critic: {command: pretrain, stores: ["${task}.zarr"], steps: 9, threads: 2, out: "${out}/critic/${task}",
    slurm: {partition: gpu, gpus: 1}}
  policy: {command: finetune, stores: ["${task}.zarr"], steps: 9, threads: 1, init_from: "${out}/critic/${task}",
    algorithm: cvl, out: "${out}/policy/${task}"}
  scores: {command: evaluate, runs: ["${out}/policy/*"], episodes: 1, out: "${out}/scores", slurm: {mem: 1G, cpus: 3}}
"""


def test_an_experiment_becomes_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "e.yaml"
    path.write_text(EXPERIMENT.replace("OUT", str(tmp_path / "e")))
    result = run_experiment(load(path, (), "run"), dry_run=True)
    assert [(one["stage"], one["cells"], one["job"]) for one in result["arrays"]] == [
        ("critic", 3, None), ("policy", 3, None), ("scores", 1, None),
    ]  # fmt: skip
    lines = [Path(one["file"]).read_text().splitlines() for one in result["arrays"]]
    for wanted, found in zip(
        (("partition=gpu", "gres=gpu:1", "cpus-per-task=2"), ("partition=cpu", "cpus-per-task=1"),
         ("mem=1G", "cpus-per-task=3")), lines, strict=True,
    ):  # fmt: skip
        assert {f"#SBATCH --{one}" for one in ("time=60", *wanted)} <= set(found)
        assert "module load python" in found
    # a cell of this engine computes where SLURM puts it: on a GPU, if it asks for one
    recipes = {name: next((tmp_path / "e/cells" / name).glob("recipe-*.yaml")) for name in ("critic/b", "policy/b")}
    assert [load(file).device for file in recipes.values()] == ["cuda", "cpu"]
    assert lines[0][lines[0].index("cells=(") + 2].strip() == str(recipes["critic/b"])
    some = run_experiment(load(path, (), "run"), dry_run=True, only="stage=policy", force=True, unfinished=True)[
        "arrays"
    ]
    assert [(one["stage"], "echo --force" in Path(one["file"]).read_text()) for one in some] == [
        ("critic", False), ("policy", True),  # what these need goes on
    ]  # fmt: skip
    assert [" --unfinished" in Path(one["file"]).read_text() for one in some] == [False, True]
    with pytest.raises(CvlctlError, match="no sbatch on this machine"):
        run_experiment(load(path, (), "run"))
    with pytest.raises(CvlctlError, match="--fail-fast"):
        run_experiment(load(path, (), "run"), fail_fast=True)
    path.write_text(path.read_text().replace("gpus: 1", "gpos: 1"))
    with pytest.raises(CvlctlError, match=r"e.yaml, line 7: unknown key stages.critic.slurm.gpos\n.*did you mean gpus"):
        load(path, (), "run")


DIED = "its process died"


@pytest.mark.parametrize(
    ("by_files", "told", "said", "seen"),
    [
        (("done", ""), {}, ("running", ""), ("done", "")),
        (("running", ""), {"job": "3_1"}, ("waiting", ""), ("running", "")),
        (("failed", "no store"), {"job": "1_1"}, ("waiting", "for free nodes"), ("waiting", "for free nodes")),
        (("failed", DIED), {"job": "3_1"}, ("running", ""), ("running", "")),  # on its way
        (("failed", DIED), {"job": "3_1"}, ("failed", "killed for memory"), ("failed", "killed for memory")),
        (("failed", "no store"), {"job": "3_1"}, ("failed", "its command failed"), ("failed", "no store")),
        (("waiting", ""), {}, ("failed", "its node failed"), ("failed", "its node failed")),
        (("waiting", ""), {}, ("blocked", "a cell"), ("blocked", "a cell")),
        (("stopped", ""), {"job": "3_1"}, ("cancelled", "cancelled in SLURM"), ("stopped", "cancelled in SLURM")),
        (("stopped", ""), {"engine": "local", "job": "x"}, ("failed", "its node failed"), ("stopped", "")),
        (("stopped", ""), {"job": "3_1"}, ("gone", "SLURM knows it no longer"), ("stopped", "")),
    ],
)
def test_what_a_cell_says_and_what_slurm_says_are_one_state(
    by_files: tuple[str, str], told: dict[str, Any], said: tuple[str, str], seen: tuple[str, str]
) -> None:
    assert on_slurm.seen(*by_files, told, slurm.State(*said, "3_1", "n1"), DIED) == seen


def test_scripts_are_written_where_there_is_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    given = [*tasks("data", 2), *tasks("fit", 2, "data/{}"), task("scores", "fit/0", "fit/1")]
    found = slurm.submit(tmp_path / "cells", given, dry_run=True)
    assert [one.cells for one in found] == [("data/0", "data/1"), ("fit/0", "fit/1"), ("scores",)]
    heads = [one.file.read_text().splitlines()[2] for one in found]
    first, second = (one.file.stem for one in found[:2])
    assert heads == ["# dependency: none", f"# dependency: aftercorr:{first}", f"# dependency: afterok:{second}"]
    assert not (tmp_path / "cells" / "slurm.json").exists()
    with pytest.raises(CvlctlError, match="SLURM is not here: no sbatch on this machine"):
        slurm.submit(tmp_path / "cells", given)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "slurm.json").write_text('{"next": 2, "arrays": [{"job": 3}]}')
    with pytest.raises(CvlctlError, match=r"slurm.json is damaged"):
        slurm.states(tmp_path)
