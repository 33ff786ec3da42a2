"""The same pipeline on a Ray cluster: Ray Data gives splits to a pool of actors.

Each actor has a model and a pipeline of its own and writes shards itself, so that only names
and numbers travel; the source and the output must be seen from every machine. An actor that
dies is replaced by Ray, and its split goes on from the journal.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from .encoder import LatentEncoder, load_model, sizing_for
from .job import Entry, Job
from .options import Options
from .pipeline import Progress, encode_splits, first_missing
from .sources import Split

_SPLITS_AT_ONCE = 4096
"""Splits that Ray has at a time, so that a source of any length takes bounded memory."""


class Worker:
    """An actor: encodes the splits that it is given, one after the other.

    Args:
        directory: That of the job.
        options: Of the job, as `Options.to_dict` gives them.
        model: As of `load_model`, and so the next two.
        settings: For `rbln_config`.
        loading: What leads to the model.
        decoders: Threads that read and decode images.
    """

    def __init__(
        self,
        directory: str,
        options: Mapping[str, Any],
        model: str,
        settings: Mapping[str, Any],
        loading: Mapping[str, Any],
        decoders: int,
    ) -> None:
        made = Options.from_dict(options)
        vae = load_model(model, settings, loading)
        self._encoder = LatentEncoder(vae, made)
        self._sizing = sizing_for(vae, made)
        self._job = Job(Path(directory), made)
        self._decoders = decoders

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Encode a split; gives the journal's entries and the seconds spent waiting."""
        numbered = zip(map(int, batch["number"]), batch["split"], strict=True)
        progress, waited = Progress(), 0.0
        for entry in encode_splits(
            numbered,
            self._encoder,
            self._job,
            self._sizing,
            decoders=self._decoders,
            progress=progress,
        ):
            yield {
                "entry": np.array([entry.to_json()], dtype=object),
                "waiting": np.array([progress.waiting - waited]),
            }
            waited = progress.waiting


def encode_with_ray(
    splits: Iterable[tuple[int, Split]],
    job: Job,
    *,
    address: str,
    workers: int | None,
    threads: int,
    decoders: int,
    model: str,
    settings: Mapping[str, Any],
    loading: Mapping[str, Any],
    progress: Progress,
) -> Iterator[Entry]:
    """Encode what isn't done yet of some splits, on a cluster.

    Args:
        splits: With their numbers in the source.
        job: Where shards and journal go, on a file system that all machines share.
        address: Of the cluster, `"auto"`, or `"local"` for one on this machine.
        workers: Actors; `None` stands for as many as the cluster has room for.
        threads: Of each; Ray keeps as many processors for it.
        decoders: Threads of each that read and decode images.
        model: A directory that all machines see, or a hub id.
        settings: For `rbln_config`.
        loading: What leads to the model there.
        progress: Is kept up to date.

    Yields:
        The entries of the parts as they are done.

    Raises:
        RBLNDatasetError, OSError: As `encode_splits`.
    """
    waiting = (
        {"number": number, "split": split}
        for number, split in splits
        if first_missing(job, number, split, progress) is not None
    )
    with _cluster(address):
        if workers is None:
            cluster: Any = ray  # which has no types for this call
            workers = max(1, int(cluster.cluster_resources().get("CPU", 1)) // threads)
        while some := list(itertools.islice(waiting, _SPLITS_AT_ONCE)):
            rows = ray.data.from_items(some, override_num_blocks=len(some)).map_batches(
                Worker,
                batch_size=1,
                # A split takes long; to queue a second behind it would leave others idle.
                compute=ActorPoolStrategy(
                    size=min(workers, len(some)), max_tasks_in_flight_per_actor=1
                ),
                num_cpus=threads,
                fn_constructor_kwargs={
                    "directory": str(job.directory.resolve()),
                    "options": job.options.to_dict(),
                    "model": model,
                    "settings": {**settings, "num_threads": threads},
                    "loading": loading,
                    "decoders": decoders,
                },
            )
            for row in rows.iter_rows():
                entry = Entry.from_json(row["entry"])
                progress.encoded += entry.samples
                progress.rejected += len(entry.rejected)
                progress.waiting += float(row["waiting"]) / workers
                yield entry


@contextmanager
def _cluster(address: str) -> Iterator[None]:
    """A cluster to work on, and a quiet Ray Data; both are afterwards what they were."""
    begun = not ray.is_initialized()
    if begun:
        ray.init(address, logging_level=logging.WARNING, log_to_driver=False)
    context = DataContext.get_current()
    quiet = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
    }
    before = {name: getattr(context, name) for name in quiet}
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.ERROR)
    for name, value in quiet.items():
        setattr(context, name, value)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)
        if begun:
            ray.shutdown()
