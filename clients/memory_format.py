"""In which memory format a model trains faster: measured, as it depends on model and machine."""

import copy
import time

import torch
from torch import nn

from fedinit.device import synchronize
from fedinit.measurements.evaluation import per_example
from fedinit.problem import Problem
from fedinit.randomness import draws_undone

MEMORY_FORMATS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
_REPEATS, _SECONDS = 6, 2.0
_GAIN = 0.95  # of the contiguous time: what is no clear gain is not worth other last digits


def has_images(model: nn.Module) -> bool:
    """Whether the memory format can matter: it does to convolutions of images."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def fastest_memory_format(problem: Problem, batch_size: int) -> str:
    """Time local steps on the first rows in both formats, in turn; the model is left as it is.

    Args:
        problem: data set, model and loss.
        batch_size: rows of a step.

    Returns:
        A key of `MEMORY_FORMATS`: `contiguous` unless `channels_last` is clearly faster, and where
        the model cannot do with `channels_last`, a `view` of its activations say.
    """
    inputs, targets = problem.dataset.batch(problem.dataset.owners.rows[:batch_size])
    models = {name: copy.deepcopy(problem.model).train() for name in MEMORY_FORMATS}
    fastest = dict.fromkeys(models, float("inf"))
    end = time.perf_counter() + _SECONDS
    with draws_undone():
        for repeat in range(_REPEATS):
            for name, model in models.items():
                synchronize()
                begun = time.perf_counter()
                try:
                    model.to(memory_format=MEMORY_FORMATS[name])
                    per_example(problem.loss(model(inputs), targets), targets).mean().backward()
                    synchronize()
                except RuntimeError:
                    return "contiguous"
                if repeat:  # the first warms up
                    fastest[name] = min(fastest[name], time.perf_counter() - begun)
            if repeat and time.perf_counter() > end:
                break
    clear = fastest["channels_last"] < _GAIN * fastest["contiguous"]
    return "channels_last" if clear else "contiguous"
