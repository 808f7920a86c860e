"""Paths as people write them, on the command line and in recipes: `~`, and $NAME of the environment."""

from __future__ import annotations

import os
import re

from cvlctl.errors import CvlctlError

_NAME = re.compile(r"\$(?:(\w+)|\{([^}]*)\})", re.ASCII)
_HINT = "or write the path out; ${key} is filled in from the matrix of an experiment, ${task} from `task: [...]`"


def expanded(path: str) -> str:
    """`path` with what $NAME and ${NAME} of the environment stand for, and the home of a `~` or `~user` at its start.

    Raises:
        CvlctlError: a `$` or `~` is left. Taken as it is, it would become the name of a folder.
    """

    def value(name: re.Match[str]) -> str:
        return os.environ.get(name[1] or name[2]) or name[0]  # an empty one would make /x of $SCRATCH/x

    found = os.path.expanduser(_NAME.sub(value, path))
    if left := _NAME.search(found):
        name = (left[1] or left[2])[:80]
        raise CvlctlError(f"{path}: no environment variable {name} is set", f"export {name}=... first, {_HINT}")
    if "$" in found:
        raise CvlctlError(f"{path}: a $ begins no name here", "write $NAME or ${NAME}; no path may hold a plain $")
    if found.startswith("~"):
        what = f"{path}: {found.partition('/')[0]} is nobody's home here"
        raise CvlctlError(what, "write the whole path, from / on")
    if "~" in found.split("/"):
        raise CvlctlError(f"{path}: ~ stands for the home at the start alone", "write the whole path, from / on")
    if not path:
        raise CvlctlError("a path is empty", "write one; . is the current directory")
    if "\0" in found:
        raise CvlctlError(f"{path!r} holds a zero byte, which no path may")
    return found
