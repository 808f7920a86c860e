"""TFRecord files of tf.train.Example, without TensorFlow: a record at a time, and of it only the features asked for.

A record is its length (8 bytes), the length's checksum, the bytes, and their checksum (CRC-32C, rotated and offset). An
Example maps names to lists of bytes, floats or integers, in protocol buffers' wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cvlctl.data.formats.sources import regular
from cvlctl.errors import CvlctlError

DAMAGED = "the file may be cut short or damaged: fetch or write it again"
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
BYTES_LIST, FLOAT_LIST, INT64_LIST = 1, 2, 3  # of tf.train.Feature

Feature = np.ndarray | list[bytes]


def records(path: Path) -> Iterator[bytes]:
    """The records of a file, each of which its checksum holds to.

    Raises:
        CvlctlError: it ends within one, or a checksum is wrong; a length that the file cannot hold is not believed.
    """
    regular(path, "a TFRecord file")
    with open(path, "rb") as file:
        left, number = path.stat().st_size, 0
        while head := file.read(12):
            where = f"{path}: record {number}"
            if len(head) < 12:
                raise CvlctlError(f"{where}: the file ends within it", DAMAGED)
            (size,), left = struct.unpack("<Q", head[:8]), left - 12
            if masked(head[:8]) != head[8:]:
                raise CvlctlError(f"{where}: its length is not what its checksum says", DAMAGED)
            if size + 4 > left:
                raise CvlctlError(f"{where}: is to have {size:,} bytes, and the file has {left:,} left", DAMAGED)
            content, left = file.read(size), left - size - 4
            if masked(content) != file.read(4):
                raise CvlctlError(f"{where}: is not what its checksum says", DAMAGED)
            yield content
            number += 1


def masked(content: bytes) -> bytes:
    """A record's checksum."""
    import google_crc32c

    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def example(record: bytes, wanted: Collection[str], where: str) -> dict[str, Feature]:
    """Of an Example the features that are wanted and there: float32 or int64 arrays, or lists of bytes.

    Raises:
        CvlctlError: its bytes are no Example; `where` says whose they are.
    """
    found: dict[str, Feature] = {}
    try:
        for features in _parts(memoryview(record), 1):
            for entry in _parts(features, 1):
                name = b"".join(_parts(entry, 1)).decode()
                if name in wanted:
                    found[name] = _feature(entry)
    except ValueError as error:
        raise CvlctlError(f"{where}: is no tf.train.Example: {error}", DAMAGED) from error
    return found


def _feature(entry: memoryview) -> Feature:
    values: Feature = []
    for feature in _parts(entry, 2):
        for kind, _, content in _fields(feature):
            if not isinstance(content, memoryview):
                raise ValueError("a list of values is expected")
            if kind == BYTES_LIST:
                values = [bytes(part) for part in _parts(content, 1)]
            elif kind == FLOAT_LIST:
                values = _packed(content, FIXED32)
            elif kind == INT64_LIST:
                values = _packed(content, VARINT)
    return values


def _packed(content: memoryview, single: int) -> np.ndarray:
    """The values of a list, together or one by one; none of the record's bytes is held on to."""
    parts, alone = [], []
    for number, kind, value in _fields(content):
        if number != 1 or kind not in (BYTES, single):
            raise ValueError(f"a list holds a field {number} of wire type {kind}")
        if isinstance(value, memoryview):
            if single == FIXED32 and len(value) % 4:
                raise ValueError(f"{len(value)} bytes are no floats")
            parts.append(_varints(value) if single == VARINT and kind == BYTES else np.frombuffer(value, "<f4").copy())
        else:
            alone.append(value)
    if alone:
        parts.append(np.array(alone, np.uint64).view(np.int64))
    kind_of = np.float32 if single == FIXED32 else np.int64
    return np.concatenate(parts) if parts else np.zeros(0, kind_of)


def _parts(content: memoryview, wanted: int) -> Iterator[memoryview]:
    """The messages, or bytes, that a message has under a number."""
    for number, _, value in _fields(content):
        if number == wanted:
            if not isinstance(value, memoryview):
                raise ValueError(f"field {number} is a number")
            yield value


def _fields(content: memoryview) -> Iterator[tuple[int, int, Any]]:
    """(number, wire type, value): a view of bytes, or an int of a varint."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        kind, size = key & 7, 0
        if kind == VARINT:
            value, at = _varint(content, at)
            yield key >> 3, kind, value
            continue
        if kind == BYTES:
            size, at = _varint(content, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if size > len(content) - at:
            raise ValueError(f"{size:,} bytes are to come, and {len(content) - at:,} are left")
        yield key >> 3, kind, content[at : at + size]
        at += size


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            raise ValueError("it ends within a number")
        byte = content[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            if value >= 2**64:
                break
            return value, at
    raise ValueError("a number of more than 64 bits")


def _varints(content: memoryview) -> np.ndarray:
    """int64 of numbers that lie one after the other."""
    data = np.frombuffer(content, np.uint8)
    ends = np.flatnonzero(data < 128)
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        raise ValueError("it ends within a number")
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    sizes = ends - starts + 1
    if sizes.max(initial=0) > 10 or (data[ends[sizes == 10]] > 1).any():
        raise ValueError("a number of more than 64 bits")
    values = np.zeros(len(ends), np.uint64)
    for i in range(sizes.max(initial=0)):
        there = sizes > i
        values[there] |= (data[starts[there] + i] & 127).astype(np.uint64) << np.uint64(7 * i)
    return values.view(np.int64)
