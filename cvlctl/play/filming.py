"""Episodes with frames: what cameras see of them, from worker processes where there are several.

What is kept while an episode is played are states of the simulator; frames are drawn of them when it is over, and are
the same whoever draws them. An environment of one's own, whose state nobody knows, is drawn at every step; so is one
whose frames are acted on.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any, Self

import numpy as np

from cvlctl import children, interrupts
from cvlctl.play import states
from cvlctl.play.cameras import Camera, Renderer, cameras_of
from cvlctl.play.env import Env
from cvlctl.play.envs import make
from cvlctl.play.stepping import MEMORY, table_in
from cvlctl.play.workers import COMMAND, value_of

STATE = "its state"  # in the table, beside cameras, which are plain names
BLOCK = 64  # frames that a worker draws at once, of each camera


class Studio:
    """Draws states of one task. To be closed.

    Args:
        env: of the task; it is left as it is.
        workers: processes; 0 or 1: none, all in this process.

    Attributes:
        shapes: (height, width, 3) of each camera's frames, by name.
        renderer: of this process.

    Raises:
        CvlctlError: no such camera, or nothing can be rendered here.
    """

    def __init__(self, env: Env, cameras: Iterable[Camera], workers: int) -> None:
        self.renderer = Renderer(env, cameras)  # also where others draw: what is wrong is said here
        self.shapes = self.renderer.shapes
        self._processes: list[subprocess.Popen[str]] = []
        if workers <= 1:
            return
        self.renderer.close()
        kind = _kind(sum(states.layout(env).values()), self.shapes)
        self._file = tempfile.TemporaryFile(dir=MEMORY if MEMORY.is_dir() else None)  # noqa: SIM115 (see close)
        self._file.truncate(workers * BLOCK * kind.itemsize)
        self._table = table_in(self._file.fileno(), kind)
        settings = {camera.name: camera.about() for camera in self.renderer.cameras}
        self._about = [self._file.fileno(), env.task, json.dumps(settings)]
        for _ in range(workers):
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "pass_fds": (self._file.fileno(),)}
            self._processes.append(children.begin(COMMAND, f"{__name__}:_work", **pipes))

    def frames(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """(rows, H, W, 3) uint8 by camera, of states (rows, n).

        Raises:
            CvlctlError: they are no states of this task, or a worker died.
        """
        found = {name: np.empty((len(rows), *shape), np.uint8) for name, shape in self.shapes.items()}
        step = BLOCK * max(1, len(self._processes))
        for begin in range(0, len(rows), step):
            some = rows[begin : begin + step]
            drawn = self._asked(some) if self._processes else _drawn(self.renderer, some)
            for name, frames in found.items():
                frames[begin : begin + step] = drawn[name]
        return found

    def _asked(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the workers draw, an equal share each."""
        if rows.shape[1:] != self._table[STATE].shape[1:]:
            states.split(self.renderer.env, rows[0])  # says so
        self._table[STATE][: len(rows)] = rows
        ends = np.linspace(0, len(rows), len(self._processes) + 1).astype(int).tolist()
        for process, begin, end in zip(self._processes, ends, ends[1:], strict=False):
            assert process.stdin
            with suppress(OSError):  # it died; there will be no answer
                process.stdin.write(json.dumps([self._about, begin, end]) + "\n")
                process.stdin.flush()
        for process in self._processes:
            assert process.stdout
            value_of(process.stdout.readline())
            interrupts.check()
        return {name: self._table[name][: len(rows)] for name in self.shapes}

    def close(self) -> None:
        """End the workers, and free what the graphics hold."""
        self.renderer.close()
        children.end(self._processes)
        children.close(self._processes)
        if self._processes:
            self._processes = []
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Film:
    """Frames, and states of the simulator where they are known, of the episodes that `env` plays. To be closed.

    Args:
        workers: processes that draw; 0 or 1: none, all in this process.
        every: so many steps apart are the instants that are kept; 1: all.
        live: frames are drawn at once, for `latest`.

    Attributes:
        latest: (H, W, 3) uint8 by camera, of the instant that was looked at last; empty unless drawn at once.

    Raises:
        CvlctlError: no such camera, or nothing can be rendered here.
    """

    def __init__(
        self, env: Env, cameras: Sequence[Camera], workers: int = 1, every: int = 1, live: bool = False
    ) -> None:
        self._env, self._every, self._known = env, every, states.has_state(env)
        if not cameras:
            states.layout(env)  # says so where there are no states either
        self._live = live or not self._known
        self._studio = Studio(env, cameras, 1 if self._live else workers) if cameras else None
        self.shapes = {} if self._studio is None else self._studio.shapes
        self.latest: dict[str, np.ndarray] = {}
        self._rows: list[np.ndarray] = []
        self._frames: list[dict[str, np.ndarray]] = []
        env.film = self

    def look(self) -> None:
        """Keep this instant."""
        if self._env.steps == 0:
            self._rows, self._frames = [], []
        if self._env.steps % self._every:
            return
        if self._known:
            self._rows.append(states.state_of(self._env))
        if self._live and self._studio is not None:
            self.latest = self._studio.renderer.frames(self._rows[-1] if self._known else None)
            self._frames.append(self.latest)

    def episode(self) -> dict[str, Any]:
        """Of the episode so far: images, (T+1, H, W, 3) uint8 by camera, and sim_state, (T+1, n); or None."""
        rows = np.stack(self._rows) if self._known else None
        images: dict[str, np.ndarray] | None = None
        if self._live:
            images = {name: np.stack([frames[name] for frames in self._frames]) for name in self.shapes}
        elif self._studio is not None and rows is not None:
            images = self._studio.frames(rows)
        return {"images": images, "sim_state": rows}

    def close(self) -> None:
        """Look no more."""
        self._env.film = None
        if self._studio is not None:
            self._studio.close()


def told_of(env: Env, cameras: Sequence[Camera]) -> dict[str, Any]:
    """What a store says of its cameras and states, where there are any."""
    seen = {"cameras": {camera.name: camera.about() for camera in cameras}} if cameras else {}
    return {**seen, **({"sim_state": states.layout(env)} if states.has_state(env) else {})}


# --- in a worker


def _drawn(renderer: Renderer, rows: np.ndarray) -> dict[str, np.ndarray]:
    frames = [renderer.frames(state) for state in rows]
    return {name: np.stack([one[name] for one in frames]) for name in renderer.shapes}


def _kind(width: int, shapes: dict[str, tuple[int, int, int]]) -> np.dtype:
    """Of a row of the table that all processes share."""
    return np.dtype([(STATE, np.float64, (width,)), *((name, np.uint8, shape) for name, shape in shapes.items())])


@lru_cache(maxsize=1)
def _place(file: int, task: str, settings: str) -> tuple[Renderer, np.ndarray]:
    env = make(task, 0)
    renderer = Renderer(env, cameras_of(json.loads(settings)))
    return renderer, table_in(file, _kind(sum(states.layout(env).values()), renderer.shapes))


def _work(request: list[Any]) -> None:
    """Draw some rows of the table."""
    about, begin, end = request
    renderer, table = _place(*about)
    for name, frames in _drawn(renderer, table[STATE][begin:end]).items():
        table[name][begin:end] = frames
