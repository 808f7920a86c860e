"""Collecting random episodes: gymnasium in one process and in two, and EnvPool with two threads.

    python benchmarks/backends.py [--tasks ...] [--episodes 16] [--rounds 3] [--json backends.json]

Whole episodes of uniformly random actions, as `build-dataset` collects them from `source: {name: random}`, without the
store. gymnasium in one process is what it does by default; two processes share the episodes out, one thread each;
EnvPool is `backend: envpool` with two threads. Simulators and processes are made beforehand: what is timed are the
episodes. Needs the extra `envpool`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl import envpool_backend, envs
from cvlctl.policies import RandomPolicy
from cvlctl.rollout import collect_episode
from cvlctl.types import Spec
from cvlctl.workers import share_out

TASKS = ("metaworld/pick-place-v3", "metaworld/drawer-close-v3")
PROCESSES = 2  # and threads of EnvPool

_env = lru_cache(maxsize=1)(lambda task: envs.make(task, 0))


def play(request: dict[str, Any]) -> dict[str, float]:
    """Some episodes in gymnasium, in this process: how many steps in how many seconds."""
    env = _env(request["task"])
    env.reset(0)
    begin = time.perf_counter()
    steps = sum(len(collect_episode(env, RandomPolicy(env.spec, 0, n), n)) for n in request["episodes"])
    return {"steps": steps, "seconds": time.perf_counter() - begin}


def one_process(task: str, episodes: int) -> float:
    """Steps a second."""
    done = play({"task": task, "episodes": list(range(episodes))})
    return done["steps"] / done["seconds"]


def two_processes(task: str, episodes: int) -> float:
    """Steps a second: both halves begin together, and the slower one counts."""
    halves = [{"task": task, "episodes": list(range(half, episodes, PROCESSES))} for half in range(PROCESSES)]
    done = [answer for _, answer in share_out("backends:play", halves, PROCESSES)]
    return sum(one["steps"] for one in done) / max(one["seconds"] for one in done)


def in_envpool(task: str, spec: Spec, episodes: int) -> float:
    """Steps a second, from the first episode's beginning to the last one's end; the pool is made before."""
    begin = 0.0

    def act_of(number: int) -> envs.Act:
        nonlocal begin
        begin = begin or time.perf_counter()  # the first slot's: all starts are there by now
        return RandomPolicy(spec, 0, number)

    collected = envpool_backend.collect(task, spec, 0, act_of, total=episodes, threads=PROCESSES)
    steps = sum(map(len, collected))
    return steps / (time.perf_counter() - begin)


def benchmark(tasks: Sequence[str], episodes: int, rounds: int) -> dict[str, Any]:
    """Steps a second of each way, round by round in turns, and medians of EnvPool's ratios."""
    from critic import machine  # its torch is not for the worker processes

    before = machine()
    found = []
    for task in tasks:
        spec = _env(task).spec
        rates: dict[str, list[float]] = {"gymnasium": [], "gymnasium_two_processes": [], "envpool": []}
        for _ in range(rounds):
            rates["gymnasium"].append(one_process(task, episodes))
            rates["gymnasium_two_processes"].append(two_processes(task, episodes))
            rates["envpool"].append(in_envpool(task, spec, episodes))
        ratios = {
            name: round(float(np.median(np.array(rates["envpool"]) / np.array(rates[name]))), 2)
            for name in ("gymnasium", "gymnasium_two_processes")
        }
        steps = {name: [round(rate) for rate in each] for name, each in rates.items()}
        found.append({"task": task, "steps_per_second": steps, "envpool_ratio_to": ratios})
    versions = envpool_backend.versions(tasks[0])
    return {
        "episodes": episodes, "tasks": found, "envpool": versions,
        "machine": before, "load_average_after": machine()["load_average"],
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    args = parser.parse_args(arguments)
    found = benchmark(args.tasks, args.episodes, args.rounds)
    print(f"steps a second, median of {args.rounds} rounds of {args.episodes} random episodes")
    print(f"{'':27} gymnasium  2 processes  envpool, 2 threads")
    for one in found["tasks"]:
        rates = [np.median(each) for each in one["steps_per_second"].values()]
        to = one["envpool_ratio_to"]
        ratios = f"({to['gymnasium']}x one process, {to['gymnasium_two_processes']}x two)"
        print(f"{one['task']:27} {rates[0]:9.0f} {rates[1]:12.0f} {rates[2]:8.0f} {ratios}")
    state = found["machine"]
    load = f"load {state['load_average'][0]} before and {found['load_average_after'][0]} after"
    print(f"{state['cpu']}, {state['cpus']} CPUs, {load}; envpool {found['envpool']['envpool']}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
