"""Text out of files is shown on a terminal, and never obeyed by it: one place prints, and it spells controls out."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text
from toy_stores import edit_root, many

from cvlctl import progress, terminal
from cvlctl.cli import app as cli
from cvlctl.cli.console import execute
from cvlctl.data.writer import write_store
from cvlctl.figures import caption, make_panels, save_figure
from cvlctl.score.pictures import plot_curves, plot_scores
from cvlctl.score.tables import score_table
from cvlctl.types import EpisodeResult

PACKAGE = Path(__file__).parents[1] / "cvlctl"
HOSTILE = "a\x1b]0;owned\x07b\x9b2J\x00\r\u202ec\ud800\x08[/red]$x_{$"
SPELT = r"a\x1b]0;owned\x07b\x9b2J\x00\r\u202ec\ud800\x08[/red]$x_{$"
NAME = re.sub("[/\x00\ud800]", "", HOSTILE)  # of a file
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # all that rich sends for styles
CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")

pytestmark = pytest.mark.usefixtures("no_fsync")


def assert_harmless(shown: str) -> None:
    found = CONTROLS.search(COLOURS.sub("", shown))
    assert found is None, repr(shown[max(0, found.start() - 50) : found.end() + 50])


def test_controls_are_spelt_out_and_all_else_stays() -> None:
    assert terminal.visible(HOSTILE) == SPELT
    plain = "two\nlines, a\ttab, ümläut, 漢字, עברית, 🙂, \\x1b, \xa0"
    assert terminal.visible(plain) == plain
    for code in [*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000, 0x100), 0x2028, 0x2029, 0x2066, 0x200E]:
        assert (terminal.visible(chr(code)) == chr(code)) == (chr(code) in "\t\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_whatever_a_console_is_given(is_terminal: bool) -> None:
    out = io.StringIO()
    console = terminal.console(file=out, force_terminal=is_terminal, width=200)
    table = Table("a", HOSTILE, title=Text(HOSTILE), caption=Text(HOSTILE))
    table.add_row(Text(HOSTILE, style="red"), Text.assemble(("x", "bold"), HOSTILE))
    console.print(table)
    console.print(HOSTILE, markup=False)
    console.print(Text(HOSTILE), soft_wrap=True)
    console.print([HOSTILE])
    assert_harmless(out.getvalue())
    assert out.getvalue().count(r"\x1b") >= 8
    assert bool(COLOURS.search(out.getvalue())) == is_terminal


def test_tables_of_text_stay_straight() -> None:
    out = io.StringIO()
    table = Table("name")
    for name in ("a\x1b[31mb", "plain"):
        table.add_row(name)
    terminal.console(file=out, width=80).print(table)
    assert len({len(line) for line in out.getvalue().splitlines()}) == 1


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A store whose task, tasks, label and provenance hold escape sequences."""
    given: dict[str, Any] = {"recipe": {"note": HOSTILE}, HOSTILE: [HOSTILE]}
    given |= {"parents": [{"path": HOSTILE, "digest": HOSTILE}]}
    store = write_store(tmp_path / "a.zarr", many(5), task="toy")
    lists = {
        key: json.loads(json.dumps(store.attributes[key]).replace("/given/", json.dumps(f"/{NAME}/")[1:-1]))
        for key in ("checksums", "chunk_crc32c")
    }
    edit_root(store.path, task=HOSTILE, tasks=[HOSTILE], provenance=given, **lists)
    (store.path / "labels" / "given").rename(store.path / "labels" / NAME)
    return store.path


def test_a_store_that_holds_escape_sequences(hostile: Path, capfd: pytest.CaptureFixture[str]) -> None:
    commands = {
        "ls": ("ls", hostile.parent), "info": ("info", hostile), "verify": ("verify", hostile),
        "filter": ("filter", hostile, "--out", hostile.with_name("f.zarr"), "--task", HOSTILE),
        "merge": ("merge", hostile, hostile, "--out", hostile.with_name(NAME)),
        "no label": ("info", hostile.with_name("\x1b[2J")), "plot": ("plot", hostile, "--label", NAME),
    }  # fmt: skip
    for name, line in commands.items():
        for form in ([], ["--json"]):
            code = execute(cli.app, ["data", *map(str, line), *form])
            out, err = capfd.readouterr()
            assert code in (0, 1, 2) and "Traceback" not in err, (name, err)
            assert_harmless(out)
            assert_harmless(err)
            if name == "info" and form:
                assert json.loads(out)["task"] == HOSTILE  # programs get it as it is
            elif name in ("ls", "info") and not form:
                assert r"\x1b]0;" in out.replace("\n", "")


def test_progress_and_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    progress.say(HOSTILE)
    terminal.print_text(HOSTILE)
    monkeypatch.setattr(progress, "PLAIN_LINE_SECONDS", 0.0)
    with progress.Progress(HOSTILE, 2, "rows") as bar:
        bar.update(1, HOSTILE)
    out, err = capsys.readouterr()
    assert_harmless(out + err)
    assert out == SPELT + "\n" and err.count(SPELT) == 3


def test_a_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.sys, "stderr", out)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with progress.Progress("import [/red]\x1b]0;x", 2, "rows") as bar:
        bar.update(1, "\x1b]0;y")
    shown = out.getvalue()
    assert r"[/red]\x1b" in shown and r"\x1b]0;y" in shown and "\x1b]0" not in shown


def result(algorithm: str, task: str, step: int) -> EpisodeResult:
    values: dict[str, Any] = {
        "algorithm": algorithm, "task": task, "seed": 0, "episode": 0, "step": step, "episode_return": 1.0,
        "discounted_return": 1.0, "success": True, "length": 3,
    }  # fmt: skip
    names = EpisodeResult.__dataclass_fields__
    return EpisodeResult(**{name: values.get(name) for name in names})


def test_pictures_of_hostile_names(tmp_path: Path) -> None:
    figure, _ = make_panels([("", HOSTILE), ("", "$" * 3000)], 3.0)
    save_figure(figure, tmp_path / "panels.png")
    rows = [result(name, HOSTILE, step) for name in (HOSTILE, "_x$") for step in (0, 5)]
    plot_curves(rows, tmp_path / "curves.png", resamples=2)
    plot_scores(score_table(rows, resamples=2), tmp_path / "scores.png")
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert caption("a\nb $x$ " + "long" * 100) == r"a b \$x\$ " + ("long" * 100)[:69] + "..."


def test_one_file_alone_makes_consoles_and_few_print() -> None:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert [name for name, text in files.items() if re.search(r"(?<![\w.])Console\([^)]", text)] == []
    assert "class Screen(Console)" in files["terminal.py"]
    printing = {name for name, text in files.items() if re.search(r"(?<![\w.])print\(", text)}
    # these print text that is made visible, a version, or JSON, whose controls are escaped
    assert printing <= {"terminal.py", "progress.py", "streams.py", "cli/console.py", "cli/app.py"}
