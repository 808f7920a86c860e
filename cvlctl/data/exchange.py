"""`cvlctl data import | export | fetch | formats`: files of other projects in, stores out, and the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cvlctl.data import formats
from cvlctl.data.derive import command_line, summary
from cvlctl.data.store import open_store
from cvlctl.errors import CvlctlError
from cvlctl.folders import again_where_it_exists
from cvlctl.units import Bounds


@again_where_it_exists
def import_file(
    format: str,
    path: Path,
    out: Path,
    *,
    task: str | None = None,
    horizon: int | None = None,
    label: str = "given",
    action_bounds: Bounds | None = None,
    clip_actions: bool = False,
    observation_keys: Sequence[str] = (),
    keys: Sequence[str] = (),
    columns: Sequence[str] = (),
    drop_columns: Sequence[str] = (),
    control_period: float | None = None,
    split: str = "",
    cameras: Sequence[str] = (),
    image_size: Sequence[int] | None = None,
    drop_nan: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Write a file's episodes to a new store; arguments are those of `formats.import_store`, `keys` as OURS=THEIRS.

    Returns:
        status ("written", or "finished already" by the very same command), path, episodes, transitions, labels, digest.
    """
    named: dict[str, Any] = {
        "split": split,
        "action_bounds": action_bounds,
        "clip_actions": clip_actions,
        "observation_keys": list(observation_keys),
        "cameras": list(cameras),
        "image_size": image_size,
    }
    options: dict[str, Any] = {key: value for key, value in named.items() if value}
    if keys:
        pairs = [pair.partition("=") for pair in keys]
        for (ours, sign, theirs), pair in zip(pairs, keys, strict=True):
            if not (ours and sign and theirs):
                raise CvlctlError(f"--key {pair} is not OURS=THEIRS", "such as --key observations=obs")
        options["keys"] = found = {ours: theirs for ours, _, theirs in pairs}
        if len(found) < len(pairs):
            given = [ours for ours, _, _ in pairs]
            twice = next(ours for ours in given if given.count(ours) > 1)
            what = ", ".join(pair for pair in keys if pair.startswith(f"{twice}="))
            raise CvlctlError(f"--key {twice} is given twice: {what}", "one array each: give the right one alone")
    command = command_line(
        "import", format, path, out=out, task=task, horizon=horizon, label=label if label != "given" else None,
        clip_actions=clip_actions or None, observation_key=observation_keys, key=keys,
        columns=",".join(columns) or None, drop_column=drop_columns, control_period=control_period,
        split=split or None, drop_episodes_with="nan" if drop_nan else None, camera=cameras,
    )  # fmt: skip
    if image_size:
        command += " --image-size {} {}".format(*image_size)
    if action_bounds:
        command += f" --action-bounds {' '.join(map(_side, action_bounds))}"
    if done := formats.imported_already(format, path, Path(out), command, horizon=horizon, force=force, **options):
        return summary(done, "finished already")
    about: dict[str, Any] = {"task": task, "horizon": horizon, "label": label, "force": force, "command": command}
    about |= {"columns": columns, "drop_columns": drop_columns, "control_period": control_period, "drop_nan": drop_nan}
    return summary(formats.import_store(format, path, out, **about, **options))


def bounds_of_words(words: tuple[str, str] | None) -> Bounds | None:
    """LOW and HIGH as they are typed: each a number, or several with commas between, one a dimension."""
    if words is None:
        return None
    try:
        sides = [[float(number) for number in side.split(",")] for side in words]
    except ValueError as error:
        what = f"--action-bounds {' '.join(words)}: {error}"
        raise CvlctlError(what, "give two numbers, -2 2, or one a dimension: -2,-2,-0.5 2,2,0.5") from None
    low, high = (side[0] if len(side) == 1 else side for side in sides)
    return low, high


def _side(bound: Any) -> str:
    return ",".join(f"{value:g}" for value in bound) if isinstance(bound, Sequence) else f"{bound:g}"


@again_where_it_exists
def export(path: Path, format: str, out: Path, *, label: str = "given", force: bool = False) -> dict[str, Any]:
    """Write a store as a file of another project, or find it written: status, path, format, episodes, transitions."""
    store, status = open_store(path), "finished already"
    if force or not formats.exported_already(format, store, Path(out), label):
        formats.export_store(format, store, out, label=label, force=force)
        status = "written"
    counts = {"episodes": store.num_episodes, "transitions": store.num_transitions}
    return {"status": status, "path": str(out), "format": format, **counts}


def fetch(name: str, out: Path, *, mirror: str = "", sha256: str = "", force: bool = False) -> dict[str, Any]:
    """Download a dataset: status, name, path, url, bytes, sha256, checked, as `formats.fetch` says."""
    return formats.fetch(name, out, mirror=mirror, sha256_is=sha256, force=force)


def fetched_in_words(result: dict[str, Any]) -> str:
    """The result of `fetch`, for people."""
    told = {
        "given": "as given",
        "published": "as published",
        "recorded": "as when it came",
        "nothing": f"none is published; it is kept in {result['path']}.json, and holds from now on",
    }
    digest = f"{result['bytes']:,} bytes, sha256 {result['sha256']}: {told[result['checked']]}"
    return f"{result['status']}: {result['path']}\n{digest}"


def ls() -> list[dict[str, Any]]:
    """The formats: name, what it is, whether it is written too, and the options of its reader."""
    return [
        {"format": name, "about": entry.about, "export": entry.write is not None, "options": formats.options_of(name)}
        for name, entry in formats.FORMATS.items()
    ]


def render_ls(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `ls` as a table."""
    table = Table("format", "what it is", "import", "export", "options of import")
    for row in result:
        words = "\n".join(formats.FLAGS[name] for name in row["options"])
        table.add_row(row["format"], row["about"], "yes", "yes" if row["export"] else "", words)
    table.columns[-1].no_wrap = True  # an option is typed as it stands
    console.print(table)
