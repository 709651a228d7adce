"""Carry out an experiment: its runs one after another on the same workers, written as they go."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, MetricRecord

from experiments.progress import Progress
from experiments.proxies import check, train_missing
from experiments.recording import DivergedError, MeasuringGrid, Recorder
from experiments.resuming import Checkpoints, Position, as_begun, check_folder, results_folder
from experiments.stopping import Stop, StoppedError
from experiments.unread import notes
from experiments.wiring import Datasets, Simulation, simulation
from fedinit.config import Run
from fedinit.errors import RequestError, WriteError, located
from fedinit.experiment_file import Experiment
from fedinit.randomness import seed_strategy
from fedinit.results import ENDED, SUMMARY, RunFolder, summarize
from fedinit.simulation import RayGrid, Workers
from strategies.continuing import Continued, has_own_start

_NO_TIMEOUT = 1e8  # seconds; a slow round is no reason to drop its clients


def run_experiment(
    experiment: Experiment,
    out: Path,
    progress: Progress,
    resume: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Carry out every run that has not ended yet; a run that fails does not stop the others.

    Args:
        experiment: what to run.
        out: the results folder.
        progress: told of each run and round.
        resume: whether `out` may hold earlier results; runs that ended there are kept, and one that
            was broken off goes on from its last checkpoint.
        address: a running Ray cluster to join.

    Returns:
        The summary, as in summary.json.

    Raises:
        RequestError: any run's request is wrong, or `out` holds something else. Nothing is written.
        WriteError: a file cannot be written; what was written before is whole.
        StoppedError: Ctrl-C or SIGTERM once; the round is finished and the summary written.
        KeyboardInterrupt: twice; likewise, but for the round.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    check_folder(experiment, out, resume)
    datasets = Datasets()
    for label, run in experiment.runs.items():
        try:
            check(run, datasets)
        except RequestError as error:
            raise RequestError(
                f"{error} (run {label})" if experiment.varied else str(error)
            ) from None
    for text in notes(experiment):
        progress.note(text)
    train_missing(experiment.runs.values(), datasets, progress)
    with results_folder(out):
        check_folder(experiment, out, resume)  # again: now nobody else writes to it
        todo = {
            label: run
            for label, run in as_begun(experiment, out).items()
            if RunFolder(out / label).status not in ENDED
        }
        stop = Stop()
        try:
            # The most first: more than Ray has CPUs is refused before anything is run.
            for number in sorted({_workers(run) for run in todo.values()}, reverse=True):
                alike = {label: run for label, run in todo.items() if _workers(run) == number}
                progress.note("starting the workers")
                with (
                    stop.caught(),
                    Workers(
                        number=number or None,
                        most=max(run.cohort for run in alike.values()),
                        import_path=[str(experiment.folder)],
                        address=address,
                    ) as workers,
                ):
                    for label, run in alike.items():
                        _begin_summary(out, experiment)
                        _carry_out(run, label, out, workers, datasets, progress, stop)
                        summarize(out, experiment)
                        if stop.requested:
                            raise StoppedError
        except KeyboardInterrupt:
            summarize(out, experiment)
            raise
        return summarize(out, experiment)


def _workers(run: Run) -> int:
    """How many workers a run asks for; 0 for `auto`."""
    return 0 if run.workers == "auto" else run.workers


def _carry_out(
    run: Run,
    label: str,
    out: Path,
    workers: Workers,
    datasets: Datasets,
    progress: Progress,
    stop: Stop,
) -> None:
    """Carry out one run of several; how it ends is in its folder.

    Raises:
        WriteError: a file cannot be written: no run after this could be kept either.
    """
    folder = RunFolder(out / label)
    try:
        prepared = simulation(run, datasets).settled(workers, datasets)
        with progress.run(label, run.rounds, str(prepared.initialization)) as report:
            if run.measure.hessian:
                progress.note("  measuring the Hessian's top eigenvalues")
            grid = prepared.grid(workers, datasets)
            with stop.caught(in_round=True):
                execute(prepared, grid, folder, report, progress.note, stop)
    except WriteError:
        raise
    except DivergedError as error:
        progress.ended(label, folder.status, str(error))
    except Exception as error:  # the other runs go on
        folder.fail(located(error))
        progress.ended(label, folder.status, folder.error or "")


def _begin_summary(out: Path, experiment: Experiment) -> None:
    """Write the first summary: however this ends, it says what became of which run.

    Raises:
        RequestError: nothing can be written here.
    """
    if not (out / SUMMARY).exists():
        try:
            summarize(out, experiment)
        except WriteError as error:
            raise RequestError(str(error)) from None


def execute(
    prepared: Simulation,
    grid: MeasuringGrid,
    folder: RunFolder,
    report: Callable[[dict[str, Any]], None],
    note: Callable[[str], None] = lambda _: None,
    stop: Stop | None = None,
) -> None:
    """Carry out one run on a grid, top to bottom, into its folder.

    Args:
        prepared: the run.
        grid: RayGrid, or under Flower's own runtime ObservedGrid.
        folder: where its lines and final weights go. On RayGrid the run goes on from the checkpoint
            that is there, and leaves checkpoints of its own.
        report: called with each round's line.
        note: called with what else is to be said.
        stop: asked after each round.

    Raises:
        DivergedError: a loss or a weight is not finite; the folder says so.
        StoppedError: after a round, as was asked; the folder holds its checkpoint.
    """
    run, layout = prepared.run, prepared.problem.layout
    checkpoints = Checkpoints(prepared, grid, folder, note) if isinstance(grid, RayGrid) else None
    begun = checkpoints.resume() if checkpoints else None
    if begun is None:
        folder.begin(run, prepared.initialization.record())

    def record(line: dict[str, Any], arrays: ArrayRecord) -> None:
        folder.append(line)
        if run.measure.distance and line["test_loss"] is not None:
            folder.keep(line["round"], layout.flatten(arrays))
        report(line)

    def reached(position: Position) -> None:
        if position.server_round == run.rounds:
            return
        stopping = stop is not None and stop.requested
        if checkpoints and (stopping or position.server_round % run.checkpoint_every == 0):
            checkpoints.save(position)
        if stopping:
            raise StoppedError

    try:
        final = train(prepared, grid, record, begun, reached)
    except DivergedError as error:
        folder.diverge(error.server_round, str(error))
        raise
    if run.measure.distance:
        folder.measure_distances(layout.flatten(final))
    labels = prepared.problem.dataset.labels or ("" if ":" in run.dataset else run.dataset)
    folder.finish(layout.named(final), **({"labels": labels} if labels else {}))


def train(
    prepared: Simulation,
    grid: MeasuringGrid,
    record: Callable[[dict[str, Any], ArrayRecord], None],
    begun: Position | None = None,
    reached: Callable[[Position], None] = lambda _: None,
) -> ArrayRecord:
    """Train one run on a grid.

    Args:
        prepared: the run.
        grid: RayGrid, or under Flower's own runtime ObservedGrid.
        record: called with each round's line and x, from round 0 on.
        begun: where to go on, strategy and clients being set back already; default: at the start.
        reached: called after each round, when it is recorded.

    Returns:
        The final x.

    Raises:
        DivergedError: a loss or a weight is not finite.
        RuntimeError: the strategy never returned any weights.
    """
    run, layout, at = prepared.run, prepared.problem.layout, begun or Position(0, prepared.arrays)
    continued = Continued(prepared.strategy, at.server_round)
    recorder = Recorder(prepared, grid, continued, record, at.previous)

    def recorded(rounds: int, arrays: ArrayRecord) -> MetricRecord | None:
        if begun and not rounds:
            return None  # this round was recorded before
        server_round = at.server_round + rounds
        tested = recorder(server_round, arrays)
        reached(Position(server_round, arrays, recorder.previous, at.configs))
        seed_strategy(run.seed, server_round + 1)
        return tested

    seed_strategy(run.seed, at.server_round + 1)
    own_start = begun is None and has_own_start(prepared.strategy)
    strategy = prepared.strategy if own_start else continued
    result = strategy.start(
        grid,
        at.arrays,
        num_rounds=run.rounds - at.server_round,
        timeout=_NO_TIMEOUT,
        train_config=at.configs[0],
        evaluate_config=at.configs[1],
        evaluate_fn=recorded,
    )
    if len(result.arrays):
        return result.arrays
    if run.rounds and torch.equal(layout.flatten(at.arrays), layout.flatten(prepared.arrays)):
        name, rounds = run.strategy, run.rounds
        raise RuntimeError(f"strategy '{name}' returned no weights in any of {rounds} rounds")
    return at.arrays  # nothing was aggregated since
