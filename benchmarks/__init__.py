"""Benchmarks of learning and speed; each is a command that prints a table."""
