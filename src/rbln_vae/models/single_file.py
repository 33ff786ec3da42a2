"""Single `.safetensors` files: a diffusers model from the weights alone, without the network.

The same for weights that a program has loaded itself.

The class and the architecture follow from the names and the shapes of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import hub
from ..config import reject_unknown
from ..errors import RBLNCompileError
from .architectures import Configs, Shape, find_configs
from .kinds import KINDS, find_kind
from .layouts import names_in_diffusers

_PARTS = ("encoder", "decoder")
_DTYPES = ("F64", "F32", "F16", "BF16")
_LOADED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""What denoisers are trained with, and no shape tells."""
_SCALED_ALREADY = ("AutoencoderTiny",)
"""The classes whose latents are those of the denoiser: their defaults, 1 and 0, are right."""
_BOOKKEEPING = ("_diffusers_version", "_name_or_path", "_use_default_values")
"""Entries of configurations that set nothing."""
_SIDE = 512
"""Pixels of a side of the images that a model is compiled for if nothing else is known."""
_COUNTER = "bn.num_batches_tracked"
"""What training alone needs, and files lack or have."""


@dataclass(frozen=True)
class _Stored:
    """Where a weight is: the file, its name there, and its shape there."""

    file: Path
    key: str
    shape: Shape

    def fits(self, shape: Shape) -> bool:
        """Whether it has this shape, but for convolutions of one pixel that became matrices."""
        return self.shape in (shape, (*shape, 1, 1))


