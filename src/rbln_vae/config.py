"""The configurations: what a model is compiled for, and how it runs.

Every option is checked where it is set, so that a wrong one is named at once. After
compiling a configuration is frozen: it says what was compiled.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .errors import RBLNArtifactError
from .files import atomic_path
from .units import optional_byte_count, positive_int, positive_number
from .version import __version__

CONFIG_NAME = "rbln_config.json"
TARGETS = ("cpu", "cuda", "rbln", "reference")
DTYPES = ("float32", "bfloat16")
MAX_THREADS = 1024
"""Of a run: no machine has more cores, and a larger number is a mistake."""

Device = int | str
ConfigType = TypeVar("ConfigType", bound="RBLNModelConfig")


def boolean(value: object) -> bool:
    """The value, which must be `True` or `False`."""
    if not isinstance(value, bool):
        raise TypeError("expected True or False")
    return value


def _device(value: object) -> Device:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError("expected the number of an NPU, 'cpu' or 'cuda:0'")
    if isinstance(value, int) and value < 0:
        raise ValueError("expected the number of an NPU, 0 or more")
    if isinstance(value, str) and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        raise ValueError("expected 'cpu', 'cuda' or 'cuda:0'")
    return value


def _device_map(value: object) -> dict[str, Device]:
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for part in value):
        raise TypeError("expected a dict from the name of a part to its device")
    return {part: _device(device) for part, device in value.items()}


def _dtype(value: object) -> str:
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"expected one of {', '.join(DTYPES)}")
    return name


def _target(value: object) -> str:
    if value not in TARGETS:
        raise ValueError(f"expected one of {', '.join(TARGETS)}")
    return str(value)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("expected a name")
    return value


def _threads(value: object) -> int:
    number = positive_int(value)
    if number > MAX_THREADS:
        raise ValueError(f"expected at most {MAX_THREADS}")
    return number


class RBLNModelConfig:
    """What every model's configuration holds.

    Args:
        cls_name: The name of the class, as stored; leave it out.
        create_runtimes: `False` compiles without a device.
        device: Where the model runs: an `int` is an NPU, else `"cpu"` or `"cuda:0"`.
        device_map: A device for each compiled part, such as `{"encoder": 0, "decoder": 1}`.
        activate_profiler: Keep the time of every operation of each run.
        npu: The RBLN chip to compile for, such as `"RBLN-CA22"`.
        num_devices: Devices that share one model.
        tensor_parallel_size: Another name of `num_devices`.
        timeout: Seconds that one run may take before a `TimeoutError`. `None` is no limit,
            since large images take minutes; on the target `rbln` it is 60.
        dtype: `"float32"`, `"bfloat16"` or a torch dtype; `None` is what is best on the
            target.
        target: `"cpu"`, `"cuda"`, `"rbln"` or `"reference"`; `None` is `rbln` where an
            NPU is present, else `cpu`.
        num_threads: CPU: threads of a run, at most 1024; `None` is one for each core that
            the process may use.
        memory_limit: The most memory that a run may take besides the weights: activations,
            scratch memory of its threads, and the result. In bytes or as `"2GiB"`; `None` and
            `""` are the memory of the machine or the control group on the target `cpu`, and
            no limit on others. The target `rbln` ignores it.
        rbln_vae_version: The version that stored the configuration; leave it out.
        **kwargs: None is known; an unknown name is an error that suggests the nearest.

    Raises:
        ValueError: A name is unknown, or a value is out of range.
        TypeError: A value is of a wrong type.

    Example:
        >>> RBLNModelConfig(target="cpu", memory_limit="2GiB").memory_limit
        2147483648
    """

    RUNTIME_OPTIONS: ClassVar[tuple[str, ...]] = (
        "create_runtimes",
        "device",
        "device_map",
        "activate_profiler",
        "timeout",
        "num_threads",
        "memory_limit",
    )
    """Options of a run: not stored, and free to differ from load to load."""

    _CHECKS: ClassVar[dict[str, Callable[[object], Any]]] = {
        "create_runtimes": boolean,
        "device": _device,
        "device_map": _device_map,
        "activate_profiler": boolean,
        "npu": _text,
        "num_devices": positive_int,
        "timeout": positive_number,
        "dtype": _dtype,
        "target": _target,
        "num_threads": _threads,
        "memory_limit": optional_byte_count,
    }
    """What checks and converts each option; `None` stands for "not chosen" in all of them."""

    _DEFAULTS: ClassVar[dict[str, Any]] = {
        "create_runtimes": True,
        "activate_profiler": False,
        "num_devices": 1,
    }

    create_runtimes: bool
    device: Device | None
    device_map: dict[str, Device] | None
    activate_profiler: bool
    npu: str | None
    num_devices: int
    timeout: float | None
    dtype: str | None
    target: str | None
    num_threads: int | None
    memory_limit: int | None
    _given: set[str]

    def __init__(
        self,
        *,
        cls_name: str | None = None,
        create_runtimes: bool | None = None,
        device: Device | None = None,
        device_map: Mapping[str, Device] | None = None,
        activate_profiler: bool | None = None,
        npu: str | None = None,
        num_devices: int | None = None,
        tensor_parallel_size: int | None = None,
        timeout: float | None = None,
        dtype: Any = None,
        target: str | None = None,
        num_threads: int | None = None,
        memory_limit: int | str | None = None,
        rbln_vae_version: str | None = None,
        **kwargs: Any,
    ) -> None:
        if cls_name is not None and cls_name != type(self).__name__:
            raise ValueError(
                f"This configuration is one of {cls_name}, not of {type(self).__name__}. "
                "RBLNAutoConfig.load finds the right class."
            )
        reject_unknown(kwargs, self._option_names(), f"option of {type(self).__name__}", ValueError)
        if tensor_parallel_size is not None:
            if num_devices not in (None, tensor_parallel_size):
                raise ValueError(
                    f"num_devices={num_devices} and tensor_parallel_size={tensor_parallel_size} "
                    "are two names of one option. Give one of them."
                )
            num_devices = tensor_parallel_size
        self._start(dict.fromkeys(self._CHECKS) | self._DEFAULTS)
        self._set(
            create_runtimes=create_runtimes,
            device=device,
            device_map=device_map,
            activate_profiler=activate_profiler,
            npu=npu,
            num_devices=num_devices,
            timeout=timeout,
            dtype=dtype,
            target=target,
            num_threads=num_threads,
            memory_limit=memory_limit,
        )

    def _start(self, defaults: Mapping[str, Any]) -> None:
        vars(self).update(defaults, _given=set())

    def _set(self, **options: Any) -> None:
        """Set the options that were given: those that are not `None`."""
        for name, value in options.items():
            if value is not None:
                setattr(self, name, value)

    @classmethod
    def _option_names(cls) -> list[str]:
        """Every name that the constructor knows, those of the parent classes included."""
        return [
            name
            for kind in cls.__mro__
            if kind is not object
            for name, parameter in inspect.signature(kind).parameters.items()
            if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._CHECKS:
            reject_unknown({name: value}, self._CHECKS, "option", AttributeError)
        if self.is_frozen():
            raise RuntimeError(
                f"{name} can't be set: this configuration is frozen, it says what was compiled. "
                "Compile the model again with another configuration."
            )
        if value is not None:
            try:
                value = self._CHECKS[name](value)
            except (ValueError, TypeError) as error:
                raise type(error)(f"{name}={value!r}: {error}.") from None
        before = vars(self)[name]
        vars(self)[name] = value
        try:
            self._check_together()
        except ValueError:
            vars(self)[name] = before
            raise
        self._given.add(name)

    def _check_together(self) -> None:
        """Check options that depend on each other; called after each is set."""

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} can't be deleted; set it to None.")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._options() == self._options()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self._options().items() if v is not None)
        return f"{type(self).__name__}({shown})"

    def _options(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self._CHECKS}

    def given_options(self) -> dict[str, Any]:
        """The options that were set, not left at their defaults."""
        return {name: value for name, value in self._options().items() if name in self._given}

    def freeze(self) -> None:
        """Refuse every change from now on; done after compiling and after loading."""
        vars(self)["_frozen"] = True

    def is_frozen(self) -> bool:
        """Whether the configuration refuses changes."""
        return bool(vars(self).get("_frozen"))

    def copy(self: ConfigType, **changes: Any) -> ConfigType:
        """A copy that isn't frozen, with some options changed.

        Raises:
            ValueError: As the constructor.
        """
        reject_unknown(
            changes, self._option_names(), f"option of {type(self).__name__}", ValueError
        )
        return type(self)(**override(self.given_options(), changes))

    def compiled_options(self) -> dict[str, Any]:
        """The options that a compiled model keeps: all but `RUNTIME_OPTIONS`."""
        return {k: v for k, v in self._options().items() if k not in self.RUNTIME_OPTIONS}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the options that a compiled model keeps, as JSON.

        Args:
            path: A file, or a directory, in which the file is `rbln_config.json`.
        """
        stored = {
            "cls_name": type(self).__name__,
            "rbln_vae_version": __version__,
            **self.compiled_options(),
        }
        with atomic_path(_config_file(path)) as temporary:
            temporary.write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls: type[ConfigType], path: str | os.PathLike[str], **options: Any) -> ConfigType:
        """Read what `save` wrote.

        Args:
            path: The file, or its directory.
            **options: Options of the run to add, such as `timeout`.

        Raises:
            RBLNArtifactError: The file is missing, or isn't a configuration of this class.
        """
        stored = _read(path)
        try:
            return cls(**{**stored, **options})
        except (ValueError, TypeError) as error:
            version = stored.get("rbln_vae_version")
            newer = "" if version == __version__ else f" It was written by version {version}."
            raise RBLNArtifactError(
                f"{_config_file(path)} doesn't fit {cls.__name__}: {error}{newer}"
            ) from error


