"""HDF5 with a group an episode, or a file an episode: ALOHA's, ManiSkill's, d3rlpy's, and those of one's own.

    episode_0.hdf5, ...       action, observations/qpos, observations/images/top         ALOHA, a folder of files
    traj_0, traj_1, ...       actions, obs (T+1 rows), success, terminated       ManiSkill, with a .json beside
    actions_0, rewards_0 ...  observations_0, terminated_0; `columns`, `num_episodes`       d3rlpy 2

Observations are an array, or a group of arrays that are joined by name (`joining`), images left out. T+1 of them end
with the final one; of T, `cutting.with_final` says what becomes of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvlctl.data.formats.cutting import flags, flat, with_final
from cvlctl.data.formats.hdf5 import dataset_column, dataset_in, datasets, hdf5_file, member, names_in
from cvlctl.data.formats.joining import Observations
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.pictures import Cameras, hdf5_frames, hdf5_images
from cvlctl.data.formats.segments import check_names
from cvlctl.data.formats.sources import Facts, Told, files_in, reading, steps_of
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural
from cvlctl.types import Episode
from cvlctl.units import Bounds

if TYPE_CHECKING:
    import h5py

SUFFIXES = (".hdf5", ".h5", ".hdf")
NAMES = {  # ours -> theirs, of which the first that is there counts
    "observations": ("obs", "observations", "observation"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "successes": ("success", "successes"),
    "terminals": ("terminated", "terminals", "terminations"),
}
IMAGES = {"images", "sensor_data", "rgb", "depth"}  # what lies below is left out, coded as rows of bytes or not
MAX_JSON = 2**30

Find = Callable[[str], str]  # our name -> where the array lies in the group; "" where there is none


def read(
    path: str | Path,
    told: Told | None = None,
    *,
    keys: Mapping[str, str] | None = None,
    observation_keys: Sequence[str] = (),
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
) -> Iterator[Episode]:
    """The episodes of a file, or of a folder's files, by the numbers in their names.

    Args:
        keys: our name -> the file's, within an episode: observations, actions, rewards, successes, terminals.
        observation_keys: arrays of a group of observations to join, in this order; default: all but images, by name.
    """
    path, keys = Path(path), dict(keys or {})
    check_names(keys, list(NAMES))
    maker, steps = Maker(path, action_bounds, clip_actions, told=told), 0
    joined = Observations(path, observation_keys, alone=bool(cameras))
    pictures, images = Cameras(path, cameras, image_size, maker.told), set[str]()
    for file_path in files_of(path):
        maker.path = file_path
        with hdf5_file(file_path) as file:
            for group, find, where in _episodes(file_path, file, keys):
                parts = _arrays(file_path, group, find)
                with reading(where):
                    observations = _observations(file_path, group, find("observations"), joined, images)
                    frames = _frames(file_path, group, find("observations"), pictures, images)
                length, ended = len(parts["actions"]), bool(parts.pop("terminals", np.zeros(1))[-1:].any())
                count = length
                if observations is not None and len(observations) == length:
                    observations, count = with_final(observations, None, ended, length)
                for camera, of in frames.items():  # with the final one; another number is told of by the episode
                    if len(of) == length:
                        frames[camera], count = with_final(of, None, ended, length)
                maker.told.columns = maker.told.columns or joined.columns()
                if count:
                    cut = {name: values[:count] for name, values in parts.items()}
                    about = {"terminated": ended, "collected_at": steps}
                    yield from maker.make(where, observations=observations, images=frames, **about, **cut)
                steps += count
    maker.path = path
    left = pictures.left_out(images - set(observation_keys))
    maker.told.dropped = sorted({*(set(joined.left_out) - images), *left})
    maker.finish(joined.columns())


def files_of(path: Path) -> list[Path]:
    """The file itself, or a folder's HDF5 files in the order of their names, numbers as numbers."""
    files = files_in(path, SUFFIXES, "an HDF5 file")
    if not files:
        raise CvlctlError(f"{path} is a directory; expected HDF5 files in it, and there are none",
                          f"their names end in {', '.join(SUFFIXES)}")  # fmt: skip
    return files


def facts(path: Path) -> Facts:
    """The task and the horizon, where ManiSkill's .json beside the file tells them."""
    files, beside = files_of(path), path.with_suffix(".json")
    if path.is_dir() or not beside.is_file():
        return Facts(0, data=files)
    with reading(str(beside)):
        if beside.stat().st_size > MAX_JSON:
            raise ValueError("too large to be true")
        found = json.loads(beside.read_text(encoding="utf-8"))
        about = found.get("env_info") if isinstance(found, dict) else None
        about = about if isinstance(about, dict) else {}
        kept = {"env_info": about} if about else {}
        limit = about.get("max_episode_steps")
        return Facts(0, str(about.get("env_id", "")), steps_of(limit, str(beside)) if limit else None, kept, files)


