"""robomimic's HDF5: data/demo_0, data/demo_1, ..., each with actions, rewards, dones, obs/<key>, next_obs/<key>.

Its relatives too: MimicGen's, LIBERO's (no next_obs; the instruction is the episodes' task) and IsaacLab's (no rewards,
no dones; a demonstration whose `success` is set was ended by its last step, which succeeded).

Observations are joined from `observation_keys`, default all that are not images, by name (`joining`); images are frames
of `cameras`. The final
one comes from next_obs; `cutting.with_final` says what becomes of a demonstration without. An episode counts as
terminated where its last `dones` says so; earlier ones (robomimic marks states of success) do not end it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.cutting import flags, flat, with_final
from cvlctl.data.formats.hdf5 import attribute, dataset_column, hdf5_file, member
from cvlctl.data.formats.joining import Observations
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.pictures import Cameras, hdf5_frames, hdf5_images
from cvlctl.data.formats.sources import Facts, Told, reading, same_length
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode
from cvlctl.units import Bounds


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    observation_keys: Sequence[str] = (),
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The demonstrations of a robomimic file, by their numbers."""
    path = Path(path)
    with hdf5_file(path) as file:
        with reading(str(path)):
            data = member(path, file, "data")
            if data is None:
                raise CvlctlError(f"{path}: no group 'data', where robomimic keeps its demonstrations")
            names = sorted(data, key=_number)
            task = _instruction(attribute(data, "problem_info", ragged=True))
        maker = Maker(path, action_bounds, clip_actions, told=told)
        joined = Observations(path, observation_keys, alone=bool(cameras))
        pictures, there_are = Cameras(path, cameras, image_size, maker.told), set[str]()
        steps = 0
        for name in names:
            where = f"{path}: data/{name}"
            with reading(where):
                demo = member(path, data, name)
                here = {key: member(path, demo, key) for key in ("obs", "next_obs")}
                if here["obs"] is None:
                    hint = "make observations from its states with robomimic's dataset_states_to_obs.py"
                    raise CvlctlError(f"{where}: no observations", hint)
                there = [key for key in ("rewards", "dones") if member(path, demo, key) is not None]
                said = attribute(demo, "success")
            columns = {key: dataset_column(path, demo, key) for key in ("actions", *there)}
            continuous(columns["actions"])
            same_length(path, columns)
            arrays = {key: column.rest() for key, column in columns.items()}
            ended = bool(flags(arrays["dones"], f"{where}/dones")[-1:].any()) if "dones" in arrays else bool(said)
            length = len(arrays["actions"])
            with reading(f"{where}/obs"):
                observations = joined.of(here["obs"])
                there_are |= set(images := hdf5_images(path, here["obs"]))
                chosen = pictures.choose(images)
                frames = hdf5_frames(path, here["obs"], chosen, pictures)
            with reading(f"{where}/next_obs"):
                next_obs = here["next_obs"]
                after = None if next_obs is None else joined.last(next_obs)
                seen = {} if next_obs is None else hdf5_frames(path, next_obs, chosen, pictures, last=True)
                count = length if next_obs is not None or ended else length - 1
                if observations is not None:
                    observations, count = with_final(observations, after, ended, length)
                frames = {name: with_final(of, seen.get(name), ended, length)[0] for name, of in frames.items()}
            maker.told.columns = maker.told.columns or joined.columns()
            yield from maker.make(
                where,
                observations=observations, images=frames, actions=arrays["actions"][:count],
                rewards=flat(arrays["rewards"], f"{where}/rewards")[:count] if "rewards" in arrays else None,
                successes=None if said is None else _only_last(count, len(arrays["actions"])) & bool(said),
                terminated=ended, collected_at=steps, task=task,
            )  # fmt: skip
            steps += len(arrays["actions"])
        vectors = set(joined.left_out) - there_are
        maker.told.dropped = sorted({*vectors, *pictures.left_out(there_are - set(observation_keys))})
        maker.finish(joined.columns())


def _only_last(count: int, length: int) -> np.ndarray:
    """(count,) bool of the first steps of `length`: whether each is the last."""
    return np.arange(1, count + 1) == length


def _number(name: str) -> tuple[int, str]:
    found = re.search(r"\d{1,9}$", name)
    return (int(found[0]) if found else -1, name)


def _instruction(problem: Any) -> str:
    """What LIBERO's `problem_info` says is to be done; "" where it is none."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        found = json.loads(problem or "{}")
        text = found.get("language_instruction") if isinstance(found, dict) else None
        return str(text[0] if isinstance(text, list) and text else text or "").strip('"')
    return ""


def facts(path: Path) -> Facts:
    """The environment's name, and its arguments for the provenance."""
    with hdf5_file(path) as file, reading(str(path)):
        data = member(path, file, "data")
        env = json.loads((data is not None and attribute(data, "env_args", ragged=True)) or "{}")
        total = int((data is not None and attribute(data, "total")) or 0)
        name, kwargs = str(env.get("env_name", "")), env.get("env_kwargs")
        kwargs = kwargs if isinstance(kwargs, dict) else {}
        frequency = kwargs.get("control_freq")
        period = {"control_period": 1 / frequency} if isinstance(frequency, int | float) and frequency > 0 else {}
        environment = {"task": name, **({"kwargs": kwargs} if kwargs else {})} if name else None
        return Facts(total, name, None, {"env_args": env} if env else {}, units=period, environment=environment)
