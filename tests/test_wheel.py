"""The wheel, in an empty directory: recipes and the replay of the quickstart came along."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "cvlctl", "recipes", "data")


def test_the_wheel_has_all_that_the_first_commands_need(tmp_path: Path) -> None:
    source, site, empty = tmp_path / "source", tmp_path / "site", tmp_path / "empty"
    source.mkdir(), empty.mkdir()
    for name in SOURCE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, source / name)
    (source / "data" / "mine.zarr").mkdir(exist_ok=True)
    pip = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    shipped = site / "cvlctl" / "shipped"
    assert {path.name for path in (shipped / "data").iterdir()} == {"README.md", "door-close-replay.zarr"}

    def cvlctl(*words: str) -> str:
        line = [sys.executable, "-P", "-m", "cvlctl", *words]
        done = subprocess.run(
            line, cwd=empty, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "methods/rewards" in cvlctl("recipes", "ls")
    cvlctl("recipes", "cp", "quickstart", ".")
    assert "to do: about" in cvlctl("run", "quickstart.yaml", "--dry-run")
    text = (empty / "quickstart.yaml").read_text()
    schema = text.split("$schema=")[1].split()[0]
    assert Path(schema) == shipped / "recipes" / "schemas" / "run.json" and Path(schema).is_file()
    assert sorted(path.name for path in empty.iterdir()) == ["data", "quickstart.yaml"]
