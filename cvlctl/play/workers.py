"""A pool of worker processes for pure functions of JSON.

Workers are plain interpreters that speak JSON lines. Unlike multiprocessing's they never import the caller's main
module, so they start fast, work from any script, and hold no torch. They end with the call, and with this process
however it ends.
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
from importlib import import_module
from typing import Any

from cvlctl import children, interrupts
from cvlctl.errors import CvlctlError

COMMAND = "from cvlctl.play import workers; workers.serve(sys.argv[2])"


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

    processes: list[subprocess.Popen[str]] = []
    threads: list[threading.Thread] = []
    try:
        for _ in range(min(workers, len(requests))):
            processes.append(children.begin(COMMAND, function, stdout=subprocess.PIPE))
            threads.append(threading.Thread(target=drive, args=(processes[-1],), daemon=True))
            threads[-1].start()
        for _ in requests:
            index, line = done.get()
            interrupts.check()
            yield index, value_of(line)
    finally:
        children.end(processes)
        for thread in threads:  # their reads end with the processes
            thread.join()
        children.close(processes)


def value_of(line: str) -> Any:
    """What a worker answered.

    Raises:
        CvlctlError: as the worker raised it, or where the line is cut short: the worker died.
        RuntimeError: any other failure in the worker, with its traceback.
    """
    if not line.endswith("\n"):
        raise CvlctlError("a worker process died", "memory may be short: use fewer workers")
    answer = json.loads(line)
    if "error" in answer:
        raise CvlctlError(*answer["error"])
    if "crash" in answer:
        raise RuntimeError(f"a worker process failed:\n{answer['crash']}")
    return answer["value"]


def serve(function: str) -> None:
    """A worker's life: requests on standard input, one answer a line on what was standard output."""
    answers = children.take_stdout()
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
