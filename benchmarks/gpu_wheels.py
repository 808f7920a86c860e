"""Wheels for a GPU machine that has PyTorch and little else, and no network: what it lacks, fetched here, used there.

    python benchmarks/gpu.py --wheels DIR       here: which are in DIR, and with pip at hand those that are not
    python benchmarks/gpu.py --unpacked DIR     there: wheels in DIR are unpacked (they are zip files) and used

For Python 3.12 on x86-64 Linux, in the versions of constraints.txt: about 54 MiB. What such a machine has anyway is
HERE_ALREADY. No package manager is needed there, and nothing is installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHON, PLATFORMS = "3.12", ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "any")
WHEELS = (
    "metaworld", "numcodecs", "mujoco", "pydantic-core", "pydantic", "gymnasium", "zarr", "glfw", "google-crc32c",
    "donfig", "typing-inspection", "annotated-types", "Farama-Notifications",
)  # fmt: skip
HERE_ALREADY = (
    "torch", "numpy", "scipy", "h5py", "safetensors", "imageio", "cloudpickle", "typer", "rich", "pyyaml", "pytest",
)  # fmt: skip


def pinned(constraints: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Version of every wheel."""
    lines = [line.split("==") for line in constraints.read_text().splitlines() if "==" in line and line[0] != "#"]
    versions = {_plain(name): version.strip() for name, version in lines}
    return {name: versions[_plain(name)] for name in WHEELS}


def _plain(name: str) -> str:
    """As all spellings of a package's name become one, and as a wheel's file begins."""
    return re.sub(r"[-_.]+", "_", name).lower()


def wheel_of(folder: Path, name: str, version: str) -> Path | None:
    """The wheel of this version for that Python in `folder`."""
    for file in sorted(folder.glob("*.whl")):
        its_name, its_version, *_, python, abi, _ = file.stem.split("-")
        fits = "py3" in python.split(".") or abi == "abi3" or python == "cp" + PYTHON.replace(".", "")
        if fits and (_plain(its_name), its_version) == (_plain(name), version):
            return file
    return None


def fill(folder: Path, say: Callable[[str], None] = print) -> list[str]:
    """Tell of every wheel whether `folder` has it, and have pip fetch those that it has not. Returns what is lacking
    in the end, as name==version."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pinned()
    missing = [f"{name}=={version}" for name, version in wanted.items() if wheel_of(folder, name, version) is None]
    if missing and _have_pip():
        told = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
        command = [sys.executable, "-P", "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:",
                   "--python-version", PYTHON, *told, "-d", str(folder), *missing]  # fmt: skip
        subprocess.run(command)  # it says itself what it lacks
    lacking = []
    for name, version in wanted.items():
        file = wheel_of(folder, name, version)
        say(f"{file.stat().st_size / 2**20:7.2f} MiB  {file.name}" if file else f"missing      {name}=={version}")
        lacking += [] if file else [f"{name}=={version}"]
    total = sum(file.stat().st_size for file in folder.glob("*.whl")) / 2**20
    say(f"{total:7.2f} MiB  in {folder}" + (f"; {len(lacking)} of {len(wanted)} missing" if lacking else ""))
    return lacking


def _have_pip() -> bool:
    command = [sys.executable, "-P", "-m", "pip", "--version"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def unpack(folder: Path) -> Path:
    """Unpack the wheels in `folder` into `folder`/unpacked, where they are not yet; a folder without wheels is taken to
    be unpacked itself. Returns what belongs on PYTHONPATH."""
    files = sorted(folder.glob("*.whl"))
    if not files:
        return folder
    into = folder / "unpacked"
    for file in files:
        if not (into / f"{'-'.join(file.name.split('-')[:2])}.dist-info").is_dir():
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(into)
    return into
