"""What recipes say of an environment of one's own, beside the task that names it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

from cvlctl.play import envs
from cvlctl.play.settings import Settings
from cvlctl.recipes.values import Name, Strict, not_bool

Side = Annotated[float, BeforeValidator(not_bool)] | tuple[Annotated[float, BeforeValidator(not_bool)], ...]


class EnvRecipe(Strict):
    """How it is made, and what of it is read; see docs/environments.md."""

    kwargs: dict[str, Any] = {}  # handed to whatever makes it
    success: Name | None = None  # key of `info`; None: success or is_success, where there is one
    keys: tuple[Name, ...] = ()  # of a Dict of observations, in this order; (): all but images
    action_bounds: tuple[Side, Side] | None = None  # low and high; None: those of its action space


def settings_of(task: str, env: EnvRecipe | None) -> Settings | None:
    """For `envs.make`, of a task that a recipe names: its code may be imported from here on."""
    return envs.named(task, None if env is None else env.model_dump())
