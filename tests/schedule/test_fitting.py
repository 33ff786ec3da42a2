"""Programs within a room that holds more than arenas: what a target needs besides counts, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from vaes import capture_part, make_vae

from rbln_vae.graph.passes import optimise
from rbln_vae.schedule import fitting
from rbln_vae.schedule.schedule import Schedule
from rbln_vae.schedule.search import Search
from rbln_vae.targets.torch.rules import Machine, TorchRules

MIB = 2**20


@dataclass
class Program:
    """A schedule, and memory besides its arena: more if it has strips."""

    schedule: Schedule
    besides: int

    @property
    def bytes(self) -> int:
        return self.schedule.arena_bytes + self.besides


def lower(whole: int, strips: int) -> Callable[[Schedule], Program]:
    return lambda schedule: Program(schedule, strips if schedule.recomputed else whole)


@pytest.fixture(scope="module")
def search() -> Search[TorchRules]:
    graph = optimise(capture_part(make_vae(block_out_channels=(16, 32)), "decoder"))
    machine = Machine.of(torch.device("cpu"), torch.float32)
    return Search(graph, (1, 4, 64, 64), lambda shape: TorchRules(graph, shape, machine))


def fit(search: Search[TorchRules], room: int, whole: int, strips: int) -> Program:
    return fitting.fit(search, lower(whole, strips), room, tuple)


def test_whole_images_are_taken_where_there_is_room_for_what_they_need_besides(search):
    arena = search.keeping_all(1).arena_bytes
    assert not fit(search, arena + MIB, MIB, MIB).schedule.recomputed
    assert fit(search, arena + MIB - 1, MIB, MIB).schedule.recomputed


@pytest.mark.parametrize("strips", [0, MIB // 4, MIB])
def test_a_program_is_within_the_room_whatever_strips_need_besides(search, strips):
    free = search.keeping_all(1).arena_bytes
    least = fitting.least(search, lower(0, strips)).bytes
    for room in range(least, free, max(1, (free - least) // 8)):
        assert fit(search, room, 0, strips).bytes <= room


@pytest.mark.parametrize("strips", [0, MIB // 4])
def test_the_error_names_the_room_that_suffices(search, strips):
    with pytest.raises(fitting.TooLargeError) as error:
        fit(search, MIB // 8, 0, strips)
    needed = error.value.needed
    assert fit(search, needed, 0, strips).bytes == needed
    with pytest.raises(fitting.TooLargeError):
        fit(search, needed - 1, 0, strips)


def test_a_thrifty_schedule_costs_no_more_than_is_allowed_and_saves_what_that_buys(search):
    free = search.keeping_all(1)
    arenas = []
    for most in (1.0, 1.2, 1.5, 4.0):
        schedule = fitting.thrifty(search, lambda sketch: sketch.flops, most)
        assert schedule.flops <= most * free.flops
        arenas.append(schedule.arena_bytes)
    assert arenas == sorted(arenas, reverse=True)
    assert arenas[-1] < arenas[0]
