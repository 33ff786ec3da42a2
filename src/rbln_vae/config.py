"""Every option of a model, declared once: its check, its default, and what it is.

The configuration classes are made of these declarations, and so is the command line. A wrong
value is named where it is set. After compiling, a configuration is frozen: it says what was
compiled.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import json
import os
import re
import textwrap
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, overload

from .errors import RBLNArtifactError
from .files import atomic_path
from .sizes import check_image_size
from .units import optional_byte_count, positive_int, positive_number
from .version import __version__

CONFIG_NAME = "rbln_config.json"
TARGETS = ("cpu", "cuda", "rbln", "reference")
"""The names of all targets; each is the `TARGET` of the module of that name in `targets`."""
DTYPES = ("float32", "float16", "bfloat16")
"""In what models compute."""
MAX_THREADS = 1024
"""Of a run: no machine has more cores, and a larger number is a mistake."""

Device = int | str
ConfigType = TypeVar("ConfigType", bound="RBLNModelConfig")
T = TypeVar("T")


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


def _dtypes(value: object) -> str | dict[str, str]:
    """One for all parts, or by part: a mapping, or text as `format_dtypes` makes it."""
    if isinstance(value, str) and "=" in value:
        pairs = [pair.partition("=") for pair in value.split(",")]
        value = {part.strip(): dtype.strip() for part, _, dtype in pairs}
        if len(value) < len(pairs):
            raise ValueError("expected each part once")
    if not isinstance(value, Mapping):
        return _dtype(value)
    if not value or not all(isinstance(part, str) and part for part in value):
        raise ValueError("expected the name of a part and its dtype, such as encoder=float32")
    return {part: _dtype(dtype) for part, dtype in value.items()}


def format_dtypes(value: str | Mapping[str, str]) -> str:
    """An option `dtype` as text, such as `encoder=float32,decoder=bfloat16`."""
    if isinstance(value, str):
        return value
    return ",".join(f"{part}={dtype}" for part, dtype in value.items())


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


def _image_size(value: object) -> tuple[int, int]:
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ValueError("expected an int, or (height, width)")
    return positive_int(sides[0]), positive_int(sides[1])


def _scale_factor(value: object) -> int:
    factor = positive_number(value)
    if not isinstance(factor, int):
        raise ValueError("expected a positive whole number")
    return factor


def setting(default: Any, meaning: str) -> Any:
    """A field of a dataclass of settings, with its default and what it is.

    Args:
        default: The default.
        meaning: What it is, in phrases; the command line shows it.
    """
    return dataclasses.field(default=default, metadata={"meaning": meaning})


class Option(Generic[T]):
    """One option of a configuration, and its attribute there.

    Args:
        check: Gives the value as it is kept, and raises a `ValueError` or a `TypeError` that
            says what was expected. `None` isn't checked: it stands for "not chosen".
        meaning: What the option is, in phrases that say its default.
        default: By default `None`.
        of_run: Whether it says how a model runs: then it isn't stored, and may differ from
            load to load. Other options are fixed by compiling.
    """

    def __init__(
        self,
        check: Callable[[object], Any],
        meaning: str,
        *,
        default: T | None = None,
        of_run: bool = False,
    ) -> None:
        self.check, self.meaning, self.default, self.of_run = check, meaning, default, of_run

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def checked(self, value: object) -> Any:
        """The value as it is kept.

        Raises:
            ValueError, TypeError: It is wrong; the message names the option.
        """
        if value is None:
            return None
        try:
            return self.check(value)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self.name}={value!r}: {error}.") from None

    @overload
    def __get__(self, config: None, owner: type) -> Option[T]: ...
    @overload
    def __get__(self, config: RBLNModelConfig, owner: type) -> T: ...
    def __get__(self, config: RBLNModelConfig | None, owner: type) -> Option[T] | T:
        if config is None:
            return self
        value: T = vars(config)[self.name]
        return value

    def __set__(self, config: RBLNModelConfig, value: object) -> None:
        config._assign(self, value)


class RBLNModelConfig:
    """What every model's configuration holds.

    Args:
        {options}
        tensor_parallel_size: Another name of `num_devices`.
        cls_name: The name of the class, as stored; leave it out.
        rbln_vae_version: The version that stored the configuration; leave it out.

    Raises:
        ValueError: A name is unknown, the message says the nearest; or a value is out of range.
        TypeError: A value is of a wrong type.

    Example:
        >>> RBLNModelConfig(target="cpu", memory_limit="2GiB").memory_limit
        2147483648
    """

    create_runtimes = Option[bool](
        boolean,
        "Whether the model is made ready to run. `False` compiles without a device. "
        "By default `True`.",
        default=True,
        of_run=True,
    )
    device = Option[Device | None](
        _device,
        "Where the model runs: an `int` is an NPU, else `cpu` or `cuda:0`. By default the "
        "target's first device.",
        of_run=True,
    )
    device_map = Option[dict[str, Device] | None](
        _device_map,
        "A device for each compiled part, such as `{'encoder': 0, 'decoder': 1}`. By default "
        "`device` for all.",
        of_run=True,
    )
    activate_profiler = Option[bool](
        boolean,
        "Whether the time of every operation of each run is kept. By default `False`.",
        default=False,
        of_run=True,
    )
    npu = Option[str | None](
        _text,
        "The RBLN chip to compile for, such as `RBLN-CA22`. By default the one that is there.",
    )
    num_devices = Option[int](
        positive_int, "Devices that share one model. By default 1.", default=1
    )
    timeout = Option[float | None](
        positive_number,
        "Seconds that one run may take before a `TimeoutError`. By default there is no limit, "
        "since large images take minutes; on the target `rbln` it is 60.",
        of_run=True,
    )
    dtype = Option[str | dict[str, str] | None](
        _dtypes,
        f"In what the model stores images and weights: {', '.join(DTYPES)}; or by part, as "
        "`encoder=float32,decoder=bfloat16`. In Python, a dict and torch's dtypes are as good. By "
        "default, also of a part that isn't named, what is best on the target.",
    )
    target = Option[str | None](
        _target,
        f"{', '.join(TARGETS)}: what the model is compiled for. By default rbln where there is "
        "an NPU, else cpu.",
    )
    num_threads = Option[int | None](
        _threads,
        f"Threads of a run on the CPU, at most {MAX_THREADS}. By default one for each core that "
        "the process may use.",
        of_run=True,
    )
    memory_limit = Option[int | None](
        optional_byte_count,
        "The most memory that a run may take besides the weights: activations, scratch memory "
        "of its threads, what is kept for the next run, and the result. In bytes, or as 2GiB. By "
        "default the memory of the machine or the control group, and on the target cuda what is "
        "free on the GPU; the target rbln ignores it.",
        of_run=True,
    )

    _ALIASES: ClassVar[dict[str, str]] = {"tensor_parallel_size": "num_devices"}
    _FACTS: ClassVar[Mapping[str, str]] = {}
    """The options that hold facts of the model under other names than `ResolvedConfig` has."""
    _given: set[str]

    def __init__(
        self,
        *in_order: Any,
        cls_name: str | None = None,
        rbln_vae_version: str | None = None,
        **options: Any,
    ) -> None:
        if cls_name is not None and cls_name != type(self).__name__:
            raise ValueError(
                f"This configuration is one of {cls_name}, not of {type(self).__name__}. "
                "RBLNAutoConfig.load finds the right class."
            )
        names = [name for name, option in self.options().items() if name not in _SHARED]
        if len(in_order) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} arguments without a name")
        for name, value in zip(names, in_order, strict=False):
            if name in options:
                raise TypeError(f"{name} is given twice")
            options[name] = value
        reject_unknown(options, self._names(), f"option of {type(self).__name__}", ValueError)
        options = self._expanded(options)
        for alias, name in self._ALIASES.items():
            value = options.pop(alias, None)
            if value is None:
                continue
            if options.get(name) not in (None, value):
                raise ValueError(
                    f"{name}={options[name]} and {alias}={value} are two names of one option. "
                    "Give one of them."
                )
            options[name] = value
        vars(self).update({name: o.default for name, o in self.options().items()}, _given=set())
        for name, value in options.items():
            if value is not None:
                setattr(self, name, value)

    def __init_subclass__(cls) -> None:
        _document(cls)

    @classmethod
    def _expanded(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options of the constructor, with those that stand for several replaced by them."""
        return options

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`(height, width)` of the image in pixels; `None` if it is not chosen."""
        return None

    @classmethod
    def fact_name(cls, name: str) -> str:
        """The option that holds a fact, by the name that the fact has in `ResolvedConfig`."""
        return cls._FACTS.get(name, name)

    def fact(self, name: str) -> Any:
        """The value that the caller chose for a fact of the model, or `None`.

        Args:
            name: The name of the fact in `ResolvedConfig`.
        """
        return getattr(self, self.fact_name(name), None)

    def with_facts(self: ConfigType, facts: Mapping[str, Any]) -> ConfigType:
        """A copy in which open options that hold facts of the model have their values.

        Args:
            facts: Facts by their names in `ResolvedConfig`; those without an option are left out.
        """
        named = self._expanded({self.fact_name(name): v for name, v in facts.items()})
        left_open = [name for name, value in self.compiled_options().items() if value is None]
        return self.copy(**{name: v for name, v in named.items() if name in left_open})

    @classmethod
    def options(cls) -> dict[str, Option[Any]]:
        """Every option by name, those of the class itself first."""
        return {
            name: option
            for kind in cls.__mro__
            for name, option in vars(kind).items()
            if isinstance(option, Option)
        }

    @classmethod
    def options_of_run(cls) -> list[str]:
        """The options that say how a model runs: not stored, and free from load to load."""
        return [name for name, option in cls.options().items() if option.of_run]

    @classmethod
    def _names(cls) -> list[str]:
        """Every name that the constructor knows."""
        return [*cls.options(), *cls._ALIASES]

    def __setattr__(self, name: str, value: Any) -> None:
        reject_unknown({name: value}, self.options(), "option", AttributeError)
        super().__setattr__(name, value)

    def _assign(self, option: Option[Any], value: object) -> None:
        """Check an option and set it, or leave everything as it was."""
        name = option.name
        if self.is_frozen():
            raise RuntimeError(
                f"{name} can't be set: this configuration is frozen, it says what was compiled. "
                "Compile the model again with another configuration."
            )
        value = option.checked(value)
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
        return type(other) is type(self) and other._values() == self._values()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(f"{k}={v!r}" for k, v in self._values().items() if v is not None)
        return f"{type(self).__name__}({shown})"

    def _values(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in self.options()}

    def given_options(self) -> dict[str, Any]:
        """The options that were set, not left at their defaults."""
        return {name: value for name, value in self._values().items() if name in self._given}

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
        reject_unknown(changes, self._names(), f"option of {type(self).__name__}", ValueError)
        return type(self)(**override(self.given_options(), changes))

    def compiled_options(self) -> dict[str, Any]:
        """The options that are fixed by compiling, which a compiled model keeps."""
        of_run = self.options_of_run()
        return {name: value for name, value in self._values().items() if name not in of_run}

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


def _document(cls: type[RBLNModelConfig]) -> None:
    """Give a configuration class the signature and the docstring that its options say."""
    own = [name for name in cls.options() if name not in _SHARED]
    shared = [name for name in cls.options() if name in _SHARED]
    kind = inspect.Parameter
    parameters = [
        *(kind(name, kind.POSITIONAL_OR_KEYWORD, default=None) for name in own),
        *(kind(name, kind.KEYWORD_ONLY, default=None) for name in [*shared, *cls._ALIASES]),
    ]
    cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    if cls.__doc__:  # none where Python leaves docstrings out
        wrap = textwrap.TextWrapper(88, initial_indent=" " * 4, subsequent_indent=" " * 8)
        told = [
            wrap.fill(f"{name}: {option.meaning}")
            for name, option in vars(cls).items()
            if isinstance(option, Option)
        ]
        cls.__doc__ = inspect.cleandoc(cls.__doc__).replace("    {options}", "\n".join(told))


_SHARED = RBLNModelConfig.options()
"""The options of every model; those of a class of its own come before them."""

_document(RBLNModelConfig)


class RBLNAutoencoderKLConfig(RBLNModelConfig):
    """What an `RBLNAutoencoderKL` is compiled for.

    Args:
        {options}
        **kwargs: The options of `RBLNModelConfig`.

    Raises:
        ValueError: As of `RBLNModelConfig`; or `sample_size` is not a multiple of
            `vae_scale_factor`, the message names the nearest valid sizes.

    Example:
        >>> config = RBLNAutoencoderKLConfig(sample_size=512, vae_scale_factor=8)
        >>> config.image_size, config.latent_sample_size
        ((512, 512), (64, 64))
    """

    batch_size = Option[int](
        positive_int,
        "The batch that the model is compiled for. Targets that take every shape (cpu, cuda, "
        "reference) are tuned for it, others take no other. By default 1.",
        default=1,
    )
    sample_size = Option[tuple[int, int] | None](
        _image_size,
        "The size of the image in pixels that the model is compiled for, as its batch is: one "
        "side, or height and width. By default the model's own.",
    )
    uses_encoder = Option[bool | None](
        boolean,
        "Whether the encoder is compiled too. `False` compiles the decoder alone. By default "
        "`True`.",
    )
    vae_scale_factor = Option[int | None](
        _scale_factor,
        "Pixels per latent cell in a direction. By default the model's own, "
        "`2 ** (len(block_out_channels) - 1)`.",
    )
    in_channels = Option[int | None](
        positive_int, "Channels of the image. By default the model's own."
    )
    latent_channels = Option[int | None](
        positive_int, "Channels of the latent. By default the model's own."
    )

    def _check_together(self) -> None:
        factor = self.fact("vae_scale_factor")
        if self.sample_size is not None and factor is not None:
            check_image_size(self.sample_size, factor)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`(height, width)` of the image in pixels."""
        return self.sample_size

    @property
    def latent_sample_size(self) -> tuple[int, int]:
        """`(height, width)` of the latent.

        Raises:
            ValueError: The size or the scale factor is not known yet.
        """
        factor = self.fact("vae_scale_factor")
        if self.sample_size is None or factor is None:
            raise ValueError(
                f"latent_sample_size needs sample_size and {self.fact_name('vae_scale_factor')}. "
                "Give both, or read it from the rbln_config of a compiled model."
            )
        height, width = self.sample_size
        return height // factor, width // factor


