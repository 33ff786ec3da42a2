"""What is run for a shape within a limit is planned once, and said when nothing fits."""

from __future__ import annotations

import re
from typing import Any

import pytest
from vaes import compile_vae, default_vae

from rbln_vae.targets.planner import KEPT, Planner
from rbln_vae.units import format_seconds

SHAPE = (1, 4, 24, 16)
FREE = 2**40


@pytest.fixture(params=["cpu", "reference"])
def planner(request: pytest.FixtureRequest) -> Planner[Any, Any]:
    vae = compile_vae(default_vae(), target=request.param)
    found: Planner[Any, Any] = vae._runtimes["decoder"].images
    return found


def test_a_shape_is_planned_once_for_a_limit_and_a_way_to_save_memory(
    planner: Planner[Any, Any],
) -> None:
    first = planner.fitted(SHAPE, FREE, 0)
    assert planner.fitted(SHAPE, FREE, 0) is first
    planner.tiling = True
    frugal = planner.fitted(SHAPE, FREE, 0)
    assert frugal.bytes < first.bytes
    planner.tiling = False
    assert planner.fitted(SHAPE, FREE, 0) is first
    assert planner.forget() >= 2
    assert planner.forget() == 0
    again = planner.fitted(SHAPE, FREE, 0)
    assert again is not first and again.bytes == first.bytes


def test_only_the_last_plans_are_kept(planner: Planner[Any, Any]) -> None:
    first = planner.fitted((1, 4, 1, 1), FREE, 0)
    for width in range(2, KEPT + 2):
        planner.fitted((1, 4, 1, width), FREE, 0)
    assert planner.fitted((1, 4, 1, 1), FREE, 0) is not first
    assert planner.forget() == KEPT


def test_what_other_things_take_counts_against_the_limit(planner: Planner[Any, Any]) -> None:
    most = planner.fitted(SHAPE, FREE, 0).bytes
    assert planner.fitted(SHAPE, most, 0).bytes == most
    assert planner.fitted(SHAPE, most + 1000, 1001).bytes < most
    assert planner.fitted(SHAPE, most + 1000, 1000).bytes == most


def test_every_tradeoff_is_found_again_by_its_limit(planner: Planner[Any, Any]) -> None:
    found = planner.tradeoffs(SHAPE)
    assert found[0].bytes == planner.fitted(SHAPE, FREE, 0).bytes
    assert found[-1].bytes < found[0].bytes
    for each in found:
        assert planner.fitted(SHAPE, each.bytes, 0).bytes <= each.bytes


def test_the_time_of_every_tradeoff_is_that_of_the_whole_batch() -> None:
    images, runtime = 8, compile_vae(default_vae())._runtimes["decoder"]
    batch = (images, *SHAPE[1:])
    *_, table = runtime.describe(batch).splitlines()
    frugal = runtime.images.tradeoffs(batch)[-1]
    assert frugal.program.schedule.input_shape[0] == 1
    seconds = runtime.images.seconds(frugal.steps, images)
    assert f" about {format_seconds(seconds)} " in table
    assert seconds == pytest.approx(images * runtime.images.seconds(frugal.steps))


def test_a_limit_below_all_plans_is_an_error_that_names_one_that_suffices(
    planner: Planner[Any, Any],
) -> None:
    with pytest.raises(MemoryError, match=r"the decoder on 1x4x24x16 needs at least") as error:
        planner.fitted(SHAPE, 2000, 1000)
    (wanted,) = re.findall(r"Raise it to '(\d+)MiB'", str(error.value))
    assert planner.fitted(SHAPE, int(wanted) * 2**20, 1000).bytes <= int(wanted) * 2**20 - 1000


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 4, 0, 8), (4, 8, 8), (0, 4, 8, 8)])
def test_a_shape_that_the_graph_does_not_take_is_refused(
    planner: Planner[Any, Any], shape: tuple[int, ...]
) -> None:
    for ask in (planner.check, planner.result_bytes, lambda shape: planner.fitted(shape, FREE, 0)):
        with pytest.raises(ValueError, match=r"expected \(N, 4, H, W\)"):
            ask(shape)


def test_a_result_has_the_bytes_of_its_elements(planner: Planner[Any, Any]) -> None:
    assert planner.result_bytes((2, 4, 3, 5)) == 2 * 3 * 6 * 10 * 4
    assert planner.result_bytes((2, 4, 3, 5), 1) == 2 * 3 * 6 * 10
