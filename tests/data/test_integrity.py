"""Stores hold what was written into them: swapped and foreign chunks, sizes that lie, and files that are none."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvlctl.cli.app import app
from cvlctl.cli.console import execute
from cvlctl.data import arrays, chunks, exchange, load, look, transform
from cvlctl.data import writer as writer_module
from cvlctl.data.criteria import Criteria
from cvlctl.data.recipe import StoreUse
from cvlctl.data.store import Column, open_store
from cvlctl.data.verify import verify_store
from cvlctl.data.writer import write_store
from cvlctl.errors import CvlctlError
from cvlctl.types import Episode

NAMES = ("data/observation", "data/action", "labels/given/reward")


pytestmark = pytest.mark.usefixtures("no_fsync")


def store_of(path: Path, seed: int, chunk: int = 20, count: int = 10) -> Path:
    rng = np.random.default_rng(seed)
    episodes = (
        Episode(rng.normal(size=(8, 3)), rng.uniform(-1, 1, (7, 2)), rng.normal(size=7), rng.random(7) < 0.5)
        for _ in range(count)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer_module, "CHUNK_ROWS", chunk)
        write_store(path, episodes, task="toy")
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two stores of 10 episodes of 7 steps, in four chunks of 20 rows."""
    root = tmp_path_factory.mktemp("originals")
    return store_of(root / "a.zarr", 0), store_of(root / "b.zarr", 1)


