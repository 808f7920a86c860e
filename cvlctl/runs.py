"""A run's directory.

<out>/run.json              what it is, of which inputs, how it computes, and how far it is
<out>/recipe.yaml           the resolved recipe
<out>/metrics.jsonl         one line every `log_every_steps` updates; metrics.png and .svg once finished
<out>/checkpoints/          last.safetensors, and step-000005000.safetensors where asked for
<out>/explain/              what `cvlctl explain` computes once
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cvlctl.cell import where
from cvlctl.errors import CvlctlError
from cvlctl.files import (
    Lock,
    check_place,
    disk,
    entries,
    lock,
    read_regular,
    sweep,
    sync,
    temporary_of,
    write_atomically,
    write_json,
)
from cvlctl.version import versions

_CHECKPOINT = re.compile(r"(last|(step|episodes)-\d+)\.safetensors")  # others are somebody's own
LABELS_FILE = "labels.safetensors"  # in a run: rewards that it learned
FEATURES = ("features.npy", "features.json", "features.part")  # of all frames, what these are of, and half written
EXPLAINED = "explain"  # a folder in it: what `cvlctl explain` keeps, by these names
_EXPLAINED = re.compile(r"psi-\d+\.(npy|json)|map-\d+-\d+\.png|frames\.png")
_DECIDED = ("device", "threads", "precision", "compile", "memory_gb")  # as it begins, where a recipe says "auto"
_NO_MATTER = ("out", "loggers", "label")  # what comes out is the same
REPLACED = {"status": "replaced", "inputs": {}, "recipe": {}}  # a record like no run's: what it was of is going
_FILES = ("run.json", "recipe.yaml", "metrics.jsonl", "metrics.png", "metrics.svg", LABELS_FILE, *FEATURES)


class Run:
    """One run directory, held by one process at a time.

    Args:
        out: the directory.
        recipe: the resolved recipe, as plain data.
        inputs: digest of every input by name: with the recipe, what makes two runs the same.
        refill: fills defaults of keys that have come since into the recipe of a run that an earlier version started.
    """

    def __init__(
        self,
        out: Path,
        recipe: dict[str, Any],
        inputs: dict[str, str],
        refill: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.out, self.recipe, self.inputs, self._refill = out, recipe, inputs, refill
        self.checkpoints = out / "checkpoints"
        self._lock: Lock | None = None

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    def open(self, *, force: bool = False) -> str:
        """Take the directory. Returns "fresh", "resume" or "finished".

        Another recipe than that of a run without any checkpoint yet just starts: there is nothing to lose. A run goes
        on where its recipe now says more steps, and takes another label.

        Args:
            force: start a run over that is there: what runs write is deleted, and nothing else.

        Raises:
            CvlctlError: where another recipe, other inputs or another process has it, it is in a store, or it is no
                run's (also with `force`: what is in it may be anything).
        """
        check_place(self.out)
        before = self._before(force)
        sweep(self.out, *_FILES)
        sweep(self.checkpoints)
        if (
            before is not None
            and before["status"] == "finished"
            and not (self._raised(before) or self._renamed(before))
        ):
            return "finished"  # also where nothing can be written
        self._lock = lock(self.out / ".lock")
        try:
            return self._taken(force)
        except BaseException:
            self.close()
            raise

    def check(self, *, force: bool = False) -> None:
        """Raise what `open` would, as far as looking tells."""
        self._before(force)

    def _before(self, force: bool) -> dict[str, Any] | None:
        """The record of the run that is there, and this one; None where nothing is, or it is to be started over."""
        if not (self.out / "run.json").exists():
            if all(name == ".lock" or temporary_of(name) in _FILES for name in entries(self.out)):
                return None
            raise CvlctlError(f"{self.out} is not empty and not a run", "choose another out: nothing in it was touched")
        before = None if force else read_run(self.out)
        if before is not None and is_worth_something(self.out, before):
            changed = self._difference(before)
            if changed:
                raise another(self.out, changed)
        return before

    def _taken(self, force: bool) -> str:
        """What `open` says, once the directory is ours alone: only now does it stay what it is."""
        before = self._before(force)
        if before is not None and before["status"] == "finished":
            if not self._raised(before):
                if self._renamed(before):
                    self._rename(before)
                self.close()
                return "finished"
            if not self.last.exists():
                what = f"{self.out}: its last checkpoint is gone: more steps have nothing to go on from"
                raise CvlctlError(what, "--force starts the run over")
        if before is not None and self.last.exists():
            if self._raised(before) or self._renamed(before):
                self._keep_recipe(self.recipe)
                self._write("started", {})
            return "resume"
        if (force and (self.out / "run.json").exists()) or (before is not None and self._difference(before)):
            self._clear()
        self._write("started", {})
        self._keep_recipe(self.recipe)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)
        return "fresh"

    def _raised(self, before: dict[str, Any]) -> bool:
        return raised(before["recipe"], self.recipe)

    def _renamed(self, before: dict[str, Any]) -> bool:
        return bool(before["recipe"].get("label") != self.recipe.get("label"))

    def _rename(self, before: dict[str, Any]) -> None:
        """A finished run takes the label that its recipe has now: what it learned stays what it is."""
        recipe = before["recipe"] | {"label": self.recipe.get("label")}
        self._keep_recipe(recipe)
        write_json(self.out / "run.json", before | {"algorithm": called(recipe), "recipe": recipe})

    def _keep_recipe(self, recipe: dict[str, Any]) -> None:
        write_atomically(self.out / "recipe.yaml", yaml.safe_dump(recipe, sort_keys=False).encode())

    def _difference(self, before: dict[str, Any]) -> str:
        """How the run of a record differs from this one, in words. One moved or copied, or that is to have more steps,
        is still the same."""
        try:
            then = self._refill(before["recipe"])
            return changed(then, self.recipe) or difference(before["inputs"], self.inputs)
        except RecursionError:
            return "its recipe has no end"

    def _clear(self) -> None:
        # first of all it becomes a run like no other: a kill in here leaves nothing that could be taken for ours
        write_json(self.out / "run.json", REPLACED)
        with disk(self.out):
            self._remove()

    def _remove(self) -> None:
        for name in ("metrics.jsonl", "metrics.png", "metrics.svg", LABELS_FILE, *FEATURES):
            (self.out / name).unlink(missing_ok=True)
        for file in _own_checkpoints(self.out):
            file.unlink(missing_ok=True)
        for folder in (self.out, self.checkpoints):  # where power is lost, they must not come back as this run's
            if folder.is_dir():
                sync(folder)

    def _write(self, status: str, more: dict[str, Any]) -> None:
        about = {"versions": versions(), "where": where()}
        record = {"status": status, **more, "inputs": self.inputs, **about, "recipe": self.recipe}
        write_json(self.out / "run.json", record)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        path = self.out / "metrics.jsonl"
        with disk(path), open(path, "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def sync_metrics(self) -> None:
        """Wait until all lines are on the disk: to be called before a checkpoint, which goes on after them."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            with disk(path):
                sync(path)
                sync(self.out)  # and its name: it may be new

    def cut_metrics(self, step: int, every: int = 1) -> None:
        """On resume: drop the lines logged after the checkpoint, which are about to be logged again; and the last line
        of a run that is to have more steps, where its step is no multiple of `every`."""
        path = self.out / "metrics.jsonl"
        if path.exists():
            lines = read_metrics(self.out) if step else []
            kept = [line for line in lines if line["step"] <= step and line["step"] % every == 0]
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())

    def finish(self, **more: Any) -> None:
        """Mark the run as finished: the last thing that it writes."""
        self._write("finished", more)
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def is_worth_something(out: Path, record: Mapping[str, Any]) -> bool:
    """Whether there is anything to lose in a run: it is finished, or has checkpoints."""
    return record["status"] == "finished" or bool(_own_checkpoints(out))