class RBLNAutoencoderKLFlux2Config(RBLNAutoencoderKLConfig):
    """What an `RBLNAutoencoderKLFlux2` is compiled for; see `RBLNAutoencoderKLConfig`."""


class RBLNAsymmetricAutoencoderKLConfig(RBLNAutoencoderKLConfig):
    """What an `RBLNAsymmetricAutoencoderKL` is compiled for; see `RBLNAutoencoderKLConfig`."""


class RBLNAutoencoderTinyConfig(RBLNAutoencoderKLConfig):
    """What an `RBLNAutoencoderTiny` is compiled for; see `RBLNAutoencoderKLConfig`."""


class RBLNAutoencoderKLHunyuanImageConfig(RBLNAutoencoderKLConfig):
    """What an `RBLNAutoencoderKLHunyuanImage` is compiled for; see `RBLNAutoencoderKLConfig`."""


class RBLNAutoencoderKLTemporalDecoderConfig(RBLNModelConfig):
    """What an `RBLNAutoencoderKLTemporalDecoder` is compiled for.

    The options have the names and the order of optimum-rbln.

    Args:
        {options}
        **kwargs: The options of `RBLNModelConfig`.

    Raises:
        ValueError: As of `RBLNAutoencoderKLConfig`.

    Example:
        >>> RBLNAutoencoderKLTemporalDecoderConfig(sample_size=(576, 1024)).image_size
        (576, 1024)
    """

    batch_size = RBLNAutoencoderKLConfig.batch_size
    sample_size = RBLNAutoencoderKLConfig.sample_size
    uses_encoder = RBLNAutoencoderKLConfig.uses_encoder
    num_frames = Option[int | None](
        positive_int, "Frames of a video. It only says how many a clip has by default."
    )
    decode_chunk_size = Option[int | None](
        positive_int,
        "Frames of the clips that the decoder is compiled for: those of one call of `decode`. "
        "Targets that take every shape are tuned for it, others take no other. By default "
        "`num_frames`, or else 14.",
    )
    vae_scale_factor = RBLNAutoencoderKLConfig.vae_scale_factor
    in_channels = RBLNAutoencoderKLConfig.in_channels
    latent_channels = RBLNAutoencoderKLConfig.latent_channels
    image_size = RBLNAutoencoderKLConfig.image_size
    latent_sample_size = RBLNAutoencoderKLConfig.latent_sample_size
    _check_together = RBLNAutoencoderKLConfig._check_together


