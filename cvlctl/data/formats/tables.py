"""Tables as columns of numbers, a block of rows at a time: parquet (by pyarrow, the extra `lerobot`) and CSV."""

from __future__ import annotations

import contextlib
import csv
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvlctl.data.formats.sources import MAX_ROW_BYTES, Column, reading, regular
from cvlctl.errors import CvlctlError
from cvlctl.play.spaces import natural

if TYPE_CHECKING:
    import pyarrow

BATCH = 2**13  # rows that are decoded at a time
MAX_LINE = 2**22  # characters of a line of CSV
SUFFIXES = (".csv", ".tsv", ".parquet")
WORDS = {"": np.nan, "true": 1.0, "false": 0.0}


class Table(NamedTuple):
    """An open table."""

    path: Path
    names: list[str]
    length: int
    blobs: Callable[[str], Iterator[bytes]]  # of a column of pictures: objects {bytes, path}
    column: Callable[[Sequence[str]], Column]  # of several names side by side, (N, sum of widths); of one also (N,)

    def matching(self, pattern: str, wanted: str) -> list[str]:
        """The columns that `pattern` names: one, several with commas between, or with * all that match, by name.

        Raises:
            CvlctlError: there is none such; `wanted` is what it is to be.
        """
        found: list[str] = []
        for part in pattern.split(","):
            alike = [name for name in self.names if fnmatch.fnmatchcase(name, part)] if "*" in part else []
            if part not in self.names and not alike:
                there = ", ".join(self.names[:20]) + (" ..." if len(self.names) > 20 else "")
                hint = f"--key {wanted}=NAME (or NAME,NAME or NAME*) says which; it has {there}"
                raise CvlctlError(f"{self.path}: no column {part!r}", hint)
            found += [part] if part in self.names else sorted(alike, key=natural)
        return found


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """A parquet file, or one of CSV with a line of names."""
    with reading(str(path)):
        regular(path, "a CSV or parquet file")
        with open(path, "rb") as file:
            magic = file.read(4)
    with _open_parquet(path) if magic == b"PAR1" or path.suffix == ".parquet" else _open_csv(path) as table:
        yield table


def blocks(pieces: Iterator[np.ndarray]) -> Callable[[int, int], np.ndarray]:
    """What `Column` fetches by, of arrays that come one after the other in whatever sizes."""
    held: list[np.ndarray] = []

    def fetch(_: int, count: int) -> np.ndarray:
        have = sum(map(len, held))
        while have < count and (piece := next(pieces, None)) is not None:
            held.append(piece)
            have += len(piece)
        whole = np.concatenate(held) if held else np.empty(0)
        held[:] = [whole[count:]]
        return whole[:count]

    return fetch


# -------------------------------------------------------------------------------------------------------------- parquet


@contextlib.contextmanager
def _open_parquet(path: Path) -> Iterator[Table]:
    parquet = pyarrow_parquet(path)
    hint = "expected a parquet file, whole: it may be cut short, or of another kind"
    with reading(str(path), hint), _memory(path):
        file = parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
    with file:
        schema, length = file.schema_arrow, file.metadata.num_rows

        def batches(names: list[str], size: int) -> Iterator[list[np.ndarray]]:
            with _memory(path):
                row = 0
                for batch in file.iter_batches(size, columns=names, use_threads=False):
                    yield [_values(f"{path}: {name}", batch.column(name), row) for name in names]
                    row += batch.num_rows

        def column(names: Sequence[str]) -> Column:
            names, where = list(names), f"{path}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for name in names:
                _check_type(f"{path}: {name}", schema.field(name).type)
            with reading(where):
                first = next(batches(names, 1), None) or [np.empty(0)]
            row_bytes = max(1, sum(part[:1].nbytes for part in first))
            if row_bytes > MAX_ROW_BYTES:
                raise CvlctlError(f"{where}: rows of {row_bytes:,} bytes are too large to be true")
            several = (_beside(parts) for parts in batches(names, max(1, min(BATCH, 2**22 // row_bytes))))
            sample = _beside(first)
            return Column(where, (length, *sample.shape[1:]), sample.dtype, blocks(several))

        def blobs(name: str) -> Iterator[bytes]:
            where, row = f"{path}: {name}", 0
            with _memory(path), reading(where):
                for batch in file.iter_batches(2**6, columns=[name], use_threads=False):
                    for one in batch.column(0).to_pylist():
                        data = one.get("bytes") if isinstance(one, dict) else one
                        if not isinstance(data, bytes):
                            raise CvlctlError(f"{where}, row {row}: holds no picture", "its files lie elsewhere")
                        yield data
                        row += 1

        yield Table(path, list(schema.names), length, blobs, column)


def small_parquet(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a small parquet file, as Python has them; of `columns` alone, those of them that are there."""
    parquet = pyarrow_parquet(path)
    with reading(str(path)), _memory(path):
        regular(path, "a parquet file")
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > 1_000_000:
                raise CvlctlError(f"{path}: has {file.metadata.num_rows:,} rows, too many to be true")
            names = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
            return list(file.read(names, use_threads=False).to_pylist())


def pyarrow_parquet(path: Path) -> Any:
    """pyarrow.parquet; raises a CvlctlError about `path` where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise CvlctlError(f"{path}: parquet is read by pyarrow, which is not here",
                          "pip install 'cvlctl[lerobot]'") from error  # fmt: skip
    return pyarrow.parquet


@contextlib.contextmanager
def _memory(path: Path) -> Iterator[None]:
    """A damaged file asks for as much memory as it likes."""
    try:
        yield
    except MemoryError as error:
        raise CvlctlError(f"{path}: asks for more memory than there is", "it may be damaged: write it again") from error


def _check_type(where: str, type: pyarrow.DataType) -> None:
    import pyarrow as pa

    inner = type.value_type if _listed(type) else type
    if not (pa.types.is_floating(inner) or pa.types.is_integer(inner) or pa.types.is_boolean(inner)):
        words = "text" if pa.types.is_string(inner) or pa.types.is_large_string(inner) else f"values of type {type}"
        raise CvlctlError(f"{where}: holds {words}, not numbers", "save it as numbers, or as lists of them")


def _listed(type: pyarrow.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type)


def _values(where: str, array: pyarrow.Array, row: int) -> np.ndarray:
    """(n,), or (n, width) of lists, all of which are to be of one length; what is missing among floats is NaN."""
    import pyarrow as pa

    if not _listed(array.type):
        if array.null_count and not pa.types.is_floating(array.type):
            raise CvlctlError(f"{where}: values are missing among rows {row}-{row + len(array) - 1}")
        return np.asarray(array.to_numpy(zero_copy_only=False))
    lengths = array.value_lengths().to_numpy(zero_copy_only=False)
    if array.null_count or (lengths != lengths[0]).any():
        at = int(np.flatnonzero(~(lengths == lengths[0]))[0]) if (lengths != lengths[0]).any() else 0
        raise CvlctlError(f"{where}, row {row + at}: the list has another length than the row before: "
                          f"{lengths[at]}, not {lengths[0]}", "a row a step, and each of the same width")  # fmt: skip
    inner = array.flatten()
    return np.asarray(inner.to_numpy(zero_copy_only=False)).reshape(len(array), int(lengths[0]))


# ------------------------------------------------------------------------------------------------------------------ CSV


@contextlib.contextmanager
def _open_csv(path: Path) -> Iterator[Table]:
    with reading(str(path), "expected CSV in UTF-8, with names of the columns in its first line"):
        names, length = _count(path)

    def column(wanted: Sequence[str]) -> Column:
        at, where = [names.index(name) for name in wanted], f"{path}: {', '.join(list(wanted)[:5])}"
        shape = (length,) if len(at) == 1 else (length, len(at))
        return Column(where, shape, np.dtype(np.float64), blocks(_numbers(path, names, at)))

    def blobs(name: str) -> Iterator[bytes]:
        raise CvlctlError(f"{path}: {name}: a table of text holds no pictures")

    yield Table(path, names, length, blobs, column)


def _count(path: Path) -> tuple[list[str], int]:
    """Names of the columns, and the number of rows, which are all of one width."""
    count = 0
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = _rows(path, file)
        names = [name.strip() for name in next(rows)[1]]
        if len(set(names)) < len(names) or any(_is_number(name) for name in names):
            what = f"{path}: its first line is no names of columns: {', '.join(names)[:80]}"
            raise CvlctlError(what, "a line of names, each its own, and then a row a step")
        for line, row in rows:
            count += 1
            if len(row) != len(names):
                raise CvlctlError(f"{path}, line {line}: has {len(row)} values for {len(names)} columns",
                                  "a row a step, with a value for each column")  # fmt: skip
    return names, count


def _rows(path: Path, file: IO[str]) -> Iterator[tuple[int, list[str]]]:
    """Lines of a CSV file that are not empty, with their numbers from 1."""

    def lines() -> Iterator[str]:
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise CvlctlError(f"{path}: lines of more than {MAX_LINE:,} characters are no CSV of numbers")
            yield line

    all_lines = lines()
    first = next(all_lines, "")
    if not first.strip():
        raise CvlctlError(f"{path} has no line of names", "a line of names, and then a row a step")
    delimiter = max(",;\t", key=first.count)
    yield 1, next(csv.reader([first], delimiter=delimiter))
    reader = csv.reader(all_lines, delimiter=delimiter)
    for row in reader:
        if row:
            yield reader.line_num + 1, row


def _numbers(path: Path, names: list[str], at: list[int]) -> Iterator[np.ndarray]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = _rows(path, file)
        next(rows)
        batch: list[list[float]] = []
        for line, row in rows:
            batch.append([_number(path, line, names[i], row[i]) for i in at])
            if len(batch) == BATCH:
                yield _together(batch)
                batch = []
        if batch:
            yield _together(batch)


def _together(batch: list[list[float]]) -> np.ndarray:
    values = np.array(batch, np.float64)
    return values[:, 0] if values.shape[1] == 1 else values


def _number(path: Path, line: int, name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        if (word := text.strip().lower()) in WORDS:
            return WORDS[word]
        raise CvlctlError(f"{path}, line {line}: {name} is {text[:40]!r}, no number",
                          "leave that column out, or give it numbers") from None  # fmt: skip


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


def _beside(parts: Sequence[np.ndarray]) -> np.ndarray:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)
