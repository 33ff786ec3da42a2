"""The compiler's front half: the graph, its capture, the passes and the interpreter."""
