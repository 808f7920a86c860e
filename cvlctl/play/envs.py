"""Environments behind one small class: actions in [-1, 1], flat float32 observations, episodes by number.

`reset(episode)` is a pure function of (task, seed, episode): episode 7 of seed 0 is the same whoever runs it, in any
order, in any process. That is what lets workers share out whole episodes, and a killed collection resume.

* Metaworld ignores `reset(seed=)`. Each episode's goal is one of the 50 `train_tasks` of `metaworld.MT1`, Metaworld's
  own protocol: the same 50 goals for collection and evaluation. Every block of 50 episodes visits each goal once, in an
  order drawn from (seed, block), so that 50 evaluation episodes weigh all goals alike. The observation holds the goal.
* Gymnasium environments start from `reset(seed=)`, a number drawn from (seed, episode).
* Fetch: the observation is the robot's state followed by the commanded goal (3 columns), success its `is_success`
  (within 5 cm). `-fixed` commands LAEO's one goal of the task, whatever the episode.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib import metadata, resources
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.types import Goals, Spec

GOAL_SEED = 0  # of metaworld.MT1: changing it changes every task, and with it all stored reference returns
NUM_GOALS = 50

# fmt: off
METAWORLD_TASKS = [
    "assembly", "basketball", "bin-picking", "box-close", "button-press", "button-press-topdown",
    "button-press-topdown-wall", "button-press-wall", "coffee-button", "coffee-pull", "coffee-push", "dial-turn",
    "disassemble", "door-close", "door-lock", "door-open", "door-unlock", "drawer-close", "drawer-open", "faucet-close",
    "faucet-open", "hammer", "hand-insert", "handle-press", "handle-press-side", "handle-pull", "handle-pull-side",
    "lever-pull", "peg-insert-side", "peg-unplug-side", "pick-out-of-hole", "pick-place", "pick-place-wall",
    "plate-slide", "plate-slide-back", "plate-slide-back-side", "plate-slide-side", "push", "push-back", "push-wall",
    "reach", "reach-wall", "shelf-place", "soccer", "stick-pull", "stick-push", "sweep", "sweep-into", "window-close",
    "window-open",
]
# fmt: on

GYM_TASKS = ("Hopper-v5", "Walker2d-v5", "Ant-v5", "HalfCheetah-v5", "MountainCarContinuous-v0", "Pendulum-v1")

# the goal is drawn anew each episode (None), or LAEO's own
FETCH_TASKS: dict[str, tuple[float, float, float] | None] = {
    "FetchReach-v4": None,
    "FetchReach-v4-fixed": (1.3, 0.3, 0.9),
    "FetchReachDense-v4": None,
    "FetchReachDense-v4-fixed": (1.3, 0.3, 0.9),  # reward: minus the distance to the goal
    "FetchPush-v4": None,
    "FetchPush-v4-fixed": (1.4, 0.9, 0.4247),
    "FetchPushDense-v4": None,
    "FetchPushDense-v4-fixed": (1.4, 0.9, 0.4247),
    "FetchPickAndPlace-v4": None,
    "FetchSlide-v4": None,
}

Act = Callable[[np.ndarray, int], np.ndarray]  # (observation (O,), step of the episode) -> action (A,) in [-1, 1]


class Env:
    """One environment of one task. Made by `make`.

    Attributes:
        task: full name, such as "metaworld/drawer-close-v3".
        seed: with the episode's number, decides how an episode begins.
        spec: observation shape (O,), action dimensions A, and the time limit in steps.
        action_bounds: low and high, (A,) each: what actions in [-1, 1] are scaled to.
        raw: the simulator behind it.
        begin: what starts episode number n, and returns its first observation; to be replaced where another start is
            wanted (the parity check's).
    """

    def __init__(
        self,
        task: str,
        seed: int,
        raw: Any,
        begin: Callable[[int], np.ndarray],
        horizon: int,
        has_success: bool,
        versions: dict[str, str],
    ) -> None:
        space = raw.action_space
        self.task = task
        self.seed = seed
        self.spec = Spec(tuple(raw.observation_space.shape), int(space.shape[0]), horizon)
        self.action_bounds = space.low, space.high
        self.raw = raw
        self.begin = begin
        self._has_success = has_success
        self._versions = versions
        self._scale = None if np.all(space.high == 1) and np.all(space.low == -1) else (space.high - space.low) / 2
        self._centre = (space.high + space.low) / 2
        self._step: int | None = None  # None: no episode under way

    def reset(self, episode: int) -> np.ndarray:
        """Begin episode number `episode` (>= 0); returns its first observation (O,), float32."""
        self._step = 0
        return np.array(self.begin(episode), dtype=np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool | None]:
        """One step.

        Args:
            action: (A,), clipped to [-1, 1], then scaled to the environment's own bounds.

        Returns:
            observation (O,) float32, reward, terminated, truncated (the time limit, and not terminated), success
            (None where the task has no notion of it).

        Raises:
            CvlctlError: where the action is not finite or of another shape: a policy gone wrong.
            RuntimeError: after the end of an episode, before the next `reset`.
        """
        if self._step is None:
            raise RuntimeError(f"{self.task}: the episode is over; call reset(episode) before step")
        action = np.minimum(np.maximum(np.asarray(action, dtype=np.float32), -1.0), 1.0)
        if action.shape != (self.spec.action_dim,) or not np.isfinite(action).all():
            raise CvlctlError(
                f"{self.task}: action {action} at step {self._step}; expected {self.spec.action_dim} finite numbers",
                "the policy may have diverged: look at its training metrics",
            )
        if self._scale is not None:
            action = self._centre + self._scale * action
        observation, reward, terminated, _, info = self.raw.step(action)
        self._step += 1
        truncated = self._step >= self.spec.horizon and not terminated
        if terminated or truncated:
            self._step = None
        success = bool(info["success"] > 0) if self._has_success else None
        return np.array(observation, dtype=np.float32), float(reward), bool(terminated), truncated, success

    def close(self) -> None:
        """Free what the simulator holds."""
        self.raw.close()

    def versions(self) -> dict[str, str]:
        """What decides the numbers: package versions and the environment's settings, for provenance."""
        return dict(self._versions)


def make(task: str, seed: int, horizon: int | None = None) -> Env:
    """The environment `task` ("metaworld/drawer-close-v3", "gym/Hopper-v5"; see `list_tasks`) under `seed` >= 0.

    Args:
        horizon: episodes are cut off after so many steps; None: the task's own limit.

    Raises:
        CvlctlError: unknown task (with the nearest legal names), negative seed, a horizon beyond the task's own limit,
            or a package that is not installed.
    """
    check_task(task)
    if seed < 0:
        raise CvlctlError(f"seed {seed} for {task} is negative", "seeds are 0, 1, 2, ...")
    prefix, name = task.split("/")
    try:
        env = ENVS[prefix](task, name, int(seed))
    except ImportError as error:
        raise CvlctlError(f"{task} cannot be made: {error}", "install the pinned versions: make install") from error
    if horizon is not None:
        if horizon > env.spec.horizon:
            env.close()
            what = f"horizon: {horizon} is longer than the {env.spec.horizon} steps of {task}"
            raise CvlctlError(what, "horizon cuts episodes off; it cannot lengthen them")
        env.spec = replace(env.spec, horizon=horizon)
    return env


def list_tasks() -> list[str]:
    """All legal task names."""
    return [f"metaworld/{name}-v3" for name in METAWORLD_TASKS] + [f"gym/{name}" for name in (*GYM_TASKS, *FETCH_TASKS)]


def check_task(task: str) -> None:
    """Raises CvlctlError with the nearest legal names where `task` is not one; builds nothing."""
    tasks = list_tasks()
    if task in tasks:
        return
    tail = str(task).split("/")[-1]
    near = [t for t in tasks if len(tail) > 3 and tail.lower() in t.lower()]
    near += difflib.get_close_matches(str(task), tasks, 3, 0.5)
    raise CvlctlError(
        f"unknown task {task!r}",
        f"did you mean {', '.join(dict.fromkeys(near[:3]))}?" if near else f"legal tasks: {', '.join(tasks)}",
    )


def goals(task: str) -> Goals | None:
    """Where the observations of `task` hold goals, or None: hindsight relabelling needs them. Fetch's do."""
    name = task.removeprefix("gym/")
    if name not in FETCH_TASKS:
        return None
    moved = 0 if "Reach" in name else 3  # the hand's own position comes first, then the object's
    return Goals(slice(moved, moved + 3), slice(-3, None), "Dense" in name)


def scripted_policy(task: str) -> Act:
    """Metaworld's scripted expert for `task`: (observation (39,), step) -> action (4,) in [-1, 1], deterministic.

    Raises:
        CvlctlError: where the task has none (only Metaworld's tasks have).
    """
    check_task(task)
    if not task.startswith("metaworld/"):
        raise CvlctlError(f"{task} has no scripted expert", "only metaworld/... tasks have one; use another source")
    from metaworld.policies import ENV_POLICY_MAP

    warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")  # they are clipped: meant so
    expert: Any = ENV_POLICY_MAP[task.split("/")[1]]()  # type: ignore[abstract]

    def act(observation: np.ndarray, step: int) -> np.ndarray:
        # a copy: the door experts move the handle inside the observation that they are given
        action = expert.get_action(np.array(observation, dtype=np.float64))
        return np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)

    return act


