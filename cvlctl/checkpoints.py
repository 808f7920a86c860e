"""Training state on disk: one safetensors file, metadata as JSON in its header. Written atomically; no pickle.

The JSON says how the file is checked, and holds a digest of it: sha256 of the whole file with 64 zeros in its place. A
file is read once, and whatever is said of it is said of the bytes that were read. Files of earlier versions have no
digest. Torch is imported by `save` and `load` alone: workers that play policies do without.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cvlctl.errors import CvlctlError
from cvlctl.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
KEY = "cvlctl"  # of the JSON in a safetensors header
BLANK = "0" * 64
_CHECKED = {"checksum": "sha256", "sha256": BLANK}  # two keys, so that no flipped bit makes a file one without a digest
_DIGEST = re.compile(rb'\\"sha256\\": \\"([0-9a-f]{64})\\"')  # in the header, where our JSON is text within JSON
_LARGEST_HEADER = 100_000_000  # bytes: safetensors' own limit
_DTYPES = {  # as numpy calls them; it lacks BF16, whose bits are passed on
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "BF16": "<i2", "I32": "<i4",
    "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip
_DAMAGED = "it is damaged, or not a safetensors file: train again"


class Place(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: str  # safetensors' word: "F32"
    shape: tuple[int, ...]
    start: int  # bytes from the header's end
    stop: int


class Saved:
    """The content of a checkpoint file, in memory: header and tensors of the very bytes that were read.

    Args:
        path: where it was read, for messages.
        header: the first bytes, up to the first tensor.
        data: the rest, uint8.
    """

    def __init__(self, path: Path, header: bytes, data: np.ndarray) -> None:
        self.path, self._header, self._data = path, header, data
        try:
            parsed = json.loads(header[8:].decode(), object_pairs_hook=_without_twins)
            if not isinstance(parsed, dict):
                raise ValueError("the header is no object")
            told = parsed.pop("__metadata__", None) or {}
            self.places = {name: _place(name, value) for name, value in parsed.items()}
            _check_places(self.places, len(data))
        except (ValueError, TypeError, KeyError, RecursionError) as error:  # JSON's and UTF-8's are ValueErrors
            raise _unreadable(path, error) from error
        try:
            metadata = json.loads(told[KEY])
            number = metadata["format"]
            if type(number) is not int:
                raise TypeError("format is no whole number")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            what = f"{path} has no readable cvlctl header ({type(error).__name__}: {error})"
            raise CvlctlError(what, "it is a safetensors file, but not a checkpoint of cvlctl") from error
        if number != FORMAT:
            raise CvlctlError(f"{path} has format {number}; this cvlctl reads format {FORMAT}", "upgrade cvlctl")
        self._checked = _CHECKED.keys() & metadata.keys()
        self._digest = metadata.pop("sha256", None)
        self.metadata: dict[str, Any] = {key: value for key, value in metadata.items() if key != "checksum"}
        self._algorithm = metadata.get("checksum")

    @cached_property
    def sha256(self) -> str:
        """The digest of the file's bytes."""
        total = hashlib.sha256(self._header)
        total.update(self._data.data)
        return total.hexdigest()

    @property
    def content(self) -> tuple[bytes, memoryview]:
        """The file's bytes, in two parts."""
        return self._header, self._data.data

    def verify(self) -> None:
        """Compare the content with its own digest; nothing to do where an earlier version wrote none.

        Raises:
            CvlctlError: it is damaged.
        """
        if not self._checked:
            return
        found = _DIGEST.search(self._header)
        if found and self._checked == _CHECKED.keys() and self._algorithm == "sha256":
            total = hashlib.sha256(_patched(self._header, found, BLANK))
            total.update(self._data.data)
            if total.hexdigest() == self._digest == found[1].decode():
                return
        what = f"{self.path}: damaged: its content is not what was written, by its sha256"
        raise CvlctlError(what, "restore it from a copy, or train again")

    def array(self, name: str, member: int | None = None) -> np.ndarray:
        """A copy of a tensor, or of its row `member`."""
        whole = self._view(name)
        return np.array(whole if member is None else whole[member])

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor, where torch would have put it: a product's last bit may depend on that."""
        import torch

        found = torch.from_numpy(np.require(self._view(name), requirements="A")).clone()
        return found.view(torch.bfloat16) if self.places[name].dtype == "BF16" else found

    def _view(self, name: str) -> np.ndarray:
        dtype, shape, start, stop = self.places[name]
        return self._data[start:stop].view(_DTYPES[dtype]).reshape(shape)


