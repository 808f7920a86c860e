"""Frames a second: cvlctl's cameras against an environment's own `render()`, one process and one thread each.

    python benchmarks/rendering.py [--frames 200] [--size 64] [--rounds 3] [--json rendering.json]

Both draw the same simulator after every step of random actions, by EGL. What is timed is the drawing. Machines differ,
and one from day to day: ratios last; at 64x64 a core should give 200 frames/s of Metaworld and 500 of Fetch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cvlctl.play import envs, states
from cvlctl.play.cameras import Renderer, cameras_of
from cvlctl.play.workers import share_out

# camera, frames/s wanted of a core, and the ratio: the least, and the aim
TASKS = {
    "metaworld/drawer-close-v3": ("corner3", 200, 8.0, 12.0),
    "gym/FetchPush-v4": ("external_camera_0", 500, 1.5, 3.0),
}


@lru_cache(maxsize=1)
def _place(task: str, camera: str, size: int, plain: bool) -> tuple[envs.Env, Callable[[], np.ndarray]]:
    env = envs.make(task, 0)
    if not plain:
        renderer = Renderer(env, cameras_of({camera: {"size": size}}))
        return env, lambda: renderer.frames()[camera]
    from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

    raw = states.simulator(env)
    own = MujocoRenderer(raw.model, raw.data, width=size, height=size, camera_name=camera)
    return env, lambda: own.render("rgb_array")  # type: ignore[return-value]


def draw(request: dict[str, Any]) -> list[float]:
    """Frames a second, by the clock and by this process's CPU time."""
    env, frame = _place(request["task"], request["camera"], request["size"], request["plain"])
    actions = np.random.default_rng(0).uniform(-1, 1, (request["frames"], env.spec.action_dim))
    env.reset(0)
    frame()  # compiles shaders
    seconds = cpu = 0.0
    for number, action in enumerate(actions):
        if number % env.spec.horizon == 0:
            env.reset(number)
        env.step(action)
        begin, used = time.perf_counter(), time.process_time()
        frame()
        seconds, cpu = seconds + time.perf_counter() - begin, cpu + time.process_time() - used
    return [request["frames"] / seconds, request["frames"] / cpu]


def benchmark(tasks: Sequence[str], frames: int, size: int, rounds: int) -> dict[str, Any]:
    """Frames a second of either, round by round in turns, each in a process of its own."""
    import os

    import common  # here: its torch is not for the worker processes

    os.environ.setdefault("MUJOCO_GL", "egl")  # without it the environment's own asks for a display
    comparisons, found = [], []
    for task in tasks:
        camera, wanted, least, aim = TASKS[task]
        about = {"task": task, "camera": camera, "size": size, "frames": frames}

        def rate(plain: bool, about: dict[str, Any] = about) -> list[float]:
            [(_, answer)] = share_out("rendering:draw", [about | {"plain": plain}], 1)
            return answer

        done = common.turns({"ours": lambda: rate(False), "theirs": lambda: rate(True)}, rounds)
        ours, theirs = ([one[0] for one in done[name]] for name in ("ours", "theirs"))
        cpu = float(np.median([one[1] for one in done["ours"]]))
        found.append({"task": task, "frames_per_cpu_second": round(cpu), "wanted": wanted})
        print(f"{task}: {cpu:.0f} frames a second of CPU time; {wanted} are wanted")
        work, peer = f"frames of {task}, {size}x{size}", "the environment's own render()"
        comparisons.append(common.versus(work, peer, ours, theirs, unit="frames/s", threads=1, least=least, aim=aim))
    return {"comparisons": comparisons, "frames": frames, "size": size, "tasks": found}


def main(arguments: Sequence[str] | None = None) -> None:
    import common  # as above

    options = common.parser(__doc__, threads=None, rounds=3)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    options.add_argument("--frames", type=int, default=200)
    options.add_argument("--size", type=int, default=64)
    common.main(options, lambda a: benchmark(a.tasks, a.frames, a.size, a.rounds), arguments)


if __name__ == "__main__":
    main()
