"""`fedinit tune`: rates for each arm of an experiment, searched on held-out training examples.

As in the study, client and server rates (and mu) are each arm's own: (method, data, model,
initialization). A trial is a run of the arm with one combination of the values under search; its
score is the mean validation loss of the last evaluations. The test set is never looked at.

DIR/trials.db      every trial with its losses by round (Optuna's SQLite storage)
DIR/rates.yaml     the best rates of each arm that is done, as rules for an experiment's `rules`
"""

import itertools
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
import yaml
from flwr.app import ArrayRecord
from optuna.trial import FrozenTrial, Trial, TrialState
from pydantic import PositiveInt, ValidationError
from rich.console import Console

from experiments.progress import Progress
from experiments.proxies import check, train_missing
from experiments.recording import DivergedError
from experiments.resuming import is_free, results_folder
from experiments.running import train
from experiments.stopping import Stop, StoppedError
from experiments.unread import notes
from experiments.wiring import Datasets, simulation
from fedinit.config import CARRYING_OUT, Run, Strict, explain
from fedinit.errors import RequestError, WriteError, located, one_line
from fedinit.experiment_file import (
    Experiment,
    check_rules,
    matches,
    with_settings,
    with_weights_beside,
)
from fedinit.randomness import Draw, keyed
from fedinit.results import to_json, write_atomically
from fedinit.simulation import Workers

RATES = "rates.yaml"
_SCORED = 3  # last evaluations, averaged: one alone is noisy when cohorts are small
_FREE = 2  # trials that are never stopped early; later ones are compared with the median
REQUEST = "request.json"
_TRIALS = "trials.db"
_FAILURE, _DIVERGED = "failure", "diverged"
_ANY = optuna.samplers.RandomSampler()  # of a trial's values none is left to draw

# Lists are searched as well (server.betas), which Optuna can store, and says that it cannot.
warnings.filterwarnings("ignore", message="Choices for a categorical")
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


class Tune(Strict):
    """The `tune` section of an experiment file.

    Attributes:
        trials: combinations tried for each arm, drawn without replacement.
        search: rules {match, set}; `set` maps a dotted key to the list of values to try, in order.
            A later rule replaces an earlier one's list; null takes the key out of the search.
    """

    trials: PositiveInt = 12
    search: list[Any]


@dataclass(frozen=True)
class Arm:
    """One arm: its run, what identifies it, the values to search, and where weights are named."""

    label: str
    run: Run
    match: dict[str, Any]
    values: dict[str, list[Any]]
    folder: Path

    @property
    def searches_proxy(self) -> bool:
        """Whether each trial may start from a proxy of its own."""
        return any(key.partition(".")[0] == "proxy" for key in self.values)

    @cached_property
    def combinations(self) -> list[dict[str, Any]]:
        """Every combination of the values."""
        product = itertools.product(*self.values.values())
        return [dict(zip(self.values, each, strict=True)) for each in product]

    @cached_property
    def runs(self) -> list[Run]:
        """The run of every combination; each is validated by being made."""
        return [self._run(chosen) for chosen in self.combinations]

    def drawn(self, most: int) -> list[dict[str, Any]]:
        """Return at most so many of the combinations, in the order in which they are tried."""
        order = keyed(Draw.SEARCH, self.run.seed).permutation(len(self.combinations))
        return [self.combinations[index] for index in order[:most]]

    def run_of(self, trial: Trial) -> Run:
        """Return the run of a trial."""
        return self._run(
            {key: trial.suggest_categorical(key, self.values[key]) for key in self.values}
        )

    def _run(self, chosen: dict[str, Any]) -> Run:
        return with_weights_beside(with_settings(self.run, chosen), self.folder)


