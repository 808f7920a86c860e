"""cvlctl: from logged trajectories to policies and honest score tables. The public Python API, loaded on first use."""

from __future__ import annotations

import os

from cvlctl.version import __version__

TYPE_CHECKING = False  # typing's own takes 5 ms, in which Ctrl-C would still be a traceback

# OpenMP's threads spin while they wait for each other, by default so long that a second busy process is ruinous (2
# updates/s instead of 115 on two cores); not spinning at all costs 40 % on an idle machine. This many turns cost
# neither. The variable is read when torch loads, so it has to be set before.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
# Those of numpy's matrix products do so for a tenth of a second, in which one that waits for its workers takes a whole
# core away from them. 2^20 cycles, half a millisecond.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

if TYPE_CHECKING:
    from typing import Any

    from cvlctl.data.store import open_store
    from cvlctl.data.writer import write_store
    from cvlctl.errors import CvlctlError
    from cvlctl.learn.critics import load_critic
    from cvlctl.play.policies import load_policy
    from cvlctl.score.explain import explain
    from cvlctl.types import Episode

_HOMES = {
    "CvlctlError": "cvlctl.errors",
    "Episode": "cvlctl.types",
    "explain": "cvlctl.score.explain",
    "load_critic": "cvlctl.learn.critics",
    "load_policy": "cvlctl.play.policies",
    "open_store": "cvlctl.data.store",
    "write_store": "cvlctl.data.writer",
}

__all__ = [
    "CvlctlError",
    "Episode",
    "__version__",
    "explain",
    "load_critic",
    "load_policy",
    "open_store",
    "write_store",
]


def __getattr__(name: str) -> Any:
    # torch and zarr take seconds to import: `cvlctl --help` must not wait for them
    if name not in _HOMES:
        raise AttributeError(f"module 'cvlctl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
