"""Other people's datasets in, ours out: `FORMATS` is the list of what is read and written (docs/formats.md).

A reader is a generator of episodes: it holds one block of the file at a time. A writer takes an opened store. Neither
ever loads a pickle, nor needs the package of the project whose files it reads or writes.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cvlctl.data import units
from cvlctl.data.formats import (
    arrays,
    csv_parquet,
    d4rl,
    hdf5_episodes,
    imitation,
    lerobot,
    lerobot_out,
    minari,
    npz,
    ogbench,
    rlds,
    robomimic,
    sb3,
    zarr_replay,
)
from cvlctl.data.formats.dropping import Dropping
from cvlctl.data.formats.fetching import fetch
from cvlctl.data.formats.kinds import refuse_another
from cvlctl.data.formats.sources import Facts, Told
from cvlctl.data.provenance import jsonable
from cvlctl.data.store import Store, open_store
from cvlctl.data.writer import write_all
from cvlctl.errors import CvlctlError, Exists
from cvlctl.files import sha256
from cvlctl.folders import put_right
from cvlctl.progress import Progress, say
from cvlctl.types import Episode, check_text
from cvlctl.units import KEY, Units, plain, read_units

__all__ = [
    "FLAGS", "FORMATS", "Format", "export_store", "exported_already", "fetch", "import_store", "imported_already",
    "options_of",
]  # fmt: skip


class Format(NamedTuple):
    """How one format is read and written.

    `read(path, told, **options)` yields its episodes, `facts(path)` tells what the file says of itself, and
    `write(store, path, label, force)` makes the file, or the folder, whole or not at all; None: not written.
    """

    about: str
    read: Callable[..., Iterator[Episode]]
    facts: Callable[[Path], Facts]
    write: Callable[[Store, Path, str, bool], None] | None = None


FORMATS: dict[str, Format] = {
    "d4rl": Format("D4RL's HDF5, of any version", d4rl.read, d4rl.facts, d4rl.write),
    "minari": Format("a Minari dataset's folder (HDF5)", minari.read, minari.facts, minari.write),
    "ogbench": Format("OGBench's npz", ogbench.read, ogbench.facts, ogbench.write),
    "robomimic": Format("robomimic's HDF5", robomimic.read, robomimic.facts),
    "hdf5": Format(
        "HDF5, a group or a file an episode (ALOHA, ManiSkill, d3rlpy)", hdf5_episodes.read, hdf5_episodes.facts
    ),
    "sb3": Format("a Stable-Baselines3 replay buffer, saved as npz (docs/formats.md)", sb3.read, sb3.facts),
    "npz": Format("plain npz: arrays and episode_ends (docs/formats.md)", npz.read, npz.facts, npz.write),
    "lerobot": Format("a LeRobot dataset's folder, v2.0 to v3.0", lerobot.read, lerobot.facts, lerobot_out.write),
    "rlds": Format("an RLDS dataset's folder (Open X), of TFRecord files", rlds.read, rlds.facts),
    "zarr": Format("a replay buffer of Diffusion Policy or UMI, Zarr v2", zarr_replay.read, zarr_replay.facts),
    "imitation": Format("imitation's npz of trajectories", imitation.read, imitation.facts),
    "table": Format("rows in CSV or parquet files, named by `keys`", csv_parquet.read, csv_parquet.facts),
    "arrays": Format("rows in an npz or HDF5 file of your own, named by `keys`", arrays.read, arrays.facts),
}


FLAGS = {  # what the command line calls the options of readers
    "horizon": "--horizon", "action_bounds": "--action-bounds", "clip_actions": "--clip-actions",
    "observation_keys": "--observation-key", "keys": "--key", "split": "--split", "cameras": "--camera",
    "image_size": "--image-size",
}  # fmt: skip


def options_of(format: str) -> list[str]:
    """Names of the options that a format's reader takes."""
    return [p.name for p in inspect.signature(_format(format).read).parameters.values() if p.kind is p.KEYWORD_ONLY]


