"""The tasks that there are, and how the environment of each is made: as `env.Env`.

`reset(episode)` is a pure function of (task, seed, episode): episode 7 of seed 0 is the same whoever runs it, in any
order, in any process. That is what lets workers share out whole episodes, and a killed collection resume.

* Metaworld ignores `reset(seed=)`. Each episode's goal is one of the 50 `train_tasks` of `metaworld.MT1`, Metaworld's
  own protocol: the same 50 goals for collection and evaluation. Every block of 50 episodes visits each goal once, in an
  order drawn from (seed, block), so that 50 evaluation episodes weigh all goals alike. The observation holds the goal.
* Gymnasium environments start from `reset(seed=)`, a number drawn from (seed, episode).
* Any other gym/<id>, py/<module or file.py>:<name>, and a gym/... task with settings: `own`.
* Fetch: the observation is the robot's state followed by the commanded goal (3 columns), success its `is_success`
  (within 5 cm). `-fixed` commands LAEO's one goal of the task, whatever the episode.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from importlib import metadata, resources
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play import named_code, own, states
from cvlctl.play.env import Act, Env
from cvlctl.play.settings import Settings
from cvlctl.types import Goals

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

FORMS = "gym/<an id of gymnasium>, or py/<module or file.py>:<name> for an environment of your own"

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


def make(task: str, seed: int, horizon: int | None = None, settings: Settings | None = None) -> Env:
    """The environment `task` ("metaworld/drawer-close-v3", "gym/Hopper-v5", "py/reach.py:Reach") under `seed` >= 0.

    Args:
        horizon: episodes are cut off after so many steps; None: the task's own limit.
        settings: of an environment of one's own (`named`); None: as the task is.

    Raises:
        CvlctlError: unknown task (with the nearest legal names), negative seed, a horizon beyond the task's own limit,
            a package that is not installed, code that nobody named, or whatever that code raises.
    """
    if settings is None or settings.code is None:  # else who named it has looked, and a worker may stand elsewhere
        check_task(task)
    if seed < 0:
        raise CvlctlError(f"seed {seed} for {task} is negative", "seeds are 0, 1, 2, ...")
    prefix, _, name = task.partition("/")
    try:
        with states.importing_mujoco():
            known = is_built_in(task, settings)
            env = ENVS[prefix](task, name, int(seed)) if known else own.make(task, int(seed), horizon, settings)
    except ImportError as error:
        raise CvlctlError(f"{task} cannot be made: {error}", "install the pinned versions: make install") from error
    if horizon is not None:
        if horizon > env.spec.horizon:
            env.close()
            what = f"horizon: {horizon} is longer than the {env.spec.horizon} steps of {task}"
            raise CvlctlError(what, "horizon cuts episodes off; it cannot lengthen them")
        env.spec = replace(env.spec, horizon=horizon)
    return env


def named(task: str, about: Mapping[str, Any] | None = None) -> Settings | None:
    """Settings for `make` of a task that a recipe or the command line names: its code may be imported from here on.

    Args:
        about: what is said of it: kwargs, success, keys, action_bounds.

    Returns:
        None for a built-in task of which nothing is said.

    Raises:
        CvlctlError: no such code, or a task that cannot have settings.
    """
    settings = Settings.of({**(about or {}), "code": named_code.origin(task)})
    if settings == own.NOTHING and task in list_tasks():
        return None
    if task.startswith("metaworld/"):
        raise CvlctlError(f"{task} has no settings", "env is for gym/... and py/...: leave it out")
    return settings


def described(env: Env, settings: Settings | None) -> dict[str, Any]:
    """What a store says of the environment of one's own that it came from: enough to make it again."""
    keys = env.raw.flat.keys
    return {"task": env.task, **(settings or own.NOTHING).about(), **({"keys": list(keys)} if keys else {})}


def registered_kwargs(task: str) -> dict[str, Any]:
    """What gymnasium hands the environment of a task by itself; nothing where it knows none of that id."""
    name = task.removeprefix("gym/")
    return own.registered_kwargs(name) if task != name and named_code.names(task) is None else {}


def is_built_in(task: str, settings: Settings | None) -> bool:
    """Whether it is one of `list_tasks`, as it is: with the checks and reference returns that it has there."""
    return task in list_tasks() and (settings is None or not settings.about())


def list_tasks() -> list[str]:
    """The names of the built-in tasks."""
    return [f"metaworld/{name}-v3" for name in METAWORLD_TASKS] + [f"gym/{name}" for name in (*GYM_TASKS, *FETCH_TASKS)]


def check_task(task: str) -> None:
    """Raises CvlctlError with the nearest legal names where `task` is not one; builds nothing."""
    tasks = list_tasks()
    if task in tasks or own.check(task):
        return
    near = ", ".join(nearest(task))
    raise CvlctlError(
        f"unknown task {task!r}",
        f"did you mean {near}?" if near else f"legal tasks: {FORMS}; built in: {', '.join(tasks)}",
    )


def nearest(task: str) -> list[str]:
    """At most three legal names that are like `task`."""
    tasks, tail = list_tasks(), str(task).split("/")[-1]
    near = own.near(task) + [t for t in tasks if len(tail) > 3 and tail.lower() in t.lower()]
    near += difflib.get_close_matches(str(task), tasks, 3, 0.5)
    return list(dict.fromkeys(near))[:3]


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

    def start(vector: np.ndarray) -> np.ndarray:
        """Begin where Metaworld's random vector says: all that a reset draws."""
        # Metaworld's reset moves the hand in whatever state the last episode left: start it from the untouched model
        mujoco.mj_resetData(raw.model, raw.data)
        raw.model.body_pos[:], raw.model.site_pos[:] = body, site
        raw._last_rand_vec = vector
        return raw.reset()[0]

    def begin(episode: int) -> np.ndarray:
        block, place = divmod(episode, NUM_GOALS)
        order = np.random.default_rng(np.random.SeedSequence([seed, block])).permutation(NUM_GOALS)
        raw.set_task(goals[order[place]])
        return start(raw._last_rand_vec)

    raw.start = start
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
