"""Carry out an experiment: its runs one after another on the same workers, written as they go."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid

from experiments.progress import Progress
from experiments.proxies import check, train_missing
from experiments.studies import check_study
from experiments.wiring import SETTLED, Datasets, Simulation, simulation
from fedinit.cohort import ARRAYS, METRICS, CohortSums
from fedinit.config import Run
from fedinit.device import device
from fedinit.errors import RequestError, named
from fedinit.experiment_file import Experiment
from fedinit.measurements.hessian import top_hessian_eigenvalues
from fedinit.randomness import Draw, keyed
from fedinit.results import RunFolder, summarize
from fedinit.simulation import RayGrid, Workers
from fedinit.simulation.observed_grid import ObservedGrid

MeasuringGrid = RayGrid | ObservedGrid  # a Flower grid that sums over the updates it carries
_NO_TIMEOUT = 1e8  # seconds; a slow round is no reason to drop its clients
_TEST_PARTS = 8  # that the test set is evaluated in: enough to keep the workers busy
_HESSIAN_BATCH = 128  # rows of one Hessian-vector product at a time
_HESSIAN_TOLERANCE = 1e-3  # of the eigenvalues, relative


def run_experiment(
    experiment: Experiment,
    out: Path,
    progress: Progress,
    resume: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Carry out every run that is not done yet; a run that fails does not stop the others.

    Args:
        experiment: what to run.
        out: the results folder.
        progress: told of each run and round.
        resume: whether `out` may hold earlier results; runs that are done there are kept.
        address: a running Ray cluster to join.

    Returns:
        The summary, as in summary.json.

    Raises:
        RequestError: any run's request is wrong, or `out` holds something else. Nothing is written.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    check_study(experiment.study)
    _check_folder(experiment, out, resume)
    datasets = Datasets()
    for label, run in experiment.runs.items():
        try:
            check(run, datasets)
        except RequestError as error:
            raise RequestError(
                f"{error} (run {label})" if experiment.varied else str(error)
            ) from None

    train_missing(experiment.runs.values(), datasets, progress)
    todo = {
        label: _as_begun(run, out / label)
        for label, run in experiment.runs.items()
        if RunFolder(out / label).status != "done"
    }
    for setting in dict.fromkeys(run.workers for run in todo.values()):
        alike = {label: run for label, run in todo.items() if run.workers == setting}
        progress.note("starting the workers")
        with (
            results_folder(out),
            Workers(
                number=None if setting == "auto" else setting,
                most=max(run.cohort for run in alike.values()),
                import_path=[str(experiment.folder)],
                address=address,
            ) as workers,
        ):
            for label, run in alike.items():
                folder = RunFolder(out / label)
                try:
                    prepared = simulation(run, datasets).settled(workers, datasets)
                    with progress.run(label, run.rounds, str(prepared.initialization)) as report:
                        if run.measure.hessian:
                            progress.note("  measuring the Hessian's top eigenvalues")
                        execute(prepared, prepared.grid(workers, datasets), folder, report)
                except Exception as error:  # the other runs go on
                    folder.fail(named(error))
                    progress.failed(label, folder.error or "")
                summarize(out, experiment)
    return summarize(out, experiment)


def execute(
    prepared: Simulation,
    grid: MeasuringGrid,
    folder: RunFolder,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Carry out one run on a grid, top to bottom, into its folder.

    Args:
        prepared: the run.
        grid: RayGrid, or under Flower's own runtime ObservedGrid.
        folder: where its lines and final weights go.
        report: called with each round's line.
    """
    run, layout = prepared.run, prepared.problem.layout
    folder.begin(run, prepared.initialization.record())

    def record(line: dict[str, Any], arrays: ArrayRecord) -> None:
        folder.append(line)
        if run.measure.distance and line["test_loss"] is not None:
            folder.keep(line["round"], layout.flatten(arrays))
        report(line)

    final = train(prepared, grid, record)
    if run.measure.distance:
        folder.measure_distances(layout.flatten(final))
    folder.finish(layout.named(final))


def train(
    prepared: Simulation, grid: MeasuringGrid, record: Callable[[dict[str, Any], ArrayRecord], None]
) -> ArrayRecord:
    """Train one run on a grid.

    Args:
        prepared: the run.
        grid: RayGrid, or under Flower's own runtime ObservedGrid.
        record: called with each round's line and x, from round 0 on.

    Returns:
        The final x.

    Raises:
        DivergedError: a loss is not finite.
    """
    run = prepared.run
    random.seed(run.seed)  # Flower's strategies sample from Python's generator
    torch.manual_seed(run.seed)
    result = prepared.strategy.start(
        grid,
        prepared.arrays,
        num_rounds=run.rounds,
        timeout=_NO_TIMEOUT,
        evaluate_fn=Recorder(prepared, grid, record),
    )
    return result.arrays if run.rounds else prepared.arrays


class DivergedError(RuntimeError):
    """A loss stopped being a finite number: there is nothing left to learn from this run."""


