"""Environments of one's own: any id that gymnasium can make, any callable that gives a `gymnasium.Env`.

What comes out of one is checked at every step, since nobody vouches for it: shapes, finite numbers, whatever its code
raises. A fault is one error, with the task, the episode and the step, and the line of the code where there is one.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.play import named_code
from cvlctl.play.env import Env
from cvlctl.play.settings import Settings
from cvlctl.play.spaces import Flattener, Misfit, bounds_of
from cvlctl.progress import say

PACKAGES = ("gymnasium_robotics", "ogbench")  # that register their environments when they are imported
SUCCESS = ("success", "is_success")
NOTHING = Settings()
MAKING = "cannot be made"
PROBED = 3  # steps between the two resets of `probe`


def check(task: str) -> bool:
    """Whether gymnasium knows `task`, gym/<id>, or where the code lies that it names. Nothing of one's own is imported.

    Raises:
        CvlctlError: the code that it names is not there.
    """
    if named_code.origin(task) is not None:
        return True
    return task.startswith("gym/") and _registered(task.removeprefix("gym/"))


def near(task: str) -> list[str]:
    """Tasks that gymnasium knows by the name of `task`, in whatever version, or by one that is like it."""
    import gymnasium

    wanted = task.removeprefix("gym/")
    name = wanted.partition("-v")[0].lower()
    found = [known for known in gymnasium.registry if known.partition("-v")[0].lower() == name][::-1]
    if task != wanted:
        found += difflib.get_close_matches(wanted, gymnasium.registry, 2, 0.7)
    return [f"gym/{known}" for known in found]


def make(task: str, seed: int, horizon: int | None, settings: Settings | None) -> Env:
    """The environment, checked. An episode is cut off where it says so itself, and at its time limit.

    Args:
        horizon: what an environment without a limit is cut off at.

    Raises:
        CvlctlError: nobody named its code, the code raises something, a space that is not supported, no time limit.
        ImportError: a package that it needs is missing.
    """
    settings = settings or NOTHING
    raw = _Checked(task, settings)
    own = _limit(raw.inside)
    limit = own or horizon or settings.limit
    if limit is None:
        raw.close()
        raise CvlctlError(f"{task} has no time limit of its own", "give one beside task, such as horizon: 200")

    def begin(episode: int) -> np.ndarray:
        word = np.random.SeedSequence([seed, episode]).generate_state(1, np.uint32)[0]
        return raw.begin(episode, int(word >> 1))

    return Env(
        task, seed, raw, begin, limit, False, raw.versions(),
        own=True, columns=raw.flat.columns, bounds_given=settings.action_bounds is not None,
    )  # fmt: skip


def probe(env: Env) -> None:
    """Say what is amiss with how an environment begins: one that ignores its seed gives other episodes to whoever asks.

    It is reset twice by one seed, with a few steps in between.
    """
    first = env.reset(0)
    for _ in range(PROBED):
        _, _, terminated, truncated, _ = env.step(np.zeros(env.spec.action_dim))
        if terminated or truncated:
            break
    if not np.array_equal(first, env.reset(0)):
        say(
            f"{env.task} ignores its seed: two resets by one seed begin differently. Its episodes are not the same for "
            "any number of workers, nor in the next run; draw its starts from self.np_random, after "
            "super().reset(seed=seed)"
        )
    if env.raw.wanted and not env.raw.tells:
        there = ", ".join(map(str, env.raw.info)) or "nothing"
        say(f"{env.task}: info has no {env.raw.wanted!r} in its first steps (it has {there}): such count as no success")
    if env.raw.flat.left_out:
        say(f"{env.task}: images are left out of the observations: {', '.join(env.raw.flat.left_out)}")


class _Checked:
    """A gymnasium environment as `Env` takes it: flat observations, flat actions, `success` (or None) in info."""

    def __init__(self, task: str, settings: Settings) -> None:
        from gymnasium.spaces import Box

        self._task, self._settings, self._at = task, settings, ""
        with self._blamed(MAKING), contextlib.chdir("."):  # our paths are relative to where we stand
            self.inside: Any = _made(task, settings)
            space, seen = self.inside.action_space, self.inside.observation_space
        low, high = bounds_of(task, space, settings.action_bounds)
        self.flat = Flattener(task, seen, settings.keys)
        self.action_space, self._shape, self._type = Box(low, high), space.shape, space.dtype
        self.observation_space = Box(-np.inf, np.inf, (self.flat.width,))
        self.info: dict[str, Any] = {}  # of the latest step
        self.tells = False  # of success, in any step so far
        self.wanted = settings.success
        self._success: Sequence[str] = (settings.success,) if settings.success else SUCCESS

    def begin(self, episode: int, seed: int) -> np.ndarray:
        self._episode, self._step = episode, 0
        with self._blamed(f"episode {episode}: reset"):
            observation, _ = _of_length(2, "reset", "observation, info", self.inside.reset(seed=seed))
            return self.flat(observation)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._step += 1
        with self._blamed(f"episode {self._episode}, step {self._step}"):
            result = self.inside.step(action.reshape(self._shape).astype(self._type))
            form = "observation, reward, terminated, truncated, info"
            observation, reward, terminated, truncated, info = _of_length(5, "step", form, result)
            paid = _number("the reward", reward)
            if not np.isfinite(paid):
                raise Misfit(f"the reward is {paid}")
            return self.flat(observation), paid, bool(terminated), bool(truncated), self._said(info)

    def render(self) -> Any:
        """What it draws, in the render_mode that it was made with."""
        with self._blamed(f"episode {self._episode}, step {self._step}: render"):
            return self.inside.render()

    def close(self) -> None:
        with self._blamed("close"):
            self.inside.close()

    def versions(self) -> dict[str, str]:
        raw = self.inside.unwrapped
        packages = ["gymnasium", type(raw).__module__.partition(".")[0], *(["mujoco"] if hasattr(raw, "model") else [])]
        found = {}
        for package in dict.fromkeys([*packages, "numpy"]):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[package] = metadata.version(package)
        code = self._settings.code
        return found if code is None else found | {"code": Path(code).name, "sha256": named_code.digest(code)}

    def _said(self, info: dict[str, Any]) -> dict[str, Any]:
        """Success of a step: None where the environment says nothing of it, and no key was named."""
        if not isinstance(info, dict):
            raise Misfit(f"info is a {type(info).__name__}, not a dict")
        self.info = info
        for key in self._success:
            if key in info:
                self.tells = True
                several = np.asarray(info[key]).reshape(-1)
                return {"success": any(_number(f"info[{key!r}]", one) > 0 for one in several)}
        return {"success": False if self.wanted else None}

    @contextlib.contextmanager
    def _blamed(self, where: str) -> Iterator[None]:
        """Whatever the environment raises, as one error with the line of its code."""
        try:
            yield
        except (CvlctlError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            what = f"{self._task}: {where}: {_in_words(error)}{_line(error, self._settings.code)}"
            hint = named_code.lacking(error, self._settings.code) or "the fault is in the environment's own code"
            if isinstance(error, TypeError) and "argument" in str(error) and where == MAKING:
                hint = f"what it is called with stands in env: {{kwargs: {{...}}}}, here {self._settings.kwargs}"
            raise CvlctlError(what, hint) from error


def _made(task: str, settings: Settings) -> Any:
    import gymnasium

    kwargs = json.loads(settings.kwargs)
    found: Any = named_code.load(task, settings.code) if named_code.names(task) else None
    if task.startswith("py/"):
        env = found(**kwargs)
        if not isinstance(env, gymnasium.Env):
            what = f"{task} gives a {type(env).__module__}.{type(env).__name__}, not a gymnasium.Env"
            raise CvlctlError(what, "name a class derived from gymnasium.Env, or a function that returns one")
        return env
    name = task.removeprefix("gym/").rpartition(":")[2]
    if not _registered(name):
        raise CvlctlError(f"{task}: gymnasium knows no {name!r}", "importing the module should register it")
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # that there is a newer version, that the observation is no Box of float32
        return gymnasium.make(name, disable_env_checker=True, **kwargs)


def _registered(name: str) -> bool:
    """Whether gymnasium has an environment of that id, with those of `PACKAGES` that are installed."""
    import gymnasium

    for package in PACKAGES:
        if name in gymnasium.registry:
            break
        if find_spec(package):
            with contextlib.redirect_stderr(io.StringIO()):  # one prints a notice about other environments
                gymnasium.register_envs(import_module(package))
    return name in gymnasium.registry


def registered_kwargs(name: str) -> dict[str, Any]:
    """With which gymnasium makes an environment of that id, where it knows one."""
    import gymnasium

    return dict(gymnasium.registry[name].kwargs) if _registered(name) else {}


def _limit(env: Any) -> int | None:
    """The time limit that it has itself: of its wrapper, or as it is registered."""
    with contextlib.suppress(AttributeError):
        return int(env.get_wrapper_attr("_max_episode_steps"))
    return getattr(env.spec, "max_episode_steps", None)


def _number(what: str, value: Any) -> float:
    """A number, or an array of one."""
    found = np.asarray(value)
    if found.size != 1 or found.dtype.kind not in "fiub":
        raise Misfit(f"{what} is {str(value)[:40]!r}, not a number")
    return float(found.item())


def _of_length(length: int, method: str, form: str, result: Any) -> Any:
    if not isinstance(result, tuple) or len(result) != length:
        given = f"{len(result)} values" if isinstance(result, tuple) else f"a {type(result).__name__}"
        raise Misfit(f"{method} returned {given}; gymnasium's gives {form}")
    return result


def _in_words(error: BaseException) -> str:
    text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())  # where, `_line` says
    if isinstance(error, Misfit):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException, code: str | None) -> str:
    """Where in the environment's own code an error arose: the deepest line of what was named, else of what no package
    of ours, gymnasium or Python itself is."""
    frames = [(frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0))
    folder = None if code is None else os.path.dirname(code) + os.sep if code.endswith("__init__.py") else code
    ours, theirs = str(Path(__file__).parents[1]), f"{os.sep}gymnasium{os.sep}"
    own = [place for place in frames if folder is not None and place[0].startswith(folder)]
    foreign = (ours, "<", sys.base_prefix)
    other = [place for place in frames if not place[0].startswith(foreign) and theirs not in place[0]]
    for file, number in reversed(own or other):
        below = os.path.abspath(file).startswith(os.getcwd() + os.sep)
        return f" ({os.path.relpath(file) if below else file}, line {number})"
    return ""
