"""Tiny cases of every command that writes: what it is called with, and what it needs beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

COMPUTED = "device: cpu\nthreads: 1\nprecision: float32\ncompile: false\ncheckpoint_seconds: 1.0e-6\n"
TRAINED = "steps: 3\nbatch_size: 4\nseeds: [0, 1]\nlog_every_steps: 1\n" + COMPUTED
CRITIC = "critic: {hidden: [8], latent_dim: 4}\n"
RECIPES = {
    "random.yaml": "task: gym/Pendulum-v1\nsource: {name: random, episodes: 3}\nhorizon: 5\nout: out.zarr\n" + COMPUTED,
    "sac.yaml": "task: gym/Pendulum-v1\nhorizon: 5\nout: out.zarr\nsource: {name: sac, steps: 12, learning_starts: 5, "
    "hidden: [8], batch_size: 4, policy_every_steps: 6}\n" + COMPUTED,
    "pretrain.yaml": "stores: [a.zarr]\nout: run\ncheckpoint_every_steps: 2\n" + CRITIC + TRAINED,
    "cvl.yaml": "stores: [a.zarr]\ninit_from: critic\nalgorithm: {name: cvl, hidden: [8], bank_size: 8}\nout: run\n"
    + TRAINED,
    "oril.yaml": "stores: [{path: a.zarr, rewards: oril}]\nsuccess_examples: {file: examples.npy}\nout: run\n"
    "labeller: {hidden: [8], steps: 3, batch_size: 4}\nalgorithm: {name: td3_bc, hidden: [8]}\n" + TRAINED,
    "bc.yaml": "stores: [a.zarr]\nalgorithm: {name: bc, hidden: [8]}\nout: policy\n" + TRAINED,
    "evaluate.yaml": "runs: [policy]\nepisodes: 2\nhorizon: 5\nworkers: 0\nconfidence: {resamples: 20}\nout: scores\n",
    "experiment.yaml": "out: e\nmatrix:\n  task: [gym/Pendulum-v1]\nstages:\n"
    "  data: {command: build-dataset, task: '${task}', source: {name: random, episodes: 2}, horizon: 5, "
    "out: '${out}/a.zarr', threads: 1}\n"
    "  critic: {command: pretrain, stores: ['${out}/a.zarr'], critic: {hidden: [8], latent_dim: 4}, steps: 2, "
    "batch_size: 4, out: '${out}/critic', threads: 1, device: cpu, compile: false, checkpoint_seconds: 1.0e-6}\n"
    "  policy: {command: finetune, stores: ['${out}/a.zarr'], algorithm: {name: bc, hidden: [8]}, steps: 2, "
    "batch_size: 4, out: '${out}/policy', threads: 1, device: cpu, compile: false, checkpoint_seconds: 1.0e-6}\n"
    "  scores: {command: evaluate, runs: ['${out}/policy'], episodes: 1, horizon: 5, workers: 0, "
    "confidence: {resamples: 20}, out: '${out}/scores'}\n",
}


class Case(NamedTuple):
    """A command line, and what lies beside it: names of inputs, or NAME:AS."""

    args: str
    needs: str


CASES = {
    "build random": Case("build-dataset random.yaml", "random.yaml"),
    "build random over another": Case("build-dataset random.yaml --force", "random.yaml b.zarr:out.zarr"),
    "build sac": Case("build-dataset sac.yaml", "sac.yaml"),
    "build sac over another": Case("build-dataset sac.yaml seed=1 --force", "sac.yaml sac.zarr:out.zarr "
                                   "sac.policies:out.policies"),
    "pretrain": Case("pretrain pretrain.yaml", "pretrain.yaml a.zarr"),
    "pretrain over another": Case("pretrain pretrain.yaml --force", "pretrain.yaml a.zarr critic:run"),
    "finetune cvl": Case("finetune cvl.yaml", "cvl.yaml a.zarr critic"),
    "finetune oril": Case("finetune oril.yaml", "oril.yaml a.zarr examples.npy"),
    "evaluate": Case("evaluate evaluate.yaml", "evaluate.yaml policy"),
    "evaluate over another": Case("evaluate evaluate.yaml --force seed=1", "evaluate.yaml policy scores"),
    "run": Case("run experiment.yaml --only stage=critic local.processes=1", "experiment.yaml"),
    "import npz": Case("data import npz a.npz --out out.zarr", "a.npz"),
    "import d4rl": Case("data import d4rl a.hdf5 --out out.zarr --task t", "a.hdf5"),
    "import over another": Case("data import npz a.npz --out out.zarr --force", "a.npz b.zarr:out.zarr"),
    "merge": Case("data merge a.zarr b.zarr --out out.zarr", "a.zarr b.zarr"),
    "merge over another": Case("data merge a.zarr b.zarr --out out.zarr --force", "a.zarr b.zarr b.zarr:out.zarr"),
    "split": Case("data split a.zarr --out out", "a.zarr"),
    "split over others": Case("data split a.zarr --out out --force",
                              "a.zarr b.zarr:out-train.zarr b.zarr:out-validation.zarr"),
    "filter": Case("data filter a.zarr --out out.zarr --min-length 1", "a.zarr"),
    "subsample": Case("data subsample a.zarr --out out.zarr --episodes 2", "a.zarr"),
    "drop-rewards": Case("data drop-rewards a.zarr --out out.zarr", "a.zarr"),
    "label": Case("data label a.zarr zero --rewards zeros --out out.zarr", "a.zarr"),
    "examples": Case("data examples a.zarr --out out.npz --rule last", "a.zarr"),
    "examples over others": Case("data examples a.zarr --out examples.npy --rule last --force", "a.zarr examples.npy"),
    "export npz": Case("data export a.zarr npz --out out.npz", "a.zarr"),
    "export d4rl": Case("data export a.zarr d4rl --out out.hdf5", "a.zarr"),
    "export ogbench": Case("data export a.zarr ogbench --out out.npz", "a.zarr"),
    "export minari": Case("data export a.zarr minari --out out-v0", "a.zarr"),
    "export minari over another": Case("data export b.zarr minari --out out-v0 --force", "b.zarr a-v0:out-v0"),
    "plot": Case("data plot a.zarr", "a.zarr"),
    "fetch": Case("data fetch d4rl/relocate-human-v1 --out out --mirror MIRROR", ""),
}  # fmt: skip


def make_inputs(folder: Path, execute: Callable[[list[str]], int]) -> None:
    """Everything that the cases need, in one folder, which is the current one; `execute` gives `cvlctl`'s exit code."""
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    np.save(folder / "examples.npy", np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3))
    for line in (
        "build-dataset random.yaml out=a.zarr",
        "build-dataset random.yaml out=b.zarr seed=1 source.episodes=2",
        "build-dataset sac.yaml out=sac.zarr",
        "pretrain pretrain.yaml out=critic",
        "finetune bc.yaml",
        "evaluate evaluate.yaml",
        "data export a.zarr npz --out a.npz",
        "data export a.zarr d4rl --out a.hdf5",
        "data export a.zarr minari --out a-v0",
        "data plot a.zarr --out a.png",
    ):
        assert execute(line.split()) == 0, line


def lay(case: Case, inputs: Path, folder: Path) -> None:
    """A fresh folder with what a case needs, beside files that are nobody's business."""
    folder.mkdir()
    (folder / "own").mkdir()
    (folder / "own" / "notes.txt").write_text("not yours")
    for need in case.needs.split():
        source, _, name = need.partition(":")
        if (inputs / source).is_dir():
            shutil.copytree(inputs / source, folder / (name or source))
        else:
            shutil.copy(inputs / source, folder / (name or source))