class RBLNAutoencoderKLWanConfig(RBLNModelConfig):
    """What an `RBLNAutoencoderKLWan` is compiled for.

    The options have the names and the order of optimum-rbln.

    Args:
        {options}
        sample_size: One side, or `(height, width)`: another way to give `height` and `width`.
        **kwargs: The options of `RBLNModelConfig`.

    Raises:
        ValueError: As of `RBLNModelConfig`; or `sample_size` differs from `height` or `width`.

    Example:
        >>> RBLNAutoencoderKLWanConfig(height=480, width=832).image_size
        (480, 832)
    """

    _FACTS = types.MappingProxyType(
        {
            "latent_channels": "num_channels_latents",
            "vae_scale_factor": "vae_scale_factor_spatial",
        }
    )

    batch_size = RBLNAutoencoderKLConfig.batch_size
    uses_encoder = RBLNAutoencoderKLConfig.uses_encoder
    num_frames = Option[int | None](
        positive_int,
        "Frames of a video. 1 compiles for images alone, in a smaller file; by default the model "
        "runs videos of any number of frames where it can, and so with any other number.",
    )
    height = Option[int | None](
        positive_int,
        "Rows of the image in pixels that the model is compiled for, as its batch is. By default "
        "what pipelines of the model make.",
    )
    width = Option[int | None](positive_int, "Columns of the image; as `height`.")
    num_channels_latents = Option[int | None](
        positive_int, "Channels of the latent. By default the model's own."
    )
    vae_scale_factor_temporal = Option[int | None](
        _scale_factor, "Frames per frame of the latent. By default the model's own."
    )
    vae_scale_factor_spatial = Option[int | None](
        _scale_factor, "Pixels per latent cell in a direction. By default the model's own."
    )

    @classmethod
    def _expanded(cls, options: dict[str, Any]) -> dict[str, Any]:
        options = dict(options)
        size = options.pop("sample_size", None)
        if size is None:
            return options
        height, width = _image_size(size)
        for name, side in (("height", height), ("width", width)):
            if options.get(name) not in (None, side):
                raise ValueError(
                    f"sample_size={size} and {name}={options[name]} differ. Give one of them."
                )
            options[name] = side
        return options

    @classmethod
    def _names(cls) -> list[str]:
        return [*super()._names(), "sample_size"]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """`(height, width)` of the image in pixels; `None` unless both are chosen."""
        if self.height is None or self.width is None:
            return None
        return self.height, self.width


