"""Commands of `data` in any order, over names that are used again: every store is what a model in memory says, sound,
and nothing that a command was not to write was touched."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from reliability.driver import count
from reliability.runner import command

from cvlctl.cli.console import execute
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store

Rows = np.ndarray


class Episode(NamedTuple):
    """One episode of a model: what it holds, and its labels' arrays by name ("given/reward")."""

    observations: Rows
    actions: Rows
    about: tuple[bool, str, int, int]  # terminated, task, collected_at, seed
    labels: dict[str, Rows]

    def key(self) -> tuple[Any, ...]:
        arrays = (self.observations, self.actions, *(self.labels[name] for name in sorted(self.labels)))
        return (*(x.tobytes() for x in arrays), *sorted(self.labels), self.about)


def source(path: Path, seed: int) -> list[Episode]:
    """A plain npz for import, and its episodes. Sources are alike in shape, and differ in labels."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 5, size=3 + seed)
    made = []
    for number, length in enumerate(lengths.tolist()):
        labels: dict[str, Rows] = {"given/reward": draw.normal(size=length).astype(np.float32)}
        if seed != 1:
            labels["given/success"] = draw.random(length) < 0.3
        about = (bool(draw.random() < 0.5), f"task {seed}", int(lengths[:number].sum()), seed)
        shape = (draw.normal(size=(length + 1, 2)), draw.uniform(-1, 1, size=(length, 1)))
        made.append(Episode(shape[0].astype(np.float32), shape[1].astype(np.float32), about, labels))
    columns = {"rewards": "given/reward", "successes": "given/success"}
    np.savez(
        path, observations=np.concatenate([e.observations for e in made]),
        actions=np.concatenate([e.actions for e in made]), episode_ends=np.cumsum(lengths), task=f"task {seed}",
        terminated=[e.about[0] for e in made], seeds=[seed] * len(made),
        **{name: np.concatenate([e.labels[key] for e in made]) for name, key in columns.items()
           if key in made[0].labels},
    )  # fmt: skip
    return made


def read(path: Path) -> list[Episode]:
    """The episodes of a store, with all labels."""
    store = open_store(path)
    made = [
        Episode(e.observations, e.actions, (e.terminated, e.task, e.collected_at, e.seed), {})
        for e in store.episodes(label=store.labels[0] if store.labels else "given")
    ]
    for label in store.labels:
        for old, e in zip(made, store.episodes(label), strict=True):
            arrays = {f"{label}/reward": e.rewards, f"{label}/success": e.successes}
            old.labels.update({name: rows for name, rows in arrays.items() if rows is not None})
    return made


def common(model: list[Episode]) -> list[Episode]:
    """A merged store keeps the labels that all of its parents have."""
    names = set.intersection(*(set(e.labels) for e in model))
    return [e._replace(labels={name: e.labels[name] for name in e.labels if name in names}) for e in model]


def prints(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Of every file what changes when it is written or replaced."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_ino, about.st_size, about.st_mtime_ns)
    return found


STORES = st.sampled_from(["a.zarr", "b.zarr", "c.zarr"])
OUTS = st.sampled_from(["a.zarr", "b.zarr", "c.zarr", "s-train.zarr"])
PARENTS = st.sampled_from(["a.zarr", "b.zarr", "c.zarr", "s-train.zarr", "s-validation.zarr"])
FORCE = st.sampled_from([[], ["--force"]])


class Commands(RuleBasedStateMachine):
    """The machine: `model` has the stores and files of examples that should be there."""

    steps = 0

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.work = self.folder / "work"
        self.work.mkdir()
        self.sources = {seed: source(self.folder / f"{seed}.npz", seed) for seed in range(3)}
        self.model: dict[str, list[Episode]] = {}
        self.files: dict[str, Rows] = {}
        self.made: dict[str, tuple[Any, ...]] = {}  # by what command, of which inputs
        (self.work / "a.zarr.old").write_text("somebody's own")
        (self.work / "notes").mkdir()
        (self.work / "notes" / "lock").write_text("somebody's own")

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def do(self, args: list[str], force: list[str], outs: dict[str, list[Episode]] | None, inputs: list[str]) -> None:
        """Run a command that makes `outs` of `inputs`; None: it is refused."""
        same = ("data", *args, *(key for name in inputs for e in self.model.get(name, []) for key in e.key()))
        legal = outs is not None and all(name in self.model for name in inputs)
        again = outs is not None and all(self.made.get(name) == same for name in outs)
        taken = outs is not None and any(name in self.model or name in self.files for name in outs)
        written = legal and outs is not None and (bool(force) or not taken)
        before = prints(self.work)
        code, said = self.call(["data", *args, *force])
        expected = 0 if written or (legal and again) else 2
        assert code == expected, f"{args} {force}: exit {code}, not {expected}: {said}"
        if written and outs is not None:
            self.model.update(outs)
            self.made.update(dict.fromkeys(outs, same))
        touched = tuple(outs or {}) if written else ()
        self.untouched(before, touched)
        for name in touched:
            self.check(name)

    def call(self, args: list[str]) -> tuple[int, str]:
        type(self).steps += 1
        out, here = io.StringIO(), Path.cwd()
        os.chdir(self.work)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                return execute(command(), args), out.getvalue()
        finally:
            os.chdir(here)

    def untouched(self, before: dict[str, Any], but: tuple[str, ...]) -> None:
        inside = tuple(f"{name}/" for name in but)
        old, new = ({k: v for k, v in x.items() if k not in but and not k.startswith(inside)}
                    for x in (before, prints(self.work)))  # fmt: skip
        assert old == new, sorted(set(old.items()) ^ set(new.items()))

    def check(self, name: str) -> None:
        path = self.work / name
        assert verify_store(path) == []
        assert [e.key() for e in read(path)] == [e.key() for e in self.model[name]], name

    @initialize()
    def first(self) -> None:
        self.do(["import", "npz", "../0.npz", "--out", "a.zarr"], [], {"a.zarr": self.sources[0]}, [])

    @rule(seed=st.sampled_from([0, 1, 2]), out=OUTS, force=FORCE)
    def import_(self, seed: int, out: str, force: list[str]) -> None:
        self.do(["import", "npz", f"../{seed}.npz", "--out", out], force, {out: self.sources[seed]}, [])

    @rule(one=STORES, two=PARENTS, out=OUTS, force=FORCE)
    def merge(self, one: str, two: str, out: str, force: list[str]) -> None:
        both = common([*self.model.get(one, []), *self.model.get(two, [])] or self.sources[0])
        self.do(["merge", one, two, "--out", out], force, {out: both}, [one, two])

    @rule(parent=PARENTS, train=st.sampled_from(["0.3", "0.7"]), seed=st.sampled_from([0, 1]), force=FORCE)
    def split(self, parent: str, train: str, seed: int, force: list[str]) -> None:
        model = self.model.get(parent, [])
        if len(model) < 2:
            self.do(["split", parent, "--train", train, "--out", "s"], force, None, [parent])
            return
        order = np.random.default_rng(seed).permutation(len(model))
        share = min(max(round(float(train) * len(model)), 1), len(model) - 1)
        parts = {"s-train.zarr": order[:share], "s-validation.zarr": order[share:]}
        outs = {name: [model[i] for i in np.sort(numbers)] for name, numbers in parts.items()}
        self.do(["split", parent, "--train", train, "--seed", str(seed), "--out", "s"], force, outs, [parent])

    @rule(parent=PARENTS, out=OUTS, least=st.integers(1, 5), force=FORCE)
    def filter(self, parent: str, out: str, least: int, force: list[str]) -> None:
        kept = [e for e in self.model.get(parent, []) if len(e.actions) >= least]
        args = ["filter", parent, "--out", out, "--min-length", str(least)]
        self.do(args, force, {out: kept} if kept else None, [parent])

    @rule(parent=PARENTS, out=OUTS, num=st.integers(1, 4), seed=st.sampled_from([0, 1]), force=FORCE)
    def subsample(self, parent: str, out: str, num: int, seed: int, force: list[str]) -> None:
        model = self.model.get(parent, [])
        chosen = np.sort(np.random.default_rng(seed).permutation(len(model))[:num])
        args = ["subsample", parent, "--out", out, "--episodes", str(num), "--seed", str(seed)]
        self.do(args, force, {out: [model[i] for i in chosen]} if num <= len(model) else None, [parent])

    @rule(parent=PARENTS, out=OUTS, label=st.sampled_from(["", "given", "zero"]), force=FORCE)
    def drop_rewards(self, parent: str, out: str, label: str, force: list[str]) -> None:
        model = self.model.get(parent, [])
        has = any(name.startswith(f"{label}/") for name in model[0].labels) if model else False
        left = [
            e._replace(labels={k: v for k, v in e.labels.items() if label and not k.startswith(f"{label}/")})
            for e in model
        ]
        args = ["drop-rewards", parent, "--out", out, *(["--label", label] if label else [])]
        self.do(args, force, {out: left} if has or not label else None, [parent])

    @rule(parent=PARENTS, out=OUTS, rewards=st.sampled_from(["zeros", "successes", "given"]), force=FORCE)
    def label(self, parent: str, out: str, rewards: str, force: list[str]) -> None:
        model = self.model.get(parent, [])
        names = set(model[0].labels) if model else set()
        needed = {"zeros": names, "successes": {"given/success"}, "given": {"given/reward"}}[rewards]
        able = needed <= names and "zero/reward" not in names
        made: dict[str, Callable[[Episode], Rows]] = {
            "zeros": lambda e: np.zeros(len(e.actions), np.float32),
            "successes": lambda e: e.labels["given/success"].astype(np.float32),
            "given": lambda e: e.labels["given/reward"],
        }
        outs = (
            {out: [e._replace(labels={**e.labels, "zero/reward": made[rewards](e)}) for e in model]} if able else None
        )
        self.do(["label", parent, "zero", "--rewards", rewards, "--out", out], force, outs, [parent])

    @rule(parent=PARENTS, k=st.integers(1, 3), force=FORCE)
    def examples(self, parent: str, k: int, force: list[str]) -> None:
        """The last states of each episode: a file, so that nothing is known of what made it."""
        before, there = prints(self.work), "e.npy" in self.files
        code, said = self.call(["data", "examples", parent, "--out", "e.npy", "--rule", "last", "--k", str(k), *force])
        rows = [e.observations[max(1, len(e.actions) + 1 - k) :] for e in self.model.get(parent, [])]
        legal, same = bool(rows), there and bool(rows) and np.array_equal(self.files["e.npy"], np.concatenate(rows))
        written = legal and (not there or bool(force))
        assert code == (0 if written else 2) or (same and code == 0), said
        if written:
            self.files["e.npy"] = np.concatenate(rows)
            np.testing.assert_array_equal(np.load(self.work / "e.npy"), self.files["e.npy"])
        self.untouched(before, ("e.npy",) if written else ())

    @rule(parent=PARENTS)
    def verify(self, parent: str) -> None:
        code, said = self.call(["data", "verify", parent])
        assert code == (0 if parent in self.model else 2), said


def machine(monkeypatch: pytest.MonkeyPatch, examples: int, steps: int, derandomize: bool) -> None:
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    Commands.steps, failed = 0, 1
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=derandomize, deadline=None, database=None,
        suppress_health_check=list(HealthCheck), print_blob=True, phases=[Phase.generate],
    )  # fmt: skip
    try:
        run_state_machine_as_test(Commands, settings=chosen)
        failed = 0
    finally:
        count(f"data commands against the model, in {examples:,} examples", Commands.steps, failed)


def test_fifty_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 50, 6, derandomize=True)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 1000, 12, derandomize=False)
