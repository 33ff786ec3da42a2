"""The command `encode-dataset`."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from .. import demo_model
from ..datasets import (
    Options,
    Progress,
    Summary,
    TooManyRejectedError,
    encode_dataset,
    estimate,
)
from ..host import usable_processors
from ..sizes import Size, parse_size
from ..units import format_seconds
from .terminal import err, out, table, working

_SECONDS_BETWEEN_LINES = 30.0


def sizes_of(size: str | None, buckets: str | None) -> tuple[Size, ...]:
    """The sizes that `--size` or `--buckets` name.

    Raises:
        ValueError: Both are given, or one is no size.
    """
    if size is not None and buckets is not None:
        raise ValueError("--size and --buckets: expected one of them, found both")
    if buckets is not None:
        return tuple(parse_size(each.strip()) for each in buckets.split(","))
    return (parse_size(size or "512"),)


def encode(
    source: str,
    directory: Path,
    model: str | None,
    options: Options,
    *,
    max_rejected: int,
    workers: int | None,
    threads: int | None,
    ray: str | None,
    settings: Mapping[str, Any],
    naming: Mapping[str, Any],
    dry_run: bool,
) -> None:
    """Encode a data set under a progress bar, and say what came of it; or what would.

    `naming` says more of what `source` and `model` name; the rest is as of `encode_dataset`.
    """
    name = demo_model() if model is None else model
    if dry_run:
        with _warnings_shown():
            _estimate(source, directory, name, options, workers, threads, settings, naming, ray)
        return
    try:
        with _warnings_shown(), shown(err()) as report:
            summary = encode_dataset(
                source,
                directory,
                name,
                options,
                max_rejected=max_rejected,
                workers=workers,
                threads=threads,
                ray=ray,
                rbln_config=settings,
                report=report,
                **naming,
            )
    except TooManyRejectedError as error:
        _show(error.summary, source, directory, options)
        raise
    _show(summary, source, directory, options)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show warnings as lines without the place in the code that they came from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: err().print(f"warning: {message}")
        yield


def _show(summary: Summary, source: str, directory: Path, options: Options) -> None:
    trainer = options.trainer
    result = table("data set", str(directory))
    shards = "" if trainer else f" in {summary.shards:,} shards"
    result.add_row("samples", f"{summary.samples:,}{shards}")
    for size, count in summary.sizes.items():
        result.add_row(f"of size {size}", f"{count:,}")
    result.add_row("rejected", f"{summary.rejected:,}")
    result.add_row("encoded in this run", f"{summary.encoded:,}")
    result.add_row("time", format_seconds(summary.seconds))
    result.add_row("images per second", f"{summary.rate:.2f}")
    result.add_row("time spent waiting for images", f"{summary.waiting_share:.1%}")
    out().print(result)
    if trainer is not None:
        places = str(Path(source).resolve()), str(directory.resolve())
        out().print(f"\nThe configuration of {options.format} must have these lines:\n")
        out().print(trainer.configuration(*places), markup=False, highlight=False, soft_wrap=True)


def _estimate(
    source: str,
    directory: Path,
    model: str | Path,
    options: Options,
    workers: int | None,
    threads: int | None,
    settings: Mapping[str, Any],
    naming: Mapping[str, Any],
    ray: str | None,
) -> None:
    with working("Looking at the source, and timing the first images …"):
        found = estimate(
            source,
            directory,
            model,
            options,
            threads=threads if ray is None else threads or 1,
            rbln_config=settings,
            **naming,
        )
    processors = usable_processors()
    decoders, encoders = workers or processors, 1
    if ray is not None:
        # Without asking the cluster, which may not be up yet.
        decoders, encoders = threads or 1, workers or max(1, processors // (threads or 1))
    seconds = found.seconds(decoders, encoders)
    result = table("data set", f"{directory}, as {options.format}")
    total = "not known before it is read" if found.total is None else f"{found.total:,}"
    result.add_row("samples in the source", total)
    result.add_row("done already", f"{found.done:,}")
    for size, count in found.sizes.items():
        result.add_row(f"of the first images, of size {size}", f"{count:,}")
    result.add_row("of the first images, rejected", f"{sum(found.rejected.values()):,}")
    result.add_row("to read and decode an image", f"{found.decode * 1e3:.1f} ms")
    result.add_row("to encode an image", f"{found.encode * 1e3:.1f} ms")
    if ray is not None:
        result.add_row("workers", str(encoders))
    result.add_row("time", "not known" if seconds is None else f"about {format_seconds(seconds)}")
    out().print(result)
    for reason, count in found.rejected.items():
        out().print(f"rejected: {reason}" + (f" ({count} times)" if count > 1 else ""))


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal, a line now and then elsewhere."""
    if not console.is_terminal:
        yield lines(console.print)
        return
    # The bar gives way to the text where a terminal is narrow.
    columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))
    with Bar(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def report(progress: Progress) -> None:
            bar.update(
                task,
                completed=progress.done,
                total=progress.total,
                description=described(progress),
            )

        yield report


def lines(
    show: Callable[[str], None], seconds: float = _SECONDS_BETWEEN_LINES
) -> Callable[[Progress], None]:
    """What says how far it is, at most once in so many seconds."""
    last = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            show(described(progress))

    return report


def described(progress: Progress) -> str:
    """How far a run is, what matters most first."""
    total = "" if progress.total is None else f" of {progress.total:,}"
    left = seconds_left(progress)
    return (
        f"{progress.done:,}{total}, {progress.rate:.2f} images/s"
        + ("" if left is None else f", {format_seconds(left)} left")
        + f", waiting {progress.waiting_share:.0%}"
    )


def seconds_left(progress: Progress) -> float | None:
    """How long the rest takes at the speed of this run, where it can be told."""
    dealt = progress.encoded + progress.rejected
    if progress.total is None or not dealt:
        return None
    return max(0, progress.total - progress.done) * progress.seconds / dealt
