"""How the server steps on a pseudo-gradient: torch.optim where it has the optimizer, and Yogi.

With sgd clients: sgd is FedAvg, momentum FedAvgM (Hsu et al. 2019), and adam, adagrad and yogi are
FedAdam, FedAdagrad and FedYogi (Reddi et al. 2021, Algorithm 2), with torch's bias correction and
eps outside the root.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedinit.config import Server

ServerOptimizer = Callable[[Sequence[Tensor], Server], Optimizer]


def sgd(parameters: Sequence[Tensor], settings: Server) -> Optimizer:
    """x -= lr D."""
    return torch.optim.SGD(parameters, lr=settings.lr)


def momentum(parameters: Sequence[Tensor], settings: Server) -> Optimizer:
    """v = momentum v + D; x -= lr v."""
    return torch.optim.SGD(parameters, lr=settings.lr, momentum=settings.momentum)


def adam(parameters: Sequence[Tensor], settings: Server) -> Optimizer:
    """Adam (Kingma & Ba 2015) with lr, betas, eps."""
    return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def adagrad(parameters: Sequence[Tensor], settings: Server) -> Optimizer:
    """s += D^2; x -= lr D / (sqrt(s) + eps), s starting at initial_accumulator."""
    return torch.optim.Adagrad(
        parameters,
        lr=settings.lr,
        eps=settings.eps,
        initial_accumulator_value=settings.initial_accumulator,
    )


def yogi(parameters: Sequence[Tensor], settings: Server) -> Optimizer:
    """Adam with v -= (1 - b2) D^2 sign(v - D^2)."""
    return Yogi(parameters, lr=settings.lr, betas=settings.betas, eps=settings.eps)


SERVER_OPTIMIZERS: dict[str, ServerOptimizer] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "adagrad": adagrad,
    "yogi": yogi,
}


class Yogi(Optimizer):
    """Yogi (Zaheer et al. 2018, Algorithm 2), bias-corrected as torch's Adam is."""

    def __init__(
        self, parameters: Sequence[Tensor], lr: float, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step on every parameter that has a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                mean, square = state["exp_avg"], state["exp_avg_sq"]
                mean.lerp_(gradient, 1 - beta1)
                squared = gradient.square()
                square.addcmul_(squared, torch.sign(square - squared), value=beta2 - 1)
                count = state["step"].item()
                root = (square / (1 - beta2**count)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**count))
