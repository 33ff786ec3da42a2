"""A stand-in for `rebel`, Rebellions' compiler, for machines without it and without an NPU.

It has everything that optimum-rbln 0.12 uses for an `AutoencoderKL`, a `VQModel` or an
`AutoencoderKLWan`, so that code for the NPU can be developed and tested anywhere:

    python -m rbln_vae.rebel script.py

or, before optimum-rbln is imported,

    import rbln_vae.rebel
    rbln_vae.rebel.install()

As on the NPU, a compiled model takes only the shapes and dtypes that it was compiled for. Files
of the stand-in can't be read by Rebellions' compiler, nor the reverse.

Modules that map an image to an image run on the targets of this package. Those that are compiled
in a `CompileContext`, as Wan's are, are traced by `torch.export` and run by PyTorch on the CPU.
"""

from __future__ import annotations

import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact, read_artifact
from ..errors import RBLNArtifactError, RBLNCompileError, RBLNRuntimeError
from ..profiler import RunProfile
from ..targets import base as targets
from ..targets.base import CompileOptions, GraphTarget, RuntimeOptions, get_target
from . import compile_context
from .compile_context import CompileContext

if TYPE_CHECKING:
    from .traced import Trace

__all__ = [
    "CompileContext",
    "RBLNCompiledModel",
    "Runtime",
    "compile",
    "compile_from_torch",
    "device_count",
    "get_npu_name",
    "install",
    "npu_is_available",
]

InputInfo = Sequence[tuple[str, Sequence[int], str]]

_DTYPES = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16"}
"""The dtype of the computation for each dtype of the input."""


@dataclass
class _Machine:
    """The simulated machine."""

    npu: str = "RBLN-CA22"
    devices: int = 1
    target: str = "cpu"
    trust_files: bool = False


_machine = _Machine()


def install(
    npu: str = "RBLN-CA22", devices: int = 1, target: str = "cpu", *, trust_files: bool = False
) -> None:
    """Make `import rebel` import this module, in this process.

    Args:
        npu: The name of the simulated NPU, by default `"RBLN-CA22"`.
        devices: The number of NPUs, by default 1; with 0 the machine can only compile.
        target: The target that runs the models, by default `"cpu"`.
        trust_files: Whether files of modules that were compiled in a `CompileContext` are read.
            They are archives of `torch.export`, which can hold code. By default they are
            refused.

    Raises:
        RuntimeError: Another module `rebel` is already imported.
        ValueError: There is no such target, or it is `"rbln"`.

    Example:
        >>> import rbln_vae.rebel
        >>> rbln_vae.rebel.install()
        >>> import rebel
        >>> rebel.get_npu_name()
        'RBLN-CA22'
    """
    this = sys.modules[__name__]
    if sys.modules.get("rebel", this) is not this:
        raise RuntimeError(
            "Another module rebel is imported already. Call install() before anything imports it."
        )
    if not isinstance(get_target(target), GraphTarget):
        raise ValueError(f"target={target!r} can't simulate itself. Name another, such as 'cpu'.")
    _machine.npu, _machine.devices, _machine.target = npu, devices, target
    _machine.trust_files = trust_files
    sys.modules["rebel"] = this
    sys.modules["rebel.compile_context"] = compile_context


def device_count() -> int:
    """The number of NPUs."""
    return _machine.devices


def get_npu_name(device_id: int = 0) -> str | None:
    """The name of the NPU with a number, or `None` if there is none."""
    return _machine.npu if 0 <= device_id < _machine.devices else None


def npu_is_available(device_id: int = 0) -> bool:
    """Whether there is an NPU with that number."""
    return get_npu_name(device_id) is not None


