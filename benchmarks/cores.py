"""How a run would share many cores: real plans, simulated threads.

A decode is planned for each number of threads as the engine would plan it, and the pool's rules
are simulated event by event: ranges of items with stealing, the end of a step, sleeping threads.
How long each step takes on one thread is measured here; for an instruction set that this machine
lacks it is estimated from the engine's table of costs. The partition alone needs no more than
that. What memory, caches and counters add is computed from an assumed machine (`System`).
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from rbln_vae import RBLNAutoencoderKL, _engine
from rbln_vae.artifact import Artifact, read_artifact
from rbln_vae.graph.ir import Shape
from rbln_vae.schedule.search import Search
from rbln_vae.targets.cpu.lower import lower
from rbln_vae.targets.cpu.packing import BLOCK, PANEL
from rbln_vae.targets.cpu.program import Program, Step
from rbln_vae.targets.cpu.rules import CpuRules
from rbln_vae.targets.cpu.runtime import CpuRuntime
from rbln_vae.targets.cpu.tiles import Convolution, Machine

from .models import make_input, make_model
from .report import write

THREADS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
Name = tuple[str, str]


@dataclass(frozen=True)
class System:
    """What is assumed of a machine; seconds and bytes.

    Attributes:
        transfer: Until a core has a cache line that another core has written.
        spin: How long a thread that finds no item looks for more before it sleeps.
        wake: Until a sleeping thread runs.
        call: What waking one more thread costs the thread that does so.
        cluster: Cores that share a last-level cache.
        cache: Bytes of that cache.
        cache_bandwidth: Of the cache to one core, in bytes per second.
        bandwidth: Of the memory to all cores.
        share: Of the memory to one core, at most.
    """

    transfer: float = 150e-9
    spin: float = 30e-6
    wake: float = 30e-6
    call: float = 1.5e-6
    cluster: int = 8
    cache: float = 32 * 2**20
    cache_bandwidth: float = 50e9
    bandwidth: float = 400e9
    share: float = 25e9


IDEAL = System(transfer=0, wake=0, call=0, cache_bandwidth=1e30, bandwidth=1e30, share=1e30)
"""A machine on which only the partition costs time."""

AMX_PRODUCTS = 512 * 2.5e9
"""Products of bfloat16 per second and core, where AMX is only estimated."""


@dataclass(frozen=True)
class Work:
    """The items of one step.

    Attributes:
        costs: What each takes, in products of float32.
        streamed: Bytes of kernels, keys and values that each reads.
        parts: Into how many parts what is streamed is divided. Items that read the same part
            follow each other, and there are as many for each.
        image: Bytes of images that all items read and write together.
    """

    costs: Sequence[float]
    streamed: float = 0
    parts: int = 1
    image: float = 0

    def read(self, system: System, threads: int) -> float:
        """Bytes that come from memory: clusters read each part once where it fits their cache."""
        count, clusters = len(self.costs), -(-threads // system.cluster)
        if self.streamed > system.cache:
            return self.image + self.streamed * count / min(threads, system.cluster)
        ends = [count * each // clusters for each in range(clusters + 1)]
        each = max(1, count // self.parts)
        parts = sum(
            (last - 1) // each - first // each + 1
            for first, last in itertools.pairwise(ends)
            if last > first
        )
        return self.image + self.streamed * parts


def work(step: Step, machine: Machine) -> Work:
    """The items of a step as the engine numbers them, with costs of the engine's table.

    It is none that transforms kernels: these are taken to be kept.
    """
    native, costs = step.native, machine.kernels.costs
    size = machine.element_bytes
    match native:
        case _engine.ConvStep():
            return _convolution(native, machine)
        case _engine.AttentionStep(query=query, output=output):
            pixels = query.height * query.width
            channels = (query.channels + output.channels) // native.heads
            parts = range(0, pixels, native.queries)
            one = [min(native.queries, pixels - first) * pixels * channels for first in parts]
            streamed = pixels * channels * size
            matrices = native.batch * native.heads
            return Work([costs.product * each for each in one] * matrices, streamed, matrices)
        case _engine.AttentionPackStep(key=key, value=value):
            count = native.batch * native.heads * -(-key.height * key.width // BLOCK)
            copied = BLOCK * (key.channels + value.channels) / native.heads
            return Work([costs.product * costs.copy * copied] * count)
        case _engine.NormStep():
            cells = -(-native.grid_height // native.cell_height)
            cells *= -(-native.grid_width // native.cell_width)
            values = cells * native.channels
            items = min(native.groups, max(1, values // 1024)) * native.batch
            return Work([costs.product * costs.copy * 2 * values * native.batch / items] * items)
        case _engine.StatisticsStep(input=image):
            cells = -(-image.height // native.cell_height) * -(-image.width // native.cell_width)
            values = native.cell_height * native.cell_width * image.channels
            return Work([costs.product * costs.copy * values] * (native.batch * cells))
        case _engine.MoveRowsStep(image=image):
            count = native.batch * -(-image.channels // BLOCK)
            return Work([costs.product * costs.copy * native.rows * image.width * BLOCK] * count)
        case _engine.ImportStep(image=image) | _engine.ExportStep(image=image):
            pass
        case _:
            image = native.output
    count = native.batch * -(-image.channels // BLOCK) * image.height
    return Work([costs.product * costs.copy * image.width * BLOCK] * count, image=step.bytes)


def _convolution(native: _engine.ConvStep, machine: Machine) -> Work:
    scale = 2 if native.upsample else 1
    height, width = native.output.height // scale, native.output.width // scale
    winograd = native.kernels != _engine.NONE
    reading = native.reading
    conv = Convolution(
        inputs=native.input.channels,
        outputs=native.output.channels,
        kernel=(native.kernel_height, native.kernel_width),
        stride=native.stride,
        upsample=native.upsample,
        doubles=native.doubles,
        grid=(height, width),
        normed=reading.coefficients != _engine.NONE
        or reading.activation != _engine.Activation.none,
        winograd=winograd,
    )
    groups = -(-conv.panels // machine.kernels.panels)
    tiles = [
        (min(native.tile_height, height - y), min(native.tile_width, width - x))
        for _ in range(native.batch)
        for y in range(0, height, native.tile_height)
        for x in range(0, width, native.tile_width)
    ]
    unit = 1.0 if winograd else machine.kernels.costs.product
    kernels = float(conv.matrices * conv.inputs * conv.panels * PANEL)
    kernels *= 4 if winograd else machine.element_bytes
    # What fetching weights costs is memory's part, not that of the partition.
    fetching = conv.weights * conv.costs(machine).weights / conv.outputs
    known: dict[tuple[tuple[int, int], int], float] = {}

    def cost(tile: tuple[int, int], panels: int) -> float:
        if (tile, panels) not in known:
            all_of_it = conv.item_cost(tile, panels, machine)
            known[tile, panels] = unit * (all_of_it - fetching * panels * PANEL)
        return known[tile, panels]

    costs = []
    for split in range(native.splits):
        begin, end = (groups * s // native.splits for s in (split, split + 1))
        panels = min(conv.panels, end * machine.kernels.panels) - begin * machine.kernels.panels
        for first in range(0, len(tiles), native.together):
            several = tiles[first : first + native.together]
            costs.append(sum(cost(tile, panels) for tile in several))
    pixels = native.input.height * native.input.width * native.input.channels
    pixels += native.output.height * native.output.width * native.output.channels
    return Work(
        costs,
        streamed=kernels / native.splits,
        parts=native.splits,
        image=float(native.batch * pixels * machine.element_bytes),
    )


def share_out(
    seconds: Sequence[float], threads: int, system: System, idle: list[float], start: float = 0
) -> float:
    """When the last item of a step is done, by the rules of the engine's pool.

    Args:
        seconds: What each item takes.
        threads: Those of the pool.
        system: The machine.
        idle: Since when each thread looks for items; changed to what holds afterwards.
        start: When the first thread, which leads, opens the step.
    """
    count = len(seconds)
    bounds = [count * thread // threads for thread in range(threads + 1)]
    taken = bounds[:-1]  # the next item of each range
    others = list(range(threads))  # whose range each thread takes from
    calls = 0.0
    events: list[tuple[float, int]] = []
    for thread in range(1, threads):
        ready = start + system.transfer
        if start - idle[thread] > system.spin:
            calls += system.call
            ready = idle[thread] = start + calls + system.wake
        events.append((ready, thread))
    events.append((start + calls, 0))
    heapq.heapify(events)
    last = start
    for _ in range(count):
        now, thread = heapq.heappop(events)
        while taken[others[thread]] == bounds[others[thread] + 1]:
            others[thread] = (others[thread] + 1) % threads
        other = others[thread]
        fetching = 0.0 if other == thread else system.transfer
        idle[thread] = now + fetching + seconds[taken[other]]
        taken[other] += 1
        last = max(last, idle[thread])
        heapq.heappush(events, (idle[thread], thread))
    # The leader reads the counters of all threads; their cache lines come at the same time.
    return last + (system.transfer if threads > 1 else 0.0)


def steps_of(program: Program) -> list[Step]:
    """The steps of a later run, which has the transformed kernels of the first."""
    return [step for step in program.steps if step.made is None]


def simulate(program: Program, rates: Mapping[Name, float], system: System) -> float:
    """Seconds of a run of a program.

    Args:
        program: Planned for some threads.
        rates: The seconds of a unit of cost, by the kind and name of steps.
        system: The machine.
    """
    threads = program.machine.threads
    idle = [0.0] * threads
    now = 0.0
    for step in steps_of(program):
        items = work(step, program.machine)
        rate = rates[step.kind, step.name]
        streaming = items.streamed / system.cache_bandwidth
        seconds = [max(cost * rate, streaming) for cost in items.costs]
        end = share_out(seconds, threads, system, idle, now)
        memory = min(system.bandwidth, threads * system.share)
        now = max(end, now + items.read(system, threads) / memory)
    return now


def program_for(artifact: Artifact, shape: Shape, machine: Machine) -> Program:
    """What a machine would run, without a memory limit."""
    search = Search(artifact.graph, shape, lambda each: CpuRules(artifact.graph, each, machine))
    return lower(search.keeping_all(shape[0]), search.rules(shape[0]))


def rates_of(program: Program, seconds: Mapping[Name, float] | None) -> dict[Name, float]:
    """The seconds of a unit of cost for each step of a program for one thread.

    Args:
        program: The program.
        seconds: What was measured for each kind and name; `None` assumes AMX.
    """
    costs: defaultdict[Name, float] = defaultdict(float)
    for step in steps_of(program):
        costs[step.kind, step.name] += sum(work(step, program.machine).costs)
    if seconds is None:
        rate = 1 / (AMX_PRODUCTS * program.machine.kernels.costs.product)
        return dict.fromkeys(costs, rate)
    return {name: seconds[name] / cost for name, cost in costs.items()}


def kernels_of(isa: str, dtype: str) -> _engine.Kernels:
    """A row of the engine's table, also of one that this machine can't run."""
    return next(k for k in _engine.built_kernels() if (k.isa, k.dtype) == (isa, dtype))


@dataclass(frozen=True)
class Case:
    """What is simulated.

    Attributes:
        label: For the table.
        program: For one thread.
        rates: The seconds of a unit of cost, by the kind and name of steps.
        artifact: The decoder.
        kernels: A row of the engine's table.
        measured: Seconds of runs by one thread and by two; none where it only is estimated.
    """

    label: str
    program: Program
    rates: Mapping[Name, float]
    artifact: Artifact
    kernels: _engine.Kernels
    measured: tuple[float, ...] = ()

    def efficiency(self, threads: int, system: System) -> float:
        """The time of one thread, as a share of that of all threads together."""
        many = self.planned(threads)
        alone = simulate(self.program, self.rates, IDEAL)
        return alone / (threads * simulate(many, self.rates, system))

    def planned(self, threads: int) -> Program:
        shape = self.program.schedule.input_shape
        return program_for(self.artifact, shape, Machine(self.kernels, threads))


def estimated(label: str, artifact: Artifact, shape: Shape, kernels: _engine.Kernels) -> Case:
    """A case by the engine's table alone, for kernels that this machine may lack."""
    program = program_for(artifact, shape, Machine(kernels, 1))
    return Case(label, program, rates_of(program, None), artifact, kernels)


