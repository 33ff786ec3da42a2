"""The same pipeline on a Ray cluster: Ray Data distributes splits to a pool of actors.

Each actor has its own model and pipeline and writes its own shards, so only names and numbers
are sent. All machines must have access to the source and the output. Ray replaces an actor
that dies, and the new one resumes the split from the journal.
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

from .encoder import encoder_for, load_model, sizing_for
from .job import Entry, Job
from .options import Options
from .pipeline import Progress, encode_splits, first_missing
from .sources import Split

_SPLITS_AT_ONCE = 4096
"""The most splits that Ray gets at a time, which bounds the memory for a source of any length."""


class Worker:
    """An actor that encodes splits, one after the other.

    Args:
        directory: The directory of the job.
        options: The options of the job, from `Options.to_dict`.
        model: The name of the model, as in `load_model`.
        settings: Options of the model, for `rbln_config`.
        loading: The result of `hub.find_vae` for the model.
        decoders: The number of threads that read and decode images.
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
        self._encoder = encoder_for(vae, made)
        self._sizing = sizing_for(vae, made)
        self._job = Job(Path(directory), made)
        self._decoders = decoders

    def __call__(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Encode a split; yields the journal's entries and the seconds spent waiting."""
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
    """Encode the missing parts of splits, on a cluster.

    Args:
        splits: The splits with their numbers in the source.
        job: The job, on a file system that all machines share.
        address: The address of the cluster, `"auto"`, or `"local"` for one on this machine.
        workers: The number of actors; `None` is as many as the cluster has room for.
        threads: The threads of each actor's encoder, for which Ray reserves as many processors.
        decoders: The threads of each actor that read and decode images.
        model: A directory that all machines can read, or a hub id.
        settings: Options of the model, for `rbln_config`.
        loading: The result of `hub.find_vae` for the model.
        progress: Updated during the run.

    Yields:
        The entry of each part when it is done.

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
            cluster: Any = ray  # has no types for this call
            workers = max(1, int(cluster.cluster_resources().get("CPU", 1)) // threads)
        while some := list(itertools.islice(waiting, _SPLITS_AT_ONCE)):
            rows = ray.data.from_items(some, override_num_blocks=len(some)).map_batches(
                Worker,
                batch_size=1,
                # A split takes long; queueing a second one would leave other actors idle.
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
    """Connect to a cluster and silence Ray Data; both are restored afterwards."""
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
