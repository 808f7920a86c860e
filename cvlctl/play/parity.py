"""`cvlctl doctor --parity`: whether EnvPool simulates what gymnasium does, measured task by task.

Neither simulator begins where it is told to, but gymnasium's can be brought to where an episode of EnvPool's began:
its first observation tells a robot's joints, an object's place and the goal; in Metaworld that random vector is sought
whose reset answers with the observation. So the same actions from the same start can be compared step by step, and
whole episodes in pairs. Compared are:

* the layout: widths of observation and action, and the time limit;
* where episodes begin: each column of first observations, gymnasium's own starts against EnvPool's own;
* observations and rewards of `STEPS` random steps from the same starts (contact is chaotic, so no more than that, and
  medians: what they show is another formula, or another scene);
* whole episodes from the same starts: the scripted expert's in Metaworld, random ones elsewhere.

A task differs where a difference is shown that is larger than tolerated: by medians, by a Kolmogorov-Smirnov test at
0.1 % (over all columns), or by a 99 % interval of the mean difference of pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from scipy import stats

from cvlctl.errors import CvlctlError
from cvlctl.play import envpool, envs
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.rollout import collect_episode, outcome
from cvlctl.progress import Progress
from cvlctl.terminal import print_text
from cvlctl.types import Episode

TASKS = (
    "metaworld/drawer-close-v3",
    "metaworld/door-open-v3",
    "metaworld/window-open-v3",
    "metaworld/pick-place-v3",
    "gym/FetchPush-v4",
    "gym/Hopper-v5",
)
SEED = 0
STARTS = 48  # of EnvPool's own, against 50 of gymnasium's: Metaworld's 50 goals
STEPS = 5
TOLERANCE = 0.01  # of observations and rewards; of a return, of its reference range or mean; of a success rate

Like = Callable[[np.ndarray], np.ndarray]  # begin an episode with this first observation, or what comes nearest


def parity(tasks: Sequence[str], episodes: int = 10) -> list[dict[str, Any]]:
    """Rows of the comparison: task, compared, gymnasium, envpool, difference (all in words), agrees.

    Args:
        tasks: none: `TASKS`.
        episodes: whole episodes of each task, from 2 on.

    Raises:
        CvlctlError: an unknown task, one that EnvPool lacks, or EnvPool is not installed.
    """
    if episodes < 2:
        raise CvlctlError(f"--episodes {episodes}: an interval needs two at least", "the default is 10")
    tasks = tasks or TASKS
    for task in tasks:
        envpool.check(task)
    rows: list[dict[str, Any]] = []
    with Progress("parity", len(tasks), "tasks") as progress:
        for number, task in enumerate(tasks):
            found = _compared(task, episodes)
            rows += [{"task": task, **row} for row in found]
            progress.update(number + 1, f"{task} {'agrees' if all(row['agrees'] for row in found) else 'differs'}")
    return rows


def render(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows, and which tasks differ."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("task", "compared", "gymnasium", "envpool", "difference", "verdict"):
        table.add_column(heading, overflow="fold")
    before = None
    for row in rows:
        cells = [row[name] for name in ("compared", "gymnasium", "envpool", "difference")]
        table.add_row(row["task"] if row["task"] != before else "", *cells, "agrees" if row["agrees"] else "differs")
        before = row["task"]
    console.print(table)
    different = dict.fromkeys(row["task"] for row in rows if not row["agrees"])
    print_text(f"differs: {', '.join(different)}" if different else "no difference beyond what is tolerated")


def _compared(task: str, episodes: int) -> list[dict[str, Any]]:
    env = envs.make(task, SEED)
    try:
        brief = replace(env.spec, horizon=min(STEPS, env.spec.horizon))
        begun = _theirs(env, brief, lambda number: RandomPolicy(brief, SEED, number), max(STARTS, episodes))
        widths = begun[0].observations.shape[1], begun[0].actions.shape[1], envpool.horizon_of(task)
        ours = (*env.spec.observation_shape, env.spec.action_dim, env.spec.horizon)
        layout = _row("columns, actions, limit", (str(ours), str(widths)), "", ours == widths)
        if not layout["agrees"]:
            return [layout]
        starts = np.stack([env.reset(number) for number in range(envs.NUM_GOALS)])
        rows = [layout, _starts(starts, np.stack([episode.observations[0] for episode in begun]))]
        start = like(env)
        rows += _steps(_matched([(_again(env, start, episode), episode) for episode in begun[:episodes]]))
        scripted = task.startswith("metaworld/")
        expert = envs.scripted_policy(task) if scripted else None
        act_of = lambda number: expert or RandomPolicy(env.spec, SEED, number)  # noqa: E731
        whole = _theirs(env, env.spec, act_of, episodes)
        pairs = [(_again(env, start, episode, act_of(number)), episode) for number, episode in enumerate(whole)]
        return rows + _whole(_matched(pairs), "expert" if scripted else "random", envs.references(task))
    finally:
        env.close()


def _theirs(env: envs.Env, spec: Any, act_of: Callable[[int], envs.Act], total: int) -> list[Episode]:
    return list(envpool.collect(env.task, spec, SEED, act_of, total=total))


def _again(env: envs.Env, start: Like, episode: Episode, act: envs.Act | None = None) -> Episode:
    """In `env`, from where `episode` began: its actions (`act` None), or what `act` does."""
    before = env.begin, env.spec
    try:
        env.begin = lambda number: start(episode.observations[0].astype(float))
        if act is None:
            env.spec = replace(env.spec, horizon=len(episode))
        return collect_episode(env, act or (lambda observation, step: episode.actions[step]), 0)
    finally:
        env.begin, env.spec = before


# --- what is compared


def _row(compared: str, told: Sequence[str], difference: str, agrees: Any) -> dict[str, Any]:
    row = {"compared": compared, "gymnasium": told[0], "envpool": told[1], "difference": difference}
    return row | {"agrees": bool(agrees)}


def _starts(ours: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    """First observations (n, O) and (m, O): constant columns by their means, the others by their distributions."""
    both = np.concatenate([ours, theirs])
    varies = np.flatnonzero(np.ptp(both, axis=0) > TOLERANCE)
    apart = [stats.ks_2samp(ours[:, column], theirs[:, column]) for column in varies]
    likely = [test.pvalue * max(1, len(varies)) for test in apart]
    constant = np.abs(ours.mean(0) - theirs.mean(0))
    column = int(varies[np.argmin(likely)]) if len(varies) else int(np.argmax(constant))
    told = [f"column {column}: {x[:, column].min():.3g} to {x[:, column].max():.3g}" for x in (ours, theirs)]
    worst = f"p {min(1.0, min(likely)):.2g} over {len(varies)} columns" if len(varies) else f"{constant.max():.2g}"
    return _row(f"{len(ours)} starts and {len(theirs)}", told, worst, not len(varies) or min(likely) > 0.001)


def _matched(pairs: Sequence[tuple[Episode, Episode]]) -> list[tuple[Episode, Episode]]:
    """Those that begin alike, but for what is different in most of them: an odd one is a start that was not found.

    Raises:
        CvlctlError: fewer than two do.
    """
    apart = np.stack([theirs.observations[0] - ours.observations[0] for ours, theirs in pairs])
    odd = np.abs(apart - np.median(apart, axis=0)).max(1) > TOLERANCE
    if (~odd).sum() < 2:
        what = f"{pairs[0][0].task}: too few starts of EnvPool's can be had in gymnasium to compare them"
        raise CvlctlError(what, "try more --episodes, or leave the task out")
    return [pair for pair, left_out in zip(pairs, odd, strict=True) if not left_out]


def _steps(pairs: Sequence[tuple[Episode, Episode]]) -> list[dict[str, Any]]:
    """(gymnasium's, EnvPool's) from the same starts by the same actions: medians of what differs."""
    seen = [_common(ours.observations, theirs.observations) for ours, theirs in pairs]
    first = float(np.median([np.abs(one[0][0] - one[1][0]).max() for one in seen]))
    rows = []
    earned = [_common(_rewards(ours)[:, None], _rewards(theirs)[:, None]) for ours, theirs in pairs]
    for what, found in (("observation", seen), ("reward", earned)):
        ours, theirs = (np.concatenate([one[side] for one in found]) for side in (0, 1))
        apart = np.median(np.abs(ours - theirs), axis=0)
        beyond = apart - TOLERANCE * np.maximum(1.0, np.abs(ours).mean(0))
        column = int(np.argmax(beyond))
        name = f"column {column}: " if what == "observation" else ""
        told = [f"{name}mean {x[:, column].mean():.4g}" for x in (ours, theirs)]
        more = f", {first:.1g} at first" if what == "observation" else ""
        label = f"{what}, {STEPS} steps from {len(pairs)} same starts"
        rows.append(_row(label, told, f"median {apart[column]:.2g}{more}", beyond[column] <= 0))
    return rows


def _whole(pairs: Sequence[tuple[Episode, Episode]], by: str, reference: Any) -> list[dict[str, Any]]:
    """(gymnasium's, EnvPool's) whole episodes from the same starts: return, success, length."""
    results = [[(*outcome(episode), len(episode)) for episode in pair] for pair in pairs]
    totals = np.array([[one[0] for one in pair] for pair in results])
    span = reference["max"] - reference["min"] if reference else max(1.0, abs(float(totals[:, 0].mean())))
    rows = [_paired(f"return, {len(pairs)} {by} episodes", totals, TOLERANCE * span, "{:.4g}")]
    if results[0][0][1] is not None:
        rows.append(_paired("success", np.array([[float(bool(one[1])) for one in pair] for pair in results])))
    lengths = np.array([[float(one[2]) for one in pair] for pair in results])
    return [*rows, _paired("length", lengths, TOLERANCE * lengths[:, 0].mean(), "{:.4g}")]


def _paired(compared: str, pairs: np.ndarray, tolerated: float = TOLERANCE, form: str = "{:.0%}") -> dict[str, Any]:
    """Means of (n, 2), and a 99 % interval of the mean difference.

    Where all pairs agree their spread says nothing of pairs yet to come: of successes, two pairs are added that
    disagree, one either way (as Agresti and Min do it).
    """
    apart = pairs[:, 1] - pairs[:, 0]
    spread = np.concatenate([apart, [-1.0, 1.0]]) if form.endswith("%}") else apart
    half = float(stats.t.ppf(0.995, len(spread) - 1) * spread.std(ddof=1) / np.sqrt(len(spread)))
    mean = float(apart.mean())
    told = [f"mean {form.format(value)}" for value in pairs.mean(0)]
    interval = f"{form.format(mean)} ± {form.format(half)}"
    return _row(compared, told, interval, abs(mean) - half <= tolerated)


def _common(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    steps = min(len(ours), len(theirs))
    return ours[:steps].astype(float), theirs[:steps].astype(float)


def _rewards(episode: Episode) -> np.ndarray:
    assert episode.rewards is not None
    return episode.rewards


# --- the same start in gymnasium's simulator


def like(env: envs.Env) -> Like:
    """A function that begins an episode of `env` with a first observation (O,) that is as near as can be to a given
    one, and returns it."""
    if env.task.startswith("metaworld/"):
        return _metaworld(env)
    return _fetch(env) if "Fetch" in env.task else _other(env)


class _Refused(Exception):
    """A start that Metaworld does not accept: it would draw for ever."""


def _metaworld(env: envs.Env) -> Like:
    """By the random vector of its reset: few numbers, of which the first observation is nearly an affine function (in
    `slopes`, fitted to the starts of the 50 goals)."""
    raw, begin = env.raw, env.begin

    def first(vector: np.ndarray) -> np.ndarray:
        calls = itertools.count()

        def drawn() -> np.ndarray:
            if next(calls) > 100:  # some tasks draw again until the object is far from the goal
                raise _Refused
            return vector.copy()

        raw._get_state_rand_vec = drawn
        try:
            return np.asarray(begin(0), dtype=float)
        finally:
            del raw._get_state_rand_vec

    known = [(np.asarray(env.reset(n), dtype=float), np.array(raw._last_rand_vec)) for n in range(envs.NUM_GOALS)]
    seen, vectors = (np.stack(each) for each in zip(*known, strict=True))
    slopes = np.linalg.lstsq(vectors - vectors.mean(0), seen - seen.mean(0), rcond=1e-6)[0].T  # (O, V)
    space = raw._random_reset_space

    def start(observation: np.ndarray) -> np.ndarray:
        nearest = int(np.argmin(np.abs(seen - observation).sum(1)))
        at, now = vectors[nearest], first(vectors[nearest])
        for _ in range(4):
            missing = observation - now
            weights = 1 / (np.abs(missing) + 1e-3)  # a column that cannot be had must not pull at the others
            step = np.linalg.lstsq(slopes * weights[:, None], missing * weights, rcond=1e-6)[0]
            moved = np.clip(at + step, space.low, space.high)
            try:
                now = first(moved)
            except _Refused:
                return first(at)
            at = moved
            if np.abs(observation - now).max() < 1e-5:
                break
        return now

    return start


def _fetch(env: envs.Env) -> Like:
    """By the object's place and the goal; the arm always begins alike."""

    def start(observation: np.ndarray) -> np.ndarray:
        env.raw.reset(seed=0)
        robot = env.raw.inside
        robot.goal = observation[-3:].copy()
        if robot.has_object:
            place = robot._utils.get_joint_qpos(robot.model, robot.data, "object0:joint")
            place[:3] = observation[3:6]
            robot._utils.set_joint_qpos(robot.model, robot.data, "object0:joint", place)
            robot._mujoco.mj_forward(robot.model, robot.data)
        return env.raw.seen()

    return start


def _other(env: envs.Env) -> Like:
    """By the state, which the observation tells but for the place on the ground."""
    raw = env.raw

    def start(observation: np.ndarray) -> np.ndarray:
        raw.reset(seed=0)
        if env.task == "gym/Pendulum-v1":
            raw.state = np.array([np.arctan2(observation[1], observation[0]), observation[2]])
            return raw._get_obs()
        if env.task == "gym/MountainCarContinuous-v0":
            raw.state = observation.copy()
            return observation
        hidden = 2 if "Ant" in env.task else 1
        state = np.concatenate([np.zeros(hidden), observation])
        raw.set_state(state[: raw.model.nq], state[raw.model.nq : raw.model.nq + raw.model.nv])
        return raw._get_obs()

    return start
