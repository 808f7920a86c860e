"""`python -m cvlctl`."""

from cvlctl.cli import main

main()
