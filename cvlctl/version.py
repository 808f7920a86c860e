"""The version of cvlctl, and of the packages whose versions change results."""

from __future__ import annotations

from functools import cache

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """Versions of python and of the installed packages that decide what is computed, found without importing them."""
    return dict(_found())


@cache
def _found() -> dict[str, str]:
    import platform
    from importlib import metadata  # 20 ms that `cvlctl --help` need not wait for

    found = {"python": platform.python_version()}
    for package in ("cvlctl", "torch", "numpy", "zarr", "mujoco", "metaworld", "gymnasium"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
