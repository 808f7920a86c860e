"""The trajectory store: Zarr v3 on one time axis. `docs/store.md` is the format's contract; `writer.py` writes it.

Only these two files import zarr. Pretraining opens `data/` and `meta/` alone; labels live apart, in `labels/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from cvlctl.data.attributes import parsed, read_attributes
from cvlctl.data.chunks import Chunk, Foreign, Sliced, chunks, damaged, listed, open_array, read_array, read_chunk
from cvlctl.data.layout import IMAGES, LABEL_ARRAYS, META, PIXELS, SIM, Rows, problem, spec_of, split
from cvlctl.errors import CvlctlError
from cvlctl.progress import Progress
from cvlctl.types import Episode


class Store:
    """A finished store. Arrays are read once, whole, and kept: treat them as read-only.

    Only `labels`, `has_label`, `rewards`, `successes`, `label_digest`, `futures` and `episodes` look into `labels/`;
    only `has_sim_state`, `sim_state` and `episodes` into `sim/`.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self._cache: dict[str, np.ndarray] = {}
        self._checked: set[str] = set()  # arrays that were held to their sha256
        about = parsed(path, attributes)
        self._said, counts = about.spec, about.counts
        self.spec = spec_of(self._said)
        self.task, self.task_names, self.provenance = about.task, about.tasks, about.provenance
        self.num_episodes, self.num_transitions, self.num_rows = counts.episodes, counts.transitions, counts.rows
        self._checksums, self._crcs = about.checksums, about.chunk_crc32c

    def __len__(self) -> int:
        """Number of transitions."""
        return self.num_transitions

    def __repr__(self) -> str:
        shape = (self.num_rows, *self.spec.observation_shape)
        seen = f"observations={shape}" + (f", cameras={self.spec.cameras}" if self.spec.cameras else "")
        return f"Store({str(self.path)!r}, task={self.task!r}, episodes={self.num_episodes}, {seen})"

    def observations(self) -> np.ndarray:
        """(rows, *observation_shape) float32, without columns where frames are all there is; an episode's last row is
        its final observation."""
        return self.array("data/observation")

    def images(self, camera: str) -> np.ndarray:
        """(rows, H, W, C) uint8: the frames of one camera, laid out as `observations`.

        Raises:
            CvlctlError: no such camera, damage, or not enough memory: `Column` reads them piece by piece.
        """
        return self.array(self.camera_array(camera))

    def camera_array(self, camera: str) -> str:
        """Name of a camera's array, as `Column` takes it; raises a CvlctlError that lists the cameras there are."""
        if camera not in self.spec.cameras:
            hint = f"the store has {', '.join(self.spec.cameras)}" if self.spec.cameras else "the store has no images"
            raise CvlctlError(f"{self.path}: no camera {camera!r}", hint)
        return f"{IMAGES}{camera}"

    @property
    def has_sim_state(self) -> bool:
        """Whether the store has states of the simulator."""
        return SIM in self._checksums and (self.path / "sim").is_dir()

    def sim_state(self) -> np.ndarray:
        """(rows, n) float64: what brings the simulator back to each observation."""
        if not self.has_sim_state:
            raise CvlctlError(f"{self.path} has no states of the simulator", "collect with cameras or sim_state")
        return self.array(SIM)

    def actions(self) -> np.ndarray:
        """(rows, A) float32 in [-1, 1]; zero in the row of a final observation."""
        return self.array("data/action")

    def episode_ends(self) -> np.ndarray:
        """(episodes,) int64: cumulative row counts; an episode of T transitions has T+1 rows."""
        return self.array("meta/episode_ends")

    def lengths(self) -> np.ndarray:
        """(episodes,) int64: transitions of each episode."""
        return np.diff(self.episode_ends(), prepend=0) - 1

    def terminated(self) -> np.ndarray:
        """(episodes,) bool: the environment ended the episode (False: it was cut off)."""
        return self.array("meta/terminated")

    def collected_at(self) -> np.ndarray:
        """(episodes,) int64: the collector's environment step at which the episode began."""
        return self.array("meta/collected_at")

    def seeds(self) -> np.ndarray:
        """(episodes,) int64: the collector's seed."""
        return self.array("meta/seed")

    def episode_tasks(self) -> list[str]:
        """Task name of each episode."""
        return [self.task_names[i] for i in self.array("meta/task")]

    @property
    def labels(self) -> list[str]:
        """Names of the reward labels that lie in the store."""
        folder = self.path / "labels"
        return sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []

    def has_label(self, name: str, array: str = "reward") -> bool:
        """Whether label `name` has the array: "reward" or "success"."""
        return (self.path / "labels" / name / array / "zarr.json").is_file()

    def require_label(self, name: str, array: str = "reward") -> None:
        """Raise a CvlctlError that lists what there is, unless label `name` has the array."""
        if not self.has_label(name, array):
            raise self._no_label(name, f"a {array} array")

    def label_arrays(self, label: str) -> list[str]:
        """Names of the arrays that a label has."""
        return [f"labels/{label}/{array}" for array in LABEL_ARRAYS if self.has_label(label, array)]

    def rewards(self, label: str = "given") -> np.ndarray:
        """(rows,) float32: row t of an episode holds the reward of its transition t; 0 in the final row."""
        return self._label(label, "reward")

    def successes(self, label: str = "given") -> np.ndarray:
        """(rows,) bool, laid out as `rewards`."""
        return self._label(label, "success")

    def episodes(self, label: str = "given", *, frames: bool = True) -> Iterator[Episode]:
        """The episodes in order; rewards and successes are None where the label lacks them. Frames are read chunk by
        chunk as the episodes come; without `frames` neither they nor states of a simulator are."""
        if label != "given" and label not in self.labels:
            raise self._no_label(label, "arrays")
        names = ["data/observation", "data/action", *self.label_arrays(label)]
        rows: dict[str, Rows] = {name: partial(_slice, self.array(name)) for name in names}
        wide = [*map(self.camera_array, self.spec.cameras), *([SIM] if self.has_sim_state else [])]
        rows |= {name: Column(self, name).rows for name in wide if frames}
        table = zip(*(self.array(name).tolist() for name in META), strict=True)
        yield from split(rows, table, self.task_names, [f"labels/{label}/{array}" for array in LABEL_ARRAYS])

    def futures(
        self, num: int, gamma: float, seed: int, label: str = "given", *, next_states: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw `num` future states from the sampler's marginal: a uniform transition, then its discounted future.

        `next_states` draws next observations instead, which critics of a td_ loss stand on: the reward on
        arriving at a terminal one counts 1 - gamma, the share of the mass there that has just arrived.

        Returns:
            observations (num, *observation_shape), and rewards (num,) float32 received on arriving there. Beyond a
            terminal state stands the absorbing state: the final observation, with reward 0.

        Raises:
            CvlctlError: gamma outside [0, 1), num < 1, a negative seed, or a label without rewards.
        """
        import torch

        from cvlctl.data import samplers

        if num < 1 or not 0.0 <= gamma < 1.0 or seed < 0:
            what = f"cannot draw futures with num {num}, gamma {gamma}, seed {seed}"
            raise CvlctlError(what, "give num >= 1, gamma in [0, 1), seed >= 0")
        rewards = self.rewards(label)
        where = samplers.layout(self.episode_ends(), self.terminated())
        generator = samplers.generator(seed, "futures", 0)
        transition = torch.randint(len(where.row), (num,), generator=generator)
        u = torch.rand(num, dtype=torch.float64, generator=generator)
        drawn = samplers.future(where, transition, u, 0.0 if next_states else gamma)
        received = np.where(drawn.absorbed.numpy(), np.float32(0), rewards[drawn.reward_row.numpy()])
        if next_states:
            ends = where.terminated[transition] & (drawn.row == where.last[transition])
            received = np.where(ends.numpy(), np.float32(1 - gamma) * received, received)
        return self.observations()[drawn.row.numpy()], received

    def digest(self) -> str:
        """sha256 over the checksums of the reward-free arrays (`data/`, `meta/`): equal content, equal digest."""
        names = [name for name in self._checksums if name.startswith(("data/", "meta/"))]
        return self._digest(names, {"tasks": self.task_names})

    def label_digest(self, label: str = "given") -> str:
        """sha256 of one label's arrays."""
        names = [name for name in self._checksums if name.startswith(f"labels/{label}/")]
        if not names or label not in self.labels:
            raise self._no_label(label, "arrays")
        return self._digest(names, {})

    def sim_digest(self) -> str | None:
        """sha256 of the simulator's states; None where there are none."""
        return self._checksums[SIM] if self.has_sim_state else None

    def _digest(self, names: list[str], extra: dict[str, Any]) -> str:
        spec: list[Any] = [self._said.observation_shape, self._said.action_dim, self._said.pixels]
        spec += [self._said.cameras] if self._said.cameras else []
        content: dict[str, Any] = {name: self._checksums[name] for name in names}
        return json_digest({**content, "spec": spec, "rows": self.num_rows, **extra})

    def _label(self, label: str, array: str) -> np.ndarray:
        self.require_label(label, array)
        return self.array(f"labels/{label}/{array}")

    def _no_label(self, label: str, wanted: str) -> CvlctlError:
        found = [f"{name}/{array}" for name in self.labels for array in LABEL_ARRAYS if self.has_label(name, array)]
        hint = f"the store has {', '.join(found)}" if found else "the store holds no labels at all"
        return CvlctlError(f"{self.path}: no label {label!r} with {wanted}", hint)

    @property
    def arrays(self) -> list[str]:
        """Names of the reward-free arrays, as they lie on disk."""
        seen = ["data/observation", *map(self.camera_array, self.spec.cameras)]
        return [*dict.fromkeys(filter(None, map(self._on_disk, seen))), "data/action", *META]

    def _on_disk(self, name: str) -> str:
        """The name that an array has on disk; "" where it has no columns, and is not written."""
        if name == "data/observation" and self.spec.observation_shape == (0,):
            return ""
        return "data/observation" if self._said.pixels and name == PIXELS else name

    def array(self, name: str) -> np.ndarray:
        """One array, whole, by a name that `Column` takes."""
        if not (stored := self._on_disk(name)):
            return np.zeros((self.num_rows, 0), np.float32)
        if name != stored:
            return self._whole(stored).reshape(-1, *self.spec.cameras["pixels"])
        return self._whole(name)

    def _whole(self, name: str) -> np.ndarray:
        if name not in self._cache:
            array = self._open(name)
            try:
                values = read_array(self.path, name, array, self._listed(name))
            except Foreign as error:
                self._check_values(name, name, error.rows)
                raise
            self._check_values(name, name, values)
            if name not in self._checked and not listed(array, self._listed(name)):
                self._compare(name, hashlib.sha256(_bytes_of(values)).hexdigest())
            self._cache[name] = values
        return self._cache[name]

    def _rows_of(self, name: str, array: zarr.Array, chunk: Chunk) -> np.ndarray:
        try:
            values = read_chunk(array, chunk)
        except Foreign as error:
            self._check_values(name, chunk.name, error.rows)
            raise
        self._check_values(name, chunk.name, values)
        return values

    def _check_values(self, name: str, where: str, values: np.ndarray) -> None:
        """Values of an array, or of a chunk of it. Of a foreign chunk, what is wrong with its values tells more."""
        judged = values.dtype.kind == "f" or len(values) == self.num_episodes  # a table is, as a whole
        if judged and (found := self._problem(name, values)):
            raise damaged(self.path, f"{where}: {found}", self.path / name)

    def _listed(self, name: str) -> Sequence[str]:
        """What the store lists of an array's chunks: the crc32c of each."""
        return self._crcs.get(name, ())

    def _compare(self, name: str, checksum: str) -> None:
        if self._checksums.get(name) != checksum:
            raise damaged(self.path, f"{name}: {self.mismatch(name)}", self.path / name)
        self._checked.add(name)

    def mismatch(self, name: str) -> str:
        """Why the content of an array is not the store's."""
        if name not in self._checksums:
            return "the store records no checksum of it: it is none of its own arrays"
        return "the content is not what the recorded checksum says (each chunk reads well by itself)"

    def check(self, names: Iterable[str]) -> None:
        """Hold whole arrays (of `arrays`, of labels) to their sha256, reading them chunk by chunk; none is read twice.

        Raises:
            CvlctlError: an array, or a chunk of it, is not the one that was written.
        """
        for name in names:
            if name in self._checked:
                continue
            array, total = self._open(name), hashlib.sha256()
            with Progress(f"checking {self.path} {name}", self.num_rows, "rows") as progress:
                for chunk in chunks(self.path, name, array, self._listed(name)):
                    total.update(_bytes_of(self._rows_of(name, array, chunk)))
                    progress.update(chunk.rows.stop)
            self._compare(name, total.hexdigest())

    def _problem(self, name: str, values: np.ndarray) -> str:
        return problem(name, values, self.num_rows, len(self.task_names))

    def _open(self, name: str) -> zarr.Array:
        """An array on disk, of the type and shape that the attributes say."""
        array = open_array(self.path, name)
        dtype: type[np.generic] = np.bool_ if name.endswith("/success") else np.float32
        shape: tuple[int, ...] = (self.num_rows,)
        if name in META:
            dtype, shape = META[name], (self.num_episodes,)
        elif name == "data/observation":
            dtype, shape = np.uint8 if self._said.pixels else dtype, (*shape, *self._said.observation_shape)
        elif name == "data/action":
            shape = (*shape, self.spec.action_dim)
        elif name.startswith(IMAGES):
            dtype, shape = np.uint8, (*shape, *self.spec.cameras[name.removeprefix(IMAGES)])
        elif name == SIM:
            dtype, shape = np.float64, (*shape, *array.shape[1:2])
        if array.dtype != dtype or array.shape != shape:
            found = f"{array.dtype} {array.shape if array.ndim <= 8 else f'of {array.ndim} axes'}"
            what = f"{name}: is {found}, expected {np.dtype(dtype)} {shape if len(shape) <= 8 else '...'}"
            raise damaged(self.path, what, self.path / name)
        return array


def open_store(path: str | Path) -> Store:
    """Open a finished store. Arrays are read on first use.

    Raises:
        CvlctlError: nothing there, not a store, still being written, written by a newer version, or arrays missing or
            not as the attributes say.
    """
    store = Store(Path(path), read_attributes(Path(path)))
    for name in store.arrays:
        store._open(name)
    return store


class Column:
    """One array of a store, read chunk by chunk; the last chunk is kept, so that each is read once in ascending order.

    Args:
        name: such as "data/observation", which may have no columns, or "data/images/CAMERA".

    Raises:
        CvlctlError: the array is missing or of another type, a chunk is damaged, or its values are not legal.
    """

    def __init__(self, store: Store, name: str) -> None:
        self._sliced: Sliced | None = None
        self._shape: tuple[int, ...] = (0,)
        if not (stored := store._on_disk(name)):
            return
        array = store._open(stored)
        if not listed(array, store._listed(stored)):  # its chunks cannot be told apart from others as they come
            store.check([stored])
        found = list(chunks(store.path, stored, array, store._listed(stored)))
        self._sliced = Sliced(found, partial(store._rows_of, stored, array))
        self._shape = array.shape[1:] if name == stored else store.spec.cameras["pixels"]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """(stop - start, ...) rows."""
        if self._sliced is None:
            return np.zeros((stop - start, 0), np.float32)
        return self._sliced.rows(start, stop).reshape(-1, *self._shape)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows), ...) single rows; `rows` ascend. Those that follow one another are read together."""
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return np.concatenate([self.rows(int(run[0]), int(run[-1]) + 1) for run in runs])


def _slice(array: np.ndarray, start: int, stop: int) -> np.ndarray:
    return array[start:stop]


def _bytes_of(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def json_digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
