"""The Ray engine: what needs no Ray; and on a Ray of its own, by stand-ins and by a training whose worker is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_local import CELLS, TEXT, Acts, Journal, interrupt_amid, states

from cvlctl import cell as own
from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.experiments import look
from cvlctl.experiments.commands import load
from cvlctl.experiments.engines import on_ray, ray_cluster, ray_work, start
from cvlctl.experiments.graph import folder_of
from cvlctl.experiments.run import planned, run_experiment
from cvlctl.files import is_running, lock

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'cvlctl[ray]'")
MARK = "CVLCTL_TEST_MARK"  # in the environment of a driver, and so of all that it starts


@pytest.fixture
def experiment(tmp_path: Path, acts: Acts) -> Callable[..., Any]:
    path = tmp_path / "e.yaml"
    path.write_text(TEXT.replace("OUT", str(tmp_path / "e")))
    return lambda *overrides: load(path, ["engine=ray", *overrides], "run")


def asked(experiment: Any, nodes: Sequence[dict[str, float]]) -> dict[str, tuple[float, float, float]]:
    """Of each stage: num_cpus, num_gpus, max_retries."""
    found = {}
    for cell in planned(experiment, keep=False):
        one = on_ray.asked_of(cell, nodes)
        found[cell.job.stage] = (one["num_cpus"], one["num_gpus"], one["max_retries"])
    return found


def test_what_a_cell_asks_of_ray(experiment: Any, tmp_path: Path) -> None:
    two, big = {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}
    assert asked(experiment(), [two]) == {"critic": (1, 0, 3), "policy": (1, 0, 3), "both": (2, 0, 3)}
    own_settings = ["ray.num_gpus=0.25", "ray.max_retries=1", "stages.critic.ray={num_cpus: 0.5, num_gpus: 0}"]
    # a stage without a GPU computes on the CPU; another gets its part of one
    assert asked(experiment(*own_settings), [two, big]) == {
        "critic": (0.5, 0, 1), "policy": (1, 0.25, 1), "both": (2, 0.25, 1),
    }  # fmt: skip
    scores = "stages.both={command: evaluate, runs: ['${out}/policy/*'], out: '${out}/both'}"
    assert asked(experiment(scores), [two, big])["both"] == (8, 0, 3)  # players of episodes: a node of their own
    assert asked(experiment(scores, "stages.both.workers=3"), [two, big])["both"] == (3, 0, 3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["stages.both.threads=9"],
      r"both asks Ray for 9 CPUs and 0 GPUs, and no node has them \(there are: 2 CPUs, 0 GPUs; 8 CPUs, 1 GPUs\)"),
     (["ray.num_gpus=2"], r"critic/a asks Ray for 1 CPUs and 2 GPUs"),
     (["stages.policy.device=cuda"], r"stage policy computes on a GPU .*, and ray\.num_gpus gives it none")],
)  # fmt: skip
def test_what_no_node_has_is_an_error_and_no_wait_for_ever(experiment: Any, overrides: list[str], message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        asked(experiment(*overrides), [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}])


@pytest.mark.parametrize(
    ("override", "message"),
    [("ray.address=ray://head:10001", "ray://head:10001 is for clients outside of a cluster"),
     ("ray.address=head", "'head' is no address of a Ray cluster"),
     ("ray.max_retries=-1", r"ray\.max_retries: "), ("ray.num_cpus=0", r"ray\.num_cpus: "),
     ("ray.num_gpus=1.5", r"ray\.num_gpus"), ("ray.cpus=1", r"unknown key ray\.cpus")],
)  # fmt: skip
def test_settings_are_checked(experiment: Any, override: str, message: str) -> None:
    with pytest.raises(CvlctlError, match=message):
        experiment(override)


def test_without_ray_it_says_how_to_get_it(experiment: Any, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(CvlctlError, match=r"engine: ray needs the package ray\n.*pip install 'cvlctl\[ray\]'"):
        run_experiment(experiment())
    assert journal() == []


def test_where_nobody_answers_is_known_at_once(experiment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(CvlctlError, match=f"no Ray cluster answers at {address}: "):
            run_experiment(experiment(f"ray.address={address}"))
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(CvlctlError, match=f"no Ray cluster answers at {address}: "):
            run_experiment(experiment("ray.address=auto"))
    assert time.monotonic() - begin < 20
    with pytest.raises(CvlctlError, match=r"stage critic has a ray\.address of its own"):
        run_experiment(experiment("stages.critic.ray={address: auto}"))


def test_ray_is_imported_where_cells_are_run_alone() -> None:
    files = Path(on_ray.__file__).parents[1].rglob("*.py")
    assert [file.name for file in files if re.search(r"^(import|from) ray\b", file.read_text(), re.MULTILINE)] == []


def test_a_node_that_lacks_the_files_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["pretrain", str(tmp_path / "none.yaml")]
    for here, missing in ((str(tmp_path / "away"), tmp_path / "away"), (str(tmp_path), tmp_path / "none.yaml")):
        told = ray_work.work(here, "job", str(tmp_path), line)
        assert told["state"] == "failed"
        assert f"lacks {missing}, which the experiment is run with" in told["error"][0]
    assert ray_work.work("away", "job", str(tmp_path), line, {"state": "failed"}) == {"state": "waits"}


def test_a_task_that_ray_begins_again_throws_nothing_away(tmp_path: Path, acts: Acts, journal: Journal) -> None:
    folder = folder_of(tmp_path / "e", "critic/a")
    folder.mkdir(parents=True)
    (tmp_path / "r.yaml").touch()
    for job in ("one", "one", "two"):  # twice in one task: its worker died
        told = ray_work.work(str(tmp_path), job, str(folder), ["pretrain", str(tmp_path / "r.yaml"), "--force"])
        assert told["state"] == "done"
    forced = ["--force" in line["argv"] for line in journal() if line["what"] == "begun"]
    assert forced == [True, False, True]


# on a Ray of its own


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of one node and two CPUs that knows nothing of cvlctl; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("cluster")
    command = [
        sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
        "--num-gpus=2",  # Ray takes our word for them
        f"--port={address.split(':')[1]}", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
        "--disable-usage-stats", "--object-store-memory=100000000",
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")  # as `ray start` says, and as who joins by an address has to
        patch.setenv("RAY_worker_niceness", "0")
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            _until_started(process, folder / "log")
            yield address
        finally:
            process.terminate()
            process.wait(60)


def _until_started(process: subprocess.Popen[Any], log: Path) -> None:
    until = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.2)


@pytest.fixture
def on_cluster(cluster: str, experiment: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The experiment there, its cells stand-ins in the workers too."""
    plain = on_ray.by_value

    def by_value(path: list[str], here: str) -> Any:
        task, code = plain(path, here), start._CODE

        def cell(*arguments: Any) -> Any:
            import sys

            sys.path[:] = [*path, *sys.path]
            from cvlctl.experiments.engines import start

            start._CODE = code
            return task(*arguments)

        return cell

    monkeypatch.setattr(on_ray, "by_value", by_value)
    return lambda *overrides: experiment(f"ray.address={cluster}", *overrides)


