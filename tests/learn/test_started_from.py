"""What training starts from, `init_from` or its own last checkpoint: the bytes that were read, whole, or one error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_labellers import recipe as labelled_recipe
from toy_runs import CRITIC, load, recipe_of

from cvlctl import checkpoints
from cvlctl.errors import CvlctlError
from cvlctl.files import sha256
from cvlctl.learn.finetune import finetune
from cvlctl.learn.networks import State
from cvlctl.runs import LABELS_FILE, read_run


@pytest.fixture(scope="module")
def finished(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained critic with moving averages, and policies finetuned on it: <folder>/pre, <folder>/fine."""
    folder = tmp_path_factory.mktemp("finished")
    text = f"steps: 2, critic: {CRITIC[:-1]}, ema_rate: 0.01}}"
    run_pretrain(load("pretrain", store, folder / "pre", text))
    finetune(fine(store, folder / "fine", folder / "pre"))
    return folder


def run_pretrain(recipe: Any) -> None:
    from cvlctl.learn.pretrain import pretrain

    pretrain(recipe)


def fine(store: Path, out: Path, init_from: Path) -> Any:
    return load("finetune", store, out, f"steps: 2, init_from: '{init_from}', algorithm: {{name: cvl, hidden: [32]}}")


def changed(file: Path, change: Callable[[State, dict[str, Any]], None]) -> None:
    state, metadata = checkpoints.load(file)
    change(state, metadata)
    checkpoints.save(file, state, metadata)


def without(*names: str) -> Callable[[State, dict[str, Any]], None]:
    def change(state: State, metadata: dict[str, Any]) -> None:
        for name in names:
            del state[name]

    return change


def flip(file: Path) -> None:
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1  # a number like any other
    file.write_bytes(damaged)


LACKING = [
    "phi.0.weight", "phi.1.bias", "phi.2.weight", "psi.1.weight", "ema/psi.0.weight", "ema/psi.2.bias",
    "observation_mean", "observation_std", "adam/critic/m/phi.0.weight", "adam/critic/v/psi.2.bias",
]  # fmt: skip


def test_init_from_lacking_any_of_its_tensors_is_one_error(finished: Path, store: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "pre", tmp_path / "pre")
    last = tmp_path / "pre" / "checkpoints" / "last.safetensors"
    sound = last.read_bytes()
    for name in LACKING:
        changed(last, without(name))
        with pytest.raises(CvlctlError, match=rf"init_from: .*last\.safetensors .*KeyError: '{name}'"):
            finetune(fine(store, tmp_path / "fine", tmp_path / "pre"))
        last.write_bytes(sound)
    for name in LACKING:
        changed(last, lambda state, _, name=name: state.update({name: state[name][..., :1]}))
        with pytest.raises(CvlctlError, match=rf"init_from: .*last\.safetensors .*{name} has shape"):
            finetune(fine(store, tmp_path / "fine", tmp_path / "pre"))
        last.write_bytes(sound)
    flip(last)
    with pytest.raises(CvlctlError, match=r"init_from: .*last\.safetensors: damaged"):
        finetune(fine(store, tmp_path / "fine", tmp_path / "pre"))
    assert not (tmp_path / "fine").exists()


def test_moments_of_other_widths_than_their_parameters_are_told(finished: Path, store: Path, tmp_path: Path) -> None:
    """A numbered checkpoint has no moments: an actor of other widths than ours is then taken over without its own."""
    file = tmp_path / "numbered.safetensors"
    shutil.copy(finished / "fine" / "checkpoints" / "last.safetensors", file)
    changed(file, lambda state, _: [state.pop(name) for name in list(state) if name.startswith("adam/")] and None)
    finetune(fine(store, tmp_path / "fine", file))
    text = f"steps: 2, init_from: '{file}', algorithm: {{name: cvl, hidden: [16]}}"
    with pytest.raises(CvlctlError, match=r"init_from: .*numbered\.safetensors: actor\.0\.weight and its moments"):
        finetune(load("finetune", store, tmp_path / "other", text))


