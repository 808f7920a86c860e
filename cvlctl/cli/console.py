"""What people and programs see of a command: results on stdout, progress and errors on stderr, exit codes.

Exit code 0: done; 1: `data verify` or `doctor --parity` found faults; 2: something a user can mend; 70: a bug; 75: a
cell of an experiment that another process is at; 130: interrupted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cvlctl import cell, interrupts, streams, terminal
from cvlctl.errors import Busy, CvlctlError
from cvlctl.files import HINTS, SHORTAGES

if TYPE_CHECKING:
    from rich.console import Console

MEMORY = ("out of memory", "lower batch_size, hidden, bank_size or the number of seeds")
INTERRUPTED = ("interrupted", "run the same command again", 130)  # what goes on from where, the command has said


def present(work: Callable[[], Any], show: Callable[[Any], None], as_json: bool, quiet: bool = False) -> Any:
    """Call `work`, with whatever it prints on stderr (`quiet`: nowhere), then show its result, or print it as JSON."""
    with contextlib.ExitStack() as stack:
        if quiet:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(streams.aside())
        result = work()
        interrupts.check()
    if as_json:
        print(_as_json(result))
    else:
        show(result)
    return result


def _as_json(result: Any) -> str:
    try:
        try:
            return json.dumps(result, indent=1, default=str, allow_nan=False)
        except ValueError:  # what a run that diverged has logged is NaN, which is no JSON: null
            plain = json.loads(json.dumps(result, default=str), parse_constant=lambda _: None)
            return json.dumps(plain, indent=1)
    except RecursionError as error:  # provenance is whatever its writers made of it
        raise CvlctlError("the result is nested too deep to be printed as JSON", "leave --json out") from error


def console() -> Console:
    """For results, on stdout."""
    made = terminal.console(highlight=False)
    # into a file or a pipe, tables must not be squeezed to the 80 columns of a terminal that is not there
    width = shutil.get_terminal_size((110, 24)).columns
    return made if made.is_terminal else terminal.console(highlight=False, width=width)


def execute(app: Callable[..., Any], args: Sequence[str]) -> int:
    """Run a Typer app; every error that a user can mend becomes two lines on stderr. Returns the exit code."""
    code = _executed(app, args)
    cell.end(code)
    return code


def _executed(app: Callable[..., Any], args: Sequence[str]) -> int:
    try:
        cell.begin()
        code = app(args=list(args) or ["--help"], prog_name="cvlctl", standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # what Typer makes of Ctrl-C
            return _fail(args, *INTERRUPTED)
        return code if isinstance(code, int) else 0
    except CvlctlError as error:
        return _fail(args, error.what, error.hint, cell.HELD if isinstance(error, Busy) and cell.is_one() else 2)
    except KeyboardInterrupt:
        return _fail(args, *INTERRUPTED)
    except BrokenPipeError:
        streams.let_go(sys.stdout)
        return 1
    except Exception as error:
        fault = _of_the_system(error)
        if fault is not None:
            place = f"{fault.filename}: " if fault.filename else ""
            return _fail(args, f"{place}{fault.strerror}", HINTS[fault.errno or 0])
        # usage errors of Typer's: of which class they are depends on its version
        if type(error).__name__ == "Abort":
            return _fail(args, *INTERRUPTED)
        if _is_memory(error):
            return _fail(args, *MEMORY)
        if not hasattr(error, "format_message"):
            return _bug(args, error)
        if type(error).__name__ == "NoArgsIsHelpError":
            return 2  # `cvlctl data`: Typer has printed the help by now
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "cvlctl"
        words = error.format_message().replace("Value error, ", "")  # pydantic's, which Typer reads values with
        return _fail(args, words, f"see {path} --help")


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the operating system refused; also where an error in between (of an import, a library) hides a shortage."""
    hidden = False
    while error is not None:
        if isinstance(error, OSError) and error.errno in (SHORTAGES if hidden else HINTS):
            return error
        error, hidden = error.__cause__ or error.__context__, True
    return None


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out: NumPy's MemoryError, the RuntimeErrors that PyTorch makes of it on CPU and GPU, or what
    the system says of a library or a process that it has no room for."""
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "storage size calculation overflowed")
    told = isinstance(error, RuntimeError | ImportError | OSError) and any(word in str(error).lower() for word in words)
    return told or isinstance(error, MemoryError)


def _bug(args: Sequence[str], error: Exception) -> int:
    """What nobody foresaw: the traceback on stderr, and for programs one JSON document all the same."""
    print(terminal.visible("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    what = f"internal error: {type(error).__name__}: {error}"
    return _fail(args, what, "please report this, with the traceback on stderr", 70)


def _fail(args: Sequence[str], what: str, hint: str, code: int = 2) -> int:
    cell.failed(what, hint)
    as_json = "--json" in args or "--format=json" in args or ("--format", "json") in itertools.pairwise(args)
    with contextlib.suppress(OSError):  # nobody is there to be told: the exit code is
        if as_json:
            print(json.dumps({"error": what, "hint": hint}), flush=True)
        else:
            from rich.text import Text

            stderr = terminal.console(stderr=True, highlight=False, soft_wrap=True)
            for title, text in (("error: ", what), ("hint: ", hint)):
                if text:
                    stderr.print(Text.assemble((title, "bold red" if title == "error: " else "bold"), text))
    return code