@needs_ray
@pytest.mark.slow
def test_cells_run_in_order_and_a_failure_stays_where_it_happens(
    on_cluster: Any, acts: Acts, journal: Journal, tmp_path: Path
) -> None:
    acts(**{"critic/a": "sleep 1", "critic/b": "fail"})
    result = run_experiment(on_cluster())
    assert states(result) == {"critic/a": "finished", "critic/b": "failed", "policy/a": "finished",
                              "policy/b": "blocked", "both": "finished"}  # fmt: skip
    assert (result["cells"][1]["error"], result["cells"][1]["hint"]) == ("it cannot be", "do something else")
    assert result["cells"][3]["error"] == "it needs critic/b, which failed"
    lines = [(line["cell"], line["what"]) for line in journal()]
    for name in ("policy/a", "both"):
        assert lines.index(("critic/a", "ended")) < lines.index((name, "begun"))
    assert sorted(lines) == sorted((name, what) for name in CELLS if name != "policy/b" for what in ("begun", "ended"))
    told = json.loads((folder_of(tmp_path / "e", "critic/a") / own.STATE).read_text())
    assert told["engine"] == "ray"
    assert len(told["job"]) == 48  # of a task

    # again: kills of a cell and of a worker are told of, and what another process runs is left to it
    acts(**{"critic/b": "grow; die", "policy/a": "kill"})
    held = lock(folder_of(tmp_path / "e", "critic/a") / own.LOCK)
    before = len(lines)

    def let_go() -> None:
        while len(journal()) == before:  # critic/b: its task starts as early as that of critic/a
            time.sleep(0.05)
        time.sleep(3)
        held.close()

    threading.Thread(target=let_go).start()
    on_gpu = ["ray.num_gpus=1", *(f"stages.{stage}.device=cuda" for stage in ("critic", "policy"))]
    result = run_experiment(
        on_cluster(*on_gpu, "stages.policy.ray={num_gpus: 0.5, max_retries: 0}", "stages.both.device=cpu")
    )
    assert states(result) == {"critic/a": "finished", "critic/b": "failed", "policy/a": "failed",
                              "policy/b": "blocked", "both": "finished"}  # fmt: skip
    assert result["cells"][2]["error"] == "its worker or node died, more often than ray.max_retries allows"
    found = {row["cell"]: row["why"] for row in look.look(on_cluster())["cells"]}
    assert found["policy/a"] == "its worker or node died, more often than ray.max_retries allows"
    assert result["cells"][1]["error"].startswith(
        "killed (SIGKILL), most likely because memory ran out; it had taken 0."
    )
    lines = [(line["cell"], line["what"]) for line in journal()][before:]
    assert {line["gpu"] for line in journal()[before:] if line["cell"] != "both"} <= {"0", "1"}
    assert lines[0] == ("critic/b", "begun")
    assert lines.count(("critic/a", "begun")) == 1


