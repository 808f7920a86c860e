"""Who may import whom (docs/architecture.md): rooms from left to right, never back; no two files import each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "cvlctl"
# left may import right; what stands in one group may not import each other, but for what a folder holds
ROOMS = [
    ["__main__"],
    ["cli"],
    ["experiments"],
    ["collect", "score"],
    ["learn"],
    ["data"],
    ["play"],
    ["recipes"],
    ["runs", "folders", "figures", "frames"],
    ["checkpoints", "children", "interrupts", "progress", "rates"],
    ["cell", "units"],
    ["files", "paths", "types"],
    ["machine", "streams", "version", "errors"],
    ["terminal"],
]
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
LIGHT = {"torch", "numpy", "cvlctl", "math", "dataclasses", "typing", "collections", "__future__", "types"}
SHARED = {"occupancy", "actors", "values", "readouts"}  # what algorithms may import of each other
STEP = {  # what a training step may import of cvlctl: nothing that needs more than torch and numpy
    "cvlctl.learn.algorithms", "cvlctl.learn.losses", "cvlctl.learn.networks", "cvlctl.learn.updates",
    "cvlctl.learn.encoders", "cvlctl.play.convolutions", "cvlctl.data.samplers", "cvlctl.data.statistics",
    "cvlctl.types", "cvlctl.errors",
}  # fmt: skip


def name_of(path: Path) -> str:
    """cvlctl/data/store.py -> cvlctl.data.store; a folder's __init__.py is the folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> Iterator[str]:
    """Absolute names of the modules imported anywhere in a file; of `from a import b`, a.b where that is a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


GRAPH = {name: {found for found in imports(path) if found in FILES} for name, path in FILES.items()}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_file_has_a_room_and_no_import_runs_back() -> None:
    for name, found in GRAPH.items():
        if name == "cvlctl":  # the public API, loaded on first use
            continue
        assert room(name) in LEVEL, f"{name} has no room"
        for other in found - {"cvlctl"}:
            inside = room(other) == room(name)
            assert inside or LEVEL[room(other)] > LEVEL[room(name)], f"{name} imports {other}, which lies above it"


def test_no_two_files_import_each_other_by_whatever_way() -> None:
    clear: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle: {' > '.join((*way[way.index(name) :], name))}"
        if name not in clear:
            for other in GRAPH[name] - {"cvlctl"}:
                visit(other, (*way, name))
            clear.add(name)

    for name in FILES:
        visit(name, ())


def test_algorithms_import_only_shared_parts_of_each_other() -> None:
    for name, found in GRAPH.items():
        if name.startswith("cvlctl.learn.algorithms."):
            others = {n.split(".")[3] for n in found if n.startswith("cvlctl.learn.algorithms.")}
            assert others <= SHARED, name


@pytest.mark.parametrize("folder", ["algorithms", "losses"])
def test_a_training_step_needs_torch_and_numpy_alone(folder: str) -> None:
    for path in (PACKAGE / "learn" / folder).glob("*.py"):
        found = set(imports(path))
        assert {name.split(".")[0] for name in found} <= LIGHT, path
        ours = {name for name in found if name.startswith("cvlctl")}
        assert all(any(name == step or name.startswith(f"{step}.") for step in STEP) for name in ours), (path, ours)
    for name in STEP & set(FILES):
        assert {found.split(".")[0] for found in imports(FILES[name])} <= LIGHT | {"contextlib", "itertools"}, name


def test_recipes_know_no_step() -> None:
    for name, path in FILES.items():
        if room(name) == "recipes":
            text = path.read_text()
            assert not [step for step in ("collect", "learn", "score", "data", "play") if f"cvlctl.{step}" in text], (
                name
            )


def test_zarr_is_imported_by_the_store_its_arrays_and_its_writer_alone() -> None:
    users = [name for name, path in FILES.items() if "zarr" in {found.split(".")[0] for found in imports(path)}]
    assert users == [f"cvlctl.data.{name}" for name in ("arrays", "chunks", "store", "writer")]


def test_nothing_can_load_a_pickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source and "torch.load" not in source and "allow_pickle=True" not in source, path


def test_the_map_in_architecture_md_is_that_of_the_files() -> None:
    assert subprocess.run([sys.executable, ROOT / "docs" / "generate_map.py", "--check"]).returncode == 0


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone, and would leave the second out of a run of all."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
