"""Collecting random episodes: gymnasium in one process and in two, and EnvPool with two threads.

    python benchmarks/backends.py [--tasks ...] [--episodes 16] [--rounds 3] [--json backends.json]

Whole episodes of uniformly random actions, as `build-dataset` collects them from `source: {name: random}`, without the
store. gymnasium in one process is what it does by default; two processes share the episodes out, one thread each;
EnvPool is `backend: envpool` with two threads. Simulators and processes are made beforehand: what is timed are the
episodes. Needs the extra `envpool`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cvlctl.play import envpool, envs
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.rollout import collect_episode
from cvlctl.play.workers import share_out
from cvlctl.types import Spec

TASKS = ("metaworld/pick-place-v3", "metaworld/drawer-close-v3")
PROCESSES = 2  # and threads of EnvPool

_env = lru_cache(maxsize=1)(lambda task: envs.make(task, 0))


Done = dict[str, float]  # steps, seconds, cpu_seconds


def play(request: dict[str, Any]) -> Done:
    """Some episodes in gymnasium, in this process."""
    env = _env(request["task"])
    env.reset(0)
    begin, cpu = time.perf_counter(), time.process_time()
    steps = sum(len(collect_episode(env, RandomPolicy(env.spec, 0, n), n)) for n in request["episodes"])
    return {"steps": steps, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}


def in_processes(task: str, episodes: int) -> Done:
    """Parts of the episodes each, which begin together: the slowest one counts."""
    parts = [{"task": task, "episodes": list(range(part, episodes, PROCESSES))} for part in range(PROCESSES)]
    done = [answer for _, answer in share_out("backends:play", parts, PROCESSES)]
    both = {name: sum(one[name] for one in done) for name in ("steps", "cpu_seconds")}
    return both | {"seconds": max(one["seconds"] for one in done)}


def in_envpool(task: str, spec: Spec, episodes: int) -> Done:
    """From the first episode's beginning to the last one's end; the pool is made before."""
    begun: list[tuple[float, float]] = []

    def act_of(number: int) -> envs.Act:
        begun.append((time.perf_counter(), time.process_time()))  # the first time, all starts are there
        return RandomPolicy(spec, 0, number)

    steps = sum(map(len, envpool.collect(task, spec, 0, act_of, total=episodes, threads=PROCESSES)))
    begin, cpu = begun[0]
    return {"steps": steps, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}


def benchmark(tasks: Sequence[str], episodes: int, rounds: int) -> dict[str, Any]:
    """Steps a second of each way, round by round in turns; medians of EnvPool's ratios, in time and in CPU time."""
    import common  # here: its torch is not for the worker processes

    found, comparisons = [], []
    for task in tasks:
        spec = _env(task).spec
        ways: dict[str, Callable[[], Done]] = {
            "gymnasium": lambda task=task: play({"task": task, "episodes": list(range(episodes))}),  # type: ignore[misc]
            "processes": lambda task=task: in_processes(task, episodes),  # type: ignore[misc]
            "envpool": lambda task=task, spec=spec: in_envpool(task, spec, episodes),  # type: ignore[misc]
        }
        done = common.turns(ways, rounds)
        rates = {name: [one["steps"] / one["seconds"] for one in each] for name, each in done.items()}
        pairs = zip(done["gymnasium"], done["envpool"], strict=True)
        cpu = [slow["cpu_seconds"] / fast["cpu_seconds"] for slow, fast in pairs]
        found.append({"task": task, "steps_per_second": rates, "cpu_time_ratio": round(float(np.median(cpu)), 2)})
        print(f"{task}: EnvPool's CPU time is smaller by {found[-1]['cpu_time_ratio']}x")
        work = f"random episodes of {task}, backend envpool"
        for name, peer in (("gymnasium", "backend gymnasium"), ("processes", f"the same in {PROCESSES} processes")):
            row = common.versus(work, peer, rates["envpool"], rates[name], unit="frames/s", threads=PROCESSES)
            comparisons.append(row)
    return {
        "comparisons": comparisons, "episodes": episodes, "tasks": found,
        "envpool": envpool.versions(tasks[0]),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    import common  # as above

    options = common.parser(__doc__, threads=None, rounds=3)
    options.add_argument("--tasks", nargs="+", default=list(TASKS))
    options.add_argument("--episodes", type=int, default=16)
    common.main(options, lambda a: benchmark(a.tasks, a.episodes, a.rounds), arguments)


if __name__ == "__main__":
    main()
