"""What is fuzzed: stores, stores in writing, runs with their checkpoints, evaluations, recipes, and files to import."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from reliability import cases
from reliability.damage import VALUES, Op, apply, bytes_op, json_op, kind_op, tensor_op
from reliability.fuzz import Kind, command

sys.path.append(str(Path(__file__).parents[1] / "data"))
FORMATS = ("npz", "ogbench", "d4rl", "minari", "robomimic", "sb3", "arrays")
RECIPES = Path(__file__).parents[2] / "recipes"


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------- stores


def make_stores(folder: Path) -> None:
    from cvlctl.data import writer
    from cvlctl.types import Episode

    chunk_rows, writer.CHUNK_ROWS = writer.CHUNK_ROWS, 12
    for name, seed in (("a.zarr", 0), ("b.zarr", 1)):
        rng = np.random.default_rng(seed)
        episodes = [
            Episode(rng.normal(size=(n + 1, 3)), rng.uniform(-1, 1, (n, 2)), rng.normal(size=n), rng.random(n) < 0.5,
                    bool(n % 2), "ab"[n % 2], 10 * n, seed) for n in range(1, 9)
        ]  # fmt: skip
        provenance = {"recipe": {"task": "toy"}, "parents": [{"path": "x", "digest": "0" * 64, "provenance": {}}]}
        writer.write_store(folder / name, episodes, task="toy", provenance=provenance)
    writer.CHUNK_ROWS = chunk_rows


def damage_store(_: str, rng: random.Random) -> list[Op]:
    store, kind = Path("a.zarr"), rng.random()
    found = files_in(store)
    metadata, chunks = [f for f in found if f.suffix == ".json"], [f for f in found if f.suffix != ".json"]
    if kind < 0.25:
        return [json_op(store / "zarr.json", rng)]
    if kind < 0.4:
        return [json_op(rng.choice(metadata), rng)]
    if kind < 0.5:
        return [
            ["declare", str(store / "zarr.json"), rng.choice((1, 10**6, 10**12, 10**18)), rng.choice((0, 1, 10**12))]
        ]
    if kind < 0.6:
        a, b = rng.sample([p for p in store.rglob("*") if p.is_dir()], 2)
        if a in b.parents or b in a.parents:
            return [["gone", str(a)]]
        return [["swap", str(a), str(b)]]
    if kind < 0.8:
        return [kind_op(rng.choice(found), [*found, *files_in(Path("b.zarr"))], rng)]
    return [bytes_op(rng.choice(chunks if rng.random() < 0.7 else metadata), rng)]


def read_by_api() -> None:
    from cvlctl.data.store import open_store

    store = open_store("a.zarr")
    for label in [*store.labels, "given"]:
        for _ in store.episodes(label):
            pass
    store.futures(5, 0.9, 0, label)
    assert repr(store) and store.digest() and store.label_digest(label)


def read_for_training() -> None:
    from cvlctl.data import load
    from cvlctl.data.recipe import StoreUse

    uses = [StoreUse.model_validate({"path": "a.zarr", "rewards": "given"})]
    load.join(load.open_stores(uses), uses, None, True)


def stream() -> None:
    from cvlctl.data import load
    from cvlctl.data.recipe import StoreUse
    from cvlctl.data.stream import Stream

    uses = [StoreUse.model_validate({"path": "a.zarr", "rewards": "given"})]
    windows = Stream(load.open_stores(uses), uses, None, True, 100, 10, "cpu")
    windows.sample()
    windows.at(3)
    windows.close()


def data(line: str) -> Callable[[], int]:
    return partial(command, "data", *line.split())


STORES = Kind(
    make_stores,
    damage_store,
    {
        "API": read_by_api, "training": read_for_training, "streaming": stream,
        **{line: data(line) for line in (
            "ls .", "ls . --json", "info a.zarr", "info a.zarr --json", "verify a.zarr", "verify a.zarr --json",
            "filter a.zarr --out f.zarr --min-length 2", "merge a.zarr b.zarr --out m.zarr", "plot a.zarr",
            "split a.zarr --seed 1", "label a.zarr new --rewards successes --out l.zarr",
            "export a.zarr npz --out x.npz", "export a.zarr minari --out x-v0", "examples a.zarr --out e.npz",
            "drop-rewards a.zarr --out a.zarr --force",
        )},
    },
)  # fmt: skip


# --------------------------------------------------------------------------------------------------- stores of frames


def make_filmed(folder: Path) -> None:
    """As `make_stores`, of two cameras and states of the simulator."""
    from cvlctl.data import writer
    from cvlctl.types import Episode

    sizes, before = {"a": (4, 6, 3), "b": (8, 8, 1)}, (writer.CHUNK_ROWS, writer.FRAME_BYTES)
    writer.CHUNK_ROWS, writer.FRAME_BYTES = 12, 72 * 7
    for name, seed in (("a.zarr", 0), ("b.zarr", 1)):
        rng = np.random.default_rng(seed)
        episodes = [
            Episode(rng.normal(size=(n + 1, 3)) if seed else None, rng.uniform(-1, 1, (n, 2)), rng.normal(size=n),
                    images={c: rng.integers(0, 256, (n + 1, *size), np.uint8) for c, size in sizes.items()},
                    sim_state=rng.normal(size=(n + 1, 4))) for n in range(1, 9)
        ]  # fmt: skip
        writer.write_store(folder / name, episodes, task="toy")
    writer.CHUNK_ROWS, writer.FRAME_BYTES = before


def read_filmed() -> None:
    from cvlctl.data.store import Column, open_store

    store = open_store("a.zarr")
    for camera in store.spec.cameras:
        Column(store, store.camera_array(camera)).rows(0, 5)
        store.images(camera)
    for _ in store.episodes():
        pass
    assert repr(store) and store.digest()


FILMED = Kind(
    make_filmed,
    damage_store,
    {
        "API": read_filmed,
        **{line: data(line) for line in (
            "info a.zarr", "verify a.zarr", "split a.zarr", "preview a.zarr", "preview a.zarr --out x.gif --episode 3",
            "drop-rewards a.zarr --out d.zarr", "export a.zarr npz --out x.npz", "merge a.zarr a.zarr --out m.zarr",
            "examples a.zarr --out e.npz --rule last",
        )},
    },
)  # fmt: skip


# ----------------------------------------------------------------------------------------------- stores in writing


def make_unfinished(folder: Path) -> None:
    from cvlctl.data import writer

    make_stores(folder)
    writer.CHUNK_ROWS = 12
    with writer.StoreWriter(folder / "u.zarr", task="toy") as unfinished:
        for episode in writer.open_store(folder / "a.zarr").episodes():
            unfinished.append(episode)
        unfinished.flush()


def damage_unfinished(_: str, rng: random.Random) -> list[Op]:
    found = files_in(Path("u.zarr.partial"))
    file = Path("u.zarr.partial/tail.npz") if rng.random() < 0.5 else rng.choice(found)
    if file.suffix == ".json" and rng.random() < 0.5:
        return [json_op(file, rng)]
    return [kind_op(file, found, rng) if rng.random() < 0.3 else bytes_op(file, rng)] if file.stat().st_size else []


def resume() -> None:
    from cvlctl.data.writer import StoreWriter, open_store

    with StoreWriter("u.zarr", task="toy") as writer:
        for _ in writer.episodes():
            pass
        writer.append(next(open_store("b.zarr").episodes()))
        store = writer.finish()
    for _ in store.episodes():
        pass


UNFINISHED = Kind(make_unfinished, damage_unfinished, {"resume": resume, "ls .": data("ls .")})


# ----------------------------------------------------------------------------------------------------------- runs


def make_runs(folder: Path) -> None:
    """A critic, one that was stopped on the way, a policy of two seeds, and its scores, by the other cases' recipes."""
    for name, text in cases.RECIPES.items():
        (folder / name).write_text(text.replace("checkpoint_seconds: 1.0e-6", "checkpoint_seconds: 60"))
    for line in (
        "build-dataset random.yaml out=a.zarr", "pretrain pretrain.yaml out=critic", "finetune bc.yaml",
        "evaluate evaluate.yaml",
    ):  # fmt: skip
        assert command(*line.split()) == 0, line
    shutil.copytree(folder / "critic", folder / "stopped")
    apply([["set_json", "stopped/run.json", ["status"], '"started"']])


