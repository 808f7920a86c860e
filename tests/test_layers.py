"""Who may import whom: left may import right, never back (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cvlctl"
LAYERS = [
    ["cli", "cli_data", "__main__"],
    ["commands"],
    ["recipes"],
    ["schema"],
    ["algorithms", "rollout", "envpool_backend", "report", "critics", "labellers", "formats"],
    ["training", "checkpoints", "runs", "scores", "envs", "policies", "workers", "console", "experiments"],
    ["recipefile"],
    ["store", "writer", "networks", "replay"],
    ["losses", "samplers"],
    ["types"],
    ["files"],
    ["errors", "version", "machine"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
LIGHT = {"torch", "numpy", "cvlctl", "math", "dataclasses", "typing", "collections", "__future__", "types"}


def imports(path: Path) -> list[str]:
    """Absolute module names imported anywhere in a file, `from cvlctl import x` as cvlctl.x."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = node.module == "cvlctl"
            found += [f"cvlctl.{alias.name}" for alias in node.names] if inside else [node.module]
    return found


def test_every_module_has_a_layer_and_keeps_to_it() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        own = path.relative_to(PACKAGE).with_suffix("").parts
        if own == ("__init__",):
            continue
        assert own[0] in LEVEL, f"{path} has no layer"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "cvlctl" or len(parts) == 1 or parts[1] == own[0] or parts[1] not in LEVEL:
                continue
            assert LEVEL[parts[1]] >= LEVEL[own[0]], f"{path.name} imports {name}, which lies above it"


def test_algorithms_import_only_shared_parts_of_each_other() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        if path.stem != "__init__":
            others = {n.split(".")[2] for n in imports(path) if n.startswith("cvlctl.algorithms.")}
            assert others <= {"occupancy", "actors", "values", "readouts"}, path


def test_a_training_step_needs_torch_and_numpy_alone() -> None:
    for folder in ("algorithms", "losses"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert {name.split(".")[0] for name in imports(path)} <= LIGHT, path


def test_zarr_is_imported_by_the_store_and_its_writer_alone() -> None:
    users = [p.stem for p in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "zarr" for n in imports(p))]
    assert sorted(users) == ["store", "writer"]


def test_nothing_can_load_a_pickle() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert "import pickle" not in source and "torch.load" not in source and "allow_pickle=True" not in source, path