class RBLNAutoencoderKLQwenImageConfig(RBLNAutoencoderKLWanConfig):
    """What an `RBLNAutoencoderKLQwenImage` is compiled for; see `RBLNAutoencoderKLWanConfig`."""


class RBLNAutoencoderKLQwenImage21Config(RBLNAutoencoderKLWanConfig):
    """What an `RBLNAutoencoderKLQwenImage21` is compiled for; see `RBLNAutoencoderKLWanConfig`."""


class RBLNVQModelConfig(RBLNModelConfig):
    """What an `RBLNVQModel` is compiled for.

    The options have the names and the order of optimum-rbln.

    Args:
        {options}
        **kwargs: The options of `RBLNModelConfig`.

    Raises:
        ValueError: As of `RBLNModelConfig`; or `sample_size` is not a multiple of
            `vqmodel_scale_factor`, the message names the nearest valid sizes.

    Example:
        >>> config = RBLNVQModelConfig(sample_size=512, vqmodel_scale_factor=8)
        >>> config.latent_sample_size
        (64, 64)
    """

    _FACTS = types.MappingProxyType({"vae_scale_factor": "vqmodel_scale_factor"})

    batch_size = RBLNAutoencoderKLConfig.batch_size
    sample_size = RBLNAutoencoderKLConfig.sample_size
    uses_encoder = RBLNAutoencoderKLConfig.uses_encoder
    vqmodel_scale_factor = Option[int | None](
        _scale_factor, RBLNAutoencoderKLConfig.vae_scale_factor.meaning
    )
    in_channels = RBLNAutoencoderKLConfig.in_channels
    latent_channels = RBLNAutoencoderKLConfig.latent_channels
    image_size = RBLNAutoencoderKLConfig.image_size
    latent_sample_size = RBLNAutoencoderKLConfig.latent_sample_size
    _check_together = RBLNAutoencoderKLConfig._check_together


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
    aliases = RBLNModelConfig._ALIASES
    changed = {aliases.get(name, name) for name in changes}
    return {**{k: v for k, v in options.items() if aliases.get(k, k) not in changed}, **changes}


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
