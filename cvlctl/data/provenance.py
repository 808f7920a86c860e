"""What a store says of where it came from: the environment that wrote it, and whatever else as plain JSON."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from cvlctl.cell import where
from cvlctl.errors import CvlctlError
from cvlctl.version import versions


@cache
def environment() -> dict[str, Any]:
    """What wrote the store, found without importing any of it."""
    found: dict[str, Any] = {"versions": versions(), "platform": platform.platform(), "where": where()}
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # else this may be a copy that lies in somebody else's repository
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
            found["git_commit"] = subprocess.check_output(command, text=True, timeout=5).strip()
    return found


def jsonable(what: str, value: dict[str, Any]) -> dict[str, Any]:
    """A copy of `value` as JSON has it. Halves of surrogates (bytes of a file's name that are no text) are spelt out.

    Raises:
        CvlctlError: it holds what JSON lacks; `what` says whose it is.
    """
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        return dict(json.loads(re.sub("[\ud800-\udfff]", lambda half: f"\\\\u{ord(half[0]):04x}", text)))
    except (TypeError, ValueError, RecursionError) as error:
        raise CvlctlError(f"the {what} of a store cannot be written as JSON: {error}") from error
