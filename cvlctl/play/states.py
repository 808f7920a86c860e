"""The state of a simulator as one row of numbers, and back: `sim/state` of a store (docs/store.md).

It holds what MuJoCo needs to go on from that instant, the latest observation (Metaworld's next one repeats it), and
what a reset drew: Fetch's goal; in Metaworld the random vector, and the places of bodies and sites that it decided.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play.env import Env

_PARTS = ("TIME", "QPOS", "QVEL", "ACT", "WARMSTART", "CTRL", "EQ_ACTIVE", "MOCAP_POS", "MOCAP_QUAT")


@contextmanager
def importing_mujoco() -> Iterator[None]:
    """Where MUJOCO_GL names what is not there, mujoco cannot be imported, and says so by all sorts of exceptions.

    Raises:
        CvlctlError: instead of them.
    """
    try:
        yield
    except Exception as error:
        said = os.environ.get("MUJOCO_GL")
        if said is None or "mujoco" in sys.modules or isinstance(error, CvlctlError):
            raise
        what = f"mujoco cannot be imported with MUJOCO_GL={said}: {' '.join(str(error).split())}"
        raise CvlctlError(what, "unset it, to render by EGL; or install what it names") from error


def has_state(env: Env) -> bool:
    """Whether `state_of` works: a built-in task that MuJoCo simulates."""
    return not env.own and hasattr(simulator(env), "model")


def simulator(env: Env) -> Any:
    """What has `model` and `data` where MuJoCo simulates."""
    inside = getattr(env.raw, "inside", env.raw)
    return getattr(inside, "unwrapped", inside)


def layout(env: Env) -> dict[str, int]:
    """The parts of a state in their order, with how many numbers each has.

    Raises:
        CvlctlError: the environment is none whose state is known.
    """
    import mujoco

    if not has_state(env):
        what = f"{env.task}: no state of its simulator can be kept"
        raise CvlctlError(
            what, "built-in tasks that MuJoCo simulates have one: metaworld/..., gym/Fetch..., gym/Hopper-v5"
        )
    raw = simulator(env)
    parts = {"physics": mujoco.mj_stateSize(raw.model, _spec()), "observation": len(env.seen), "step": 1}
    if hasattr(env.raw, "start"):
        moved = {"body_pos": raw.model.body_pos.size, "site_pos": raw.model.site_pos.size}
        return parts | moved | {"start": len(raw._last_rand_vec)}
    if hasattr(raw, "goal"):  # which is empty before the first reset
        parts["goal"] = raw.observation_space["desired_goal"].shape[0]
    return parts


def state_of(env: Env) -> np.ndarray:
    """(n,) float64: the simulator as it is now, in an episode or at its end."""
    import mujoco

    raw, sizes = simulator(env), layout(env)
    physics = np.empty(sizes["physics"])
    mujoco.mj_getState(raw.model, raw.data, physics, _spec())
    rest: list[Any] = [env.seen, [env.steps]]
    if "start" in sizes:
        rest += [raw.model.body_pos.ravel(), raw.model.site_pos.ravel(), raw._last_rand_vec]
    elif "goal" in sizes:
        rest.append(raw.goal)
    return np.concatenate([physics, *rest], dtype=np.float64)


def restore(env: Env, state: np.ndarray) -> np.ndarray:
    """Bring an environment of the same task back to `state` (n,), whatever its seed; the episode goes on from there.

    Returns:
        The observation of that instant, (O,) float32.

    Raises:
        CvlctlError: the state is none of this environment.
    """
    import mujoco

    raw, parts = simulator(env), split(env, state)
    if "start" in parts:  # what rewards are measured from is set by the reset
        env.raw.start(parts["start"].copy())
        raw.curr_path_length = int(parts["step"][0])
    if "goal" in parts:
        raw.goal = parts["goal"].copy()
    place(raw.model, raw.data, parts)
    mujoco.mj_forward(raw.model, raw.data)
    mujoco.mj_setState(raw.model, raw.data, parts["physics"], _spec())  # where the solver starts from, once more
    seen = parts["observation"].astype(np.float32)
    if "start" in parts:
        raw._prev_obs = parts["observation"][:18].copy()
    env.at(int(parts["step"][0]), seen)
    return seen


def split(env: Env, state: np.ndarray) -> dict[str, np.ndarray]:
    """The parts of a state (n,) by name.

    Raises:
        CvlctlError: it is none of this environment.
    """
    sizes = layout(env)
    state = np.asarray(state, dtype=np.float64)
    if state.shape != (sum(sizes.values()),):
        what = f"a state of {env.task} has {sum(sizes.values())} numbers, and this one is of shape {state.shape}"
        raise CvlctlError(what, "it may be another task's, or of another version of the simulator")
    return dict(zip(sizes, np.split(state, np.cumsum(list(sizes.values()))[:-1]), strict=True))


def place(model: Any, data: Any, parts: dict[str, np.ndarray]) -> None:
    """Put the simulator's own part of a state into `model` and `data`; where things are is computed by whoever asks."""
    import mujoco

    if "body_pos" in parts:
        model.body_pos[:] = parts["body_pos"].reshape(model.body_pos.shape)
        model.site_pos[:] = parts["site_pos"].reshape(model.site_pos.shape)
    mujoco.mj_setState(model, data, parts["physics"], _spec())


def _spec() -> int:
    import mujoco

    return sum(getattr(mujoco.mjtState, f"mjSTATE_{name}").value for name in _PARTS)
