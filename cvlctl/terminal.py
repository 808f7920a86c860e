"""What reaches a terminal. Text out of files shows its control characters there, and never sends them.

A task called "\\x1b]0;owned\\x07" would else rename the window, move the cursor over earlier lines, or worse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# C0 and C1 without tab and line feed, what turns the direction of writing or breaks lines, and halves of surrogates
# (which stand for bytes of a file name that are no text, and cannot be encoded)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters spelt out, as \\x1b."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def print_text(text: str, *, end: str = "\n") -> None:
    """Plain text on stdout."""
    print(visible(text), end=end)


def console(**options: Any) -> Console:
    """A rich console, which takes brackets for what they are; `options` are those of `rich.console.Console`.

    There is no other way to one in this package.
    """
    return _console_class()(**{"markup": False, **options})


def print_table(console: Console, table: Table, key: int = 0, *, headings: bool = False) -> None:
    """A table, whole where there is room and into a pipe; else each of its rows as lines, so that no name is broken.

    Args:
        key: the column that tells rows apart.
        headings: of lines too, before each value.
    """
    from rich.padding import Padding
    from rich.text import Text

    caption, table.caption = table.caption, None  # rich would break it where the table is narrow
    natural = console.measure(table, options=console.options.update(max_width=10**6)).maximum
    whole = natural <= console.width or not console.is_terminal
    if whole and (table.row_count or not caption):
        table.width = natural
        console.print(table, crop=False)
    if table.title and not whole:
        console.print(table.title, soft_wrap=True)
    for row in () if whole else zip(*(column.cells for column in table.columns), strict=True):
        texts = [cell if isinstance(cell, Text) else Text(str(cell)) for cell in row]
        names = [Text(f"{column.header} " if headings else "") for column in table.columns]
        others = [names[number] + text for number, text in enumerate(texts) if number != key and text.plain]
        console.print(texts[key], soft_wrap=True)
        console.print(Padding(Text(", ").join(others), (0, 0, 0, 4)))
    if caption:
        console.print(caption, soft_wrap=True)


@cache
def _console_class() -> type[Console]:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment
    from rich.text import Text

    class Screen(Console):
        def render_str(self, text: str, **options: Any) -> Text:
            """What is given as text: here tables measure it."""
            return super().render_str(visible(text), **options)

        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
            """Everything that is printed, however it was given; what rich itself sends to the terminal is marked so."""
            for segment in super().render(renderable, options):
                yield segment if segment.control else segment._replace(text=visible(segment.text))

    return Screen
