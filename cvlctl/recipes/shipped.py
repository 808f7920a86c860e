"""Recipes that travel with cvlctl, in an installed wheel as in a checkout: finding, reading and copying them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

import cvlctl
from cvlctl.errors import CvlctlError
from cvlctl.files import write_result
from cvlctl.folders import replacing
from cvlctl.recipes.explain import nearest

SCHEMAS = "schemas"  # the folder of JSON Schemas beside the recipes
_MODELINE = re.compile(r"(# yaml-language-server: \$schema=)(\S+)")
_DATA = re.compile(r"\bdata/[\w./-]+\.zarr\b")


class Copied(NamedTuple):
    """What `copy` did."""

    recipe: Path
    data: list[Path]  # stores that travel with cvlctl and that the recipe names, copied too


def root() -> Path:
    """The folder that holds `recipes` and `data`: inside the wheel, or the checkout's own."""
    package = Path(cvlctl.__file__).parent
    found = [
        folder for folder in (package / "shipped", package.parent) if (folder / "recipes" / "quickstart.yaml").is_file()
    ]
    if not found:
        raise CvlctlError(
            "no recipes came with this cvlctl", "install it from its wheel, or run it from its repository"
        )
    return found[0]


def names() -> dict[str, Path]:
    """Each shipped recipe by its name: `quickstart`, `methods/rewards`."""
    folder = root() / "recipes"
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find(name: str) -> Path:
    """The recipe of a name, or of the last part of one, if one alone has it."""
    plain = name.removesuffix(".yaml").removeprefix("recipes/")
    there = names()
    found = [plain] if plain in there else [each for each in there if each.split("/")[-1] == plain]
    if len(found) > 1:
        raise CvlctlError(f"{len(found)} recipes are called {plain}", f"say which: {', '.join(found)}")
    if not found:
        raise CvlctlError(f"no recipe {name!r} came with cvlctl", nearest(plain, [*there], "names"))
    return there[found[0]]


def copy(name: str, to: Path, *, force: bool = False) -> Copied:
    """Copy a recipe to a file or into a folder; and into `data` of that folder the stores that it names and that came
    with cvlctl. What is there already stays, unless `force` replaces the recipe."""
    source = find(name)
    target = to if to.suffix in (".yaml", ".yml") else to / source.name
    if not target.parent.is_dir():
        raise CvlctlError(f"no directory {target.parent}", "make it first, or name one that is there")
    text = source.read_text(encoding="utf-8")
    schemas = root() / "recipes" / SCHEMAS
    text = _MODELINE.sub(lambda line: line[1] + str(schemas / line[2].split("/")[-1]), text)
    if target.exists() and not force and target.read_bytes() != text.encode():
        raise CvlctlError(f"{target} exists", "name another file, or --force replaces it")
    data = [made for made in (_copied(place, target.parent) for place in _stores(text)) if made]
    write_result(target, text.encode(), force=force)
    return Copied(target, data)


def _stores(text: str) -> list[str]:
    return [place for place in dict.fromkeys(_DATA.findall(text)) if (root() / place).is_dir()]


def _copied(place: str, folder: Path) -> Path | None:
    """A store of ours, file by file, if there is none of the name yet."""
    source, target = root() / place, folder / place
    if target.exists():
        return None
    with replacing(target, folder=True) as made:
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            copied = made / file.relative_to(source)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
    return target
