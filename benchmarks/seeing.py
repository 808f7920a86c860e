"""50 evaluation episodes of a policy that sees frames: cvlctl's against one environment stepped at a time.

    python benchmarks/seeing.py [--episodes 50] [--horizon 50] [--workers 2] [--rounds 3] [--json seeing.json]

A policy of random weights, cloned for a single update, sees stacks of three frames of one camera, 64x64. Ours:
`showing.run_seeing`, worker processes that simulate and draw, one process that answers for eight environments at once.
Theirs: the plain loop, one environment, one renderer (cvlctl's own, on both sides), one observation at a time. Wall
seconds, environments and processes being made on the way; rounds alternate. `disagreement` is the largest relative
difference of an episode's return: both play the same episodes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from evaluation import play_in_turns

from cvlctl.collect.build import build
from cvlctl.collect.recipe import BuildRecipe
from cvlctl.learn.finetune import finetune
from cvlctl.learn.recipe import FinetuneRecipe
from cvlctl.play import envs
from cvlctl.play.cameras import Camera, Renderer, cameras_of
from cvlctl.play.policies import load_policy
from cvlctl.play.rollout import EVALUATION_SEED, PolicyJob
from cvlctl.play.showing import run_seeing

TASKS = {"metaworld/drawer-close-v3": "corner3", "gym/FetchReach-v4": "external_camera_0"}
STACK = 3


def a_run(task: str, size: int, folder: Path) -> Path:
    """A run of behaviour cloning, of one update, on a few random steps."""
    common_keys = {"device": "cpu", "threads": 1, "compile": "false"}
    build(BuildRecipe.model_validate({
        **common_keys, "task": task, "source": {"name": "random", "episodes": 1}, "horizon": 5,
        "cameras": {TASKS[task]: {"size": size}}, "out": folder / "x.zarr",
    }))  # fmt: skip
    finetune(FinetuneRecipe.model_validate({
        **common_keys, "stores": [{"path": folder / "x.zarr"}], "algorithm": {"name": "bc"}, "steps": 1,
        "batch_size": 4, "observe": {"cameras": [TASKS[task]], "stack": STACK}, "out": folder / "run",
    }))  # fmt: skip
    return folder / "run"


def ours(job: PolicyJob, episodes: int, workers: int) -> list[float]:
    """Returns of the episodes, in their order."""
    return [row.episode_return for row in run_seeing([job], episodes=episodes, workers=workers)]


def one_at_a_time(job: PolicyJob, episodes: int) -> list[float]:
    """The same by the plain loop."""
    policy: Any = load_policy(job.checkpoint)
    env, returns = envs.make(job.task, EVALUATION_SEED, job.horizon), []
    (camera,) = job.cameras
    with Renderer(env, job.cameras) as renderer:
        for episode in range(episodes):
            env.reset(episode)
            frame, total, over = renderer.frames()[camera.name], 0.0, False
            stack = np.repeat(frame[None], STACK, axis=0)
            while not over:
                _, reward, terminated, truncated, _ = env.step(policy({camera.name: stack[None]})[0])
                stack = np.concatenate([stack[1:], renderer.frames()[camera.name][None]])
                total, over = total + reward, terminated or truncated
            returns.append(total)
    env.close()
    return returns


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Wall seconds of both, on every task."""
    torch.set_num_threads(args.threads)
    comparisons, disagreement = [], {}
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            run = a_run(task, args.size, Path(folder))
            cameras: tuple[Camera, ...] = tuple(cameras_of({TASKS[task]: {"size": args.size}}))
            job = PolicyJob("bc", task, 0, 1, run, horizon=args.horizon, cameras=cameras)
            calls: dict[str, Callable[[], list[float]]] = {
                "theirs": partial(one_at_a_time, job, args.episodes),
                "ours": partial(ours, job, args.episodes, args.workers),
            }
            taken, returns = play_in_turns(calls, args.rounds)
        mine, theirs = (returns[name] for name in ("ours", "theirs"))
        disagreement[task] = float((np.abs(theirs - mine) / np.maximum(np.abs(mine), 1.0)).max())
        work = f"{args.episodes} episodes of {args.horizon} steps from frames, {task}, {args.workers} processes"
        comparisons.append(
            common.versus(work, "one environment at a time", taken["ours"], taken["theirs"], unit="seconds",
                          threads=args.threads, least=1.8)
        )  # fmt: skip
        print(f"{task}: disagreement {disagreement[task]:.1e}")
    return {"comparisons": comparisons, "disagreement": disagreement, "episodes": args.episodes, "size": args.size}


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, rounds=3)
    options.add_argument("--tasks", nargs="+", default=list(TASKS))
    options.add_argument("--episodes", type=int, default=50)
    options.add_argument("--horizon", type=int, default=50)
    options.add_argument("--size", type=int, default=64)
    options.add_argument("--workers", type=int, default=2, help="processes of ours")
    common.main(options, benchmark, arguments)


if __name__ == "__main__":
    main()
