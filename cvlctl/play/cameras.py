"""Frames of an environment without a display: of MuJoCo's cameras and free ones, or as one of one's own draws itself.

A frame is a function of the state: it is drawn from a copy of the simulator's, on which nothing but positions is
computed. So rendering changes no digit of an episode, and a state that was kept gives the same bytes afterwards.
Shadows, reflections and multisampling are off, which makes it 15 times as fast in software.

Frames are upright. Metaworld's corner cameras hang upside down: what a fixed camera whose top points downwards sees is
turned by half a turn.
"""

from __future__ import annotations

import atexit
import copy
import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play import states
from cvlctl.play.env import Env

SMALLEST, LARGEST = 8, 1024  # pixels of a side
DEFAULT = "default"  # the view of the environment's own render()
FREE = ("lookat", "distance", "azimuth", "elevation")
INSTALL = "in Debian and Ubuntu: apt-get install libegl1 libgl1 libgl1-mesa-dri; docs/images.md says more"


class Camera(NamedTuple):
    """Where frames are taken from, and how large they are. `of` makes one of what recipes and stores say."""

    name: str
    height: int
    width: int
    free: tuple[tuple[float, ...], float, float, float] | None = None  # lookat, distance, azimuth, elevation; degrees

    @classmethod
    def of(cls, name: str, about: Mapping[str, Any]) -> Self:
        """From its settings: size (64, or [height, width]), and for a free camera all of `FREE`.

        Raises:
            CvlctlError: they are no settings of a camera: a store may say anything.
        """
        where = f"camera {name!r}"
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
            raise CvlctlError(f"{where} is not a plain name", "use letters, digits, '_', '-' and '.'")
        about = {key: value for key, value in about.items() if value is not None}
        if unknown := sorted(set(about) - {"size", *FREE}):
            raise CvlctlError(f"{where}: unknown key {unknown[0]}", f"a camera has size, or also {', '.join(FREE)}")
        size = about.get("size", 64)
        sides = list(size) if isinstance(size, list | tuple) else [size, size]
        if len(sides) != 2 or not all(type(side) is int and SMALLEST <= side <= LARGEST for side in sides):
            what = f"{where}: size {size} is none; a side has {SMALLEST} to {LARGEST} pixels"
            raise CvlctlError(what, "give one number, such as size: 64, or [height, width]")
        given = [key for key in FREE if key in about]
        if not given:
            return cls(name, sides[0], sides[1])
        if lacking := [key for key in FREE if key not in about]:
            what = f"{where} has {', '.join(given)} and no {', '.join(lacking)}"
            raise CvlctlError(what, "a free camera has all four: a point, a distance, and two angles in degrees")
        try:
            lookat = tuple(float(value) for value in about["lookat"])
            rest = [float(about[key]) for key in FREE[1:]]
        except (TypeError, ValueError):
            lookat, rest = (), []
        if len(lookat) != 3 or not all(map(math.isfinite, (*lookat, *rest))) or rest[0] <= 0:
            what = f"{where}: lookat is three numbers, distance one above 0, azimuth and elevation are degrees"
            raise CvlctlError(what, "such as lookat: [0, 0.6, 0.2], distance: 1.2, azimuth: 160, elevation: -20")
        return cls(name, sides[0], sides[1], (lookat, rest[0], rest[1], rest[2]))

    def about(self) -> dict[str, Any]:
        """Its settings, as `of` takes them and a store keeps them."""
        size = self.height if self.height == self.width else [self.height, self.width]
        if self.free is None:
            return {"size": size}
        lookat, *rest = self.free
        return {"size": size, "lookat": list(lookat), **dict(zip(FREE[1:], rest, strict=True))}


def cameras_of(settings: Mapping[str, Mapping[str, Any]]) -> tuple[Camera, ...]:
    """The cameras that `settings` name, by name."""
    return tuple(Camera.of(name, settings[name]) for name in sorted(settings))