def tune(
    experiment: Experiment,
    out: Path,
    progress: Progress,
    resume: bool = False,
    address: str | None = None,
) -> Path:
    """Search every arm; return the path of the rates file, which grows with each arm.

    Args:
        experiment: its runs are the arms; its `tune` section says what is searched.
        out: a new folder, or with `resume` one that an earlier call with the same request left.
        progress: told of each arm and trial.
        resume: whether to go on in `out`; no trial that has finished is repeated, and one that was
            broken off is.
        address: a running Ray cluster to join.

    Raises:
        RequestError: the request is wrong, or `out` holds something else. Nothing is written.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    settings = _settings(experiment)
    arms = [_arm(experiment, label, settings) for label in experiment.runs]
    described = [
        settings.model_dump(mode="json"),
        *(arm.run.model_dump(mode="json", exclude=set(CARRYING_OUT)) for arm in arms),
    ]
    request = to_json(described, indent=1)
    _check_folder(out, request, resume)
    datasets = Datasets()
    for arm in arms:
        check(arm.runs[0], datasets)
    for text in notes(experiment):
        progress.note(text)
    train_missing((arm.run for arm in arms if not arm.searches_proxy), datasets, progress)
    storage = f"sqlite:///{(out / _TRIALS).resolve()}"
    rules: list[dict[str, Any]] = []
    progress.note("starting the workers")
    stop = Stop()
    with (
        results_folder(out),
        stop.caught(),
        Workers(
            number=max((n for arm in arms if (n := arm.run.workers) != "auto"), default=None),
            most=max(arm.run.cohort for arm in arms),
            import_path=[str(experiment.folder)],
            address=address,
        ) as workers,
    ):
        _check_folder(out, request, resume)  # again: now nobody else writes to it
        write_atomically(out / REQUEST, request.encode())
        for arm in arms:
            tried = arm.drawn(settings.trials)
            pruner = optuna.pruners.MedianPruner(n_startup_trials=_FREE)
            with _stored(out / _TRIALS), progress.arm(arm.label, len(tried)) as report:
                study = optuna.create_study(
                    storage=storage, study_name=arm.label, load_if_exists=True, pruner=pruner
                )
                done = [trial.params for trial in _finished(study)]
                for chosen in (each for each in tried if each not in done):
                    if stop.requested:
                        raise StoppedError
                    study.sampler = optuna.samplers.PartialFixedSampler(chosen, _ANY)
                    study.optimize(
                        partial(_score, arm, workers, datasets),
                        n_trials=1,
                        catch=Exception,  # whatever a user's model raises; the other trials go on
                    )
                    trials = _finished(study)
                    report(len(trials), _told(trials[-1]))
            rules.append(_rule(arm, _finished(study)))
            _write_rates(out / RATES, experiment, rules, settings)
            progress.note(f"  best: {rules[-1]['set']} {rules[-1]['note']}")
    return out / RATES


@contextmanager
def _stored(path: Path) -> Iterator[None]:
    """Name the storage in what goes wrong with it.

    Raises:
        WriteError: the disk is full, say.
    """
    try:
        yield
    except optuna.exceptions.StorageInternalError as error:
        raise WriteError(f"{path}: {one_line(error)}") from None


def _settings(experiment: Experiment) -> Tune:
    if experiment.tune is None:
        raise RequestError(f"{experiment.name} has no `tune` section: nothing to search")
    try:
        settings = Tune.model_validate(experiment.tune)
    except ValidationError as error:
        raise explain(error, Tune.model_fields, "tune") from None
    for rule in check_rules("tune.search", settings.search):
        for key, values in rule["set"].items():
            if values is not None and not (isinstance(values, list) and values):
                raise RequestError(f"tune.search: {key}: expected a list of values, got {values!r}")
    return settings


def _arm(experiment: Experiment, label: str, settings: Tune) -> Arm:
    run = experiment.runs[label]
    values: dict[str, list[Any]] = {}
    for rule in settings.search:
        if matches(experiment.as_written(run), rule):
            values |= rule["set"]
    values = {key: found for key, found in values.items() if found is not None}
    if not values:
        raise RequestError(f"tune.search: no rule matches the run {label}")
    arm = Arm(label, run, experiment.arm(run), values, experiment.folder)
    for each in arm.runs:
        if not each.validation:  # or it would be scored on the test set
            raise RequestError(
                "validation: fedinit tune needs a share of each client's examples, > 0"
            )
        if not each.rounds:
            raise RequestError("rounds: fedinit tune needs at least 1")
    return arm


def _check_folder(out: Path, request: str, resume: bool) -> None:
    earlier = out / REQUEST
    if resume and earlier.exists():
        if earlier.read_text(encoding="utf-8") != request:
            raise RequestError(f"--resume: {out} was made with another request; name another --out")
        return
    if not is_free(out):
        raise RequestError(f"--out {out}: not empty; continue it with --resume, or name another")


def _score(arm: Arm, workers: Workers, datasets: Datasets, trial: Trial) -> float:
    """Train one trial; stop it where its best loss is worse than the median of those before.

    The median is of their losses in that round. The last round's stops nobody.
    """
    losses: list[float] = []

    def record(line: dict[str, Any], _x: ArrayRecord) -> None:
        if line["round"] and line["test_loss"] is not None and math.isfinite(line["test_loss"]):
            losses.append(line["test_loss"])
            trial.report(line["test_loss"], line["round"])
            if line["round"] < run.rounds and trial.should_prune():
                raise optuna.TrialPruned

    try:
        run = arm.run_of(trial)
        train_missing([run], datasets, Progress(Console(quiet=True), 1))  # there is a bar already
        prepared = simulation(run, datasets).settled(workers, datasets)
        train(prepared, prepared.grid(workers, datasets), record)
        return mean(losses[-_SCORED:])
    except DivergedError:
        trial.set_user_attr(_DIVERGED, True)
        raise optuna.TrialPruned from None
    except Exception as error:
        if not isinstance(error, optuna.TrialPruned):
            trial.set_user_attr(_FAILURE, located(error))
        raise


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that ended by themselves: Ctrl-C, too, leaves one as failed."""
    ended = study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL))
    return [
        trial for trial in ended if trial.state != TrialState.FAIL or _FAILURE in trial.user_attrs
    ]


