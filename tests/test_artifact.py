"""The `.rbln` file: what is written comes back, and whatever else is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from graphs import captured, evaluate, graph_of_every_kind, paths, small_graph
from safetensors.torch import save_file
from vaes import noise

from rbln_vae.artifact import Artifact, read_artifact
from rbln_vae.errors import RBLNArtifactError
from rbln_vae.graph.ir import Conv2d, Graph
from rbln_vae.graph.passes import optimise
from rbln_vae.graph.stored import store

SOURCE = {"model": "someone/vae", "class": "AutoencoderKL", "sha256": "ab" * 32}


def artifact(graph: Graph | None = None, **changes: Any) -> Artifact:
    small = small_graph(Conv2d("y", "x", "w", "b"), channels=2, w=(1, 2, 1, 1), b=(1,))
    made = Artifact(graph or small, "reference", "float32", SOURCE)
    return dataclasses.replace(made, **changes)


def written(path: Path, made: Artifact | None = None) -> bytes:
    (made or artifact()).save(path)
    return path.read_bytes()


def assert_equal(one: Artifact, other: Artifact) -> None:
    assert store(one.graph) == store(other.graph)
    assert one.graph.weights.keys() == other.graph.weights.keys()
    for name, weight in one.graph.weights.items():
        assert weight.shape == other.graph.weights[name].shape
        assert one.packed is not None or torch.equal(weight, other.graph.weights[name])
    assert (one.packed is None) == (other.packed is None)
    for name, tensor in (one.packed or {}).items():
        assert tensor.dtype == (other.packed or {})[name].dtype
        assert torch.equal(tensor, (other.packed or {})[name])
    for name in ("target", "dtype", "version"):
        assert getattr(one, name) == getattr(other, name)
    assert dict(one.source) == dict(other.source)


# An independent writer, after docs/artifact.md


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Header of safetensors, description, and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["rbln_vae"]), data[8 + length :]


def sealed(
    header: dict[str, Any], description: Any, tensors: bytes, line: int = 64, shift: int = 0
) -> bytes:
    """A file with a right checksum, whatever it says otherwise.

    Its tensors begin `shift` bytes after a multiple of `line`.
    """
    if isinstance(description, dict) and "checksum" in description:
        description["checksum"] = "0" * 32
    text = (
        description
        if isinstance(description, str)
        else json.dumps(description, separators=(",", ":"))
    )
    header = {**header, "__metadata__": {"rbln_vae": text}}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * ((shift - 8 - len(head)) % line)
    data = struct.pack("<Q", len(head)) + head + tensors
    digest = xxhash.xxh3_128_hexdigest(data).encode()
    return data.replace(b'\\"checksum\\":\\"' + b"0" * 32, b'\\"checksum\\":\\"' + digest, 1)


# Round trip


@pytest.mark.parametrize(
    "graph",
    [graph_of_every_kind, lambda: captured("encoder"), lambda: optimise(captured("decoder"))],
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_comes_back(tmp_path: Path, graph: Callable[[], Graph], dtype: str) -> None:
    made = artifact(graph(), dtype=dtype, version="1.2.3", target="cpu")
    made.save(tmp_path / "part.rbln")
    again = read_artifact(tmp_path / "part.rbln")
    assert_equal(again, made)
    assert again.path == tmp_path / "part.rbln"
    image = noise(1, made.graph.input_channels, 8, 8)
    assert torch.equal(evaluate(again.graph, image), evaluate(made.graph, image))


def test_packed_weights_come_back_beside_the_shapes_of_the_graph(tmp_path: Path) -> None:
    packed = {"w": torch.randn(7).bfloat16(), "v": torch.randn(5).half(), "other": torch.randn(3)}
    made = artifact(packed=packed)
    made.save(tmp_path / "part")
    again = read_artifact(tmp_path / "part")
    assert_equal(again, made)
    assert all(weight.is_meta for weight in again.graph.weights.values())
    assert again.graph.flops((1, 2, 4, 4)) == made.graph.flops((1, 2, 4, 4))


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    graph = optimise(captured("decoder"))
    one = written(tmp_path / "one", artifact(graph))
    turned = dataclasses.replace(graph, weights=dict(reversed(list(graph.weights.items()))))
    assert written(tmp_path / "two", artifact(turned)) == one
    assert written(tmp_path / "three", read_artifact(tmp_path / "one")) == one


def test_an_artifact_may_replace_the_file_that_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "part"
    before = written(path, artifact(captured("decoder")))
    assert written(path, read_artifact(path)) == before


def test_weights_of_any_strides_and_shared_ones_are_written(tmp_path: Path) -> None:
    matrix = torch.randn(4, 4)
    first, second = matrix.t()[:, :, None, None], matrix[:, :, None, None]
    graph = small_graph(
        Conv2d("a", "x", "v", None), Conv2d("b", "a", "w", None), Conv2d("y", "b", "u", None)
    )
    graph = dataclasses.replace(graph, weights={"v": first, "w": second, "u": second})
    made = artifact(graph)
    made.save(tmp_path / "part")
    assert_equal(read_artifact(tmp_path / "part"), made)


def test_the_documented_rule_writes_the_same_file(tmp_path: Path) -> None:
    data = written(tmp_path / "part", artifact(graph_of_every_kind()))
    assert sealed(*parts(data)) == data


def test_it_is_a_safetensors_file_with_one_key(tmp_path: Path) -> None:
    header, description, _ = parts(written(tmp_path / "part"))
    assert list(header["__metadata__"]) == ["rbln_vae"]
    assert list(description) == [
        "format_version", "checksum", "library_version", "target", "dtype", "source", "graphs",
        "shapes",
    ]  # fmt: skip
    assert description["format_version"] == 5 and description["source"] == SOURCE


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    graph = small_graph(Conv2d("y", "x", "w", None), w=(1024, 4, 32, 32))
    artifact(graph).save(tmp_path / "large")
    again = read_artifact(tmp_path / "large")
    weight = again.graph.weights["w"]
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in maps if line.endswith("/large")]
    address = weight.data_ptr()
    assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def many_sizes() -> Artifact:
    """Packed tensors of whole lines and not, in two dtypes, in no order."""
    sizes = {"e": 5, "a": 16, "d": 48, "b": 3, "c": 64, "f": 1}
    halves = {f"{name} in half": torch.randn(size).bfloat16() for name, size in sizes.items()}
    return artifact(packed={name: torch.randn(size) for name, size in sizes.items()} | halves)


def test_tensors_of_whole_lines_begin_on_a_line_of_the_file(tmp_path: Path) -> None:
    made = many_sizes()
    data = written(tmp_path / "part", made)
    header, _, tensors = parts(data)
    del header["__metadata__"]
    begin, end, ended = len(data) - len(tensors), 0, False
    assert begin % 64 == 0
    for name, entry in header.items():
        assert entry["data_offsets"][0] == end
        tensor = (made.packed or {})[name]
        assert (begin + end) % tensor.element_size() == 0
        whole = tensor.nbytes % 64 == 0
        assert not (whole and ended)
        assert not whole or (begin + end) % 64 == 0
        ended, end = ended or not whole, entry["data_offsets"][1]
    assert ended and end == len(tensors)
    again = read_artifact(tmp_path / "part")
    assert_equal(again, made)
    for tensor in (again.packed or {}).values():
        assert tensor.nbytes % 64 != 0 or tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("shift", [0, 8, 40])
def test_tensors_may_lie_in_any_order_and_place(tmp_path: Path, shift: int) -> None:
    made = many_sizes()
    header, description, tensors = parts(written(tmp_path / "part", made))
    del header["__metadata__"]
    moved, turned = b"", {}
    for name, entry in sorted(header.items(), key=lambda item: item[0]):
        start, end = entry["data_offsets"]
        moved += tensors[start:end]
        turned[name] = {**entry, "data_offsets": [len(moved) - end + start, len(moved)]}
    (tmp_path / "part").write_bytes(sealed(turned, description, moved, shift=shift))
    assert_equal(read_artifact(tmp_path / "part"), made)


# Damage


@pytest.mark.parametrize("value", [0x01, 0x20, 0x80, 0xFF])
def test_a_change_of_any_byte_is_noticed(tmp_path: Path, value: int) -> None:
    path = tmp_path / "part"
    data = bytearray(written(path))
    assert len(data) < 1500
    for place in range(len(data)):
        data[place] ^= value
        path.write_bytes(data)
        with pytest.raises(RBLNArtifactError):
            read_artifact(path)
        data[place] ^= value
    path.write_bytes(data)
    assert_equal(read_artifact(path), artifact())


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = written(tmp_path / "part")
    for length in range(len(data)):
        (tmp_path / "part").write_bytes(data[:length])
        with pytest.raises(RBLNArtifactError):
            read_artifact(tmp_path / "part")


@pytest.mark.parametrize("more", [b"\0", b"\0" * 8, b"x" * 4096])
def test_bytes_after_the_end_are_refused(tmp_path: Path, more: bytes) -> None:
    data = written(tmp_path / "part")
    (tmp_path / "part").write_bytes(data + more)
    with pytest.raises(RBLNArtifactError, match="damaged"):
        read_artifact(tmp_path / "part")


FOREIGN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "can't be read"),
    "one byte": (b"\x01", "no header"),
    "text": (b"This is a letter, not a model.\n" * 9, "no header"),
    "zeros": (bytes(4096), "header doesn't describe"),
    "a header longer than the file": (struct.pack("<Q", 1 << 62) + b"{}", "no header"),
    "a zip archive, as pickles are in": (b"PK\x03\x04" + bytes(99), "no header"),
    "a header of brackets": (struct.pack("<Q", 200_000) + b"[" * 200_000, "doesn't describe"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    data, message = FOREIGN[name]
    (tmp_path / "part").write_bytes(data)
    with pytest.raises(RBLNArtifactError, match=message):
        read_artifact(tmp_path / "part")


def test_weights_of_diffusers_are_refused_with_advice(tmp_path: Path) -> None:
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "part", {"format": "pt"})
    with pytest.raises(RBLNArtifactError, match="export=True"):
        read_artifact(tmp_path / "part")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RBLNArtifactError, match=r"There is no .*part"):
        read_artifact(tmp_path / "part")
    with pytest.raises(RBLNArtifactError, match="can't be read"):
        read_artifact(tmp_path)


def at(item: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        item = item[key]
    return item


@pytest.mark.parametrize("version", [6, 0, "2", None, True, 2.0, [2]])
def test_another_format_version_is_refused_by_its_number(tmp_path: Path, version: Any) -> None:
    header, description, tensors = parts(written(tmp_path / "part"))
    description["format_version"] = version
    (tmp_path / "part").write_bytes(sealed(header, description, tensors))
    message = re.escape(f"format version {version!r}")
    with pytest.raises(RBLNArtifactError, match=f"{message}.*[Uu]pgrade"):
        read_artifact(tmp_path / "part")


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_older_format_versions_are_to_be_compiled_again(tmp_path: Path, version: int) -> None:
    header, description, tensors = parts(written(tmp_path / "part"))
    description["format_version"] = version
    (tmp_path / "part").write_bytes(sealed(header, description, tensors))
    with pytest.raises(RBLNArtifactError, match=r"reads version 5\. Compile the model again\.$"):
        read_artifact(tmp_path / "part")


@pytest.mark.parametrize("depth", [100, 900, 990, 2_000, 20_000, 200_000])
@pytest.mark.parametrize("brackets", ["[]", '{"a":}'])
@pytest.mark.parametrize("field", ["graphs", "source", "shapes", "format_version"])
def test_nesting_of_any_depth_is_refused(
    tmp_path: Path, depth: int, brackets: str, field: str
) -> None:
    header, description, tensors = parts(written(tmp_path / "part"))
    description[field], description["checksum"] = "@", "0" * 32
    text = json.dumps(description, separators=(",", ":"))
    bomb = brackets[:-1] * depth + "0" + brackets[-1] * depth
    (tmp_path / "part").write_bytes(sealed(header, text.replace('"@"', bomb), tensors))
    with pytest.raises(RBLNArtifactError):
        read_artifact(tmp_path / "part")


CHANGED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "a tensor of another shape": (("w", "shape"), [2, 1, 1, 1]),
    "a tensor of another rank": (("w", "shape"), [2]),
    "a tensor of another type": (("w", "dtype"), "I32"),
    "a tensor of half the precision": (("w", "dtype"), "BF16"),
    "a type that nothing has": (("w", "dtype"), "F7"),
    "tensors that overlap": (("b", "data_offsets"), [0, 8]),
    "a tensor beyond the end": (("b", "data_offsets"), [8, 1 << 40]),
    "a negative offset": (("b", "data_offsets"), [-4, 4]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, name: str) -> None:
    (tensor, entry), value = CHANGED[name]
    header, description, tensors = parts(written(tmp_path / "part"))
    header[tensor][entry] = value
    (tmp_path / "part").write_bytes(sealed(header, description, tensors))
    with pytest.raises(RBLNArtifactError, match="is not valid"):
        read_artifact(tmp_path / "part")


DESCRIBED: dict[str, tuple[str, Any]] = {
    "a dtype that is none": ("dtype", "int8"),
    "a target that is a number": ("target", 3),
    "a version that is a list": ("library_version", []),
    "a source that is a text": ("source", "here"),
    "a source with a list": ("source", {"sha256": []}),
    "graphs that are a text": ("graphs", "{}"),
    "graphs that are an object": ("graphs", {}),
    "no graph": ("graphs", []),
    "a graph that is a text": ("graphs", ["{}"]),
    "a graph that is null": ("graphs", [None]),
    "two graphs": ("graphs", [store(artifact().graph)] * 2),
    "shapes that are a list": ("shapes", []),
    "a shape that is a number": ("shapes", {"w": 2, "b": [1]}),
    "a negative shape": ("shapes", {"w": [1, 2, 1, 1], "b": [-1]}),
    "a shape of another weight": ("shapes", {"w": [2, 2, 1, 1], "b": [1]}),
    "a shape beyond any memory": ("shapes", {"w": [1, 2, 1 << 30, 1 << 30], "b": [1]}),
    "a shape too few": ("shapes", {"w": [1, 2, 1, 1]}),
}


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_description_of_something_else_is_refused(tmp_path: Path, name: str) -> None:
    key, value = DESCRIBED[name]
    header, description, tensors = parts(written(tmp_path / "part"))
    for change in (lambda: description.update({key: value}), lambda: description.pop(key)):
        change()
        (tmp_path / "part").write_bytes(sealed(header, description, tensors))
        with pytest.raises(RBLNArtifactError, match="is not valid"):
            read_artifact(tmp_path / "part")


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 1 << 31, 1 << 63, 10**400, 0.5, -0.0, float("inf"),
    float("nan"), "", "x", "w", "n", "hw", "silu", "Conv2d", "F32", "BF16", "F64", "F4", "F8_E4M3",
    "F8_E8M0", "C64", "U64", "BOOL", "I8", "\ud800", "\0", [], {}, [0], [1, 2], [0, 0], [0, 4],
    [1, -1, 0, 0], [[[]]], {"kind": "Add"}, [1 << 40, 1 << 40], [0, 1 << 63],
]  # fmt: skip


def mutation(data: bytes, generator: random.Random) -> bytes:
    """The file with something else somewhere, and with a right checksum most of the time."""
    header, description, tensors = parts(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        document = generator.choice([header, description, description["graphs"]])
        if not isinstance(document, (dict, list)):
            continue
        path = generator.choice([p for p in paths(document) if p] or [()])
        if not path or path[0] == "__metadata__":
            continue
        holder, key = at(document, path[:-1]), path[-1]
        action = generator.randrange(4)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[generator.choice(["w", "kind", "", "zz"])] = holder[key]
        else:
            holder[key] = generator.choice(VALUES)
        if not isinstance(description.get("graphs"), (dict, list)):
            break
    header = {k: v for k, v in header.items() if k != "__metadata__"}
    if generator.random() < 0.2:
        cut = generator.randrange(len(tensors) + 1)
        tensors = tensors[:cut] + bytes(generator.randrange(64))
    changed = sealed(header, description, tensors)
    if generator.random() < 0.1:
        place = generator.randrange(len(changed))
        changed = changed[:place] + bytes([generator.randrange(256)]) + changed[place + 1 :]
    return changed


CHILD = """
import sys, pathlib, torch
from rbln_vae.artifact import read_artifact
from rbln_vae.errors import RBLNArtifactError
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    try:
        found = read_artifact(path)
    except RBLNArtifactError:
        print(path.name, "refused", flush=True)
        continue
    found.graph.verify()
    assert isinstance(found.target, str) and all(
        isinstance(text, str) for item in found.source.items() for text in item
    )
    for weight in found.graph.weights.values():
        assert weight.dtype == torch.float32
        weight.sum()  # reads every page
    print(path.name, "valid", flush=True)
"""


def test_mutated_artifacts_are_refused_or_valid_and_crash_nothing(tmp_path: Path) -> None:
    """In a process of its own, which a crash would end. Every file that loads is a whole model."""
    generator = random.Random(2)
    originals = [
        written(tmp_path / "small"),
        written(tmp_path / "every", artifact(graph_of_every_kind())),
    ]
    files = tmp_path / "files"
    files.mkdir()
    count = 1000
    for index in range(count):
        data = mutation(originals[index % 2], generator)
        (files / f"{index:04}").write_bytes(data)
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(files)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout[-200:] + result.stderr[-2000:]
    answers = [line.split()[1] for line in result.stdout.splitlines()]
    assert len(answers) == count
    assert answers.count("refused") > count // 2 and answers.count("valid") > 0


# Writing


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(tmp_path / "part")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rbln_vae.artifact._write", full)
    with pytest.raises(RBLNArtifactError, match="No space left"):
        artifact(graph_of_every_kind()).save(tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


def test_a_directory_that_is_missing_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RBLNArtifactError, match="can't be written"):
        artifact().save(tmp_path / "none" / "part")
