"""The target `cuda`: NVIDIA GPUs, by PyTorch's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .torch import TorchTarget


class CudaTarget(TorchTarget):
    """NVIDIA GPUs."""

    name = "cuda"
    description = "an NVIDIA GPU, by PyTorch's kernels"

    def unavailable_reason(self) -> str | None:
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA. Install a CUDA build of torch "
                "(https://pytorch.org/get-started), or use target='cpu'."
            )
        if not torch.cuda.is_available():
            return (
                "torch finds no NVIDIA GPU. Install NVIDIA's driver and check that nvidia-smi "
                "lists a GPU, or use target='cpu'."
            )
        return None

    def default_device(self) -> int | str:
        return "cuda"

    def usable_memory(self, device: int | str) -> int:
        """The bytes of the GPU's memory."""
        self.require()
        return int(torch.cuda.get_device_properties(device).total_memory)

    def free_memory(self, device: int | str) -> Callable[[], int]:
        def free() -> int:
            unused, _ = torch.cuda.mem_get_info(device)
            # Torch keeps what it has freed, and gives it to the next run.
            kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return int(unused + kept)

        return free

    def best_dtype(self) -> str:
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"


TARGET = CudaTarget()
