"""Top Hessian eigenvalues, against spectra that are known or that numpy finds.

Most Hessians here are chosen: for H = Q diag(l) Q' of order n, the n examples a_i = sqrt(n |l_i|)
q_i with targets s_i = sign(l_i) and losses s_i (a_i . x)^2 / 2 have the mean loss x' H x / 2.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinit.measurements.hessian import (
    hessian_product,
    top_eigenvalues,
    top_hessian_eigenvalues,
)
from fedinit.models.language import CharRNN
from fedinit.problem import cross_entropy

BODY = np.linspace(-0.3, 0.3, 38)

SPECTRA = {
    "clustered": [1.0, 0.9999, 0.9998, 0.999, *BODY[2:]],
    "clustered at both ends": [1.0, 0.999, -0.9985, -0.9995, *BODY[2:]],
    "dominant negative": [2.0, -5.0, *BODY],
    "nearly balanced": [10.0, -10.1, *BODY],
    "double": [3.0, 3.0, *BODY],
    "negative definite": [-1.0, -4.0, *(BODY - 2)],
    "one": [4.0, *np.zeros(39)],
    "minus one": [-4.0, *np.zeros(39)],
    "multiple of identity": [0.7] * 40,
    "of order 1": [-2.5],
    "tiny": [1e-12, -3e-12, *(1e-13 * BODY)],
    "zero": [0.0] * 40,
}


def rows(*shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(shape).normal(size=shape))


def labels(classes: int, *shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(classes).integers(classes, size=shape))


def rotation(order: int) -> np.ndarray:
    return np.linalg.qr(rows(order, order).numpy())[0]


class Form(nn.Module):
    """Maps a to a . x, at a point x where the gradient is not zero."""

    def __init__(self, order: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 2, order, dtype=torch.float64))

    def forward(self, a: Tensor) -> Tensor:
        return a @ self.x


def signed_square(outputs: Tensor, signs: Tensor) -> Tensor:
    return signs * outputs**2 / 2


def quadratic(spectrum: Sequence[float]) -> tuple[Form, Tensor, Tensor, np.ndarray]:
    """Return the model, inputs and targets whose Hessian has this spectrum, and the Hessian."""
    values, q = np.array(spectrum), rotation(len(spectrum))
    inputs = np.sqrt(len(values) * abs(values))[:, None] * q.T
    hessian = (inputs.T * np.sign(values)) @ inputs / len(values)
    return (
        Form(len(values)),
        torch.tensor(inputs),
        torch.tensor(np.sign(values)),
        (hessian + hessian.T) / 2,
    )


def tops(hessian: np.ndarray) -> tuple[float, float]:
    """Return the largest eigenvalue and the one of largest absolute value."""
    values = np.linalg.eigvalsh(hessian)
    return values[-1], values[abs(values).argmax()]


def check(found, hessian: np.ndarray, rel: float = 1e-5) -> None:
    algebraic, absolute = tops(hessian)
    zero = 1e-13 * abs(absolute)  # where the true value is 0, what rounding leaves
    assert found.algebraic == pytest.approx(algebraic, rel=rel, abs=zero)
    assert found.absolute == pytest.approx(absolute, rel=rel, abs=zero)


@pytest.mark.parametrize("spectrum", SPECTRA.values(), ids=SPECTRA)
@pytest.mark.parametrize("seed", [0, 7])
def test_quadratic_against_numpy(spectrum, seed):
    """The quadratic's Hessian is numpy's own matrix, its spectrum known."""
    model, inputs, targets, hessian = quadratic(spectrum)
    found = top_hessian_eigenvalues(model, signed_square, [(inputs, targets)], seed=seed)
    check(found, hessian)
    assert found.absolute == pytest.approx(max(spectrum, key=abs), rel=1e-5)
    assert found.absolute_residual <= 1e-5
    if max(spectrum) != 0:
        assert found.algebraic_residual <= 1e-5


@pytest.mark.parametrize("name", ["clustered", "clustered at both ends", "dominant negative"])
def test_float32_model(name):
    """In float32 the products err by 1e-7 of the spectrum, so 1e-5 is within reach."""
    model, inputs, targets, hessian = quadratic(SPECTRA[name])
    batches = [(inputs.float(), targets.float())]
    found = top_hessian_eigenvalues(model.float(), signed_square, batches)
    check(found, hessian)
    assert model.x.dtype == torch.float32
    assert 0 < found.absolute_residual < 1e-5


def test_algebraic_and_absolute_differ():
    """Of 2, -5 and what lies in between, the largest is 2 and the largest in absolute value -5."""
    model, inputs, targets, _ = quadratic(SPECTRA["dominant negative"])
    found = top_hessian_eigenvalues(model, signed_square, [(inputs, targets)])
    assert (found.algebraic, found.absolute) == pytest.approx((2.0, -5.0))


@pytest.mark.parametrize(
    ("spectrum", "products"),
    [([0.0] * 40, 2), ([0.7] * 40, 2), ([-2.5], 2), ([-4.0] + [0.0] * 39, 4), ([3.0, -1.0], 3)],
)
def test_stops_at_an_invariant_subspace(spectrum, products):
    """A product for each distinct eigenvalue, and one for the residual of each distinct pair."""
    model, inputs, targets, _ = quadratic(spectrum)
    found = top_hessian_eigenvalues(model, signed_square, [(inputs, targets)], tolerance=0)
    assert found.products == products


def test_zero_hessian():
    """A loss linear in the parameters: eigenvalues 0, and residuals ||Hv|| = 0 rather than 0/0."""
    batches = [(torch.ones(3, 4, dtype=torch.float64), torch.zeros(3))]
    found = top_hessian_eigenvalues(Form(4), lambda outputs, _: outputs, batches)
    assert (found.algebraic, found.absolute) == (0, 0)
    assert (found.algebraic_residual, found.absolute_residual) == (0, 0)


def test_parameters_without_curvature():
    """Beside H, rows of zeros for a parameter the loss is linear in and one it does not read."""

    class Wider(Form):
        def __init__(self, order: int) -> None:
            super().__init__(order)
            self.shift = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.unread = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

        def forward(self, a: Tensor) -> Tensor:
            return torch.stack([super().forward(a), self.shift.expand(len(a))], dim=1)

    _, inputs, targets, hessian = quadratic(SPECTRA["dominant negative"])
    v = rows(40 + 5).numpy()
    product = hessian_product(
        Wider(40),
        lambda outputs, signs: signed_square(outputs[:, 0], signs) + outputs[:, 1],
        [(inputs, targets)],
    )
    expected = np.concatenate([hessian @ v[:40], np.zeros(5)])
    np.testing.assert_allclose(product(torch.tensor(v)).numpy(), expected, atol=1e-12)


def test_softmax_regression_at_zero_weights():
    """At zero weights every class has probability 1/K, whatever the example and its label.

    The Hessian of the cross entropy in the scores is diag(p) - pp' = I/K - 11'/K^2, hence in the
    weights (X'X/n) (x) (I/K - 11'/K^2). The second factor has eigenvalues 1/K, K - 1 times, and 0:
    the top eigenvalue is that of X'X/n, over K.
    """
    n, features, classes = 50, 8, 5
    x = rows(n, features).numpy() @ np.diag(np.arange(1, features + 1))
    model = nn.Linear(features, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    targets = labels(classes, n)
    found = top_hessian_eigenvalues(model, cross_entropy, [(torch.tensor(x), targets)])
    expected = np.linalg.eigvalsh(x.T @ x / n)[-1] / classes
    assert (found.algebraic, found.absolute) == pytest.approx((expected, expected), rel=1e-5)


class Attention(nn.Module):
    """Fused attention, whose kernels other than the plain one cannot be differentiated twice.

    It scores every position: its targets are (n, positions), and its losses.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.queries(x), self.keys(x)
        return functional.scaled_dot_product_attention(q, k, x).transpose(1, 2)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
        rows(20, 4),
        labels(3, 20),
    ),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
        ),
        rows(20, 1, 6, 6),
        labels(3, 20),
    ),
    "lstm": (lambda: CharRNN(5, embedding=2, hidden=2), labels(5, 20, 4), labels(5, 20)),
    "attention": (Attention, rows(20, 5, 4), labels(4, 20, 5)),
}


