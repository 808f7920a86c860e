"""Bytes of files changed at random: every reader yields episodes or raises a CvlctlError, soon and in little memory.

The cases run in a process of their own with an address space of 4 GiB and a deadline for each case: what HDF5's library
does to damaged files cannot be caught from inside. One case again: python tests/data/test_formats_fuzz.py d4rl SEED 1
"""

from __future__ import annotations

import faulthandler
import json
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

SECONDS_A_CASE = 20
ADDRESS_SPACE = 4 * 2**30
PEAK_MB = 250  # of the whole process; it starts with 60
FORMATS = (
    "npz", "ogbench", "d4rl", "minari", "robomimic", "sb3", "arrays", "rlds", "zarr", "lerobot", "table", "hdf5",
    "imitation",
)  # fmt: skip


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Cut short, some of it removed or put in, or single bytes changed."""
    data, kind = bytearray(content), rng.random()
    at = rng.randrange(len(data))
    if kind < 0.15:
        return bytes(data[:at])
    if kind < 0.25:
        del data[at : at + rng.randrange(200)]
    elif kind < 0.35:
        data[at:at] = rng.randbytes(rng.randrange(1, 50))
    else:
        for _ in range(rng.choice((1, 1, 2, 4, 16))):
            at = rng.randrange(len(data))
            data[at] = rng.choice((0, 127, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))))
    return bytes(data)


def write_sound(format: str, folder: Path) -> tuple[Path, Path]:
    """A sound file of the format: what is read, and the file whose bytes are changed."""
    import numpy as np
    from toy_datasets import lerobot_folder, rlds_folder, zarr_folder
    from toy_files import WRITTEN, episodes, hdf5, npz, robomimic_file, rows, sb3_arrays

    from cvlctl.data import formats
    from cvlctl.data.writer import write_store

    if format == "robomimic":
        path = robomimic_file(folder / "a.hdf5", 4)
    elif format == "rlds":
        path = rlds_folder(folder / "a")
        return path, path / "toy_set-train.tfrecord-00000-of-00002"
    elif format == "zarr":
        path = zarr_folder(folder / "a.zarr")
        return path, path / "data" / "state" / "0.0"
    elif format == "lerobot":
        path = lerobot_folder(folder / "a", "v3.0")
        return path, path / "data" / "chunk-000" / "file-000.parquet"
    elif format == "table":
        path = folder / "a.csv"
        path.write_text("observations,actions,episode_index\n" + "1.5,-0.25,0\n" * 20 + "-2,0.5,1\n" * 20)
    elif format == "hdf5":
        of_one = {"observations/qpos": np.arange(8.0).reshape(4, 2), "action": np.linspace(-1, 1, 4)[:, None]}
        path = hdf5(folder / "a.hdf5", {f"demo_{i}/{name}": array for i in range(3) for name, array in of_one.items()})
    elif format == "imitation":
        path = npz(folder / "a.npz", {
            "obs": np.arange(12.0).reshape(12, 1), "acts": np.linspace(-1, 1, 9)[:, None], "rews": np.arange(9.0),
            "terminal": np.array([True, False, True]), "indices": np.array([2, 5]),
        })  # fmt: skip
    elif format == "arrays":
        path = hdf5(folder / "a.hdf5", rows())
    elif format == "sb3":
        path = folder / "a.npz"
        np.savez_compressed(path, **sb3_arrays())
    else:
        store = write_store(folder / "a.zarr", episodes(), task="toy")
        path = formats.export_store(format, store, folder / WRITTEN[format])
    return path, path / "data" / "main_data.hdf5" if path.is_dir() else path


def run(format: str, first: int, count: int) -> dict[str, int]:
    """How many cases were read, and how many refused."""
    from cvlctl.data import formats
    from cvlctl.errors import CvlctlError

    outcomes = {"read": 0, "refused": 0}
    with tempfile.TemporaryDirectory() as folder:
        path, file = write_sound(format, Path(folder))
        sound = file.read_bytes()
        for seed in range(first, first + count):
            file.unlink()  # HDF5 must not take it for one that it knows
            file.write_bytes(mutated(sound, random.Random(seed)))
            print(format, "seed", seed, file=sys.stderr)  # the last line tells which case it was that hung or crashed
            faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
            try:
                formats.FORMATS[format].facts(path)
                for _ in formats.FORMATS[format].read(path):
                    pass
                outcomes["read"] += 1
            except CvlctlError as error:
                outcomes["refused"] += 1
                assert str(path.parent) in error.what, f"seed {seed}: no file named: {error.what}"
            except BaseException:
                traceback.print_exc()
                sys.exit(1)
            faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir()
    return outcomes


def peak_mb() -> int:
    """The most memory that this process has held; getrusage would count what its parent held when it forked."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


def check(format: str, first: int, count: int) -> None:
    command = [sys.executable, __file__, format, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, f"exit {done.returncode} of {' '.join(command)}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert found["read"] + found["refused"] == count
    assert found["refused"] >= count // 4, "the bytes changed hardly matter: the cases are no test"
    assert found["peak_mb"] < PEAK_MB


@pytest.mark.parametrize("format", FORMATS)
def test_a_few_damaged_files(format: str) -> None:
    if format == "lerobot":
        pytest.importorskip("pyarrow", reason="pip install 'cvlctl[lerobot]'")
    check(format, 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_thousands_of_damaged_files(format: str, request: pytest.FixtureRequest) -> None:
    if "slow" not in str(request.config.getoption("markexpr")):
        pytest.skip("minutes: pytest -m slow")
    check(format, 1000, 2000)


if __name__ == "__main__":
    name, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    found = run(name, first, count)
    found["peak_mb"] = peak_mb()
    print(json.dumps(found))
