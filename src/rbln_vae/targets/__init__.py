"""The targets that run compiled models: one module or folder each; `base` has the interface."""
