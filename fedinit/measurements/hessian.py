"""Top eigenvalues of the Hessian of a mean loss: the study's Table 1.

Lanczos 1950, with full reorthogonalisation (Golub and Van Loan, Matrix Computations, 4th ed.,
section 10.3), on Hessian-vector products by double backward (Pearlmutter 1994): the Hessian itself
is never formed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedinit.device import full_precision
from fedinit.measurements.evaluation import eval_mode, per_example

Product = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]

ROUNDING = 64 * float(np.finfo(np.float64).eps)  # beside the spectrum, as good as zero


@dataclass(frozen=True)
class TopEigenvalues:
    """Two extreme eigenvalues, in the loss's units per squared unit of the parameters.

    A residual bounds its eigenvalue's relative error: a symmetric H has an eigenvalue within
    residual * |l| of l.

    Attributes:
        algebraic: the largest eigenvalue.
        absolute: the eigenvalue of largest absolute value, with its sign.
        algebraic_residual: ||Hv - lv|| / |l| of the first, unit v, from a product of its own;
            ||Hv|| where l is 0.
        absolute_residual: the same of the second.
        products: the number of Hessian-vector products spent, those for the residuals included.
    """

    algebraic: float
    absolute: float
    algebraic_residual: float
    absolute_residual: float
    products: int


def top_eigenvalues(
    product: Product,
    size: int,
    seed: int = 0,
    tolerance: float = 1e-6,
    most: int = 100,
    device: torch.device | str = "cpu",
) -> TopEigenvalues:
    """Find the top eigenvalues of a symmetric operator H by Lanczos.

    Stops when the residuals of both pairs, as Lanczos estimates them, are within `tolerance`, when
    the basis spans an invariant subspace, or after `most` products. Memory: a float64 vector for
    each product and three more, Hv among them.

    Args:
        product: maps v to Hv, both float64 (size,) on `device`; it must not write to v.
        size: the operator's order.
        seed: of the start vector, which is the same on every device.
        tolerance: relative residual to reach.
        most: products before the one or two that measure the residuals.
        device: where the vectors lie.

    Raises:
        ValueError: `size` or `most` is below 1, or a product is not finite.
    """
    if size < 1 or most < 1:
        raise ValueError(f"size and most must be at least 1, got {size} and {most}")
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64).to(device)
    beta = vector.norm().item()
    basis: list[Tensor] = []  # the columns of V
    alphas: list[float] = []  # the diagonal of T = V' H V
    betas: list[float] = []  # its off-diagonal
    while True:
        basis.append(vector.div_(beta))
        vector = product(basis[-1])
        alphas.append(vector.dot(basis[-1]).item())
        vector = torch.sub(vector, basis[-1], alpha=alphas[-1])
        for each in basis * 2:  # Gram-Schmidt; twice is enough (Parlett 1980)
            vector.addcmul_(each, each.dot(vector), value=-1)
        beta = vector.norm().item()
        if not math.isfinite(alphas[-1] + beta):
            raise ValueError(f"Hessian: product {len(basis)} is not finite")
        ritz, weights = np.linalg.eigh(np.diag(alphas) + np.diag(betas, -1))
        spanned = len(basis) == size or beta <= ROUNDING * abs(ritz).max()
        if spanned or len(basis) == most or _settled(ritz, beta * abs(weights[-1]), tolerance):
            break
        betas.append(beta)

    top, largest = len(ritz) - 1, int(abs(ritz).argmax())
    residuals: dict[int, float] = {}
    for place in {top, largest}:
        vector.zero_()
        for each, weight in zip(basis, weights[:, place], strict=True):
            vector.add_(each, alpha=weight)
        vector.div_(vector.norm())
        error = torch.sub(product(vector), vector, alpha=ritz[place]).norm().item()
        residuals[place] = error / (abs(float(ritz[place])) or 1.0)
    return TopEigenvalues(
        algebraic=float(ritz[top]),
        absolute=float(ritz[largest]),
        algebraic_residual=residuals[top],
        absolute_residual=residuals[largest],
        products=len(basis) + len(residuals),
    )


def _settled(ritz: np.ndarray, residuals: np.ndarray, tolerance: float) -> bool:
    """Tell whether the top pair has converged, and the bottom one has or cannot outweigh it."""
    top, bottom = ritz[-1], ritz[0]
    converged = residuals <= tolerance * abs(ritz)
    return bool(converged[-1] and (converged[0] or residuals[0] - bottom < top))


def hessian_product(model: nn.Module, loss: Loss, batches: Batches) -> Product:
    """Return v -> Hv, H the Hessian of the mean loss over all examples of `batches`.

    v and Hv are flat: the parameters with `requires_grad`, in the model's order. Differentiation
    is in the parameters' dtype, the sum over batches in that of v. Memory: one batch's graph, and
    four parameter vectors: the result, v in the parameters' dtype, a gradient and its derivative.

    Args:
        model: the model; it is called in the mode it is in.
        loss: maps outputs and targets to the loss of each example, or of each of its positions.
        batches: inputs and targets, where the parameters are; read once for each product.

    Raises:
        ValueError: there is no trainable parameter or no example.
    """
    parameters = _trainable(model)
    examples = sum(len(targets) for _, targets in batches)
    if not parameters or not examples:
        raise ValueError("Hessian: needs a trainable parameter and an example")
    sizes = [each.numel() for each in parameters]

    def of_batch(inputs: Tensor, targets: Tensor, vectors: list[Tensor]) -> Sequence[Tensor]:
        share = per_example(loss(model(inputs), targets), targets).sum() / examples
        gradients = torch.autograd.grad(
            share, parameters, create_graph=True, materialize_grads=True
        )
        # Where the loss is linear its gradient is constant, which autograd would refuse.
        curved = [pair for pair in zip(gradients, vectors, strict=True) if pair[0].requires_grad]
        if not curved:
            return [torch.zeros_like(each) for each in parameters]
        return torch.autograd.grad(
            [gradient for gradient, _ in curved],
            parameters,
            [vector for _, vector in curved],
            materialize_grads=True,
        )

    @torch.enable_grad()
    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(vector)
        split = zip(vector.split(sizes), parameters, strict=True)
        vectors = [part.view_as(each).to(each.dtype) for part, each in split]
        for inputs, targets in batches:
            addends = of_batch(inputs, targets, vectors)
            for part, addend in zip(total.split(sizes), addends, strict=True):
                part.add_(addend.reshape(-1))
        return total

    return product


def top_hessian_eigenvalues(
    model: nn.Module,
    loss: Loss,
    batches: Batches,
    seed: int = 0,
    tolerance: float = 1e-6,
    most: int = 100,
) -> TopEigenvalues:
    """Find the top eigenvalues of the Hessian of a model's mean loss, in its trainable parameters.

    The model is in eval mode and TF32 off meanwhile; modes, weights and `grad` stay as they were.
    Arguments, errors and memory are those of `hessian_product` and `top_eigenvalues`. In float32
    the measured residuals stop falling near 1e-6.
    """
    with _measuring(model):
        product = hessian_product(model, loss, batches)
        parameters = _trainable(model)
        size = sum(each.numel() for each in parameters)
        return top_eigenvalues(product, size, seed, tolerance, most, parameters[0].device)


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


@contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, no TF32, and no kernel that cannot be differentiated twice."""
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    cudnn = torch.backends.cudnn.enabled and not recurrent
    with (
        full_precision(),
        eval_mode(model),
        torch.backends.cudnn.flags(enabled=cudnn, allow_tf32=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield
