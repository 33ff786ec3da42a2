"""Benchmarks: every contender in a process of its own, in turn, on the same inputs."""
