"""Rounds of RayGrid and of the bare loops in turn: seconds, CPU seconds and memory of each."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
from flwr.app import ArrayRecord

from experiments.bench.bare_loop import BareLoop
from experiments.running import train
from experiments.wiring import Datasets, Simulation, simulation
from fedinit.config import Run
from fedinit.simulation import ENVIRONMENT, RayGrid, Workers
from strategies.fedopt import draw_cohort

RAY_GRID, BARE, TUNED = "RayGrid", "bare loop", "tuned loop"
ONE_BY_ONE = "RayGrid, one by one"
_SAMPLE_SECONDS = 0.05


@dataclass
class Timings:
    """What one contender needed.

    Attributes:
        updates: client updates of a round.
        seconds: of each timed round, a list for each repetition.
        cpu_seconds: of all of its processes and of the driver's, over all timed rounds.
        driver_seconds: CPU seconds of the driver's process alone, over the same.
        peak_bytes: of all of its processes together, shared pages counted once (PSS).
        floor: what the tuned loop needed in turn with it; None where no loop took part.
    """

    updates: int
    seconds: list[list[float]] = field(default_factory=list)
    cpu_seconds: float = 0.0
    driver_seconds: float = 0.0
    peak_bytes: int = 0
    floor: "Timings | None" = None

    @property
    def round_seconds(self) -> float:
        """Median over all timed rounds."""
        return median(each for repetition in self.seconds for each in repetition)

    @property
    def timed_updates(self) -> int:
        """Client updates of all timed rounds."""
        return self.updates * sum(map(len, self.seconds))

    @property
    def ratios(self) -> list[float]:
        """For each repetition the median ratio to the floor, of rounds done in turn, if any."""
        pairs = zip(self.seconds, self.floor.seconds, strict=True) if self.floor else ()
        return [median(a / b for a, b in zip(ours, theirs, strict=True)) for ours, theirs in pairs]

    def record(self) -> dict[str, Any]:
        """As bench.json holds it."""
        return {
            "seconds": self.seconds,
            "round_seconds": self.round_seconds,
            "updates_per_second": self.updates / self.round_seconds,
            "cpu_seconds_per_update": self.cpu_seconds / self.timed_updates,
            "driver_cpu_seconds_per_update": self.driver_seconds / self.timed_updates,
            "peak_bytes": self.peak_bytes,
            "floor_seconds": self.floor.seconds if self.floor else None,
            "ratios": self.ratios,
        }


@dataclass
class Measured:
    """A workload's contenders by name, and the run as it was settled, with the rounds it asks."""

    run: Run
    workers: int
    contenders: dict[str, Timings]