class Renderer:
    """Frames of one environment, in this process and thread. To be closed.

    Args:
        env: its simulator is looked at, and left as it is.
        cameras: at least one.

    Attributes:
        shapes: (height, width, 3) of each camera's frames, by name.

    Raises:
        CvlctlError: no such camera, no way to render here, or an environment that has nothing to show.
    """

    def __init__(self, env: Env, cameras: Iterable[Camera]) -> None:
        self.env, self.cameras = env, tuple(cameras)
        self.shapes = {camera.name: (camera.height, camera.width, 3) for camera in self.cameras}
        raw = states.simulator(env)
        self._scene = _Scene(env, raw, self.cameras) if _by_mujoco(raw) else None
        if self._scene is None:
            _check_draws(env, raw, self.cameras)

    def frames(self, state: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """(H, W, 3) uint8 by camera: of `state` (`states.state_of`), or None: as the environment is now.

        Raises:
            CvlctlError: the state is none of this environment.
        """
        if state is not None and not states.has_state(self.env):
            states.layout(self.env)  # says so
        if self._scene is not None:
            return self._scene.frames(state)
        (camera,) = self.cameras
        return {camera.name: _drawn(self.env, camera)}

    def close(self) -> None:
        """Free what the graphics hold."""
        if self._scene is not None:
            self._scene.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- MuJoCo


def _by_mujoco(raw: Any) -> bool:
    if not hasattr(raw, "model"):
        return False
    import mujoco

    return isinstance(raw.model, mujoco.MjModel) and isinstance(getattr(raw, "data", None), mujoco.MjData)


class _Scene:
    """What MuJoCo draws with: a copy of the state, a scene of shapes, and a context of OpenGL."""

    def __init__(self, env: Env, raw: Any, cameras: tuple[Camera, ...]) -> None:
        import mujoco

        self._env, self._raw, self._mujoco = env, raw, mujoco
        self._known = states.has_state(env)
        # a state moves bodies of the model; of an environment of one's own, its code may change what things look like
        self._model = model = copy.deepcopy(raw.model) if self._known else raw.model
        if self._known:  # Fetch's cross-hair, a metre long, says where the hand is pulled to: no camera would see it
            model.geom_rgba[model.body_mocapid[model.geom_bodyid] >= 0, 3] = 0
        self._data = mujoco.MjData(model)
        self._views = [(camera, *_view(raw, camera, env.task)) for camera in cameras]
        quality = model.vis.global_
        before = quality.offwidth, quality.offheight, model.vis.quality.offsamples
        quality.offwidth = max(camera.width for camera in cameras)
        quality.offheight = max(camera.height for camera in cameras)
        model.vis.quality.offsamples = 0
        try:
            self._gl, self._context = _opened(model, quality.offwidth, quality.offheight)
        finally:
            quality.offwidth, quality.offheight, model.vis.quality.offsamples = before
        self._scene, self._option = mujoco.MjvScene(model, maxgeom=10_000), mujoco.MjvOption()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag.value] = 0
        atexit.register(self.close)  # before the display goes, which would complain

    def frames(self, state: np.ndarray | None) -> dict[str, np.ndarray]:
        mujoco, model, data = self._mujoco, self._model, self._data
        if self._known:
            parts = states.split(self._env, states.state_of(self._env) if state is None else state)
            states.place(model, data, parts)
        else:
            parts, mine = {}, self._raw.data
            data.qpos[:], data.mocap_pos[:], data.mocap_quat[:] = mine.qpos, mine.mocap_pos, mine.mocap_quat
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        mujoco.mj_camlight(model, data)
        mujoco.mj_flex(model, data)
        mujoco.mj_tendon(model, data)
        if "goal" in parts:
            data.site_xpos[model.site("target0").id] = parts["goal"]
        self._gl.make_current()
        return {camera.name: self._drawn(camera, view, turned) for camera, view, turned in self._views}

    def _drawn(self, camera: Camera, view: Any, turned: bool) -> np.ndarray:
        mujoco, everything = self._mujoco, self._mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(self._model, self._data, self._option, None, view, everything, self._scene)
        rect = mujoco.MjrRect(0, 0, camera.width, camera.height)
        frame = np.empty((camera.height, camera.width, 3), np.uint8)
        mujoco.mjr_render(rect, self._scene, self._context)
        mujoco.mjr_readPixels(frame, None, rect, self._context)  # its first row is the lowest
        return np.ascontiguousarray(frame[:, ::-1] if turned else frame[::-1])

    def close(self) -> None:
        atexit.unregister(self.close)
        if self._gl is not None:
            self._gl.make_current()
            self._context.free()
            self._gl.free()
            self._gl = None


