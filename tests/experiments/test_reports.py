"""`cvlctl report`: every number of the page is one of the tables, nothing from data is markup, gaps are marked."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from toy_results import save_run, save_scores, save_store

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments.reports import figures, marks, png, svg
from cvlctl.experiments.reports import report as module
from cvlctl.experiments.reports.report import report
from cvlctl.score.comparisons import sentences
from cvlctl.score.render import cell, columns
from cvlctl.score.report import TABLES

TASKS = ("gym/Pendulum-v1", "gym/Hopper-v5")
NAMES = ("bc", "cvl")
HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b]0;x\x07'


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own; PNGs are one test's subject, and take most of a report's time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "can_draw", lambda: False)


def save(tasks: tuple[str, ...] = TASKS, **options: Any) -> None:
    """Two methods on two tasks, scored, below e/."""
    stores = {task: save_store(Path(f"e/data/{i}.zarr"), task, seed=i) for i, task in enumerate(tasks)}
    pairs = [(task, name) for task in tasks for name in NAMES]
    runs = [save_run(Path(f"e/runs/{tasks.index(task)}-{name}"), stores[task], name, task) for task, name in pairs]
    save_scores(Path("e/scores"), runs, *zip(*pairs, strict=True), **options)


class Page(HTMLParser):
    """The cells of a page's tables, in order: (text, data-v or None); and all titles on hovering."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[tuple[str, str | None]] = []
        self.titles: list[str] = []
        self.tags: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "td":
            self.cells.append(("", dict(attributes).get("data-v")))
        if tag == "title":
            self.titles.append("")
        self._open = tag if tag in ("td", "title") else self._open

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag in ("td", "title") else self._open

    def handle_data(self, text: str) -> None:
        if self._open == "td":
            self.cells[-1] = self.cells[-1][0] + text, self.cells[-1][1]
        if self._open == "title":
            self.titles[-1] += text


def test_every_number_of_the_page_is_the_number_in_the_tables() -> None:
    save()
    report(["e"])
    text = Path("report.html").read_text()
    page, tables = Page(text), json.loads(Path("e/scores/table.json").read_text())
    shown = [
        (cells[i], record.get(key))
        for name in TABLES
        if (records := tables[name])
        for i, record in enumerate(records)
        for key, _, cells in columns(records)
    ]
    assert len(shown) > 100
    assert [cell for cell in page.cells if cell[0]][: len(shown)] == [
        (words, repr(value) if isinstance(value, int | float) else None) for words, value in shown
    ]
    for sentence in sentences(tables["comparison"]):
        assert html.escape(sentence) in text
    for record in tables["table"]:
        means = [cell(record, f"{metric}_mean") for metric in ("return", "success") if record[f"{metric}_mean"]]
        for mean in means:
            assert any(mean in title for title in page.titles)
        for value in record["return_runs"]:
            assert any(f"{value:.4g}" in title for title in page.titles)


def test_an_evaluation_without_its_tables_is_computed_to_the_same_numbers() -> None:
    save()
    first = report(["e"], Path("first.html"))
    os.unlink("e/scores/table.json")
    second = report(["e"], Path("second.html"))
    cells = [Page(Path(result["out"]).read_text()).cells for result in (first, second)]
    assert cells[0] == cells[1]
    names = [sorted(path.name for path in Path(result["figures"]).iterdir()) for result in (first, second)]
    assert names[0] == names[1] and {"scores.svg", "scores.csv", "scores.md", "scores.tex"} <= set(names[0])


def test_runs_alone_find_their_evaluation_and_are_shown_without_the_others() -> None:
    save()
    result = report(["e/runs/0-*"])
    assert (result["runs"], result["evaluations"]) == (2, 1)
    text = Path("report.html").read_text()
    assert "Pendulum" in text and "Hopper" not in text
    assert "recipes" in text and "algorithm.name" in text  # what differs between them


def test_nothing_from_data_is_markup() -> None:
    save(tasks=(HOSTILE, "gym/Hopper-v5"))
    os.rename("e/runs/0-bc", "e/runs/<b>bold")
    result = report(["e"])
    text = Path("report.html").read_text()
    page = Page(text)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert "<script>alert" not in text and "<b>bold" not in text and "\x1b" not in text
    assert HOSTILE.split("\x1b")[0] in html.unescape(text)
    for name in os.listdir(result["figures"]):
        content = Path(result["figures"], name).read_text()
        if name.endswith(".svg"):
            ElementTree.fromstring(content)
        if name.endswith(".md"):
            assert "<" not in content and "\x1b" not in content
        if name.endswith(".tex"):
            assert not re.search(r"(?<!\\)[%&_](?!\s)", re.sub(r" & ", " ", content.replace("\\\\", "")))


