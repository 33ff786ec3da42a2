"""The code in the README and in the guides runs as it stands there, with tiny models.

The blocks of a document run in their order, in a directory that has what the text speaks of. A
block that can't run here has a comment in front of it that says why, as
`<!-- not run: needs ComfyUI -->`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import tiny_vaes
import torch
from layouts import ldm
from pictures import picture
from safetensors.torch import save_file
from services import ask, make_app, running
from typer.testing import CliRunner
from vaes import noise

import rbln_vae
from rbln_vae import RBLNAutoencoderKL
from rbln_vae.cli import app
from rbln_vae.serving import server
from rbln_vae.serving.models import ServedModel
from rbln_vae.videos import write_video

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "```" in file.read_text(encoding="utf-8")
)
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
SMALLER: dict[str, list[tuple[str, str]]] = {
    "README.md": [
        ("=512", "=64"),
        ("--size 4096", "--size 64"),
        ("LATENTS", "LATENTS --size 64"),
        ("OUT MODEL", "OUT MODEL --tolerance 0.1"),  # random weights enlarge any rounding
    ],
    "docs/datasets.md": [("1024", "64"), ("--format sd", "--min-bucket 32 --format sd")],
    "docs/gpu.md": [('rbln_target="cuda"', 'rbln_target="reference"'), (r"\.cuda\(\)", "")],
    "docs/memory.md": [("2048", "64"), ("1000, 3, 512, 512", "4, 3, 64, 64")],
    "docs/trainers/ai-toolkit.md": [("1024", "64")],
    "docs/trainers/musubi.md": [("1024", "64")],
    "docs/trainers/sd-scripts.md": [("1024", "64"), ("2048", "128 --min-bucket 32")],
    "docs/video.md": [("480x832 --frames 81", "32x48 --frames 5")],
}
"""What is put in place of sizes that take long, and of devices that aren't here."""


@dataclass(frozen=True)
class Block:
    """A piece of code in a document.

    Attributes:
        document: Its path from the root of the repository.
        line: The line of its first line of code.
        language: What follows the fence: `python`, `sh`, `json` or `text`.
        code: What stands there.
        reason: Why it can't run here, if it can't.
    """

    document: str
    line: int
    language: str
    code: str
    reason: str | None

    @property
    def smaller_code(self) -> str:
        """The code with the replacements of its document."""
        code = self.code
        for pattern, replacement in SMALLER.get(self.document, []):
            code = re.sub(pattern, replacement, code)
        return code


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return [
        Block(
            document,
            text.count("\n", 0, found.start("code")) + 1,
            found["language"],
            found["code"],
            found["reason"],
        )
        for found in BLOCK.finditer(text)
    ]


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the models and the pictures of which the documents speak."""
    monkeypatch.chdir(tmp_path)
    vae = tiny_vaes.make()
    for name in ("MODEL", "model", "vae", "stabilityai/sdxl-vae"):
        vae.save_pretrained(name)
    for name in ("stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"):
        vae.save_pretrained(f"{name}/vae")
        Path(name, "model_index.json").write_text(
            json.dumps({"_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"]})
        )
    tiny_vaes.make("AutoencoderKLQwenImage").save_pretrained("Qwen/Qwen-Image/vae")
    for number in range(9):
        file = Path("photos", "cats" if number % 2 else "", f"{number}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(file)
    picture(1).save("photo.jpg")
    Path("DIR").mkdir()
    picture(2).save("DIR/picture.png")
    return tmp_path


def make_single_files() -> None:
    """A VAE of the width of FLUX.1's, as its authors store it and as Z-Image does."""
    width = {"block_out_channels": (32,) * 4, "norm_num_groups": 32, "latent_channels": 16}
    without = {"use_quant_conv": False, "use_post_quant_conv": False}
    state = tiny_vaes.make(**width, **without).state_dict()
    save_file(
        {name: each.contiguous() for name, each in ldm(state).items()}, "flux-vae.safetensors"
    )
    save_file(state, "z-image-vae.safetensors")