READ = {  # by which use of what
    "API": ("policy", "critic"), "pretrain pretrain.yaml out=critic": ("critic",),
    "pretrain pretrain.yaml out=stopped": ("stopped",), "finetune bc.yaml": ("policy",),
    "finetune cvl.yaml": ("critic",), "evaluate evaluate.yaml": ("policy", "scores", "scores"),
    "evaluate evaluate.yaml --format csv": ("scores",), "evaluate evaluate.yaml out=others episodes=1": ("policy",),
    "evaluate evaluate.yaml episodes=3": ("scores",),
}  # fmt: skip


def damage_runs(use: str, rng: random.Random) -> list[Op]:
    run = Path(rng.choice(READ[use]))
    found = [file for file in files_in(run) if file.suffix in (".json", ".jsonl", ".safetensors", ".yaml")]
    found = [file for file in found if file.stat().st_size and not file.name.startswith("step-")]
    file, kind = rng.choice(found), rng.random()
    if kind < 0.15:
        return [kind_op(file, files_in(Path()), rng)]
    ops = []
    if file.suffix == ".safetensors" and rng.random() < 0.7:
        apply(ops := [["unseal", str(file)]])
    if file.suffix == ".safetensors" and kind < 0.45:
        return [*ops, tensor_op(file, rng)]
    return [*ops, json_op(file, rng) if file.suffix != ".yaml" and kind < 0.75 else bytes_op(file, rng)]


def load_both() -> None:
    from cvlctl import load_critic, load_policy

    observations = np.zeros((2, 3))
    for seed in (0, 1):
        load_policy("policy", seed)(observations)
        load_critic("critic", seed).log_ratio(observations, np.zeros((2, 1)), observations)


RUNS = Kind(
    make_runs,
    damage_runs,
    {use: load_both if use == "API" else partial(command, *use.split()) for use in READ},
    refused=0.2,
)


