"""Stores that several files look at, built once; nobody writes to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_builds import CONTRASTIVE, OneStep, recipe_for

from cvlctl.collect.build import build
from cvlctl.play import envs


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("built") / "pendulum.zarr"
    return out, build(recipe_for(out))


@pytest.fixture(scope="session")
def contrastive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("contrastive") / "pendulum.zarr"
    build(recipe_for(out, CONTRASTIVE))
    return out


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for Pendulum."""

    def make(task: str, seed: int, horizon: int | None = None, settings: object = None) -> envs.Env:
        return envs.Env(task, seed, OneStep(), lambda episode: np.zeros(2), horizon or 3, True, {"gymnasium": "1"})

    monkeypatch.setattr(envs, "make", make)
