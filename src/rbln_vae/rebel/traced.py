"""Modules that are compiled in a `CompileContext`: traced whole, and run by PyTorch on the CPU.

Graphs of this package map one image to one image; these modules have several inputs and results,
and memory that lasts from run to run.
"""

from __future__ import annotations

import io
import itertools
import json
import warnings
import weakref
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import RBLNArtifactError
from ..files import atomic_path
from ..graph.capture import export
from .compile_context import CompileContext

_ABOUT = "rebel.json"
"""The file in the archive of `torch.export` that says what is static."""


@torch.library.custom_op(
    "rbln_custom_ops::rbln_cache_update",
    mutates_args=("cache",),
    schema="(Tensor(a!) cache, Tensor state, Tensor position, Tensor axis) -> Tensor",
)
def _update_cache(cache: Tensor, state: Tensor, position: Tensor, axis: Tensor) -> Tensor:
    """Write a state into a cache along an axis, from a position on; the result is empty."""
    along = int(axis)
    rows = cache.narrow(along, int(position), state.shape[along])
    if rows.shape != state.shape:
        raise _does_not_fit(cache, state)
    rows.copy_(state)
    return cache.new_empty(0)


@_update_cache.register_fake
def _(cache: Tensor, state: Tensor, position: Tensor, axis: Tensor) -> Tensor:
    smaller = [have != need for have, need in zip(cache.shape, state.shape, strict=False)]
    if cache.ndim != state.ndim or sum(smaller) > 1:
        raise _does_not_fit(cache, state)
    return cache.new_empty(0)


def _does_not_fit(cache: Tensor, state: Tensor) -> ValueError:
    return ValueError(
        f"rbln_cache_update can't write a state of shape {tuple(state.shape)} into a cache of "
        f"shape {tuple(cache.shape)}: they may differ along the axis of the update alone"
    )


class Trace:
    """A module with several inputs, some of which are static memory of its context.

    Attributes:
        name: The class of the module.
        inputs: The shape and dtype of all inputs, in order.
        given: Which of them a run is given: those that are read and not static.
    """

    def __init__(self, path: Path) -> None:
        """Read what `save` wrote, from where one trusts: such a file can hold code."""
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch reads without looking at checksums
            if damaged is not None:
                raise ValueError(f"the checksum of {damaged} is wrong")
            self._read(io.BytesIO(path.read_bytes()))
        except Exception as error:  # what torch raises depends on where the damage is
            raise RBLNArtifactError(
                f"{path} is damaged, or was not compiled through rbln_vae.rebel: {error}. Compile "
                "the model again."
            ) from error

    @classmethod
    def of(cls, module: nn.Module, examples: Sequence[Tensor], context: CompileContext) -> Trace:
        """Trace a module for the shapes and dtypes of example inputs.

        Raises:
            RBLNCompileError: PyTorch can't trace it.
        """
        static = {i: context.number(example) for i, example in enumerate(examples)}
        with warnings.catch_warnings():
            # Modules note their caches in attributes, of which nothing reads the traced ones.
            warnings.filterwarnings("ignore", "The tensor attributes")
            program = export(module, tuple(examples))
        program.example_inputs = None
        about = {
            "name": type(module).__name__,
            "context": context.key,
            "member": context.compiled,
            "static": [[i, number] for i, number in static.items() if number is not None],
        }
        context.compiled += 1
        file = io.BytesIO()
        torch.export.save(program, file, extra_files={_ABOUT: json.dumps(about)})
        trace = cls.__new__(cls)
        trace._read(file)  # its own weights, as of a model on a device
        return trace

    def _read(self, file: io.BytesIO) -> None:
        file.seek(0)
        extra = {_ABOUT: ""}
        self.program = torch.export.load(file, extra_files=extra)
        self._about = extra[_ABOUT]
        about = json.loads(self._about)
        self.name: str = about["name"]
        self.context: str = about["context"]
        self.member: int = about["member"]
        self.static: dict[int, int] = dict(about["static"])
        names = self.program.graph_signature.user_inputs
        nodes = {node.name: node for node in self.program.graph.nodes}
        read = [nodes[str(name)] for name in names]
        self.inputs = [(tuple(n.meta["val"].shape), n.meta["val"].dtype) for n in read]
        self.given = [i for i, node in enumerate(read) if node.users and i not in self.static]

    def save(self, path: Path) -> None:
        """Write it to a file, atomically."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.export.save(self.program, file, extra_files={_ABOUT: self._about})


class _Memory:
    """The static memory of one context, as the runtimes of its members share it."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self.members: set[int] = set()


_memories: weakref.WeakValueDictionary[tuple[str, tuple[int, ...], int], _Memory] = (
    weakref.WeakValueDictionary()
)
_numbers = itertools.count()


def _memory_of(trace: Trace, devices: tuple[int, ...]) -> _Memory:
    """The first memory of the context on the devices that has no runtime of this member yet.

    So a model that is loaded twice has two memories.
    """
    for (context, where, _), memory in list(_memories.items()):
        if (context, where) == (trace.context, devices) and trace.member not in memory.members:
            break
    else:
        memory = _Memory()
        _memories[trace.context, devices, next(_numbers)] = memory
    memory.members.add(trace.member)
    for i, number in trace.static.items():
        shape, dtype = trace.inputs[i]
        memory.tensors.setdefault(number, torch.zeros(shape, dtype=dtype))
    return memory


class TraceRuntime:
    """A `Trace` on its devices. Runs on one memory must not overlap."""

    def __init__(self, trace: Trace, devices: Sequence[int]) -> None:
        self._trace = trace
        self._module = trace.program.module()
        self._memory = _memory_of(trace, tuple(devices))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run on the tensors that are given, of the traced shapes and dtypes."""
        # An input that nothing reads takes no memory.
        inputs = [torch.zeros((), dtype=dtype).expand(s) for s, dtype in self._trace.inputs]
        for i, number in self._trace.static.items():
            inputs[i] = self._memory.tensors[number]
        for i, tensor in zip(self._trace.given, tensors, strict=True):
            inputs[i] = tensor.contiguous()  # as the example was
        with torch.no_grad():
            results = tree_leaves(self._module(*inputs))
        lasting = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        return [r.clone() if r.untyped_storage().data_ptr() in lasting else r for r in results]
