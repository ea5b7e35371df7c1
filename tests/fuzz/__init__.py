"""Fuzzing: damaged files, hostile requests and interrupted work, in random variants that a seed repeats."""