@needs_ray
def test_a_cluster_that_is_gone_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(services, "canonicalize_bootstrap_address", lambda address: "127.0.0.1:9")  # as its file says
    begin = time.monotonic()
    with pytest.raises(CvlctlError, match=r"no Ray cluster answers at 127\.0\.0\.1:9: "), ray_cluster.joined("auto"):
        pass
    assert time.monotonic() - begin < 30


@needs_ray
@pytest.mark.slow
def test_an_interrupt_and_fail_fast_reach_every_cell(on_cluster: Any, acts: Acts, journal: Journal) -> None:
    interrupt_amid(on_cluster, acts, journal, signal.SIGTERM)

    lines = journal()
    acts(**{"critic/a": "sleep 60", "critic/b": "fail"})
    result = run_experiment(on_cluster(), fail_fast=True)
    assert states(result) == {"critic/a": "stopped", "critic/b": "failed", "policy/a": "stopped", "policy/b": "stopped",
                              "both": "stopped"}  # fmt: skip
    lines = [(line["cell"], line["what"]) for line in journal()[len(lines) :]]
    assert lines.count(("critic/a", "begun")) == lines.count(("critic/a", "ended"))
    assert not [line for line in lines if line[0] not in ("critic/a", "critic/b")]


STEPS = 3000
REAL = """\
out: OUT
stages:
  data: {command: build-dataset, task: gym/Pendulum-v1, source: {name: random, episodes: 2}, out: "${out}/p.zarr"}
  critic:
    {command: pretrain, stores: ["${out}/p.zarr"], critic: {hidden: [8], latent_dim: 4}, steps: STEPS, batch_size: 16,
     seeds: [0, 1], threads: 1, compile: false, checkpoint_seconds: 0.1, out: "${out}/critic"}
  policy:
    {command: finetune, stores: ["${out}/p.zarr"], init_from: "${out}/critic", algorithm: {name: cvl, hidden: [8]},
     steps: 9, batch_size: 16, seeds: [0, 1], threads: 1, compile: false, out: "${out}/policy"}
"""


class Driver:
    """`cvlctl run`, as people start it, and whatever it starts."""

    def __init__(self, folder: Path, engine: str, steps: int) -> None:
        self.out, self.mark = folder / engine, f"{folder}/{engine}/{time.monotonic()}"
        file = folder / f"{engine}.yaml"
        file.write_text(REAL.replace("OUT", str(self.out)).replace("STEPS", str(steps)))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cvlctl", "run", str(file), "--engine", engine],
            env=os.environ | {MARK: self.mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def state(self, cell: str) -> dict[str, Any]:
        file = self.out / "cells" / cell / own.STATE
        return dict(json.loads(file.read_text())) if file.exists() else {}

    def until_saved(self) -> None:
        """Until the critic has a checkpoint, and works on."""
        until = time.monotonic() + 240
        while not (self.out / "critic/checkpoints/last.safetensors").exists():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.05)

    def left(self) -> list[str]:
        """What it started and is not gone."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}\0".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " ")[:200])
            except OSError:
                continue
        return found

    def assert_nothing_is_left(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while (left := self.left()) and time.monotonic() < until:
            time.sleep(0.2)
        assert left == []

    def weights(self) -> dict[str, torch.Tensor]:
        files = sorted(self.out.rglob("last.safetensors"))
        return {
            f"{file.parents[1].name}/{key}": value for file in files for key, value in checkpoints.load(file)[0].items()
        }


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_is_killed_changes_no_bit_and_nothing_outlives_the_driver(tmp_path: Path) -> None:
    local = Driver(tmp_path, "local", STEPS)
    _, said = local.process.communicate(timeout=300)
    assert local.process.returncode == 0, said

    driver = Driver(tmp_path, "ray", STEPS)
    driver.until_saved()
    first = driver.state("critic")
    worker = int(Path(f"/proc/{first['pid']}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    _, said = driver.process.communicate(timeout=300)
    assert driver.process.returncode == 0, said
    assert "Traceback" not in said
    driver.assert_nothing_is_left()
    last = driver.state("critic")
    assert (last["state"], last["job"]) == ("done", first["job"])
    assert last["pid"] != first["pid"]  # another process went on
    assert "resum" in (driver.out / "cells/critic/log.txt").read_text()
    one, other = local.weights(), driver.weights()
    assert one.keys() == other.keys()
    assert len({key.split("/")[0] for key in one}) == 2
    assert all(torch.equal(one[key], other[key]) for key in one)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_driver_that_is_ended(tmp_path: Path, end: signal.Signals) -> None:
    driver = Driver(tmp_path, "ray", 10**9)
    driver.until_saved()
    driver.process.send_signal(end)
    _, said = driver.process.communicate(timeout=120)
    assert driver.process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), said
    assert "Traceback" not in said
    if end == signal.SIGINT:
        assert "the same command goes on" in said
        assert driver.state("critic")["state"] == "stopped"
    until = time.monotonic() + 60
    while is_running(driver.state("critic")["pid"]):
        assert time.monotonic() < until
        time.sleep(0.1)
    driver.assert_nothing_is_left(60 if end == signal.SIGINT else 240)  # Ray's own agents take a minute to notice
