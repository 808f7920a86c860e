"""Import of a D4RL file beside raw reading and writing; load of a store beside Minari.

    python benchmarks/importing.py [--transitions 1000000] [--frames 500000] [--rounds 5] [--json importing.json]

Import: `cvlctl.data.formats.import_store` (episodes cut and checked, digests of the file and of every array,
durable on the disk) against h5py reading the same arrays whole and zarr writing what a store holds, with the store's
codecs. The file is synthetic, of Hopper's size, compressed by gzip as D4RL's are.

Load: all arrays of a store of Metaworld frames (random actions; or --store, one of yours) into memory, against Minari
(the extra `bench`) iterating over the same episodes, in a dataset that Minari itself wrote. `size` is that on the disk.
Beside it its bounds: zstd alone, into memory that is held; and asking the kernel for that much new memory, nothing else
(Minari, which holds one episode at a time, needs none; column `kernel` tells what it cost).
Files are read from the page cache by all. Rounds alternate, Minari before each of the others; a ratio is the median.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import h5py
import numpy as np
import zarr
from common import Contestant
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, ZstdCodec

from cvlctl.data import formats
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import CHUNK_ROWS, write_store
from cvlctl.play import envs
from cvlctl.play.policies import RandomPolicy
from cvlctl.play.rollout import collect_episode

TASK = "metaworld/drawer-close-v3"
RAW, IMPORT = "h5py reads, zarr writes", "cvlctl imports"
MINARI, LOAD = "Minari iterates", "cvlctl loads"
OBSERVATIONS, DECODE, MEMORY = "cvlctl loads observations", "bound: zstd alone", "bound: new memory alone"


def write_d4rl(path: Path, transitions: int) -> None:
    """A file of the size and compression of D4RL's Hopper: episodes of 50 to 500 steps, smooth observations."""
    rng = np.random.default_rng(0)
    states = np.cumsum(rng.normal(scale=0.01, size=(transitions + 1, 11)), axis=0, dtype=np.float64).astype(np.float32)
    ends = np.cumsum(rng.integers(50, 500, transitions // 50 + 1)) - 1
    terminals = np.zeros(transitions, bool)
    terminals[ends[ends < transitions]] = True
    arrays = {
        "observations": states[:-1], "next_observations": states[1:],
        "actions": rng.uniform(-1, 1, (transitions, 3)).astype(np.float32),
        "rewards": rng.normal(size=transitions).astype(np.float32), "terminals": terminals,
        "timeouts": np.zeros(transitions, bool),
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            file.create_dataset(name, data=values, compression="gzip")


def raw_copy(path: Path, out: Path) -> None:
    """Read every array whole, write what a store holds of it."""
    with h5py.File(path) as file:
        arrays = {name: dataset[()] for name, dataset in file.items()}
    for name in ("observations", "actions", "rewards"):
        values = arrays[name]
        zarr.create_array(
            out, name=name, data=values, chunks=(min(CHUNK_ROWS, len(values)), *values.shape[1:]),
            compressors=[ZstdCodec(level=-1), Crc32cCodec()], overwrite=True,
        )  # fmt: skip


def compare(works: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Median seconds of each, and the median over rounds of the time that it took for each second of the base.

    `cpu_seconds` and their ratio tell what the work costs where other work slows all of it down; `kernel_seconds` are
    what of them the kernel took.
    """
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in works}

    def contestant(name: str) -> Contestant:
        def run(count: int) -> None:
            for _ in range(count):
                before = resource.getrusage(resource.RUSAGE_SELF)
                works[name]()
                now = resource.getrusage(resource.RUSAGE_SELF)
                spent[name].append((now.ru_utime - before.ru_utime, now.ru_stime - before.ru_stime))

        return run

    rates = common.measure({name: contestant(name) for name in works}, rounds, 1, first=1)
    times = {name: np.array(values[1:]) for name, values in spent.items()}
    cpu = {name: float(np.median(pair.sum(axis=1))) for name, pair in times.items()}
    kernel = {name: float(np.median(pair[:, 1])) for name, pair in times.items()}
    ratios = {name: np.array(rates[base]) / np.array(rate) for name, rate in rates.items()}
    return {
        name: {
            "seconds": round(float(np.median(1 / np.array(rate))), 4),
            "ratio": round(float(np.median(ratios[name])), 4),
            "cpu_seconds": round(cpu[name], 4), "cpu_ratio": round(cpu[name] / cpu[base], 4),
            "kernel_seconds": round(kernel[name], 4),
            "ratio_min": round(float(ratios[name].min()), 4), "ratio_max": round(float(ratios[name].max()), 4),
            "rounds": [round(1 / one, 5) for one in rate],
        } for name, rate in rates.items()
    }  # fmt: skip


def memory(source: Path, out: Path) -> int:
    """MB by which an import lets a fresh process grow, at its largest."""
    program = """
import sys, zarr, h5py
from cvlctl.data import formats
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
formats.import_store("d4rl", sys.argv[1], sys.argv[2], task="toy", force=True)
print((peak() - before) // 1024)
"""
    command = [sys.executable, "-P", "-c", program, str(source), str(out)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def importing(folder: Path, transitions: int, rounds: int) -> dict[str, Any]:
    """Seconds of an import, and what memory an import took beyond what was held before."""
    source, out = folder / "hopper.hdf5", folder / "hopper.zarr"
    write_d4rl(source, transitions)
    take = partial(formats.import_store, "d4rl", source, out, task="gym/Hopper-v5", force=True)
    assert len(take()) == transitions
    found = compare({RAW: lambda: raw_copy(source, folder / "raw.zarr"), IMPORT: take}, RAW, rounds)
    return {"times": found, "memory_mb": memory(source, out), "file_mb": round(source.stat().st_size / 1e6, 1)}


def collect(path: Path, frames: int) -> Store:
    """A store of random actions on Metaworld."""
    env = envs.make(TASK, 0)
    count = -(-frames // env.spec.horizon)
    actors = (RandomPolicy(env.spec, env.seed, number) for number in range(count))
    episodes = (collect_episode(env, act, number) for number, act in enumerate(actors))
    try:
        return write_store(path, episodes, task=TASK, horizon=env.spec.horizon)
    finally:
        env.close()


def load(path: Path) -> int:
    """All arrays of a store in memory; returns the number of transitions."""
    store = open_store(path)
    store.observations(), store.actions(), store.episode_ends(), store.terminated()
    if store.has_label("given"):
        store.rewards()
    return len(store)


def write_minari(store: Store, folder: Path) -> Path:
    """The same episodes, by Minari's own writer."""
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    buffers = [
        EpisodeBuffer(
            id=None, observations=e.observations, actions=e.actions, infos={},
            rewards=list(np.zeros(len(e)) if e.rewards is None else e.rewards),
            terminations=[False] * (len(e) - 1) + [e.terminated],
            truncations=[False] * (len(e) - 1) + [not e.terminated],
        ) for e in store.episodes()
    ]  # fmt: skip
    spaces = {"observation_space": Box(-np.inf, np.inf, store.spec.observation_shape, np.float32),
              "action_space": Box(-1, 1, (store.spec.action_dim,), np.float32)}  # fmt: skip
    minari.create_dataset_from_buffers("bench/frames-v0", buffers, **spaces)
    return folder / "minari" / "bench" / "frames-v0"


def iterate_minari() -> int:
    """Every episode of the dataset, as Minari gives it; returns the number of transitions."""
    import minari

    return sum(len(episode.actions) for episode in minari.load_dataset("bench/frames-v0").iterate_episodes())


def megabytes(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


def bounds(store: Store) -> dict[str, Callable[[], Any]]:
    """What a load cannot do without: decoding into memory that is held; and the memory alone."""
    names = ["data/observation", "data/action"] + ["labels/given/reward"] * store.has_label("given")
    arrays = [zarr.open_array(store.path / name, mode="r") for name in names]
    files = [sorted((store.path / name / "c").rglob("*")) for name in names]
    parts = [
        (np.frombuffer(file.read_bytes()[:-4], np.uint8), np.empty(array.chunks, array.dtype))
        for array, found in zip(arrays, files, strict=True) for file in found if file.is_file()
    ]  # fmt: skip

    def decode() -> None:
        for packed, into in parts:
            Zstd().decode(packed, into)

    def memory() -> None:
        for array in arrays:
            np.empty(array.shape, array.dtype).fill(0)

    return {DECODE: decode, MEMORY: memory}


def loading(folder: Path, frames: int, store_path: Path | None, rounds: int) -> dict[str, Any]:
    """Seconds of a load, and sizes; only ours where Minari is not installed."""
    store = open_store(store_path) if store_path else collect(folder / "frames.zarr", frames)
    ours: dict[str, Callable[[], Any]] = {LOAD: partial(load, store.path)}
    ours |= {OBSERVATIONS: lambda: open_store(store.path).observations(), **bounds(store)}
    sizes = {LOAD: megabytes(store.path)}
    if find_spec("minari"):
        sizes[MINARI] = megabytes(write_minari(store, folder))
        assert iterate_minari() == load(store.path)
        pairs = [compare({MINARI: iterate_minari, name: work}, MINARI, rounds) for name, work in ours.items()]
    else:
        pairs = [compare(ours, LOAD, rounds)]
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        found |= {name: row for name, row in pair.items() if name not in found}  # Minari's: those beside our load
    for name, size in sizes.items():
        found[name] |= {"size_mb": round(size, 1), "size_ratio": round(size / sizes.get(MINARI, size), 3)}
    return {"times": found, "transitions": len(store), "task": store.task}


def show_import(imported: dict[str, Any], transitions: int) -> None:
    show_times(f"import of {transitions:,} transitions", imported["times"])
    print(f"memory by which an import grows: {imported['memory_mb']} MB; the file: {imported['file_mb']} MB")


def show_load(loaded: dict[str, Any]) -> None:
    show_times(f"load of {loaded['transitions']:,} transitions", loaded["times"])
    for name, row in loaded["times"].items():
        if "size_mb" in row:
            print(f"{name + ', size':40}{row['size_mb']:6.1f} MB{row['size_ratio']:8.3f}x")


def show_times(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"{title:40}{'seconds':>9}{'ratio':>9}{'range':>17}{'CPU':>9}{'ratio':>9}{'kernel':>9}")
    for name, row in rows.items():
        spread = f"[{row['ratio_min']:.3f}, {row['ratio_max']:.3f}]"
        print(f"{name:40}{row['seconds']:9.3f}{row['ratio']:8.3f}x{spread:>17}{row['cpu_seconds']:9.3f}"
              f"{row['cpu_ratio']:8.3f}x{row['kernel_seconds']:9.3f}")  # fmt: skip


def comparisons(imported: dict[str, Any], loaded: dict[str, Any], transitions: int) -> list[dict[str, Any]]:
    """Ours beside the raw copy, and beside Minari where it is installed."""
    times = imported["times"]
    work = f"import of {transitions:,} transitions of D4RL's HDF5"
    alone: dict[str, Any] = {"unit": "seconds", "threads": 1}
    rows = [common.versus(work, RAW, times[IMPORT]["rounds"], times[RAW]["rounds"], **alone, least=0.5)]
    times = loaded["times"]
    if MINARI in times:
        work = f"load of {loaded['transitions']:,} frames"
        rows.append(common.versus(work, MINARI, times[LOAD]["rounds"], times[MINARI]["rounds"], **alone, least=10))
    return rows


def benchmark(transitions: int, frames: int, store: Path | None, rounds: int) -> dict[str, Any]:
    """An import and a load, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        imported = importing(Path(folder), transitions, rounds)
        show_import(imported, transitions)
        loaded = loading(Path(folder), frames, store, rounds)
        show_load(loaded)
    return {
        "comparisons": comparisons(imported, loaded, transitions),
        "import": imported, "load": loaded, "transitions": transitions, "rounds": rounds,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    options = common.parser(__doc__, threads=None, rounds=5)
    options.add_argument("--transitions", type=int, default=1_000_000, help="of the D4RL file")
    options.add_argument("--frames", type=int, default=500_000, help="of the store that is loaded")
    options.add_argument("--store", type=Path, help="load this store instead of collecting one")
    common.main(options, lambda a: benchmark(a.transitions, a.frames, a.store, a.rounds), arguments)


if __name__ == "__main__":
    main()
