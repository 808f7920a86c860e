"""`python -m cvlctl`."""

from cvlctl.cli.app import main

main()
