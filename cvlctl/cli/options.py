"""What the commands' arguments and options share: types with their help, completion, registration."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from cvlctl.errors import CvlctlError
from cvlctl.paths import expanded

Command = TypeVar("Command", bound=Callable[..., Any])
FORMATS = (
    "d4rl",
    "minari",
    "ogbench",
    "robomimic",
    "hdf5",
    "sb3",
    "npz",
    "lerobot",
    "rlds",
    "zarr",
    "imitation",
    "table",
    "arrays",
)


def stores(incomplete: str) -> list[str]:
    """Completion: stores under data/ and under the directory typed so far. It looks at names alone."""
    typed = incomplete.rpartition("/")[0]
    roots = {"data", typed} - {""}
    found = set()
    for root in roots:
        for folder, children, _ in os.walk(root):
            found |= {os.path.join(folder, name) for name in children if name.endswith(".zarr")}
            children[:] = [name for name in children if not name.endswith((".zarr", ".partial", ".old"))]
    return sorted(name for name in found if name.startswith(incomplete))


def formats(incomplete: str) -> list[str]:
    """Completion: formats. A test holds `FORMATS` to `cvlctl.data.formats`, which is slow to import."""
    return [name for name in FORMATS if name.startswith(incomplete)]


def keys(context: typer.Context, incomplete: str) -> list[str]:
    """Completion: keys of the command's recipes, dotted, and the values that a key is one of."""
    from cvlctl.recipes import completion

    recipe = context.params.get("recipe") or context.params.get("experiment")
    return completion.keys(str(context.info_name), Path(recipe) if recipe else None, incomplete)


class Rule(StrEnum):
    """Which states `examples` takes."""

    successes = "successes"
    last = "last"


class Bad(StrEnum):
    """With what in them episodes are not imported."""

    nan = "nan"


Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, errors too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at --out, once the new one is complete.")]
Store = Annotated[
    Path,
    typer.Argument(help="A store, such as data/x.zarr.", show_default=False, metavar="STORE", autocompletion=stores),
]
Format = Annotated[
    str,
    typer.Argument(help="See `cvlctl data formats`.", show_default=False, metavar="FORMAT", autocompletion=formats),
]
Out = Annotated[Path, typer.Option("--out", help="Where the new store goes.", show_default=False)]
Seed = Annotated[int, typer.Option("--seed", help="Of the draw.", min=0)]
Label = Annotated[str, typer.Option("--label", help="Whose rewards and successes count.")]


def register(app: typer.Typer, name: str, panel: str | None, example: str) -> Callable[[Command], Command]:
    """Make a function a command of `app`, with an example of its use below its help. Its paths may hold ~ and $NAME."""

    def made(function: Command) -> Command:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            return function(**{key: _sound(key, value) for key, value in given.items()})

        app.command(name, rich_help_panel=panel, epilog=f"Example: {example}")(command)
        return function

    return made


def _sound(name: str, value: Any) -> Any:
    """An argument with its paths expanded."""
    if isinstance(value, list):
        return [_sound(name, one) for one in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise CvlctlError(f"--{name} is too large a number")
    return Path(expanded(str(value))) if isinstance(value, Path) else value
