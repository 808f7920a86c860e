"""Stores of episodes: the format, what training reads of them, what is derived from them, other formats."""
