"""What runs in which order on which rows, and in what memory; nothing here knows a target.

From a graph, the shape of its input and a limit to a `Schedule`, by asking a target's `Rules`.
"""
