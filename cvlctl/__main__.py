"""The program `cvlctl`, and `python -m cvlctl`: from here on a signal is an exit code, whatever is being imported."""

from __future__ import annotations


def main() -> None:
    """The console script."""
    import sys

    try:
        from cvlctl import interrupts, streams

        streams.secure()
        with interrupts.watched(program=True):
            from cvlctl.cli.app import app
            from cvlctl.cli.console import execute

            code = execute(app, sys.argv[1:])
            interrupts.release()
    except KeyboardInterrupt:  # before there was a command, or again while the first was told of
        from cvlctl import interrupts, streams

        interrupts.release()
        streams.tell("error: interrupted")
        code = 130
    streams.let_go(sys.stdout)
    sys.exit(code)


if __name__ == "__main__":
    main()
