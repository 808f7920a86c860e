"""The one exception for everything a user can fix."""

from __future__ import annotations


class CvlctlError(Exception):
    """What is wrong, and how to mend it. The command line prints both and exits with code 2.

    Args:
        what: the fault in one sentence, naming the file, line, key or array at fault.
        hint: the fix in one sentence; empty where there is none to offer.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what, self.hint = _shortened(what, 1_000), _shortened(hint, 2_000)
        super().__init__(f"{self.what}\n{self.hint}" if hint else self.what)


class Busy(CvlctlError):
    """Another process is at it."""


class Exists(CvlctlError):
    """Something is there already, perhaps since a moment ago: see `folders.again_where_it_exists`."""

    def __init__(
        self,
        path: object,
        hint: str = "choose another path, or --force (in Python, force=True) to replace it",
    ) -> None:
        super().__init__(f"{path} exists", hint)


def _shortened(text: str, length: int) -> str:
    """The text, without its middle where it is longer: names and values in it can have any length, a screen has not."""
    return text if len(text) <= length else f"{text[: length - 305]} ... {text[-300:]}"
