"""What is done to sound files: operations, which are plain data, and random ones."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Op = list[Any]  # [name, file, more]


# ---------------------------------------------------------------------------------------------------------- operations


def cut(file: Path, size: int) -> None:
    os.truncate(file, min(size, file.stat().st_size))


def remove(file: Path, at: int, count: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:at] + data[at + count :])


def insert(file: Path, at: int, hexadecimal: str) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:at] + bytes.fromhex(hexadecimal) + data[at:])


def poke(file: Path, *places: list[int]) -> None:
    """Single bytes, as [at, value]."""
    data = bytearray(file.read_bytes())
    for at, value in places:
        data[at % len(data)] = value
    file.write_bytes(bytes(data))


def text(file: Path, at: int, count: int, new: str) -> None:
    """Characters from `at` on, replaced."""
    before = file.read_text()
    file.write_text(before[:at] + new + before[at + count :])


def link(file: Path, target: str) -> None:
    gone(file)
    file.symlink_to(target)


def pipe(file: Path) -> None:
    gone(file)
    os.mkfifo(file)


def folder(file: Path) -> None:
    gone(file)
    file.mkdir()


def gone(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)


def swap(file: Path, other: str) -> None:
    """Files or folders change places; `other` is relative to the current directory."""
    between = file.with_name("between")
    file.rename(between)
    Path(other).rename(file)
    between.rename(other)


def set_json(file: Path, path: list[str | int], value: str, depth: int = 0) -> None:
    """Put JSON text at a place of a document; "" takes the place away. `depth`: in so many lists."""
    file.write_text(_with(json.loads(file.read_text()), path, value, depth))


def set_line(file: Path, line: int, path: list[str | int], value: str, depth: int = 0) -> None:
    """`set_json` in one line of a file of JSON lines."""
    lines = file.read_text().split("\n")
    lines[line] = _with(json.loads(lines[line]), path, value, depth)
    file.write_text("\n".join(lines))


def _header(file: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors."""
    data = file.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def set_header(file: Path, path: list[str | int], value: str, depth: int = 0) -> None:
    """`set_json` in the header of a safetensors file, whose length is then right again.

    A path that begins with "cvlctl" goes into our own JSON, which is text in that header.
    """
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if path[:1] == ["cvlctl"]:
        header["__metadata__"]["cvlctl"] = _with(json.loads(header["__metadata__"]["cvlctl"]), path[1:], value, depth)
        made = json.dumps(header)
    else:
        made = _with(header, path, value, depth)
    file.write_bytes(len(made.encode()).to_bytes(8, "little") + made.encode() + data[8 + size :])


def set_length(file: Path, length: int) -> None:
    """The length that a safetensors file says that its header has."""
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])


def declare(file: Path, rows: int, chunk: int) -> None:
    """A store (`file` is its root zarr.json) that says everywhere that it has so many rows, in chunks of `chunk`."""
    set_json(file, ["attributes", "counts", "rows"], str(rows))
    arrays = (
        place.parent / "zarr.json" for name in ("data", "labels", "sim") for place in file.parent.glob(f"{name}/**/c")
    )
    for array in filter(Path.is_file, arrays):
        set_json(array, ["shape", 0], str(rows))
        if chunk:
            set_json(array, ["chunk_grid", "configuration", "chunk_shape", 0], str(chunk))


def unseal(file: Path) -> None:
    """A checkpoint without its digest, as earlier versions wrote them: what is damaged in it is for others to see."""
    ours = json.loads(_header(file)["__metadata__"]["cvlctl"])
    set_header(file, ["cvlctl"], json.dumps({key: ours[key] for key in ours.keys() - {"checksum", "sha256"}}))


OPERATIONS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (cut, remove, insert, poke, text, link, pipe, folder, gone, swap, set_json, set_line,
                            set_header, set_length, declare, unseal)
}  # fmt: skip


def _with(document: Any, path: list[str | int], value: str, depth: int) -> str:
    mark = "\x00here"
    if not path:
        return "[" * depth + value + "]" * depth
    place = document
    for part in path[:-1]:
        place = place[part]
    if value == "" and depth == 0:
        del place[path[-1]]
        return json.dumps(document)
    place[path[-1]] = mark
    return json.dumps(document).replace(json.dumps(mark), "[" * depth + value + "]" * depth)


def apply(ops: list[Op]) -> None:
    """Do the operations [name, file, ...] in the current directory."""
    for name, file, *args in ops:
        OPERATIONS[name](Path(file), *args)


