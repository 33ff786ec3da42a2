"""The targets that run compiled models: one module or folder each; `base` has the interface."""

TARGETS = ("cpu", "cuda", "rbln", "reference")
"""The names of all targets. Each is a module here, whose `TARGET` it is."""
