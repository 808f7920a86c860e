"""The training loop: seeds alone and in company, exact resume, checkpoints, and the decisions of `auto`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cvlctl
from cvlctl import checkpoints
from cvlctl.data.examples import success_examples
from cvlctl.data.load import join, open_stores
from cvlctl.data.recipe import StoreUse, SuccessExamples
from cvlctl.data.samplers import Data
from cvlctl.errors import CvlctlError
from cvlctl.experiments import commands
from cvlctl.learn import settings as settings_module
from cvlctl.learn.algorithms import ALGORITHMS
from cvlctl.learn.finetune import finetune
from cvlctl.learn.loop import _check_finite
from cvlctl.learn.pretrain import pretrain
from cvlctl.learn.settings import Settings, have_compiler, resolve_settings
from cvlctl.runs import Run, read_metrics, read_run

COMMON = "batch_size: 32, compile: false, threads: 1, log_every_steps: 10"
CRITIC = "{hidden: [32, 32], latent_dim: 8, gamma: 0.9}"


def episodes(num: int = 6, length: int = 30, seed: int = 0) -> list[cvlctl.Episode]:
    """A point that moves by its action; reward and success near the origin."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(num):
        actions = rng.uniform(-1, 1, size=(length, 2)).astype(np.float32)
        position = np.cumsum(np.concatenate([rng.uniform(-1, 1, size=(1, 2)), 0.3 * actions]), axis=0)
        near = np.exp(-np.square(position[1:]).sum(1))
        found.append(cvlctl.Episode(np.concatenate([position, position**2], 1), actions, near, near > 0.5))
    return found


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "point.zarr"
    cvlctl.write_store(path, episodes(), task="point")
    return path


def load(kind: str, store: Path, out: Path, text: str, *overrides: str) -> Any:
    path = out.with_name(out.name + ".yaml")
    path.write_text(f"{{stores: ['{store}'], out: '{out}', {COMMON}, {text}}}")
    return commands.load(path, list(overrides), kind)


