"""One warm process and one set of inputs for all tests of reliability, and what they tried, in a line at the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from reliability import driver


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[driver.Runner]:
    made = driver.Runner(tmp_path_factory.mktemp("inputs"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def inputs(runner: driver.Runner) -> Path:
    return runner.inputs


@pytest.fixture(scope="session")
def mirror(inputs: Path) -> Iterator[str]:
    """Address of a server that has `a.hdf5` under every name."""
    content = (inputs / "a.hdf5").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start:])

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/{{file}}"
    server.shutdown()
    thread.join()
    server.server_close()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist: this is one of several processes
        session.config.workeroutput["reliability"] = driver.COUNTS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for what, counted in getattr(node, "workeroutput", {}).get("reliability", {}).items():
        driver.count(what, *counted)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for what, (tried, failed) in driver.COUNTS.items():
        terminalreporter.write_line(f"reliability: {what}: {tried:,} tried, {failed:,} failed")
