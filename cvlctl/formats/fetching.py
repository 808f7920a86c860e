"""Downloads D4RL's files: resumed where they were cut off, their size and digest checked, from a mirror if asked.

D4RL publishes no checksums. What is checked: the server's length; that HDF5 finds the file whole; and, from the second
time on, the sha256 that was taken when it came, kept beside it in `<file>.json`. A digest of your own can be given.
"""

from __future__ import annotations

import difflib
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cvlctl.errors import CvlctlError
from cvlctl.files import disk, lock, read_json, sha256, write_json
from cvlctl.formats.d4rl_infos import BASE, urls
from cvlctl.formats.sources import hdf5_file
from cvlctl.runs import Progress

BLOCK = 2**20
TIMEOUT = 30.0  # seconds without a byte


def fetch(name: str, out: str | Path, *, mirror: str = "", sha256_is: str = "", force: bool = False) -> dict[str, Any]:
    """Download a dataset, or find it there.

    Args:
        name: such as d4rl/hopper-medium-v2.
        out: the file to write, or a folder to put it in under its own name.
        mirror: base address that stands for http://rail.eecs.berkeley.edu/datasets/offline_rl.
        sha256_is: the digest that the file must have.
        force: download it again.

    Returns:
        status ("fetched" or "there already"), name, path, url, bytes, sha256.

    Raises:
        CvlctlError: an unknown name, no network, a wrong digest, or a file that is cut short.
    """
    url = _url(name, mirror)
    path = Path(out)
    if path.suffix not in (".hdf5", ".h5"):
        path = path / Path(urlsplit(url).path).name
    receipt = path.with_name(path.name + ".json")
    if path.exists() and not force:
        status = "there already"
    else:
        guard = path.with_name(f".{path.name}.lock")
        with lock(guard):
            try:
                _download(url, path)
            finally:
                guard.unlink(missing_ok=True)
        receipt.unlink(missing_ok=True)
        status = "fetched"
    with hdf5_file(path):  # HDF5 knows where its file ends
        digest = sha256(path)
    known = sha256_is or (read_json(receipt) or {}).get("sha256") or digest
    if digest != known:
        hint = "delete it, or download it again with --force (in Python, force=True)"
        raise CvlctlError(f"{path}: its sha256 is {digest}, expected {known}", hint)
    found = {"name": name, "url": url, "bytes": path.stat().st_size, "sha256": digest}
    write_json(receipt, found)
    return {"status": status, "path": str(path), **found}


def _url(name: str, mirror: str) -> str:
    known, short = urls(), name.removeprefix("d4rl/")
    if not name.startswith("d4rl/") or short not in known:
        near = difflib.get_close_matches(short, known, n=1)
        raise CvlctlError(
            f"no dataset {name!r}", f"did you mean d4rl/{near[0]}?" if near else "e.g. d4rl/hopper-medium-v2"
        )
    url = known[short]
    return mirror.rstrip("/") + url.removeprefix(BASE) if mirror else url


def _download(url: str, path: Path) -> None:
    """Into `<path>.part`, from where an earlier attempt stopped, then in place."""
    part = path.with_name(path.name + ".part")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = part.stat().st_size if part.exists() else 0
    hint = "check the network; the same command goes on where this one stopped. Another server: mirror"
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if answer.status != 206:  # the server does not resume: from the start
                done = 0
            total = done + int(answer.headers.get("Content-Length") or 0)
            done = _copy(answer, part, done, total, url)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not done:  # 416: there is nothing after what we have
            raise CvlctlError(f"{url}: the server says {error.code} {error.reason}", hint) from error
        total = done
    except (OSError, ValueError) as error:
        raise CvlctlError(f"{url} cannot be fetched: {getattr(error, 'reason', error)}", hint) from error
    except Exception as error:  # http.client's own: answers cut off or garbled
        raise CvlctlError(f"{url} cannot be fetched: {error or type(error).__name__}", hint) from error
    if done < total:
        raise CvlctlError(f"{url}: {done} of {total} bytes came", hint)
    try:
        with hdf5_file(part):
            pass
    except CvlctlError as error:
        part.unlink()
        raise CvlctlError(f"{url} is no whole HDF5 file", "fetch it again, or from another server: mirror") from error
    with disk(path):
        os.replace(part, path)


def _copy(answer: Any, part: Path, done: int, total: int, url: str) -> int:
    name = Path(urlsplit(url).path).name
    with (
        open(part, "ab" if done else "wb") as file,
        Progress(f"fetch {name}", total >> 20, "MB", done >> 20) as progress,
    ):
        while block := answer.read(BLOCK):
            with disk(part):
                file.write(block)
            done += len(block)
            progress.update(done >> 20)
    return done
