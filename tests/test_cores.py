"""The simulated threads take items by the rules of the engine's pool."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.cores import IDEAL, System, Work, estimated, kernels_of, share_out
from benchmarks.models import MODELS, make_model

from rbln_vae import RBLNAutoencoderKL, _engine
from rbln_vae.artifact import Artifact, read_artifact

LATE = dataclasses.replace(IDEAL, wake=5.0, call=1.0, spin=2.0)


def finished(seconds: list[float], threads: int, system: System = IDEAL) -> float:
    return share_out(seconds, threads, system, [0.0] * threads)


@pytest.mark.parametrize(
    ("seconds", "threads", "expected"),
    [
        ([1.0] * 8, 1, 8.0),
        ([1.0] * 8, 4, 2.0),
        ([1.0] * 9, 4, 3.0),
        ([1.0] * 3, 64, 1.0),
        # The second thread has done its half after three seconds, and takes one of the others.
        ([4.0, 4.0, 4.0, 1.0, 1.0, 1.0], 2, 8.0),
        ([9.0, 1.0, 1.0, 1.0], 2, 9.0),
    ],
)
def test_ranges_are_shared_and_what_is_left_of_them_is_taken_by_others(
    seconds: list[float], threads: int, expected: float
) -> None:
    assert finished(seconds, threads) == expected


def test_an_item_from_the_range_of_another_costs_a_cache_line() -> None:
    apart = dataclasses.replace(IDEAL, transfer=0.25)
    # The second thread sees the step, does its half and fetches an item; the leader sees the end.
    assert finished([4.0, 4.0, 1.0, 1.0], 2, apart) == 0.25 + 2.0 + 0.25 + 4.0 + 0.25
    assert finished([4.0, 1.0, 1.0, 1.0], 2, apart) == 4.0 + 0.25


def test_threads_sleep_where_steps_have_no_items_for_them_and_are_woken_one_by_one() -> None:
    idle = [0.0] * 3
    assert share_out([3.0], 3, LATE, idle) == 3.0
    # Both others have slept since two: they are called for two seconds, and start five later.
    assert share_out([10.0] * 3, 3, LATE, idle, start=3.0) == 3.0 + 2.0 + 5.0 + 10.0
    # All have worked until then: none sleeps.
    assert share_out([1.0] * 3, 3, LATE, idle, start=20.0) == 21.0


@pytest.mark.parametrize(
    ("parts", "threads", "expected"),
    [
        (1, 1, 1 + 4),
        (1, 32, 4 + 4),  # each of four clusters reads all of it
        (4, 32, 4 + 4),  # each reads its quarter
        (4, 8, 4 + 4),  # one reads all quarters
        (2, 32, 4 + 4),  # each half is read by two
        (8, 32, 8 + 4),
    ],
)
def test_a_cluster_reads_what_its_items_share_once(parts: int, threads: int, expected: int) -> None:
    items = Work([1.0] * 32, streamed=1.0, parts=parts, image=4.0)
    assert items.read(System(cluster=8, cache=2.0), threads) == expected
    # Without room in the cache, the cores of a cluster read it together, item for item.
    together = min(threads, 8)
    assert items.read(System(cluster=8, cache=0.5), threads) == 32 / together + 4


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Stable Diffusion's, with random weights."""
    directory = tmp_path_factory.mktemp("decoder")
    make_model(directory / "original", MODELS["sd"])
    RBLNAutoencoderKL.from_pretrained(
        directory / "original",
        export=True,
        rbln_target="cpu",
        rbln_dtype="float32",
        rbln_create_runtimes=False,
    ).save_pretrained(directory / "compiled")
    return read_artifact(directory / "compiled" / "decoder.rbln")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("isa", "dtype", "size", "least"),
    [
        ("avx512", "float32", 512, 0.97),
        ("avx512", "float32", 256, 0.88),
        ("amx_bf16", "bfloat16", 512, 0.90),
    ],
)
def test_the_partition_alone_keeps_64_threads_busy(
    decoder: Artifact, isa: str, dtype: str, size: int, least: float
) -> None:
    if (isa, dtype) not in [(each.isa, each.dtype) for each in _engine.built_kernels()]:
        pytest.skip(f"this build has no kernels for {isa}")
    shape = (1, 4, size // 8, size // 8)
    case = estimated("", decoder, shape, kernels_of(isa, dtype))
    assert case.efficiency(64, IDEAL) >= least
    assert case.efficiency(1, IDEAL) == pytest.approx(1)
    assert case.efficiency(2, IDEAL) > 0.99
    assert case.efficiency(64, System()) < case.efficiency(64, IDEAL)
