"""Fetching D4RL's files: from a mirror, on after a cut, checked against digests; no server and wrong files."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import pytest
from toy_files import hdf5, rows

from cvlctl import files
from cvlctl.cli import app
from cvlctl.cli.console import execute
from cvlctl.data import exchange, formats
from cvlctl.data.formats import d4rl_infos, fetching
from cvlctl.data.formats.d4rl_files import FILES, Known
from cvlctl.errors import CvlctlError

pytestmark = pytest.mark.usefixtures("no_fsync")


class Server(ThreadingHTTPServer):
    """Has one file under every address but `missing`; keeps what it was asked for, and how many bytes it sent."""

    content, etag = b"", '"one"'
    ranges = tags = True
    stop_after = 10**9  # bytes, then the connection breaks
    asked: list[str]
    sent: list[int]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.asked.append(f"{self.path} {wanted}".strip())
        same = self.headers.get("If-Range", server.etag) == server.etag
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.ranges and same else 0
        whole = len(server.content)
        if "missing" in self.path:
            self.send_error(404)
            return
        if start >= whole:
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{whole - 1}/{whole}")
        if server.tags:
            self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(whole - start))
        self.end_headers()
        body = server.content[start : start + server.stop_after]
        server.sent.append(len(body))
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "BLOCK", 100)
    made = Server(("127.0.0.1", 0), Handler)
    made.asked, made.sent, made.content = [], [], hdf5(tmp_path / "source.hdf5", rows()).read_bytes()
    known = Known(len(made.content), files.sha256(tmp_path / "source.hdf5"))
    monkeypatch.setattr(fetching, "FILES", {"hopper-medium-v2": known})
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


KNOWN, UNKNOWN = "d4rl/hopper-medium-v2", "d4rl/relocate-human-v1"  # whether size and sha256 are published


NAMES = {KNOWN: "hopper_medium-v2.hdf5", UNKNOWN: "relocate-human-v1.hdf5"}


def fetch(server: Server, out: Path, name: str = KNOWN, base: str = "base/", **options: Any) -> dict[str, Any]:
    return formats.fetch(name, out, mirror=f"http://127.0.0.1:{server.server_address[1]}/{base}", **options)


def refused(match: str, call: Callable[[], Any], hint: str = "--mirror") -> CvlctlError:
    with pytest.raises(CvlctlError, match=match) as caught:
        call()
    assert hint in caught.value.hint
    return caught.value


def test_what_is_known_of_d4rls_files_is_of_datasets_that_there_are() -> None:
    assert set(FILES) <= set(d4rl_infos.table()) and len(FILES) == 63
    assert all(re.fullmatch("[0-9a-f]{64}", known.sha256) and known.bytes > 10**6 for known in FILES.values())
    assert len({known.sha256 for known in FILES.values()}) == len(FILES)


def test_fetch_from_a_mirror_and_find_it_there(tmp_path: Path, server: Server) -> None:
    found = fetch(server, tmp_path / "d4rl")
    path = tmp_path / "d4rl" / NAMES[KNOWN]
    assert found == {
        "status": "fetched", "name": KNOWN, "path": str(path), "bytes": len(server.content), "checked": "published",
        "url": f"http://127.0.0.1:{server.server_address[1]}/base/gym_mujoco_v2/hopper_medium-v2.hdf5",
        "sha256": files.sha256(tmp_path / "source.hdf5"),
    }  # fmt: skip
    assert path.read_bytes() == server.content
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.json"]
    assert fetch(server, path)["status"] == "there already"
    assert server.sent == [len(server.content)]  # and that was the only request
    assert fetch(server, path, force=True)["status"] == "fetched" and len(server.asked) == 2
    assert fetch(server, tmp_path / "flat", base="files/{file}?download=true")["status"] == "fetched"
    assert server.asked[-1] == "/files/hopper_medium-v2.hdf5?download=true"
    with h5py.File(path, "a") as file:
        file["rewards"][0] = 9.0
    refused(r"its sha256 is .*, expected .* \(published\)", lambda: fetch(server, path), hint="--force")


def test_a_digest_that_nobody_published_is_kept_and_holds_from_then_on(tmp_path: Path, server: Server) -> None:
    found = fetch(server, tmp_path, UNKNOWN)
    assert found["checked"] == "nothing"
    told = exchange.fetched_in_words(found)
    assert found["sha256"] in told and f"{NAMES[UNKNOWN]}.json" in told
    assert json.loads((tmp_path / f"{NAMES[UNKNOWN]}.json").read_text())["sha256"] == found["sha256"]
    assert fetch(server, tmp_path, UNKNOWN)["checked"] == "recorded"
    assert fetch(server, tmp_path, UNKNOWN, sha256_is=found["sha256"].upper())["checked"] == "given"
    with h5py.File(tmp_path / NAMES[UNKNOWN], "a") as file:
        file["rewards"][0] = 9.0
    refused(r"expected .* \(recorded\)", lambda: fetch(server, tmp_path, UNKNOWN), hint="--force")
    refused("--sha256 00 is no sha256", lambda: fetch(server, tmp_path, UNKNOWN, sha256_is="00"), hint="64")


@pytest.mark.parametrize("name", [KNOWN, UNKNOWN])
def test_fetch_goes_on_where_it_was_cut_off(tmp_path: Path, server: Server, name: str) -> None:
    server.stop_after = 2050
    whole, part = len(server.content), tmp_path / f"{NAMES[name]}.part"
    error = refused(f"2,000 of {whole:,} bytes are here", lambda: fetch(server, tmp_path, name))
    assert "goes on where this one stopped" in error.hint
    assert part.read_bytes() == server.content[:2000] and not (tmp_path / NAMES[name]).exists()
    refused("4,000 of", lambda: fetch(server, tmp_path, name))
    server.stop_after = 10**9
    fetch(server, tmp_path, name)
    assert [line.partition(" ")[2] for line in server.asked] == ["", "bytes=2000-", "bytes=4000-"]
    assert server.sent[-1] == whole - 4000
    assert (tmp_path / NAMES[name]).read_bytes() == server.content
    assert sorted(p.name for p in tmp_path.glob(f"*{NAMES[name]}*")) == [NAMES[name], f"{NAMES[name]}.json"]


@pytest.mark.parametrize("name", [KNOWN, UNKNOWN])
def test_a_server_that_does_not_resume_sends_all_of_it_again(tmp_path: Path, server: Server, name: str) -> None:
    server.stop_after, server.ranges = 2050, False
    refused("2,000 of", lambda: fetch(server, tmp_path, name))
    server.stop_after = 10**9
    fetch(server, tmp_path, name)
    assert server.asked[-1].endswith("bytes=2000-") and server.sent[-1] == len(server.content)
    assert (tmp_path / NAMES[name]).read_bytes() == server.content


@pytest.mark.parametrize("tags", [True, False])
def test_two_versions_of_a_file_are_never_put_together(tmp_path: Path, server: Server, tags: bool) -> None:
    """Where no digest would tell, the server is asked whether it still has the file that was begun."""
    old, changed = server.content, {name: values * 0.5 for name, values in rows().items() if values.dtype != bool}
    new = hdf5(tmp_path / "other.hdf5", rows() | changed).read_bytes()
    differ = [i for i in range(len(old)) if old[i] != new[i]]
    server.stop_after, server.tags = differ[len(differ) // 2], tags
    refused("bytes are here", lambda: fetch(server, tmp_path, UNKNOWN))
    here = (tmp_path / f"{NAMES[UNKNOWN]}.part").stat().st_size
    assert old[:here] != new[:here] and old[here:] != new[here:]
    server.stop_after, server.etag, server.content = 10**9, '"two"', new
    if tags:
        fetch(server, tmp_path, UNKNOWN)
        assert (tmp_path / NAMES[UNKNOWN]).read_bytes() == server.content
    else:  # nothing to ask with: then the digest, if there is one, must tell
        digest = files.sha256(tmp_path / "other.hdf5")
        refused("its sha256 is|no whole HDF5", lambda: fetch(server, tmp_path, UNKNOWN, sha256_is=digest))
        assert fetch(server, tmp_path, UNKNOWN, sha256_is=digest)["checked"] == "given"


def test_what_came_whole_before_a_kill_is_not_asked_for_again(tmp_path: Path, server: Server) -> None:
    part = tmp_path / f"{NAMES[KNOWN]}.part"
    part.write_bytes(server.content)
    assert fetch(server, tmp_path)["status"] == "fetched" and server.asked == [] and not part.exists()
    part.write_bytes(server.content + b"more")  # longer than it can be: from the start
    assert fetch(server, tmp_path, force=True)["status"] == "fetched" and len(server.asked) == 1
    part = tmp_path / f"{NAMES[UNKNOWN]}.part"
    part.write_bytes(server.content)  # nobody knows its length: the server says that there is no more, so it is dropped
    refused("416", lambda: fetch(server, tmp_path, UNKNOWN))
    assert fetch(server, tmp_path, UNKNOWN)["status"] == "fetched"


def test_wrong_files_are_refused_and_the_one_that_was_there_stays(tmp_path: Path, server: Server) -> None:
    right, path = server.content, tmp_path / NAMES[KNOWN]
    fetch(server, path)
    server.content, before = right + b"x", len(server.sent)
    refused(
        f"has {len(right) + 1:,} bytes there, and should have {len(right):,}", lambda: fetch(server, path, force=True)
    )
    assert not list(tmp_path.glob("*.part*"))
    server.content = right[:-1] + b"x"  # right in size, and HDF5 does not look there
    error = refused("its sha256 is .*, expected", lambda: fetch(server, path, force=True))
    digest = re.findall("--sha256 ([0-9a-f]{64})", error.hint)[0]
    assert path.read_bytes() == right and not list(tmp_path.glob("*.part*")) and len(server.sent) > before
    assert fetch(server, path, force=True, sha256_is=digest)["checked"] == "given"
    server.content = b"<html>please log in</html>"
    refused("no whole HDF5 file", lambda: fetch(server, tmp_path, UNKNOWN))
    assert not list(tmp_path.glob(f"{NAMES[UNKNOWN]}*"))


def test_no_server_no_network_no_such_file(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(
        "no dataset 'd4rl/hoper-medium-v2'", lambda: formats.fetch("d4rl/hoper-medium-v2", tmp_path), hint=""
    )
    assert "hopper-medium-v2" in error.hint
    refused("the server says 404 Not Found", lambda: fetch(server, tmp_path, base="missing"))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
        refused("cannot be fetched: Connection refused", lambda: formats.fetch(KNOWN, tmp_path, mirror=nowhere))
    refused(
        "cannot be fetched: (Invalid URL|Failed to parse)", lambda: formats.fetch(KNOWN, tmp_path, mirror="no address")
    )
    refused("cannot be fetched: No connection adapters", lambda: formats.fetch(KNOWN, tmp_path, mirror="ftp://x"))

    def unknown_host(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown_host)
    assert execute(app.app, ["data", "fetch", KNOWN, "--out", str(tmp_path)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "hopper_medium-v2.hdf5 cannot be fetched: Name or service not known" in said
    assert "hint: check the network; " in said and "--mirror" in said
    assert [p.name for p in tmp_path.iterdir()] == ["source.hdf5"]


def test_a_server_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        mirror = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused("timed out", lambda: formats.fetch(KNOWN, tmp_path, mirror=mirror))
    assert list(tmp_path.iterdir()) == []


def test_fetch_tells_what_it_did(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "data",
        "fetch",
        KNOWN,
        "--out",
        str(tmp_path),
        "--mirror",
        f"http://127.0.0.1:{server.server_address[1]}",
    ]
    assert execute(app.app, command) == 0
    digest = files.sha256(tmp_path / "source.hdf5")
    told = capsys.readouterr().out
    assert told.startswith(f"fetched: {tmp_path / NAMES[KNOWN]}") and f"sha256 {digest}: as published" in told
    assert execute(app.app, [*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "there already"
