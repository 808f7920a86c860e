"""Checkpoint files: what was written is what is read, or one clear error."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from safetensors.torch import save_file

from cvlctl import checkpoints, files
from cvlctl.errors import CvlctlError

STATE = {
    "phi.0.weight": torch.arange(6.0).reshape(1, 2, 3),
    "adam/critic/count": torch.tensor(7.0),
    "centres": torch.zeros(1, 0, 4),
    "picked": torch.tensor([[3, 4]]),
    "mask": torch.tensor([[True, False]]),
    "half": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16),
}
METADATA = {"algorithm": "bc", "seeds": [0], "recipe": {"label": "0" * 64, "sha256": "0" * 64}, "step": 3}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    checkpoints.save(tmp_path / "a.safetensors", STATE, METADATA)
    return tmp_path / "a.safetensors"


def assert_is_what_was_saved(path: Path) -> None:
    state, metadata = checkpoints.load(path)
    assert state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
    assert {key: value for key, value in metadata.items() if key != "format"} == METADATA


def test_what_was_saved_is_loaded_and_others_can_read_it(path: Path, tmp_path: Path) -> None:
    assert_is_what_was_saved(path)
    assert checkpoints.read(path).sha256 == files.sha256(path)
    assert b"".join(checkpoints.read(path).content) == path.read_bytes()
    with safe_open(path, framework="pt") as theirs:  # safetensors' own reader
        assert all(torch.equal(theirs.get_tensor(name), value) for name, value in STATE.items())
    checkpoints.save(tmp_path / "b.safetensors", *checkpoints.load(path))
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_the_same_state_is_the_same_bytes_in_every_process(path: Path, tmp_path: Path) -> None:
    script = f"from test_checkpoints import *; checkpoints.save(Path({str(tmp_path / 'b')!r}), STATE, METADATA)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-P", "-c", script], env=environment, check=True)
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_file_of_an_earlier_version_has_no_digest_and_is_read(path: Path) -> None:
    save_file(STATE, path, {"cvlctl": json.dumps({"format": 1, **METADATA | {"recipe": METADATA["recipe"]}})})
    assert_is_what_was_saved(path)
    save_file(STATE, path, {"cvlctl": json.dumps({"format": 1, "algorithm": "bc"})})
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    checkpoints.load(path)  # nobody can tell


def test_no_flipped_bit_goes_unnoticed(path: Path) -> None:
    sound = path.read_bytes()
    for at in range(len(sound)):  # in every byte one; which of the eight changes from byte to byte
        damaged = bytearray(sound)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(CvlctlError, match=r"a\.safetensors"):
            checkpoints.read(path)
    path.write_bytes(sound)
    assert_is_what_was_saved(path)


def test_cut_or_lengthened_anywhere_it_is_refused(path: Path) -> None:
    sound = path.read_bytes()
    for end in range(len(sound)):
        path.write_bytes(sound[:end])
        with pytest.raises(CvlctlError, match=r"a\.safetensors"):
            checkpoints.read(path)
    path.write_bytes(sound + b"\0")
    with pytest.raises(CvlctlError, match="bytes of tensors, where the header tells of"):
        checkpoints.read(path)


def test_another_file_than_is_meant_is_refused(path: Path) -> None:
    meant = checkpoints.read(path).sha256
    assert checkpoints.read(path, meant).sha256 == meant
    checkpoints.save(path, STATE, {**METADATA, "step": 4})
    with pytest.raises(CvlctlError, match="is another file by now"):
        checkpoints.read(path, meant)


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with a header of one's own; bytes as they are, else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(start: int, stop: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


OURS = {"__metadata__": {"cvlctl": json.dumps({"format": 1})}}
MALFORMED: dict[str, tuple[Any, ...]] = {
    "empty": (b"", b"", 0),
    "a header that is longer than the file": (OURS, b"", 10_000),
    "a header above safetensors' limit": (OURS, b"", 100_000_001),
    "the longest header": (OURS, b"", 2**64 - 1),
    "no JSON": (b"{",),
    "not UTF-8": (b'{"\xff": 1}',),
    "UTF-16": ("{}".encode("utf-16"),),
    "deep": (b"[" * 100_000,),
    "deep in a tensor": (b'{"a":' + b'{"a":' * 100_000,),
    "a list": ([1],),
    "a name twice": (b'{"a":' + json.dumps(tensor(0, 4)).encode() + b',"a":' + json.dumps(tensor(0, 4)).encode() + b"}",
                     bytes(4)),
    "overlapping": (OURS | {"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)),
    "twice the same bytes": (OURS | {"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4)),
    "a gap": (OURS | {"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "bytes of nobody": (OURS | {"a": tensor(0, 4)}, bytes(8)),
    "beyond the end": (OURS | {"a": tensor(0, 4)}, bytes(3)),
    "offsets the wrong way round": (OURS | {"a": tensor(4, 0)}, bytes(4)),
    "negative offsets": (OURS | {"a": tensor(-4, 0)}, b""),
    "three offsets": (OURS | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(8)),
    "fractions": (OURS | {"a": tensor(0, 4, [1.0])}, bytes(4)),
    "true": (OURS | {"a": tensor(0, 4, [True])}, bytes(4)),
    "a negative shape": (OURS | {"a": tensor(0, 4, [-1, -1])}, bytes(4)),
    "a huge shape": (OURS | {"a": tensor(0, 4, [2**62, 2**62])}, bytes(4)),
    "a shape of thousands of digits": (OURS | {"a": tensor(0, 4, [10**4000, 10**4000])}, bytes(4)),
    "many dimensions": (OURS | {"a": tensor(0, 4, [1] * 1000)}, bytes(4)),
    "a shape that is text": (OURS | {"a": tensor(0, 4, "1")}, bytes(4)),
    "an unknown type": (OURS | {"a": tensor(0, 4, [1], "F4")}, bytes(4)),
    "a type that is a list": (OURS | {"a": tensor(0, 4, [1], ["F32"])}, bytes(4)),
    "no shape": (OURS | {"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "a tensor that is text": (OURS | {"a": "F32"}, bytes(4)),
    "no metadata": ({"a": tensor(0, 4)}, bytes(4)),
    "metadata that is a list": ({"__metadata__": ["cvlctl"]},),
    "metadata of another project": ({"__metadata__": {"format": "pt"}},),
    "our JSON is none": ({"__metadata__": {"cvlctl": "{"}},),
    "our JSON is deep": ({"__metadata__": {"cvlctl": "[" * 100_000}},),
    "our JSON is a list": ({"__metadata__": {"cvlctl": "[1]"}},),
    "our JSON is no text": ({"__metadata__": {"cvlctl": {"format": 1}}},),
    "no format": ({"__metadata__": {"cvlctl": "{}"}},),
    "a newer format": ({"__metadata__": {"cvlctl": '{"format": 2}'}},),
    "a format that is true": ({"__metadata__": {"cvlctl": '{"format": true}'}},),
    "a digest that is a number": ({"__metadata__": {"cvlctl": '{"format": 1, "checksum": "sha256", "sha256": 5}'}},),
    "a digest alone": ({"__metadata__": {"cvlctl": json.dumps({"format": 1, "sha256": "0" * 64})}},),
    "another digest": ({"__metadata__": {"cvlctl": json.dumps({"format": 1, "checksum": "md5", "sha256": "0" * 64})}},),
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_files_are_refused(what: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.safetensors", *MALFORMED[what])
    with pytest.raises(CvlctlError, match=r"a\.safetensors") as caught:
        checkpoints.read(path)
    assert len(str(caught.value)) < 1000


def test_the_same_by_hand_but_sound_is_read(tmp_path: Path) -> None:
    header = OURS | {"b": tensor(4, 12, [1, 2]), "a": tensor(0, 4, []), "empty": tensor(4, 4, [0, 5])}
    path = written(tmp_path / "a.safetensors", header, np.array([1, 2, 3], "<f4").tobytes())
    found = checkpoints.read(path)
    assert found.array("a") == 1.0 and found.array("b", 0).tolist() == [2.0, 3.0] and found.array("empty").size == 0


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices")
def test_only_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "zero", "loop", ".", "none"):
        with pytest.raises(CvlctlError, match="no such checkpoint"):
            checkpoints.read(tmp_path / name)


def test_a_number_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    checkpoints.save(tmp_path / "a", {"phi.0.weight": torch.tensor([float("nan")])}, {})
    with pytest.raises(CvlctlError, match=r"phi\.0\.weight holds NaN"):
        checkpoints.load(tmp_path / "a")


def test_another_state_than_expected_is_refused_by_name(path: Path) -> None:
    checkpoints.check_alike(path, STATE, STATE)
    for message, changes in {
        "picked is nothing, where int64": {"picked": None},
        r"half is float32 of shape \(1,\), where bfloat16 of shape \(1, 2\)": {"half": torch.zeros(1)},
        "more is float32 .*, where nothing": {"more": torch.zeros(1)},
    }.items():
        state = {name: value for name, value in (STATE | changes).items() if value is not None}
        with pytest.raises(CvlctlError, match=message):
            checkpoints.check_alike(path, state, STATE)


def test_a_header_of_ours_is_as_long_as_safetensors_own(path: Path) -> None:
    """The digest is patched in place: what others wrote of the tensors stays where it is."""
    about = {"format": 1, "checksum": "sha256", "sha256": checkpoints.BLANK, **METADATA}
    plain, ours = to_bytes(STATE, {"cvlctl": json.dumps(about)}), path.read_bytes()
    differ = [at for at, (a, b) in enumerate(zip(plain, ours, strict=True)) if a != b]
    assert differ and differ[-1] - differ[0] < 64
