"""What clients optimize: a data set, a model and a loss."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinit.config import Run
from fedinit.data import DATASETS, FederatedDataset
from fedinit.errors import RequestError
from fedinit.models import MODELS, Model
from fedinit.parameters import Layout, in_head
from fedinit.randomness import Draw, draws_undone, keyed, seed_all, torch_seed
from fedinit.registry import call, resolve

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of scores (n, classes, ...) and integer targets (n, ...)."""
    return functional.cross_entropy(outputs, targets, reduction="none")


LOSSES: dict[str, Loss] = {"cross-entropy": cross_entropy}


@dataclass
class Problem:
    """A data set dealt to clients, a model, and a loss of (outputs, targets) for each example."""

    dataset: FederatedDataset
    model: nn.Module
    loss: Loss
    layout: Layout

    def on(self, device: torch.device) -> "Problem":
        """Return the problem on a device: its model is moved, the data set where there is room."""
        return replace(self, dataset=self.dataset.on(device), model=self.model.to(device))


def load_dataset(run: Run) -> FederatedDataset:
    """Load the data set that a run names, not yet partitioned.

    Raises:
        RequestError: the name is unknown, the data are missing or corrupt, a number in them is not
            finite, or the user's function returns something else.
    """
    dataset = call("dataset", resolve("dataset", run.dataset, DATASETS), run.dataset_args)
    if not isinstance(dataset, FederatedDataset):
        raise RequestError(
            f"dataset: '{run.dataset}' returned a {type(dataset).__name__}, "
            "expected fedinit.data.FederatedDataset"
        )
    if dataset.folder is None:  # what is mapped was checked when it was saved
        dataset.check_finite()
    return dataset


def label_space(run: Run, dataset: FederatedDataset) -> str:
    """Return what names the meaning of a data set's labels: its own word for it, or its name.

    What one's own function makes may depend on its arguments.
    """
    own = ":" in run.dataset and dict(sorted(run.dataset_args.items()))
    return dataset.labels or (f"{run.dataset} {own}" if own else run.dataset)


def find_model(name: str) -> Model:
    """Return the model that a run names; a user's own may carry its head's prefix as `head`."""
    found = resolve("model", name, MODELS)
    return found if isinstance(found, Model) else Model(found, head=getattr(found, "head", None))


def build_problem(run: Run, dataset: FederatedDataset) -> Problem:
    """Build a run's problem: the model's weights are those of the run's seed.

    Args:
        run: the run.
        dataset: its data set, partitioned already.

    Raises:
        RequestError: a name is unknown, or the user's function fails or returns something else.
    """
    spec = find_model(run.model)
    offered: dict[str, Any] = {"input_shape": tuple(dataset.inputs.shape[1:])}
    if dataset.num_classes is not None:
        offered["num_classes"] = dataset.num_classes
    with draws_undone():
        seed_all(torch_seed(keyed(Draw.WEIGHTS, run.seed)))
        try:
            model = call("model", spec.build, run.model_args, **offered)
        except RequestError as error:
            if dataset.num_classes is not None or "'num_classes'" not in str(error):
                raise
            told = f"targets of '{run.dataset}' are {dataset.targets.dtype}, labels are integers"
            raise RequestError(f"{error}; {told}") from None
    if not isinstance(model, nn.Module):
        raise RequestError(
            f"model: '{run.model}' returned a {type(model).__name__}, expected torch.nn.Module"
        )
    if run.trainable == "head":
        _freeze_body(model, run.model, spec.head)
    loss = resolve("loss", run.loss, LOSSES)
    if run.loss_args:
        try:
            loss = call("loss", loss, run.loss_args)
        except RequestError as error:
            told = "with loss_args it is called with them alone, to return the loss"
            raise RequestError(f"{error}; {told}") from None
    return Problem(dataset, model, loss, Layout.of(model))


def _freeze_body(model: nn.Module, name: str, head: str | None) -> None:
    if head is None:
        raise RequestError(
            f"trainable: '{name}' names no head; give its function an attribute `head`, the prefix "
            "of the head's parameters"
        )
    parameters = dict(model.named_parameters())
    if not any(in_head(each, head) for each in parameters):
        raise RequestError(
            f"trainable: no parameter of '{name}' is in its head '{head}'; valid: "
            f"{', '.join(dict.fromkeys(each.rpartition('.')[0] or each for each in parameters))}"
        )
    for parameter_name, parameter in parameters.items():
        parameter.requires_grad_(in_head(parameter_name, head))
