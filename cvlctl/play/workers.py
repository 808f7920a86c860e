"""A pool of worker processes for pure functions of JSON.

Workers are plain interpreters that speak JSON lines. Unlike multiprocessing's they never import the caller's main
module, so they start fast, work from any script, and hold no torch. They live in a process group of their own (Ctrl-C
reaches the parent alone, which ends them), and end with their standard input, so also where the parent was killed.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Generator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from cvlctl.errors import CvlctlError

_COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from cvlctl.play.workers import serve; serve(sys.argv[2])"
)


def share_out(function: str, requests: Sequence[Any], workers: int) -> Generator[tuple[int, Any], None, None]:
    """Ask `workers` processes for function(request) of every request; yields (index of the request, answer), as ready.

    Args:
        function: "module:name", of one JSON value, returning one.
        requests: JSON values, begun in this order.

    Raises:
        CvlctlError: as a worker raised it, or where a worker died.
        RuntimeError: any other failure in a worker, with its traceback.
    """
    pending: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    for number, request in enumerate(requests):
        pending.put((number, json.dumps(request) + "\n"))
    done: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()

    def drive(process: subprocess.Popen[str]) -> None:
        assert process.stdin and process.stdout
        answer = "\n"
        while answer.endswith("\n"):  # a line cut short: the worker died
            try:
                index, question = pending.get_nowait()
            except queue.Empty:
                return
            try:
                process.stdin.write(question)
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            done.put((index, answer))

    # one thread each: the parallelism is between processes, and their libraries' threads would only fight for the CPUs
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    command = [sys.executable, "-c", _COMMAND, json.dumps(sys.path), function]
    processes: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(min(workers, len(requests))):
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, env=environment, process_group=0, **pipes))
            threads.append(threading.Thread(target=drive, args=(processes[-1],), daemon=True))
            threads[-1].start()
        for _ in requests:
            index, line = done.get()
            if not line.endswith("\n"):
                raise CvlctlError("a worker process died", "memory may be short: use fewer workers")
            answer = json.loads(line)
            if "error" in answer:
                raise CvlctlError(*answer["error"])
            if "crash" in answer:
                raise RuntimeError(f"a worker process failed:\n{answer['crash']}")
            yield index, answer["value"]
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for thread in threads:  # their reads end with the processes
            thread.join()
        for process in processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # a request that its worker never read
                    pipe.close()  # type: ignore[union-attr]


def serve(function: str) -> None:
    """A worker's life: requests on standard input, one answer a line on what was standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    module, name = function.split(":")
    call = getattr(import_module(module), name)
    for line in sys.stdin:
        try:
            answer = json.dumps({"value": call(json.loads(line))})
        except CvlctlError as error:
            answer = json.dumps({"error": [error.what, error.hint]})
        except Exception:
            answer = json.dumps({"crash": traceback.format_exc()})
        try:
            answers.write(answer + "\n")
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent was killed; without a word, for its shell's sake
