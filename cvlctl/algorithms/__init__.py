"""One page a method. A module exports Config, draws, init and step; `ALGORITHMS` is the list of legal names."""

from __future__ import annotations

from types import ModuleType

from cvlctl.algorithms import bc, cvl, laeo

ALGORITHMS: dict[str, ModuleType] = {"cvl": cvl, "laeo": laeo, "bc": bc}
