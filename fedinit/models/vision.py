"""Image models: a small CNN, and torchvision's SqueezeNet and ResNet-18."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedinit.errors import RequestError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST = 32  # below this SqueezeNet's pooling has nothing left to pool


def imagenet_input(_network: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    """Map images (n, 1 or 3, h, w) in [0, 1] to what an ImageNet model reads.

    That is RGB, at least 32 wide and high, normalised; a grey image becomes three equal channels.
    """
    (images,) = inputs
    if min(images.shape[-2:]) < SMALLEST:
        size = [max(side, SMALLEST) for side in images.shape[-2:]]
        images = functional.interpolate(images, size, mode="bilinear")
    mean, std = _imagenet_statistics(images.dtype, images.device)
    return (images - mean) / std


@cache  # made once on a device: each making would wait for it
def _imagenet_statistics(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.tensor([IMAGENET_MEAN, IMAGENET_STD], dtype=dtype, device=device)
    mean, std = both.view(2, 3, 1, 1)
    return mean, std


def _torchvision(name: str, **settings: Any) -> nn.Module:
    """Build one of torchvision's models; the input step is a hook, so that names stay its own."""
    from torchvision.models import get_model

    network: nn.Module = get_model(name, weights=None, **settings)
    network.register_forward_pre_hook(imagenet_input)
    return network


def cnn(num_classes: int, input_shape: tuple[int, int, int]) -> nn.Module:
    """Two 5x5 convolutions of 16 and 32 channels with max-pooling, a hidden layer of 64."""
    if len(input_shape) != 3:
        raise RequestError(f"model: cnn reads images (channels, height, width), not {input_shape}")
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 64),
        nn.ReLU(),
        nn.Linear(64, num_classes),
    )


def squeezenet1_0(num_classes: int) -> nn.Module:
    """torchvision's SqueezeNet 1.0 (Iandola et al. 2016); no normalisation layers."""
    return _torchvision("squeezenet1_0", num_classes=num_classes)


def squeezenet1_1(num_classes: int) -> nn.Module:
    """torchvision's SqueezeNet 1.1, as accurate as 1.0 at 2.4 times less work."""
    return _torchvision("squeezenet1_1", num_classes=num_classes)


def resnet18(num_classes: int, groups: int = 32) -> nn.Module:
    """torchvision's ResNet-18 with GroupNorm instead of BatchNorm."""
    norm: Callable[[int], nn.Module] = partial(_group_norm, groups)
    return _torchvision("resnet18", num_classes=num_classes, norm_layer=norm)


def _group_norm(groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(groups, channels), channels)
