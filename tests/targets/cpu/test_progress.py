"""What a run tells its caller of how far it is."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from long_runs import endless_run
from vaes import capture_part, make_vae, noise

from rbln_vae.graph.passes import optimise
from rbln_vae.targets.cpu.runtime import CpuRuntime


def decoder_runtime(**options: object) -> CpuRuntime:
    vae = make_vae(block_out_channels=(32, 64))
    graph = optimise(capture_part(vae, "decoder"))
    return CpuRuntime(graph, dtype="float32", num_threads=2, **options)


@pytest.mark.slow
def test_it_moves_within_one_step() -> None:
    runtime, image = endless_run()
    told: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        told.append((done, total))
        if len({each for each, _ in told}) == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        runtime.run(image, progress=progress)
    assert told[0] == (0, 1000)
    assert told == sorted(told)
    assert 0 < told[-1][0] < 1000


def test_items_count_as_the_work_of_their_steps() -> None:
    bound = decoder_runtime().planned((1, 4, 32, 32))
    ends = [0, *itertools.accumulate(bound.native.items)]
    total = bound.program.work
    for step, (begin, end) in enumerate(itertools.pairwise(ends)):
        before = sum(each.work for each in bound.steps[:step])
        assert bound.share_done(begin) == pytest.approx(before / total)
        middle = bound.share_done((begin + end) // 2)
        assert bound.share_done(begin) <= middle <= bound.share_done(end)
        share = ((begin + end) // 2 - begin) / (end - begin) * bound.steps[step].work / total
        assert middle == pytest.approx(before / total + share)
    assert bound.share_done(ends[-1]) == 1


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask as often as a run can."""
    monkeypatch.setattr("rbln_vae.targets.watch._PATIENCE", 0.0)


@pytest.mark.usefixtures("often")
def test_parts_of_a_batch_follow_each_other() -> None:
    runtime = decoder_runtime()
    runtime.save_memory(slicing=True, tiling=False)
    told: list[int] = []
    runtime.run(noise(3, 4, 8, 8), progress=lambda done, total: told.append(done))
    assert told == sorted(told)
    assert {0, 1000, 2000, 3000} <= set(told)


@pytest.mark.usefixtures("often")
def test_an_image_that_is_run_again_never_goes_back() -> None:
    graph = optimise(capture_part(make_vae(block_out_channels=(32, 64)), "decoder"))
    runtime = CpuRuntime(graph, dtype="float16", num_threads=2)
    told: list[tuple[int, int]] = []
    with pytest.warns(RuntimeWarning, match="range of float16"):
        runtime.run(noise(2, 4, 8, 8) * 1e30, progress=lambda *work: told.append(work))
    assert told == sorted(told)
    assert told[-1] == (2000, 2000)
    assert all(done < total for done, total in told[:-1])


def test_it_changes_no_bit() -> None:
    runtime, image = decoder_runtime(), noise(1, 4, 16, 16)
    expected = runtime.run(image)
    assert torch.equal(runtime.run(image, progress=lambda *_: None), expected)
