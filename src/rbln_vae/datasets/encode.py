"""`encode_dataset`: combines source, model, job and engine."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import hub
from ..errors import RBLNDatasetError
from ..host import usable_processors
from ..models.autoencoder import RBLNAutoencoderModel
from ..models.kinds import KINDS
from ..sizes import Size, format_size
from .encoder import encoder_for, identity_of, load_model, sizing_for
from .job import (
    REJECTED,
    Entry,
    Job,
    directory_of,
    is_begun,
    job_record,
    local_directory,
    open_job,
)
from .options import Options
from .pictures import Rejected, prepare, quiet
from .pipeline import Progress, encode_splits
from .sources import Source, Split, open_source
from .sources.folder import FolderSource
from .trainers import Trainer
from .trainers.base import require_opencv, stem_of

_PROBED = 16
"""Images that a dry run decodes."""


@dataclass(frozen=True)
class Summary:
    """The result of a job.

    Attributes:
        samples: Number of samples in the output, including those of earlier runs.
        rejected: Number of images that could not be encoded.
        shards: Number of shards in the output.
        sizes: Number of samples of each image size, such as `{"512x512": 3}`.
        encoded: Number of images that this run encoded.
        seconds: Time of this run in seconds, without loading the model.
        waiting_share: Share of that time that the encoder waited for images, 0 to 1.
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
        """Images per second of this run."""
        return self.encoded / max(self.seconds, 1e-9)


class TooManyRejectedError(RBLNDatasetError):
    """More samples were rejected than allowed; all others are encoded.

    Attributes:
        summary: The result of the job.
    """

    def __init__(self, message: str, summary: Summary) -> None:
        super().__init__(message)
        self.summary = summary


def encode_dataset(
    source: str | os.PathLike[str] | Source | Any,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | RBLNAutoencoderModel,
    options: Options | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    model_kind: str | None = None,
    max_rejected: int = 0,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    rbln_config: Mapping[str, Any] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
    **reading: Any,
) -> Summary:
    """Encode images as latents, in shards or in the cache of a trainer, ready for training.

    The same call resumes a run that ended early, whatever ended it. The result is
    bit-identical for any number of interruptions, workers and threads.

    Args:
        source: A source that `open_source` accepts: a folder, tar or Parquet files, or a
            Hugging Face data set.
        out: The output directory; it is made if it is missing. It can contain a part of the
            same job. For a trainer it can be the source itself.
        model: A loaded model, or a directory, hub id or `.safetensors` file with a compiled
            model, a diffusers model or a pipeline. A diffusers model is compiled in memory.
        options: How each image is processed; `None` is `Options()`.
        subfolder: The subfolder of the model; `None` is the top, or `vae` in a pipeline.
        revision: The revision of a model on the hub; `None` is the default one.
        model_kind: The kind of the model in a `.safetensors` file, such as `"sdxl"`: `kind` of
            `RBLNModel.from_pretrained`. `None` is unknown.
        max_rejected: The most samples that may be rejected, by default 0.
        workers: Without `ray`, the number of threads that read and decode images for the
            encoder, by default one per core. With `ray`, the number of actors, each with an
            encoder, by default as many as the cluster has room for.
        threads: The threads of an encoder, by default one per core, or 1 with `ray`.
        ray: The address of a Ray cluster, `"auto"`, or `"local"` for one on this machine;
            `None` works without Ray.
        rbln_config: Options of the model; ignored if `model` is loaded.
        report: Called with the progress after each run of the encoder or, with `ray`, after
            each shard.
        **reading: `kind`, `image_column`, `caption_column` and `split` of `open_source`.

    Returns:
        A summary. The directory then has a manifest, and `LatentDataset` opens it.

    Raises:
        ValueError: An option is out of range, or does not fit the model.
        RBLNDatasetError: `out` contains another job, the source has changed, the disk is full,
            or a package is missing. Written shards stay, and the same call resumes the job.
        TooManyRejectedError: Everything is encoded except more than `max_rejected` samples;
            `rejected.jsonl` lists the reasons.

    Example:
        >>> encode_dataset("photos", "latents", "compiled-vae", Options(sizes=((512, 512),)))
        ... # doctest: +SKIP
    """
    options = options or Options()
    directory = local_directory(out)
    if max_rejected < 0 or min(workers or 1, threads or 1) < 1:
        raise ValueError("expected max_rejected of 0 or more, workers and threads of 1 or more")
    if ray is not None and isinstance(model, RBLNAutoencoderModel):
        raise ValueError("with ray, model must be a directory or an id that each worker can load")
    opened = _open(source, directory, options, reading)
    loading = _where(model, subfolder, revision, model_kind)
    settings = _settings(model, loading, options, rbln_config)
    if ray is None:
        settings |= {} if threads is None else {"num_threads": threads}
        vae = load_model(model, settings, loading)
    else:
        _require_ray()
        vae = load_model(model, {**settings, "create_runtimes": False}, loading)
    _check_model(vae, options)
    encoder = encoder_for(vae, options) if ray is None else None
    sizing = sizing_for(vae, options)
    record = directory_of(directory, options)
    with open_job(record, options, opened.describe(), _identity(vae, model, loading)) as job:
        progress = Progress()
        _count_aside(opened, progress)
        splits = enumerate(opened.splits(options.shard_size))
        if encoder is not None:
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
                address=str(ray),
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
        totals = job.close(opened.count() if job.trainer is not None else None)
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
            f"{record / REJECTED} says why. The other {totals.samples} are encoded and the "
            "output is complete; the same command with a higher max_rejected accepts it.",
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
        # The list of rejected samples is useful while the user looks for the cause.
        with contextlib.suppress(RBLNDatasetError):  # the first error is the one to raise
            job.write_rejected()
        raise


