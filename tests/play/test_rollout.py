"""Rollouts: rows equal a loop written by hand, for any number of workers and in lock-step; workers end cleanly."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from cvlctl.errors import CvlctlError
from cvlctl.play import lockstep
from cvlctl.play import workers as workers_module
from cvlctl.play.envs import make, scripted_policy
from cvlctl.play.lockstep import run_lockstep
from cvlctl.play.players import run_episodes
from cvlctl.play.policies import NumpyPolicy, RandomPolicy, load_policy
from cvlctl.play.rollout import EVALUATION_SEED, PolicyJob, collect_episode
from cvlctl.types import EpisodeResult

SHAPES = {
    "gym/Pendulum-v1": (3, 1, 200),
    "gym/MountainCarContinuous-v0": (2, 1, 999),
    "metaworld/reach-v3": (39, 4, 500),
}


def checkpoint(path: Path, task: str = "gym/Pendulum-v1", hidden: int = 8, scale: float = 0.3) -> Path:
    """A made-up run of seeds 0 and 1: small random weights."""
    observation_dim, action_dim, horizon = SHAPES[task]
    rng = np.random.default_rng(hidden)
    sizes = [observation_dim, hidden, 2 * action_dim]
    tensors = {"observation_mean": np.zeros((2, observation_dim)), "observation_std": np.ones((2, observation_dim))}
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        tensors[f"actor.{i}.weight"] = rng.normal(0, scale, (2, a, b))
        tensors[f"actor.{i}.bias"] = rng.normal(0, scale, (2, 1, b))
    spec = {"observation_shape": [observation_dim], "action_dim": action_dim, "horizon": horizon, "pixels": False}
    header = {"format": 1, "algorithm": "bc", "task": task, "spec": spec, "seeds": [0, 1], "step": 7}
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, path, {"cvlctl": json.dumps(header)})
    return path


def jobs_of(path: Path, task: str = "gym/Pendulum-v1") -> list[PolicyJob]:
    return [PolicyJob("bc", task, seed, 7, path) for seed in (0, 1)]


@pytest.mark.parametrize("task", ["gym/Pendulum-v1", "metaworld/reach-v3"])
def test_rows_equal_a_rollout_by_hand(tmp_path: Path, task: str) -> None:
    path = checkpoint(tmp_path / "a.safetensors", task)
    rows = run_episodes(jobs_of(path, task), episodes=2, seed=5, workers=2)
    expected = []
    for seed in (0, 1):
        policy = load_policy(path, seed)
        env = make(task, EVALUATION_SEED + 5)
        for episode in range(2):
            observation = env.reset(episode)
            total, length, best, over = 0.0, 0, None, False
            while not over:
                observation, reward, terminated, truncated, success = env.step(policy(observation[None])[0])
                total += reward
                length += 1
                best = success if best is None else best or success
                over = terminated or truncated
            expected.append(("bc", task, seed, 7, episode, total, length, best))
    assert len({row[5] for row in expected}) == 4  # the four episodes differ: the comparison below can fail
    for row, wanted in zip(rows, expected, strict=True):
        assert (row.algorithm, row.task, row.seed, row.step, row.episode, row.length, row.success) == (
            *wanted[:5],
            *wanted[6:],
        )
        # the by-hand loop asks in batches of one, whose products may round differently
        assert row.episode_return == pytest.approx(wanted[5], rel=1e-4)


def test_rows_do_not_depend_on_workers_and_come_in_order(tmp_path: Path) -> None:
    pendulum = checkpoint(tmp_path / "a.safetensors")
    car = checkpoint(tmp_path / "b.safetensors", "gym/MountainCarContinuous-v0")
    jobs = [*jobs_of(pendulum), PolicyJob("x", "gym/MountainCarContinuous-v0", 1, 9, car), jobs_of(pendulum)[0]]
    progress: list[tuple[int, int]] = []
    alone = run_episodes(jobs, episodes=3, seed=1, workers=0)
    shared = run_episodes(jobs, episodes=3, seed=1, workers=3, progress=lambda *at: progress.append(at[:2]))
    assert shared == alone
    assert [(row.algorithm, row.seed, row.episode) for row in alone] == [
        *(("bc", seed, k) for seed in (0, 1) for k in range(3)),
        *(("x", 1, k) for k in range(3)),
        *(("bc", 0, k) for k in range(3)),
    ]
    assert alone[:3] == alone[9:]  # the same policy meets the same episodes
    assert progress == [(k, 12) for k in range(1, 13)]
    assert run_episodes(jobs[:1], episodes=3, seed=2, workers=0) != alone[:3]
    assert run_episodes([], episodes=3, workers=2) == []
    some = run_episodes(jobs, episodes=[[2], [], [1, 0], [1]], seed=1, workers=2)
    assert some == [alone[2], alone[6], alone[7], alone[10]]


def test_workers_never_import_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that leaves a trace when imported stands first on the workers' path."""
    trace = tmp_path / "imported"
    (tmp_path / "torch.py").write_text(f"open({str(trace)!r}, 'w')\nraise ImportError\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = checkpoint(tmp_path / "a.safetensors")
    assert len(run_episodes(jobs_of(path), episodes=2, workers=2)) == 4
    assert not trace.exists()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import torch"
    subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False)
    assert trace.exists()  # the trap works


