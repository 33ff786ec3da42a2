"""A stand-in for `rebel`, Rebellions' compiler, for machines without it and without an NPU.

It has everything that optimum-rbln 0.12 uses for an `AutoencoderKL` or a `VQModel`, backed by
the targets of this package, so that code for the NPU can be developed and tested anywhere:

    python -m rbln_vae.rebel script.py

or, before optimum-rbln is imported,

    import rbln_vae.rebel
    rbln_vae.rebel.install()

As on the NPU, a compiled model takes only the shape and dtype that it was compiled for. Files
of the stand-in can't be read by Rebellions' compiler, nor the reverse.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..artifact import Artifact, read_artifact
from ..errors import RBLNArtifactError, RBLNCompileError, RBLNRuntimeError
from ..profiler import RunProfile
from ..targets.base import CompileOptions, GraphTarget, RuntimeOptions, get_target

__all__ = [
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


_machine = _Machine()


def install(npu: str = "RBLN-CA22", devices: int = 1, target: str = "cpu") -> None:
    """Make `import rebel` import this module, in this process.

    Args:
        npu: The name of the simulated NPU, by default `"RBLN-CA22"`.
        devices: The number of NPUs, by default 1; with 0 the machine can only compile.
        target: The target that runs the models, by default `"cpu"`.

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
    sys.modules["rebel"] = this


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
    """One part of a model, compiled for one shape and dtype.

    Args:
        path: A file that `save` wrote.

    Raises:
        RBLNArtifactError: The file is missing, damaged, or written by another compiler.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._set(read_artifact(Path(path)))

    @classmethod
    def _of(cls, artifact: Artifact) -> RBLNCompiledModel:
        model = cls.__new__(cls)
        model._set(artifact)
        return model

    def _set(self, artifact: Artifact) -> None:
        self.artifact = artifact
        try:
            self.input_shape = tuple(map(int, artifact.source["rebel_shape"].split("x")))
            self.input_dtype: torch.dtype = getattr(torch, artifact.source["rebel_dtype"])
        except (KeyError, ValueError, AttributeError):
            raise RBLNArtifactError(
                f"{artifact.path} was not compiled through rebel. Load it with RBLNAutoencoderKL "
                "of rbln_vae, or compile the model again."
            ) from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compiled model to a `.rbln` file."""
        self.artifact.save(Path(path))

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return f"<RBLNCompiledModel {self.artifact.graph.name} for {shape} {self.input_dtype}>"


def compile_from_torch(
    mod: nn.Module,
    input_info: InputInfo,
    npu: str | None = None,
    num_devices: int | None = None,
    **kwargs: Any,
) -> RBLNCompiledModel:
    """Compile a module that maps one image to one image.

    Args:
        mod: The module; it is not changed.
        input_info: One input as `[(name, [N, C, H, W], dtype)]`.
        npu: The NPU to compile for; has no effect here.
        num_devices: The number of devices that share the model; has no effect here.
        **kwargs: Other options of Rebellions' compiler; they have no effect here.

    Raises:
        RBLNCompileError: The number of inputs is not one, or the module has an operation that
            no autoencoder of this package has.
    """
    if len(input_info) != 1 or len(input_info[0][1]) != 4 or input_info[0][2] not in _DTYPES:
        raise RBLNCompileError(
            "rbln_vae.rebel compiles modules with one input (N, C, H, W) of a floating dtype, and "
            f"got input_info={list(input_info)}. Only Rebellions' compiler can compile others."
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
        options = RuntimeOptions(timeout=timeout, activate_profiler=activate_profiler)
        artifact = compiled_model.artifact
        self._runtime = get_target(artifact.target).create_runtime(artifact, options)

    @property
    def profiles(self) -> list[RunProfile]:
        """The latest runs, if the profiler is active; else empty."""
        return self._runtime.profiles

    def run(self, image: Any) -> Any:
        """Run the model.

        Args:
            image: An image of the compiled shape and dtype, with any strides.

        Returns:
            A new tensor or array.

        Raises:
            RBLNRuntimeError: The shape or dtype is not the compiled one.
            TimeoutError: The run took longer than the timeout.
        """
        tensor: Tensor = torch.from_numpy(image) if self._tensor_type == "np" else image
        found = (tuple(tensor.shape), tensor.dtype)
        expected = (self._model.input_shape, self._model.input_dtype)
        if found != expected:
            raise RBLNRuntimeError(
                f"The model was compiled for the shape {expected[0]} in {expected[1]}, and got "
                f"{found[0]} in {found[1]}. Compile it again for another shape."
            )
        result = self._runtime.run(tensor.detach().cpu())
        return result.numpy() if self._tensor_type == "np" else result

    __call__ = forward = run

    def __repr__(self) -> str:
        return f"<Runtime of {self._model!r} on device {self._devices}>"
