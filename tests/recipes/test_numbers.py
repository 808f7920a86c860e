"""Absurd numbers in recipes: every one is refused in two lines, or means what it says."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from cvlctl.cli.app import app
from cvlctl.cli.console import _is_memory, execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import labellers
from cvlctl.learn.algorithms import ALGORITHMS, ONLINE, occupancy
from cvlctl.recipes.values import Strict

CONFIGS: dict[str, Any] = {name: module.Config for name, module in {**ALGORITHMS, **ONLINE}.items()}
CONFIGS |= {"critic": occupancy.Config, "labeller": labellers.Config}
WIDTHS = [(name, field.name) for name, config in CONFIGS.items()
          for field in dataclasses.fields(config) if field.name.endswith("hidden")]  # fmt: skip


@pytest.mark.parametrize(("name", "key"), WIDTHS)
@pytest.mark.parametrize("widths", [(), (0,), (8, 0), (-3,)])
def test_every_width_is_at_least_one(name: str, key: str, widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"^{key} must be one width or more, and each at least 1$"):
        CONFIGS[name](**{key: widths})


def test_all_widths_are_known() -> None:
    assert len(WIDTHS) >= 14


def numeric(schema: dict[str, Any]) -> bool:
    """Whether a JSON schema takes numbers, and neither true nor a mapping."""
    kinds = [choice.get("type", "object") for choice in schema.get("anyOf", [schema])]
    return bool({"integer", "number"} & set(kinds)) and not {"boolean", "object"} & set(kinds)


def models(kind: type[Strict] = Strict) -> Iterator[type[Strict]]:
    """All that make up recipes."""
    for room in ("collect", "data", "experiments", "learn", "score"):
        importlib.import_module(f"cvlctl.{room}.recipe")
    for model in kind.__subclasses__():
        yield model
        yield from models(model)


NUMBERS = [(kind, key, value) for kind in (*CONFIGS.values(), *models())
           for key, schema in TypeAdapter(kind).json_schema()["properties"].items()
           for value, inside in ((True, schema), ([False], schema.get("items", {})))
           if numeric(inside) or any(numeric(choice.get("items", {})) for choice in schema.get("anyOf", ())
                                     if value == [False])]  # fmt: skip


@pytest.mark.parametrize(("kind", "key", "value"), NUMBERS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_true_is_no_number(kind: Any, key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python({key: value})
    assert any(fault["loc"][0] == key for fault in caught.value.errors())


def test_all_numbers_are_known() -> None:
    assert len(NUMBERS) >= 150 and (occupancy.Config, "future_columns", [False]) in NUMBERS


PRETRAIN = "stores: [a.zarr]\nsteps: 1\nout: runs/p\n"
FINETUNE = PRETRAIN + "algorithm: {name: cvl}\n"
BUILD = "task: gym/Pendulum-v1\nsource: {name: sac, steps: 10}\nout: x.zarr\n"
EVALUATE = "runs: [p]\nout: s\n"
RAREST = "algorithm: actor_every must lie in 1 to 10000"
ABSURD = [
    (PRETRAIN, "critic.latent_dim=true", "critic.latent_dim: expected a whole number, given true"),
    (FINETUNE, "algorithm={name: cql, gamma: false}", "algorithm.gamma: expected a number, given false"),
    (FINETUNE, "algorithm={name: td3_bc, actor_every: 1000000000}", RAREST),
    (BUILD, "source={name: contrastive_ac, steps: 9, actor_every: 1000000000}", "actor_every lie in 1 to 10000"),
    (EVALUATE, "episodes=1000000000000000000", "episodes: expected a number of at most 1000000"),
    (EVALUATE, "confidence.resamples=1000000000000", "confidence.resamples: expected a number of at most 1000000"),
    (PRETRAIN, "critic.hidden=[0]", "critic: hidden must be one width or more"),
    (PRETRAIN, "critic.hidden=[]", "critic: hidden must be one width or more"),
    (FINETUNE, "algorithm.hidden=[0]", "algorithm: hidden must be"),
    (FINETUNE, "algorithm.critic.hidden=[8,0]", "algorithm.critic: hidden must be"),
    (FINETUNE, "labeller.hidden=[0]", "labeller: hidden must be"),
    (FINETUNE, "algorithm={name: fqe, policy_hidden: [0]}", "algorithm: policy_hidden must be"),
    (BUILD, "source.hidden=[0]", "source.hidden.0: expected a number of at least 1"),
    (BUILD, "seed=0x" + "f" * 4_000, "seed: 0xfff"),
    (PRETRAIN, "seeds=[0x" + "f" * 4_000 + "]", "seeds.0: 0xfff"),
    (PRETRAIN, "seeds=[" + "1" * 5_000 + "]", "seeds.0: 111"),
    (PRETRAIN, "seeds=['" + "1" * 5_000 + "']", "seeds.0: expected a whole number, given '111"),
    (PRETRAIN, "seeds=[2147483648]", "seeds.0: expected a number below 2147483648"),
    (PRETRAIN, "batch_size=1e30", "batch_size: expected a whole number, given 1e+30"),
    (PRETRAIN, "checkpoint_seconds=1e300", "checkpoint_seconds: 1e300 is too large a number"),
    (FINETUNE, "algorithm={name: td3_bc, noise_clip: -1e39}", "algorithm.noise_clip: -1e39 is too large a number"),
    (PRETRAIN, "batch_size=1e999", "batch_size: 1e999 is not a finite number"),
    (PRETRAIN, "critic.latent_dim=1e30", "critic.latent_dim: expected a whole number"),
    (PRETRAIN, "critic.latent_dim=" + "9" * 30, "critic.latent_dim: 999999999999999999999999999999 is too large"),
    (PRETRAIN, "critic.future_columns=[" + "9" * 30 + "]", "is too large a number"),
]


@pytest.mark.parametrize(("text", "override", "what"), ABSURD, ids=lambda value: str(value)[:30])
def test_an_absurd_number_is_named(text: str, override: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(CvlctlError, match=r"^command line: ") as caught:
        load(path, [override])
    assert what in caught.value.what
    assert len(caught.value.what) < 300


def test_an_absurd_number_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    for args in (["examples", "a.zarr", "--out", "y.npy", "--num"], ["split", "a.zarr", "--seed"]):
        assert execute(app, ["data", *args, "9" * 30]) == 2
        assert "is too large a number" in capsys.readouterr().err


def test_an_experiment_of_endless_jobs_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    numbers = list(range(1_000))
    path.write_text(
        f"out: x\nmatrix: {{a: {numbers}, b: {numbers}, c: {numbers}}}\n"
        "stages:\n  s: {command: evaluate, runs: [r], out: '${a}/${b}/${c}'}\n"
    )
    with pytest.raises(CvlctlError, match=r"line 4: stages\.s would be 1,000,000,000 jobs, one for each of a, b, c"):
        load(path)


def test_sizes_that_no_memory_could_hold_are_a_matter_of_memory() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2**40, 2**40)
    assert _is_memory(caught.value)
