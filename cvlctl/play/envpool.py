"""EnvPool as the simulator of a collection or evaluation: `NUM_SLOTS` environments of a task, stepped by its threads.

Episode number n of a seed is the same whoever collects it, and after whatever: it is start number n div 8 of slot
n mod 8, each slot has a seed of its own, and a start depends on nothing that was done before it. That is what lets a
killed collection resume. It is not the same episode as the other simulator's: starts are drawn anew each time, without
Metaworld's 50 goals. What EnvPool does otherwise than gymnasium, and what is made of it here:

* It hides Metaworld's goal unless told otherwise (`partially_observable=False`).
* A step past an episode's end is answered by a row of no episode, the next one's first observation (next-step
  autoreset). Here a slot is reset by name as soon as its episode is over, so such a row never comes.
* An end on the very step of the time limit counts as a truncation even where the environment ended the episode: its
  limit is therefore set one step further than ours, which cuts the episode off here.
* No goal can be commanded: the `-fixed` Fetch tasks are refused.
* It has a MuJoCo of its own inside, and tasks that are not the reference's: `DIFFERENT`, said when one is collected.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus
from cvlctl.play import envs
from cvlctl.play.env import Act
from cvlctl.play.players import job_policy, numbers_of
from cvlctl.play.rollout import (
    EVALUATION_SEED,
    Episodes,
    PolicyAct,
    PolicyJob,
    Progress,
    act_together,
    check_fit,
    result_row,
)
from cvlctl.progress import say
from cvlctl.types import Episode, EpisodeResult, Spec

NUM_SLOTS = 8  # decides which episodes there are: changing it changes every collection

TESTED = "1.2.5"  # the version that this is known of, by `cvlctl doctor --parity` over all tasks
DIFFERENT = {
    "metaworld/button-press-topdown-wall-v3": "rewards are others, nearly 0 (the expert's return is 2, not 2100)",
    "metaworld/dial-turn-v3": "expert never succeeds (it always does in gymnasium)",
    "metaworld/door-close-v3": "door moves otherwise, by centimetres",
    "metaworld/door-lock-v3": "rewards are others, a fifth higher for the expert",
    "metaworld/hammer-v3": "goal moves further at every reset, out of the scene",
    "metaworld/lever-pull-v3": "observed orientation of the lever is another",
    "metaworld/pick-place-v3": "reward for approaching is up to 0.03 higher a step, out of 10",
    "metaworld/plate-slide-back-v3": "expert's return is 4 % lower",
    "metaworld/push-back-v3": "reward for approaching is up to 0.02 higher a step, out of 10",
    "metaworld/shelf-place-v3": "goal moves further at every reset, out of the scene",
    "metaworld/soccer-v3": "rewards are others, by 0.1 a step far from the ball",
    "metaworld/sweep-v3": "rewards are others, by 0.3 a step far from the object",
    "metaworld/sweep-into-v3": "rewards are others, by 0.2 a step far from the object",
    "metaworld/window-close-v3": "first observation of an episode has the handle 20 cm away",
    "gym/FetchSlide-v4": "arm begins 39 cm away",
}


def check(task: str) -> None:
    """Raises CvlctlError where EnvPool is not installed, or does not have `task`."""
    _package()
    envs.check_task(task)
    if task.endswith("-fixed"):
        raise CvlctlError(f"EnvPool cannot command {task}'s goal", "use backend: gymnasium for it")


def versions(task: str) -> dict[str, str]:
    """What decides the numbers, for provenance: as `Env.versions` says it of the other simulator.

    Raises:
        CvlctlError: see `check`.
    """
    check(task)
    found = {"backend": "envpool", "envpool": metadata.version("envpool"), "numpy": metadata.version("numpy")}
    found |= {"starts": "drawn anew for each episode"}
    if simulator := _mujoco(task):
        found["mujoco"] = simulator
    if task in DIFFERENT and found["envpool"] == TESTED:
        found["differs"] = DIFFERENT[task]
    return found


def announced_versions(task: str, where: str) -> dict[str, str]:
    """The same, and a line for people, headed by `where`, if the task is known to differ from gymnasium's."""
    found = versions(task)
    if "differs" in found:
        say(f"{where}: in EnvPool, {task}'s {found['differs']}; see cvlctl doctor --parity {task}")
    return found