class RBLNAutoConfig:
    """Finds the configuration class of a compiled model by itself."""

    @staticmethod
    def load(path: str | os.PathLike[str], **options: Any) -> RBLNModelConfig:
        """Read a configuration whatever its class, by the `cls_name` in the file.

        Args:
            path: An `rbln_config.json`, or its directory.
            **options: Options of the run to add.

        Raises:
            RBLNArtifactError: The file is missing or damaged, or its class is unknown.

        Example:
            >>> config = RBLNAutoConfig.load("compiled-vae")  # doctest: +SKIP
        """
        name = _read(path).get("cls_name")
        package = importlib.import_module(__package__)
        found = getattr(package, name, None) if isinstance(name, str) else None
        if not (isinstance(found, type) and issubclass(found, RBLNModelConfig)):
            raise RBLNArtifactError(
                f"{_config_file(path)} names the configuration class {name!r}, which this version "
                f"of rbln-vae ({__version__}) doesn't have."
            )
        return found.load(path, **options)


def override(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The options with changes that win over them, whichever of its names an option has."""
    names = {"num_devices", "tensor_parallel_size"}
    replaced = names if names & changes.keys() else set()
    return {**{k: v for k, v in options.items() if k not in replaced}, **changes}


def reject_unknown(
    given: Mapping[str, Any],
    known: Any,
    what: str,
    error: type[Exception] = TypeError,
) -> None:
    """Raise if a name is unknown, with the nearest known ones.

    Args:
        given: The names that came, as the keys.
        known: The names that there are.
        what: What the names stand for, for the message.
        error: The type to raise.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
            advice = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise error(f"{name!r} is no {what}; {advice}")


def nearest_multiples(size: int, factor: int) -> list[int]:
    """The multiples of `factor` next to `size`, below and above; never 0."""
    below = size // factor * factor
    near = {below, size if below == size else below + factor}
    return sorted(near - {0})


def check_image_size(size: tuple[int, int], factor: int) -> None:
    """Raise a `ValueError` that names the nearest valid sizes, if there is a remainder.

    Args:
        size: Height and width in pixels.
        factor: Pixels per latent cell in a direction.
    """
    if any(side % factor for side in size):
        height, width = (" or ".join(map(str, nearest_multiples(side, factor))) for side in size)
        raise ValueError(
            f"{size[0]}x{size[1]} is no image size of this model: height and width must be "
            f"multiples of {factor}. The nearest are height {height} and width {width}."
        )


def _config_file(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file / CONFIG_NAME if file.is_dir() else file


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = _config_file(path)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RBLNArtifactError(
            f"There is no {file}. A compiled model has one; compile with export=True, then "
            "save_pretrained."
        ) from None
    except (ValueError, RecursionError) as error:
        raise RBLNArtifactError(f"{file} is not JSON ({error}). Compile the model again.") from None
    if not isinstance(stored, dict):
        raise RBLNArtifactError(f"{file} is not a JSON object. Compile the model again.")
    return stored
