"""`cvlctl data render`: the episodes of a store from other cameras, by the states of the simulator that it holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cvlctl.data import derive
from cvlctl.data.derive import command_line
from cvlctl.data.layout import SIM
from cvlctl.data.store import Column, Store, open_store
from cvlctl.errors import CvlctlError
from cvlctl.folders import again_where_it_exists
from cvlctl.machine import num_cpus
from cvlctl.play import envs, states
from cvlctl.play.cameras import cameras_of
from cvlctl.play.filming import Studio, told_of
from cvlctl.progress import say


@again_where_it_exists
def render(
    path: Path,
    out: Path,
    names: Sequence[str],
    *,
    size: str = "64",
    lookat: tuple[float, float, float] | None = None,
    distance: float | None = None,
    azimuth: float | None = None,
    elevation: float | None = None,
    only: bool = False,
    workers: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write a store of the same episodes to `out`, with frames of more cameras.

    Args:
        names: of the simulator's cameras; or one of your own, which then has all of lookat, distance (metres), azimuth
            and elevation (degrees).
        size: pixels of both sides, or HEIGHTxWIDTH.
        only: instead of the frames that the store has, not beside them. One of the same name is replaced.
        workers: processes that draw; 0 or 1: none but this; None: one a CPU.

    Raises:
        CvlctlError: the store has no states of a built-in task's simulator, no such camera, nothing can be rendered
            here, or `out` exists (and no `force`).
    """
    free: dict[str, Any] = {"lookat": lookat, "distance": distance, "azimuth": azimuth, "elevation": elevation}
    if len(names) > 1 and any(value is not None for value in free.values()):
        raise CvlctlError("where one camera stands is said, and several are named", "render them one after the other")
    if not re.fullmatch(r"[0-9]{1,6}(x[0-9]{1,6})?", size):
        raise CvlctlError(f"--size {size} is no size", "give one number, such as 64, or HEIGHTxWIDTH, such as 48x64")
    sides = [int(side) for side in size.split("x")]
    cameras = cameras_of({name: {"size": sides[0] if len(sides) == 1 else sides, **free} for name in names})
    placed = {name: value for name, value in free.items() if name != "lookat"}
    command = command_line("render", path, camera=names, size=size, **placed, only=only or None, out=out)
    command += "" if lookat is None else " --lookat {} {} {}".format(*lookat)
    if found := derive.finished_already(command, [out], [path], force=force):
        return derive.summary(found[0], "finished already")
    store = open_store(path)
    env = _env(store)
    new = {one.name for one in cameras}
    kept = [] if only else [name for name in store.spec.cameras if name not in new]
    told = told_of(env, cameras)
    before = store.attributes.get("cameras")
    told["cameras"] |= {name: before[name] for name in kept if isinstance(before, dict) and name in before}
    part = derive.whole(store)
    try:
        with Studio(env, cameras, num_cpus() if workers is None else workers) as studio:
            labels = derive.copied_labels([part])
            output = derive.Output(out, [part], labels, store.task, None, kept, studio.frames, told)
            [made] = derive.derive([output], command, force=force)
    finally:
        env.close()
    return derive.summary(made)


def _env(store: Store) -> envs.Env:
    """An environment of the store's task, which its states fit.

    Raises:
        CvlctlError: they are none of a built-in task.
    """
    if not store.has_sim_state:
        what = f"{store.path} has no states of a simulator to render"
        raise CvlctlError(what, "stores that were collected with cameras have them: docs/images.md")
    if store.task not in envs.list_tasks() or list(store.task_names) != [store.task]:
        what = f"{store.path} is of {', '.join(store.task_names)}: states of one built-in task can be rendered"
        raise CvlctlError(what, "merge stores after they are rendered")
    env = envs.make(store.task, 0)
    try:
        states.split(env, Column(store, SIM).rows(0, 1)[0])
    except BaseException:
        env.close()
        raise
    then = (store.provenance.get("environment") or {}).get("mujoco")
    if then != (now := version("mujoco")):
        say(f"{store.path}: its states are of mujoco {then}, and this is {now}: they may not mean the same to it")
    return env
