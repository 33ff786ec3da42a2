"""Memory and time of decode against the size of the image, and what tiles do to the pixels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from .machine import threads
from .models import make_model
from .report import RESULTS, write
from .worker import Worker

NAMES = {
    "rbln-vae profiled bf16": "rbln-vae",
    "rbln-vae tiling bf16": "rbln-vae, enable_tiling()",
    "OpenVINO bf16": "OpenVINO",
    "diffusers bf16": "diffusers",
    "diffusers tiled bf16": "diffusers, tiled (other pixels)",
}
TILING = "rbln-vae tiling bf16"
PEERS_UP_TO = 2048
"""Above this size all others need more memory than most machines have."""
WARM_UP_TO = 1024
"""Above this size a run takes so long that a first one is nearly as fast as the next."""


@dataclass(frozen=True)
class Measurement:
    """One run of one contender: seconds, and bytes of peak resident memory of its process."""

    contender: str
    size: int
    seconds: float
    memory: int
    convolutions: float | None = None


def measure(sizes: Sequence[int]) -> list[Measurement]:
    """Decode once with each contender at each size, each time in a new process."""
    results = []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_model(directory)
        for size in sizes:
            for name, title in NAMES.items():
                if size > PEERS_UP_TO and name != TILING:
                    continue
                with Worker(name, directory, "decode", size, threads()) as worker:
                    if size <= WARM_UP_TO:
                        worker.run()
                    answer = worker.run()
                found = Measurement(
                    title,
                    size,
                    answer["seconds"],
                    int(answer["memory"]),
                    answer.get("convolutions"),
                )
                print(
                    f"{size} {title}: {found.seconds:.2f} s, {found.memory / 1e9:.2f} GB",
                    flush=True,
                )
                results.append(found)
    return results


def table(measured: Sequence[Measurement]) -> str:
    """Against OpenVINO at the same size, and our convolutions' time by pixel against 512²."""
    lines = [
        "| decode | | seconds | peak memory | share of OpenVINO's | convolutions by pixel |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    first = {m.contender: m for m in reversed(measured) if m.convolutions is not None}
    for m in measured:
        peer = [o for o in measured if o.contender == "OpenVINO" and o.size == m.size]
        share = f"{m.memory / peer[0].memory:.2f}" if peer else ""
        by_pixel = ""
        if m.convolutions is not None:
            base = first[m.contender]
            assert base.convolutions is not None
            ratio = (m.convolutions / m.size**2) / (base.convolutions / base.size**2)
            by_pixel = f"{m.convolutions / m.size**2 * 1e6:.2f} µs ({ratio - 1:+.0%})"
        lines.append(
            f"| {m.size}² | {m.contender} | {m.seconds:.2f} | {m.memory / 1e9:.2f} GB | {share} | "
            f"{by_pixel} |"
        )
    return "\n".join(lines)


def save(name: str, measured: Sequence[Measurement]) -> Path:
    """Write `NAME.md`, `NAME.json`, `NAME.png` and `seams.png` under `benchmarks/results/`."""
    RESULTS.mkdir(exist_ok=True)
    seams = picture_of_seams(RESULTS / "seams.png")
    chart(measured, RESULTS / f"{name}.png")
    runs = [dataclasses.asdict(m) for m in measured]
    return write(name, f"{table(measured)}\n\n{seams}", {"runs": runs})


def chart(measured: Sequence[Measurement], path: Path) -> None:
    """Memory and time against the size, a line for each contender."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    colors = ("#c0392b", "#e67e22", "#2c3e50", "#7f8c8d", "#bdc3c7")
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 4), layout="constrained")
    values = (lambda m: m.memory / 1e9, lambda m: m.seconds)
    for axis, value, label in zip(
        axes, values, ("peak memory of the process, GB", "seconds"), strict=True
    ):
        for contender, color in zip(NAMES.values(), colors, strict=True):
            runs = [m for m in measured if m.contender == contender]
            axis.plot([m.size for m in runs], [value(m) for m in runs], "o-", color=color)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        sizes = sorted({m.size for m in measured})
        axis.set_xticks(sizes, [f"{s}²" for s in sizes])
        axis.set_xlabel("pixels")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    figure.legend(list(NAMES.values()), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


SEAMS_SIZE = 1024
AMPLIFIED = 20


def picture_of_seams(path: Path) -> str:
    """The error of diffusers' tiled decode against its whole decode, beside ours.

    On a photograph, the shipped checkpoint and float32.

    Returns:
        What the picture shows, in Markdown.
    """
    from diffusers import AutoencoderKL
    from matplotlib import pyplot
    from PIL import Image, ImageOps
    from skimage import data

    from rbln_vae import RBLNAutoencoderKL, demo_model
    from rbln_vae.images import to_tensor
    from rbln_vae.metrics import psnr

    photograph = Image.fromarray(data.coffee())
    sample = to_tensor(ImageOps.fit(photograph, (SEAMS_SIZE, SEAMS_SIZE)))
    theirs = AutoencoderKL.from_pretrained(demo_model()).eval()
    ours = RBLNAutoencoderKL.from_pretrained(demo_model(), export=True, rbln_dtype="float32")
    ours.enable_tiling()
    with torch.no_grad():
        latent = theirs.encode(sample).latent_dist.mode()
        whole = theirs.decode(latent).sample
        # As large as for Stable Diffusion; the checkpoint's own tiles would be smaller.
        theirs.tile_latent_min_size, theirs.tile_sample_min_size = 64, 512
        theirs.enable_tiling()
        tiled = theirs.decode(latent).sample
        mine = ours.decode(latent).sample
    panels = {
        "decoded whole": (whole[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1),
        f"error of diffusers' tiles, x{AMPLIFIED}": (tiled - whole)[0].abs().amax(0) * AMPLIFIED,
        f"error of rbln-vae with enable_tiling(), x{AMPLIFIED}": (mine - whole)[0].abs().amax(0)
        * AMPLIFIED,
    }
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    for axis, (title, image) in zip(axes, panels.items(), strict=True):
        axis.imshow(image.numpy(), cmap="inferno", vmin=0, vmax=1)
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return (
        f"![seams](seams.png)\n\nAgainst the whole decode of diffusers in float32, "
        f"{SEAMS_SIZE}² pixels of a photograph: its tiles reach {psnr(tiled, whole):.1f} dB "
        f"(at worst {float((tiled - whole).abs().max()) / 2:.1%} of the range of a pixel), "
        f"rbln-vae with enable_tiling() {psnr(mine, whole):.1f} dB."
    )
