"""The SLURM engine on a real SLURM of one node. Cells are a few lines of bash here, that look for what they need."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cvlctl.errors import CvlctlError
from cvlctl.experiments.engines import slurm, slurm_jobs, squeue
from cvlctl.experiments.engines.sbatch import SlurmSettings, Task

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]
PATIENCE = 60.0  # seconds


class Experiment:
    """A folder of cells, and how they are made."""

    def __init__(self, cells: Path) -> None:
        self.cells = cells

    def task(self, name: str, *needs: str, text: str = "", recipe: str = "recipe-1f.yaml", **settings: Any) -> Task:
        """A cell that fails where what it needs is not there, does what `text` says, and leaves a file `ran`."""
        file = self.cells / name / recipe
        file.parent.mkdir(parents=True, exist_ok=True)
        wanted = "".join(f"[ -f '{self.cells / need}/ran' ] || exit 9\n" for need in needs)
        file.write_text(f'{wanted}{text}\necho ran >>"$CVLCTL_CELL/ran"\n')
        asked = {"time": "1", "mem": "50M", **settings}
        return Task(name, name.split("/")[0], "fit", file, needs, 1, SlurmSettings(**asked))

    def states(self) -> dict[str, str]:
        return {name: state.state for name, state in slurm.states(self.cells).items()}

    def wait(self, until: Callable[[dict[str, str]], bool] | None = None) -> dict[str, str]:
        """The cells' states once they are like that; else once none waits or runs."""
        begin = time.monotonic()
        while True:
            found = self.states()
            if until(found) if until else not {"waiting", "running"} & set(found.values()):
                return found
            assert time.monotonic() - begin < PATIENCE, slurm.states(self.cells)
            time.sleep(0.2)

    def times(self, name: str) -> int:
        """How often a cell ran to its end."""
        file = self.cells / name / "ran"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.fixture
def experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/bash\nexec bash "$5"\n')  # what python -P -m cvlctl COMMAND RECIPE becomes
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    made = Experiment(tmp_path / "an experiment" / "cells")
    yield made
    slurm.cancel(made.cells)


def grid(experiment: Experiment, failing: str = "") -> list[Task]:
    """Five stores; a critic of each; two policies of each store and critic; and scores of all, and of two."""
    numbers, task = range(5), experiment.task
    return [
        *(task(f"data/{i}", text="exit 2" if f"data/{i}" == failing else "") for i in numbers),
        *(task(f"critic/{i}", f"data/{i}") for i in numbers),
        *(task(f"policy/{i}{k}", f"data/{i}", f"critic/{i}", parallel=4) for i in numbers for k in "ab"),
        task("scores/all", *(f"policy/{i}{k}" for i in numbers for k in "ab")),
        task("scores/two", "policy/0a", "policy/1a"),
    ]


def test_cells_run_in_order_and_a_failure_stays_where_it_happens(experiment: Experiment) -> None:
    submitted = slurm.submit(experiment.cells, grid(experiment, failing="data/2"))
    # ten policies are more than an array of this cluster may have: 7 and 3
    assert [len(one.cells) for one in submitted] == [5, 5, 7, 3, 2]
    assert "--array=1-7%2" in submitted[2].file.read_text()
    assert slurm.submit(experiment.cells, grid(experiment, failing="data/2")) == []
    found = experiment.wait()
    assert {name for name, state in found.items() if state == "failed"} == {"data/2"}
    behind = {"critic/2", "policy/2a", "policy/2b", "scores/all"}
    assert {name for name, state in found.items() if state == "blocked"} == behind
    assert all(found[name] == "ended" for name in found.keys() - behind - {"data/2"})

    # mended: what failed and what waited for it, and nothing twice
    left = [one for one in grid(experiment) if found[one.name] != "ended"]
    assert sum(len(one.cells) for one in slurm.submit(experiment.cells, left)) == 5
    assert set(experiment.wait().values()) == {"ended"}
    assert {experiment.times(name) for name in found} == {1}


def test_what_is_added_waits_for_what_is_under_way(experiment: Experiment) -> None:
    slow = [experiment.task(f"data/{i}", text="sleep 1.5") for i in range(2)]
    slurm.submit(experiment.cells, slow)
    more = [*slow, experiment.task("critic/1", "data/1"), experiment.task("scores/all", "critic/1", "data/0")]
    assert [one.cells for one in slurm.submit(experiment.cells, more)] == [("critic/1",), ("scores/all",)]
    assert set(experiment.wait().values()) == {"ended"}


def test_what_is_cancelled_stays_so_and_what_waits_for_it_never_runs(experiment: Experiment) -> None:
    text = "trap 'echo saved >\"$CVLCTL_CELL/saved\"; exit 130' TERM\nfor i in {1..400}; do sleep 0.1; done"
    tasks = [experiment.task(f"data/{i}", text=text, parallel=1) for i in range(3)]
    tasks += [experiment.task(f"fit/{i}", f"data/{i}") for i in (2, 1, 0)]
    tasks += [experiment.task(f"scores/{i}", f"data/{i}") for i in range(3)]
    slurm.submit(experiment.cells, tasks)
    found = experiment.wait(lambda found: "running" in found.values())
    runs = next(number for number in range(3) if found[f"data/{number}"] == "running")
    waits, other = {0, 1, 2} - {runs}
    assert len(slurm.cancel(experiment.cells, [f"data/{runs}", f"data/{waits}"])) == 2
    behind = {f"{stage}/{number}" for stage in ("fit", "scores") for number in (runs, waits)}
    found = experiment.wait(lambda found: {found[name] for name in behind} == {"blocked"})
    assert found[f"data/{runs}"] == "cancelled"
    assert (experiment.cells / f"data/{runs}/saved").exists()
    assert not any(experiment.times(name) for name in found)
    assert sorted(slurm.cancel(experiment.cells)) == [f"{stage}/{other}" for stage in ("data", "fit", "scores")]
    assert not {"waiting", "ended"} & set(experiment.wait().values())