def names_for(document: str) -> dict[str, Any]:
    """What a reader has made before the first block, as the text around it says."""
    channels = 16 if document == "docs/models.md" else 4
    frame = (1,) if document == "docs/models.md" else ()
    names: dict[str, Any] = {
        "latent": noise(1, channels, *frame, 8, 8),
        "latents": noise(4, channels, *frame, 8, 8),
        "window": SimpleNamespace(closed=True),
    }
    if document in ("docs/memory.md", "docs/pipelines.md", "docs/serving.md"):
        vae = RBLNAutoencoderKL.from_pretrained("vae", export=True, rbln_target="cpu")
        vae.save_pretrained("compiled-vae")
        names["vae"] = vae
    if document == "docs/pipelines.md":
        pipe = tiny.PIPELINES["sd"].build()
        pipe.save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    elif document == "docs/serving.md":
        tiny_vaes.make().save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5/vae")
        Path("stable-diffusion-v1-5/stable-diffusion-v1-5/model_index.json").write_text(
            json.dumps({"_class_name": "Pipeline", "vae": ["diffusers", "AutoencoderKL"]})
        )
        names["image"] = picture(3)
    elif document == "docs/video.md":
        tiny_vaes.make("AutoencoderKLWan").save_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers/vae")
        write_video("clip.mp4", [torch.full((32, 48, 3), 50 * n).byte() for n in range(5)], fps=8)
        names["latent"], names["frames"] = noise(1, 16, 2, 4, 6), noise(1, 3, 5, 32, 48)
        names["show"], names["memory_map"] = list[Any]().append, torch.empty(1, 3, 5, 32, 48)
    elif document.startswith(("docs/trainers", "docs/datasets")):
        make_single_files()
    return names


@contextlib.contextmanager
def service(document: str, names: dict[str, Any]) -> Iterator[str]:
    """The address of the service that the guide to serving has started; another's is empty."""
    if document != "docs/serving.md":
        yield ""
        return
    with running(make_app(ServedModel("compiled-vae", names["vae"]))) as address:
        yield address


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answers a question, instead of all until a signal comes; gives the addresses."""
    addresses = []

    def make_server(application: Any, address: Any, listening: Any) -> Any:
        def run() -> None:
            listening(address.port)
            assert ask(application, "GET", "/ready").status == 200
            addresses.append(f"{address.host}:{address.port}")

        return SimpleNamespace(run=run)

    monkeypatch.setattr(server, "make_server", make_server)
    return addresses


def run_shell(code: str) -> None:
    """Run the commands of this package, and check those that install it or make something."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "rbln-vae":
            result = CliRunner().invoke(app, words[1:])
            assert result.exit_code == 0, f"{line}\n{result.output}"
        elif words[:2] == ["pip", "install"]:
            name, extras = re.fullmatch(r"(rbln-vae|\.)(?:\[([\w,]+)\])?", words[2]).groups()
            offered = metadata("rbln-vae").get_all("Provides-Extra") or []
            assert name and {*(extras or "").split(",")} - {""} <= {*offered}
        elif words[0] == "make":
            assert re.search(f"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            pytest.fail(f"say in a comment why `{line}` can't run here")


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_code_of_a_document_runs(document, directory, served):
    names = names_for(document)
    with service(document, names) as address:
        for block in blocks(document):
            code = block.smaller_code.replace("http://127.0.0.1:8000", address)
            if block.reason:
                continue
            if block.language == "python":
                # Blank lines in front, so that an error names the line of the document.
                lines = "\n" * (block.line - 1) + code
                exec(compile(lines, ROOT / document, "exec"), names)
            elif block.language == "sh":
                run_shell(code)
            elif block.language == "json":
                json.loads(code)
            else:
                assert block.language == "text", f"{document}:{block.line}: in which language?"


def test_what_documents_serve_is_ready(directory, served):
    run_shell("rbln-vae serve vae --port 8123")
    assert served == ["127.0.0.1:8123"]


@pytest.mark.parametrize("code", ["docker run it", "rbln-vae compile nothing OUT"])
def test_a_command_that_fails_is_found(code, directory):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_shell(code)


@pytest.mark.parametrize("name", rbln_vae.__all__)
def test_the_reference_has_every_public_name(name):
    pages = "".join(file.read_text() for file in (ROOT / "docs" / "reference").glob("*.md"))
    module = "rbln_vae.errors" if name.endswith("Error") else f"rbln_vae.{name}"
    assert name == "__version__" or re.search(rf"^::: {module}$", pages, re.MULTILINE)
