"""Where a graph can run: one folder or module a target, all of the shape in `base`."""
