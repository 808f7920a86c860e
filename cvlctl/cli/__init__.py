"""What people and programs see: parse, call, render. `app` is the command line, `console` errors and exit codes."""