def save(path: Path, state: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write `state` and `metadata` to `path`: a reader sees the old file or the new one, whole."""
    from safetensors.torch import save as to_bytes

    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    about = {"format": FORMAT, **_CHECKED, **metadata}
    written = memoryview(to_bytes(tensors, metadata={KEY: json.dumps(about)}))
    end = 8 + int.from_bytes(written[:8], "little")
    found = _DIGEST.search(written[:end])
    assert found is not None and found[1].decode() == BLANK
    header = _patched(bytes(written[:end]), found, hashlib.sha256(written).hexdigest())
    write_atomically(path, header, written[end:])


def read(path: Path, sha256: str | None = None) -> Saved:
    """A checkpoint file, in memory and checked.

    Args:
        sha256: of the file that is meant. None: whatever is there.

    Raises:
        CvlctlError: where the file is missing, damaged, not one of ours, or another one than is meant.
    """
    if not path.is_file():
        raise CvlctlError(f"{path}: no such checkpoint")
    try:
        with open(path, "rb") as file:
            found = _read(path, file)
    except (OSError, MemoryError, ValueError) as error:
        raise _unreadable(path, error) from error
    if sha256 is None:
        found.verify()
    elif found.sha256 != sha256:
        what = f"{path} is another file by now: its run was trained on, or started over, in the meantime"
        raise CvlctlError(what, "run the same command again: it takes the new one")
    return found


def load(path: Path, device: str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state and metadata that `save` wrote.

    Raises:
        CvlctlError: where the file is missing, damaged, or not one of ours. Nothing in it is ever executed.
    """
    found = read(path)
    return unpack(found, device), found.metadata


def unpack(found: Saved, device: str = "cpu") -> dict[str, Tensor]:
    """The state in a checkpoint. CvlctlError where a number in it is not finite."""
    import torch

    state = {name: found.tensor(name) for name in found.places}
    broken = [name for name, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise CvlctlError(
            f"{found.path}: {broken[0]} holds NaN or infinity", "training diverged; lower the learning rate"
        )
    return {name: value.to(device) for name, value in state.items()}


def check_alike(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise a CvlctlError where the state that was read from `path` has other tensors than are expected."""
    for name in [*expected, *(state.keys() - expected.keys())]:
        there, wanted = (
            f"{str(x[name].dtype).removeprefix('torch.')} of shape {tuple(x[name].shape)}" if name in x else "nothing"
            for x in (state, expected)
        )
        if there != wanted:
            what = f"{path}: {name} is {there}, where {wanted} was expected"
            raise CvlctlError(what, "it is damaged, or of another version: --force starts the run over")


def checkpoint_file(path: Path, checkpoint: str | int = "last") -> Path:
    """The checkpoint file of a run directory: "last", or a step such as 5000. A file stands for itself.

    Raises:
        CvlctlError: there is no such run or checkpoint.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        runs = [folder.parent.name for folder in path.parent.glob("*/checkpoints")]
        near = difflib.get_close_matches(path.name, runs, n=1)
        hint = "train it first: cvlctl pretrain RECIPE, or cvlctl finetune RECIPE"
        raise CvlctlError(f"no run or checkpoint at {path}", f"did you mean {path.parent / near[0]}?" if near else hint)
    name = f"step-{int(checkpoint):09d}" if str(checkpoint).isdecimal() else str(checkpoint)
    file = path / "checkpoints" / f"{name}.safetensors"
    if not file.is_file():
        there = sorted(p.stem for p in (path / "checkpoints").glob("*.safetensors"))
        hint = f"it has: {', '.join(there)}" if there else "it is no run, or its training has not saved anything yet"
        raise CvlctlError(f"{path} has no checkpoint {name!r}", hint)
    return file


# --- safetensors: 8 bytes of the header's length, the header in JSON, the tensors one after the other


def _read(path: Path, file: IO[bytes]) -> Saved:
    size = os.fstat(file.fileno()).st_size
    length = file.read(8)
    end = 8 + int.from_bytes(length, "little")
    if len(length) < 8 or end - 8 > _LARGEST_HEADER or end > size:
        raise ValueError(f"no header of at most {_LARGEST_HEADER:,} bytes")
    header, data = length + file.read(end - 8), np.empty(size - end, np.uint8)
    filled, rest = 0, data.data
    while filled < len(data):
        got = file.readinto(rest[filled:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError("the file ends early")
        filled += got
    return Saved(path, header, data)


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the header has a name twice")
    return found


def _place(name: str, value: Any) -> Place:
    """What the header says of one tensor."""
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    numbers = [*shape, start, stop]
    if dtype not in _DTYPES or len(shape) > 32 or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name!r}: {dtype!r} of shape {shape} at {start} to {stop}")
    if stop - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(f"{name!r}: {stop - start} bytes for {dtype} of shape {shape}")
    return Place(dtype, tuple(shape), start, stop)


def _check_places(places: dict[str, Place], size: int) -> None:
    """The tensors lie one after the other, without overlaps or gaps, to the file's end."""
    end = 0
    for name, place in sorted(places.items(), key=lambda item: item[1][2:]):
        if place.start != end:
            raise ValueError(f"{name!r} begins at byte {place.start}, where {end} was expected")
        end = place.stop
    if end != size:
        raise ValueError(f"{size} bytes of tensors, where the header tells of {end}")


def _patched(header: bytes, found: re.Match[bytes], digest: str) -> bytes:
    return header[: found.start(1)] + digest.encode() + header[found.end(1) :]


def _unreadable(path: Path, error: Exception) -> CvlctlError:
    return CvlctlError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {str(error)[:200]}", _DAMAGED)
