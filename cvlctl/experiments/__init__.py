"""Stages of the four commands, multiplied by a matrix: the table of commands, the plan, and its execution."""