def import_store(
    format: str,
    path: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    horizon: int | None = None,
    label: str = "given",
    columns: Sequence[str] = (),
    drop_columns: Sequence[str] = (),
    control_period: float | None = None,
    drop_nan: bool = False,
    force: bool = False,
    command: str = "",
    **options: Any,
) -> Store:
    """Write the episodes of a file to a new store, streaming, all or nothing.

    Args:
        format: a key of `FORMATS`.
        task: name of the task; default: what the file says, an error where it says nothing.
        horizon: longest possible episode; default: what the file says, else the longest one seen. Where a D4RL file
            or rows of your own mark no time limits, episodes are cut at this length.
        label: name under which rewards and successes are kept.
        columns: names of the observations' columns, in their order; default: what the file says.
        drop_columns: names, or numbers from 0, of those to leave out.
        control_period: seconds from one step to the next; default: what the file says.
        drop_nan: leave episodes out that hold NaN or infinity, and say which.
        force: replace a store that is at `out`, once the new one is complete.
        command: the command line, for the store's provenance.
        options: the reader's own: `options_of(format)`. Those that most take:
            action_bounds: (low, high), numbers or one per dimension: actions in these bounds are scaled to [-1, 1].
            clip_actions: cut actions off at [-1, 1] rather than refuse those that lie outside.
            observation_keys: for observations in several arrays, those to join, in this order.
            keys: for "arrays", our name -> the file's.
            cameras: images to import, by the file's names, or as OURS=THEIRS; ["all"]: every one.
            image_size: height and width to bring them to: scaled, and the middle taken.

    Raises:
        CvlctlError: whatever is wrong with the file, naming file and array, the store exists, or an unknown option.
    """
    chosen, path, legal = _format(format), Path(path), options_of(format)
    for name in options:
        if name not in legal:
            near = difflib.get_close_matches(name, legal, n=1)
            takes = ", ".join(f"{FLAGS[one]} ({one})" for one in legal)
            hint = f"did you mean {near[0]}?" if near and name not in FLAGS else f"it takes: {takes}"
            option = f"{FLAGS[name]} ({name})" if name in FLAGS else f"option {name!r}"
            raise CvlctlError(f"the format {format} has no {option}", hint)
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        raise CvlctlError(f"nothing at {path}", f"did you mean {path.parent / near[0]}?" if near else "check the path")
    refuse_another(format, path)
    put_right(Path(out))
    if Path(out).exists() and not force:  # said before the file is read
        raise Exists(out)
    read_units("import", {KEY: options.get(KEY), "control_period": control_period}, None)  # before anything is read
    facts = chosen.facts(path)
    check_text(f"{path}: the task", facts.task)
    if not (task or facts.task):
        raise CvlctlError(f"{path} does not say which task it is of", "--task NAME, such as --task gym/Hopper-v5")
    given = options | ({"horizon": horizon} if "horizon" in legal else {})
    read = _files(path, facts, given)
    before = [_state(file) for file in read]
    source = _source(format, path, facts, given)
    provenance = {"source": source} | ({"command": command} if command else {})
    bounds = facts.action_bounds if options.get(KEY) is None else options[KEY]
    if bounds is not None:
        provenance[KEY] = plain(bounds)
    read_units(str(path), facts.units, None)
    told = Told(list(columns or facts.units.get("observation_columns", ())), drop_nan=drop_nan)
    dropping = Dropping(path, drop_columns, told)

    def all_units() -> Units:
        for remark in told.remarks:
            say(f"{path}: {remark}")
        if [_state(file) for file in read] != before:  # the digest would be of something else
            raise CvlctlError(f"{path} was changed while it was read", "import it when nothing writes it any more")
        return _units(facts, told, dropping, control_period)

    with Progress(f"import {path.name}", facts.transitions, "transitions") as progress:
        episodes = _counted(map(dropping.of, chosen.read(path, told, **given)), path, progress, told)
        return write_all(
            out, episodes, all_units, task=task or facts.task, horizon=horizon or facts.horizon,
            provenance=provenance, label=label, attributes=_attributes(facts, options), force=force,
        )  # fmt: skip


def _units(facts: Facts, told: Told, dropping: Dropping, control_period: float | None) -> Units:
    """What a store says of its numbers, of what its file says, what was read, and what was given."""
    clipped = told.clipped / told.values if told.values else facts.units.get("clipped_fraction")
    if told.clipped:
        say(f"--clip-actions: {100 * told.clipped / told.values:.2g} % of the actions' values were cut off")
    return Units(
        observation_columns=dropping.kept,
        dropped_columns=[*facts.units.get("dropped_columns", ()), *told.dropped, *dropping.dropped],
        clipped_fraction=clipped,
        control_period=control_period or facts.units.get("control_period"),
        remarks=[*facts.units.get("remarks", ()), *told.remarks],
    )


