"""Decides which task runs when, on which rows, and in which memory, for any target.

A target's `Rules` answer the questions that turn a graph, an input shape and a memory limit
into a `Schedule`.
"""
