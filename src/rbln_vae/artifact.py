"""The `.rbln` file: the graphs of a part and their weights in a safetensors file.

docs/artifact.md describes it. The file contains only data, no code. A checksum covers every
byte, and is verified before anything else in the file is used.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from .config import DTYPES
from .errors import RBLNArtifactError
from .files import atomic_path
from .graph.ir import Graph, GraphError
from .graph.stored import restore, store
from .version import __version__

FORMAT = "rbln_vae"
FORMAT_VERSION = 5
SUFFIX = ".rbln"

_NO_CHECKSUM = "0" * 32
_LARGEST_HEADER = 100_000_000  # the limit that safetensors itself sets
_LINE = 64  # bytes of a cache line, to which tensors are aligned

# The name of each dtype in safetensors, and integers of its size, also in little-endian order.
_STORED = {
    torch.float32: ("F32", torch.int32, "<i4"),
    torch.int32: ("I32", torch.int32, "<i4"),
    torch.float16: ("F16", torch.int16, "<i2"),
    torch.bfloat16: ("BF16", torch.int16, "<i2"),
}


@dataclass(frozen=True)
class Artifact:
    """One compiled part of a model, in memory or mapped from a file.

    Attributes:
        graph: The graph, of a part that runs videos that of later runs. Its weights are float32
            or, with `packed`, only shapes on the meta device.
        target: The name of the target that it was compiled for.
        dtype: The dtype of the computation: `"float32"`, `"float16"` or `"bfloat16"`.
        source: The source of the part: the model's id or class, and the `sha256` of its
            weights.
        version: The version of the package that compiled it.
        path: The file, if it was loaded from one.
        packed: The weights in the order in which the target reads them, if the target has its
            own order.
    """

    graph: Graph
    target: str
    dtype: str
    source: Mapping[str, str] = field(default_factory=dict)
    version: str = __version__
    path: Path | None = None
    packed: Mapping[str, torch.Tensor] | None = None

    @property
    def part(self) -> str:
        """The name of the part of the model."""
        return self.graph.name

    @property
    def in_channels(self) -> int:
        """The number of channels of the input."""
        return self.graph.input_channels

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The picklers of torch.multiprocessing would move the weights, which runtimes read.
        raise TypeError(
            "A compiled part can't be pickled. Save it, and load it in the other process."
        )

    def save(self, path: Path) -> None:
        """Write the file atomically: a crash leaves the old file or none.

        Args:
            path: The file to write; its directory must exist.

        Raises:
            RBLNArtifactError: The file can't be written, for example because the disk is full.
        """
        description = {
            "format_version": FORMAT_VERSION,
            "checksum": _NO_CHECKSUM,
            "library_version": self.version,
            "target": self.target,
            "dtype": self.dtype,
            "source": dict(self.source),
            "graphs": [store(each) for each in self._graphs],
            "shapes": self._shapes_of_packed_weights(),
        }
        weights = _in_order(self.graph.all_weights if self.packed is None else self.packed)
        header = _header_of(description, weights)
        try:
            with atomic_path(path) as temporary:
                _write(temporary, header, weights.values())
        except OSError as error:
            raise RBLNArtifactError(
                f"{path} can't be written: {error}. No partial file was left; free some space or "
                "choose another directory."
            ) from error

    @property
    def _graphs(self) -> list[Graph]:
        """The graphs in the order of runs."""
        return [self.graph] if self.graph.first is None else [self.graph.first, self.graph]

    def _shapes_of_packed_weights(self) -> dict[str, list[int]] | None:
        if self.packed is None:
            return None
        return {name: list(weight.shape) for name, weight in self.graph.all_weights.items()}


def _in_order(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in the order of the file.

    Tensors of whole cache lines come first, so each of them begins on a line. The others follow
    by decreasing element size, so each of them is aligned to its elements.
    """

    def place(item: tuple[str, torch.Tensor]) -> tuple[bool, int, str]:
        name, weight = item
        return (weight.nbytes % _LINE != 0, -weight.element_size(), name)

    return dict(sorted(weights.items(), key=place))