def test_what_is_half_finished_gone_or_other_is_marked_and_the_rest_is_shown() -> None:
    save(skip=3)
    save_run(Path("e/runs/half"), Path("e/data/0.zarr"), finished=False)
    Path("e/runs/0-cvl/run.json").write_text("{")
    shutil.rmtree("e/data/1.zarr")
    shutil.rmtree("e/data/0.zarr")
    save_store(Path("e/data/0.zarr"), seed=7)
    for run in ("e/runs/1-bc", "e/runs/1-cvl"):
        shutil.rmtree(run) if run.endswith("bc") else os.utime(f"{run}/checkpoints/last.safetensors", (2e9, 2e9))
    gaps = " | ".join(report(["e"])["gaps"])
    text = html.unescape(Path("report.html").read_text())
    for told in (
        "e/runs/half: its training is not finished", "0-cvl/run.json: damaged", "3 of 96 episodes are not played yet",
        "e/data/1.zarr: it is gone", "e/data/0.zarr: it is not what was trained on any more",
        "e/runs/1-bc was scored in e/scores and is gone since", "e/runs/1-cvl was trained further since its scores",
    ):  # fmt: skip
        assert told in gaps and told in text, told
    assert "P(improvement)" in text


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', "recipe", "rows"])
def test_a_damaged_evaluation_is_told_of_and_the_runs_are_shown(damage: str) -> None:
    save(tasks=TASKS[:1])
    record = Path("e/scores/evaluation.json")
    if damage == "rows":
        Path("e/scores/rows.jsonl").write_text("{}\n")
    elif damage == "recipe":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"recipe": {"runs": ["x"], "episodes": "many"}}))
    else:
        record.write_text(damage)
    result = report(["e"])
    assert result["runs"] == 2 and "e/scores" in " ".join(result["gaps"])


