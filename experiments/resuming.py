"""A results folder that is one process's, and the runs in it that go on from their checkpoints."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from experiments.wiring import SETTLED, Datasets, Simulation, measured_work
from fedinit.checkpoints import DamagedError, UnsavableError, decode, encode
from fedinit.config import Run, difference
from fedinit.errors import RequestError, named
from fedinit.experiment_file import Experiment
from fedinit.locking import locked
from fedinit.results import RunFolder
from fedinit.simulation import RayGrid
from strategies.continuing import restore, state_of

LOCK = ".lock"


@dataclass(frozen=True)
class Position:
    """Where a run is after a round: with what strategy and clients keep, all that decides the next.

    Everything random is keyed by the seed and the round, so no generator's state is a part of it.

    Attributes:
        server_round: the round.
        arrays: x.
        previous: the round's aggregate D, for the cosine with the next.
        configs: what Flower hands a strategy to configure training and evaluation, as it left it.
    """

    server_round: int
    arrays: ArrayRecord
    previous: Tensor | None = None
    configs: tuple[ConfigRecord, ConfigRecord] = field(
        default_factory=lambda: (ConfigRecord(), ConfigRecord())
    )


class Checkpoints:
    """A run's checkpoints: written as it goes, and read where it goes on.

    Args:
        prepared: the run.
        grid: its grid, which keeps the clients' states.
        folder: its folder.
        note: called with what is to be said.
    """

    def __init__(
        self, prepared: Simulation, grid: RayGrid, folder: RunFolder, note: Callable[[str], None]
    ) -> None:
        self._run = prepared.run
        self._strategy = prepared.strategy
        self._layout = prepared.problem.layout
        self._grid = grid
        self._folder = folder
        self._note = note
        self._savable = True

    def save(self, position: Position) -> None:
        """Write a checkpoint; where the strategy's state cannot be saved, say so once."""
        if not self._savable:
            return
        try:
            content = encode(
                {
                    "position": vars(position),
                    # Read as one vector again, x is not gathered anew for each client.
                    "in_one_vector": getattr(position.arrays, "flat", None) is not None,
                    "strategy": state_of(self._strategy),
                    "states": self._grid.states,
                    "workers": self._grid.num_workers,
                }
            )
        except UnsavableError as error:
            self._savable = False
            self._note(f"  no checkpoints, so --resume would begin this run again: {error}")
        else:
            self._folder.checkpoint(position.server_round, content)

    def resume(self) -> Position | None:
        """Set strategy, clients and folder back to the newest checkpoint that is whole.

        Returns:
            Where the run goes on; None: at its beginning.

        Raises:
            RequestError: the model is no longer the checkpoint's.
        """
        for path in self._folder.checkpoints:
            try:
                content = decode(path)
                position, strategy, states, workers = self._read(content)
                self._folder.go_on(self._run, position.server_round)
            except DamagedError as error:
                self._note(f"  checkpoint {path.name} cannot be used: {error}")
                self._folder.set_aside(path)
                continue
            except RequestError as error:
                raise RequestError(f"checkpoint {path}: {error}") from None
            restore(self._strategy, strategy)
            self._grid.states.update(states)
            self._note(f"  goes on after round {position.server_round}")
            now, cohort = self._grid.num_workers, self._run.cohort
            if min(cohort, now) != min(cohort, workers):
                self._note(f"  workers: {now}, were {workers}: the same up to rounding")
            return position
        if (self._folder.path / "rounds.jsonl").exists():
            self._note("  no checkpoint to go on from: begins again at round 0")
        return None

    def _read(self, content: Any) -> tuple[Position, Any, dict[int, RecordDict], int]:
        """Read what `save` wrote.

        Raises:
            DamagedError: it is something else.
            RequestError: x is another model's.
        """
        try:
            position = Position(**content["position"])
            rest = content["strategy"], content["states"], content["workers"]
            flat, others = self._layout.flatten(position.arrays), self._layout.rest(position.arrays)
            if content["in_one_vector"]:
                position = replace(position, arrays=self._layout.record(flat, others))
        except (KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"not a run's: {named(error)}") from None
        return position, *rest


@contextmanager
def results_folder(out: Path) -> Iterator[None]:
    """Make a folder and keep every other process out of it.

    What was made goes again if the request is refused, or stopped, before anything was written.

    Raises:
        RequestError: it cannot be made or written to, or another process is at work in it.
    """

    def taken() -> None:
        raise RequestError(f"--out {out}: another fedinit is at work there")

    with ExitStack() as stack:
        try:
            made = not out.exists()
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / LOCK, taken))
        except OSError as error:
            raise RequestError(f"--out {out}: {error.strerror}") from None
        try:
            yield
        except (RequestError, KeyboardInterrupt):
            if is_free(out):
                (out / LOCK).unlink()
                if made:
                    with suppress(OSError):  # by now another process has something there
                        out.rmdir()
            raise


def check_folder(experiment: Experiment, out: Path, resume: bool) -> None:
    """Check that a folder is free, or holds the experiment's own results where it is resumed.

    Raises:
        RequestError: it holds something else; of a run's settings the changed one is named.
    """
    if is_free(out):
        return
    if not out.is_dir():
        raise RequestError(f"--out {out}: not a folder")
    if not resume:
        raise RequestError(f"--out {out}: not empty; continue it with --resume, or name another")
    there = sorted(path.parent.name for path in out.glob("*/run.yaml"))
    if there and not experiment.runs.keys() & set(there):
        raise RequestError(
            f"--resume: {out} holds another experiment's runs, '{there[0]}' ...; name another --out"
        )
    for label, run in as_begun(experiment, out).items():
        if not (out / label / "run.yaml").exists():
            continue
        changed = difference(RunFolder(out / label).run, run)
        if changed:
            raise RequestError(
                f"--resume: {out / label / 'run.yaml'} was made with other settings: {changed}; "
                "name another --out"
            )


def is_free(out: Path) -> bool:
    """Whether there is nothing yet where results are to go, but for a lock."""
    return not out.exists() or (out.is_dir() and set(os.listdir(out)) <= {LOCK})


def as_begun(experiment: Experiment, out: Path) -> dict[str, Run]:
    """Return the runs with what an earlier call measured, of each or of one like it.

    From its begin to its end it is one run, and the arms of a pair agree.
    """
    paths = {label: out / label / "run.yaml" for label in experiment.runs}
    begun = {label: RunFolder(out / label).run for label in paths if paths[label].exists()}
    like = {_work(experiment.runs[label]): run for label, run in begun.items()}
    settled = {}
    for label, run in experiment.runs.items():
        found = begun.get(label, like.get(_work(run), run))
        auto = [name for name in SETTLED if getattr(run, name) == "auto"]
        settled[label] = run.model_copy(update={name: getattr(found, name) for name in auto})
    return settled


def _work(run: Run) -> str:
    return json.dumps([*measured_work(run), Datasets.key(run), run.cohort], default=str)