class Contender:
    """One of those that take turns, with its processes."""

    def __init__(self, updates: int, processes: list[psutil.Process]) -> None:
        self.timings = Timings(updates)
        self.processes = processes
        self._others = [each for each in processes if each.pid != os.getpid()]
        self._cpu_before, self._since = 0.0, (0.0, 0.0)

    def begin(self) -> None:
        """A round begins now."""
        self._cpu_before = self._cpu_of_others()  # outside the round: it takes some milliseconds
        self._since = _clocks()

    def end(self) -> None:
        """A timed round has ended."""
        seconds, driver = (now - then for now, then in zip(_clocks(), self._since, strict=True))
        cpu = self._cpu_of_others() - self._cpu_before
        self.timings.seconds[-1].append(seconds)
        self.timings.cpu_seconds += cpu + driver
        self.timings.driver_seconds += driver

    def _cpu_of_others(self) -> float:
        return sum(sum(each.cpu_times()[:2]) for each in self._others)

    @contextmanager
    def watching_memory(self) -> Iterator[None]:
        """Sample the processes' memory meanwhile, in a thread."""
        done = threading.Event()

        def sample() -> None:
            ended = False
            while not ended:
                ended = done.wait(_SAMPLE_SECONDS)  # once more at the end: a round may be short
                with suppress(psutil.NoSuchProcess):  # stopped by Ctrl-C, say
                    found = sum(each.memory_full_info().pss for each in self.processes)
                    self.timings.peak_bytes = max(self.timings.peak_bytes, found)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def measure(
    run: Run,
    workers: Workers,
    repetitions: int,
    note: Callable[[str], None],
    with_loops: bool = True,
) -> Measured:
    """Take a run's rounds through RayGrid, whole, and between them those of the bare loops.

    The first round of a repetition warms up and the last, which tests x, is not timed; the very
    last is watched for memory. Where clients are trained as one, each repetition does its rounds
    once more with clients one by one, in turn with the tuned loop as well.

    Args:
        run: what to do; `rounds` are timed in each repetition.
        workers: Ray's workers; the loops have as many processes.
        repetitions: each begins anew from the initialization.
        note: told of each repetition.
        with_loops: whether bare loops take turns with RayGrid.
    """
    datasets = Datasets()
    prepared = simulation(with_untimed(run), datasets).settled(workers, datasets)
    settled = prepared.run
    driver = psutil.Process()
    processes = [driver, *driver.children(recursive=True)]
    with ExitStack() as ending:
        loops = _loops(prepared, workers.number, ending) if with_loops else {}
        turns = {RAY_GRID: _Turn(settled, processes, loops)}
        if settled.together != 1:
            single = settled.model_copy(update={"together": 1})
            turns[ONE_BY_ONE] = _Turn(single, processes, {TUNED: loops[TUNED]} if loops else {})
        for repetition in range(repetitions):
            note(f"repetition {repetition + 1} of {repetitions}")
            for turn in turns.values():
                prepared = simulation(turn.run, datasets)
                turn.take(prepared, prepared.grid(workers, datasets))
    timed = {RAY_GRID: turns[RAY_GRID].ours, **turns[RAY_GRID].others}
    timed |= {name: turn.ours for name, turn in turns.items()}
    asked = {"rounds": run.rounds, "evaluate_every": run.evaluate_every}
    contenders = {name: each.timings for name, each in timed.items()}
    return Measured(settled.model_copy(update=asked), workers.number, contenders)


def with_untimed(run: Run) -> Run:
    """Return the run that is measured: one round before the timed ones, and one after them."""
    return run.model_copy(update={"rounds": run.rounds + 2, "evaluate_every": run.rounds + 2})


def _loops(prepared: Simulation, processes: int, ending: ExitStack) -> dict[str, BareLoop]:
    """Start the loops: as PyTorch comes, and with the settings that our workers have."""
    plain = prepared.run.model_copy(update={"memory_format": "contiguous"})
    loops = {}
    for name, run, environment in ((BARE, plain, {}), (TUNED, prepared.run, ENVIRONMENT)):
        loops[name] = BareLoop(run, prepared.problem, processes, environment)
        ending.callback(loops[name].close)
    return loops


class _Turn:
    """A run through RayGrid; at the end of each of its rounds the loops do the same round.

    Args:
        run: the run.
        processes: RayGrid's.
        loops: by name.

    Attributes:
        run: the run.
        ours, others: RayGrid as a contender, and the loops.
    """

    def __init__(
        self, run: Run, processes: list[psutil.Process], loops: dict[str, BareLoop]
    ) -> None:
        self.run = run
        self._loops = loops
        self.ours = Contender(run.cohort, processes)
        self.others = {name: Contender(run.cohort, each.processes) for name, each in loops.items()}
        for each in (self.ours, *self.others.values()) if loops else ():
            each.timings.floor = self.others[TUNED].timings

    def take(self, prepared: Simulation, grid: RayGrid) -> None:
        """Train the run, from its initialization."""
        run, ours, others = prepared.run, self.ours, self.others
        for each in (ours, *others.values()):
            each.timings.seconds.append([])
        with ExitStack() as watched:

            def record(line: dict[str, Any], _arrays: ArrayRecord) -> None:
                number = line["round"]
                timed = 2 <= number < run.rounds
                if timed:
                    ours.end()
                watched.close()
                cohort = draw_cohort(run.seed, number, prepared.clients, run.cohort)
                for name, loop in self._loops.items():
                    with others[name].watching_memory() if number == run.rounds else nullcontext():
                        others[name].begin()
                        loop.round(cohort)
                        if timed:
                            others[name].end()
                if number == run.rounds - 1:
                    watched.enter_context(ours.watching_memory())
                ours.begin()

            train(prepared, grid, record)


def _clocks() -> tuple[float, float]:
    """Return the time and the driver's CPU seconds."""
    return time.perf_counter(), time.process_time()