def test_the_recorded_digest_is_of_the_bytes_that_training_began_with(
    finished: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pretraining goes on meanwhile, and replaces its checkpoint after every look at it."""
    shutil.copytree(finished / "pre", tmp_path / "pre")
    last = tmp_path / "pre" / "checkpoints" / "last.safetensors"
    began, digest, read, step = checkpoints.load(last)[0], sha256(last), checkpoints.read, iter(range(3, 99))

    def replaced(path: Path, *meant: str) -> checkpoints.Saved:
        found = read(path, *meant)
        if path == last:
            state = {name: value + 1 for name, value in checkpoints.unpack(found).items()}
            checkpoints.save(last, state, {**found.metadata, "step": next(step)})
        return found

    monkeypatch.setattr(checkpoints, "read", replaced)
    recipe = fine(store, tmp_path / "fine", tmp_path / "pre").model_copy(update={"steps": 1})
    finetune(recipe)
    (recorded,) = (x for name, x in read_run(tmp_path / "fine")["inputs"].items() if name.startswith("init_from:"))
    assert recorded == digest
    trained = checkpoints.load(tmp_path / "fine" / "checkpoints" / "last.safetensors")[0]
    assert torch.equal(trained["observation_mean"], began["observation_mean"])  # which no update changes


def interrupted(finished: Path, out: Path, store: Path) -> Any:
    """A run as a kill just before its end leaves it, and its recipe."""
    recipe = recipe_of("cvl", store, out, "steps=2")
    if not finished.exists():
        finetune(recipe.model_copy(update={"out": finished}))
    shutil.copytree(finished, out)
    record = out / "run.json"
    record.write_text(record.read_text().replace('"finished"', '"started"'))
    return recipe


def test_a_damaged_checkpoint_cannot_be_resumed(finished: Path, store: Path, tmp_path: Path) -> None:
    recipe = interrupted(finished / "cvl", tmp_path / "run", store)
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    sound = last.read_bytes()

    def refused(message: str) -> None:
        with pytest.raises(CvlctlError, match=rf"last\.safetensors(: | .*){message}") as caught:
            finetune(recipe)
        assert "--force" in caught.value.hint or "damaged" in message
        last.write_bytes(sound)

    for name in ("phi.0.weight", "adam/actor/m/actor.0.weight", "adam/critic/count", "reward_mean", "actor.1.bias"):
        changed(last, without(name))
        refused(f"{name} is nothing")
    changed(last, lambda state, _: state.update({"actor.0.weight": state["actor.0.weight"][:, :2]}))
    refused(r"actor\.0\.weight is float32 of shape \(1, 2, 32\), where float32 of shape \(1, 4, 32\)")
    for step in (None, "2", -1, 3, 1.5, True):
        changed(last, lambda _, metadata, step=step: metadata.update({"step": step}))
        refused("its step is")
    for settings in (None, [], {}, {"device": 5}, {"threads": "x"}, {"threads": 0}, {"more": 1}):
        old = checkpoints.load(last)[1]["settings"]
        garbled = {**old, **settings} if isinstance(settings, dict) and settings else settings
        changed(last, lambda _, metadata, garbled=garbled: metadata.update({"settings": garbled}))
        refused("its settings are missing or garbled")
    flip(last)
    refused("damaged: its content is not what was written")
    finetune(recipe)


def test_damaged_metrics_stop_a_resume_and_cost_nothing(finished: Path, store: Path, tmp_path: Path) -> None:
    recipe = interrupted(finished / "cvl", tmp_path / "run", store)
    metrics, last = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints" / "last.safetensors"
    sound, before = metrics.read_bytes(), last.read_bytes()
    for content in (b"\xff\n", b"[1]\n", b'{"loss": 1}\n', b'{"a":' * 100_000 + b"\n"):
        metrics.write_bytes(content)
        with pytest.raises(CvlctlError, match=r"metrics\.jsonl, line 1: damaged"):
            finetune(recipe)
        assert metrics.read_bytes() == content and last.read_bytes() == before
    metrics.unlink()
    with pytest.raises(CvlctlError, match=r"metrics\.jsonl"):
        finetune(recipe)
    metrics.write_bytes(b"")
    with pytest.raises(CvlctlError, match=r"metrics\.jsonl"):
        finetune(recipe)
    metrics.write_bytes(sound)
    assert finetune(recipe)["status"] == "trained"


def test_learned_rewards_that_are_damaged_are_told_and_another_recipes_are_not_taken(
    store: Path, tmp_path: Path
) -> None:
    def recipe(*overrides: str) -> Any:
        return labelled_recipe(store, tmp_path / "run", "oril", "steps=1", "labeller.batch_size=8", *overrides)

    finetune(recipe("labeller.steps=1"))
    file = tmp_path / "run" / LABELS_FILE
    first = checkpoints.load(file)[0]["reward"]
    finetune(recipe("labeller.steps=2"), force=True)
    assert not torch.equal(checkpoints.load(file)[0]["reward"], first)
    record = tmp_path / "run" / "run.json"
    record.write_text(json.dumps(read_run(tmp_path / "run") | {"status": "started"}))
    for state in ({}, {"reward": first[:, :5]}):
        checkpoints.save(file, state, {})
        with pytest.raises(CvlctlError, match=rf"{LABELS_FILE} holds no rewards"):
            finetune(recipe("labeller.steps=2"))
    file.unlink()
    assert finetune(recipe("labeller.steps=2"))["status"] == "trained"


def cut_short(run: Path) -> None:
    """As a run of 2 steps is that was interrupted after the first."""
    changed(run / "checkpoints" / "last.safetensors", lambda state, metadata: metadata.update(step=1))


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_run_that_is_not_finished_is_started_from_only_where_that_is_meant(
    store: Path, finished: Path, tmp_path: Path, command: str
) -> None:
    from cvlctl.learn.pretrain import pretrain

    shutil.copytree(finished / "pre", tmp_path / "pre")
    cut_short(tmp_path / "pre")
    go = {"finetune": finetune, "pretrain": pretrain}[command]
    text = f"steps: 1, init_from: '{tmp_path / 'pre'}'"
    text += ", algorithm: {name: cvl, hidden: [32]}" if command == "finetune" else ""
    recipe = load(command, store, tmp_path / "out", text)
    with pytest.raises(CvlctlError, match=r"init_from: .*pre is not finished: step 1 of 2") as caught:
        go(recipe)
    assert "--unfinished" in caught.value.hint and not (tmp_path / "out").exists()
    assert go(recipe, unfinished=True)["status"] == "trained"
    named = tmp_path / "pre" / "checkpoints" / "last.safetensors"  # a file that is named is meant
    assert go(load(command, store, tmp_path / "other", text.replace(str(tmp_path / "pre"), str(named)))) is not None


def test_a_pretrained_critic_goes_on_where_it_was(store: Path, finished: Path, tmp_path: Path) -> None:
    """Weights, moments and averages are those of the other run, on the other hand its settings."""
    text = f"steps: 1, init_from: '{finished / 'pre'}'"
    run_pretrain(load("pretrain", store, tmp_path / "more", text))
    before, after = (
        checkpoints.load(run / "checkpoints" / "last.safetensors") for run in (finished / "pre", tmp_path / "more")
    )
    assert after[1]["critic"] == before[1]["critic"] and after[0].keys() == before[0].keys()
    name = "phi.0.weight"
    step = (after[0][name] - before[0][name]).abs().max()
    assert 0 < step < 0.01 and torch.equal(before[0]["observation_std"], after[0]["observation_std"])
    assert read_run(tmp_path / "more")["inputs"][f"init_from:{finished / 'pre'}"]
    with pytest.raises(CvlctlError, match="critic contradicts init_from"):
        load("pretrain", store, tmp_path / "twice", f"{text}, critic: {CRITIC}")