class RBLNCompiledModel:
    """One part of a model, compiled for the shapes and dtypes of its inputs.

    Args:
        path: A file that `save` wrote.

    Raises:
        RBLNArtifactError: The file is missing, damaged, or written by another compiler; or it
            can hold code, and `install` was not told to trust files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if zipfile.is_zipfile(path):
            if not _machine.trust_files:
                raise RBLNArtifactError(
                    f"{path} is an archive of torch.export, which can hold code, so it isn't read. "
                    "If you trust where it is from, call rbln_vae.rebel.install(trust_files=True) "
                    "first, or run python -m rbln_vae.rebel --trust-files SCRIPT."
                )
            from .traced import Trace

            self._set(Trace(Path(path)))
        else:
            self._set(read_artifact(Path(path)))

    @classmethod
    def _of(cls, artifact: Artifact | Trace) -> RBLNCompiledModel:
        model = cls.__new__(cls)
        model._set(artifact)
        return model

    def _set(self, artifact: Artifact | Trace) -> None:
        self.artifact = artifact
        self.inputs: list[tuple[tuple[int, ...], torch.dtype]]
        """The shape and dtype of each input of a run."""
        if not isinstance(artifact, Artifact):
            self.name = artifact.name
            self.inputs = [artifact.inputs[i] for i in artifact.given]
            return
        self.name = artifact.graph.name
        try:
            shape = tuple(map(int, artifact.source["rebel_shape"].split("x")))
            self.inputs = [(shape, getattr(torch, artifact.source["rebel_dtype"]))]
        except (KeyError, ValueError, AttributeError):
            raise RBLNArtifactError(
                f"{artifact.path} was not compiled through rebel. Load it with RBLNAutoencoderKL "
                "of rbln_vae, or compile the model again."
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compiled model to a `.rbln` file."""
        self.artifact.save(Path(path))

    def __repr__(self) -> str:
        inputs = ", ".join(f"{'x'.join(map(str, shape))} {dtype}" for shape, dtype in self.inputs)
        return f"<RBLNCompiledModel {self.name} for {inputs}>"


def compile_from_torch(
    mod: nn.Module,
    input_info: InputInfo,
    npu: str | None = None,
    num_devices: int | None = None,
    *,
    example_inputs: Sequence[Tensor] | None = None,
    compile_context: CompileContext | None = None,
    **kwargs: Any,
) -> RBLNCompiledModel:
    """Compile a module that maps one image to one image, or any other in a context.

    Args:
        mod: The module; it is not changed.
        input_info: One input as `[(name, [N, C, H, W], dtype)]`; in a context, all inputs.
        npu: The NPU to compile for; has no effect here.
        num_devices: The number of devices that share the model; has no effect here.
        example_inputs: Tensors for all inputs, among them those that the context has as static.
        compile_context: What the module shares with others; by default nothing.
        **kwargs: Other options of Rebellions' compiler; they have no effect here.

    Raises:
        RBLNCompileError: The number of inputs is not one, and there is no context; the module
            has an operation that no autoencoder of this package has; or, in a context, one that
            PyTorch can't trace, such as an operation of Rebellions' compiler that isn't
            `rbln_cache_update`.
    """
    if compile_context is not None:
        from .traced import Trace

        if example_inputs is None:
            raise RBLNCompileError(
                "A module is compiled in a CompileContext with example_inputs, which say what of "
                "its inputs is static, and there are none."
            )
        return RBLNCompiledModel._of(Trace.of(mod, example_inputs, compile_context))
    if len(input_info) != 1 or len(input_info[0][1]) != 4 or input_info[0][2] not in _DTYPES:
        raise RBLNCompileError(
            "rbln_vae.rebel compiles modules with one input (N, C, H, W) of a floating dtype, and "
            f"got input_info={list(input_info)}. It compiles others in a CompileContext alone."
        )
    _, (batch, channels, height, width), dtype = input_info[0]
    source = {
        "model": type(mod).__name__,
        "rebel_shape": f"{batch}x{channels}x{height}x{width}",
        "rebel_dtype": dtype,
    }
    target = get_target(_machine.target)
    target.require()
    options = CompileOptions(
        (batch, channels, height, width), _DTYPES[dtype], source, part=type(mod).__name__
    )
    compiled = target.compile_module(mod, options)
    assert isinstance(compiled, Artifact)
    return RBLNCompiledModel._of(compiled)