@dataclass(frozen=True)
class SingleFile:
    """An autoencoder in a `.safetensors` file, whose weights aren't read yet.

    Attributes:
        path: The file; of weights in memory, what messages call them.
        class_name: The diffusers class.
        config: Its configuration.
        weights: Where each weight is, by its name in diffusers.
        loaded: The weights by their names there, if they are in memory; else `None`.
    """

    path: Path
    class_name: str
    config: Mapping[str, Any]
    weights: Mapping[str, _Stored]
    loaded: Mapping[str, Tensor] | None = None

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The diffusers model.

        Args:
            dtype: Of the weights; `None` keeps that of the file.

        Raises:
            RBLNCompileError: Weights are missing, superfluous or of the wrong shape.
            OSError: The file can't be read.
        """
        model = self._empty()
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._check(expected)
        state = dict(self._read(expected, dtype))
        if _COUNTER in expected:
            state.setdefault(_COUNTER, torch.tensor(0))
        model.load_state_dict(state, assign=True)
        return model.eval()

    def _empty(self) -> Any:
        """The model with shapes and without weights."""
        import diffusers

        original = getattr(diffusers, self.class_name)
        try:
            with torch.device("meta"):
                return original(**self.config)
        except Exception as error:  # what diffusers raises depends on the class and the setting
            raise RBLNCompileError(
                f"diffusers can't make the {self.class_name} that the weights in {self.path} "
                f"suit: {error}. Pass as config what the weights don't tell and differs from the "
                "usual, such as norm_num_groups; it must be what the model was trained with."
            ) from error

    def _check(self, expected: Mapping[str, Shape]) -> None:
        found = self.weights
        missing = [name for name in expected if name not in found and name != _COUNTER]
        unknown = [stored.key for name, stored in found.items() if name not in expected]
        wrong = [
            f"{stored.key} {stored.shape} instead of {expected[name]}"
            for name, stored in found.items()
            if name in expected and not stored.fits(expected[name])
        ]
        problems = [
            f"{len(names)} weights are {what} ({', '.join(names[:3])}{', …' if names[3:] else ''})"
            for what, names in (
                ("missing, by their names in diffusers", missing),
                ("unknown", unknown),
                ("of another shape", wrong),
            )
            if names
        ]
        if problems:
            raise RBLNCompileError(
                f"{self.path} looks like an {self.class_name}, but {'; '.join(problems)}. It is "
                "damaged, or of a model that isn't supported."
            )

    def _read(
        self, shapes: Mapping[str, Shape], dtype: torch.dtype | None
    ) -> Iterator[tuple[str, Tensor]]:
        for file in sorted({stored.file for stored in self.weights.values()}):
            with self._reader(file) as read:
                for name, stored in self.weights.items():
                    if stored.file == file:
                        tensor = read(stored.key).reshape(shapes[name])
                        yield name, tensor.to(dtype or tensor.dtype) if tensor.ndim else tensor

    @contextlib.contextmanager
    def _reader(self, file: Path) -> Iterator[Callable[[str], Tensor]]:
        """What reads weights of a file by their names there."""
        if self.loaded is not None:
            yield self.loaded.__getitem__
            return
        with _opened(file) as opened:
            yield opened.get_tensor


def open_original(
    model_id: str, loader: Mapping[str, Any], class_name: str | None = None
) -> SingleFile:
    """As `open_single_file`, with the arguments of a Hugging Face loader.

    Args:
        model_id: A path, or the address of a file on the hub, which is downloaded.
        loader: `kind`, `config`, `subfolder` of `open_single_file`, and arguments that the hub
            and diffusers know.
        class_name: As of `open_single_file`.

    Raises:
        TypeError: A name is unknown.
        OSError, ValueError, RBLNCompileError: As `open_single_file`.
    """
    hub.check_loader_options(loader)
    if loader.get("original_config") is not None:
        raise ValueError(
            "original_config isn't needed: the architecture follows from the weights. Leave it "
            "out, or pass what differs as config."
        )
    return open_single_file(
        hub.find_single_file(model_id, loader),
        kind=loader.get("kind"),
        config=loader.get("config"),
        subfolder=loader.get("subfolder"),
        class_name=class_name,
    )


def open_single_file(
    path: Path,
    *,
    kind: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    subfolder: str | None = None,
    class_name: str | None = None,
) -> SingleFile:
    """Recognise the autoencoder in a file; its weights aren't read.

    The network is never used, and no code is loaded. Norms have 32 groups unless `config` says
    otherwise. Without `kind` and `config` the constants by which latents are scaled are
    `None`, and a file that suits Wan and Qwen-Image, whose networks are the same, is taken for
    an `AutoencoderKLWan`: `encode` and `decode` compute the same.

    Args:
        path: A `.safetensors` file of a VAE, or of a whole checkpoint with one. The encoder
            and the decoder of TAESD may be in two files, with `encoder` and `decoder` in
            their names; either stands for both.
        kind: One of `KINDS`, for what the shapes of weights don't tell. By default unknown.
        config: The configuration of diffusers, as a dict, a `config.json` or the directory of
            one. It wins over what the weights suggest; one that names its class replaces it.
        subfolder: Where in the directory `config.json` is. By default at the top.
        class_name: The diffusers class to prefer if several suit the weights.

    Raises:
        OSError: A file isn't there or can't be read.
        ValueError: The kind doesn't fit, or the configuration can't be read.
        RBLNCompileError: The file holds no autoencoder that is known.
    """
    given = _given_config(config, subfolder)
    return _recognised(path, _weights(path), kind, given, class_name)


def open_weights(weights: Mapping[str, Tensor], name: str) -> SingleFile:
    """Recognise the autoencoder that weights in memory are of, as `open_single_file` does.

    Args:
        weights: A state dict, in one of the layouts of files. Tensors are not copied.
        name: What messages call it.

    Raises:
        RBLNCompileError: It is no autoencoder that is known.

    Example:
        >>> vae = open_weights(load_file("vae.safetensors"), "the VAE").load()  # doctest: +SKIP
    """
    named = Path(name)
    stored = {}
    for key, new in names_in_diffusers(weights, name).items():
        _check_dtype(key, new, weights[key].dtype, _LOADED_DTYPES, name)
        stored[new] = _Stored(named, key, tuple(weights[key].shape))
    given: dict[str, Any] = {}
    return dataclasses.replace(_recognised(named, stored, None, given, None), loaded=weights)


def _recognised(
    path: Path,
    weights: Mapping[str, _Stored],
    kind: str | None,
    given: dict[str, Any],
    class_name: str | None,
) -> SingleFile:
    """The autoencoder that the weights suit; `given` is the configuration of the caller."""
    chosen = None if kind is None else find_kind(kind)
    original = given.pop("_class_name", None)
    configs = _configs(path, weights) if original is None else {str(original): given}
    if chosen is not None:
        configs = _suiting(configs, str(kind), path)
    found = class_name if class_name in configs else next(iter(configs))
    known = _options(found, path)
    told = {} if chosen is None else dict(chosen.config)
    if original is None:  # a configuration of its own leaves nothing open
        reject_unknown(given, known, f"option of {found}", ValueError)
        told = {"sample_size": _SIDE, **(_untold(found) if chosen is None else told)}
    merged = {**told, **configs[found], **given}
    return SingleFile(path, found, {k: v for k, v in merged.items() if k in known}, weights)


def _untold(class_name: str) -> dict[str, Any]:
    """The constants of latents that no shape tells."""
    return {} if class_name in _SCALED_ALREADY else dict.fromkeys(_SCALING)


def _configs(path: Path, weights: Mapping[str, _Stored]) -> Configs:
    """The configurations that the shapes of the weights suit, by class."""
    try:
        return find_configs({name: stored.shape for name, stored in weights.items()})
    except RBLNCompileError as error:
        raise RBLNCompileError(
            f"{path} looks like an autoencoder, but {error}. It is damaged, or of a model that "
            "isn't supported."
        ) from None


def _suiting(configs: Configs, kind: str, path: Path) -> Configs:
    """Those of the kind."""
    chosen = find_kind(kind)
    latents = {name: _latent_channels(config) for name, config in configs.items()}
    suiting = {name: configs[name] for name in configs if chosen.suits(name, latents[name])}
    if suiting:
        return suiting
    kinds = [
        name
        for name, other in KINDS.items()
        if any(other.suits(each, latents[each]) for each in configs)
    ]
    wanted = chosen.latent_channels
    channels = "" if wanted is None else f" with {wanted} latent channels"
    name = next(iter(configs))
    raise ValueError(
        f"kind={kind!r} is an {chosen.class_names[0]}{channels}, but {path} holds an {name} with "
        f"{latents[name]} latent channels. "
        + (f"Kinds that fit: {', '.join(kinds)}." if kinds else "No kind fits: leave it out.")
    )


def _latent_channels(config: Mapping[str, Any]) -> int | None:
    found = config.get("latent_channels", config.get("z_dim"))
    return found if isinstance(found, int) else None


def _options(class_name: str, path: Path) -> list[str]:
    """The names in the configuration of a class of diffusers."""
    import diffusers

    original: Any = getattr(diffusers, class_name, None)
    if not hasattr(original, "load_config"):
        raise RBLNCompileError(
            f"The configuration for {path} is that of a {class_name}, which diffusers doesn't have."
        )
    return list(inspect.signature(original).parameters)


def _given_config(
    config: Mapping[str, Any] | str | os.PathLike[str] | None, subfolder: str | None
) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return {k: v for k, v in (config or {}).items() if k not in _BOOKKEEPING}
    file = Path(config)
    if file.is_dir():
        file = file / (subfolder or "") / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"config={str(config)!r} is no directory with a config.json ({error}). Name one, or "
            "pass a dict. The hub is not asked."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no configuration, but a {type(found).__name__}.")
    return _given_config(found, None)


def _weights(path: Path) -> dict[str, _Stored]:
    """Where each weight is, by its name in diffusers."""
    weights, parts = _weights_of(path)
    if len(parts) == 1:
        (part,) = parts
        (other,) = set(_PARTS) - parts
        named = path if part in path.name else path.with_stem(f"{path.stem}_{part}")
        partner = named.with_name(named.name.replace(part, other))
        if named != path or not partner.is_file():
            raise RBLNCompileError(
                f"{path} holds the {part} alone. Put the {other} beside it; the two files must "
                f"have names such as {named.name} and {partner.name}."
            )
        more, _ = _weights_of(partner)
        weights |= more
    return weights


def _weights_of(path: Path) -> tuple[dict[str, _Stored], set[str]]:
    """The weights in one file, and which of encoder and decoder there are."""
    with _opened(path) as opened:
        weights = {}
        for key, name in names_in_diffusers(opened.keys(), str(path)).items():
            stored = opened.get_slice(key)
            shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
            _check_dtype(key, name, dtype, _DTYPES, path)
            weights[name] = _Stored(path, key, shape)
    parts = {name.split(".")[0] for name in weights}
    return weights, parts & set(_PARTS)


def _check_dtype(
    key: str, name: str, dtype: object, known: Sequence[object], where: str | Path
) -> None:
    if dtype not in known and name != _COUNTER:
        raise RBLNCompileError(
            f"{key} in {where} has the dtype {dtype}, expected one of "
            f"{', '.join(map(str, known))}. Quantised weights can't be compiled: convert them "
            "first."
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as opened:
            yield opened
    except SafetensorError as error:
        raise OSError(
            f"{path} can't be read as a safetensors file ({error}). It is damaged, incomplete or "
            "of another format: get it again."
        ) from error
