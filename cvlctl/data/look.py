"""`cvlctl data ls | info | verify`: what the stores hold, as plain dicts (`--json` prints them) and as Rich tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cvlctl.data.columns import action_columns, observation_columns
from cvlctl.data.concerns import concerns, never_varied
from cvlctl.data.show_columns import render_columns
from cvlctl.data.store import Store, open_store
from cvlctl.data.units import units_of
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError
from cvlctl.terminal import print_table

BINS = 10
QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
BAR = 24  # characters of the longest bar of a histogram
TASKS = 50  # names that are written out; `--json` has all


def ls(root: Path) -> list[dict[str, Any]]:
    """Every store under `root`: path, task, episodes, transitions, labels, return_mean, success_fraction, size_mb.

    A store that cannot be read, or is not finished, has a `problem` that says why; what is not known is None.

    Raises:
        CvlctlError: `root` is not a directory.
    """
    if not Path(root).is_dir():
        raise CvlctlError(f"no directory {root}", "name the directory that holds the stores")
    return [_row(path) for path in sorted(_stores(Path(root)))]


def info(path: Path) -> dict[str, Any]:
    """All about one store: columns, actions, task, environment (that it came from; None: it does not say), spec, units,
    counts, lengths, returns and their histogram for each label, what seems amiss (`warnings`), size, provenance. Read
    chunk by chunk, but for labels.

    Raises:
        CvlctlError: as `open_store` does.
    """
    store = open_store(path)
    lengths = store.lengths()
    returns = {label: episode_returns(store, label) for label in store.labels if store.has_label(label)}
    solved = {label: _episodes_solved(store, label) for label in store.labels if store.has_label(label, "success")}
    units, columns = units_of(store), observation_columns(store)
    return {
        "path": str(path),
        "columns": columns,
        "actions": action_columns(store),
        "units": units.attributes(),
        "steps_per_second": 1 / units.control_period if units.control_period else None,
        "task": store.task,
        "tasks": store.task_names,
        "environment": store.attributes.get("environment"),
        "spec": {
            "observation_shape": list(store.spec.observation_shape),
            "action_dim": store.spec.action_dim,
            "horizon": store.spec.horizon,
            "cameras": {name: list(size) for name, size in store.spec.cameras.items()},
        },
        "episodes": store.num_episodes,
        "transitions": store.num_transitions,
        "lengths": {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())},
        "returns": {label: _quantiles(values) for label, values in returns.items()},
        "histogram": {label: _histogram(values) for label, values in returns.items()},
        "success_fraction": {label: float(values.mean()) for label, values in solved.items()},
        "terminated_fraction": float(store.terminated().mean()),
        "warnings": [*constant_columns(columns), *concerns(store)],
        "size_mb": _size_mb(Path(path)),
        "digest": store.digest(),
        "provenance": store.provenance,
    }


def verify(path: Path) -> dict[str, Any]:
    """Re-read every chunk of a store: path, problems (one line each), ok; of a sound one also `warnings`: what is as it
    was written, and seems amiss."""
    problems, warnings = verify_store(path), list[str]()
    if not problems:
        store = open_store(path)
        warnings = [*constant_columns(observation_columns(store)), *concerns(store)]
    return {"path": str(path), "problems": problems, "warnings": warnings, "ok": not problems}


def constant_columns(columns: list[dict[str, Any]]) -> list[str]:
    """`concerns.never_varied` of what `observation_columns` found."""
    return never_varied(*([one[key] for one in columns] for key in ("name", "min", "max")))


def episode_returns(store: Store, label: str = "given") -> np.ndarray:
    """(episodes,) float64: undiscounted return of each episode (padding rows hold reward 0)."""
    return np.add.reduceat(store.rewards(label).astype(np.float64), _starts(store))


def render_ls(result: list[dict[str, Any]], console: Console) -> None:
    """Print the result of `ls` as a table."""
    if not result:
        console.print("no stores here: build one with `cvlctl build-dataset RECIPE`")
        return
    table = Table("store", "task")
    for name in ("episodes", "transitions", "mean return", "successful", "MB"):
        table.add_column(name, justify="right")
    for row in result:
        if row["problem"]:
            problem = Text(row["problem"], style="red")
            table.add_row(Text(row["path"]), problem, *[""] * 4, f"{row['size_mb']:.1f}")
            continue
        table.add_row(
            Text(row["path"]),
            Text(row["task"]),
            f"{row['episodes']:,}",
            f"{row['transitions']:,}",
            _number(row["return_mean"]),
            _percent(row["success_fraction"]),
            f"{row['size_mb']:.1f}",
        )
    print_table(console, table, headings=True)


def render_info(result: dict[str, Any], console: Console) -> None:
    """Print the result of `info`: its columns and actions, a table of facts, a histogram of the returns for each label,
    and last what wrote it."""
    render_columns(result["columns"], result["actions"], console)
    for warning in result["warnings"]:
        console.print(f"warning: {warning}", markup=False, style="yellow")
    table = Table("", "", title=Text(result["path"]), show_header=False)
    for name, value in _of_data(result):
        table.add_row(Text(name), Text(value))
    console.print(table)
    for label, histogram in result["histogram"].items():
        bars = Table("return", "episodes", "", title=Text(f"returns ({label})"))
        bars.columns[1].justify = "right"
        edges, tallest = histogram["edges"], max(histogram["counts"])
        for low, high, count in zip(edges[:-1], edges[1:], histogram["counts"], strict=True):
            length = -(-count * BAR // tallest)  # rounded up, so that one episode still shows
            bars.add_row(f"{_number(low)} .. {_number(high)}", f"{count:,}", "█" * length)
        console.print(bars)
    origin = Table("", "", title=Text("where it came from"), show_header=False)
    for name, value in _origin(result["provenance"]):
        origin.add_row(Text(name), Text(value))
    console.print(origin)


def render_verify(result: dict[str, Any], console: Console) -> None:
    """Print the result of `verify`: one line a problem."""
    if result["ok"]:
        console.print(f"{result['path']}: sound", markup=False)
    for warning in result["warnings"]:
        console.print(f"{result['path']}: warning: {warning}", markup=False, soft_wrap=True)
    for problem in result["problems"]:
        console.print(f"{result['path']}: {problem}", markup=False, soft_wrap=True)


def _stores(root: Path) -> list[Path]:
    found = []
    for folder, children, files in os.walk(root):
        if "zarr.json" in files or "tail.npz" in files:  # a finished store, or one that its writer can resume
            children.clear()
            if not folder.endswith(".old"):
                found.append(Path(folder))
    return found


def _row(path: Path) -> dict[str, Any]:
    unknown = ("task", "episodes", "transitions", "return_mean", "success_fraction", "problem")
    row: dict[str, Any] = {"path": str(path), **dict.fromkeys(unknown), "labels": [], "size_mb": _size_mb(path)}
    if path.name.endswith(".partial"):
        return {**row, "problem": "not finished: run the command that writes it again to resume"}
    try:
        store = open_store(path)
        row |= {"task": store.task, "episodes": store.num_episodes, "transitions": store.num_transitions}
        row["labels"] = store.labels
        label = "given" if "given" in store.labels else next(iter(store.labels), "given")
        if store.has_label(label):
            row["return_mean"] = float(episode_returns(store, label).mean())
        if store.has_label(label, "success"):
            row["success_fraction"] = float(_episodes_solved(store, label).mean())
    except CvlctlError as error:  # one broken store must not hide the others
        row["problem"] = error.what.removeprefix(f"{path}: ")
    return row


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The result of `info` in words, by name."""
    return [*_of_data(result), *_origin(result["provenance"])]