@pytest.mark.parametrize(
    "asked, words",
    [
        ({"partition": "nowhere"}, r"stage fit: SLURM refuses slurm.partition: nowhere: invalid partition"),
        ({"partition": "short", "time": "2:00:00"}, r"stage fit: SLURM refuses slurm.time: 2:00:00: "),
        ({"mem": "900G"}, r"SLURM refuses slurm.cpus, mem or gpus: "),
        ({"gpus": "1"}, r"SLURM refuses slurm.gpus: 1: "),
        ({"more": {"no-such": True}}, r"SLURM refuses slurm.more: "),
    ],
)
def test_a_refusal_names_the_key_and_leaves_nothing_behind(
    experiment: Experiment, asked: dict[str, Any], words: str
) -> None:
    tasks = [experiment.task("data/0"), experiment.task("fit/0", "data/0", **asked)]
    with pytest.raises(CvlctlError, match=words):
        slurm.submit(experiment.cells, tasks)
    assert squeue.call(["squeue", "--noheader"]) == ""
    assert experiment.states() == {}
    assert len(slurm.submit(experiment.cells, [*tasks[:1], experiment.task("fit/0", "data/0")])) == 2


@pytest.mark.parametrize("kill_at", ["record 2", "record 4", "release"])
def test_a_submission_that_is_killed_anywhere_leaves_no_cell_out_and_runs_none_twice(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, kill_at: str
) -> None:
    tasks = [
        *(experiment.task(f"data/{i}") for i in range(2)),
        *(experiment.task(f"fit/{i}", "data/1") for i in range(2)),
    ]
    child = os.fork()
    if child == 0:
        calls = iter(range(100))
        keep, scontrol = slurm_jobs.keep, squeue.scontrol

        def kept(*arguments: Any) -> None:
            if kill_at == f"record {next(calls)}":  # SLURM has the job, and nothing tells so
                os.kill(os.getpid(), signal.SIGKILL)
            keep(*arguments)

        def let_go(lines: Any, **options: Any) -> None:
            lines = list(lines)
            if kill_at == "release" and any("release" in line for line in lines):
                scontrol(lines[:1])
                os.kill(os.getpid(), signal.SIGKILL)
            scontrol(lines, **options)

        slurm_jobs.keep, squeue.scontrol = kept, let_go  # type: ignore[assignment]
        slurm.submit(experiment.cells, tasks)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    slurm.submit(experiment.cells, tasks)
    assert experiment.wait() == {task.name: "ended" for task in tasks}
    assert {experiment.times(task.name) for task in tasks} == {1}


def test_an_experiment_that_changes_while_it_waits_is_told(experiment: Experiment) -> None:
    slurm.submit(experiment.cells, [experiment.task("data/0", text="sleep 20")])
    with pytest.raises(CvlctlError, match=r"data/0 is in SLURM as job \d+_1 with another recipe"):
        slurm.submit(experiment.cells, [experiment.task("data/0", recipe="recipe-2e.yaml")])
    slurm.cancel(experiment.cells)
    experiment.wait()
    assert len(slurm.submit(experiment.cells, [experiment.task("data/0", recipe="recipe-2e.yaml")])) == 1


def test_a_cell_that_is_killed_for_memory_says_so_and_by_how_much(experiment: Experiment) -> None:
    program = "import time; x = [b'x' * 10_000_000 for _ in range(20)]; time.sleep(20)"
    python = Path(sys.base_prefix, "bin", "python3")
    slurm.submit(experiment.cells, [experiment.task("fit/0", text=f'{python} -c "{program}"')])
    assert experiment.wait() == {"fit/0": "failed"}
    why = slurm.states(experiment.cells)["fit/0"].why
    assert why.startswith("killed for memory: it had 2")
    assert "where it may have 50; raise slurm.mem" in why


@pytest.mark.slow
def test_before_its_time_is_over_a_cell_saves_and_goes_on_where_it_was(experiment: Experiment) -> None:
    """A limit of a minute: SLURM warns 20 seconds before at the latest."""
    text = (
        "trap 'echo saved >>\"$CVLCTL_CELL/saved\"; exit 130' TERM\n"
        '[ -f "$CVLCTL_CELL/saved" ] || while :; do sleep 0.1; done'
    )
    lost = 'trap "" TERM\nwhile :; do sleep 0.1; done'
    tasks = [experiment.task("data/0", text=text), experiment.task("fit/0", "data/0")]
    tasks += [experiment.task("deaf/0", text=lost), experiment.task("blocked/0", "deaf/0")]
    slurm.submit(experiment.cells, tasks)
    begin = time.monotonic()
    while set(experiment.states().values()) & {"waiting", "running"}:
        assert time.monotonic() - begin < 240, slurm.states(experiment.cells)
        time.sleep(1)
    assert experiment.states() == {"data/0": "ended", "fit/0": "ended", "deaf/0": "failed", "blocked/0": "blocked"}
    assert (experiment.cells / "data/0/saved").read_text() == "saved\n"
    assert "ran into its time limit" in slurm.states(experiment.cells)["deaf/0"].why
