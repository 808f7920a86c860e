"""Minari datasets (0.4 and 0.5, HDF5): the folder that `minari.load_dataset` opens, read and written by h5py alone.

<folder>/data/metadata.json     spaces, environment, counts
<folder>/data/main_data.hdf5    episode_0, episode_1, ...: observations (T+1 rows), actions, rewards, terminations,
                                truncations, infos

Observations in several arrays (a Dict space) are joined by `observation_keys`, default all, by name (`joining`); those
of Fetch as our own gym/Fetch... has them, the robot's state and then the goal.
Actions are scaled from the bounds of the file's action space to [-1, 1], dimensions without finite ones taken as they
are; written ones are in their environment's units. Image observations may be coded as JPEG.
An episode counts as terminated where its last step's `terminations` says so. Successes are read from `infos/success` or
`infos/is_success`. Written episodes carry theirs there (T+1 values, as of Minari), their task and `collected_at`
as attributes of their group.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvlctl.data.formats.cutting import flags, flat
from cvlctl.data.formats.hdf5 import attribute, dataset_column, dataset_in, fixed_text, hdf5_file, member
from cvlctl.data.formats.hdf5_out import new_hdf5
from cvlctl.data.formats.joining import Observations
from cvlctl.data.formats.making import Maker, continuous
from cvlctl.data.formats.pictures import Cameras, hdf5_frames, hdf5_images
from cvlctl.data.formats.seeing import only_array
from cvlctl.data.formats.sources import Facts, Told, reading, steps_of
from cvlctl.data.store import Store
from cvlctl.data.units import bounds_of, export_digest, exported_units
from cvlctl.errors import CvlctlError
from cvlctl.folders import replacing
from cvlctl.frames import decoded
from cvlctl.play.envs import list_tasks
from cvlctl.progress import say
from cvlctl.types import Episode
from cvlctl.units import Bounds, finite, physical

if TYPE_CHECKING:
    import h5py

DATA, METADATA = "main_data.hdf5", "metadata.json"
ID = re.compile(r"(?:[-_\w][-_\w/]*[-_\w]+/)?[-_\w]+-v\d+")
SUCCESSES = ("infos/success", "infos/is_success")
GOAL_KEYS = ("observation", "desired_goal")
KEPT = ("dataset_id", "minari_version", "algorithm_name", "author", "code_permalink", "description", "env_spec")


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
    """The episodes of a Minari dataset, given by its folder."""
    folder = _data_folder(Path(path))
    metadata, file_path = _metadata(folder), folder / DATA
    bounds, unbounded = _bounds(metadata, folder / METADATA)
    if unbounded and action_bounds is None:
        which = f"dimensions {', '.join(map(str, unbounded))}" if bounds else "actions"
        say(f"{folder / METADATA}: {which} have no finite bounds, and are taken as they are; --action-bounds says some")
    maker = Maker(file_path, action_bounds, clip_actions, bounds, told)
    joined = Observations(file_path, observation_keys or _keys(metadata), alone=bool(cameras))
    pictures, there_are = Cameras(file_path, cameras, image_size, maker.told), set[str]()
    images = len(_space(metadata, "observation_space").get("shape") or ()) > 1
    ours = metadata.get("cvlctl") or {}
    rewarded = not (isinstance(ours, dict) and ours.get("rewards") is False)
    with hdf5_file(file_path) as file:
        with reading(str(file_path)):
            found, said = len(file), metadata["total_episodes"]
        if found != said:
            what = f"{file_path} has {found} episodes; {METADATA} counts {said}"
            raise CvlctlError(what, "fetch or write the dataset again")
        steps = 0
        for number in range(found):
            where = f"{file_path}: episode_{number}"
            with reading(where):
                group = member(file_path, file, f"episode_{number}")
                if group is None:
                    raise CvlctlError(f"{where}: the episode is missing", "fetch or write the dataset again")
                about = {"collected_at": steps, **_about(group)}
            arrays = _arrays(file_path, group, where)
            with reading(f"{where}/observations"):
                observations = _observations(file_path, group, joined, images)
                several = member(file_path, group, "observations")
                names = hdf5_images(file_path, several) if hasattr(several, "keys") else []
                there_are |= set(names)
                frames = hdf5_frames(file_path, several, pictures.choose(names), pictures)
            if number == 0:
                success = next((name for name in SUCCESSES if member(file_path, group, name) is not None), "")
            solved = _solved(file_path, group, success, len(arrays["actions"])) if success else None
            maker.told.columns = maker.told.columns or joined.columns()
            yield from maker.make(
                where,
                observations=observations, images=frames, actions=arrays["actions"],
                rewards=arrays["rewards"] if rewarded else None,
                successes=solved, terminated=bool(arrays["terminations"][-1:].any()), **about,
            )  # fmt: skip
            steps += len(arrays["terminations"])
        left = pictures.left_out(there_are - set(joined.keys))
        maker.told.dropped = sorted({*(set(joined.left_out) - there_are), *left})
        maker.finish(joined.columns())


def _about(group: h5py.Group) -> dict[str, Any]:
    """What an episode's group says of it, by the names that `Episode` has for it."""
    said = {name: attribute(group, name) for name in ("seed", "task", "collected_at")}
    return {name: value if name == "task" else int(value) for name, value in said.items() if value is not None}