def references(task: str, horizon: int | None = None) -> dict[str, Any] | None:
    """Reference returns of `task`, or None: normalised score = 100 (return - "min") / ("max" - "min").

    Episodes cut off at a `horizon` have none: the returns are of the task's own episodes.

    "source" says what they are: Metaworld's were measured (min: uniformly random actions, max: the scripted expert; see
    benchmarks/measure_references.py), locomotion's are D4RL's constants, of mujoco-py days.
    """
    return _references().get(task) if horizon is None else None


@cache
def _references() -> dict[str, dict[str, Any]]:
    return json.loads(resources.files("cvlctl.play").joinpath("references.json").read_text())["tasks"]


def _make_gym(task: str, name: str, seed: int) -> Env:
    import gymnasium

    fetch = name in FETCH_TASKS
    if fetch:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about other environments
            import gymnasium_robotics
        gymnasium.register_envs(gymnasium_robotics)
    try:
        made = gymnasium.make(name.removesuffix("-fixed"), disable_env_checker=True)
    except gymnasium.error.DependencyNotInstalled as error:
        raise ImportError(str(error)) from error
    raw: Any = _Fetch(made.unwrapped, FETCH_TASKS[name]) if fetch else made.unwrapped
    assert made.spec is not None and made.spec.max_episode_steps is not None

    def begin(episode: int) -> np.ndarray:
        word = np.random.SeedSequence([seed, episode]).generate_state(1, np.uint32)[0]
        return raw.reset(seed=int(word >> 1))[0]

    packages = ["gymnasium-robotics"] if fetch else []
    packages += ["mujoco"] if hasattr(made.unwrapped, "model") else []
    versions = _versions("gymnasium", *packages, "numpy")
    return Env(task, seed, raw, begin, made.spec.max_episode_steps, fetch, versions)


