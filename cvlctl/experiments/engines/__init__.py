"""Where cells run: engines, each of which starts the same commands on the same recipe files."""