# ------------------------------------------------------------------------------------------------------ random damage

VALUES = (
    "", "null", "true", "0", "1", "-1", "1.5", "1e999", "-0.0", "NaN", "4294967296", "1e18", "9223372036854775808",
    "1" * 5000, '""', '"x"', '"5"', '"\\u001b]0;x\\u0007"', '"\\ud800"', '"\\u0000"', '"[/red]"', '"$x$"', '"../../up"',
    '"/dev/zero"', '"' + "long" * 5000 + '"', "[]", "[[]]", "[1, 2]", "{}", '{"a": {"b": []}}', "[null]", '["a", 1]',
)  # fmt: skip


def bytes_op(file: Path, rng: random.Random) -> Op:
    """A file cut short, some of it taken out or put in, or single bytes changed."""
    data, kind, name = file.read_bytes(), rng.random(), str(file)
    at = rng.randrange(len(data)) if data else 0
    if kind < 0.15 or not data:
        return ["cut", name, at]
    if kind < 0.25:
        return ["remove", name, at, rng.randrange(200)]
    if kind < 0.35:
        return ["insert", name, at, rng.randbytes(rng.randrange(1, 50)).hex()]
    places = []
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data))
        places.append([at, rng.choice((0, 127, 255, rng.randrange(256), data[at] ^ (1 << rng.randrange(8))))])
    return ["poke", name, *places]


def kind_op(file: Path, others: list[Path], rng: random.Random) -> Op:
    """A file that is none, or another one."""
    name = str(file)
    return rng.choice((
        ["gone", name], ["cut", name, 0], ["pipe", name], ["folder", name], ["link", name, "/dev/zero"],
        ["link", name, file.name], ["link", name, "/nowhere"], ["link", name, str(file.parent.absolute())],
        ["swap", name, str(rng.choice([other for other in others if other != file] or [file]))],
    ))  # fmt: skip


def tensor_op(file: Path, rng: random.Random) -> Op:
    """A safetensors header that lies of a tensor: its type, shape, or place, which may overlap with another's."""
    header = _header(file)
    name, other = rng.sample([key for key in header if key != "__metadata__"], 2)
    start, stop = header[name]["data_offsets"]
    shift = rng.choice((-4, -1, 1, 4, 2**31, 2**62, 2**64))
    places = [header[other]["data_offsets"], [start + shift, stop + shift], [stop, start], [start, stop + shift],
              [start], [start, stop, stop], [0, 0], [float(start), float(stop)]]  # fmt: skip
    shapes = [[2**20, 2**20], [2**32, 2**32], [2**64], [-1], [0], [], [1] * 70, [1.0], [True], [None], "ab",
              header[name]["shape"][::-1], [*header[name]["shape"], 2**62, 0], header[other]["shape"]]  # fmt: skip
    types = ["F16", "BF16", "F64", "I32", "U8", "BOOL", "F8_E4M3", "f32", "", "O"]
    key, values = rng.choice((("data_offsets", places), ("shape", shapes), ("dtype", types)))
    return ["set_header", str(file), [name, key], json.dumps(rng.choice(values)), 0]


def json_op(file: Path, rng: random.Random) -> Op:
    """A value somewhere in a JSON document, or in a line of one of lines, or in a safetensors header."""
    if file.suffix == ".jsonl":
        line = rng.randrange(max(1, len(file.read_text().splitlines())))
        return ["set_line", str(file), line, *_place(json.loads(file.read_text().splitlines()[line]), rng)]
    if file.suffix == ".safetensors":
        header, size = _header(file), file.stat().st_size
        if rng.random() < 0.15:
            return ["set_length", str(file), rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, size, size - 8))]
        if rng.random() < 0.6:
            path, value, depth = _place(json.loads(header["__metadata__"]["cvlctl"]), rng)
            return ["set_header", str(file), ["cvlctl", *path], value, depth]
        return ["set_header", str(file), *_place(header, rng)]
    return ["set_json", str(file), *_place(json.loads(file.read_text()), rng)]


def _place(document: Any, rng: random.Random) -> tuple[list[str | int], str, int]:
    paths = list(_paths(document))
    path = rng.choice(paths)
    if rng.random() < 0.1:
        return path, "", 100_000
    return path, rng.choice(VALUES if path else VALUES[1:]), 0


def _paths(document: Any, at: tuple[str | int, ...] = ()) -> Any:
    yield list(at)
    inside = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in list(inside)[:50]:
        yield from _paths(value, (*at, key))