class _Fetch:
    """A Fetch environment as a flat one: (state, commanded goal) observations, `success` in info."""

    def __init__(self, raw: Any, goal: tuple[float, float, float] | None) -> None:
        from gymnasium.spaces import Box

        self.inside, self._goal, self.action_space = raw, goal, raw.action_space
        spaces = raw.observation_space
        self.observation_space = Box(
            -np.inf, np.inf, (spaces["observation"].shape[0] + spaces["desired_goal"].shape[0],)
        )

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        observation, info = self.inside.reset(seed=seed)
        if self._goal is not None:
            self.inside.goal = np.array(self._goal)
            observation = observation | {"desired_goal": self.inside.goal}
        return self._flat(observation), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.inside.step(action)
        return self._flat(observation), reward, terminated, truncated, {"success": info["is_success"]}

    def close(self) -> None:
        self.inside.close()

    def seen(self) -> np.ndarray:
        """The observation (O,) of the state that it is in."""
        return self._flat(self.inside._get_obs())

    @staticmethod
    def _flat(observation: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([observation["observation"], observation["desired_goal"]])


def _make_metaworld(task: str, name: str, seed: int) -> Env:
    import mujoco
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    raw: Any = ALL_V3_ENVIRONMENTS[name]()
    raw.touching_object = partial(_touching, raw)
    goals = _goals(name)
    raw.set_task(goals[0])  # the goal enters the observation and its bounds from here on
    body, site = raw.model.body_pos.copy(), raw.model.site_pos.copy()

    def begin(episode: int) -> np.ndarray:
        # Metaworld's reset moves the hand in whatever state the last episode left: start it from the untouched model
        mujoco.mj_resetData(raw.model, raw.data)
        raw.model.body_pos[:], raw.model.site_pos[:] = body, site
        block, place = divmod(episode, NUM_GOALS)
        order = np.random.default_rng(np.random.SeedSequence([seed, block])).permutation(NUM_GOALS)
        raw.set_task(goals[order[place]])
        return raw.reset()[0]

    versions = _versions("gymnasium", "metaworld", "mujoco", "numpy")
    versions |= {"reward_function": raw.reward_function_version, "goals": f"metaworld.MT1(seed={GOAL_SEED})"}
    return Env(task, seed, raw, begin, raw.max_path_length, True, versions)


def _touching(raw: Any, geom: int) -> bool:
    """Whether both pads of the gripper press on the object: Metaworld's own `touching_object`, which walks through all
    contacts twice in Python, a third of a step of pick-place."""
    contact = raw.data.contact
    pairs, force = contact.geom, raw.data.efc_force
    on_object = (pairs == geom).any(axis=1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        which = on_object & (pairs == raw.data.geom(pad).id).any(axis=1)
        if not force[contact.efc_address[which]].sum() > 0:
            return False
    return True


@cache
def _goals(name: str) -> list[Any]:
    import metaworld

    return metaworld.MT1(name, seed=GOAL_SEED).train_tasks  # 0.4 s: it simulates 50 resets


def _versions(*packages: str) -> dict[str, str]:
    return {package: metadata.version(package) for package in packages}


ENVS: dict[str, Callable[[str, str, int], Env]] = {"metaworld": _make_metaworld, "gym": _make_gym}
