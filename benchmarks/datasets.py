"""Encoding a data set: throughput, kills, memory, and workers of Ray.

Each case is short and can be run alone. Images are made of the photographs that scikit-image
ships. What is compared runs in turn, and the fastest round of each counts, since others use
the machine too.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from .machine import threads
from .models import Model, make_model
from .report import write

TINY = Model(
    "AutoencoderKL",
    {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "sample_size": 32,
    },
)
"""A model that takes a millisecond, where not the model is measured."""


@dataclass
class Row:
    """A line of the table."""

    case: str
    what: str
    value: str


# Images


def make_images(directory: Path, count: int, megapixels: Sequence[float]) -> None:
    """JPEGs of photographs, evenly from the smallest to the largest, some lying on their side."""
    from skimage import data

    photographs = [data.astronaut(), data.coffee(), data.chelsea(), data.rocket()]
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True)
    for number in range(count):
        share = number / max(1, count - 1)
        pixels = 1e6 * (megapixels[0] + (megapixels[1] - megapixels[0]) * share)
        aspect = (4 / 3, 3 / 4, 3 / 2, 1)[number % 4]
        width, height = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
        image = Image.fromarray(photographs[number % 4]).resize((width, height), Image.BICUBIC)
        # Grain, as of a camera: a smooth enlargement would be decoded too quickly.
        grain = rng.normal(0, 5, (height, width, 1)).astype(np.int8)
        noisy = np.clip(np.asarray(image, np.int16) + grain, 0, 255).astype(np.uint8)
        exif = Image.Exif()
        exif[0x0112] = (1, 6)[number % 2]
        Image.fromarray(noisy).save(directory / f"{number:05d}.jpg", quality=90, exif=exif)


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file below a directory."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


# Throughput


class _Images(torch.utils.data.Dataset[torch.Tensor]):
    """What a trainer's own loop reads: decoded whole, scaled by Lanczos, cropped at the centre."""

    def __init__(self, directory: Path, size: int) -> None:
        self.files, self.size = sorted(directory.iterdir()), size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import ImageOps

        with Image.open(self.files[index]) as opened:
            image = ImageOps.fit(
                ImageOps.exif_transpose(opened).convert("RGB"),
                (self.size, self.size),
                Image.Resampling.LANCZOS,
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def diffusers_loop(vae: Any, images: Path, size: int) -> None:
    """Encode all of it as training scripts do, in the model's dtype and channels_last."""
    loader = torch.utils.data.DataLoader(_Images(images, size), batch_size=1, num_workers=threads())
    with torch.inference_mode():
        for batch in loader:
            sample = batch.to(vae.dtype, memory_format=torch.channels_last)
            vae.encode(sample).latent_dist.parameters.float().numpy()


def throughput(size: int, count: int, rounds: int, peer: bool) -> list[Row]:
    """Files to shards, against the bare encoder, and against a loop with diffusers."""
    from diffusers import AutoencoderKL

    from rbln_vae import RBLNAutoencoderKL
    from rbln_vae.datasets import Options, encode_dataset

    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_images(directory / "images", count, (1, 12))
        make_model(directory / "model")
        ours = RBLNAutoencoderKL.from_pretrained(
            directory / "model",
            export=True,
            rbln_target="cpu",
            rbln_sample_size=size,
            rbln_num_threads=threads(),
            rbln_timeout=3600,
        )
        sample = torch.rand(1, 3, size, size) * 2 - 1
        ours.encode(sample)
        theirs = None
        if peer:
            torch.set_num_threads(threads())
            # Where no instruction multiplies bfloat16, it takes diffusers eight times as long.
            dtype = getattr(torch, ours.resolved_config.dtype_of("encoder"))
            theirs = AutoencoderKL.from_pretrained(directory / "model", torch_dtype=dtype).to(
                memory_format=torch.channels_last
            )
        seconds: dict[str, list[float]] = {"bare": [], "files": [], "diffusers": []}
        waiting, work = [], []
        for number in range(rounds):
            start, used = time.perf_counter(), time.process_time()
            for _ in range(count):
                ours.encode(sample)
            bare = time.process_time() - used
            seconds["bare"].append(time.perf_counter() - start)
            out = directory / f"out-{number}"
            start, used = time.perf_counter(), time.process_time()
            done = encode_dataset(directory / "images", out, ours, Options(sizes=((size, size),)))
            seconds["files"].append(time.perf_counter() - start)
            work.append(bare / (time.process_time() - used))
            waiting.append(done.waiting_share)
            if theirs is not None:
                start = time.perf_counter()
                diffusers_loop(theirs, directory / "images", size)
                seconds["diffusers"].append(time.perf_counter() - start)
    rate = {name: count / min(each) for name, each in seconds.items() if each}
    shares = ", ".join(f"{b / f:.1%}" for b, f in zip(*list(seconds.values())[:2], strict=True))
    rows = [
        Row("throughput", "bare encoder, tensors in memory", f"{rate['bare']:.3f} images/s"),
        Row("throughput", "JPEG files of 1 to 12 megapixels", f"{rate['files']:.3f} images/s"),
        Row(
            "throughput",
            "files against bare, fastest rounds",
            f"{rate['files'] / rate['bare']:.1%}",
        ),
        Row("throughput", "files against bare, round by round", shares),
        Row(
            "throughput",
            "the same in processor time, round by round",
            ", ".join(f"{each:.1%}" for each in work),
        ),
        Row("throughput", "time spent waiting for images", f"{min(waiting):.1%}"),
    ]
    if "diffusers" in rate:
        rows += [
            Row(
                "throughput",
                f"diffusers in a loop, {ours.rbln_config.dtype}",
                f"{rate['diffusers']:.3f} images/s",
            ),
            Row(
                "throughput", "against diffusers", f"{rate['files'] / rate['diffusers']:.2f} times"
            ),
        ]
    return rows


# Kills


def kills(count: int, times: int) -> list[Row]:
    """A job that is killed at random moments, and one that isn't."""
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_images(directory / "images", count, (0.01, 0.05))
        make_model(directory / "model", TINY)
        command = [sys.executable, "-m", "rbln_vae", "encode-dataset", str(directory / "images")]
        options = ["--model", str(directory / "model"), "--size", "64", "--shard-size", "16"]
        start = time.perf_counter()
        subprocess.run([*command, str(directory / "whole"), *options], check=True)
        whole = time.perf_counter() - start
        entries = directory / "killed" / "journal"
        shards = len(list((directory / "whole" / "journal").iterdir()))
        rng = random.Random(0)
        killed = early = 0
        for number in range(times):
            process = subprocess.Popen(
                [*command, str(directory / "killed"), *options], stderr=subprocess.DEVNULL
            )
            # A random moment in the share of the work that this turn may do.
            until = rng.uniform(number, number + 1) * shards / (times + 1)
            while process.poll() is None and (
                not entries.exists() or len(list(entries.iterdir())) < until
            ):
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            early += process.poll() is not None
            process.send_signal(signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        subprocess.run([*command, str(directory / "killed"), *options], check=True)
        same = digests(directory / "whole") == digests(directory / "killed")
    return [
        Row("kills", f"{count} images, undisturbed", f"{whole:.1f} s"),
        Row("kills", "times killed", f"{killed} of {times}"),
        Row("kills", "all files are bit-identical", "yes" if same else "NO"),
    ]


# Memory


def memory(counts: Sequence[int]) -> list[Row]:
    """The peak of a process for each number of samples; the source and the model are simulated."""
    rows = []
    for count in counts:
        command = [sys.executable, "-m", "benchmarks.datasets", str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak, late, seconds = json.loads(done.stdout)
        rows.append(
            Row(
                "memory",
                f"{count:,} samples",
                f"peak {peak / 1e6:.0f} MB, at the end {late / 1e6:.0f} MB, {seconds:.0f} s",
            )
        )
    return rows


def simulate(count: int) -> tuple[int, int, float]:
    """Encode so many samples of a simulated source by an encoder that computes nothing.

    Returns:
        The peak and the last resident bytes of this process, and seconds.
    """
    from rbln_vae.datasets import Options
    from rbln_vae.datasets.encoder import Encoded
    from rbln_vae.datasets.job import open_job
    from rbln_vae.datasets.pictures import Prepared
    from rbln_vae.datasets.pipeline import Progress, encode_splits
    from rbln_vae.datasets.sources import Sample, Split

    content = io.BytesIO()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(content, "BMP")

    @dataclass(frozen=True)
    class Simulated(Split):
        start: int
        end: int

        def fingerprint(self) -> str:
            return f"{self.start} {self.end}"

        def samples(self, start: int = 0) -> Iterator[Sample]:
            for number in range(self.start + start, self.end):
                yield Sample(f"{number:08d}", content.getvalue(), f"caption {number}")

    class Nothing:
        batch_size = at_once = 1

        def encode(self, images: Sequence[Prepared]) -> list[Encoded | None]:
            latent = torch.zeros(4, 4, 4, dtype=torch.float16)
            return [
                Encoded(
                    {
                        "key": image.key,
                        "caption": image.caption,
                        "target_size": list(image.placement.size),
                        "columns": {},
                    },
                    {"mean": latent, "logvar": latent},
                )
                for image in images
            ]

    options = Options(sizes=((32, 32),), shard_size=1000)
    splits = (
        (number, Simulated(start, min(start + 1000, count)))
        for number, start in enumerate(range(0, count, 1000))
    )
    peak, late = 0, 0
    begun = time.perf_counter()
    with TemporaryDirectory() as directory, open_job(Path(directory), options, {}, {}) as job:
        for _ in encode_splits(
            splits, Nothing(), job, options.sizing(8), decoders=2, progress=Progress()
        ):
            late = _resident()
            peak = max(peak, late)
        job.close()
        late = _resident()
    return max(peak, late), late, time.perf_counter() - begun


def _resident() -> int:
    pages = Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# Ray


def steady_rate(out: Path) -> float:
    """Images a second after the first two shards, so without starting actors and models."""
    entries = sorted((out / "journal").iterdir(), key=lambda path: path.stat().st_mtime)
    samples = sum(
        json.loads(each.read_text(encoding="utf-8"))["shard"]["samples"] for each in entries[2:]
    )
    return samples / (entries[-1].stat().st_mtime - entries[1].stat().st_mtime)


def workers(size: int, count: int, rounds: int) -> list[Row]:
    """Two Ray workers of one thread each, against one local worker of two threads."""
    import ray

    from rbln_vae import RBLNAutoencoderKL
    from rbln_vae.datasets import Options, encode_dataset

    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_images(directory / "images", count, (1, 4))
        make_model(directory / "model")
        RBLNAutoencoderKL.from_pretrained(
            directory / "model", export=True, rbln_target="cpu", rbln_sample_size=size
        ).save_pretrained(directory / "compiled")
        options = Options(sizes=((size, size),), shard_size=max(1, count // 4))
        engines: dict[str, dict[str, Any]] = {
            "local": {"threads": 2},
            "ray": {"ray": "auto", "workers": 2, "threads": 1},
        }
        rates: dict[str, list[float]] = {name: [] for name in engines}
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            for number in range(rounds):
                for name, engine in engines.items():
                    out = directory / f"{name}-{number}"
                    compiled = str(directory / "compiled")
                    encode_dataset(directory / "images", out, compiled, options, **engine)
                    rates[name].append(steady_rate(out))
            same = digests(directory / "local-0") == digests(directory / "ray-0")
        finally:
            ray.shutdown()
    local, remote = (max(each) for each in rates.values())
    return [
        Row("workers", "one local worker, two threads", f"{local:.3f} images/s"),
        Row("workers", "two Ray workers, one thread each", f"{remote:.3f} images/s"),
        Row("workers", "Ray against local, once started", f"{remote / local:.1%}"),
        Row("workers", "their files are bit-identical", "yes" if same else "NO"),
    ]


CASES = ("throughput", "kills", "memory", "workers")


def measure(
    cases: Sequence[str],
    *,
    size: int,
    images: int,
    rounds: int,
    peer: bool,
    kill_images: int,
    kill_times: int,
    samples: Sequence[int],
    name: str,
) -> str:
    """Run some cases and save what came of them.

    Args:
        cases: Of `CASES`.
        size: Pixels a side.
        images: Of `throughput` and `workers`.
        rounds: Of the same.
        peer: Whether the loop with diffusers runs, too.
        kill_images: Of `kills`.
        kill_times: How often that job is killed.
        samples: Of `memory`, each a job of its own.
        name: Of the files under `benchmarks/results/`.

    Returns:
        A Markdown table.
    """
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        raise ValueError(f"there is no case {unknown[0]}; there are {', '.join(CASES)}")
    warnings.simplefilter("ignore", FutureWarning)
    rows: list[Row] = []
    for case in cases:
        if case == "throughput":
            rows += throughput(size, images, rounds, peer)
        elif case == "kills":
            rows += kills(kill_images, kill_times)
        elif case == "memory":
            rows += memory(samples)
        else:
            rows += workers(size, images, rounds)
    table = "\n".join(
        [
            "| case | | |",
            "| --- | --- | --- |",
            *(f"| {r.case} | {r.what} | {r.value} |" for r in rows),
        ]
    )
    write(name, table, {"rows": [asdict(row) for row in rows]})
    return table


if __name__ == "__main__":
    # A process of its own for each measurement of memory.
    print(json.dumps(simulate(int(sys.argv[1]))))
