"""Too few open files and circles of symbolic links: two lines, exit code 2, and the same command again after that."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from reliability.cases import CASES, lay
from reliability.driver import Runner, count, described, difference

# with fewer than five more, one of which keeps stdout for results, asyncio (below zarr) complains of itself after our
# two lines
NAMES = [name for name in CASES if name != "fetch"]
OUTS = {  # commands that write where a circle of links is
    "build-dataset random.yaml out=loop": "random.yaml",
    "build-dataset random.yaml out=loop/x.zarr": "random.yaml",
    "build-dataset random.yaml out=loop --force": "random.yaml",
    "build-dataset sac.yaml out=loop": "sac.yaml",
    "pretrain pretrain.yaml out=loop": "pretrain.yaml a.zarr",
    "pretrain pretrain.yaml out=loop/run --force": "pretrain.yaml a.zarr",
    "evaluate evaluate.yaml out=loop": "evaluate.yaml policy",
    "evaluate evaluate.yaml runs=[loop]": "evaluate.yaml policy",
    "run experiment.yaml out=loop": "experiment.yaml",
    "data import npz a.npz --out loop": "a.npz",
    "data import npz loop --out x.zarr": "",
    "data merge a.zarr b.zarr --out loop/x.zarr": "a.zarr b.zarr",
    "data merge a.zarr loop --out x.zarr": "a.zarr",
    "data split a.zarr --out loop/x --force": "a.zarr",
    "data label a.zarr zero --rewards zeros --out loop": "a.zarr",
    "data examples a.zarr --out loop --rule last": "a.zarr",
    "data export a.zarr npz --out loop": "a.zarr",
    "data export a.zarr d4rl --out loop": "a.zarr",
    "data export a.zarr minari --out loop": "a.zarr",
    "data plot a.zarr --out loop": "a.zarr",
    "data fetch d4rl/relocate-human-v1 --out loop": "",
    "data info loop": "", "data verify loop": "", "data ls loop": "",
}  # fmt: skip


def wrong_with(runner: Runner, inputs: Path, here: Path, name: str, files: int, expected: dict[str, object]) -> str:
    """What is wrong where only `files` more may be opened at once, and when there is no such limit again."""
    case = CASES[name]
    lay(case, inputs, here)
    first = runner(here, *case.args.split(), files=files)
    if first["code"] not in (0, 2) or "Traceback" in first["err"]:
        return f"{name}, {files} files: {first['code']}: {first['err'][-600:]}"
    if first["code"] == 2 and "open files" not in first["err"]:
        return f"{name}, {files} files: {first['err'][-600:]}"
    again = runner(here, *case.args.split())
    found = difference(expected, described(here)) if again["code"] == 0 else again["err"]
    return f"{name}, {files} files, again: {found}" if found else ""


def tried(runner: Runner, inputs: Path, folder: Path, name: str, limits: list[int]) -> list[str]:
    lay(CASES[name], inputs, folder / "whole")
    assert runner(folder / "whole", *CASES[name].args.split())["code"] == 0
    expected = described(folder / "whole")
    places = [(folder / f"files{files}", files) for files in limits]
    failed = [f for here, files in places if (f := wrong_with(runner, inputs, here, name, files, expected))]
    count("limits of open files", len(limits), len(failed))
    return failed


@pytest.mark.parametrize("name", random.Random(0).sample(NAMES, 6))
def test_too_few_open_files(name: str, runner: Runner, inputs: Path, tmp_path: Path) -> None:
    assert not tried(runner, inputs, tmp_path, name, [5, 7])


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_open_files(name: str, runner: Runner, inputs: Path, tmp_path: Path) -> None:
    failed = tried(runner, inputs, tmp_path, name, list(range(5, 16)))
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("args", OUTS)
def test_a_circle_of_links_is_two_lines(args: str, runner: Runner, inputs: Path, tmp_path: Path) -> None:
    here = tmp_path / "here"
    lay(CASES["fetch"]._replace(needs=OUTS[args]), inputs, here)
    (here / "loop").symlink_to("pool")
    (here / "pool").symlink_to("loop")
    before = described(here)
    done = runner(here, *args.split())
    assert done["code"] == 2, done["err"][-600:]
    assert done["err"].startswith("error: ") and "Traceback" not in done["err"] and "internal" not in done["err"]
    assert difference(before, described(here)) == ""
