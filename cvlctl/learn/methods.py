"""Methods from outside: pages of one's own, which a recipe's `algorithm` names as it names the built-in ones.

A name is an entry point of the group `cvlctl.algorithms`, a module by its dotted name, or a file that ends in `.py`.
Its code is imported because the recipe names it; nothing else imports it. `docs/algorithms.md` says what it exports.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cvlctl.data.samplers import Draws
from cvlctl.errors import CvlctlError
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.play import named_code

GROUP = "cvlctl.algorithms"
_OUTSIDE: dict[str, str] = {}  # name -> file of its page, of those that were imported
_LEARNS_FROM = ("rewards", "examples", "actions")


def is_outside(name: object) -> bool:
    """Whether a recipe's name is that of a method from outside, be it there or not."""
    if not isinstance(name, str) or (name in ALGORITHMS and name not in _OUTSIDE):
        return False
    return name in _OUTSIDE or name.endswith(".py") or "." in name or _entry(name) is not None


def load(name: str) -> ModuleType:
    """Import the page and list it in `ALGORITHMS`.

    Raises:
        CvlctlError: it is not there, cannot be imported, or lacks what a page must export.
    """
    if name not in _OUTSIDE:
        page = _imported(name)
        _check(name, page)
        for function, says in _GIVES.items():
            setattr(page, function, _checked(name, getattr(page, function), says))
        ALGORITHMS[name] = page
        _OUTSIDE[name] = str(page.__file__)
    return ALGORITHMS[name]


def digests(name: str) -> dict[str, str]:
    """What a run notes of its method's code, so that it does not go on with another: nothing of a built-in one."""
    return {f"algorithm:{name}": named_code.digest(_OUTSIDE[name])} if name in _OUTSIDE else {}


@contextmanager
def blamed(name: str) -> Iterator[None]:
    """An error that the code of a method from outside raises is one of the page, and not of ours."""
    try:
        yield
    except CvlctlError:
        raise
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == _OUTSIDE.get(name)]
        if not frames:
            raise
        what = f"algorithm {name} failed in line {frames[-1].lineno}: {type(error).__name__}: {error}"
        raise CvlctlError(what, f"mend {_OUTSIDE[name]}; docs/algorithms.md says what it is handed") from error


def _entry(name: str) -> EntryPoint | None:
    return next(iter(entry_points(group=GROUP, name=name)), None)


def _imported(name: str) -> ModuleType:
    entry = _entry(name)
    try:
        if entry is not None:
            found: Any = entry.load()
        else:
            found = named_code.module_of(named_code.Named(name, "step"), str(named_code.origin(f"py/{name}:step")))
    except CvlctlError as error:
        what = re.sub(rf"'?py/{re.escape(name)}:step'?", f"algorithm {name}", error.what)
        raise CvlctlError(
            what, f"a page is a file, such as my_methods/awac.py, or an installed module; {error.hint}"
        ) from error
    except (Exception, SystemExit) as error:
        what = f"algorithm {name} cannot be imported: {type(error).__name__}: {error}"
        raise CvlctlError(what, "mend the page, or pip install what it imports") from error
    if not isinstance(found, ModuleType):
        raise CvlctlError(
            f"algorithm {name} is no module", f"an entry point of {GROUP} names a module, without a colon"
        )
    return found


def _is_state(found: object) -> bool:
    return isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())


_GIVES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # what each function of a page returns
    "draws": ("a samplers.Draws", lambda found: isinstance(found, Draws)),
    "init": ("a flat dict of tensors", _is_state),
    "step": (
        "(state, metrics), metrics of (E,) each",
        lambda found: isinstance(found, tuple) and len(found) == 2 and all(map(_is_state, found))
        and all(value.dim() == 1 for value in found[1].values()),
    ),
}  # fmt: skip


def _checked(name: str, function: Callable[..., Any], says: tuple[str, Callable[[Any], bool]]) -> Callable[..., Any]:
    """The function, whose result is looked at unless it is being compiled."""

    @functools.wraps(function)
    def checked(*given: Any, **more: Any) -> Any:
        found = function(*given, **more)
        if not torch.compiler.is_compiling() and not says[1](found):
            what = f"algorithm {name}: {function.__name__} returned {type(found).__name__}, not {says[0]}"
            raise CvlctlError(what, "docs/algorithms.md says what a page exports")
        return found

    return checked


def _check(name: str, page: ModuleType) -> None:
    lacking = [each for each in ("LEARNS_FROM", "Config", "draws", "init", "step") if not hasattr(page, each)]
    hint = "docs/algorithms.md says what a page exports"
    if lacking:
        raise CvlctlError(f"algorithm {name} lacks {', '.join(lacking)}", hint)
    if page.LEARNS_FROM not in _LEARNS_FROM:
        what = f"algorithm {name} has LEARNS_FROM = {page.LEARNS_FROM!r}"
        raise CvlctlError(what, f"one of these: {', '.join(_LEARNS_FROM)}")
    config: Any = page.Config
    if not getattr(getattr(config, "__dataclass_params__", None), "frozen", False):
        raise CvlctlError(f"algorithm {name}: its Config is no frozen dataclass", "write @dataclass(frozen=True)")
    bare = [
        field.name for field in dataclasses.fields(config) if field.default is field.default_factory
    ]  # both missing
    if bare:
        raise CvlctlError(f"algorithm {name}: its Config has no default for {', '.join(bare)}", hint)
