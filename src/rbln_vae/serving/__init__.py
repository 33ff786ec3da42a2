"""The HTTP service, which diffusers' remote client speaks to.

A request passes through three modules that know nothing of each other: `protocol` turns
bytes and a query into a tensor, `batcher` has a model run it when there is memory and
time for it, and `protocol` turns the result into bytes. `app` ties them to HTTP.
"""
