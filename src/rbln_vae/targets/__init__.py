"""Where a graph can run: one folder or module a target, all of the shape in `base`."""

TARGETS = ("cpu", "cuda", "rbln", "reference")
"""The names of all targets; each is the module of that name here, which has its `TARGET`."""
