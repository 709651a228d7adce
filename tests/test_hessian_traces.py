"""What measuring a Hessian leaves alone, and what it takes: modes, precision, memory."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fedinit.measurements.hessian import (
    hessian_product,
    top_eigenvalues,
    top_hessian_eigenvalues,
)
from fedinit.problem import cross_entropy
from tests.test_hessian import Form, check, differences, labels, rows, signed_square


class Observed(nn.Module):
    """A linear model with dropout, a submodule, and a note of the state it is called in."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.body = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
        self.calls: list[tuple[bool, bool, str, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(
            (
                self.training,
                self.body[0].training,
                torch.get_float32_matmul_precision(),
                torch.backends.cudnn.allow_tf32,
            )
        )
        return self.body(self.dropout(x))


@pytest.fixture
def observed() -> tuple[Observed, list[tuple[Tensor, Tensor]]]:
    """Observed in train mode, its body in eval mode but for the body's own dropout."""
    model = Observed().double()
    model.body.training = model.body[1].training = False
    return model, [(rows(20, 4), labels(3, 20))]


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_measured_in_eval_mode(observed):
    """Dropout is off, as numpy's eigenvalues of the undropped model say; modes come back."""
    model, batches = observed
    before = modes(model)
    assert set(before.values()) == {True, False}
    found = top_hessian_eigenvalues(model, cross_entropy, batches)
    assert modes(model) == before
    check(found, differences(model.eval(), *batches[0]))


def test_tf32_is_off_meanwhile(observed):
    """Also where the caller has it on, and only meanwhile."""
    model, batches = observed
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        top_hessian_eigenvalues(model, cross_entropy, batches)
        assert set(model.calls) == {(False, False, "highest", False)}
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before)


def test_restores_after_a_failure(observed):
    """Modes and precision come back also where the loss raises."""
    model, batches = observed
    before, precision = modes(model), torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError):
        top_hessian_eigenvalues(model, lambda *_: 1 / 0, batches)
    assert modes(model) == before
    assert torch.get_float32_matmul_precision() == precision


def test_leaves_no_trace(observed):
    """Weights, gradients, frozen or not, and torch's own random numbers are as before.

    It also works for a caller who has gradients off.
    """
    model, batches = observed
    weight, bias = model.body[1].weight, model.body[1].bias
    weight.grad = gradient = torch.ones_like(weight)
    state, random = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with torch.no_grad():
        top_hessian_eigenvalues(model, cross_entropy, batches)
    assert weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(weight))
    assert bias.grad is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_frozen_parameters_are_excluded():
    """With a frozen body and a head of zero weights: softmax regression on the body's features.

    The top eigenvalue is that of F'F/n over K, F the features, by the argument above; the whole
    model's is another.
    """
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)).double()
    nn.init.zeros_(model[2].weight)
    inputs, targets = rows(20, 4), labels(3, 20)
    whole = top_hessian_eigenvalues(model, cross_entropy, [(inputs, targets)])
    model[0].requires_grad_(False)
    found = top_hessian_eigenvalues(model, cross_entropy, [(inputs, targets)])
    features = np.tanh(inputs.numpy() @ model[0].weight.numpy().T + model[0].bias.numpy())
    expected = np.linalg.eigvalsh(features.T @ features / 20)[-1] / 3
    assert found.algebraic == pytest.approx(expected, rel=1e-5)
    assert whole.algebraic > expected * 1.01


class LiveBytes(TorchDispatchMode):
    """The most bytes that storages made meanwhile hold at once, after any operation.

    Views and in-place results share a storage, which counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            each.untyped_storage()._cdata
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(each, Tensor)
        }
        outputs = func(*args, **(kwargs or {}))
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        for each in torch.utils._pytree.tree_leaves(outputs):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in known:
                storage = each.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return outputs


def live_vectors(size: int, call: Callable[[], object]) -> float:
    """Return the peak of a call, in float64 vectors of this size."""
    with LiveBytes() as live:
        call()
    return live.peak / (8 * size)


def test_live_bytes_counts():
    """Two vectors at once are two, one after another one, and a stack of three beside them five."""
    size = 1000

    def together() -> None:
        a, b = torch.zeros(size).double(), torch.zeros(size).double()
        a.add_(b)

    def stacked() -> None:
        a = torch.zeros(size, dtype=torch.float64)
        b = torch.zeros(size, dtype=torch.float64)
        torch.stack([a, b, b])

    assert live_vectors(size, together) == 2.5  # the second's float32 is half a vector
    assert live_vectors(size, stacked) == 5
    assert live_vectors(size, lambda: [torch.zeros(size).double() for _ in "xy"] and None) == 2.5


@pytest.mark.parametrize("most", [4, 16])
def test_memory_of_lanczos(most):
    """The basis and three vectors, Hv among them, whatever the number of products."""
    size = 500_000
    diagonal = torch.linspace(-1, 1, size, dtype=torch.float64)
    peak = live_vectors(
        size, lambda: top_eigenvalues(lambda v: diagonal * v, size, tolerance=0, most=most)
    )
    assert most <= peak <= most + 3.1


def test_memory_of_products():
    """The graph of one batch: eight batches need no more than one does."""
    model = nn.Sequential(nn.Linear(10, 50), nn.Tanh(), nn.Linear(50, 2)).double()
    batch = rows(2000, 10), labels(2, 2000)
    v = torch.ones(sum(each.numel() for each in model.parameters()), dtype=torch.float64)
    one, eight = (
        live_vectors(1, lambda n=n: hessian_product(model, cross_entropy, [batch] * n)(v))
        for n in (1, 8)
    )
    assert one > 2000 * 50  # the hidden layer, at least
    assert eight <= one * 1.01 + 3 * len(v)


def test_memory_of_float32_model():
    """As many vectors more as in the docstrings, whatever the number of products."""
    size = 400_000
    model = nn.Linear(size // 2, 2, bias=False)
    batches = [(rows(3, size // 2).float(), labels(2, 3))] * 3

    def extra(most: int) -> float:
        return (
            live_vectors(
                size,
                lambda: top_hessian_eigenvalues(
                    model, cross_entropy, batches, tolerance=0, most=most
                ),
            )
            - most
        )

    assert extra(2) == pytest.approx(extra(5), abs=0.1)
    assert extra(5) <= 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hessian_product(Form(2), signed_square, []), "an example"),
        (lambda: hessian_product(nn.ReLU(), signed_square, [(rows(1, 2), rows(1))]), "trainable"),
        (lambda: top_eigenvalues(lambda v: v, 0), "at least 1"),
        (lambda: top_eigenvalues(lambda v: v, 2, most=0), "at least 1"),
        (lambda: top_eigenvalues(lambda v: v * float("inf"), 2), "product 1 is not finite"),
    ],
)
def test_refusals(call, message):
    """What has no Hessian to speak of is refused in words."""
    with pytest.raises(ValueError, match=message):
        call()