def _where(
    model: Any, subfolder: str | None, revision: str | None, kind: str | None
) -> dict[str, Any]:
    """The loader arguments that find the model."""
    if isinstance(model, RBLNAutoencoderModel):
        return {}
    return hub.find_vae(os.fspath(model), subfolder=subfolder, revision=revision, kind=kind)


def _identity(vae: RBLNAutoencoderModel, model: Any, loading: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(model, RBLNAutoencoderModel):
        return identity_of(vae, None)
    return identity_of(vae, hub.find_compiled(os.fspath(model), **hub.options(loading)))


def _settings(
    model: Any,
    loading: Mapping[str, Any],
    options: Options,
    rbln_config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The options of the model. Trainers get float32, unless another dtype is asked for."""
    settings = dict(rbln_config or {})
    if (
        options.trainer is not None
        and not isinstance(model, RBLNAutoencoderModel)
        and hub.find_compiled(os.fspath(model), **hub.options(loading)) is None
    ):
        settings.setdefault("dtype", "float32")
    return settings


def _open(source: Any, out: Path, options: Options, reading: Mapping[str, Any]) -> Source:
    """Open a source, and check that the output can be written for it."""
    if (trainer := options.trainer) is None:
        opened = open_source(source, media=options.media, **reading)
        _check_apart(source, out)
        return opened
    kind = reading.get("kind", "auto")
    local = isinstance(source, (str, os.PathLike)) and "://" not in os.fspath(source)
    if not local or kind not in ("auto", "folder") or Path(source).is_file():
        raise ValueError(
            f"the source for {options.format} must be a folder of images on this machine, which "
            "the trainer reads, too"
        )
    if not Path(source).is_dir():
        raise FileNotFoundError(f"there is no {os.fspath(source)}")
    if trainer.uses_opencv:
        require_opencv()
    # One name for one folder, or a job would not know its own record.
    root = str(Path(source).resolve())
    folder = FolderSource(root, trainer.takes)
    _check_names(folder, trainer, out)
    return folder


def _check_names(folder: FolderSource, trainer: Trainer, out: Path) -> None:
    """Raise an error for images that share a cache, and warn of images that the trainer ignores."""
    taken, shadows = 0, []
    for _, group in itertools.groupby(folder.names(), key=stem_of):
        names = list(group)
        taken += len(names)
        if trainer.conflict and len(names) > 1:
            raise RBLNDatasetError(
                f"{' and '.join(names)} in {folder.root} differ only in their suffixes, and "
                f"{trainer.conflict}; rename all but one"
            )
        shadow = trainer.shadows(names[0])
        if shadow and any((place / shadow).exists() for place in (Path(folder.root), out)):
            shadows.append(shadow)
    left_out = FolderSource(folder.root).count() - taken
    if left_out:
        _warn(f"left out: {left_out} images of kinds that the trainer does not take")
    if shadows:
        _warn(
            f"the trainer prefers {shadows[0]} to what is written here, as it does for "
            f"{len(shadows)} images in all; remove these files"
        )


def _check_model(vae: RBLNAutoencoderModel, options: Options) -> None:
    """Raise a `ValueError` if a model can't be that of an architecture; warn if it may not be."""
    if (trainer := options.trainer) is None:
        return
    kind, config = KINDS[trainer.architecture.kind], vae.resolved_config
    name, channels = vae.family.original_class_name, config.latent_channels
    if not kind.suits(name, channels) or config.vae_scale_factor != 8:
        raise ValueError(
            f"architecture {options.architecture!r} has {' or '.join(kind.class_names)} with "
            f"{kind.latent_channels} latent channels and 8 pixels a cell; the model is {name} "
            f"with {channels} and {config.vae_scale_factor}"
        )
    scaling, usual = vae.latent_scaling, kind.config
    found = scaling.scaling_factor, scaling.shift_factor
    expected = usual.get("scaling_factor"), usual.get("shift_factor")
    if scaling.known and expected[0] is not None and found != expected:
        _warn(
            f"the model scales its latents by scaling_factor {found[0]} and shift_factor "
            f"{found[1]}, the autoencoder of {options.architecture} by {expected[0]} and "
            f"{expected[1]}: is it the right model?"
        )


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)


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
    """Count the samples in the background; if that fails, no remaining time is shown."""

    def count() -> None:
        with contextlib.suppress(Exception):  # the job itself reports it
            progress.total = source.count()

    threading.Thread(target=count, name="count", daemon=True).start()


# Dry runs


@dataclass(frozen=True)
class Estimate:
    """The estimate of a run.

    Attributes:
        total: Number of samples in the source; `None` if it is unknown.
        done: Number of samples that are already done.
        sizes: Number of the first images that would get each size.
        rejected: Number of the first images that would be rejected, by reason.
        decode: Seconds in which one thread reads, decodes and scales an image.
        encode: Seconds in which the encoder encodes an image.
    """

    total: int | None
    done: int
    sizes: Mapping[str, int]
    rejected: Mapping[str, int]
    decode: float
    encode: float

    def seconds(self, decoders: int, encoders: int = 1) -> float | None:
        """The estimated seconds of a run; `None` if the number of samples is unknown.

        On the CPU, decoding and encoding share the processors, so their times add up.
        """
        if self.total is None:
            return None
        left = max(0, self.total - self.done)
        return left * (self.encode + self.decode / decoders) / encoders


def estimate(
    source: Any,
    out: str | os.PathLike[str],
    model: str | os.PathLike[str] | RBLNAutoencoderModel,
    options: Options | None = None,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    model_kind: str | None = None,
    threads: int | None = None,
    rbln_config: Mapping[str, Any] | None = None,
    **reading: Any,
) -> Estimate:
    """Inspect a source and time its first images; nothing is written.

    The arguments and exceptions are those of `encode_dataset`. The model runs once on each
    size of the first images, and samples that are already done in `out` count as done.
    """
    options = options or Options()
    directory = local_directory(out)
    opened = _open(source, directory, options, reading)
    loading = _where(model, subfolder, revision, model_kind)
    settings = _settings(model, loading, options, rbln_config)
    settings |= {} if threads is None else {"num_threads": threads}
    vae = load_model(model, settings, loading)
    _check_model(vae, options)
    encoder = encoder_for(vae, options)
    sizing = sizing_for(vae, options)
    done = 0
    record = directory_of(directory, options)
    wanted = job_record(options, opened.describe(), _identity(vae, model, loading))
    if is_begun(record, wanted, options):
        for entry in Job(record, options).entries():
            done += entry.samples + len(entry.rejected)
    sizes: Counter[Size] = Counter()
    rejected: Counter[str] = Counter()
    start = time.perf_counter()
    with quiet():
        for sample in itertools.islice(_samples(opened.splits(options.shard_size)), _PROBED):
            prepared = prepare(sample, options, sizing)
            if isinstance(prepared, Rejected):
                rejected[prepared.reason] += 1
            else:
                sizes[prepared.placement.size] += 1
    probed = sum(sizes.values()) + sum(rejected.values())
    decode = (time.perf_counter() - start) / max(1, probed)
    encode = sum(
        encoder.seconds(size) * count / sum(sizes.values()) for size, count in sizes.items()
    )
    named = {format_size(size): count for size, count in sorted(sizes.items())}
    return Estimate(opened.count(), done, named, dict(rejected), decode, encode)


def _samples(splits: Iterator[Split]) -> Iterator[Any]:
    return (sample for split in splits for sample in split.samples())
