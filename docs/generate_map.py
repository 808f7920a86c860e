"""Write the map in docs/architecture.md: every room, every file in it, and the first line of its docstring.

    python docs/generate_map.py [--check]

With --check it writes nothing; exit code 1 where the page is not current.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- map: python docs/generate_map.py -->\n", "<!-- end of the map -->\n"
ORDER = ("cli", "experiments", "collect", "score", "learn", "data", "play", "recipes")  # the pipeline, from above


def about(path: Path) -> str:
    """The opening of a file's docstring, up to its first blank line."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return " ".join(text.split()).rstrip(".").replace("|", "\\|")


def rows(folder: Path) -> Iterator[str]:
    """A line a file; of a folder inside a room its own line, with its files' names."""
    for path in sorted(folder.glob("*.py")):
        if path.stem not in ("__init__", "__main__"):
            yield f"| `{path.stem}` | {about(path)} |"
    for inner in sorted(path.parent for path in folder.glob("*/__init__.py")):
        names = ", ".join(f"`{path.stem}`" for path in sorted(inner.glob("*.py")) if path.stem != "__init__")
        yield f"| `{inner.name}/` | {about(inner / '__init__.py')}: {names} |"


def table(title: str, lines: Iterator[str]) -> str:
    title = textwrap.fill(title, 120, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"{title}\n", "| file | what it is |", "|---|---|", *lines]) + "\n\n"


def the_map() -> str:
    package = ROOT / "cvlctl"
    assert {path.parent.name for path in package.glob("*/__init__.py")} == set(ORDER), "a room is missing in ORDER"
    rooms = [table(f"**{name}/** {about(package / name / '__init__.py')}.", rows(package / name)) for name in ORDER]
    ground = (line for line in rows(package) if "/` |" not in line)
    return "".join(rooms) + table("**The ground**, which every room stands on.", ground)


def main() -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    current = f"{before}{BEGIN}\n{the_map()}{END}{rest.split(END)[1]}"
    if "--check" in sys.argv:
        sys.exit(0 if text == current else f"{PAGE} is not current: run python docs/generate_map.py")
    PAGE.write_text(current)


if __name__ == "__main__":
    main()