def test_it_can_be_written_from_inside_of_what_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of tasks whose code is not here: nothing is imported."""
    save(tasks=("py/gone.py:Reach",))
    record = Path("e/scores/evaluation.json")
    told = json.loads(record.read_text())
    told["recipe"]["task"] = ["py/gone.py:Reach"]
    record.write_text(json.dumps(told))
    os.chdir("e/scores")
    assert report(["."])["evaluations"] == 1


def test_an_experiment_shows_what_failed_with_its_last_lines(acts: Callable[..., None], tmp_path: Path) -> None:
    from cvlctl.experiments.commands import load
    from cvlctl.experiments.run import run_experiment

    data = {"command": "build-dataset", "task": "${task}", "source": {"name": "random", "episodes": 1},
            "out": "${out}/${task}.zarr"}  # fmt: skip
    train = {"command": "finetune", "stores": ["${out}/${task}.zarr"], "algorithm": "bc", "steps": 9,
             "out": "${out}/bc/${task}"}  # fmt: skip
    stages = {"data": data, "train": train}
    whole = {"out": "e", "matrix": {"task": list(TASKS)}, "stages": stages}
    Path("e.yaml").write_text(json.dumps(whole))
    with pytest.raises(CvlctlError, match="nothing of it has run yet"):
        report(["e.yaml"])
    acts(**{"gym/Hopper-v5.zarr": "fail"})
    run_experiment(load(Path("e.yaml"), (), "run"))
    result = report(["e.yaml", "local.processes=1"])
    text = html.unescape(Path("report.html").read_text())
    assert result["cells"] == 4 and "it cannot be" in text and "a line before the end" in text
    assert "blocked" in text and "cvlctl run e.yaml local.processes=1" in text
    assert "cvlctl build-dataset e/cells/gym/Hopper-v5.zarr/recipe-" in text


def test_what_is_no_report_stays(capsys: pytest.CaptureFixture[str]) -> None:
    save_run(Path("e/bc"), save_store(Path("e/0.zarr")))
    Path("mine.html").write_text("<p>mine")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    Path("bc.yaml").write_text("stores: [e/0.zarr]\nalgorithm: bc\nout: e/x\n")
    for arguments, told in (
        (["e", "--out", "mine.html"], "exists, and is no report"),
        (["e", "--figures", "mine"], "holds something else than a report's figures"),
        (["e", "--figures", "report.html"], "is the page, and cannot be the folder"),
        (["e", "--figures", "report.html/figures"], "is the page, and cannot be the folder"),
        (["e", "--out", "."], "is no name of a file"),
        (["e", "--out", "e/0.zarr/report.html"], "inside the store"),
        (["nowhere"], "nothing is at nowhere"),
        (["mine"], "no run, evaluation or store is there"),
        (["bc.yaml"], "bc.yaml is a recipe for finetune, not for run"),
        (["e", "bc.yaml"], "bc.yaml is a file"),
        (["none.yaml"], "none.yaml"),
    ):
        assert execute(app, ["report", *arguments]) == 2, arguments
        assert told in capsys.readouterr().err
    assert Path("mine.html").read_text() == "<p>mine" and os.listdir("mine") == ["notes.txt"]
    assert not Path("report.html").exists() and not Path("report-figures").exists()
    assert execute(app, ["report", "e", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 1
    assert execute(app, ["report", "e", "--out", "mine.html", "--force"]) == 0
    assert execute(app, ["report", "e"]) == 0  # another report takes its place


def test_every_figure_is_a_png_too(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(module, "can_draw", lambda: True)
    monkeypatch.setattr(module.png, "drawn", lambda figure: drawn.append(figure.name) or b"")
    save()
    folder = Path(report(["e"])["figures"])
    names = {"bars", "data-0", "data-1", "learning", "profiles", "scores", "training"}
    assert set(drawn) == names == {path.stem for path in folder.glob("*.png")} == {p.stem for p in folder.glob("*.svg")}


def test_all_kinds_of_marks_are_drawn_as_svg_and_as_png() -> None:
    shapes = {
        "line": ([0, 1], [0, 1]), "faint": ([0, 1, 2], [0, float("nan"), 2]), "band": ([0, 1], [0, 1, 2, 3]),
        "dot": ([1], [1]), "seed": ([1], [2]), "interval": ([0, 2], [1, 1]), "whisker": ([0, 2], [1, 1]),
        "bar": ([0, 2], [0, 1]), "cells": ([1, 2], [1, 2]),
    }  # fmt: skip
    drawn = [marks.Mark(kind, *at, i - 2, f"<{kind}>", (0.5, 0.5)) for i, (kind, at) in enumerate(shapes.items())]
    axes = marks.axis("x $", [0, 2]), marks.axis("y", [0, 3])
    figure = marks.Figure("f", "", [marks.Panel("a & b", *axes, drawn)], [("bc", marks.GREY), ("n" * 99, 8)])
    root = ElementTree.fromstring(svg.of_figure(figure))
    titles = [one.text for one in root.iter("{http://www.w3.org/2000/svg}title")]
    assert [title for title in titles if title and title[0] == "<"] == [f"<{kind}>" for kind in shapes]
    assert "nan" not in svg.of_figure(figure)
    assert png.drawn(figure)[:4] == b"\x89PNG"


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-3e6, 2e6], [1e-9, 2e-9], [float("nan"), 1.0], []])
def test_an_axis_holds_its_values_between_round_ticks(values: list[float]) -> None:
    axis = marks.axis("x", values)
    assert axis.low < axis.high and len(axis.ticks) <= 7
    assert all(axis.low <= value <= axis.high for value in values if value == value)
    assert all(axis.low <= at <= axis.high for at, _ in axis.ticks)


def test_long_logs_are_thinned_and_what_is_not_finite_is_left_out() -> None:
    lines = [{"step": step, "a": [1.0, 2.0], "b": float("nan"), "c": "x"} for step in range(5000)]
    series = {"r": figures.series_of(lines)}
    assert list(series["r"]) == ["a"]
    figure = figures.training(series, {"r": "t"}, {"r": "bc"}, {"bc": 0})
    assert figure is not None
    assert [len(mark.x) for mark in figure.panels[0].marks] == [figures.POINTS // 2] * 2
    assert figure.panels[0].marks[0].x[0] == 0 and figure.panels[0].marks[0].x[-1] == 4999


FRAME = """<!doctype html><title>-</title>%s<script>
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const wide = [...page.querySelectorAll("body *")].filter(one => !one.closest(".scroll, pre, svg")
      && one.getBoundingClientRect().right > root.clientWidth + 1).map(one => one.tagName);
    const table = [...page.querySelectorAll("table")].find(one => one.tHead.textContent.includes("return"));
    const at = [...table.tHead.rows[0].cells].findIndex(one => one.textContent.startsWith("return"));
    const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[at].dataset.v));
    const button = table.tHead.rows[0].cells[at].querySelector("button");
    button.click(); const down = values(); button.click();
    return {shown: root.clientWidth, wide: root.scrollWidth, out: wide, down, up: values()};
  });
  document.body.textContent = "TOLD" + JSON.stringify(told) + "END";
});
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="Debian's chromium is not installed")
def test_in_a_browser_it_fits_sorts_and_has_no_errors(tmp_path: Path) -> None:
    """At 390 and 1440 pixels, each in a frame of that width."""
    save(tasks=("gym/Pendulum-v1", "a-family/" + "a_very_long_name_" * 5 + HOSTILE))
    report(["e"])
    page = html.escape(Path("report.html").read_text())
    frames = "".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{page}"></iframe>' for width in (390, 1440)
    )
    Path("frames.html").write_text(FRAME % frames)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
               "--window-size=2000,1000"]  # fmt: skip
    said = ""
    for file, more in (("frames.html", ["--dump-dom"]), ("report.html", ["--dump-dom"])):
        done = subprocess.run(
            [*command, *more, f"file://{tmp_path / file}"], capture_output=True, text=True, timeout=120
        )
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        said += done.stdout
    found = re.search("TOLD(.*?)END", said)
    assert found, said[-2000:]
    for width, told in zip((390, 1440), json.loads(html.unescape(found[1])), strict=True):
        assert told["shown"] == width == told["wide"] and not told["out"], told
        assert told["down"] == sorted(told["down"], reverse=True) and told["up"] == told["down"][::-1]