def _arrays(path: Path, group: h5py.Group, where: str) -> dict[str, np.ndarray]:
    """Actions, rewards and terminations (as bool), as many of each."""
    columns = {name: dataset_column(path, group, name) for name in ("actions", "rewards", "terminations")}
    continuous(columns["actions"])
    arrays = {name: column.rest() for name, column in columns.items()}
    arrays["terminations"] = flags(arrays["terminations"], f"{where}/terminations")
    if len({len(values) for values in arrays.values()}) > 1:
        what = ", ".join(f"{name} {len(values)}" for name, values in arrays.items())
        raise CvlctlError(f"{where}: the arrays differ in their number of steps: {what}")
    return arrays | {"rewards": flat(arrays["rewards"], f"{where}/rewards")}


def _solved(path: Path, group: h5py.Group, name: str, steps: int) -> np.ndarray:
    """(T,) bool of what the infos say, (T+1,) with the one of the reset, or (T,)."""
    column = dataset_column(path, group, name)
    if len(column) not in (steps, steps + 1):
        raise CvlctlError(f"{column.where}: has {len(column)} values for {steps} steps")
    return flags(column.rest(), column.where)[-steps:]


def facts(path: Path) -> Facts:
    """Task, horizon and origin, as metadata.json has them."""
    folder = _data_folder(path)
    metadata = _metadata(folder)
    with reading(str(folder / METADATA)):
        ours, steps = metadata.get("cvlctl"), int(metadata["total_steps"])
        kept = {name: metadata[name] for name in KEPT if name in metadata}
        bounds, _ = _bounds(metadata, folder / METADATA)
        if bounds and bounds != (-1.0, 1.0):  # which stores of earlier versions do not record
            kept["action_bounds"] = bounds
        where = str(folder / METADATA)
        if ours:
            known = (str(ours["task"]), steps_of(ours["horizon"], where), kept, [folder / DATA], bounds)
            said = ours.get("environment")
            said = said if isinstance(said, dict) else None
            return Facts(steps, *known, said, str(ours.get("exported", "")), dict(ours.get("units", {})))
        env = _env_spec(metadata)
        task = f"gym/{env['id']}" if env.get("id") else str(metadata.get("dataset_id", ""))
        limit = env.get("max_episode_steps")
        horizon = steps_of(limit, where) if limit else None
        return Facts(steps, task, horizon, kept, [folder / DATA], bounds, _came_from(task, env, _keys(metadata)))