def _own_checkpoints(out: Path) -> list[Path]:
    return [file for file in (out / "checkpoints").glob("*.safetensors") if _CHECKPOINT.fullmatch(file.name)]


def another(out: Path, changed: str) -> CvlctlError:
    """What a recipe is told that is not that of the run in `out`."""
    hint = "choose another out, or --force to start it over"
    if changed.startswith("steps was"):
        hint = f"a run goes on to more steps, never back to fewer: {hint}"
    return CvlctlError(f"{out} holds another run: {changed}", hint)


def remove(out: Path) -> list[str]:
    """Remove the run in `out`, which nobody may be at: what runs write, and the folders where nothing else is in them.
    What is reached through a link stays. Returns what is left, by name.

    Raises:
        CvlctlError: the disk refuses. It is no run any more, and the same call goes on.
    """
    folders = {out / "checkpoints": _CHECKPOINT, out / EXPLAINED: _EXPLAINED}
    with disk(out):
        write_json(out / "run.json", REPLACED)
        for folder, ours in folders.items():
            if folder.is_dir() and not folder.is_symlink():
                sweep(folder)
                for name in entries(folder):
                    if ours.fullmatch(name):
                        (folder / name).unlink()
        sweep(out, *_FILES)
        for name in (*reversed(_FILES), ".lock"):  # the record last but one: what a kill leaves is still a run's
            (out / name).unlink(missing_ok=True)
        for folder in (*folders, out):
            if not folder.is_symlink() and folder.is_dir() and not entries(folder):
                folder.rmdir()
    return sorted(entries(out))


