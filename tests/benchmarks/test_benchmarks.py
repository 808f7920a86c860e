"""What the benchmarks share, in small: turns, ratios, records, and all of them at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cvlctl.learn.settings import Settings

Script = Callable[[str], Any]


def test_ratios_are_of_the_same_round(script: Script) -> None:
    common = script("common")
    # the machine halves its speed after every round; the ratio does not notice
    found = common.summary({"peer": [8.0, 4.0, 2.0], "ours": [16.0, 8.0, 4.0]}, "peer")
    assert found["ours"] == {"updates_per_second": 8.0, "ratio": 2.0, "ratio_min": 2.0, "ratio_max": 2.0}


def test_above_one_we_are_ahead_whatever_the_unit(script: Script) -> None:
    common = script("common")
    rates = common.versus("work", "peer", [16.0, 8.0, 12.0], [8.0, 4.0, 4.0], threads=1, least=2, aim=2.5)
    assert [rates[name] for name in ("ratio", "low", "high", "ours", "theirs")] == [2, 2, 3, 12, 4]
    times = common.versus("work", "peer", [2.0, 1.0], [6.0, 4.0], unit="seconds", threads=1, least=4)
    assert [times[name] for name in ("ratio", "low", "high", "ours", "theirs")] == [3.5, 3, 4, 1.5, 5]
    assert [common.reached(row) for row in (rates, times)] == ["reached, aim missed", "missed"]
    assert common.reached(rates | {"ratio": 2.5}) == "aim reached"
    assert common.reached(rates | {"least": None}) == "aim missed"
    assert common.reached(rates | {"least": None, "aim": None}) == ""


def test_a_turn_does_not_compile_again(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    common = script("common")
    monkeypatch.setattr(torch.compiler, "reset", lambda: pytest.fail("forgot what was compiled"))
    threads, before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    common.configure(Settings("cpu", threads, "medium", True))
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision(before)


def test_all_at_once_goes_on_where_one_fails_and_says_what_was_missed(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = script("run")
    small = ["--small", "--out", str(tmp_path)]
    assert run.main([*small, "--only", "critic", "startup"]) == 0
    ((kind, first),) = json.loads((tmp_path / "results.json").read_text()).items()
    assert {name: len(found["comparisons"]) for name, found in first.items()} == {"startup": 1, "critic": 4}
    assert "[2/2" in capsys.readouterr().out

    monkeypatch.setitem(run.SCRIPTS, "startup", ["--runs", "none"])
    assert run.main([*small, "--only", "startup"]) == 1
    assert "FAILED" in capsys.readouterr().out
    second = json.loads((tmp_path / "results.json").read_text())[kind]
    assert second["critic"] == first["critic"]
    assert "invalid int value" in second["startup"]["failed"]
    page = (tmp_path / "performance.md").read_text()
    assert "Not run: sac, td_learners, evaluation" in page
    assert "| **failed**: exit code 2" in page and "cvlctl --help" not in page and "InfoNCE critic" in page

    (tmp_path / "startup.json").unlink()  # a clean clone has what was committed
    second["startup"] = first["startup"]
    second["startup"]["comparisons"][0] |= {"ratio": 0.93}
    second["critic"]["comparisons"][0] |= {"ratio": 2.5}
    for row in second["critic"]["comparisons"][2:]:
        row["ratio"] = 0.5
    (tmp_path / "results.json").write_text(json.dumps({kind: second}))
    (tmp_path / "critic.json").write_text(json.dumps(second["critic"]))
    assert run.main(["--write", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "performance.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith(("| cvlctl --help", "| InfoNCE critic"))]
    assert [line.split("|")[-2].strip() for line in rows] == ["**missed**", "reached", ""]
    assert "of 4 with a least ratio 3 reach it, 1 miss it" in page
    assert "### CVL's whole update" in page and "cvlctl, eager" in page


def test_another_processor_is_kept_beside(script: Script, tmp_path: Path) -> None:
    run, results = script("run"), tmp_path / "results.json"
    row = run.reached.__globals__["comparison"](
        "work", "peer", 2.5, low=2, high=3, ours=5, theirs=2, unit="updates/s", threads=2, least=2
    )

    def found(cpu: str, ratio: float) -> dict[str, Any]:
        state = {"cpu": cpu, "instructions": "AVX2", "cpus": 2, "load_average": [0], "versions": {"torch": "2"}}
        return {"comparisons": [row | {"ratio": ratio}], "machine": state, "load_average_after": [0], "seconds": 1}

    for cpu, ratio in (("Intel", 2.5), ("AMD", 1.5), ("AMD", 1.75)):  # the same one again replaces its own alone
        (tmp_path / "critic.json").write_text(json.dumps(found(cpu, ratio)))
        assert run.main(["--write", "--out", str(tmp_path)]) == 0
    kept = json.loads(results.read_text())
    assert {kind: scripts["critic"]["comparisons"][0]["ratio"] for kind, scripts in kept.items()} == {
        "AMD, AVX2": 1.75, "Intel, AVX2": 2.5
    }  # fmt: skip
    page = (tmp_path / "performance.md").read_text()
    assert "| work | peer | threads | AMD, AVX2 | Intel, AVX2 |" in page
    assert "| work | peer | 2 | 1.75x missed | 2.50x reached |" in page
    assert "* work, beside peer: missed on AMD, AVX2, not on Intel, AVX2" in page
    assert page.count("1 comparisons; of 1 with a least ratio") == 2 and "## Intel, AVX2" in page
    assert page.count("Update rates of fresh states, measured before they were aged: critic.") == 2


def test_small_numbers_do_not_replace_real_ones(script: Script) -> None:
    with pytest.raises(SystemExit):
        script("run").main(["--small"])


def test_contestants_take_turns(script: Script) -> None:
    common, said = script("common"), []
    ways = {name: lambda name=name: said.append(name) or len(said) for name in "ab"}
    assert common.turns(ways, 3) == {"a": [1, 3, 5], "b": [2, 4, 6]}
    assert "".join(said) == "ababab"


def test_a_script_says_what_it_measures_and_the_rest_is_shared(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common, file = script("common"), tmp_path / "new" / "found.json"
    options = common.parser("What it is.", threads=None, rounds=2)

    def benchmark(args: Any) -> dict[str, Any]:
        assert not hasattr(args, "threads") and not hasattr(args, "device")
        curve = {"title": "a curve", "columns": ["n", "y"], "rows": [[1, 2]], "note": "a note"}
        row = common.versus("work", "peer", [2.0] * args.rounds, [1.0] * args.rounds, threads=1)
        return {"comparisons": [row], "curves": [curve]}

    common.main(options, benchmark, ["--json", str(file)])
    found = json.loads(file.read_text())
    assert found["comparisons"][0]["ratio"] == 2 and found["machine"]["cpus"] >= 1 and found["load_average_after"]
    said = capsys.readouterr().out
    assert "a curve" in said and "a note" in said and "work / peer" in said and "2.00x" in said


def test_every_script_is_run_in_small() -> None:
    here = Path(__file__).parent
    scripts = [path.stem for path in (here.parents[1] / "benchmarks").glob("*.py") if "def main(" in path.read_text()]
    tests = "".join(path.read_text() for path in here.glob("test_*.py"))
    assert [name for name in scripts if f'script("{name}")' not in tests] == ["startup"]  # by `run`, below


def test_the_page_is_that_of_the_results(script: Script) -> None:
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results.json").read_text())
    assert script("run").page(results) == (root / "docs" / "performance.md").read_text(), "run.py --write"
