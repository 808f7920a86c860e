"""Chunks on disk: zarr reads what the store reads, other codecs too, and no chunk passes at the wrong length."""

from __future__ import annotations

import shutil
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from numcodecs import Zstd
from toy_stores import flip

from cvlctl.data import chunks
from cvlctl.data.store import open_store
from cvlctl.data.verify import verify_store
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


def test_zarr_reads_what_the_store_reads(written: Path) -> None:
    store = open_store(written)
    for name in (*open_store(written).arrays, "labels/given/reward", "labels/given/success"):
        values = store.array(name)
        np.testing.assert_array_equal(values, zarr.open_array(written / name, mode="r")[:])
        assert values.flags.writeable and values.flags.c_contiguous


def test_chunks_of_other_codecs_are_read_too(written: Path) -> None:
    """Docs name the codecs; what zarr reads besides is read, and its damage named, at zarr's own speed."""
    wanted = open_store(written).observations()
    shutil.rmtree(written / "data/observation")
    codecs = [zarr.codecs.BloscCodec(cname="lz4"), zarr.codecs.Crc32cCodec()]
    shape = {"shape": wanted.shape, "dtype": wanted.dtype, "chunks": (20, 3)}
    array = zarr.create_array(written, name="data/observation", compressors=codecs, **shape)
    array[:] = wanted
    np.testing.assert_array_equal(open_store(written).observations(), wanted)
    assert verify_store(written) == []
    flip(written / "data/observation/c/2/0")
    with pytest.raises(CvlctlError, match=r"data/observation chunk 2 \(rows 40-59\): checksum/crc fails"):
        open_store(written).observations()


def test_a_sound_chunk_of_the_wrong_length_is_damage(written: Path) -> None:
    """Its checksum holds, but it would fill a part of the rows alone: memory as it was found must not pass for data."""
    for content in (np.ones((19, 3), np.float32), np.ones((21, 3), np.float32), np.ones((0, 3), np.float32)):
        packed = np.frombuffer(Zstd(level=3).encode(content), np.uint8)
        checksum = google_crc32c.value(packed).to_bytes(4, "little")
        (written / "data/observation/c/1/0").write_bytes(packed.tobytes() + checksum)
        with pytest.raises(CvlctlError, match=r"data/observation chunk 1 \(rows 20-39\)"):
            open_store(written).observations()


@pytest.mark.parametrize("size", [1, 255, 256, 300, 65_791, 65_792, 200_000])
def test_the_length_in_a_frames_header(size: int) -> None:
    assert chunks._unpacked_bytes(Zstd(level=3).encode(np.zeros(size, np.uint8))) == size
    streamed = bytes([0x28, 0xB5, 0x2F, 0xFD, 0x00, 0x58])  # a header that leaves the length out
    assert chunks._unpacked_bytes(streamed) == chunks._unpacked_bytes(b"") == 0