def settled(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A recorded recipe, with what `now` says of how to compute where either leaves it to be decided: either is true of
    what was decided."""
    return then | {key: now[key] for key in _DECIDED if key in now and "auto" in (then.get(key), now[key])}


def raised(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether of two recipes the second says more steps: a run of the first goes on."""
    steps = then.get("steps"), now.get("steps")
    return all(type(one) is int for one in steps) and steps[0] < steps[1]  # type: ignore[operator]


def changed(then: dict[str, Any], now: dict[str, Any]) -> str:
    """How a recipe differs from that of a run, in words; "" where the run is its own, or goes on with it."""
    then = settled(then, now)
    skipped = (*_NO_MATTER, *(("steps",) if raised(then, now) else ()))
    before_it, it = ({k: v for k, v in r.items() if k not in skipped} for r in (then, now))
    return difference(before_it, it)


def called(recipe: Mapping[str, Any]) -> str | None:
    """What the tables call a run of that recipe; None where the recipe does not say."""
    algorithm = recipe.get("algorithm")
    name = recipe.get("label") or (algorithm.get("name") if isinstance(algorithm, dict) else None)
    return name if isinstance(name, str) else None


def read_run(out: Path) -> dict[str, Any]:
    """The record in <out>/run.json: its status (text), recipe and inputs (dicts), and what else there is.

    Raises:
        CvlctlError: there is none, or it is damaged.
    """
    path = out / "run.json"
    try:
        record: dict[str, Any] = json.loads(read_regular(path).decode())
        record.setdefault("recipe", {})
        for key, kind in (("status", str), ("inputs", dict), ("recipe", dict)):
            if not isinstance(record[key], kind):
                raise TypeError(f"{key} is {_short(record[key])}")
    except FileNotFoundError as error:
        raise CvlctlError(f"{out} is not a run: it has no run.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CvlctlError(f"{path}: damaged: {error}", "--force starts the run over") from error
    return record


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each with its `step`; of a last line that a kill cut off nothing.

    Raises:
        CvlctlError: there is no such file, or a line of it is damaged.
    """
    path, lines = out / "metrics.jsonl", []
    try:
        *whole, rest = read_regular(path).split(b"\n")
    except OSError as error:
        raise CvlctlError(f"cannot read {path}: {error.strerror}", "--force starts the run over") from error
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(_metrics(line))
        except (ValueError, RecursionError) as error:
            what = f"{path}, line {number}: damaged: {error}"
            raise CvlctlError(what, "delete the line, or --force starts the run over") from error
    with suppress(ValueError, RecursionError):
        lines.append(_metrics(rest))
    return lines


def _metrics(line: bytes) -> dict[str, Any]:
    found = json.loads(line.decode())
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise ValueError("no object with a step")
    return found


def difference(before: Any, now: Any, key: str = "") -> str:
    """The first difference between two pieces of plain data, in words; "" where there is none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(n for n in now if n not in before)]:
            found = difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return ""
    return "" if before == now else f"{key} was {_short(before)}, now {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