def _env_spec(metadata: dict[str, Any]) -> dict[str, Any]:
    """Gymnasium's description of the environment; of it the id and kwargs count, and never the entry point."""
    found = json.loads(metadata.get("env_spec") or "{}")
    return found if isinstance(found, dict) else {}


def _keys(metadata: dict[str, Any]) -> Sequence[str]:
    """Which observations are read by default; (): all, by name."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        there = _space(metadata, "observation_space").get("subspaces") or {}
        if str(_env_spec(metadata).get("id")).startswith("Fetch") and set(GOAL_KEYS) <= set(there):
            return GOAL_KEYS
    return ()


def _came_from(task: str, env: dict[str, Any], keys: Sequence[str]) -> dict[str, Any] | None:
    """The store's attribute `environment`."""
    if not env.get("id"):
        return None
    kwargs = env.get("kwargs")
    found = {"kwargs": kwargs if isinstance(kwargs, dict) else {}, "keys": [] if task in list_tasks() else list(keys)}
    return {"task": task} | {name: value for name, value in found.items() if value}


def is_dataset(path: Path) -> bool:
    """Whether a folder is a Minari dataset's."""
    return (path / "data" / METADATA).is_file()


def _data_folder(path: Path) -> Path:
    for folder in (path / "data", path, path.parent):
        if (folder / METADATA).is_file() and (folder / DATA).is_file():
            return folder
    what = f"{path} is not a Minari dataset: no data/{METADATA} and data/{DATA} in it"
    raise CvlctlError(what, "give the dataset's folder, such as ~/.minari/datasets/mujoco/hopper/medium-v0; HDF5 only")


def _metadata(folder: Path) -> dict[str, Any]:
    with reading(str(folder / METADATA)):
        found = json.loads((folder / METADATA).read_text())
        if not isinstance(found, dict) or found.get("data_format", "hdf5") != "hdf5":
            raise CvlctlError(f"{folder / METADATA} is not of an HDF5 dataset", "convert it with Minari to hdf5")
        return found


def _space(metadata: dict[str, Any], name: str) -> dict[str, Any]:
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        found = json.loads(metadata[name]) if name in metadata else {}
        return found if isinstance(found, dict) else {}
    return {}


def _bounds(metadata: dict[str, Any], where: Path) -> tuple[Bounds | None, list[int]]:
    """What `units.finite` makes of the action space: bounds (None: it has none), and the dimensions without."""
    space = _space(metadata, "action_space")
    if space.get("type", "Box") != "Box":
        what = f"{where}: actions of a {space['type']} space: discrete actions are not supported"
        raise CvlctlError(what, "only continuous actions (Box) are read")
    with reading(str(where)):
        bounds, unbounded = finite(space.get("low", -1.0), space.get("high", 1.0))
        tells = space and not unbounded and "cvlctl" not in metadata  # ours write [-1, 1] where nobody knows them
        return bounds or ((-1.0, 1.0) if tells else None), unbounded


def _observations(path: Path, group: h5py.Group, joined: Observations, images: bool) -> np.ndarray | None:
    import h5py

    found = member(path, group, "observations")
    if joined.several(isinstance(found, h5py.Group), f"{path}: {group.name.strip('/')}/observations"):
        return joined.of(found)
    dataset = dataset_in(path, group, "observations")
    if images and dataset.ndim < 3:
        where = f"{path}: {group.name.strip('/')}/observations"
        return np.stack(
            [decoded(bytes(bytearray(frame)), f"{where}[{i}]", ["JPEG"]) for i, frame in enumerate(dataset)]
        )
    return dataset_column(path, group, "observations").rest()


# --------------------------------------------------------------------------------------------------------------- write