def state_of(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(out / "checkpoints" / "last.safetensors")[0]


TD = [name for name in ALGORITHMS if name not in ("cvl", "laeo", "bc", "goal_conditioned", "fqe")]  # fqe: test_fqe.py
ALL = ["occupancy", "cvl", "cvl-fourier", "laeo", "bc", "goal_conditioned", "goal_conditioned-command", *TD]


def recipe_of(name: str, store: Path, out: Path, *overrides: str) -> Any:
    if name == "occupancy":
        return load("pretrain", store, out, f"steps: 100, critic: {CRITIC}", *overrides)
    algorithm = {name: f"{{name: {name}, hidden: [32]}}" for name in TD} | {
        "bc": "{name: bc, hidden: [32]}",
        "goal_conditioned": f"{{name: goal_conditioned, hidden: [32], critic: {CRITIC}}}",
        "goal_conditioned-command": "{name: goal_conditioned, hidden: [32], "
        f"critic: {CRITIC[:-1]}, future_columns: [0, 1], command_columns: [2, 3]}}}}",
        "laeo": f"{{name: laeo, hidden: [32], critic: {CRITIC}}}",
        "cvl": f"{{name: cvl, hidden: [32], bank_size: 64, num_actions: 2, critic: {CRITIC}}}",
        "cvl-fourier": "{name: cvl, readout: fourier, num_features: 64, xi_ema_rate: 0.5, hidden: [32], "
        f"critic: {CRITIC}}}",
    }
    examples = f", success_examples: {{from: '{store}'}}" if name == "laeo" else ""
    return load("finetune", store, out, f"steps: 100, algorithm: {algorithm[name]}{examples}", *overrides)


def run(name: str, store: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return (pretrain if name == "occupancy" else finetune)(recipe_of(name, store, out, *overrides))


@pytest.mark.parametrize("name", ALL)
def test_a_seed_trains_alike_alone_and_in_company(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "alone", "seeds=[3]")
    run(name, store, tmp_path / "together", "seeds=[0,3]")
    alone, together = state_of(tmp_path / "alone"), state_of(tmp_path / "together")
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        if value.dim():
            assert (value[0] - together[key][1]).abs().max() < 1e-5, key
    weight = "phi.0.weight" if name == "occupancy" else "actor.0.weight"
    assert (together[weight][0] - together[weight][1]).abs().max() > 1e-2


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_ends_with_the_same_bits(name: str, store: Path, tmp_path: Path, monkeypatch) -> None:
    run(name, store, tmp_path / "whole")
    save = checkpoints.save

    def save_then_die(path: Path, state: dict, metadata: dict) -> None:
        save(path, state, metadata)
        raise KeyboardInterrupt

    for _ in range(3):  # stopped after step 1, 2 and 3: the clock is always due
        monkeypatch.setattr(checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            run(name, store, tmp_path / "cut", "checkpoint_seconds=1e-9")
    monkeypatch.setattr(checkpoints, "save", save)
    assert run(name, store, tmp_path / "cut", "checkpoint_seconds=1e-9")["status"] == "trained"
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_killed_from_outside(end: signal.Signals, store: Path, tmp_path: Path) -> None:
    """kill -9 loses what the clock had not saved, Ctrl-C nothing; the same command goes on to the same bits."""
    settings = ["steps=3000", "checkpoint_seconds=0.05"]
    run("occupancy", store, tmp_path / "whole", *settings)
    recipe_of("occupancy", store, tmp_path / "cut", *settings)
    command = [sys.executable, "-m", "cvlctl", "pretrain", str(tmp_path / "cut.yaml"), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ})
    last = tmp_path / "cut" / "checkpoints" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(end)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL), stderr.decode()
    assert b"Traceback" not in stderr
    before = checkpoints.load(last)[1]["step"]
    assert 0 < before < 3000
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    whole, cut = state_of(tmp_path / "whole"), state_of(tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


def test_finished_run_says_so_and_another_recipe_is_refused(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bc", store, out)
    before = state_of(out)
    assert run("bc", store, out)["status"] == "finished already"
    with pytest.raises(CvlctlError, match=r"steps was 100, now 50.*\n.*--force"):
        run("bc", store, out, "steps=50")
    assert all(torch.equal(before[k], v) for k, v in state_of(out).items())
    assert finetune(recipe_of("bc", store, out, "steps=50"), force=True)["status"] == "trained"
    assert read_run(out)["steps"] == 50


def test_force_deletes_a_runs_own_files_and_nothing_else(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bc", store, out)
    (out / "mine").mkdir()
    (out / "mine" / "notes.txt").write_text("kept")
    assert finetune(recipe_of("bc", store, out, "steps=50"), force=True)["steps"] == 50
    assert (out / "mine" / "notes.txt").read_text() == "kept"
    (out / "run.json").write_text("{torn")
    with pytest.raises(CvlctlError, match=r"damaged(.|\n)*--force"):
        run("bc", store, out)
    assert finetune(recipe_of("bc", store, out), force=True)["status"] == "trained"
    for force in (False, True):
        with pytest.raises(CvlctlError, match="mine is not empty and not a run") as caught:
            finetune(recipe_of("bc", store, out / "mine"), force=force)
        assert "--force" not in caught.value.hint
        with pytest.raises(CvlctlError, match=r"notes\.txt is not a directory"):
            finetune(recipe_of("bc", store, out / "mine" / "notes.txt"), force=force)
    assert (out / "mine" / "notes.txt").read_text() == "kept"


def test_a_moved_run_is_the_same_run(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run("bc", store, tmp_path / "moved")["status"] == "finished already"


def test_a_run_that_has_no_checkpoint_yet_may_become_another(store: Path, tmp_path: Path) -> None:
    assert Run(tmp_path / "run", {"steps": 7}, {}).open() == "fresh"
    assert run("bc", store, tmp_path / "run")["status"] == "trained"


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_80_columns_count_and_time_left_stay() -> None:
    import fcntl
    import pty
    import struct
    import termios

    code = (
        "import time; from cvlctl.progress import Progress\n"
        "with Progress('finetune', 1_000_000, 'steps') as bar:\n"
        "    for done in range(0, 500_001, 100_000):\n"
        "        time.sleep(0.1); bar.update(done, 'critic 0.123456  actor 1.234567  accuracy 0.987654  value 2.345')\n"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # Linux's word for the end of a terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert process.wait(timeout=30) == 0
    line = next(x for x in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())) if "500000/" in x)
    assert re.search(r"\u2501 +500000/1000000 \d+ steps/s \d:\d\d:\d\d critic .*\u2026", line), line
    assert len(line) <= 80


def test_changed_data_are_another_run(tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    cvlctl.write_store(store, episodes(), task="point")
    run("bc", store, tmp_path / "run")
    cvlctl.write_store(store, episodes(seed=1), task="point", force=True)
    with pytest.raises(CvlctlError, match="holds another run"):
        run("bc", store, tmp_path / "run")


def test_pretraining_never_opens_a_label(store: Path, tmp_path: Path) -> None:
    """With the labels gone, the run is the same bit for bit; finetuning from rewards is one clear error."""
    import shutil

    bare = tmp_path / "bare.zarr"
    shutil.copytree(store, bare)
    shutil.rmtree(bare / "labels")
    run("occupancy", store, tmp_path / "with")
    run("occupancy", bare, tmp_path / "without")
    a, b = state_of(tmp_path / "with"), state_of(tmp_path / "without")
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(CvlctlError, match="given"):
        run("cvl", bare, tmp_path / "cvl")


def test_bad_data_are_named_before_training(store: Path, tmp_path: Path) -> None:
    import shutil

    import zarr

    bad = tmp_path / "bad.zarr"
    shutil.copytree(store, bad)
    zarr.open_array(bad / "data/observation", mode="r+")[7] = np.nan
    for name in ("occupancy", "bc"):
        with pytest.raises(CvlctlError, match=f"{bad}: data/observation: NaN or infinity"):
            run(name, bad, tmp_path / name)


def test_a_named_label_must_exist_even_if_it_is_not_read(store: Path, tmp_path: Path) -> None:
    text = "steps: 1, algorithm: {name: bc, hidden: [32]}"
    with pytest.raises(CvlctlError, match=f"{store}: no label 'fo' .*\n.*given/reward"):
        finetune(load("finetune", store, tmp_path / "run", text, f"stores=[{{path: '{store}', rewards: fo}}]"))
    assert not (tmp_path / "run").exists()


def test_seed_k_starts_from_seed_k(store: Path, tmp_path: Path) -> None:
    run("occupancy", store, tmp_path / "pre", "seeds=[0,1,2]")
    text = f"steps: 5, init_from: '{tmp_path / 'pre'}', algorithm: {{name: cvl, hidden: [32], mode: frozen}}"
    finetune(load("finetune", store, tmp_path / "fine", text, "seeds=[2,0]"))
    pre, fine = state_of(tmp_path / "pre"), state_of(tmp_path / "fine")
    assert torch.equal(fine["psi.1.weight"], pre["psi.1.weight"][[2, 0]])
    assert read_run(tmp_path / "fine")["recipe"]["mode"] == "frozen"
    with pytest.raises(CvlctlError, match=r"seeds \[0, 1, 2\], not \[7\]"):
        finetune(load("finetune", store, tmp_path / "other", text, "seeds=[7]"))
    finetune(load("finetune", store, tmp_path / "continued", text.replace("frozen", "continue"), "seeds=[2,0]"))
    assert not torch.equal(state_of(tmp_path / "continued")["psi.1.weight"], pre["psi.1.weight"][[2, 0]])


def test_a_run_of_an_earlier_version_is_the_same_run(store: Path, tmp_path: Path) -> None:
    """A recipe key that came since, left at its default, changes nothing; another value of it does."""
    run("cvl", store, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    del record["recipe"]["algorithm"]["actor_form"], record["recipe"]["label"]
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    assert run("cvl", store, tmp_path / "run")["status"] == "finished already"
    with pytest.raises(CvlctlError, match='actor_form was "reparameterised", now "sampled"'):
        run("cvl", store, tmp_path / "run", "algorithm.actor_form=sampled", "algorithm.num_actions=2")


def test_stores_can_be_labelled_in_part_with_zeros_or_learned_from_their_best(store: Path) -> None:
    def joined(**use: object) -> Data:
        uses = [StoreUse(path=store, **use)]
        return join(open_stores(uses), uses, None, True)

    given = joined()
    rest = joined(fraction=0.34, rest="zeros")  # UDS: all are labelled, two of six episodes with their own rewards
    assert len(rest.labelled) == 180
    paid = rest.arrival_reward[0].reshape(6, 31).any(dim=1)
    assert paid.sum() == 2
    assert torch.equal(rest.arrival_reward[0].reshape(6, 31)[paid], given.arrival_reward[0].reshape(6, 31)[paid])
    assert not joined(rewards="zeros").arrival_reward.any()
    returns = given.arrival_reward[0].reshape(6, 31).sum(dim=1)
    best = joined(top=0.34)
    assert len(best.observation) == 62
    kept = best.arrival_reward[0].reshape(2, 31).sum(dim=1)
    assert torch.allclose(kept.sort()[0], returns.sort()[0][-2:], atol=1e-4)
    assert best.layout.last.unique().tolist() == [30, 61]
    with pytest.raises(ValueError, match="ranks episodes by their return"):
        StoreUse(path=store, rewards="zeros", top=0.5)


def test_labelled_fraction_limits_the_bank_alone(store: Path, tmp_path: Path) -> None:
    use = StoreUse(path=store, fraction=0.34)
    data = join(open_stores([use]), [use], None, True)
    episode = (data.layout.row[data.labelled] // 31).unique()
    assert len(episode) == 2  # of six
    assert len(data.layout.row) == 180  # and all transitions still train the critic
    none = StoreUse(path=store, rewards="none")
    both = join(open_stores([use, none]), [use, none], None, True)
    assert len(both.layout.row) == 360
    assert both.labelled.max() < 180


def test_arrival_reward_is_that_of_the_step_that_arrived(store: Path) -> None:
    use = StoreUse(path=store)
    data = join(open_stores([use]), [use], None, True)
    near = torch.exp(-data.observation[:, 2:].sum(1))  # the observation holds the squared position
    rows = torch.ones(len(near), dtype=torch.bool)
    rows[::31] = False  # first observations are arrived at by no step
    assert (data.arrival_reward[0, rows] - near[rows]).abs().max() < 1e-5


def test_success_examples_by_rule(store: Path, tmp_path: Path) -> None:
    spec = cvlctl.open_store(store).spec
    found = success_examples(SuccessExamples(**{"from": store, "num": 10}), spec)
    assert found.shape == (10, 4)
    assert (np.exp(-found[:, 2:].sum(1)) > 0.5 - 1e-5).all()
    last = success_examples(SuccessExamples(**{"from": store, "rule": "last", "k": 2}), spec)
    observations = cvlctl.open_store(store).observations()
    assert np.array_equal(last, observations[np.sort(np.concatenate([np.arange(30, 186, 31), np.arange(29, 186, 31)]))])
    np.save(tmp_path / "x.npy", found)
    again = success_examples(SuccessExamples(file=tmp_path / "x.npy"), spec)
    assert np.array_equal(np.sort(again, 0), np.sort(found, 0))


BAD_EXAMPLES = {
    r"has shape \(0, 4\)": np.zeros((0, 4)),
    r"the examples have shape \(3, 5\); expected \(X, 4\)": np.zeros((3, 5)),
    "NaN or infinity in 1 of 3 examples, first in 2": np.diag([1, 1, np.nan, 1])[:3, :],
    "NaN or infinity in 3 of 3": np.full((3, 4), 1e300),
    "holds complex128, not real numbers": np.zeros((3, 4), complex),
    "holds <U1, not real numbers": np.full((3, 4), "1"),
    "cannot be read: .*allow_pickle": np.full((3, 4), None),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("message", BAD_EXAMPLES)
def test_bad_success_examples_are_named(message: str, store: Path, tmp_path: Path) -> None:
    spec, source = cvlctl.open_store(store).spec, SuccessExamples(file=tmp_path / "bad.npy")
    np.save(tmp_path / "bad.npy", BAD_EXAMPLES[message])
    with pytest.raises(CvlctlError, match=rf"success_examples\.file: .*/bad\.npy: {message}"):
        success_examples(source, spec)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"x" * 50, None])
def test_files_that_hold_no_success_examples(content: bytes | None, store: Path, tmp_path: Path) -> None:
    spec, source = cvlctl.open_store(store).spec, SuccessExamples(file=tmp_path / "bad.npz")
    if content is not None:
        (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(CvlctlError, match=r"no file at .*bad\.npz" if content is None else r"bad\.npz: cannot be read"):
        success_examples(source, spec)


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"garbage" * 100, None])
def test_hostile_checkpoint_is_one_clear_error(content: bytes | None, store: Path, tmp_path: Path) -> None:
    run("occupancy", store, tmp_path / "pre")
    last = tmp_path / "pre" / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100] if content is None else content)
    text = f"steps: 5, init_from: '{tmp_path / 'pre'}', algorithm: {{name: cvl, hidden: [32]}}"
    with pytest.raises(CvlctlError, match=r"last\.safetensors"):
        finetune(load("finetune", store, tmp_path / "fine", text))
    with pytest.raises(CvlctlError, match=r"last\.safetensors"):
        cvlctl.load_critic(tmp_path / "pre")


def without(file: Path, *keys: str) -> None:
    """Take keys out of a checkpoint's metadata."""
    state, metadata = checkpoints.load(file)
    checkpoints.save(file, state, {key: value for key, value in metadata.items() if key not in keys})


def test_init_from_must_be_a_run_with_a_critic(store: Path, tmp_path: Path) -> None:
    def start(name: str) -> None:
        text = f"steps: 5, init_from: '{tmp_path / name}', algorithm: {{name: cvl, hidden: [32]}}"
        finetune(load("finetune", store, tmp_path / "fine", text))

    run("bc", store, tmp_path / "bc", "steps=1")
    with pytest.raises(CvlctlError, match=r"init_from: .*/bc \(bc\) has no occupancy critic"):
        start("bc")
    run("occupancy", store, tmp_path / "pretrained", "steps=1")
    with pytest.raises(CvlctlError, match=r"init_from: no run or checkpoint at .*/pretraned\n.*/pretrained\?"):
        start("pretraned")
    with pytest.raises(CvlctlError, match="cvlctl pretrain"):
        start("elsewhere/run")
    last = tmp_path / "pretrained" / "checkpoints" / "last.safetensors"
    sound = last.read_bytes()
    for key in ("seeds", "spec", "critic"):
        without(last, key)
        with pytest.raises(CvlctlError, match=rf"init_from: .*last\.safetensors .*KeyError: '{key}'"):
            start("pretrained")
        last.write_bytes(sound)
    state, metadata = checkpoints.load(last)
    checkpoints.save(last, state, {**metadata, "seeds": [0, 1]})
    with pytest.raises(CvlctlError, match="expected 2 members and width 4"):
        start("pretrained")
    assert not (tmp_path / "fine").exists()


def test_damaged_metadata_cannot_be_resumed(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run", "steps=1")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    without(tmp_path / "run" / "checkpoints" / "last.safetensors", "settings")
    with pytest.raises(CvlctlError, match=r"last\.safetensors: .*'settings'\n.*--force"):
        run("bc", store, tmp_path / "run", "steps=1")


def test_a_critic_loads_from_a_run_a_step_or_a_file(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("occupancy", store, out, "steps=4", "checkpoint_every_steps=2")
    x = np.ones((1, 4), np.float32)
    found = [
        cvlctl.load_critic(*arguments).log_ratio(x, x[:, :2], x).item()
        for arguments in ((out,), (out, 0, 4), (out / "checkpoints/last.safetensors",), (out, 0, 2))
    ]
    assert found[0] == found[1] == found[2] != found[3]
    with pytest.raises(CvlctlError, match=r"no checkpoint 'step-000000007'\n.*last, step-000000002"):
        cvlctl.load_critic(out, checkpoint=7)
    with pytest.raises(CvlctlError, match=r"no run or checkpoint at .*/rum\n.*/run\?"):
        cvlctl.load_critic(tmp_path / "rum")
    with pytest.raises(CvlctlError, match=r"no seed 5\n.*0"):
        cvlctl.load_critic(out, 5)


@pytest.mark.parametrize(
    ("seconds", "left"),
    [
        ("60", "no checkpoint was saved before"),
        ("1e-9", r"the last checkpoint .*last.safetensors\) has diverged too"),
    ],
)
def test_divergence_is_an_error_and_not_a_score(seconds: str, left: str, store: Path, tmp_path: Path) -> None:
    text = f"steps: 300, critic: {CRITIC[:-1]}, learning_rate: 1e18}}, checkpoint_seconds: {seconds}"
    recipe = load("pretrain", store, tmp_path / "run", text)
    with pytest.raises(CvlctlError, match=f"diverged.*\n.*{left}"):
        pretrain(recipe)


def test_divergence_after_a_sound_checkpoint_says_so(store: Path, tmp_path: Path) -> None:
    run("bc", store, tmp_path / "run", "steps=3")
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    with pytest.raises(CvlctlError, match="the last checkpoint, of step 3, is sound"):
        _check_finite({"loss": [np.nan]}, 10, last)


def test_auto_decides_by_length_and_by_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def resolve(**change: Any) -> Settings:
        asked = {"device": "cpu", "threads": 1, "precision": "auto", "compile": "auto", "steps": 10**6, **change}
        return resolve_settings(**asked, say=said.append)

    monkeypatch.setattr(settings_module, "have_compiler", lambda: True)
    assert resolve().compile
    assert not resolve(steps=100).compile
    monkeypatch.setattr(settings_module, "have_compiler", lambda: False)
    assert not said
    assert not resolve().compile
    assert len(said) == 1 and "eager" in said[0]
    with pytest.raises(CvlctlError, match="compiler"):
        resolve(compile="true")
    if not torch.cuda.is_available():
        with pytest.raises(CvlctlError, match="no GPU"):
            resolve(device="cuda")


def test_a_machine_that_cannot_go_on_says_so(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {"threads": 1, "precision": "float32", "compile": "false", "steps": 1, "say": print}
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        patched.setattr(torch.cuda, "device_count", lambda: 2)
        assert resolve_settings(device="cuda:1", **asked).device == "cuda:1"
        with pytest.raises(CvlctlError, match="device: cuda:2, but PyTorch sees 2 GPUs, from cuda:0 on"):
            resolve_settings(device="cuda:2", **asked)
    run("bc", store, tmp_path / "run", "steps=1")
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace("finished", "started"))
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    state, metadata = checkpoints.load(last)
    monkeypatch.setattr(settings_module, "have_compiler", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for change, what in (({"device": "cuda"}, "sees no GPU"), ({"compile": True}, "no C.. compiler")):
        checkpoints.save(last, state, metadata | {"settings": metadata["settings"] | change})
        with pytest.raises(CvlctlError, match=f"the run began with .*{what}.* here\n.*--force"):
            run("bc", store, tmp_path / "run", "steps=1")


@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("name", ["cvl", *(pytest.param(n, marks=pytest.mark.slow) for n in ALL if n != "cvl")])
def test_compiled_and_eager_steps_agree(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "eager")
    run(name, store, tmp_path / "compiled", "compile=true")
    eager, compiled = state_of(tmp_path / "eager"), state_of(tmp_path / "compiled")
    for key, value in eager.items():
        assert (value - compiled[key]).abs().max() < 2e-3, key


@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
def test_compiled_and_eager_steps_agree_in_bf16(store: Path, tmp_path: Path) -> None:
    """As a whole: they round at other places, and Adam makes a step of a single weight's rounding error."""
    run("cvl", store, tmp_path / "eager", "precision=bf16")
    run("cvl", store, tmp_path / "compiled", "precision=bf16", "compile=true")
    run("cvl", store, tmp_path / "exact", "precision=float32")
    eager, compiled, exact = (state_of(tmp_path / name) for name in ("eager", "compiled", "exact"))
    for key, value in exact.items():
        for rounded in (eager, compiled):
            assert (rounded[key] - value).norm() <= (0.05 if "adam/" in key else 0.01) * value.norm(), key
    assert not torch.equal(eager["phi.0.weight"], exact["phi.0.weight"])


@pytest.mark.skipif(not have_compiler(), reason="no C++ compiler")
def test_any_number_of_compiled_runs_in_one_process(store: Path, tmp_path: Path, monkeypatch: Any) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compile_(*a, **{**k, "backend": "eager", "mode": None}))
    for width in range(8, 18):  # torch's limit is 8 for one function
        more = ("compile=true", "steps=2", f"algorithm.hidden=[{width}]")
        assert run("bc", store, tmp_path / str(width), *more)["status"] == "trained"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ALL)
def test_cuda_graph_and_eager_steps_agree(name: str, store: Path, tmp_path: Path) -> None:
    run(name, store, tmp_path / "eager", "device=cuda", "precision=float32")
    run(name, store, tmp_path / "graph", "device=cuda", "precision=float32", "compile=true")
    eager, graph = state_of(tmp_path / "eager"), state_of(tmp_path / "graph")
    for key, value in eager.items():
        assert (value - graph[key]).abs().max() < 2e-3, key


def test_algorithms_export_what_the_loop_asks_for() -> None:
    for name, module in ALGORITHMS.items():
        assert all(hasattr(module, part) for part in ("Config", "draws", "init", "step")), name
