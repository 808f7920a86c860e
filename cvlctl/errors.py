"""The one exception for everything a user can fix."""

from __future__ import annotations


class CvlctlError(Exception):
    """What is wrong, and how to mend it. The command line prints both and exits with code 2.

    Args:
        what: the fault in one sentence, naming the file, line, key or array at fault.
        hint: the fix in one sentence; empty where there is none to offer.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(f"{what}\n{hint}" if hint else what)
        self.what = what
        self.hint = hint