def test_a_workers_fault_reaches_the_user(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors")
    job = PolicyJob("bc", "gym/Pendulum-v1", 3, 7, path)
    for workers in (0, 2):
        with pytest.raises(CvlctlError, match="no seed 3") as caught:
            run_episodes([job], episodes=2, workers=workers)
        assert caught.value.hint == "its seeds: 0, 1"
        with pytest.raises(CvlctlError, match=r"sees .* and emits"):
            run_episodes(jobs_of(path, "gym/MountainCarContinuous-v0"), episodes=2, workers=workers)
    with pytest.raises(RuntimeError, match="not JSON serializable"):
        list(workers_module.share_out("builtins:set", [[1]], 1))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The worker processes that share_out starts."""
    processes: list[subprocess.Popen[str]] = []
    popen = subprocess.Popen

    def record(*args: Any, **kwargs: Any) -> subprocess.Popen[str]:
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(workers_module.subprocess, "Popen", record)
    return processes


def test_an_interrupt_ends_the_workers(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    def interrupt(done: int, total: int, row: EpisodeResult) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_episodes(jobs_of(checkpoint(tmp_path / "a.safetensors")), episodes=500, workers=2, progress=interrupt)
    assert len(started) == 2
    assert all(process.returncode == -signal.SIGKILL for process in started)


def test_a_worker_that_dies_is_told(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    with pytest.raises(CvlctlError, match="worker process died"):
        run_episodes(
            jobs_of(checkpoint(tmp_path / "a.safetensors")),
            episodes=500,
            workers=2,
            progress=lambda done, total, row: started[0].kill(),
        )
    assert all(process.returncode is not None for process in started)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    path = checkpoint(tmp_path / "a.safetensors")
    script = (
        "import signal\nfrom cvlctl.play.players import *\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell inherit it ignored
        f"job = PolicyJob('bc', 'gym/Pendulum-v1', 0, 7, {str(path)!r})\n"
        "run_episodes([job], episodes=100_000, workers=2, progress=lambda done, total, row: print(done, flush=True))\n"
    )
    # unguarded top-level code: what multiprocessing's spawn would trip over
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    parent = subprocess.Popen([sys.executable, "-P", "-c", script], process_group=0, **pipes)
    assert parent.stdout
    assert parent.stdout.readline() == "1\n"
    lists = Path(f"/proc/{parent.pid}/task").glob("*/children")
    workers = [int(pid) for children in lists for pid in children.read_text().split()]
    assert len(workers) == 2
    os.killpg(parent.pid, how)  # as a terminal's Ctrl-C does
    _, told = parent.communicate(timeout=120)
    assert parent.returncode == -how
    assert told.count("Traceback") == (1 if how == signal.SIGINT else 0)  # no worker adds its own
    deadline = time.monotonic() + 10
    while alive := [pid for pid in workers if _alive(pid)]:
        assert time.monotonic() < deadline, f"workers {alive} live on"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_workers_keep_their_answers_apart_from_what_libraries_print() -> None:
    answers = sorted(workers_module.share_out("builtins:print", ["a", "b", "c"], 2))
    assert answers == [(0, None), (1, None), (2, None)]


def test_workers_run_their_numerics_on_one_thread() -> None:
    before = dict(os.environ)
    assert dict(workers_module.share_out("os:getenv", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"], 1)) == {0: "1", 1: "1"}
    assert dict(os.environ) == before  # the parent's own are left alone


def test_collected_episodes_hold_what_happened() -> None:
    env = make("metaworld/reach-v3", seed=2)
    episode = collect_episode(env, scripted_policy(env.task), 3, collected_at=1500)
    assert len(episode) == 500
    assert episode.rewards is not None
    assert episode.successes is not None
    assert episode.successes.any()
    assert (episode.task, episode.collected_at, episode.seed, episode.terminated) == (env.task, 1500, 2, False)
    observation = env.reset(3)
    assert np.array_equal(observation, episode.observations[0])
    for t in range(20):  # rewards[t] is received on arriving at observations[t + 1]
        observation, reward, _, _, success = env.step(episode.actions[t])
        assert np.array_equal(observation, episode.observations[t + 1])
        assert reward == pytest.approx(episode.rewards[t])
        assert success == episode.successes[t]


def test_a_terminated_episode_keeps_its_final_observation() -> None:
    env = make("gym/Hopper-v5", seed=0)
    episode = collect_episode(env, RandomPolicy(env.spec, 0), 0)
    assert episode.terminated
    assert episode.successes is None
    assert 1 < len(episode) < 1000
    assert len(episode.observations) == len(episode) + 1
    assert not 0.7 < episode.observations[-1][0] < 10 or abs(episode.observations[-1][1]) > 0.2  # it fell


def lockstep_agrees(tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # members of two shapes, more jobs than a product holds, and an uneven number of episodes
    small, large = checkpoint(tmp_path / "a.safetensors"), checkpoint(tmp_path / "b.safetensors", hidden=16)
    jobs = [*jobs_of(small), *jobs_of(large), jobs_of(small)[0]]
    monkeypatch.setattr(lockstep, "JOBS", 2)
    monkeypatch.setattr(lockstep, "ENVS", 2)
    progress: list[tuple[int, int]] = []
    expected = run_episodes(jobs, episodes=3, seed=1, workers=0)
    played = []
    for workers in (0, 3):
        rows = run_lockstep(
            jobs, episodes=3, seed=1, device=device, workers=workers, progress=lambda *at: progress.append(at[:2])
        )
        assert progress.pop() == (15, 15)
        some = run_lockstep(
            jobs, episodes=[[2], [], [0, 1], [], []], seed=1, device=device, workers=workers,
            progress=lambda *at: progress.append(at[:2]),
        )  # fmt: skip
        assert progress.pop() == (3, 3)
        assert some == [rows[at] for at in (2, 6, 7)]
        played.append(rows)
        for row, wanted in zip(rows, expected, strict=True):
            assert (row.algorithm, row.task, row.seed, row.step, row.episode, row.length, row.success) == (
                (wanted.algorithm, wanted.task, wanted.seed, wanted.step, wanted.episode, wanted.length, wanted.success)
            )
            assert row.episode_return == pytest.approx(wanted.episode_return, rel=1e-3)
    assert played[0] == played[1]


def test_lockstep_rows_equal_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lockstep_agrees(tmp_path, "cpu", monkeypatch)
        with pytest.raises(CvlctlError, match=r"sees .* and emits"):
            car = "gym/MountainCarContinuous-v0"
            run_lockstep(jobs_of(tmp_path / "a.safetensors", car), episodes=1, device="cpu")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.cuda
def test_lockstep_rows_equal_the_workers_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lockstep_agrees(tmp_path, "cuda", monkeypatch)


def test_lockstep_products_are_numpy_policies(tmp_path: Path) -> None:
    import torch

    from cvlctl.play.lockstep import _stacked

    path = checkpoint(tmp_path / "a.safetensors", scale=1.0)
    policies: list[NumpyPolicy] = [load_policy(path, seed) for seed in (0, 1)]
    observations = np.random.default_rng(0).normal(0, 8, (2, 5, 3)).astype(np.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # as training may leave it
        actions = _stacked(policies, "cpu")(observations)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for member in (0, 1):
        assert actions[member] == pytest.approx(policies[member](observations[member]), abs=1e-5)
