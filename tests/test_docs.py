"""The documentation is true where that can be read off: commands, links, paths, names of modules; and can be read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.main import get_command

from cvlctl.cli.app import app

ROOT = Path(__file__).parents[1]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(command: Any, path: str) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", {})
    below = [leaf for name, child in children.items() for leaf in leaves(child, f"{path} {name}")]
    return below or [(path, command)]


def test_cli_md_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == generator().page(), "run python docs/generate_cli.py"


def test_every_command_is_documented_with_an_example_and_every_option_explained() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    commands = leaves(get_command(app), "cvlctl")
    assert len(commands) >= 23  # it finds them
    for path, command in commands:
        assert f"# {path}\n" in page
        assert command.help
        assert command.epilog.startswith(f"Example: {path}")
        assert all(parameter.help for parameter in command.params), path


def anchors(text: str) -> set[str]:
    """Of a page's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]
FOLDERS = ("cvlctl", "tests", "benchmarks", "docs", "recipes")
FILES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
MODULES = [Path(name).with_suffix("").parts for name in FILES if name.startswith("cvlctl/") and name.endswith(".py")]
# of other projects and of users; and one of an earlier version, of which is told what became
NOT_OURS = {
    "report.html",
    "infos.py",
    "minari.load_dataset",
    "ogbench.utils.load_dataset",
    "json.py",
    "learn/training.py",
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@each_page
def test_paths_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"(?<![\w/.-])(?:cvlctl|tests|recipes|docs|benchmarks)/[\w./-]*\w", text):
        assert "." not in path or (ROOT / path).exists() or f"cvlctl/{path}" in FILES, path
    for name in set(re.findall(r"`([\w/]+\.py)`", text)) - NOT_OURS:
        assert any(f"/{file}".endswith(f"/{name}") for file in FILES), name


@each_page
def test_modules_that_a_page_names_hold_what_is_said(page: Path) -> None:
    """`algorithms.actors.improve`: in some room a module of that name, which defines the rest."""
    starts = {part for module in MODULES for part in module[1:]} - {"provenance"}  # a key of stores, too
    for name in set(re.findall(r"`([a-z_0-9]+(?:\.[A-Za-z_0-9]+)+)`", page.read_text())) - NOT_OURS:
        parts = name.split(".")
        if parts[0] in starts and parts[-1] not in ("py", "yaml"):
            assert any(holds(module, parts) for module in MODULES), name


def holds(module: tuple[str, ...], name: list[str]) -> bool:
    """Whether a dotted name begins with the module's own, rooms in full or left out, and the rest is defined there."""
    source = ROOT.joinpath(*module).with_suffix(".py").read_text()
    for known in range(1, len(name) + 1):
        defined = (rf"^ *((def|class) {part}\b|{part}\b.* = )" for part in name[known:])
        if list(module[-known:]) == name[:known] and all(re.search(line, source, re.M) for line in defined):
            return True
    return False


@each_page
def test_prose_is_no_wider_than_code(page: Path) -> None:
    """Lines that people read in an editor; tables, code and pictures apart."""
    fenced = False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        if not fenced and not line.startswith(("|", "    ", "![")):
            assert len(line) <= 120, f"{page}:{number}: {len(line)} columns"


def test_links_lead_somewhere_and_nothing_is_left_to_fill_in() -> None:
    for page in [ROOT / "CHANGELOG.md", *PAGES]:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not target.startswith("http"):
                place = page.parent / target if target else page
                assert place.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(place.read_text()), f"{page}: {target}#{anchor}"
        assert not re.search(r"^[A-Z]{6,}$", text, re.M), f"{page}: a placeholder"
