"""Environments of one task that step together, in worker processes if wanted: what they see, do and earn lies in one
table that all processes share, so that whoever answers for the policies answers all of them at once."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import numpy as np

from cvlctl import children, interrupts
from cvlctl.play import states
from cvlctl.play.cameras import Camera, Renderer
from cvlctl.play.env import Env
from cvlctl.play.envs import make
from cvlctl.play.settings import Settings
from cvlctl.play.workers import COMMAND, value_of
from cvlctl.types import Spec

_About = tuple[str, int, int | None, Settings | None]  # what `make` is called with

MEMORY = Path("/dev/shm")  # where the table lies, if there is such a place


class Stepper:
    """`num` environments, made when they are first needed; to be closed, as a context manager does.

    Args:
        workers: processes; 0 or 1: none, all in this process.

    Attributes:
        first: an environment like the others, to be asked what they are.
        table: (num,) records: observation (O,), action (A,), to be set before a step; of the last step reward, over
            and success (-1: the task has no notion of it); of each camera a frame (`frames_in`).
    """

    def __init__(
        self,
        task: str,
        seed: int,
        horizon: int | None,
        num: int,
        workers: int,
        settings: Settings | None = None,
        cameras: Sequence[Camera] = (),
    ) -> None:
        about = (task, seed, horizon, settings)
        self.first = make(*about)
        kind = _kind(self.first.spec, cameras)
        self._processes: list[subprocess.Popen[str]] = []
        self._part: _Part | None = None
        if min(workers, num) <= 1:
            self.table = np.zeros(num, kind)
            self._part = _Part(self.table, about, self.first, cameras)
            return
        if cameras:
            with Renderer(self.first, cameras):  # what is amiss with them is said here
                pass
        self._file = tempfile.TemporaryFile(dir=MEMORY if MEMORY.is_dir() else None)  # noqa: SIM115 (see __exit__)
        self._file.truncate(num * kind.itemsize)
        self.table = table_in(self._file.fileno(), kind)
        self._about = [self._file.fileno(), task, seed, horizon, None if settings is None else settings.as_json()]
        self._about.append(json.dumps([[camera.name, camera.about()] for camera in cameras]))
        for _ in range(min(workers, num)):
            pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "pass_fds": (self._file.fileno(),)}
            self._processes.append(children.begin(COMMAND, f"{__name__}:_work", **pipes))

    def run(self, begun: Mapping[int, int], stepped: Sequence[int]) -> None:
        """Let environments of these numbers begin the episodes `begun`, and others take the actions in the table.

        Raises:
            CvlctlError: an action is not finite; a worker died.
        """
        if self._part is not None:
            self._part.run(begun, stepped)
            return
        asked, num = [], len(self._processes)
        for place, process in enumerate(self._processes):
            own = {number: episode for number, episode in begun.items() if number % num == place}
            steps = [number for number in stepped if number % num == place]
            if own or steps:
                assert process.stdin
                try:
                    process.stdin.write(json.dumps([self._about, list(own.items()), steps]) + "\n")
                    process.stdin.flush()
                except OSError:  # it died; there will be no answer
                    pass
                asked.append(process)
        for process in asked:
            assert process.stdout
            value_of(process.stdout.readline())
            interrupts.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        children.end(self._processes)
        children.close(self._processes)
        if self._part is None:
            self._file.close()
        else:
            self._part.close()


class _Part:
    """The environments of one process, by number."""

    def __init__(self, table: np.ndarray, about: _About, first: Env, cameras: Sequence[Camera]) -> None:
        self.table, self._about, self._cameras = table, about, cameras
        self._renderers: dict[int, Renderer] = {}
        self._spare: list[Env] = [first]
        self._envs: dict[int, Env] = {}

    def run(self, begun: Mapping[int, int], stepped: Sequence[int]) -> None:
        table = self.table
        for number in stepped:
            seen, reward, terminated, truncated, success = self._envs[number].step(table["action"][number])
            table["observation"][number], table["reward"][number] = seen, reward
            table["over"][number] = terminated or truncated
            table["success"][number] = -1 if success is None else success
        for number, episode in begun.items():
            if number not in self._envs:
                self._envs[number] = self._spare.pop() if self._spare else make(*self._about)
            table["observation"][number] = self._envs[number].reset(episode)
        if self._cameras:
            for number in (*stepped, *begun):
                self._draw(number)

    def _draw(self, number: int) -> None:
        """Where a simulator's state is known one renderer, which takes half a second to make, draws them all."""
        env = self._envs[number]
        state, by = (states.state_of(env), 0) if states.has_state(env) else (None, number)
        if by not in self._renderers:
            self._renderers[by] = Renderer(env, self._cameras)
        found = self._renderers[by].frames(state)
        for i, camera in enumerate(self._cameras):
            frames_in(self.table, i)[number] = found[camera.name]

    def close(self) -> None:
        """Free what draws."""
        for renderer in self._renderers.values():
            renderer.close()


def frames_in(table: np.ndarray, camera: int) -> np.ndarray:
    """(num, H, W, 3) uint8: the latest frames of a camera, by its place among those that the table has."""
    return np.asarray(table[f"frames{camera}"])


def _kind(spec: Spec, cameras: Sequence[Camera]) -> np.dtype:
    """Of a row of the table."""
    return np.dtype([
        *((f"frames{i}", np.uint8, (camera.height, camera.width, 3)) for i, camera in enumerate(cameras)),
        ("observation", np.float32, spec.observation_shape), ("action", np.float32, (spec.action_dim,)),
        ("reward", np.float64), ("over", np.bool_), ("success", np.int8),
    ])  # fmt: skip


def table_in(file: int, kind: np.dtype) -> np.ndarray:
    """The records of a file that several processes share."""
    return np.frombuffer(mmap.mmap(file, os.fstat(file).st_size), kind)


@lru_cache(maxsize=1)
def _part_of(file: int, task: str, seed: int, horizon: int | None, settings: str | None, cameras: str) -> _Part:
    about = (task, seed, horizon, None if settings is None else Settings.from_json(settings))
    first = make(*about)
    views = [Camera.of(name, told) for name, told in json.loads(cameras)]
    return _Part(table_in(file, _kind(first.spec, views)), about, first, views)


def _work(request: list[Any]) -> None:
    """A round in a worker."""
    about, begun, stepped = request
    _part_of(*about).run(dict(begun), stepped)
