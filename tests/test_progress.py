"""What people see of long work."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys

import pytest

from cvlctl.progress import Progress


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_80_columns_count_and_time_left_stay() -> None:
    import fcntl
    import pty
    import struct
    import termios

    code = (
        "import time; from cvlctl.progress import Progress\n"
        "with Progress('finetune', 1_000_000, 'steps') as bar:\n"
        "    for done in range(0, 500_001, 100_000):\n"
        "        time.sleep(0.1); bar.update(done, 'critic 0.123456  actor 1.234567  accuracy 0.987654  value 2.345')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=30) == 0
    line = next(x for x in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())) if "500000/" in x)
    assert re.search(r"\u2501 +500000/1000000 \d+ steps/s \d:\d\d:\d\d critic .*\u2026", line), line
    assert len(line) <= 80


def test_what_was_waited_for_before_the_first_step_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A minute of compiling, then two updates a second; and an update that takes a minute."""
    now = [0.0]
    monkeypatch.setattr("cvlctl.progress.time.monotonic", lambda: now[0])
    with Progress("finetune", 100, "updates") as bar:
        for done, at in ((1, 60.0), (41, 80.0)):
            now[0] = at
            bar.update(done)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "finetune: 1/100 updates, 0.02/s, 1h39m left"
    assert second == "finetune: 41/100 updates, 2/s, 29s left"
    with Progress("finetune", 100, "updates", start=10, slow=2) as bar:  # two programs, each compiled when it is used
        for done, at in ((11, 140.0), (12, 200.0), (52, 220.0)):
            now[0] = at
            bar.update(done)
    assert capsys.readouterr().err.splitlines()[-1] == "finetune: 52/100 updates, 2/s, 24s left"
