"""What pipelines and users read on a `torch.nn.Module`, for a model whose weights are compiled in.

A compiled model is no `torch.nn.Module`: pipelines that move, offload or walk their modules
leave it alone, as they must. What they do read is here. What can't work raises an error
that says so; that is an `AttributeError` where there is no such member, so that code that
asks with `hasattr` gets the right answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import RBLNRuntimeError

Self = TypeVar("Self", bound="ModuleMembers")

_NO_WEIGHTS = (
    "its weights are compiled in. Change those of the original model, then compile it again"
)
_NO_ADAPTERS = (
    "adapters can't be added to compiled weights. Load and fuse them into the original model, then "
    "compile it again"
)
_NO_PROCESSORS = (
    "its attention is compiled in, and all processors of diffusers compute the same. Leave it out"
)

_MISSING = {
    **dict.fromkeys(("load_state_dict", "state_dict", "register_buffer", "apply"), _NO_WEIGHTS),
    **dict.fromkeys(
        (
            "add_adapter",
            "delete_adapters",
            "disable_adapters",
            "disable_lora",
            "enable_adapters",
            "enable_lora",
            "fuse_lora",
            "load_lora_adapter",
            "save_lora_adapter",
            "set_adapter",
            "set_adapters",
            "unfuse_lora",
            "unload_lora",
        ),
        _NO_ADAPTERS,
    ),
    **dict.fromkeys(
        (
            "attn_processors",
            "enable_xformers_memory_efficient_attention",
            "fuse_qkv_projections",
            "set_attention_backend",
            "set_attn_processor",
            "set_default_attn_processor",
            "unfuse_qkv_projections",
        ),
        _NO_PROCESSORS,
    ),
    "enable_gradient_checkpointing": "it can't be trained. Train the original model",
    "backward": "it can't be trained. Train the original model",
}
"""Members of the original that a compiled model can't have, and why."""


class ModuleMembers(ABC):
    """The members of a `torch.nn.Module` that make sense on a compiled model."""

    training = False
    """A compiled model is always in evaluation mode."""

    _modules: Mapping[str, torch.nn.Module] = MappingProxyType({})
    """None: accelerate looks here for modules that `torch.compile` made."""

    _dtype = torch.float32
    _config: Mapping[str, Any] = MappingProxyType({})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that pipelines convert to what they send to the model, and some its results.

        By default float32, in which inputs are taken without loss, whatever is stored in. `to`
        names another one, for pipelines that need that of their denoiser; what the model computes
        in stays the same.
        """
        return self._dtype

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where results that follow no input are made."""

    @abstractmethod
    def _devices(self) -> list[int | str]:
        """The devices that the parts run on, as options name them."""

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Check that the model runs on the device that is named, and take a dtype as its `dtype`.

        The model still computes in what it was compiled for, and its results have the dtype of
        what came in.

        Args:
            *args: As those of `torch.nn.Module.to`: a device, a dtype, both, or a tensor.
            **kwargs: `device`, `dtype`, `non_blocking`, `memory_format`.

        Returns:
            The model itself.

        Raises:
            RBLNRuntimeError: The device is none on which the model was compiled to run.
            TypeError: The dtype isn't a floating one.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        own = [d for d in self._devices() if isinstance(d, str)]
        if device is not None and not any(_same(device, d) for d in ("cpu", *own)):
            where = " and ".join(f"NPU {d}" if isinstance(d, int) else d for d in self._devices())
            raise RBLNRuntimeError(
                f"This model runs on {where}, and can't be moved to {device}. Load it with "
                "rbln_device, or compile the original for the target of that device. Tensors may "
                "be on any device: results go where the input was."
            )
        if dtype is not None:
            if not dtype.is_floating_point:
                raise TypeError(f"The dtype is {dtype}, expected a floating one.")
            self._dtype = dtype
        return self

    def cpu(self: Self) -> Self:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self: Self, device: int | None = None) -> Self:
        """`to("cuda")`."""
        return self.to("cuda" if device is None else f"cuda:{device}")

    def float(self: Self) -> Self:
        """`to(torch.float32)`."""
        return self.to(torch.float32)

    def half(self: Self) -> Self:
        """`to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self: Self) -> Self:
        """`to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def eval(self: Self) -> Self:
        """Do nothing: a compiled model is always in evaluation mode."""
        return self

    def train(self: Self, mode: bool = True) -> Self:
        """Do nothing for `False`.

        Raises:
            RBLNRuntimeError: The mode is training.
        """
        if mode:
            raise RBLNRuntimeError(
                "A compiled model can't be trained. Train the original model, then compile it."
            )
        return self

    def requires_grad_(self: Self, requires_grad: bool = True) -> Self:
        """Do nothing for `False`.

        Raises:
            RBLNRuntimeError: Gradients are asked for.
        """
        if requires_grad:
            raise RBLNRuntimeError(
                "A compiled model gives no gradients. Use the original model where they are needed."
            )
        return self

    def modules(self) -> Iterator[torch.nn.Module]:
        """None: a compiled model has no modules."""
        return iter(())

    def parameters(self, recurse: bool = True) -> Iterator[Tensor]:
        """One tensor with no elements, by which code finds the dtype and the device."""
        yield torch.empty(0, dtype=self.dtype, device=self.device)

    def __copy__(self: Self) -> Self:
        copied = object.__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        # At once: with the picklers of torch.multiprocessing, the attempt alone moves the weights
        # into shared memory, and the engine would read where they were.
        raise TypeError(
            "A compiled model can't be pickled. Save it with save_pretrained, and call "
            "from_pretrained in the other process: processes that load one directory share the "
            "memory of its weights."
        )

    def __getattr__(self, name: str) -> Any:
        if name in self._config:  # as diffusers allows still, with a warning
            return self._config[name]
        reason = _MISSING.get(name)
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(f"{message}: {reason}." if reason else message)


def _same(device: torch.device, name: str) -> bool:
    """Whether both are one device; where one gives no index, that is the first."""
    other = torch.device(name)
    return (device.type, device.index or 0) == (other.type, other.index or 0)
