"""The benchmark of imports, tiny."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest
from toy_stores import many

from cvlctl.data.writer import write_store


def test_benchmark_of_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)  # put back afterwards: the script sets it
    import importing

    write_store(tmp_path / "a.zarr", many(5), task="toy")
    out = tmp_path / "found.json"
    importing.main(["--transitions", "3000", "--store", str(tmp_path / "a.zarr"), "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    assert found["import"]["times"][importing.RAW]["ratio"] == 1.0
    assert found["import"]["times"][importing.IMPORT]["seconds"] > 0
    assert found["load"]["times"][importing.LOAD]["size_mb"] >= 0
    assert (importing.MINARI in found["load"]["times"]) == bool(importlib.util.find_spec("minari"))
    assert "cvlctl imports" in capsys.readouterr().out
