"""`rebel.compile_context`: what several compiled modules keep in common on a device."""

from __future__ import annotations

import uuid

from torch import Tensor

__all__ = ["CompileContext"]


class CompileContext:
    """Modules that are compiled in one context share the tensors that are marked static.

    On a device, a static tensor is memory that begins as zeros and lasts from run to run. A run is
    not given it: `torch.ops.rbln_custom_ops.rbln_cache_update` writes it, and any module of the
    context reads it.

    Args:
        use_weight_sharing: Whether the modules share their weights on the device; has no effect
            here.

    Example:
        >>> context = CompileContext(use_weight_sharing=True)
        >>> context.mark_static_address(torch.zeros(1, 4, 2, 64), "cache")
    """

    def __init__(self, use_weight_sharing: bool = False) -> None:
        self.key = uuid.uuid4().hex
        self.compiled = 0
        self._static: list[Tensor] = []

    def mark_static_address(self, tensor: Tensor, name: str | None = None) -> None:
        """Say that an example input stands for static memory.

        Args:
            tensor: Given to `compile_from_torch` in `example_inputs`, of one or more modules.
            name: What to call it; has no effect here.
        """
        if self.number(tensor) is None:
            self._static.append(tensor)

    def number(self, tensor: Tensor) -> int | None:
        """Which static tensor it is; `None` if it isn't marked."""
        return next((i for i, static in enumerate(self._static) if static is tensor), None)
