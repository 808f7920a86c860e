"""The written documentation of the command line is that of the command line."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

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
    assert len(commands) == 23
    for path, command in commands:
        assert f"# {path}\n" in page
        assert command.help
        assert command.epilog.startswith(f"Example: {path}")
        assert all(parameter.help for parameter in command.params), path


def anchors(text: str) -> set[str]:
    """Of a page's headings, as they are made of their words."""
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere_and_nothing_is_left_to_fill_in() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *ROOT.glob("*/README.md")]:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not target.startswith("http"):
                place = page.parent / target if target else page
                assert place.exists(), f"{page}: {target}"
                assert not anchor or anchor in anchors(place.read_text()), f"{page}: {target}#{anchor}"
        assert not re.search(r"^[A-Z]{6,}$", text, re.M), f"{page}: a placeholder"
