"""Tiny runs of every method, on the data of a moving point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cvlctl import checkpoints
from cvlctl.experiments import commands
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.finetune import finetune
from cvlctl.learn.pretrain import pretrain

COMMON = "batch_size: 32, compile: false, threads: 1, log_every_steps: 10"


CRITIC = "{hidden: [32, 32], latent_dim: 8, gamma: 0.9}"


TD = [name for name in ALGORITHMS if name not in ("cvl", "laeo", "bc", "goal_conditioned", "fqe")]  # fqe: test_fqe.py


ALL = [
    "occupancy",
    "occupancy-td",
    "cvl-iterated",
    "laeo-td",
    "cvl-spectral",
    "cvl",
    "cvl-fourier",
    "laeo",
    "bc",
    "goal_conditioned",
    "goal_conditioned-command",
    "goal_conditioned-iterated",
    *TD,
]
# by default: variants share their code with others, which are tried
VARIANTS = ("cvl-spectral", "laeo-td", "goal_conditioned-command", "goal_conditioned-iterated")
MOST = [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in ALL]


def load(kind: str, store: Path, out: Path, text: str, *overrides: str) -> Any:
    path = out.with_name(out.name + ".yaml")
    path.write_text(f"{{stores: ['{store}'], out: '{out}', {COMMON}, {text}}}")
    return commands.load(path, list(overrides), kind)


def recipe_of(name: str, store: Path, out: Path, *overrides: str) -> Any:
    by_next = f"{CRITIC[:-1]}, loss: td_info_nce"
    if name.startswith("occupancy"):
        critic = f"{by_next}}}" if name == "occupancy-td" else CRITIC
        return load("pretrain", store, out, f"steps: 100, critic: {critic}", *overrides)
    algorithm = {name: f"{{name: {name}, hidden: [32]}}" for name in TD} | {
        "bc": "{name: bc, hidden: [32]}",
        "goal_conditioned": f"{{name: goal_conditioned, hidden: [32], critic: {CRITIC}}}",
        "goal_conditioned-command": "{name: goal_conditioned, hidden: [32], "
        f"critic: {CRITIC[:-1]}, future_columns: [0, 1], command_columns: [2, 3]}}}}",
        "goal_conditioned-iterated": "{name: goal_conditioned, hidden: [32], improvement: iterated, "
        f"critic: {by_next}}}}}",
        "laeo-td": f"{{name: laeo, hidden: [32], critic: {by_next}}}}}",
        "cvl-iterated": "{name: cvl, hidden: [32], bank_size: 64, improvement: iterated, "
        f"critic: {by_next}, twin: true}}}}",
        "cvl-spectral": f"{{name: cvl, hidden: [32], bank_size: 64, critic: {CRITIC[:-1]}, loss: spectral}}}}",
        "laeo": f"{{name: laeo, hidden: [32], critic: {CRITIC}}}",
        "cvl": f"{{name: cvl, hidden: [32], bank_size: 64, num_actions: 2, critic: {CRITIC}}}",
        "cvl-fourier": "{name: cvl, readout: fourier, num_features: 64, xi_ema_rate: 0.5, hidden: [32], "
        f"critic: {CRITIC}}}",
    }
    examples = f", success_examples: {{from: '{store}'}}" if name.startswith("laeo") else ""
    return load("finetune", store, out, f"steps: 100, algorithm: {algorithm[name]}{examples}", *overrides)


def run(name: str, store: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return (pretrain if name.startswith("occupancy") else finetune)(recipe_of(name, store, out, *overrides))


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(out / "checkpoints" / "last.safetensors")[0]


def without(file: Path, *keys: str) -> None:
    """Take keys out of a checkpoint's metadata."""
    state, metadata = checkpoints.load(file)
    checkpoints.save(file, state, {key: value for key, value in metadata.items() if key not in keys})