@pytest.fixture
def written(tmp_path: Path, originals: tuple[Path, Path]) -> Path:
    shutil.copytree(originals[0], tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


def edit(path: Path, **changes: Any) -> None:
    """Set root attributes (None: take away); `spec.horizon` is that of `spec`."""
    root = json.loads((path / "zarr.json").read_text())
    for key, value in changes.items():
        *folders, name = key.split(".")
        place = root["attributes"]
        for folder in folders:
            place = place[folder]
        place.pop(name, None) if value is None else place.__setitem__(name, value)
    (path / "zarr.json").write_text(json.dumps(root))


def chunk(path: Path, name: str, i: int) -> Path:
    return path / name / "c" / str(i) / ("" if name.startswith("labels") else "0")


def swap(path: Path, name: str) -> None:
    """Chunks 1 and 2 of an array change places."""
    one, two = chunk(path, name, 1), chunk(path, name, 2)
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def take_everything(path: Path, out: Path) -> dict[str, Callable[[], Any]]:
    """All ways by which the rows of a store are read, by name."""

    use = StoreUse.model_validate({"path": path, "rewards": "given"})
    return {
        "API": lambda: list(open_store(path).episodes()),
        "training": lambda: load.join([open_store(path)], [use], None, True),
        "streams": lambda: [Column(open_store(path), name).rows(0, 80) for name in NAMES],
        "filter": lambda: transform.filter_episodes(path, out / "f.zarr", Criteria(min_length=1)),
        "subsample": lambda: transform.subsample(path, out / "s.zarr", episodes=1),  # though its chunks may be sound
        "merge": lambda: transform.merge([path, path], out / "m.zarr"),
        "export": lambda: exchange.export(path, "npz", out / "x.npz"),
    }


# ------------------------------------------------------------------------------------------- the list of the chunks


def test_the_list_holds_the_crc32c_of_each_chunk_and_is_no_part_of_the_digest(written: Path) -> None:
    store = open_store(written)
    listed = store.attributes["chunk_crc32c"]
    assert set(listed) == set(store.attributes["checksums"])
    for name, crcs in listed.items():
        found = [file.read_bytes()[-4:] for file in sorted((written / name / "c").rglob("*")) if file.is_file()]
        assert crcs == [f"{int.from_bytes(trailer, 'little'):08x}" for trailer in found], name
    assert len(listed["data/observation"]) == 4
    before = store.digest(), store.label_digest()
    edit(written, chunk_crc32c=None)
    assert (open_store(written).digest(), open_store(written).label_digest()) == before


@pytest.mark.parametrize("name", NAMES)
def test_swapped_chunks_are_refused_everywhere_by_name(written: Path, tmp_path: Path, name: str) -> None:
    swap(written, name)
    for way, read in take_everything(written, tmp_path).items():
        with pytest.raises(CvlctlError, match=rf"{name} chunk 1 \(rows 20-39\): .*/c/1.* not the chunk") as caught:
            read()
        assert f"cvlctl data verify {written}" in caught.value.hint, way
    problems = verify_store(written)
    assert [line.split(":")[0] for line in problems] == [
        f"{name} chunk {i} (rows {20 * i}-{20 * i + 19})" for i in (1, 2)
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr"]


def test_a_chunk_of_another_store_is_refused(written: Path, originals: tuple[Path, Path], capsys: Any) -> None:
    shutil.copy(chunk(originals[1], "data/action", 3), chunk(written, "data/action", 3))
    with pytest.raises(CvlctlError, match=r"data/action chunk 3 \(rows 60-79\): .* not the chunk"):
        open_store(written).actions()
    assert execute(app, ["data", "verify", str(written)]) == 1
    assert "data/action chunk 3 (rows 60-79)" in capsys.readouterr().out


def test_whole_arrays_that_changed_places_are_refused(written: Path, originals: tuple[Path, Path]) -> None:
    shutil.rmtree(written / "labels/given/reward")
    shutil.copytree(originals[1] / "labels/given/reward", written / "labels/given/reward")
    with pytest.raises(CvlctlError, match=r"labels/given/reward chunk 0 .* not the chunk"):
        open_store(written).rewards()


def test_stores_of_earlier_versions_are_held_to_their_sha256(written: Path, tmp_path: Path) -> None:
    edit(written, chunk_crc32c=None)
    for way, read in take_everything(written, tmp_path / "out").items():
        assert read(), way
    swap(written, "data/observation")
    for way, read in take_everything(written, tmp_path / "again").items():
        with pytest.raises(
            CvlctlError, match="data/observation: the content is not what the recorded checksum"
        ) as caught:
            read()
        assert f"cvlctl data verify {written}" in caught.value.hint, way
    assert [p.split(":")[0] for p in verify_store(written)] == ["data/observation"]


def test_what_is_derived_or_exported_is_held_to_its_sha256_beyond_the_list(
    written: Path, originals: tuple[Path, Path], tmp_path: Path
) -> None:
    """A list that agrees with a foreign chunk (or a chance of one in 2**32) does not make it sound."""
    shutil.copy(chunk(originals[1], "data/action", 2), chunk(written, "data/action", 2))
    listed = open_store(written).attributes["chunk_crc32c"]
    listed["data/action"][2] = arrays.trailers(originals[1], "data/action")[2]
    edit(written, chunk_crc32c=listed)
    ways = take_everything(written, tmp_path)
    for way in ("filter", "subsample", "merge", "export"):
        with pytest.raises(CvlctlError, match="data/action: the content is not what the recorded checksum"):
            ways[way]()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zarr"]


def test_a_derived_store_has_a_list_of_its_own(written: Path, tmp_path: Path) -> None:
    transform.subsample(written, tmp_path / "s.zarr", episodes=3)
    store = open_store(tmp_path / "s.zarr")
    assert store.attributes["chunk_crc32c"]["data/observation"] == arrays.trailers(store.path, "data/observation")
    assert "chunk_crc32c" not in store.provenance["parents"][0]["attributes"] and verify_store(store.path) == []


def test_a_list_of_other_lengths_is_none(written: Path) -> None:
    """Written anew in chunks of another size, as by zarr's own tools: the sha256 decides."""
    listed = open_store(written).attributes["chunk_crc32c"]
    edit(written, chunk_crc32c={**listed, "data/observation": listed["data/observation"][:2]})
    assert len(open_store(written).observations()) == 80 and verify_store(written) == []
    swap(written, "data/observation")
    with pytest.raises(CvlctlError, match="data/observation: the content is not what the recorded checksum"):
        open_store(written).observations()


# ---------------------------------------------------------------------------------------------- sizes against files


def declare(path: Path, rows: int, in_chunks_of: int | None = None) -> None:
    """Row arrays and attributes that agree on `rows` rows; the files stay as they are."""
    counts = open_store(path).attributes["counts"]
    edit(path, counts={**counts, "rows": rows})
    for name in (*NAMES, "labels/given/success"):
        file = path / name / "zarr.json"
        array = json.loads(file.read_text())
        array["shape"][0] = rows
        if in_chunks_of:
            array["chunk_grid"]["configuration"]["chunk_shape"][0] = in_chunks_of
        file.write_text(json.dumps(array))


@pytest.mark.parametrize(
    ("rows", "size", "said"),
    [
        (10**12, None, "1,000,000,000,000 rows are declared, in 50,000,000,000 chunks, but .* holds 4"),
        (10**12, 10**12, "chunk 0 .*: checksum/crc fails .* bytes cannot hold 12,000,000,000,000"),
        (10**18, 10**18, "declares more bytes than any machine has"),
        (10**30, None, "attributes lack or garble"),
    ],
)
def test_a_store_that_declares_more_than_there_is(written: Path, rows: int, size: int | None, said: str) -> None:
    declare(written, rows, size)
    start = time.process_time()
    with pytest.raises(CvlctlError, match=said):
        open_store(written).observations()
    if rows < 2**63:
        problems = verify_store(written)
        assert len(problems) == 5 and all(len(line) < 500 for line in problems)
    for row in look.ls(written.parent):
        assert "a.zarr" in row["path"]
    assert time.process_time() - start < 5


def test_memory_that_is_not_there_is_an_error_in_words(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(chunks.np, "empty", full)
    with pytest.raises(CvlctlError, match=r"data/observation: 0\.0 GB do not fit"):
        open_store(written).observations()


# -------------------------------------------------------------------------------------------- files that are none


def to_zeros(file: Path) -> None:
    file.symlink_to("/dev/zero")


def to_itself(file: Path) -> None:
    file.symlink_to(file)


PLACES = ("zarr.json", "data/observation/zarr.json", "data/action/c/1/0", "meta/episode_ends/c/0")


@pytest.mark.parametrize("make", [to_zeros, to_itself, os.mkfifo, Path.mkdir])
@pytest.mark.parametrize("place", PLACES)
def test_only_regular_files_are_read(written: Path, place: str, make: Callable[[Path], None]) -> None:
    (written / place).unlink()
    make(written / place)
    with pytest.raises(CvlctlError, match=str(written)):
        list(open_store(written).episodes())
    if place == "zarr.json":
        with pytest.raises(CvlctlError, match="is not a cvlctl store"):
            verify_store(written)
    else:
        assert any(line.startswith(place.split("/c/")[0].removesuffix("/zarr.json")) for line in verify_store(written))
    look.ls(written.parent)


def test_links_to_regular_files_are_followed(written: Path, tmp_path: Path) -> None:
    """Data managers keep content elsewhere and link to it."""
    for place in PLACES:
        (written / place).rename(tmp_path / place.replace("/", "-"))
        (written / place).symlink_to(tmp_path / place.replace("/", "-"))
    assert verify_store(written) == []


def test_json_of_a_gigabyte_is_not_read(written: Path) -> None:
    os.truncate(written / "data/observation/zarr.json", 2**30)
    with pytest.raises(CvlctlError, match=r"its zarr.json has 1,073,741,824 bytes"):
        open_store(written)
    os.truncate(written / "zarr.json", 2**30)
    with pytest.raises(CvlctlError, match="is not a cvlctl store"):
        open_store(written)


# ------------------------------------------------------------------------------------------------------ attributes


@pytest.mark.parametrize("place", ["zarr.json", "data/observation/zarr.json"])
def test_json_nested_deep_is_one_damaged_store_among_the_others(
    written: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(written, written.with_name("b.zarr"))
    depth = 100_000
    (written / place).write_text('{"attributes":' + "[" * depth + "]" * depth + "}")
    rows = {Path(row["path"]).name: row for row in look.ls(written.parent)}
    assert rows["a.zarr"]["problem"] and rows["b.zarr"]["problem"] is None and rows["b.zarr"]["episodes"] == 10
    assert execute(app, ["data", "ls", str(written.parent)]) == 0
    for command in ("info", "verify", "plot"):
        assert execute(app, ["data", command, str(written)]) == (
            1 if command == "verify" and place != "zarr.json" else 2
        )
    assert "Traceback" not in capsys.readouterr().err


WRONG: tuple[Any, ...] = (
    None,
    5,
    -1,
    1.5,
    True,
    "x",
    "\ud800",
    "\x1b[2J",
    [],
    [[]],
    {},
    {"x": 1},
    2**70,
    float("inf"),
    [None],
)
KEYS = (
    "version", "task", "tasks", "spec", "spec.observation_shape", "spec.action_dim", "spec.horizon", "spec.pixels",
    "counts", "counts.episodes", "counts.transitions", "counts.rows", "checksums", "checksums.data/action",
    "chunk_crc32c", "chunk_crc32c.data/action", "provenance", "provenance.parents", "provenance.recipe", "format",
)  # fmt: skip


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("key", KEYS)
def test_attributes_of_wrong_types_are_success_or_one_clear_error(
    written: Path, key: str, step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """By default a fourth of the values for each key, others for the next."""
    keep = (written / "zarr.json").read_text()
    for value in WRONG[KEYS.index(key) % step :: step]:
        (written / "zarr.json").write_text(keep)
        edit(written, **{key: value})
        codes = [execute(app, ["data", command, str(written)]) for command in ("ls", "info", "verify")]
        errors = capsys.readouterr().err
        assert "Traceback" not in errors and set(codes) <= {0, 1, 2}, f"{key}: {value!r}: {codes} {errors}"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("task", 5, "lack or garble 'task': "),
        ("tasks", ["toy", 1], r"lack or garble 'tasks' \(1\): "),
        ("spec.horizon", "7", r"lack or garble 'spec' \(horizon\): "),
        ("counts.rows", -1, r"lack or garble 'counts' \(rows\): "),
        ("chunk_crc32c", {"data/action": [1]}, r"lack or garble 'chunk_crc32c' \(data/action.0\): "),
    ],
)
def test_an_error_about_an_attribute_names_file_and_key(written: Path, key: str, value: Any, said: str) -> None:
    edit(written, **{key: value})
    with pytest.raises(CvlctlError, match=f"{written}/zarr.json: the store's attributes {said}"):
        open_store(written)
