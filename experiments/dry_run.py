"""`fedinit run --dry-run`: the runs of an experiment and what they cost; nothing is run."""

import logging

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from clients.client_optimizers import FULL_GRADIENT, NO_LOCAL_STEPS
from experiments.proxies import check
from experiments.studies import check_study
from experiments.unread import notes
from experiments.wiring import Datasets, check_methods, problem_of
from fedinit import wording
from fedinit.config import Run
from fedinit.errors import NotHereError
from fedinit.experiment_file import Experiment
from fedinit.problem import Problem


def cost_table(experiment: Experiment) -> Group:
    """List the runs with rounds, client updates, examples visited in training, and traffic.

    Updates are rounds x cohort; examples are expected ones (updates x a client's mean examples x
    its expected passes through them); traffic is x down and up again for each update. A run whose
    data are not here has no examples and traffic. What is not ready, data or published weights,
    follows the table.

    Raises:
        RequestError: a request is wrong.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    check_study(experiment.study)
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_footer=True)
    table.add_column("run", f"{len(experiment.runs)} runs", overflow="fold")
    rows = []
    reasons: dict[str, str] = {}
    datasets = Datasets()
    for label, run in experiment.runs.items():
        check_methods(run)
        costs: list[float | None] = [run.rounds, run.rounds * run.cohort, None, None]
        try:
            datasets.load(run)
            costs[2:] = _work(run, problem_of(run, datasets))
            check(run, datasets)
        except NotHereError as error:
            reasons.setdefault(str(error), label)
        rows.append((label, costs))
    columns = zip(*(costs for _, costs in rows), strict=True)
    for name, column in zip(("rounds", "client updates", "examples", "GB"), columns, strict=True):
        known = [cost for cost in column if cost is not None]
        total = sum(known) if known else None
        table.add_column(name, _write(total), justify="right", no_wrap=True)
    for label, costs in rows:
        table.add_row(Text(label), *map(_write, costs))
    missing = [f"not ready here: {reason} (first: {run})" for reason, run in reasons.items()]
    return Group(table, *map(Text, [*missing, *notes(experiment)]))


def _work(run: Run, problem: Problem) -> list[float]:
    """Return the examples that a run visits in training, and the GB that x makes to and fro."""
    updates = run.rounds * run.cohort
    share, (low, high) = run.stragglers.fraction, run.stragglers.epochs
    epochs = (1 - share) * run.client.epochs + share * (low + high) / 2
    client = run.client.optimizer
    passes = epochs * (client not in NO_LOCAL_STEPS) + (client in FULL_GRADIENT)
    state = problem.model.state_dict()
    size = sum(state[name].nbytes for name in problem.layout.shapes)
    return [updates * problem.dataset.owners.sizes.mean() * passes, 2e-9 * updates * size]


def _write(cost: float | None) -> str:
    return wording.MISSING if cost is None else f"{cost:,.0f}" if cost >= 100 else f"{cost:.3g}"
