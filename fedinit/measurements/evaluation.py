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


def correct_predictions(outputs: Tensor, targets: Tensor) -> float | None:
    """Count the targets that have the highest score; None when targets are not labels.

    Args:
        outputs: scores (n, classes, ...).
        targets: integer labels (n, ...).
    """
    if targets.is_floating_point() or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None
    return (outputs.detach().argmax(1) == targets).sum().item()


def per_example(losses: Tensor, targets: Tensor) -> Tensor:
    """Return one loss for each row: the mean over its targets where there are several."""
    sums, counts = _by_row(losses, targets)
    return sums if losses.ndim == 1 else sums / counts


def count_targets(targets: Tensor) -> int:
    """Return the number of targets: positions with a label that counts, or rows of numbers."""
    if targets.ndim == 1 or targets.is_floating_point():
        return len(targets)
    return int((targets != IGNORED).sum())


def _by_row(losses: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's summed loss, and over how many targets it is summed."""
    if losses.ndim == 1:
        return losses, torch.ones_like(losses)
    if targets.is_floating_point() or losses.shape != targets.shape:
        means = losses.flatten(1).mean(1)
        return means, torch.ones_like(means)
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
    """Return the number of targets as `num-examples`, mean `loss` and, for labels, `accuracy`."""
    examples, labels, loss_sum = 0.0, 0, 0.0
    correct: float | None = 0.0
    with eval_mode(model):
        for inputs, targets in batches:
            outputs = model(inputs)
            sums, counts = _by_row(loss(outputs, targets), targets)
            loss_sum += sums.double().sum().item()
            examples += counts.sum().item()
            labels += count_targets(targets)
            right = correct_predictions(outputs, targets)
            correct = None if right is None or correct is None else correct + right
    result = {"num-examples": examples, "loss": loss_sum / examples}
    return result if correct is None else result | {"accuracy": correct / labels}