def _header_of(description: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> bytes:
    """The header of safetensors after its length, padded to whole cache lines."""
    # A single key, because readers do not keep the order of several keys.
    text = json.dumps(description, separators=(",", ":"))
    entries: dict[str, Any] = {"__metadata__": {FORMAT: text}}
    end = 0
    for name, weight in weights.items():
        start, end = end, end + weight.nbytes
        entries[name] = {
            "dtype": _STORED[weight.dtype][0],
            "shape": list(weight.shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % _LINE)
    return struct.pack("<Q", len(header)) + header


def _write(path: Path, header: bytes, weights: Iterable[torch.Tensor]) -> None:
    """Write a file with zeros as its checksum, then overwrite them with the checksum."""
    digest = xxhash.xxh3_128(header)
    with path.open("wb") as file:
        file.write(header)
        for weight in weights:
            data = _little_endian(weight)
            digest.update(data)
            file.write(data)
        file.seek(_place_of_digits(header, _NO_CHECKSUM))
        file.write(digest.hexdigest().encode())


def _little_endian(weight: torch.Tensor) -> memoryview:
    _, integers, order = _STORED[weight.dtype]
    data: NDArray[Any] = weight.detach().contiguous().reshape(-1).view(integers).numpy()
    return data.astype(order, copy=False).data


def read_artifact(path: Path) -> Artifact:
    """Map a `.rbln` file after verifying every byte of it.

    Args:
        path: The file.

    Returns:
        The artifact; its weights are views of the file.

    Raises:
        RBLNArtifactError: The file is missing, damaged, not a `.rbln` file or of another
            version, or its graph is not valid. Nothing in it has been used then.
    """
    description = _checked_description(path)
    try:
        with safe_open(path, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        shapes = description["shapes"]
        weights = tensors if shapes is None else _of_shapes(shapes)
        graph = restore(description["graphs"], weights)
        texts = {name: description[name] for name in ("target", "dtype", "library_version")}
        source = description["source"]
        if not all(isinstance(text, str) for text in texts.values()):
            raise GraphError("target, dtype and version must be texts")
        if (
            not isinstance(source, dict)
            or not all(isinstance(text, str) for text in source.values())
            or texts["dtype"] not in DTYPES
        ):
            raise GraphError("the description is not that of a compiled model")
        if any(weight.dtype != torch.float32 for weight in weights.values()):
            raise GraphError("weights must be float32")
    except (GraphError, KeyError, RecursionError, SafetensorError, OSError) as error:
        raise RBLNArtifactError(
            f"{path} is not valid: {error}. Compile the model again."
        ) from error
    return Artifact(
        graph,
        texts["target"],
        texts["dtype"],
        source,
        texts["library_version"],
        path,
        None if shapes is None else tensors,
    )


def _of_shapes(shapes: Any) -> dict[str, torch.Tensor]:
    """Tensors with shapes and no data, for the graph of packed weights."""
    if not isinstance(shapes, dict):
        raise GraphError("shapes must be an object")
    for shape in shapes.values():
        if not isinstance(shape, list) or not all(type(n) is int and 0 < n < 2**31 for n in shape):
            raise GraphError(f"{shape!r} is not the shape of a weight")
        if math.prod(shape) >= 2**48:
            raise GraphError(f"a weight of shape {shape} is too large")
    return {
        name: torch.empty(shape, dtype=torch.float32, device="meta")
        for name, shape in shapes.items()
    }


def _checked_description(path: Path) -> dict[str, Any]:
    """The description in the header, after version and checksum have been verified."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _header(data, path)
            description = _description(header, path)
            _check_sum(data, header, description, path)
            return description
    except FileNotFoundError:
        raise RBLNArtifactError(
            f"There is no {path}. The compiled model is incomplete: save it again."
        ) from None
    except (OSError, ValueError) as error:  # mmap refuses an empty file with a ValueError
        raise RBLNArtifactError(f"{path} can't be read: {error}.") from error


def _header(data: mmap.mmap, path: Path) -> bytes:
    if len(data) >= 8:
        (length,) = struct.unpack("<Q", data[:8])
        if length <= min(len(data) - 8, _LARGEST_HEADER):
            return data[8 : 8 + length]
    raise RBLNArtifactError(
        f"{path} is damaged or not a file of rbln-vae: it has no header. Compile the model again."
    )


def _description(header: bytes, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(json.loads(header)["__metadata__"][FORMAT])
        version = description["format_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RBLNArtifactError(
            f"{path} is damaged or not a file of rbln-vae: its header doesn't describe a compiled "
            "model. Compile the model again; a diffusers model is compiled with export=True."
        ) from None
    if type(version) is not int or version != FORMAT_VERSION:
        older = type(version) is int and 0 < version < FORMAT_VERSION
        raise RBLNArtifactError(
            f"{path} has format version {version!r}, but rbln-vae {__version__} reads version "
            f"{FORMAT_VERSION}. {'' if older else 'Upgrade rbln-vae, or '}"
            f"{'C' if older else 'c'}ompile the model again."
        )
    return dict(description)


def _check_sum(data: mmap.mmap, header: bytes, description: Mapping[str, Any], path: Path) -> None:
    found = description.get("checksum")
    place = _place_of_digits(header, found) if isinstance(found, str) else -1
    if place < 0 or _digest(data, 8 + place) != found:
        raise RBLNArtifactError(
            f"{path} is damaged: its checksum doesn't match its content. Copy it again from where "
            "it came, or compile the model again."
        )


def _place_of_digits(header: bytes, checksum: str) -> int:
    """The position of the checksum's digits, which are JSON within JSON; -1 if there are none."""
    name = b'\\"checksum\\":\\"'
    place = header.find(name + checksum.encode(errors="replace") + b'\\"')
    return place + len(name) if place >= 0 else -1


def _digest(data: mmap.mmap, start: int) -> str:
    """The XXH3-128 of the file, with zeros in place of the checksum's digits."""
    with memoryview(data) as view:
        digest = xxhash.xxh3_128(view[:start])
        digest.update(_NO_CHECKSUM.encode())
        digest.update(view[start + len(_NO_CHECKSUM) :])
    return digest.hexdigest()