compile = compile_from_torch  # noqa: A001  # clients read its signature


class Runtime:
    """A compiled model on a device, ready to run.

    Args:
        compiled_model: The model, or the path of its file.
        tensor_type: `"pt"` for torch tensors, `"np"` (default) for NumPy arrays.
        device: The number of the NPU, or the numbers of all that share the model; `None` is
            the first.
        activate_profiler: Whether to keep the times of each run in `profiles`, by default not.
        timeout: The most seconds of a run; `None` is no limit.

    Raises:
        RBLNRuntimeError: There is no such device.
    """

    def __init__(
        self,
        compiled_model: RBLNCompiledModel | str | os.PathLike[str],
        tensor_type: str = "np",
        device: int | Sequence[int] | None = None,
        activate_profiler: bool = False,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(compiled_model, RBLNCompiledModel):
            compiled_model = RBLNCompiledModel(compiled_model)
        if tensor_type not in ("pt", "np"):
            raise ValueError(f"tensor_type={tensor_type!r}: expected 'pt' or 'np'.")
        devices = [device or 0] if device is None or isinstance(device, int) else list(device)
        for number in devices:
            if not npu_is_available(number):
                raise RBLNRuntimeError(
                    f"There is no NPU {number}: rbln_vae.rebel was installed with "
                    f"devices={device_count()}."
                )
        self._model = compiled_model
        self._tensor_type = tensor_type
        self._devices = devices
        artifact = compiled_model.artifact
        self._images: targets.Runtime | None = None
        if isinstance(artifact, Artifact):
            options = RuntimeOptions(timeout=timeout, activate_profiler=activate_profiler)
            self._images = get_target(artifact.target).create_runtime(artifact, options)
            return
        if timeout is not None or activate_profiler:
            raise RBLNRuntimeError(
                "rbln_vae.rebel has no timeout and no profiler for models that were compiled in "
                f"a CompileContext, and got timeout={timeout}, "
                f"activate_profiler={activate_profiler}. Leave them out."
            )
        from .traced import TraceRuntime

        self._traced = TraceRuntime(artifact, devices)

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active; else empty."""
        return [] if self._images is None else self._images.profiles

    def run(self, *inputs: Any) -> Any:
        """Run the model.

        Args:
            *inputs: An image; or, of a module that was compiled in a context, the inputs that it
                reads and that are not static. They have the compiled shapes and dtypes, and any
                strides.

        Returns:
            A new tensor or array; or a list of them where there are several results. Those of
            `rbln_cache_update` are empty.

        Raises:
            RBLNRuntimeError: The number, a shape or a dtype is not the compiled one.
            TimeoutError: The run took longer than the timeout.
        """
        numpy = self._tensor_type == "np"
        tensors: list[Tensor] = [torch.from_numpy(i) if numpy else i for i in inputs]
        expected = self._model.inputs
        if len(tensors) != len(expected):
            raise RBLNRuntimeError(
                f"{self._model!r} takes {len(expected)} inputs, and got {len(tensors)}."
            )
        for tensor, (shape, dtype) in zip(tensors, expected, strict=True):
            if (tensor.shape, tensor.dtype) != (shape, dtype):
                raise RBLNRuntimeError(
                    f"The model was compiled for the shape {shape} in {dtype}, and got "
                    f"{tuple(tensor.shape)} in {tensor.dtype}. Compile it again for another shape."
                )
        tensors = [tensor.detach().cpu() for tensor in tensors]
        if self._images is not None:
            results = [self._images.run(tensors[0])]
        else:
            results = self._traced.run(tensors)
        given = [result.numpy() for result in results] if numpy else results
        return given[0] if len(given) == 1 else given

    __call__ = forward = run

    def __repr__(self) -> str:
        return f"<Runtime of {self._model!r} on device {self._devices}>"