def write(store: Store, path: Path, label: str, force: bool = False) -> None:
    """Write a store as the folder of a Minari dataset; without reward labels, with rewards of zero.

    Raises:
        CvlctlError: the folder's name is none that Minari could open: it must end in -v and a number.
    """
    name, spec, bounds = _dataset_id(path), store.spec, bounds_of(store)
    frames = only_array(store) != "data/observation"
    shape = spec.cameras["pixels"] if frames else spec.observation_shape
    rewarded, solvable = store.has_label(label), store.has_label(label, "success")
    named, more = label if rewarded or solvable else "given", exported_units(store)
    with replacing(path, folder=True, force=force) as temporary:
        (temporary / "data").mkdir()
        with new_hdf5(temporary / "data" / DATA, track_order=True) as (file, check):
            for number, episode in enumerate(store.episodes(named)):
                _write_episode(file.create_group(f"episode_{number}"), episode, number, bounds)
                check()
        size = round((temporary / "data" / DATA).stat().st_size / 1e6, 1)
        low, high = (0, 255) if frames else (-np.inf, np.inf)
        metadata: dict[str, Any] = {
            "dataset_id": name, "total_episodes": store.num_episodes, "total_steps": store.num_transitions,
            "data_format": "hdf5", "dataset_size": size,
            # 0.5.4 was the first to take images that are not JPEGs
            "minari_version": "0.5.4" if frames else "0.5.0", "jpeg_encoding": False,
            "observation_space": _box(shape, low, high, "uint8" if frames else "float32"),
            "action_space": _box((spec.action_dim,), *(bounds or (-1.0, 1.0)), "float32"),
            "cvlctl": {"task": store.task, "horizon": spec.horizon, "rewards": rewarded,
                       "exported": export_digest("minari", store, label), **({"units": more} if more else {})},
        }  # fmt: skip
        if told := store.attributes.get("environment"):
            metadata["cvlctl"]["environment"] = told
        (temporary / "data" / METADATA).write_text(json.dumps(metadata | _environment(store.task)))


def _write_episode(group: h5py.Group, episode: Episode, number: int, bounds: Bounds | None) -> None:
    steps = len(episode)
    last = np.arange(steps) == steps - 1
    group.attrs.update({"id": number, "seed": episode.seed, "total_steps": steps, "task": fixed_text(episode.task)})
    group.attrs["collected_at"] = episode.collected_at
    arrays = {
        "observations": episode.images["pixels"] if episode.images else episode.observations,
        "actions": physical(episode.actions, bounds),
        "rewards": np.zeros(steps, np.float32) if episode.rewards is None else episode.rewards,
        "terminations": last & episode.terminated, "truncations": last & (not episode.terminated),
    }  # fmt: skip
    group.create_group("infos")
    if episode.successes is not None:
        arrays["infos/success"] = np.concatenate([[False], episode.successes])
    for name, values in arrays.items():
        group.create_dataset(name, data=values, chunks=True, maxshape=(None, *values.shape[1:]))


def _dataset_id(path: Path) -> str:
    """The name under which Minari opens the folder: its path below Minari's own folder, else its last part."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets").absolute()
    absolute = path.absolute()
    name = absolute.relative_to(root).as_posix() if root in absolute.parents else path.name
    if not ID.fullmatch(name):
        raise CvlctlError(f"{name!r} is no name that Minari could open", "call the folder such as door-open/replay-v0")
    return name


def _box(shape: Sequence[int], low: Any, high: Any, dtype: str) -> str:
    bounds = {"low": np.full(shape, low).tolist(), "high": np.full(shape, high).tolist()}
    return json.dumps({"type": "Box", "dtype": dtype, "shape": list(shape), **bounds})


def _environment(task: str) -> dict[str, str]:
    """Gymnasium's description of the task, so that Minari's `recover_environment` works, where gymnasium has it."""
    if not task.startswith("gym/"):
        return {}
    with contextlib.suppress(Exception):  # unknown to gymnasium, in as many ways as it has errors
        import gymnasium

        return {"env_spec": gymnasium.spec(task.removeprefix("gym/")).to_json()}
    return {}
