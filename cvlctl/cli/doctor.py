"""`cvlctl doctor`: what this installation and machine offer, for a bug report or before a long job."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvlctl.errors import CvlctlError
from cvlctl.machine import cpu_name, free_memory, num_cpus
from cvlctl.version import __version__

LONG = 10**9  # updates: enough for compiling to pay


def doctor() -> dict[str, Any]:
    """cvlctl, python, platform, packages and extras, devices, compiler, settings, cpu, memory and disk.

    Returns:
        "packages" has a row a requirement: name, wanted, version (None: not installed), ok. "extras" has, for each
        extra, what it lacks: [] where it is installed. "rendering" says whether frames can be had,
        and by what. "settings" are what "auto" means in a long run's recipe. Memory
        and disk are in GB (10^9 bytes), free ones; the disk is the current directory's.
    """
    import torch

    from cvlctl.learn.settings import have_compiler, resolve_settings

    settings = resolve_settings(
        device="auto", threads="auto", precision="auto", compile="auto", steps=LONG, say=lambda line: None
    ).as_dict()
    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "cvlctl": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpus": num_cpus(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "devices": ["cpu", *(f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus)],
        "compiler": have_compiler() and (os.environ.get("CXX") or "C++, with Python's headers"),
        "rendering": _rendering(),
        "settings": {name: settings[name] for name in ("device", "threads", "precision", "compile")},
        "memory_gb": round(free_memory() / 1e9, 1),
        "disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "packages": list(_packages(None)),
        "extras": {extra: [row["name"] for row in _packages(extra) if not row["ok"]] for extra in _extras()},
    }


def render(found: dict[str, Any], console: Console) -> None:
    """Print the result of `doctor`."""
    if len(found["devices"]) > 1:
        console.print("make gpu: does all work on this GPU, and how fast? Ten minutes.\n", markup=False)
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    told = {name: value for name, value in found.items() if name not in ("packages", "extras", "settings")}
    told["devices"] = "; ".join(found["devices"])
    told["load_average"] = " ".join(map(str, found["load_average"]))
    told["compiler"] = found["compiler"] or "none: training runs eager, about 1.5x slower"
    told["rendering"] = ("" if found["rendering"]["works"] else "none: ") + found["rendering"]["by"]
    told["auto means"] = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    for name, value in told.items():
        table.add_row(name.replace("_gb", " free, GB").replace("_", " "), Text(str(value)))
    console.print(table)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("package", "version", "wanted", ""):
        table.add_column(heading)
    for row in found["packages"]:
        table.add_row(row["name"], row["version"] or "not installed", row["wanted"], "" if row["ok"] else "WRONG")
    console.print(table)
    for extra, lacks in found["extras"].items():
        state = f"not installed: it lacks {', '.join(lacks)}" if lacks else "installed"
        console.print(f"extra {extra}: {state}", markup=False)


def _rendering() -> dict[str, Any]:
    """Whether frames can be rendered (`works`), and by what, or why not and what to install: tried in a process of its
    own, which a driver may end."""
    from cvlctl.play.workers import share_out

    try:
        [(_, by)] = share_out("cvlctl.play.cameras:probe", [None], 1)
    except CvlctlError as error:
        return {"works": False, "by": f"{error.what}; {error.hint}"}
    return {"works": True, "by": by}


def _requires() -> list[str]:
    """What cvlctl requires: as it was installed, or of the checkout that it runs from."""
    try:
        return metadata.requires("cvlctl") or []
    except metadata.PackageNotFoundError:
        project = _project()
    extras = project.get("optional-dependencies", {})
    more = [_of_extra(line, extra) for extra in extras for line in extras[extra]]
    return [*project.get("dependencies", []), *more]


def _extras() -> list[str]:
    try:
        return sorted(metadata.metadata("cvlctl").get_all("Provides-Extra") or [])
    except metadata.PackageNotFoundError:
        return sorted(_project().get("optional-dependencies", {}))


def _project() -> dict[str, Any]:
    """Of the checkout's pyproject.toml; {} where the package lies alone."""
    file = Path(__file__).parents[2] / "pyproject.toml"
    project: dict[str, Any] = tomllib.loads(file.read_text())["project"] if file.exists() else {}
    return project if project.get("name") == "cvlctl" else {}


def _of_extra(line: str, extra: str) -> str:
    """A requirement as packages state it that are required by an extra alone."""
    requirement = Requirement(line)
    always, requirement.marker = requirement.marker, None
    condition = f'extra == "{extra}"'
    return f"{requirement} ; {f'({always}) and {condition}' if always else condition}"


def _packages(extra: str | None) -> Iterator[dict[str, Any]]:
    """What is required here; with `extra`, only what that requires beyond it."""
    for line in _requires():
        requirement = Requirement(line)
        marker = requirement.marker
        always = marker is None or marker.evaluate({"extra": ""})
        if not (always if extra is None else not always and marker and marker.evaluate({"extra": extra})):
            continue
        try:
            version: str | None = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        ok = version is not None and requirement.specifier.contains(version, prereleases=True)
        yield {"name": requirement.name, "wanted": str(requirement.specifier), "version": version, "ok": ok}