def timed(label: str, artifact: Artifact, shape: Shape, latent: Tensor, rounds: int) -> Case:
    """A case by what each step takes on one thread here."""
    fastest: list[dict[Name, float]] = []
    for threads in (1, 2):
        runtime = CpuRuntime(
            artifact.graph,
            artifact.packed,
            dtype=artifact.dtype,
            num_threads=threads,
            activate_profiler=True,
        )
        for _ in range(rounds + 1):
            runtime.run(latent)
        best = min(runtime.profiles[-rounds:], key=lambda run: run.seconds)
        seconds: defaultdict[Name, float] = defaultdict(float)
        for step in best.steps:
            seconds[step.kind, step.name] += step.seconds
        fastest.append(seconds)
    kernels = runtime.machine.kernels
    program = program_for(artifact, shape, Machine(kernels, 1))
    names = {(step.kind, step.name) for step in steps_of(program)}
    measured = tuple(sum(each[name] for name in names) for each in fastest)
    return Case(label, program, rates_of(program, fastest[0]), artifact, kernels, measured)


def measure(sizes: Sequence[int], rounds: int) -> str:
    """Simulate decodes of Stable Diffusion's autoencoder with random weights.

    Args:
        sizes: Pixels a side.
        rounds: Counted runs by one thread and by two, of which the fastest counts.

    Returns:
        Two Markdown tables: measured and simulated times, and efficiencies.
    """
    cases = []
    with TemporaryDirectory() as temporary:
        directory = Path(temporary)
        make_model(directory / "original")
        for dtype in ("float32", "bfloat16"):
            compiled = directory / dtype
            RBLNAutoencoderKL.from_pretrained(
                directory / "original",
                export=True,
                rbln_target="cpu",
                rbln_dtype=dtype,
                rbln_create_runtimes=False,
            ).save_pretrained(compiled)
            artifact = read_artifact(compiled / "decoder.rbln")
            for size in sizes:
                latent = make_input(compiled, "decode", size)
                shape = tuple(latent.shape)
                cases.append(timed(f"{dtype} {size}²", artifact, shape, latent, rounds))
                if dtype == "bfloat16":
                    tiles = kernels_of("amx_bf16", dtype)
                    cases.append(estimated(f"AMX, estimated {size}²", artifact, shape, tiles))
    calibration = [
        "| decode | 1 thread, measured | 2 threads, measured | 2 threads, simulated |",
        "| --- | ---: | ---: | ---: |",
    ]
    for case in cases:
        if case.measured:
            one, two = case.measured
            found = simulate(case.planned(2), case.rates, System())
            calibration.append(f"| {case.label} | {one:.4f} | {two:.4f} | {found:.4f} |")
    head = [
        "| efficiency with threads | | " + " | ".join(map(str, THREADS[1:])) + " |",
        "| --- | --- |" + " ---: |" * len(THREADS[1:]),
    ]
    rows = [
        f"| {case.label} | {name} | "
        + " | ".join(f"{case.efficiency(threads, system):.2f}" for threads in THREADS[1:])
        + " |"
        for case in cases
        for name, system in (("partition alone", IDEAL), ("simulated", System()))
    ]
    table = "\n".join([*calibration, "", *head, *rows])
    write("cores", table)
    return table