def _told(trial: FrozenTrial) -> str:
    values = " ".join(f"{key}={value}" for key, value in trial.params.items())
    if trial.state == TrialState.COMPLETE:
        return f"{values}  validation loss {trial.value:.4g}"
    if trial.state == TrialState.FAIL:
        return f"{values}  failed: {trial.user_attrs.get(_FAILURE)}"
    how = "diverged" if _DIVERGED in trial.user_attrs else "stopped"
    return f"{values}  {how} after round {trial.last_step or 0}"


def _rule(arm: Arm, trials: list[FrozenTrial]) -> dict[str, Any]:
    """Return the arm's rule for an experiment's `rules`, with what is to be known of it."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    failed = sum(trial.state == TrialState.FAIL for trial in trials)
    diverged = sum(_DIVERGED in trial.user_attrs for trial in trials)
    failures = f", {failed} failed" if failed else ""
    if not complete:
        note = f"none of {len(trials)} trials was finite{failures}"
        return {"match": arm.match, "set": {}, "note": note}
    best = min(complete, key=lambda trial: trial.values[0])
    stopped = f"{len(trials) - len(complete) - failed - diverged} stopped early"
    stopped += f", {diverged} diverged" if diverged else ""
    note = (
        f"validation loss {best.value:.4g}, best of {len(trials)} of {len(arm.runs)} combinations "
        f"({stopped}{failures})"
    )
    for key, values in arm.values.items():
        ordered = len(values) > 1 and all(type(value) in (int, float) for value in values)
        if ordered and best.params[key] in (min(values), max(values)):
            note += f"; {key} {best.params[key]} is on the edge of {values}"
    return {"match": arm.match, "set": dict(best.params), "note": note}


def _write_rates(
    path: Path, experiment: Experiment, rules: list[dict[str, Any]], settings: Tune
) -> None:
    libraries = ", ".join(f"{each} {version(each)}" for each in ("torch", "flwr", "optuna"))
    about = {
        "made_by": f"fedinit tune {experiment.name}",
        "seed": sorted({run.seed for run in experiment.runs.values()}),
        "with": libraries,
        "trials": settings.trials,
        "search": settings.search,
    }
    text = yaml.safe_dump({"about": about, "when": rules}, sort_keys=False, width=100)
    write_atomically(path, text.encode())
