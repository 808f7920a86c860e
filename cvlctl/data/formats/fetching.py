"""Downloads D4RL's files: resumed where they were cut off, size and digest checked, from a mirror if asked.

`pooch.HTTPDownloader` carries the bytes. Pooch keeps nothing of a download that breaks off, so resuming is ours: the
bytes lie in `<file>.part` (what they are part of, in `<file>.part.json`), which becomes the file by one rename when its
size, its sha256 and HDF5 agree that it is whole. `d4rl_files` knows size and sha256 of most files; of the others the
sha256 that was taken when they came is kept beside them in `<file>.json`, and holds from then on.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cvlctl.data.formats.d4rl_files import FILES
from cvlctl.data.formats.d4rl_infos import BASE, urls
from cvlctl.data.formats.hdf5 import hdf5_file
from cvlctl.errors import CvlctlError
from cvlctl.files import disk, lock, make_folder, read_json, sha256, sweep, sync, write_json
from cvlctl.progress import Progress

BLOCK = 2**16  # bytes; what a broken connection loses at most
TIMEOUT = 30.0  # seconds without a byte
MIRROR = "another server: --mirror (in Python, mirror=)"
AGAIN = f"the same command goes on where this one stopped; {MIRROR}"


def fetch(name: str, out: str | Path, *, mirror: str = "", sha256_is: str = "", force: bool = False) -> dict[str, Any]:
    """Download a dataset, or find it there.

    Args:
        name: such as d4rl/hopper-medium-v2.
        out: the file to write, or a folder to put it in under its own name.
        mirror: base address that stands for http://rail.eecs.berkeley.edu/datasets/offline_rl; or, with {file} in it,
            the address of a file of that name.
        sha256_is: the digest that the file must have; it stands above the published one.
        force: download it again.

    Returns:
        status ("fetched" or "there already"), name, path, url, bytes, sha256, and by what that was checked: "given",
        "published", "recorded" (when it came), or "nothing": none is known, this one is recorded now.

    Raises:
        CvlctlError: an unknown name, no network, another size or digest, or a file that is cut short. What came so far
            is kept for the next call, unless it is wrong; a file that was there stays.
    """
    url, known, given = _url(name, mirror), FILES.get(name.removeprefix("d4rl/")), sha256_is.lower()
    if given and not re.fullmatch("[0-9a-f]{64}", given):
        raise CvlctlError(f"--sha256 {sha256_is} is no sha256", "it has 64 hexadecimal digits: see sha256sum FILE")
    wanted, checked = (given, "given") if given else (known.sha256, "published") if known else ("", "nothing")
    path = Path(out)
    if path.suffix not in (".hdf5", ".h5"):
        path = path / Path(urlsplit(url).path).name
    receipt, guard = path.with_name(path.name + ".json"), path.with_name(f".{path.name}.lock")
    _tidy(path, receipt, guard)
    digest = ""
    if force or not path.exists():
        with lock(guard):
            try:
                if force or not path.exists():  # else another process has just brought it
                    digest = _download(url, path, wanted, known.bytes if known and wanted == known.sha256 else 0)
            finally:
                guard.unlink(missing_ok=True)
    status = "fetched" if digest else "there already"
    if not digest:
        recorded = (read_json(receipt) or {}).get("sha256")
        if recorded and not wanted:
            wanted, checked = str(recorded), "recorded"
        with hdf5_file(path):  # HDF5 knows where its file ends
            digest = sha256(path)
        if digest != (wanted or digest):
            hint = "delete it, or download it again with --force (in Python, force=True)"
            raise CvlctlError(f"{path}: its sha256 is {digest}, expected {wanted} ({checked})", hint)
    found = {"name": name, "url": url, "bytes": path.stat().st_size, "sha256": digest}
    write_json(receipt, found)
    return {"status": status, "path": str(path), **found, "checked": checked}


def _tidy(path: Path, receipt: Path, guard: Path) -> None:
    """Remove what a killed fetch left, but for what another one goes on with."""
    part = path.with_name(path.name + ".part")
    about = part.with_name(part.name + ".json")
    for name in (receipt.name, about.name):
        sweep(path.parent, name)
    if path.exists() and (guard.exists() or about.exists()):  # it was killed when all was done
        with contextlib.suppress(CvlctlError), lock(guard):  # else another one is at work
            if not part.exists():
                about.unlink(missing_ok=True)
            guard.unlink(missing_ok=True)


def _url(name: str, mirror: str) -> str:
    known, short = urls(), name.removeprefix("d4rl/")
    if not name.startswith("d4rl/") or short not in known:
        near = difflib.get_close_matches(short, known, n=1)
        raise CvlctlError(
            f"no dataset {name!r}", f"did you mean d4rl/{near[0]}?" if near else "e.g. d4rl/hopper-medium-v2"
        )
    url = known[short]
    if "{file}" in mirror:
        return mirror.replace("{file}", url.rpartition("/")[2])
    return mirror.rstrip("/") + url.removeprefix(BASE) if mirror else url


def _download(url: str, path: Path, wanted: str, size: int) -> str:
    """Into `<path>.part`, then in place. Returns its sha256. `wanted`, `size`: sha256 and bytes; "", 0: not known."""
    with disk(path):
        make_folder(path.parent)
    with _Part(path.with_name(path.name + ".part"), url, wanted, size) as part:
        if not part.total or part.done < part.total:  # else it was stopped just before its last steps
            _carry(url, part)
    try:
        with hdf5_file(part.path):
            digest = sha256(part.path)
    except CvlctlError as error:
        part.discard()
        raise CvlctlError(f"{url} is no whole HDF5 file", f"fetch it again, or from {MIRROR}") from error
    if digest != (wanted or digest):
        part.discard()
        hint = f"fetch it again, or from {MIRROR}; if it is the file that you want, say --sha256 {digest}"
        raise CvlctlError(f"{url}: its sha256 is {digest}, expected {wanted}", hint)
    with disk(path):
        sync(part.path)  # before the rename: it is taken for whole from then on
        os.replace(part.path, path)
        sync(path.parent)
    part.discard()
    return digest


def _carry(url: str, part: _Part) -> None:
    """Fetch what is missing in `part`."""
    import pooch
    import requests

    options = {"headers": part.headers(), "hooks": {"response": part.begin}, "timeout": TIMEOUT}
    try:
        pooch.HTTPDownloader(chunk_size=BLOCK, **options)(url, part, None)
    except requests.HTTPError as error:
        answer: Any = error.response
        if answer.status_code == 416:  # there is no such rest: what we have is of another file
            part.discard()
        what = f"{url} cannot be fetched: the server says {answer.status_code} {answer.reason}"
        raise CvlctlError(what, AGAIN) from error
    except (requests.RequestException, ValueError) as error:
        here = f"; {part.done:,} of {part.total:,} bytes are here" if part.done else ""
        raise CvlctlError(f"{url} cannot be fetched: {_reason(error)}{here}", f"check the network; {AGAIN}") from error


class _Part:
    """`<file>.part`: what pooch writes to. It tells what it holds and what is missing, and shows progress."""

    def __init__(self, path: Path, url: str, wanted: str, size: int) -> None:
        self.path, self.url, self.size, self.pinned = path, url, size, bool(wanted)
        self._about = path.with_name(path.name + ".json")
        self._open = contextlib.ExitStack()

    def __enter__(self) -> _Part:
        about = read_json(self._about) or {}  # damaged, it is as good as not there: the server is asked again
        said, version = about.get("bytes"), about.get("version")
        self.total = self.size or (said if type(said) is int and said > 0 else 0)
        self._version = version if isinstance(version, str) else ""
        with disk(self.path):
            self._file = self._open.enter_context(open(self.path, "ab"))
        self.done = self._file.tell()
        if self.total and self.done > self.total:
            self._restart()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
        if not self.done:
            self.discard()

    def headers(self) -> dict[str, str]:
        """Ask for the rest alone; where no digest will tell in the end, only if it is the rest of the same file."""
        asked = {"Accept-Encoding": "identity"}
        if self.done:
            asked["Range"] = f"bytes={self.done}-"
            if self._version and not self.pinned:
                asked["If-Range"] = self._version
        return asked

    def begin(self, answer: Any, **_: Any) -> None:
        """Look at what the server is about to send: requests calls this before the first byte."""
        if not 200 <= answer.status_code < 300:
            return
        told, start = answer.headers, self.done if answer.status_code == 206 else 0
        if start and not told.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise CvlctlError(f"{self.url}: the server sends another part than was asked for", MIRROR)
        total = start + int(told["Content-Length"]) if "Content-Length" in told else 0
        if self.size and total and total != self.size:
            hint = f"{MIRROR}; if you know that file, say which sha256 it has: --sha256"
            raise CvlctlError(f"{self.url} has {total:,} bytes there, and should have {self.size:,}", hint)
        if not start:  # the server does not resume, or has another file now
            self._restart()
        tag, self.total = told.get("ETag", ""), self.size or total
        version = tag if tag and not tag.startswith("W/") else told.get("Last-Modified", "")
        write_json(self._about, {"url": self.url, "bytes": self.total, "version": version})
        what = f"fetch {self.path.name.removesuffix('.part')}"
        self._progress = self._open.enter_context(Progress(what, self.total >> 20, "MB", self.done >> 20))

    def write(self, data: bytes) -> None:
        with disk(self.path):
            self._file.write(data)
        self.done += len(data)
        self._progress.update(self.done >> 20)

    def flush(self) -> None:
        with disk(self.path):
            self._file.flush()

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def _restart(self) -> None:
        self._file.truncate(0)
        self.done = 0


def _reason(error: BaseException) -> str:
    """The innermost error: the libraries around it add their own names and addresses."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
