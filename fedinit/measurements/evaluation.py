"""Loss and accuracy of a model on held rows."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def correct_predictions(outputs: Tensor, targets: Tensor) -> float | None:
    """Count the rows whose highest score is the target's; None when targets are not labels.

    Args:
        outputs: scores (n, classes).
        targets: integer labels (n,).
    """
    if targets.is_floating_point() or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        return None
    return (outputs.detach().argmax(1) == targets).sum().item()


def per_example(losses: Tensor) -> Tensor:
    """Return one loss for each row: the mean over a row's positions where there are several."""
    return losses if losses.ndim == 1 else losses.flatten(1).mean(1)


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
    """Return `num-examples`, mean `loss` and, for labels, `accuracy`."""
    examples, loss_sum = 0, 0.0
    correct: float | None = 0.0
    with eval_mode(model):
        for inputs, targets in batches:
            outputs = model(inputs)
            loss_sum += per_example(loss(outputs, targets)).double().sum().item()
            examples += len(targets)
            right = correct_predictions(outputs, targets)
            correct = None if right is None or correct is None else correct + right
    result = {"num-examples": float(examples), "loss": loss_sum / examples}
    return result if correct is None else result | {"accuracy": correct / examples}