def name_of(task: str) -> str:
    """What EnvPool calls `task`: metaworld/drawer-close-v3 is MetaWorld/DrawerClose-v3."""
    prefix, name = task.split("/")
    if prefix != "metaworld":
        return name
    return f"MetaWorld/{''.join(map(str.capitalize, name.removesuffix('-v3').split('-')))}-v3"


def horizon_of(task: str) -> int:
    """EnvPool's own time limit of `task`."""
    return int(_package().make_spec(name_of(task)).config.max_episode_steps)


class Pool:
    """`NUM_SLOTS` environments of `task`; actions, observations and limits as `envs.Env` has them.

    Args:
        spec: of the same task's `Env`: its horizon is where `collect` cuts episodes off.
        threads: None: one for each CPU that this process may use.

    Raises:
        CvlctlError: see `check`.
    """

    def __init__(self, task: str, spec: Spec, seed: int, threads: int | None = None) -> None:
        check(task)
        options = {"partially_observable": False} if task.startswith("metaworld/") else {}
        seeds = [int(np.random.SeedSequence([seed, slot]).generate_state(1)[0] >> 1) for slot in range(NUM_SLOTS)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the precision of its bounds
            self._pool: Any = _package().make_gymnasium(
                name_of(task),
                num_envs=NUM_SLOTS,
                num_threads=min(num_cpus() if threads is None else max(1, threads), NUM_SLOTS),
                env_seed=seeds,
                max_episode_steps=spec.horizon + 1,
                **options,
            )
            _ = self._pool.observation_space  # made, and warned of, at the first use
        self.task, self.spec = task, spec
        action = self._pool.spec.action_array_spec["action"]
        self._centre, self._scale = (action.maximum + action.minimum) / 2, (action.maximum - action.minimum) / 2

    def reset(self, slots: np.ndarray) -> np.ndarray:
        """The next start of each of `slots` (k,), ascending; returns first observations (k, O), float32."""
        return _flat(self._pool.reset(slots.astype(np.int32))[0])

    def step(
        self, slots: np.ndarray, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """One step of each of `slots` (k,), ascending.

        Args:
            actions: (k, A), clipped to [-1, 1], then scaled to the environment's own bounds.

        Returns:
            observations (k, O) float32, rewards (k,), terminated (k,), successes (k,) bool (None where the task has no
            notion of it).

        Raises:
            CvlctlError: where an action is not finite: a policy gone wrong.
        """
        if not np.isfinite(actions).all():
            raise CvlctlError(
                f"{self.task}: an action is NaN or infinite",
                "the policy may have diverged: look at its training metrics",
            )
        actions = self._centre + self._scale * np.clip(actions, -1.0, 1.0)
        observations, rewards, terminated, _, info = self._pool.step(actions, slots.astype(np.int32))
        success = info.get("success", info.get("is_success"))
        return _flat(observations), rewards, terminated, None if success is None else success > 0

    def close(self) -> None:
        """End its threads."""
        self._pool.close()


@dataclass
class _Played:
    """The episode that a slot is playing; `act` is None in a slot that has no more to play."""

    number: int
    act: Act | None
    observations: list[np.ndarray]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    terminated: bool = False


def collect(
    task: str,
    spec: Spec,
    seed: int,
    act_of: Callable[[int], Act],
    *,
    first: int = 0,
    total: int | None = None,
    collected_at: int = 0,
    threads: int | None = None,
) -> Iterator[Episode]:
    """Whole episodes number `first`, `first` + 1, ... in this order: each one that is begun, however long it takes.

    Args:
        act_of: from an episode's number to what acts in it.
        total: the number of the first that is not wanted; None: no end.
        collected_at: environment steps of the episodes before `first`.

    Raises:
        CvlctlError: see `check` and `Pool.step`.
    """

    def begin(number: int, observation: np.ndarray) -> _Played:
        return _Played(number, act_of(number) if total is None or number < total else None, [observation])

    slots, over = np.arange(NUM_SLOTS), dict[int, _Played]()
    rounds, ahead = divmod(first, NUM_SLOTS)
    with closing(Pool(task, spec, seed, threads)) as pool:
        for _ in range(rounds):  # the starts of episodes that are there already
            pool.reset(slots)
        starts = pool.reset(slots)
        if ahead:
            starts[:ahead] = pool.reset(slots[:ahead])
        numbers = slots + NUM_SLOTS * (rounds + (slots < ahead))
        playing = [begin(number, start) for number, start in zip(numbers.tolist(), starts, strict=True)]
        while total is None or first < total:
            ended = _step(pool, playing)
            if len(ended):
                for slot, start in zip(ended, pool.reset(ended), strict=True):
                    over[playing[slot].number] = playing[slot]
                    playing[slot] = begin(playing[slot].number + NUM_SLOTS, start)
            while first in over:
                episode = _episode(over.pop(first), task, seed, collected_at)
                first, collected_at = first + 1, collected_at + len(episode)
                yield episode


def run_episodes(
    jobs: Sequence[PolicyJob],
    *,
    episodes: Episodes,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[EpisodeResult]:
    """Rows as `rollout.run_episodes` has them, of EnvPool's episodes: every job of a task meets the same ones.

    Raises:
        CvlctlError: what a user can mend in a checkpoint or task; see `check` and `Pool.step` too.
    """
    numbers, rows = numbers_of(jobs, episodes), list[EpisodeResult]()
    num_wanted = sum(map(len, numbers))
    env_of = lru_cache(maxsize=1)(lambda task, horizon: envs.make(task, 0, horizon))
    for job, wanted in zip(jobs, numbers, strict=True):
        env, policy = env_of(job.task, job.horizon), job_policy(job)
        check_fit(job.checkpoint, policy, env)
        greedy = PolicyAct(policy, None, np.zeros((env.spec.horizon, env.spec.action_dim), dtype=np.float32))
        first, total = min(wanted), max(wanted) + 1
        found = collect(
            job.task, env.spec, EVALUATION_SEED + seed, partial(_always, greedy), first=first, total=total,
            threads=threads,
        )  # fmt: skip
        for number, episode in enumerate(found, first):
            if number in wanted:  # the others were played in an earlier evaluation
                assert episode.rewards is not None
                successes = [None] * len(episode) if episode.successes is None else episode.successes.tolist()
                rows.append(result_row(job, number, episode.rewards.tolist(), successes))
                if progress:
                    progress(len(rows), num_wanted, rows[-1])
    return rows


def _always(act: Act, number: int) -> Act:
    return act


def _step(pool: Pool, playing: Sequence[_Played]) -> np.ndarray:
    """One step of every slot that plays; returns those whose episode is over now, ascending."""
    slots = np.flatnonzero([played.act is not None for played in playing])
    observations = np.stack([played.observations[-1] for played in playing])
    acts, times = [played.act for played in playing], [len(played.actions) for played in playing]
    actions = np.clip(act_together(acts, observations, times, pool.spec.action_dim), -1.0, 1.0)
    observations, rewards, terminated, successes = pool.step(slots, actions[slots])
    ended = []
    for row, slot in enumerate(slots.tolist()):
        played = playing[slot]
        played.observations.append(observations[row])
        played.actions.append(actions[slot])
        played.rewards.append(rewards[row])
        if successes is not None:
            played.successes.append(successes[row])
        played.terminated = bool(terminated[row])
        if played.terminated or len(played.actions) >= pool.spec.horizon:
            ended.append(slot)
    return np.array(ended, dtype=int)


def _episode(played: _Played, task: str, seed: int, collected_at: int) -> Episode:
    return Episode(
        observations=np.stack(played.observations),
        actions=np.stack(played.actions),
        rewards=np.array(played.rewards, dtype=np.float32),
        successes=np.array(played.successes, dtype=bool) if played.successes else None,
        terminated=played.terminated,
        task=task,
        collected_at=collected_at,
        seed=seed,
    )


def _flat(observation: Any) -> np.ndarray:
    """Fetch's as `envs` has them: the robot's state, then the commanded goal."""
    if isinstance(observation, dict):
        observation = np.concatenate([observation["observation"], observation["desired_goal"]], axis=-1)
    return np.array(observation, dtype=np.float32)


def _package() -> Any:
    try:
        import envpool
    except ImportError as error:
        what = "backend: envpool, and EnvPool cannot be imported: " + str(error)
        raise CvlctlError(what, "install it: pip install 'cvlctl[envpool]'") from error
    return envpool


def _mujoco(task: str) -> str | None:
    """The version of the MuJoCo that EnvPool has inside, asked of its library; None: the task has none, or it hides."""
    if task in ("gym/Pendulum-v1", "gym/MountainCarContinuous-v0"):
        return None
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(str(Path(_package().__file__).parent / "mujoco" / "robotics_envpool.so"))
        library.mj_versionString.restype = ctypes.c_char_p
        return library.mj_versionString().decode()
    return None
