"""Videos of policies: episodes that an evaluation plays, played again before cameras, and the same, as functions of
their numbers. What policies do that see frames is asked first, of the one process that answers for them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from cvlctl import frames
from cvlctl.machine import num_cpus
from cvlctl.play import states
from cvlctl.play.cameras import Renderer, cameras_of
from cvlctl.play.env import Act, Env
from cvlctl.play.envs import make
from cvlctl.play.filming import Film
from cvlctl.play.players import goal_lookup, job_of, job_policy, plain_of
from cvlctl.play.rollout import EVALUATION_SEED, PolicyJob, check_fit, roll
from cvlctl.play.showing import run_seeing
from cvlctl.play.workers import share_out

MOST_FPS = 25.0  # frames a second that are kept of a simulator that has more: Metaworld's 80 tell no more than 20
USUAL_FPS = 20.0  # of an environment that does not say

Settings = Mapping[str, Mapping[str, Any]]  # cameras, as recipes have them


def check(jobs: Sequence[PolicyJob], seed: int, cameras: Settings, form: str) -> None:
    """Raise a CvlctlError where videos of these jobs cannot be had, before anything is played."""
    if form == "mp4":
        frames.write_mp4(io.BytesIO(), iter([np.zeros((16, 16, 3), np.uint8)]), USUAL_FPS)
    for task, horizon, about in dict.fromkeys((job.task, job.horizon, job.env) for job in jobs):
        with closing(make(task, EVALUATION_SEED + seed, horizon, about)) as env, Renderer(env, cameras_of(cameras)):
            pass


def name_of(job: PolicyJob, episode: int, form: str) -> str:
    """The file of an episode of a job."""
    parts = (job.algorithm, job.task.partition("/")[2], f"seed-{job.seed}", f"step-{job.step}", f"episode-{episode}")
    return quote("_".join(parts), safe="=,+") + f".{form}"


def make_videos(
    jobs: Sequence[PolicyJob],
    episodes: int,
    seed: int,
    cameras: Settings,
    files: Callable[[PolicyJob, int], Path],
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Film the first `episodes` of every job, as `players.run_episodes` or `showing.run_seeing` plays them, into
    `files`.

    Args:
        device: on which frames are encoded, where policies see them.
        workers: processes; None: one a CPU; 0 or 1: none, all in this process.
        progress: told how many are done.

    Raises:
        CvlctlError: as `check`, and of what is wrong with a checkpoint, or with the disk.
    """
    acted = _acted(jobs, episodes, seed, device, workers)
    requests = [
        {"job": plain_of(job), "episode": episode, "seed": seed, "cameras": {**cameras},
         "file": str(files(job, episode)), "actions": acted.get((job, episode))}
        for job in jobs
        for episode in range(episodes)
    ]  # fmt: skip
    count = num_cpus() if workers is None else workers
    if count <= 1:
        for done, request in enumerate(requests, start=1):
            film(request)
            progress(done)
        return
    with closing(share_out(f"{__name__}:film", requests, count)) as answers:
        for done, _ in enumerate(answers, start=1):
            progress(done)


def _acted(
    jobs: Sequence[PolicyJob], episodes: int, seed: int, device: str, workers: int | None
) -> dict[tuple[PolicyJob, int], list[list[float]]]:
    """The actions of policies that see frames, in their first episodes."""
    seeing, found = [job for job in jobs if job.cameras], dict[tuple[PolicyJob, int], list[list[float]]]()

    def keep(place: int, episode: int, actions: np.ndarray) -> None:
        found[seeing[place], episode] = actions.tolist()

    run_seeing(seeing, episodes=episodes, seed=seed, device=device, workers=workers, acted=keep)
    return found


def film(request: Mapping[str, Any]) -> None:
    """One episode in a worker, and its file."""
    job, actions = job_of(request["job"]), request["actions"]
    with closing(make(job.task, EVALUATION_SEED + request["seed"], job.horizon, job.env)) as env:
        act = _asked(job, request["episode"], env) if actions is None else lambda _, step: np.array(actions[step])
        fps = _fps(env)
        every = max(1, round(fps / MOST_FPS))
        film = Film(env, cameras_of(request["cameras"]), every=every)
        try:
            roll(env, act, request["episode"])
            images = env.filmed()["images"]
        finally:
            film.close()
    shown = [frames.beside(at) for at in zip(*images.values(), strict=True)]
    frames.write_frames(Path(request["file"]), shown, fps=fps / every, force=True)


def _asked(job: PolicyJob, episode: int, env: Env) -> Act:
    """A policy that sees a vector."""
    policy, goal = job_policy(job), goal_lookup()(job, episode)
    check_fit(job.checkpoint, policy, env, job.goals is not None)
    return lambda observation, step: policy(policy.command(observation, goal))


def _fps(env: Env) -> float:
    """How many steps of the environment a second has."""
    said = getattr(states.simulator(env), "metadata", {}).get("render_fps")
    return float(said) if isinstance(said, int | float) and 1 <= said <= 1000 else USUAL_FPS