# --------------------------------------------------------------------------------------------------------- recipes

PIECES = (
    *VALUES[1:], "\t", ": ", "- ", "\n", "  ", "&a ", "*a", "<<: *a", "!!python/object/apply:os.system [id]",
    "!!binary x", "{",
    "}", "[", "]", "'", '"', "|", ">", "~", "?", "---", "...", "#", "%YAML 1.1", ".inf", "0x10", "0o17",
    "1_000", "2001-01-01", "yes", "${task}", "${nope}", "$HOME", "~", "steps", "seeds", "out", "\ufeff", "\u2028", "é",
    "-" * 300, "[" * 200, "{a: " * 200, "x" * 70_000,
)  # fmt: skip


KEYS = ("steps", "seeds", "seeds.0", "stages.data.out", "algorithm.name", "critic.hidden", "a.b.c", "", ".", "out")


def make_recipes(folder: Path) -> None:
    for file in sorted(RECIPES.rglob("*.yaml")):
        (folder / file.name).write_bytes(file.read_bytes())
    for name, text in cases.RECIPES.items():
        (folder / name).write_text(text)
    (folder / "recipe.yaml").write_text(cases.RECIPES["experiment.yaml"])
    (folder / "overrides").touch()


def damage_recipe(_: str, rng: random.Random) -> list[Op]:
    """Another recipe as `recipe.yaml`, a byte or a few pieces of its text replaced; or odd overrides."""
    source = rng.choice([file for file in files_in(Path()) if file.suffix == ".yaml" and file.stem != "recipe"])
    words, ops = source.read_text(), [["swap", "recipe.yaml", source.name]]
    if rng.random() < 0.1:
        return [*ops, ["poke", "recipe.yaml", [rng.randrange(len(words)), rng.randrange(256)]]]
    if rng.random() < 0.15:
        lines = [f"{rng.choice(KEYS)}={rng.choice(PIECES)}" for _ in range(rng.choice((1, 3)))]
        return [*ops, ["text", "overrides", 0, 0, "\n".join(lines)]]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(words))
        if rng.random() < 0.6:  # a value: what follows a colon
            at = words.find(": ", at) + 2
            end = min(words.find(mark, at) % (len(words) + 1) for mark in ("\n", ",", "}"))
            new, count = rng.choice(PIECES), max(0, end - at)
        else:
            new, count = rng.choice(PIECES), rng.choice((0, 0, 1, 5, 40))
        words = words[:at] + new + words[at + count :]
        ops.append(["text", "recipe.yaml", at, count, new])
    return ops


def load_with_overrides() -> None:
    from cvlctl.experiments.commands import load

    load("recipe.yaml", Path("overrides").read_text().splitlines())


RECIPE = Kind(
    make_recipes,
    damage_recipe,
    {
        "load": load_with_overrides, "validate": partial(command, "recipes", "validate", "recipe.yaml"),
        "validate --json": partial(command, "recipes", "validate", "recipe.yaml", "--json"),
        "ls": partial(command, "recipes", "ls", "."), "plan": partial(command, "run", "recipe.yaml", "--dry-run"),
    },
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- imports


def make_imports(folder: Path) -> None:
    from toy_files import WRITTEN, episodes, hdf5, robomimic_file, rows, sb3_arrays

    from cvlctl.data import formats
    from cvlctl.data.writer import write_store

    for format in FORMATS:
        (folder / format).mkdir()
    robomimic_file(folder / "robomimic/a.hdf5", 4)
    hdf5(folder / "arrays/a.hdf5", rows())
    np.savez_compressed(folder / "sb3/a.npz", **sb3_arrays())
    store = write_store(folder / "a.zarr", episodes(), task="toy")
    for format, name in WRITTEN.items():
        formats.export_store(format, store, folder / format / name)


def imported(format: str) -> Path:
    """What is imported lies alone in the folder of its format."""
    return next(Path(format).iterdir())


def damage_import(use: str, rng: random.Random) -> list[Op]:
    path = imported(use.split()[-1])
    return [bytes_op(path / "data" / "main_data.hdf5" if path.is_dir() else path, rng)]


def read_import(format: str) -> None:
    from cvlctl.data import formats
    from cvlctl.errors import CvlctlError

    path = imported(format)
    try:
        formats.FORMATS[format].facts(path)
        for _ in formats.FORMATS[format].read(path):
            pass
    except CvlctlError as error:
        assert str(path) in error.what, f"no file named: {error.what}"
        raise


def import_by_command(format: str) -> int:
    return command("data", "import", format, str(imported(format)), "--out", "new.zarr", "--task", "toy")


IMPORT = Kind(
    make_imports,
    damage_import,
    {f"read {format}": partial(read_import, format) for format in FORMATS}
    | {f"import {format}": partial(import_by_command, format) for format in FORMATS},
)

KINDS: dict[str, Kind] = {
    "store": STORES, "filmed": FILMED, "unfinished": UNFINISHED, "run": RUNS, "recipe": RECIPE, "import": IMPORT,
}  # fmt: skip

__all__: list[Any] = ["KINDS"]
