"""A run's model and loss, tried on some rows: what does not fit is seen before any work starts."""

import warnings
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain

import torch
from torch import Tensor, nn

from clients.together import obstacle
from fedinit.config import Run
from fedinit.errors import RequestError, located
from fedinit.measurements.evaluation import eval_mode, evaluate
from fedinit.problem import Problem, cross_entropy
from fedinit.randomness import draws_undone
from strategies.fedopt import draw_cohort

# Layers that want more than one value for each channel, or group of them, in training.
_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


def try_out(run: Run, problem: Problem) -> None:
    """Run the model and the loss on two rows.

    Raises:
        RequestError: they do not fit.
    """
    shape = tuple(problem.dataset.inputs.shape[1:])
    rows = problem.dataset.test_batch(0, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one line is enough
            _check_scores(run, problem, rows[0])
            evaluate(problem.model, problem.loss, [rows])
    except RequestError:
        raise
    except Exception as error:  # whatever a user's model or loss raises
        raise RequestError(
            f"model '{run.model}' with loss '{run.loss}' does not fit rows of shape {shape} of "
            f"'{run.dataset}': {located(error)}"
        ) from None


def check_batches(run: Run, problem: Problem) -> None:
    """Check that the model can be trained on the batches of the run's clients.

    Raises:
        RequestError: clients are to be trained as one and cannot be; or the last batch of one that
            may be drawn is of one row, which is too few for the model, as it normalises batches.
    """
    if run.together not in (1, "auto") and (reason := obstacle(problem)):
        raise RequestError(f"together: {run.together} clients of '{run.model}' as one: {reason}")
    owners, size = problem.dataset.owners, run.client.batch_size
    if run.on_client_error == "skip" or not any(
        isinstance(each, _NORMALIZATIONS) for each in problem.model.modules()
    ):
        return
    last_rows = (owners.sizes - 1) % size + 1
    alone = [client for client in _drawn(run, len(owners)) if last_rows[client] == 1]
    if not alone:
        return
    try:
        with draws_undone(), torch.no_grad():
            deepcopy(problem.model).train()(problem.dataset.test_batch(0, 1)[0])
    except Exception as error:  # whatever a user's model raises
        raise RequestError(
            f"client.batch_size: {size} leaves client '{owners.ids[alone[0]]}' a last batch of one "
            f"row, which model '{run.model}' fails on: {located(error)}"
        ) from None


def _drawn(run: Run, clients: int) -> Iterable[int]:
    """Return the clients that may be drawn: other strategies than ours do not say which."""
    if run.strategy != "fedopt":
        return range(clients)
    rounds = range(1, run.rounds + 1)
    cohorts = (draw_cohort(run.seed, each, clients, run.cohort) for each in rounds)
    return sorted(set(chain.from_iterable(cohorts)))


def _check_scores(run: Run, problem: Problem, inputs: Tensor) -> None:
    """Check that the model returns scores, one for every label.

    Raises:
        RequestError: it does not.
    """
    if problem.loss is not cross_entropy:
        return
    with eval_mode(problem.model), torch.no_grad():
        scores = problem.model(inputs)
    if not isinstance(scores, Tensor):
        raise RequestError(
            f"model: '{run.model}' returned a {type(scores).__name__}, loss '{run.loss}' takes a "
            "torch.Tensor of scores"
        )
    if problem.dataset.targets.ndim != 1:
        return
    for targets in (problem.dataset.targets, problem.dataset.test_targets):
        least, most = targets.aminmax()
        if scores.ndim == 2 and (least < 0 or most >= scores.shape[1]):
            raise RequestError(
                f"dataset: '{run.dataset}' has the target {least if least < 0 else most}, loss "
                f"'{run.loss}' needs labels from 0 to {scores.shape[1] - 1} of model '{run.model}'"
            )
