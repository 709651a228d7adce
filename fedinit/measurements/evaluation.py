"""Loss and accuracy of a model on held rows.

A row may have one target or several positions with one each; positions whose target is IGNORED,
padding, count in nothing. Training minimizes the mean over rows of a row's mean loss: each sequence
counts once. What is tested is the mean over targets, so of a language model exp(loss) is the
perplexity.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedinit.data.federated_dataset import IGNORED


def correct_by_row(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Count each row's targets (n,) that have the highest score; None if they are not labels.

    Args:
        outputs: scores (n, classes, ...); of a single one nothing is the highest.
        targets: integer labels (n, ...).
    """
    if (
        targets.is_floating_point()
        or outputs.ndim < 2
        or outputs.shape[1] < 2
        or outputs.shape[:1] + outputs.shape[2:] != targets.shape
    ):
        return None
    right = outputs.argmax(1) == targets
    return right if right.ndim == 1 else right.flatten(1).sum(1)


def per_example(losses: Tensor, targets: Tensor) -> Tensor:
    """Return one loss for each row: the mean over its targets where there are several.

    That of a row without any is 0.
    """
    sums, counts = _by_row(losses, targets)
    return sums if counts is None else sums / counts.clamp(min=1)


def targets_by_row(targets: Tensor) -> Tensor | None:
    """Count each row's positions (n,) with a label that counts; None if a row is one target."""
    if targets.ndim == 1 or targets.is_floating_point():
        return None
    return (targets != IGNORED).flatten(1).sum(1)


def count_targets(targets: Tensor) -> int | Tensor:
    """Return the number of targets: positions with a label that counts, or rows of numbers."""
    rows = targets_by_row(targets)
    return len(targets) if rows is None else rows.sum()


def _by_row(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return each row's summed loss, and over how many targets it is summed; None: one each."""
    if losses.ndim == 1 and len(losses) == len(targets):
        return losses, None
    if not losses.ndim:
        raise ValueError("the loss is one number, expected one for each example (reduction='none')")
    if targets.is_floating_point() and len(losses) == len(targets):
        return losses.flatten(1).mean(1), None
    if losses.shape != targets.shape:
        raise ValueError(
            f"the loss has shape {tuple(losses.shape)}, expected one for each example, or for each "
            f"of the targets {tuple(targets.shape)}"
        )
    present = targets != IGNORED
    return (losses * present).flatten(1).sum(1), present.flatten(1).sum(1)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode meanwhile; each of its modules gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
) -> dict[str, float]:
    """Return the number of targets as `num-examples`, mean `loss` and, for labels, `accuracy`.

    Where rows have several targets, but the loss one number for each row, rows are what is counted.
    """
    # Sums that lie where the model does: a batch does not wait for the one before to be read.
    examples = loss_sum = torch.zeros((), dtype=torch.float64)
    correct: Tensor | None = torch.zeros((), dtype=torch.float64)
    with eval_mode(model):
        for inputs, targets in batches:
            outputs = model(inputs)
            sums, counts = _by_row(loss(outputs, targets), targets)
            loss_sum = sums.double().sum() + loss_sum
            examples = examples + (len(sums) if counts is None else counts.sum())
            right, of = correct_by_row(outputs, targets), targets_by_row(targets)
            if right is not None and of is not None and counts is None:
                right = right / of.clamp(min=1)
            correct = None if right is None or correct is None else right.sum() + correct
    count = examples.clamp(min=1)
    result = {"num-examples": examples.item(), "loss": (loss_sum / count).item()}
    return result if correct is None else result | {"accuracy": (correct / count).item()}
