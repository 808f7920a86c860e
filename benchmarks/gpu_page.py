"""What `gpu.py` found, in Markdown: the aims, each step's tables, and what failed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Found = dict[str, Any]
OPEN = "not measured yet"
PUBLISHED = 1_850  # updates/s of TD3+BC and IQL in JAX-CORL on a GTX 1080 Ti: a million in 9 minutes (its README)
# aim, its bound, and whether what is found has to be above or below; found under this name among a step's numbers
METHODS = ("CVL", "LAEO", "TD3+BC", "IQL", "CQL")
AIMS: list[tuple[str, float, bool, tuple[str, ...], str]] = [
    ("minutes of 500,000 CVL updates of five seeds, 256x256, batch 256", 3.0, False, ("CVL",), "minutes"),
    ("time of five seeds of CVL, one seed's is 1", 1.3, False, ("CVL",), "five_to_one"),
    ("TD3+BC, agent-updates/s, five times JAX-CORL's", 5 * PUBLISHED, True, ("TD3+BC",), "graph"),
    ("IQL, agent-updates/s, five times JAX-CORL's", 5 * PUBLISHED, True, ("IQL",), "graph"),
    ("graph against eager, least of five methods, batch 256", 4.0, True, METHODS, "gain"),
    ("critic's step, 1024x1024, batch 1024, float32: share of bare matmuls' rate", 0.5, True, ("matmuls",), "share"),
]  # fmt: skip


def measured(found: Found | None, steps: Sequence[str], name: str, high: bool) -> float | None:
    """The number of that name; of several steps the worst. None where one of them has none."""
    numbers = [(found or {}).get("steps", {}).get(step, {}).get("numbers", {}).get(name) for step in steps]
    if any(number is None for number in numbers):
        return None
    return min(numbers) if high else max(numbers)


def aims(found: Found | None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table of aims; all open where nothing was found, or not on a GPU."""
    if found and (found["device"] != "cuda" or found["small"]):
        found = None
    rows = []
    for what, bound, high, steps, name in AIMS:
        number = measured(found, steps, name, high)
        wanted = f"{'at least' if high else 'at most'} {bound:g}"
        good = number is not None and (number >= bound if high else number <= bound)
        reached = OPEN if number is None else "reached" if good else "**missed**"
        rows.append([what, wanted, "" if number is None else f"{number:.4g}", reached])
    state = (found or {}).get("steps", {}).get("tests", {}).get("state")
    reached = {"done": "reached", "failed": "**missed**"}.get(state or "", OPEN)
    rows.append(["sampling on the device, no synchronisation between logs", "`tests/test_gpu.py` passes", "", reached])
    return ["aim", "wanted", "found", ""], rows


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown. Numbers are right-aligned with their column's head."""
    cells = [[str(value).replace("|", "\\|") for value in row] for row in rows]
    numeric = [bool(rows) and isinstance(rows[0][i], int | float) for i in range(len(columns))]
    lines = [columns, ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(found: Found) -> str:
    """All of it."""
    small = " Tiny sizes: the numbers are worth nothing." if found["small"] else ""
    rows = [[name, step["state"], step["seconds"], step.get("why", "")] for name, step in found["steps"].items()]
    parts = [
        f"# cvlctl on {found['device']}", f"By `benchmarks/gpu.py`.{small}", table(*aims(found)),
        "## Steps", table(["step", "", "seconds", "why"], rows),
    ]  # fmt: skip
    for name, step in found["steps"].items():
        for curve in step.get("curves", []):
            parts += [f"### {name}: {curve['title']}", table(curve["columns"], curve["rows"])]
            parts += [curve["note"]] if curve.get("note") else []
        if step.get("last"):
            parts += [f"### {name} failed", "```\n" + "\n".join(step["last"]) + "\n```"]
    return "\n\n".join(parts) + "\n"
