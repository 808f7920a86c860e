"""Code of one's own, which a task names: `py/<module or file.py>:<name>`, `gym/<module>:<id>`.

It is imported where a recipe or the command line names it, and never because a store, a run or a checkpoint does:
`origin` finds where the module lies and imports nothing, `load` imports it from there, and whoever makes environments
has to be handed the origin. A module is looked for among what is installed, then in the current directory, by its own
name alone: no directory is added to where Python imports from.
"""

from __future__ import annotations

import hashlib
import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.errors import CvlctlError
from cvlctl.files import sha256
from cvlctl.paths import expanded

EXAMPLE = "such as py/envs/reach.py:Reach or py/my_robot.envs:Reach"


class Named(NamedTuple):
    """What a task names: a file or a module, and what in it gives the environment (of gym/...: the id)."""

    place: str
    name: str

    @property
    def is_file(self) -> bool:
        return self.place.endswith(".py") or "/" in self.place


def names(task: str) -> Named | None:
    """The code that a task names, or None: gym/Hopper-v5 names none. CvlctlError where py/... is not of that form."""
    prefix, _, rest = task.partition("/")
    place, colon, name = rest.rpartition(":")
    if prefix == "gym":
        return Named(place, name) if colon else None
    if prefix != "py":
        return None
    named = Named(place, name)
    words = [*name.split("."), *([] if named.is_file else place.split("."))]
    if not all(word.isidentifier() for word in words):
        raise CvlctlError(f"{task!r} does not name what gives an environment", f"py/FILE.py:NAME, {EXAMPLE}")
    return named


def origin(task: str) -> str | None:
    """Where the module lies that `task` names: a file, or the folder of a package without `__init__.py`, by its
    absolute path; None where it names none. Nothing is imported.

    Raises:
        CvlctlError: there is no such file or module.
    """
    named = names(task)
    if named is None:
        return None
    if named.is_file:
        file = os.path.abspath(expanded(named.place))
        if not os.path.isfile(file):
            raise CvlctlError(f"{task}: no file at {named.place}", "paths are relative to the current directory")
        return file
    top = named.place.split(".")[0]
    return _installed(top) or _beside(top) or _missing(task, top)


def load(task: str, code: str | None) -> Any:
    """What `task` names, imported from its `origin`; of gym/<module>:<id> the module.

    Raises:
        CvlctlError: nobody named it (`code` is None), it cannot be imported, or has no such name.
    """
    named = names(task)
    assert named is not None
    if code is None:
        what = f"{task} is code, and only what a recipe or the command line names is imported"
        raise CvlctlError(what, f"name it there, if you trust it: task={task}")
    module = module_of(named, code)
    found: Any = module
    for name in named.name.split(".") if task.startswith("py/") else []:
        if not hasattr(found, name):
            there = ", ".join(sorted(key for key in vars(found) if key[:1] != "_" and callable(vars(found)[key]))[:20])
            raise CvlctlError(f"{task}: {code} has no {name!r}", f"it has: {there or 'nothing that can be called'}")
        found = getattr(found, name)
    return found


def module_of(named: Named, code: str) -> Any:
    """The module that is named, imported from its origin."""
    return _file(code) if named.is_file else _module(named.place, code)


def digest(code: str) -> str:
    """sha256 of what was named: of the file, or of all Python files of the package."""
    path = Path(code)
    if path.name != "__init__.py" and path.is_file():
        return sha256(path)
    folder = path.parent if path.is_file() else path
    files = [(str(file.relative_to(folder)), sha256(file)) for file in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _installed(top: str) -> str | None:
    try:
        spec = find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None:
        return None
    if spec.origin and os.path.isfile(spec.origin):
        return os.path.abspath(spec.origin)
    return next((os.path.abspath(folder) for folder in spec.submodule_search_locations or ()), None)


def _beside(top: str) -> str | None:
    """In the current directory."""
    for place in (f"{top}/__init__.py", f"{top}.py", top):
        if os.path.exists(place):
            return os.path.abspath(place)
    return None


def _missing(task: str, top: str) -> str:
    what = f"{task}: no module {top!r} is installed, and none lies in the current directory"
    raise CvlctlError(what, f"pip install it, or name a file, {EXAMPLE}")


def _file(path: str) -> Any:
    """The module in a file, under a name of its own: others of the same name may be installed."""
    name = f"{Path(path).stem}_{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return sys.modules[name] if name in sys.modules else _executed(name, path)


def _module(name: str, code: str) -> Any:
    top = name.split(".")[0]
    if top not in sys.modules:
        _executed(top, code)
    return import_module(name)


def _executed(name: str, path: str) -> Any:
    if os.path.isdir(path):  # a package without __init__.py
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [path]
    else:
        folder = [os.path.dirname(path)] if os.path.basename(path) == "__init__.py" else None
        found = spec_from_file_location(name, path, submodule_search_locations=folder)
        assert found is not None
        spec = found
    sys.modules[name] = module = module_from_spec(spec)
    try:
        if spec.loader is not None:
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def lacking(error: BaseException, code: str | None) -> str:
    """A hint where an import failed for a file that lies beside the one that was named."""
    if not isinstance(error, ModuleNotFoundError) or code is None:
        return ""
    folder, name = Path(code).parent, (error.name or "").split(".")[0]
    if not ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
        return f"pip install {name}" if name else ""
    return (
        f"{name} lies beside {Path(code).name}, where nothing is imported from: put both into a folder, say my_robot/, "
        f"write `from .{name} import ...`, and name py/my_robot.{Path(code).stem}:NAME"
    )