def _episodes(path: Path, file: h5py.File, keys: Mapping[str, str]) -> Iterator[tuple[h5py.Group, Find, str]]:
    """Groups, where the arrays of an episode lie in them, and what to call it: episode by episode."""
    import h5py

    def there(group: h5py.Group) -> Find:
        def find(ours: str) -> str:
            names = (keys[ours],) if ours in keys else NAMES[ours]
            return next((name for name in names if member(path, group, name) is not None), "")

        return find

    if {"columns", "num_episodes"} <= set(names_in(path, file)):
        yield from _of_d3rlpy(path, file)
        return
    above = [file, *(g for g in (member(path, file, "data"),) if isinstance(g, h5py.Group))]
    if there(file)("actions"):
        yield file, there(file), str(path)
        return
    found = 0
    for group in above:
        for name in sorted(names_in(path, group), key=natural):
            episode = member(path, group, name)
            if isinstance(episode, h5py.Group) and there(episode)("actions"):
                found += 1
                yield episode, there(episode), _where(path, episode)
        if found:
            return
    with reading(str(path)):
        listed = ", ".join(list(datasets(path, file))[:10]) or "nothing"
    raise CvlctlError(f"{path}: no {keys.get('actions', 'actions')}, neither in the file nor in its groups",
                      f"--key actions=NAME says which array of an episode: the file has {listed}")  # fmt: skip


def _of_d3rlpy(path: Path, file: h5py.File) -> Iterator[tuple[h5py.Group, Find, str]]:
    there = set(names_in(path, file))
    with reading(f"{path}: num_episodes"):
        count = int(dataset_in(path, file, "num_episodes")[()])
    theirs = {"observations": "observations", "actions": "actions", "rewards": "rewards", "terminals": "terminated"}
    if f"actions_{count - 1}" not in there:
        raise CvlctlError(f"{path}: num_episodes says {count}, and there is no actions_{count - 1}", "write it again")
    for i in range(count):

        def find(ours: str, i: int = i) -> str:
            return name if (name := f"{theirs.get(ours)}_{i}") in there else ""

        yield file, find, f"{path}: episode {i}"


def _arrays(path: Path, group: h5py.Group, find: Find) -> dict[str, np.ndarray]:
    """An episode's arrays but the observations, of one length; of `terminals` maybe a single value."""
    found: dict[str, np.ndarray] = {"actions": continuous(dataset_column(path, group, find("actions"))).rest()}
    length = len(found["actions"])
    for ours, as_numbers in (("rewards", flat), ("successes", flags), ("terminals", flags)):
        if not (name := find(ours)):
            continue
        where = _where(path, group, name)
        dataset = dataset_in(path, group, name)
        if dataset.shape == () and ours == "terminals" and dataset.dtype.kind in "biu":
            found[ours] = np.array([bool(dataset[()])])
            continue
        found[ours] = as_numbers(dataset_column(path, group, name).rest(), where)
        if len(found[ours]) != length:
            raise CvlctlError(f"{where}: has {len(found[ours])} values for {length} actions")
    return found


def _frames(path: Path, group: h5py.Group, name: str, pictures: Cameras, images: set[str]) -> dict[str, np.ndarray]:
    """The frames of the cameras that are chosen, of a group of observations; `images` gets all there are."""
    import h5py

    found = member(path, group, name)
    there = hdf5_images(path, found) if isinstance(found, h5py.Group) else []
    images |= set(there)
    return hdf5_frames(path, found, pictures.choose(there), pictures)


def _observations(
    path: Path, group: h5py.Group, name: str, joined: Observations, images: set[str]
) -> np.ndarray | None:
    """(T+1 or T, ...), of one array or of several."""
    import h5py

    found = member(path, group, name) if name else None
    if found is None:
        hint = (
            "--key observations=NAME says which array or group; ManiSkill's are written by replay_trajectory -o state"
        )
        raise CvlctlError(f"{_where(path, group)}: no observations", hint)
    where = _where(path, group, name)
    if not joined.several(isinstance(found, h5py.Group), where):
        return dataset_column(path, group, name).rest()
    there = datasets(path, found)
    images |= {key for key in there if IMAGES & set(key.split("/")) and key not in joined.keys}
    chosen = joined.chosen(where, {k: tuple(d.shape or ()) for k, d in there.items() if k not in images})
    return joined.of_arrays(where, {key: dataset_column(path, found, key).rest() for key in chosen})


def _where(path: Path, group: h5py.Group, name: str = "") -> str:
    inside = "/".join(part for part in (group.name.strip("/"), name) if part)
    return f"{path}: {inside}" if inside else str(path)
