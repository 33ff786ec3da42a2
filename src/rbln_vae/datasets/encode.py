"""Encoding a data set: the call that puts source, model, job and engine together."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RBLNDatasetError
from ..host import usable_processors
from ..hub import find_compiled, find_vae
from ..models.autoencoder_kl import RBLNAutoencoderKL
from ..sizes import Placement, Size, format_size
from .encoder import LatentEncoder, identity_of, load_model, sizing_for
from .job import (
    JOB,
    REJECTED,
    Entry,
    Job,
    check_same,
    job_record,
    local_directory,
    open_job,
    read_record,
)
from .options import Options
from .pictures import Prepared, prepare, quiet
from .pipeline import Progress, encode_splits
from .sources import Source, Split, open_source

_PROBED = 16
"""Images that a dry run decodes."""


@dataclass(frozen=True)
class Summary:
    """What came of a job.

    Attributes:
        samples: In the output, those of earlier runs included.
        rejected: That are not.
        shards: Of the output.
        sizes: How many samples have each image size, such as `{"512x512": 3}`.
        encoded: Images that this run has encoded.
        seconds: That this run took, without loading the model.
        waiting_share: How much of that the encoder has waited for images, 0 to 1.
    """

    samples: int
    rejected: int
    shards: int
    sizes: Mapping[str, int]
    encoded: int
    seconds: float
    waiting_share: float

    @property
    def rate(self) -> float:
        """Images a second of this run."""
        return self.encoded / max(self.seconds, 1e-9)


class TooManyRejectedError(RBLNDatasetError):
    """More samples were rejected than was allowed; all others are encoded.

    Attributes:
        summary: What came of the job.
    """

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


def encode_dataset(
    source: str | os.PathLike[str] | Source | Any,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | RBLNAutoencoderKL,
    options: Options | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    max_rejected: int = 0,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    rbln_config: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    **reading: Any,
) -> Summary:
    """Turn images into latents, in shards, ready for training.

    A run that ends early, in whatever way, is gone on with by the same call. The result is
    the same to the last bit for any number of interruptions, workers and threads.

    Args:
        source: What `open_source` takes: a folder, tar or Parquet files, a Hugging Face
            data set.
        out: The directory for the result; made where missing. It can hold a part of the
            same job.
        model: Loaded, or the name of a compiled model or one of diffusers, which is compiled in
            memory; or of a pipeline with one. A directory, a hub id or a `.safetensors` file.
        options: What is made of each image; `None` is `Options()`.
        subfolder: Where the model is within what `model` names; that of a pipeline is found.
        revision: Of a model on the hub.
        max_rejected: How many samples may be rejected.
        workers: Here, threads that read and decode images for the one encoder, by default as
            many as there are cores; with `ray`, actors with an encoder each, by
            default as many as have room.
        threads: Of an encoder; by default one for each core, and 1 with `ray`.
        ray: The address of a Ray cluster, `"auto"`, or `"local"` for one on this machine.
        rbln_config: Options of the model, where it is loaded here.
        report: Called with the progress after each run of the encoder; with `ray`, after
            each shard.
        **reading: `kind`, `image_column`, `caption_column` and `split` of `open_source`.

    Returns:
        What came of it. The directory then has a manifest, and `LatentDataset` opens it.

    Raises:
        ValueError: An option is out of range, or doesn't go with the model.
        RBLNDatasetError: `out` holds another job, the source has changed, there is no room,
            or something is missing. What was written stays, and the same call goes on.
        TooManyRejectedError: All is encoded, but more than `max_rejected` samples;
            `rejected.jsonl` says why.

    Example:
        >>> encode_dataset("photos", "latents", "compiled-vae", Options(sizes=((512, 512),)))
        ... # doctest: +SKIP
    """
    options = options or Options()
    directory = local_directory(out)
    if max_rejected < 0 or min(workers or 1, threads or 1) < 1:
        raise ValueError("expected max_rejected of 0 or more, workers and threads of 1 or more")
    if ray is not None and isinstance(model, RBLNAutoencoderKL):
        raise ValueError("with ray, model must be a directory or an id that each worker can load")
    opened = open_source(source, **reading)
    _check_apart(source, directory)
    settings = dict(rbln_config or {})
    loading = _where(model, subfolder, revision)
    if ray is None:
        settings |= {} if threads is None else {"num_threads": threads}
        vae = load_model(model, settings, loading)
        encoder = LatentEncoder(vae, options)
    else:
        _require_ray()
        vae = load_model(model, {**settings, "create_runtimes": False}, loading)
    sizing = sizing_for(vae, options)
    with open_job(directory, options, opened.describe(), _identity(vae, model, loading)) as job:
        progress = Progress()
        _count_aside(opened, progress)
        splits = enumerate(opened.splits(options.shard_size))
        if ray is None:
            entries = encode_splits(
                splits,
                encoder,
                job,
                sizing,
                decoders=workers or usable_processors(),
                progress=progress,
                report=lambda: report(progress),
            )
        else:
            from .ray import encode_with_ray

            entries = encode_with_ray(
                splits,
                job,
                address=ray,
                workers=workers,
                threads=threads or 1,
                decoders=threads or 1,
                model=os.fspath(model),
                settings=settings,
                loading=loading,
                progress=progress,
            )
        _drain(entries, job, progress, report)
        seconds = progress.seconds
        totals = job.close()
    summary = Summary(
        totals.samples,
        totals.rejected,
        totals.shards,
        dict(sorted(totals.sizes.items())),
        progress.encoded,
        seconds,
        progress.waiting / max(seconds, 1e-9),
    )
    if totals.rejected > max_rejected:
        raise TooManyRejectedError(
            f"rejected: {totals.rejected}, more than max_rejected, {max_rejected}; "
            f"{directory / REJECTED} says why. The other {totals.samples} are encoded and the "
            "output is complete; the same command with a higher max_rejected accepts that.",
            summary,
        )
    return summary


def _drain(
    entries: Iterator[Entry], job: Job, progress: Progress, report: Callable[[Progress], None]
) -> None:
    try:
        for _ in entries:
            report(progress)
    except BaseException:
        # So that what was rejected so far can be looked at while the cause is mended.
        with contextlib.suppress(RBLNDatasetError):  # the disk may be full, which is raised
            job.write_rejected()
        raise


def _where(model: Any, subfolder: str | None, revision: str | None) -> dict[str, Any]:
    """What leads a loader to the model."""
    if isinstance(model, RBLNAutoencoderKL):
        return {}
    return find_vae(os.fspath(model), subfolder=subfolder, revision=revision)


def _identity(vae: RBLNAutoencoderKL, model: Any, loading: Mapping[str, Any]) -> dict[str, Any]:
    given = isinstance(model, RBLNAutoencoderKL)
    return identity_of(vae, None if given else find_compiled(os.fspath(model), **loading))


def _check_apart(source: Any, out: Path) -> None:
    if isinstance(source, (str, os.PathLike)) and "://" not in os.fspath(source):
        inside, around = out.resolve(), Path(source).resolve()
        if inside.is_relative_to(around):
            raise ValueError(f"{out} lies in the source, {source}; name a directory outside of it")


def _require_ray() -> None:
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise RBLNDatasetError(
            "this needs Ray Data, which isn't installed: pip install 'rbln-vae[ray]'"
        ) from error


def _count_aside(source: Source, progress: Progress) -> None:
    """Count the samples while others are encoded; where that fails, no time left is shown."""

    def count() -> None:
        with contextlib.suppress(Exception):  # of which the job itself tells
            progress.total = source.count()

    threading.Thread(target=count, name="count", daemon=True).start()


# What would be done


@dataclass(frozen=True)
class Estimate:
    """What a run would do.

    Attributes:
        total: Samples of the source, where that can be told.
        done: Of these, before the run.
        sizes: Of the first images, how many would have each size.
        rejected: Of the first images, how many would be rejected, by reason.
        decode: Seconds of one thread to read, decode and scale an image.
        encode: Seconds of one encoder for an image.
    """

    total: int | None
    done: int
    sizes: Mapping[str, int]
    rejected: Mapping[str, int]
    decode: float
    encode: float

    def seconds(self, decoders: int, encoders: int = 1) -> float | None:
        """How long a run would take, where it can be told.

        On the CPU decoding and encoding share the processors, so the two add up.
        """
        if self.total is None:
            return None
        left = max(0, self.total - self.done)
        return left * (self.encode + self.decode / decoders) / encoders


def estimate(
    source: Any,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | RBLNAutoencoderKL,
    options: Options | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    threads: int | None = None,
    rbln_config: Mapping[str, Any] | None = None,
    **reading: Any,
) -> Estimate:
    """Look at a source and time its first images; nothing is written.

    Args:
        source: As of `encode_dataset`, and so the others.
        out: What is done there already counts.
        model: Run once on each size that is met.
        options: What would be made of each image.
        subfolder: Of the model.
        revision: Of the model.
        threads: Of the encoder.
        rbln_config: Options of the model.
        **reading: As of `encode_dataset`.

    Raises:
        ValueError, RBLNDatasetError: As `encode_dataset` would.
    """
    options = options or Options()
    directory = local_directory(out)
    opened = open_source(source, **reading)
    _check_apart(source, directory)
    settings = dict(rbln_config or {})
    settings |= {} if threads is None else {"num_threads": threads}
    loading = _where(model, subfolder, revision)
    vae = load_model(model, settings, loading)
    encoder = LatentEncoder(vae, options)
    sizing = sizing_for(vae, options)
    done = 0
    if (directory / JOB).exists():
        wanted = job_record(options, opened.describe(), _identity(vae, model, loading))
        check_same(read_record(directory / JOB), wanted, directory)
        for entry in Job(directory, options).entries():
            done += entry.samples + len(entry.rejected)
    sizes: Counter[Size] = Counter()
    rejected: Counter[str] = Counter()
    start = time.perf_counter()
    with quiet():
        for sample in itertools.islice(_samples(opened.splits(options.shard_size)), _PROBED):
            prepared = prepare(sample, options, sizing)
            if isinstance(prepared, Prepared):
                sizes[prepared.placement.size] += 1
            else:
                rejected[prepared.reason] += 1
    probed = sum(sizes.values()) + sum(rejected.values())
    decode = (time.perf_counter() - start) / max(1, probed)
    encode = sum(
        _seconds_to_encode(encoder, size) * count / sum(sizes.values())
        for size, count in sizes.items()
    )
    named = {format_size(size): count for size, count in sorted(sizes.items())}
    return Estimate(opened.count(), done, named, dict(rejected), decode, encode)


def _samples(splits: Iterator[Split]) -> Iterator[Any]:
    return (sample for split in splits for sample in split.samples())


def _seconds_to_encode(encoder: LatentEncoder, size: Size) -> float:
    """Seconds for an image, after a run that warms up."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    image = Prepared("", None, {}, Placement(size, size, (0, 0), size), pixels)
    batch = [image] * encoder.batch_size
    encoder.encode(batch)
    start = time.perf_counter()
    encoder.encode(batch)
    return (time.perf_counter() - start) / len(batch)