def _view(raw: Any, camera: Camera, task: str) -> tuple[Any, bool]:
    """MuJoCo's camera, and whether what it sees is to be turned upright.

    Raises:
        CvlctlError: the model has none of that name.
    """
    import mujoco

    model, view = raw.model, mujoco.MjvCamera()
    if camera.free is not None:
        view.lookat[:], view.distance, view.azimuth, view.elevation = camera.free
        return view, False
    names = [model.camera(number).name for number in range(model.ncam)]
    name = "track" if camera.name == DEFAULT and "track" in names else camera.name
    if name == DEFAULT:
        mujoco.mjv_defaultFreeCamera(model, view)
        renderer = getattr(raw, "mujoco_renderer", None)
        for key, value in (getattr(renderer, "default_cam_config", None) or {}).items():
            if key in FREE:
                setattr(view, key, value)
        return view, False
    if name not in names:
        near = difflib.get_close_matches(name, names, len(names), 0.0)
        others = ", ".join([*near, DEFAULT])
        hint = f"it has {others}; or say where yours stands: lookat, distance, azimuth, elevation"
        raise CvlctlError(f"{task} has no camera {name!r}", hint)
    view.type, view.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED.value, names.index(name)
    top = model.cam_mat0[view.fixedcamid].reshape(3, 3)[2, 1]  # upwards, of what is upwards in the frame
    return view, bool(model.cam_bodyid[view.fixedcamid] == 0 and top < -0.1)


def _opened(model: Any, width: int, height: int) -> tuple[Any, Any]:
    """A current context of OpenGL, and MuJoCo's in it, for frames of this size at most.

    By what MUJOCO_GL says; where it says nothing, by EGL, which needs no display.

    Raises:
        CvlctlError: this machine has none, with what to install.
    """
    import mujoco

    said = os.environ.get("MUJOCO_GL", "").lower().strip()
    chosen = said or ("egl" if sys.platform == "linux" else "")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # in software each process draws with its own thread alone
    try:
        if chosen == "egl":
            from mujoco.egl import GLContext  # whatever was chosen when mujoco was imported
        else:
            from mujoco.gl_context import GLContext
        if not hasattr(GLContext, "_context"):
            GLContext._context = None  # else one that cannot be made complains as it goes
        graphics = GLContext(width, height)
        graphics.make_current()
        context = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
    except Exception as error:  # each library raises its own, AttributeError where a shared one is missing
        why = " ".join(str(error).split()) or type(error).__name__
        how, hint = (f"MUJOCO_GL={said}", f"unset it; {INSTALL}") if said else ("by EGL", INSTALL)
        raise CvlctlError(f"nothing can be rendered on this machine ({how}): {why}", hint) from error
    os.environ["MUJOCO_GL"] = chosen  # for what else draws in this process
    mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, context)
    return graphics, context


def probe(_: Any = None) -> str:
    """Draw something, in a process that may die of it: how, and by what, in words.

    Raises:
        CvlctlError: this machine cannot.
    """
    with states.importing_mujoco():
        import mujoco
    graphics, context = _opened(mujoco.MjModel.from_xml_string("<mujoco/>"), SMALLEST, SMALLEST)
    from OpenGL import GL

    name = GL.glGetString(GL.GL_RENDERER).decode(errors="replace")
    context.free()
    graphics.free()
    return f"{os.environ['MUJOCO_GL'] or 'glfw'}: {name}"


# --- what an environment of one's own draws itself


def _check_draws(env: Env, raw: Any, cameras: tuple[Camera, ...]) -> None:
    if not env.own:
        what = f"{env.task} cannot be rendered: no MuJoCo simulates it"
        raise CvlctlError(what, "leave cameras out: metaworld/..., gym/Fetch..., gym/Hopper-v5 have them")
    if getattr(raw, "render_mode", None) != "rgb_array":
        what = f"{env.task} draws no frames: its render_mode is {getattr(raw, 'render_mode', None)!r}, not 'rgb_array'"
        raise CvlctlError(what, "if it can, say so where it is made: env: {kwargs: {render_mode: rgb_array}}")
    if [camera.name for camera in cameras] != [DEFAULT] or cameras[0].free is not None:
        what = f"{env.task} draws itself, from one place"
        raise CvlctlError(what, f"name the one camera {DEFAULT!r}: cameras: {{{DEFAULT}: {{size: 64}}}}")


def _drawn(env: Env, camera: Camera) -> np.ndarray:
    """(H, W, 3): the environment's own render(), resized."""
    from PIL import Image

    drawn = np.asarray(env.raw.render())
    if drawn.dtype != np.uint8 or drawn.ndim != 3 or drawn.shape[2] != 3:
        what = f"{env.task}: render() gives {drawn.dtype} of shape {drawn.shape}; expected (height, width, 3) uint8"
        raise CvlctlError(what, "the fault is in the environment's own code")
    if drawn.shape[:2] == (camera.height, camera.width):
        return drawn.copy()
    return np.array(Image.fromarray(drawn).resize((camera.width, camera.height), Image.Resampling.BOX))
