"""Tables and pictures: what they show of the records, that they fit, and when there is nothing to draw."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from cvlctl.learn.pictures import plot_metrics
from cvlctl.score.comparisons import relative_table
from cvlctl.score.pictures import plot_curves, plot_profiles, plot_scores
from cvlctl.score.render import folded, to_csv, to_markdown, to_rich
from cvlctl.score.rows import METRICS, Record
from cvlctl.score.tables import (
    aggregate_table,
    curve,
    curve_table,
    efficiency_table,
    pairwise,
    profile_table,
    run_table,
    score_table,
)
from cvlctl.score.tuning import tuning_table
from cvlctl.score.typeset import to_latex
from cvlctl.types import EpisodeResult

TASKS = ("metaworld/drawer-close-v3", "metaworld/button-press-topdown-wall-v3")
REFERENCES = {task: {"min": 100.0, "max": 4000.0} for task in TASKS}


def rows(
    tasks: Sequence[str] = TASKS,
    algorithms: Sequence[str] = ("bc", "cvl"),
    seeds: int = 3,
    steps: Sequence[int] = (1000, 2000),
    success: bool = True,
) -> list[EpisodeResult]:
    rng = np.random.default_rng(0)
    return [
        EpisodeResult(name, task, seed, step, i, 1000.0 * (n + 1) + step / 10 + rng.normal(0, 90), 500, s)
        for task in tasks
        for n, name in enumerate(algorithms)
        for seed in range(seeds)
        for step in steps
        for i in range(4)
        for s in [bool(rng.random() < 0.3 + 0.4 * n) if success else None]
    ]


def rendered(records: list[Record], width: int = 100, styled: bool = False) -> str:
    console = Console(
        width=width, file=io.StringIO(), force_terminal=styled, color_system="standard" if styled else None
    )
    console.print(to_rich(records, "Scores"))
    return console.file.getvalue()  # type: ignore[attr-defined]


def record(**values: Any) -> Record:
    empty = {f"{m}_mean{end}": None for m in METRICS for end in ("", "_low", "_high")}
    return empty | {"task": "t", "algorithm": "bc", "runs": 5, "episodes": 50, "level": 0.95, **values}


def test_rich_table_fits_a_hundred_columns_uncut() -> None:
    records = score_table(rows(), references=REFERENCES)
    text = rendered(records)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and "…" not in text
    heading = "task algorithm seeds episodes return success normalised"
    assert heading in {" ".join(line.split()) for line in lines}
    for r in records:  # every score on one line, with its interval
        cell = f"{r['return_mean']:.0f} [{r['return_mean_low']:.0f}, {r['return_mean_high']:.0f}]"
        assert sum(cell in line for line in lines) == 1
    table = text.split("in brackets")[0]
    assert table.count("drawer-close-v3") == 1  # a task's name once, without its family
    assert "95% interval" in text and "fewer than five seeds" in text


@pytest.mark.parametrize("width", [60, 80])
def test_names_survive_a_narrow_window(width: int) -> None:
    text = rendered(score_table(rows(), references=REFERENCES), width)
    assert "drawer-close-v3" in text and "cvl" in text and "bc" in text and "…" not in text


@pytest.mark.parametrize(
    ("metric", "estimate", "others", "cell"),
    [
        ("return", (2617.8, 2400.2, 2790.9), {}, "2618 [2400, 2791]"),
        ("return", (45.26, -3.14, 60.0), {}, "45.3 [-3.1, 60.0]"),
        ("return", (-0.0501, -0.06, 0.0), {}, "-0.050 [-0.060, 0.000]"),
        ("return", (-0.2, -900.0, 2.0), {}, "0 [-900, 2]"),
        ("return", (300.0, None, None), {"runs": 1}, "300 (1 run)"),
        ("success", (0.456, 0.3, 1.0), {}, "46% [30, 100]"),
    ],
)
def test_cells(metric: str, estimate: tuple, others: dict, cell: str) -> None:
    values = dict(zip((f"{metric}_mean", f"{metric}_mean_low", f"{metric}_mean_high"), estimate, strict=True))
    header, _, line = to_markdown([record(**values, **others)]).splitlines()[:3]
    cells = dict(zip(header.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert cells[metric] == cell


def test_success_stays_away_where_no_task_has_it_and_is_a_dash_where_one_has() -> None:
    assert "success" not in rendered(score_table(rows(success=False))).replace("Scores", "")
    mixed = rows(TASKS[:1]) + rows(TASKS[1:], success=False)
    lines = to_markdown(score_table(mixed)).splitlines()
    assert "success" in lines[0] and lines[2].split("|")[-2].strip() != "-" and lines[4].split("|")[-2].strip() == "-"
    assert "normalised" not in lines[0]


def test_the_best_of_each_task_is_bold() -> None:
    records = [record(return_mean=1.0), record(algorithm="cvl", return_mean=2.0)]
    records += [record(task="u", return_mean=9.0), record(task="u", algorithm="cvl", return_mean=8.0)]
    lines = to_markdown(records).splitlines()
    assert ["**" in line for line in lines[2:6]] == [False, True, True, False]
    assert "**2.0**" in lines[3] and "**9.0**" in lines[4]
    styled = rendered(records, styled=True)
    bold = re.findall(r"\x1b\[1m *([0-9.]+)", styled)
    assert bold == ["2.0", "9.0"]


def test_best_gap_is_the_smallest() -> None:
    base = {"metric": "success", "tasks": 2, "runs": 5, "level": 0.95, "missing": []}
    records = [base | {"algorithm": name, "mean": m, "optimality_gap": 1 - m} for name, m in (("a", 0.25), ("b", 0.75))]
    last = to_markdown(records).splitlines()[3]
    assert "**75%**" in last and "**25%**" in last


def test_names_are_text_not_markup() -> None:
    records = [record(algorithm="[bold]a|b[/]", return_mean=1.0)]
    assert "[bold]a|b[/]" in rendered(records)
    assert r"a\|b" in to_markdown(records) and r"{}[bold]a\textbar{}b[/]" in to_latex(records)


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="pdflatex (texlive-latex-recommended) is not installed")
def test_latex_sets_every_table(tmp_path: Path) -> None:
    """Names hold whatever is special there, and begin as an option of the line before does."""
    special = r"\input{x} <&%$#_{}~^> \end{tabular} é " + "\x1b]0;x\x07\n"
    data = rows(tasks=("gym/[10]", f"*{special}"), algorithms=("bc", f"[a]{special}"))
    tables = [score_table(data), run_table(data), aggregate_table(data), pairwise(data), relative_table(data), []]
    body = r"\clearpage ".join(to_latex(table, special) for table in tables)
    file = tmp_path / "all.tex"
    file.write_text(rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{body}\end{{document}}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "-draftmode", file.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


def test_notes_tell_what_a_reader_must_know() -> None:
    assert "one seed: no intervals" in to_markdown([record(return_mean=1.0, runs=1)])
    assert "fewer than five" not in to_markdown([record(return_mean=1.0)])
    assert "bc on t: seeds end at unequal steps" in to_markdown([record(return_mean=1.0, uneven_steps=True)])
    assert "too few runs on t, u" in to_markdown([record(return_mean=1.0, missing=["t", "u"])])
    assert "Wilson" in to_markdown(run_table(rows()))
    assert "90% interval" in to_markdown(score_table(rows(), level=0.9))
    assert "nothing to show" in rendered([])


def test_every_kind_of_record_has_a_table() -> None:
    data = rows()
    assert "seed" in rendered(run_table(data)).split("\n")[2]
    aggregate = rendered(aggregate_table(data, references=REFERENCES, aggregates=("iqm", "optimality_gap")))
    assert "IQM" in aggregate and "optimality gap" in aggregate and "normalised" in aggregate
    against = rendered(pairwise(data))
    assert "P(better)" in against and "difference" in against and max(map(len, against.splitlines())) <= 100


def test_references_stand_under_the_table() -> None:
    """A table without its floor can hide that random actions do as well."""
    known = {TASKS[0]: {"min": 1416.0, "max": 4249.0, "random_success": 0.42, "scripted_success": 1.0}}
    text = rendered(score_table(rows(), references=known))
    floor = "normalised 0 is return 1416 (random actions, 42% success), 100 is 4249 (scripted expert, 100%)"
    assert f"{TASKS[0].rsplit('/')[-1]}: {floor}" in " ".join(text.split())
    known[TASKS[0]]["simulator"] = "mujoco 3.3.0"
    text = rendered(score_table(rows(), references=known))
    assert f"(mujoco 3.3.0): {floor}" in " ".join(text.split())
    assert "normalised 0" not in rendered(score_table(rows()))


def test_percentages_say_where_they_say_little() -> None:
    known = {TASKS[0]: {"min": 900.0, "max": 11000.0}, TASKS[1]: {"min": -5000.0, "max": 4000.0}}
    records = relative_table(rows(success=False), references=known)
    text = rendered(records)
    assert max(map(len, text.splitlines())) <= 100
    cell = f"{records[1]['return_over']:+.0f}% [{records[1]['return_over_low']:+.0f}, "
    assert cell in text and "return, % over" in text and "all 2 tasks" in text
    assert "next to nothing says little: bc on drawer-close-v3 (return" in " ".join(text.split())
    assert "bc on button-press" not in " ".join(text.split())
    base = {"task": "t", "algorithm": "cvl", "baseline": "bc", "runs": 2, "baseline_runs": 2, "small_base": []}
    text = to_markdown([base | {"return_over": -0.2, "return_over_low": None, "return_over_high": None}])
    assert "| +0% |" in text and "the base may be 0 or less: bc on t (return)" in text


def test_a_tuning_budget_is_shown_with_what_chose() -> None:
    lines = to_markdown(tuning_table(rows(algorithms=("cvl 1", "cvl 2", "bc")), ["cvl*"])).splitlines()
    heading = "| task | settings | tried | seeds | episodes | return of the best | success of the best |"
    assert lines[0] == heading and lines[2].startswith("| drawer-close-v3 | cvl* | 1 | 3 | 4 | ")
    assert "%" in lines[2].split("|")[-2] and any("scored by the other half" in line for line in lines)


def test_csv_holds_everything() -> None:
    records = score_table(rows())
    lines = list(csv.DictReader(io.StringIO(to_csv(records))))
    assert [line["algorithm"] for line in lines] == ["bc", "cvl"] * 2
    assert float(lines[1]["return_mean"]) == records[1]["return_mean"]
    assert [float(x) for x in lines[0]["return_runs"].split(";")] == records[0]["return_runs"]
    assert lines[0]["normalised_mean"] == ""


def picture(path: Path | None) -> np.ndarray:
    assert path is not None
    pixels = imread(path)[..., :3]
    assert min(pixels.shape[:2]) > 200
    return pixels


def has_colour(pixels: np.ndarray, colour: str) -> bool:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return bool((np.abs(pixels - wanted).max(axis=-1) < 0.02).any())


def test_curves_show_every_algorithm(tmp_path: Path) -> None:
    pixels = picture(plot_curves(rows(algorithms=("bc", "cvl", "laeo")), tmp_path / "new" / "curves.png"))
    assert has_colour(pixels, "#777777") and has_colour(pixels, "#0072b2") and has_colour(pixels, "#d55e00")
    assert not has_colour(pixels, "#009e73")
    wider = picture(plot_curves(rows(TASKS[:1], success=False), tmp_path / "one.png"))
    assert wider.shape[0] < pixels.shape[0]  # one panel against two by two


def test_pictures_are_svg_too_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot_scores(score_table(rows()), tmp_path / f"{name}.png")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and "</svg>" in text and ">cvl<" in text


def test_the_table_of_curves_is_what_the_picture_shows() -> None:
    table = curve_table(rows(TASKS[:1]), resamples=20)
    assert [(record["algorithm"], record["updates"]) for record in table] == [
        ("bc", 1000), ("bc", 2000), ("cvl", 1000), ("cvl", 2000),
    ]  # fmt: skip
    (line, *_) = curve(rows(TASKS[:1]), resamples=20)
    assert [record["return_mean"] for record in table[:2]] == line["mean"]
    assert [record["return_mean_low"] for record in table[:2]] == line["low"]
    assert "success_mean" in table[0] and "success_mean" not in curve_table(rows(success=False), resamples=20)[0]
    assert curve_table(rows(steps=(1000,)), resamples=20) == []


def test_curves_of_a_single_step_are_not_drawn(tmp_path: Path) -> None:
    assert plot_curves(rows(steps=(1000,)), tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()


def test_profiles_show_every_algorithm_and_sample_efficiency_where_there_are_steps(tmp_path: Path) -> None:
    def drawn(steps: Sequence[int]) -> np.ndarray:
        data = rows(algorithms=("bc", "cvl"), steps=steps)
        tables = profile_table(data, resamples=20), efficiency_table(data, resamples=20)
        return picture(plot_profiles(*tables, tmp_path / "profiles.png"))

    both, alone = drawn((1000, 2000)), drawn((1000,))
    assert has_colour(both, "#777777") and has_colour(both, "#0072b2") and not has_colour(both, "#d55e00")
    assert both.shape[1] > 1.3 * alone.shape[1]
    assert plot_profiles([], [], tmp_path / "none.png") is None and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("seeds", [1, 3])
def test_scores_picture(tmp_path: Path, seeds: int) -> None:
    records = score_table(rows(seeds=seeds))
    pixels = picture(plot_scores(records, tmp_path / "scores.png"))
    assert has_colour(pixels, "#777777") and has_colour(pixels, "#0072b2")
    pale = [round(255 * (0.3 * c / 255 + 0.7)) for c in (0x00, 0x72, 0xB2)]  # the bar of the interval
    bar = (np.abs(pixels - np.array(pale) / 255).max(axis=-1) < 0.01).sum()
    assert bar > 500 if seeds > 1 else bar < 50  # a few pixels at a dot's edge come close to the colour of a bar


def test_metrics_picture(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": [1 / (i + 1), 2 / (i + 1)], "note": "x", "rate": 3.0 * i} for i in range(20)]
    pixels = picture(plot_metrics(lines, tmp_path / "metrics.png"))
    assert has_colour(pixels, "#0072b2")
    assert plot_metrics(lines[:1], tmp_path / "none.png") is None
    assert plot_metrics([{"step": 1, "loss": float("nan")}] * 3, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_tables_need_no_matplotlib() -> None:
    code = "import sys, cvlctl.score.render; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("bc", ["bc"]),
        ("laeo_pretrained_100", ["laeo_pretrained_", "100"]),
        ("cvl-fourier-0.3 of the second run", ["cvl-fourier-0.3 of", "the second run"]),
        ("averyveryverylongwordindeed", ["averyveryverylongwordindeed"]),
    ],
)
def test_long_names_break_between_words(name: str, lines: list[str]) -> None:
    assert folded(name, 18) == lines
