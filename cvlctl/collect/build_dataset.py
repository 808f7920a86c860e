"""`cvlctl build-dataset`: a store of one task, or of several at once."""

from __future__ import annotations

from typing import Any

from cvlctl.collect.build import build
from cvlctl.collect.build_many import build_many
from cvlctl.collect.recipe import BuildManyRecipe, BuildRecipe


def build_dataset(recipe: BuildRecipe | BuildManyRecipe, *, force: bool = False) -> Any:
    """What `build` returns; of several tasks a list of it, a process each."""
    return build_many(recipe, force=force) if isinstance(recipe, BuildManyRecipe) else build(recipe, force=force)
