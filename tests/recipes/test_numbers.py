"""Absurd numbers in recipes: every one is refused in two lines, or means what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cvlctl.cli.app import app
from cvlctl.cli.console import _is_memory, execute
from cvlctl.errors import CvlctlError
from cvlctl.experiments.commands import load
from cvlctl.learn import labellers
from cvlctl.learn.algorithms import ALGORITHMS, ONLINE, occupancy

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


PRETRAIN = "stores: [a.zarr]\nsteps: 1\nout: runs/p\n"
FINETUNE = PRETRAIN + "algorithm: {name: cvl}\n"
BUILD = "task: gym/Pendulum-v1\nsource: {name: sac, steps: 10}\nout: x.zarr\n"
ABSURD = [
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