class Recorder:
    """Strategy.start's `evaluate_fn`: makes a round's line, testing x every `evaluate_every`."""

    def __init__(
        self,
        prepared: Simulation,
        grid: MeasuringGrid,
        record: Callable[[dict[str, Any], ArrayRecord], None],
    ) -> None:
        self._prepared = prepared
        self._grid = grid
        self._record = record
        self._parts = min(_TEST_PARTS, prepared.problem.dataset.test_size)
        self._sequences = prepared.problem.dataset.has_sequences
        self._previous: torch.Tensor | None = None  # the last aggregate
        self._spare: torch.Tensor | None = None  # the one before: memory for the next
        self._since = time.perf_counter()

    def __call__(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Record the round that just ended; return the test metrics if x was tested."""
        run = self._prepared.run
        sums = self._grid.take_sums()
        due = server_round % run.evaluate_every == 0 or server_round == run.rounds
        tested = evaluate_test(self._grid, arrays, self._parts) if due else {}
        now = time.perf_counter()
        line = {
            "round": server_round,
            **(self._training(sums) if sums is not None else {}),
            "test_loss": tested.get("loss"),
            "test_accuracy": tested.get("accuracy"),
            **({"test_perplexity": _perplexity(tested)} if self._sequences else {}),
            "wall_seconds": round(now - self._since, 4),
        }
        if server_round == 0:
            line |= initial_curvature(self._prepared)
        self._since = time.perf_counter()
        self._record(line, arrays)
        for name in ("train_loss", "test_loss"):
            if not math.isfinite(line.get(name) or 0.0):
                raise DivergedError(f"{name} is not finite in round {server_round}")
        return MetricRecord(dict(tested)) if due else None

    def _training(self, sums: CohortSums) -> dict[str, Any]:
        metrics = sums.mean_metrics()
        aggregate = sums.mean_update(out=self._spare)
        previous, self._previous, self._spare = self._previous, aggregate, self._previous
        return {
            "train_loss": metrics.get("train-loss"),
            "train_accuracy": metrics.get("train-accuracy"),
            "cohort_size": sums.clients,
            "examples": int(sums.examples),
            "update_norm": aggregate.norm().item(),
            "gradient_diversity": sums.gradient_diversity(),
            "mean_pairwise_cosine": sums.mean_pairwise_cosine(),
            "cosine_with_previous": _cosine(previous, aggregate),
        }


def initial_curvature(prepared: Simulation) -> dict[str, float | int]:
    """Return the top Hessian eigenvalues at the initialization, where the run asks for them.

    The sample is of training rows, the same for every run with the same data and seed.
    """
    run, problem = prepared.run, prepared.problem
    if not run.measure.hessian:
        return {}

    rows = keyed(Draw.SAMPLE, run.seed).permutation(len(problem.dataset))[: run.measure.hessian]
    batches = []
    for at in range(0, len(rows), _HESSIAN_BATCH):
        inputs, targets = problem.dataset.batch(rows[at : at + _HESSIAN_BATCH])
        batches.append((inputs.to(device()), targets.to(device())))
    top = top_hessian_eigenvalues(
        problem.model.to(device()), problem.loss, batches, run.seed, _HESSIAN_TOLERANCE
    )
    return {f"hessian_{name}": value for name, value in asdict(top).items()}


def evaluate_test(grid: Grid, arrays: ArrayRecord, parts: int) -> dict[str, float]:
    """Evaluate x on the test set, in `parts` by as many nodes, or by all if there are fewer.

    Returns:
        `loss` and, where targets are labels, `accuracy`.
    """
    nodes = sorted(grid.get_node_ids())[:parts]
    replies = grid.send_and_receive(
        [
            Message(
                RecordDict(
                    {ARRAYS: arrays, "config": ConfigRecord({"part": part, "parts": len(nodes)})}
                ),
                dst_node_id=node,
                message_type="evaluate.test",
            )
            for part, node in enumerate(nodes)
        ]
    )
    parts_scored = []
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"evaluation failed: {reply.error.reason}")
        parts_scored.append(dict(reply.content.metric_records[METRICS]))
    return _weighted(parts_scored)


def _weighted(parts: Iterable[dict[str, Any]]) -> dict[str, float]:
    parts = list(parts)
    total = sum(part["num-examples"] for part in parts)
    return {
        name: sum(part[name] * part["num-examples"] for part in parts) / total
        for name in parts[0]
        if name != "num-examples"
    }


def _perplexity(tested: dict[str, float]) -> float | None:
    return float(np.exp(tested["loss"])) if tested else None


def _cosine(first: torch.Tensor | None, second: torch.Tensor) -> float:
    if first is None:
        return math.nan
    norms = (first.norm() * second.norm()).item()
    return torch.dot(first, second).item() / norms if norms > 0 else math.nan


@contextmanager
def results_folder(out: Path) -> Iterator[None]:
    """Make a folder; it goes again if the request is refused before anything was written.

    Raises:
        RequestError: it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"--out {out}: {error.strerror}") from None
    try:
        yield
    except RequestError:
        if not any(out.iterdir()):
            out.rmdir()
        raise


def _check_folder(experiment: Experiment, out: Path, resume: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise RequestError(f"--out {out}: not a folder")
    if not resume:
        raise RequestError(f"--out {out}: not empty; continue it with --resume, or name another")
    for label, run in experiment.runs.items():
        earlier = out / label / "run.yaml"
        if earlier.exists() and RunFolder(out / label).run != _as_begun(run, out / label):
            raise RequestError(
                f"--resume: {earlier} was made with other settings; name another --out"
            )


def _as_begun(run: Run, path: Path) -> Run:
    """Return the run as an earlier call settled it: from its begin to its end it is one run."""
    if not (path / "run.yaml").exists():
        return run
    begun = RunFolder(path).run
    auto = [name for name in SETTLED if getattr(run, name) == "auto"]
    return run.model_copy(update={name: getattr(begun, name) for name in auto})