def differences(model: nn.Module, inputs: Tensor, targets: Tensor, step: float = 1e-5):
    """Return the Hessian by central differences of gradients: no double backward."""
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach()

    def gradient(x: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(x, parameters)
        mean = cross_entropy(model(inputs), targets).mean()
        return torch.cat([each.flatten() for each in torch.autograd.grad(mean, parameters)])

    steps = step * torch.eye(len(start), dtype=torch.float64)
    hessian = torch.stack([gradient(start + each) - gradient(start - each) for each in steps])
    nn.utils.vector_to_parameters(start, parameters)
    return ((hessian + hessian.T) / (4 * step)).numpy()


@cache
def network(name: str) -> tuple[nn.Module, Tensor, Tensor, np.ndarray]:
    """Return a network in float64, its inputs and targets, and its Hessian."""
    build, inputs, targets = NETWORKS[name]
    torch.manual_seed(1)
    model = build().double()
    return model, inputs, targets, differences(model, inputs, targets)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_against_finite_differences(name):
    """Networks' Hessians by differences of gradients, their spectra by numpy."""
    model, inputs, targets, hessian = network(name)
    batches = list(zip(inputs.split(7), targets.split(7), strict=True))
    check(top_hessian_eigenvalues(model, cross_entropy, batches), hessian)
    assert np.linalg.eigvalsh(hessian)[0] < -1e-3  # no Gauss-Newton matrix would do


@pytest.mark.parametrize("name", ["mlp", "lstm"])
def test_float32_networks(name):
    """The same networks as they are used, in float32."""
    model, inputs, targets, hessian = network(name)
    single = inputs.float() if inputs.is_floating_point() else inputs
    found = top_hessian_eigenvalues(deepcopy(model).float(), cross_entropy, [(single, targets)])
    check(found, hessian)


@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_batches_do_not_matter(batch_size):
    """The mean is over examples, also where the last batch is smaller: Hv is numpy's product."""
    model, inputs, targets, hessian = quadratic(SPECTRA["clustered"])
    batches = list(zip(inputs.split(batch_size), targets.split(batch_size), strict=True))
    v = rows(40).numpy()
    found = hessian_product(model, signed_square, batches)(torch.tensor(v))
    np.testing.assert_allclose(found.numpy(), hessian @ v, atol=1e-13)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_residual_is_measured(most, exact):
    """The last products are of the Ritz vectors: from these, the residuals again, by numpy.

    Stopped early, there is an eigenvalue within residual * |l| of l, as of any symmetric matrix.
    Converged, products in half precision leave a residual of which Lanczos's own estimate, by which
    it stops at 1e-6, knows nothing.
    """
    q = rotation(40)
    hessian = (q * SPECTRA["dominant negative"]) @ q.T
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def product(v: Tensor) -> Tensor:
        image = torch.tensor(hessian @ v.numpy())
        seen.append((v.numpy().copy(), (image if exact else image.half().double()).numpy()))
        return torch.tensor(seen[-1][1])

    found = top_eigenvalues(product, 40, most=most)
    assert found.products == len(seen) <= most + 2
    for value, residual in [
        (found.algebraic, found.algebraic_residual),
        (found.absolute, found.absolute_residual),
    ]:
        v, image = min(seen[-2:], key=lambda pair: abs(pair[0] @ pair[1] - value))
        assert np.linalg.norm(v) == pytest.approx(1)
        expected = np.linalg.norm(image - value * v) / abs(value)
        assert residual == pytest.approx(expected, rel=1e-6, abs=1e-12)
        if exact:
            assert min(abs(np.linalg.eigvalsh(hessian) - value)) <= (residual + 1e-12) * abs(value)
        if most < 100:
            assert residual > 1e-2
        else:
            assert residual < 1e-6 if exact else 1e-5 < residual < 1e-2


def test_residual_bounds_an_early_stop():
    """On the diagonal 1..100 ten products stop short of 100, and the residual says how far."""
    diagonal = torch.arange(1.0, 101, dtype=torch.float64)
    early = top_eigenvalues(lambda v: diagonal * v, 100, most=10)
    late = top_eigenvalues(lambda v: diagonal * v, 100)
    assert 1e-4 < early.algebraic_residual < 0.1
    assert 1e-4 < 1 - early.algebraic / 100 <= early.algebraic_residual
    assert late.algebraic == pytest.approx(100, rel=1e-9)
    assert 12 < late.products <= 102


@pytest.mark.parametrize(
    "spectrum",
    [[100.0, *np.linspace(-101, -99, 199)], [-1.0, *np.linspace(0.9e-9, 1.1e-9, 199)]],
    ids=["converges", "cancels"],
)
def test_orthogonality_is_kept(spectrum):
    """The basis is orthonormal to rounding, and one crowded end keeps it growing.

    Lanczos without reorthogonalisation loses that once the other end has converged; one pass of
    Gram-Schmidt, where a vector all but cancels against the basis.
    """
    values = torch.tensor(spectrum, dtype=torch.float64)
    seen: list[Tensor] = []

    def product(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return values * v

    top_eigenvalues(product, 200, tolerance=0, most=60)
    basis = torch.stack(seen[:60])
    np.testing.assert_allclose((basis @ basis.T).numpy(), np.eye(60), atol=1e-12)


def test_stops_once_the_top_has_converged():
    """The bottom, crowded at 0, cannot outweigh a top of 100 and is not waited for.

    The gap is 99 times the width of the rest, so by Kaniel's bound k products divide the tangent
    to the top eigenvector, about sqrt(200) at the start, by T_{k-1}(1 + 2 * 99) = 398^{k-1} / 2.
    """
    values = torch.tensor([100.0, *np.linspace(0, 1, 199)], dtype=torch.float64)
    found = top_eigenvalues(lambda v: values * v, 200)
    assert found.algebraic == found.absolute == pytest.approx(100)
    assert found.products <= 10


def test_seed():
    """The start is a function of the seed, the result to the tolerance is not."""
    values = torch.linspace(-1, 2, 50, dtype=torch.float64)
    first, again, other = (top_eigenvalues(lambda v: values * v, 50, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first != other
    assert first.algebraic == pytest.approx(other.algebraic, rel=1e-9)