def _of_data(result: dict[str, Any]) -> list[tuple[str, str]]:
    spec, lengths, units = result["spec"], result["lengths"], result["units"]
    shape = "x".join(str(n) for n in spec["observation_shape"])
    told = [
        ("task", _listed(list(dict.fromkeys([result["task"], *result["tasks"]])))),
        ("observation, action", f"{shape}, {spec['action_dim']}"),
        *[(f"camera {name}", "x".join(map(str, size))) for name, size in spec["cameras"].items()],
        ("episodes", f"{result['episodes']:,}"),
        ("transitions", f"{result['transitions']:,}"),
        ("length", f"{lengths['min']} .. {lengths['max']}, mean {lengths['mean']:.1f} (horizon {spec['horizon']})"),
        ("terminated", _percent(result["terminated_fraction"])),
    ]
    for label, q in result["returns"].items():
        spread = " / ".join(_number(q[name]) for name in QUANTILES)
        told.append((f"returns ({label})", f"mean {_number(q['mean'])}; {' / '.join(QUANTILES)}: {spread}"))
    told += [(f"successful ({label})", _percent(value)) for label, value in result["success_fraction"].items()]
    told += [("size", f"{result['size_mb']:.1f} MB"), ("digest", result["digest"][:16])]
    if result["steps_per_second"]:
        told.insert(2, ("steps a second", f"{result['steps_per_second']:.4g}"))
    known = {
        "environment": _in_words(result["environment"]) if result["environment"] else "",
        "clipped_fraction": _percent(units.get("clipped_fraction")),
        "action_bounds": str(units.get("action_bounds", "")),
    }
    known["dropped_columns"] = _listed(units.get("dropped_columns", []))
    return told + [(name.replace("_", " "), text) for name, text in known.items() if text]


def _origin(provenance: dict[str, Any]) -> list[tuple[str, str]]:
    """Provenance in words, versions last."""
    last = ("platform", "where", "git_commit", "versions")
    names = [*(name for name in provenance if name not in last), *(name for name in last if name in provenance)]
    return [(name, _in_words(provenance[name])) for name in names]


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - TASKS:,} more" if len(names) > TASKS else ""
    return ", ".join(names[:TASKS]) + more


def _in_words(value: Any) -> str:
    """A piece of provenance, which may be anything: of parents path and digest, of an object its pairs."""
    if isinstance(value, list) and value and all(isinstance(x, dict) and {"path", "digest"} <= set(x) for x in value):
        return ", ".join(f"{parent['path']} ({str(parent['digest'])[:16]})" for parent in value)
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)


def _starts(store: Store) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), store.episode_ends()[:-1]])


def _episodes_solved(store: Store, label: str) -> np.ndarray:
    """(episodes,) bool: a success at any step."""
    return np.logical_or.reduceat(store.successes(label), _starts(store))


def _quantiles(values: np.ndarray) -> dict[str, float]:
    return {"mean": float(values.mean()), **{name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}}


def _histogram(values: np.ndarray) -> dict[str, list[float] | list[int]]:
    low, high = float(values.min()), float(values.max())
    high = max(high, low + 1e-6 * max(1.0, abs(low)))  # numpy refuses bins narrower than rounding
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _size_mb(path: Path) -> float:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 10 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
