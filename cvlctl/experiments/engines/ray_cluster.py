"""Ray, joined where a cluster runs or started on this machine; left or ended at last."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from cvlctl.errors import CvlctlError
from cvlctl.machine import num_cpus

CONNECT_SECONDS = 5.0
OBJECT_BYTES = 100 * 2**20  # for what tasks return, which is small
# its own settings, unless the user has others: no reports of its use, cells as fast as this command, and no GPU hidden
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@contextmanager
def joined(address: str | None) -> Iterator[Any]:
    """Ray, joined or started; left or ended at last.

    Raises:
        CvlctlError: it is not installed, does not start, or nobody answers at the address.
    """
    if find_spec("ray") is None:
        raise CvlctlError("engine: ray needs the package ray", "pip install 'cvlctl[ray]', or say engine: local")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    _check_answers(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or "")
    import ray

    if address == "auto":
        _check_answers(_last_cluster())
    try:
        with _signals_kept():
            _begin(ray, address)
        yield ray
    finally:
        ray.shutdown()


def _begin(ray: Any, address: str | None) -> None:
    of_its_own = {"num_cpus": num_cpus(), "include_dashboard": False, "object_store_memory": OBJECT_BYTES}
    more = {} if address else of_its_own  # it would count all CPUs of the machine, whatever this process may use
    try:
        ray.init(address or "local", log_to_driver=False, logging_level="CRITICAL", **more)
    except SystemExit:  # by the handler of SIGTERM that it sets
        raise KeyboardInterrupt from None
    except Exception as error:
        if address is None:
            raise CvlctlError(f"Ray does not start: {first_line(error)}", "engine: local needs none") from error
        hint = "run this on one of its nodes, with its Ray and Python; RAY_AUTH_MODE=token where it wants ray's token"
        raise CvlctlError(f"cannot join the Ray cluster at {address}: {first_line(error)}", hint) from error


def _check_answers(address: str) -> None:
    """That somebody does at HOST:PORT, if it is one: Ray would try for minutes.

    Raises:
        CvlctlError: nobody does.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            what = f"no Ray cluster answers at {address}: {error}"
            raise CvlctlError(what, "ray start --head starts one, and prints its address") from error


def _last_cluster() -> str:
    """Where Ray would look for a cluster; "" where it cannot be told. One that was killed leaves its address."""
    from ray._private import services

    try:
        return str(services.canonicalize_bootstrap_address("auto") or "")
    except Exception:  # not a function that Ray promises; and with no address at all, joining says so
        return ""


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray handles signals in its own way from its start on; here they stay as they are."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if main:
                signal.signal(number, handler)


def first_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