def export_store(format: str, store: Store, out: str | Path, *, label: str = "given", force: bool = False) -> Path:
    """Write a store in another format, whole or not at all. Returns the path.

    Args:
        label: which rewards and successes to write; a store without any gives a file of zero rewards, or of none.
        force: replace what is at `out`, if it is a file, or a dataset's folder of that format.

    Raises:
        CvlctlError: the format is not written, `out` exists, the label is unknown, the store is not what its
            checksums say, or the disk refuses.
    """
    write, out = _format(format).write, Path(out)
    put_right(out)
    if write is None:
        able = ", ".join(name for name, entry in FORMATS.items() if entry.write)
        raise CvlctlError(f"stores are not written as {format}", f"they are as: {able}")
    if label != "given":
        store.require_label(label)
    if out.exists() and not force:
        raise Exists(out)
    ours = {"minari": minari.is_dataset, "lerobot": lerobot_out.is_dataset}
    if out.is_dir() and not (format in ours and ours[format](out)):
        raise CvlctlError(f"{out} is a directory", "choose another path: nothing in it was touched")
    store.check([*store.arrays, *store.label_arrays(label)])
    write(store, out, label, force)
    units.say_units(store)
    if store.has_sim_state:
        say(f"{store.path}: its states of the simulator are not exported")
    return out


def imported_already(
    format: str, path: Path, out: Path, command: str, *, horizon: int | None, force: bool, **options: Any
) -> Store | None:
    """The store at `out`, where this very command wrote it, from a file of the same content; see `import_store`.

    With `force` it is none, but for a command that was killed when all was done, and could not tidy up.
    """
    tidied = put_right(out)
    if not out.exists() or (force and not tidied):
        return None
    try:
        store, chosen = open_store(out), _format(format)
        if store.provenance.get("command") != command:
            return None
        given = options | ({"horizon": horizon} if "horizon" in options_of(format) else {})
        return store if store.provenance.get("source") == _source(format, path, chosen.facts(path), given) else None
    except (CvlctlError, OSError):  # `import_store` will say what it is
        return None


def exported_already(format: str, store: Store, out: Path, label: str) -> bool:
    """Whether what is at `out` was exported from this content, in this format."""
    put_right(out)
    try:
        return out.exists() and _format(format).facts(out).exported == units.export_digest(format, store, label)
    except CvlctlError:  # it is something else
        return False


def _attributes(facts: Facts, options: dict[str, Any]) -> dict[str, Any]:
    """What the store says of its environment, with the observations that were chosen."""
    if facts.environment is None:
        return {}
    keys = list(options.get("observation_keys") or facts.environment.get("keys") or ())
    return {"environment": facts.environment | ({"keys": keys} if keys else {})}


def _files(path: Path, facts: Facts, given: dict[str, Any]) -> list[Path]:
    """What is read of an import."""
    return [*(facts.data or [path]), *(facts.videos if given.get("cameras") else ())]


def _state(file: Path) -> tuple[int, int, int] | None:
    """What changes where a file is written or replaced; None where it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _source(format: str, path: Path, facts: Facts, given: dict[str, Any]) -> dict[str, Any]:
    """Which content is imported how, as JSON has it."""
    source: dict[str, Any] = {"format": format, "file": str(path), **facts.provenance}
    files = _files(path, facts, given)
    digests = [sha256(file) for file in files]
    digest = digests[0] if len(files) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    source |= {"bytes": sum(file.stat().st_size for file in files), "sha256": digest}
    source |= ({"files": len(files)} if len(files) > 1 else {}) | {"options": _plain(given)}
    return jsonable("provenance", source)


def _format(name: str) -> Format:
    if name not in FORMATS:
        near = difflib.get_close_matches(name, FORMATS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(FORMATS)}"
        raise CvlctlError(f"no format {name!r}", hint)
    return FORMATS[name]


def _counted(episodes: Iterator[Episode], path: Path, progress: Progress, told: Told) -> Iterator[Episode]:
    done = 0
    for episode in episodes:
        yield episode
        done += len(episode)
        progress.update(done)
    if not done and told.bad:
        raise CvlctlError(f"{path}: all {len(told.bad)} episodes hold NaN or infinity", f"the first: {told.bad[0]}")
    if not done:
        raise CvlctlError(f"{path} holds no episodes", "a store holds at least one")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as JSON has them."""
    return {
        name: [list(x) if hasattr(x, "__len__") and not isinstance(x, str) else x for x in value]
        if isinstance(value, list | tuple) else value
        for name, value in options.items() if value not in (None, False, (), {})
    }  # fmt: skip
