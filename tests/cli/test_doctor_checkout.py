"""`cvlctl doctor` where cvlctl runs from a checkout and is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from cvlctl.cli import doctor
from cvlctl.cli.app import app
from cvlctl.cli.console import execute


def missing(name: str) -> Any:
    raise doctor.metadata.PackageNotFoundError(name)


def test_doctor_tells_of_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", missing)
    monkeypatch.setattr(doctor.metadata, "metadata", missing)
    assert execute(app, ["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "==3.3.0" in shown and "extra dev" in shown and "extra envpool" in shown
    rows = {row["name"]: row for row in doctor._packages(None)}
    assert rows["torch"]["ok"] and "pytest" not in rows
    assert "pytest" in {row["name"] for row in doctor._packages("dev")}


def test_an_extras_condition_is_added_to_its_own() -> None:
    both = Requirement(doctor._of_extra("d4rl==1.1; python_version < '3.12' or python_version > '4'", "d4rl"))
    assert both.marker and both.marker.evaluate({"extra": "d4rl", "python_version": "3.11"})
    assert not both.marker.evaluate({"extra": "", "python_version": "3.11"})
    assert not both.marker.evaluate({"extra": "d4rl", "python_version": "3.12"})


def test_doctor_tells_of_a_package_that_lies_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", missing)
    monkeypatch.setattr(doctor.metadata, "metadata", missing)
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "cvlctl" / "cli" / "doctor.py"))
    assert list(doctor._packages(None)) == [] and doctor._extras() == []
