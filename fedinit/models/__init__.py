"""Models by name, each with its head and the pre-trained weights that it may start from."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from fedinit.assets import asset
from fedinit.models.language import charlm, charrnn, distilgpt2
from fedinit.models.pretrained import hub_weights, torchvision_checkpoint
from fedinit.models.vision import cnn, resnet18, squeezenet1_0, squeezenet1_1


@dataclass(frozen=True)
class Model:
    """A model that a run can name.

    Attributes:
        build: returns the network; `num_classes` and `input_shape` are filled in from the data.
        head: prefix of the classifier's parameters: fresh when the label space differs, and what
            is trained with `trainable: head`. None: the model has no head apart.
        pretrained: returns the file of its pre-trained weights; None: it has none.
        weights: where those weights come from, for people.
        labels: what the labels of their head mean; None: whatever they are used for.
    """

    build: Callable[..., nn.Module]
    head: str | None = None
    pretrained: Callable[[], Path] | None = None
    weights: str = "none"
    labels: str | None = None


MODELS = {
    "cnn": Model(cnn, head="9"),
    "squeezenet1_1": Model(
        squeezenet1_1,
        head="classifier.1",
        pretrained=partial(asset, "squeezenet1_1-imagenet.fp16.safetensors"),
        weights="ImageNet, embedded",
        labels="imagenet",
    ),
    "squeezenet1_0": Model(
        squeezenet1_0,
        head="classifier.1",
        pretrained=partial(torchvision_checkpoint, "SqueezeNet1_0_Weights.IMAGENET1K_V1"),
        weights="ImageNet, torchvision's (download)",
        labels="imagenet",
    ),
    "resnet18": Model(
        resnet18,
        head="fc",
        pretrained=partial(torchvision_checkpoint, "ResNet18_Weights.IMAGENET1K_V1"),
        weights="ImageNet, torchvision's (download); normalisation in groups",
        labels="imagenet",
    ),
    "charrnn": Model(
        charrnn,
        head="output",
        pretrained=partial(asset, "charrnn-reddit.fp16.safetensors"),
        weights="Reddit, embedded",
    ),
    "charlm": Model(charlm, head="output"),
    "distilgpt2": Model(
        distilgpt2,
        head="transformer.wte",
        pretrained=partial(hub_weights, "distilbert/distilgpt2"),
        weights="WebText, the hub's (download)",
    ),
}

__all__ = ["MODELS", "Model"]
