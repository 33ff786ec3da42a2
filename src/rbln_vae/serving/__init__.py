"""The HTTP service for diffusers' remote client.

A request passes through modules that are independent of each other: `protocol` turns a query
and bytes into a tensor, `batcher` runs it when there is time and memory, and `protocol` turns
the result into bytes. `app` connects them to HTTP.
"""
