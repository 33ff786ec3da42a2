"""The target `reference`: PyTorch's kernels on the CPU."""

from __future__ import annotations

from .torch import TorchTarget


class ReferenceTarget(TorchTarget):
    """This machine's processor, by PyTorch's kernels."""

    name = "reference"
    description = "this machine's processor, by PyTorch's kernels, to compare others with"
    exact_batches = True  # the images of a batch run one by one

    def unavailable_reason(self) -> str | None:
        return None

    def default_device(self) -> int | str:
        return "cpu"

    def best_dtype(self) -> str:
        return "float32"


TARGET = ReferenceTarget()
