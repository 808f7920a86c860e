"""One module a command: a typed recipe in, a plain dict out; `render` functions show it to people."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

COMMANDS = {
    "build-dataset": "cvlctl.commands.build_dataset:command",
    "pretrain": "cvlctl.commands.pretrain:pretrain",
    "finetune": "cvlctl.commands.finetune:finetune",
    "evaluate": "cvlctl.commands.evaluate:evaluate",
}


def function(command: str) -> Callable[..., dict[str, Any]]:
    """What a step's command calls: (recipe, *, force) -> result. Imported now, and not before."""
    module, name = COMMANDS[command].split(":")
    return getattr(import_module(module), name)
