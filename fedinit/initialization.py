"""The studied variable: the weights that a run starts from.

A model is first built at random from the run's seed; then, for any other initialization, weights
are read into it. So both arms of a pair have the same head wherever the head is fresh.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fedinit.errors import RequestError, one_line
from fedinit.parameters import Layout, in_head

METADATA = "fedinit"  # the key in a .safetensors file
# What a model of ours has no place for: BatchNorm's running statistics where it has GroupNorm, and
# the masks that published GPT-2 weights carry.
_NO_PLACE = ("running_mean", "running_var", "num_batches_tracked")
_MASKS = ("attn.bias", "attn.masked_bias")
_NORMALIZATIONS = (nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class Initialization:
    """What a run started from: names loaded, names fresh from the seed, names that had no place.

    `about` is what the file says of itself: how a proxy's weights came to be.
    """

    source: str
    loaded: list[str] = field(default_factory=list)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line: how many were loaded, which are fresh, which were not used."""
        text = f"{self.source}: {len(self.loaded)} arrays loaded, {len(self.fresh)} fresh"
        if self.loaded and self.fresh:
            text += f" ({', '.join(self.fresh)})"
        return text + (f", {len(self.unused)} unused" if self.unused else "")

    def record(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def random(model: nn.Module) -> Initialization:
    """Keep the weights that the seed gave."""
    return Initialization("random", fresh=list(model.state_dict()))


@dataclass(frozen=True)
class Weights:
    """Arrays to start from, and what is known of them.

    Attributes:
        arrays: by name.
        where: whose they are, for errors.
        source: what to call them; empty: what `where` says.
        labels: what the labels of their head mean; None: nobody says, so that any will do.
        about: what is told of them.
    """

    arrays: Mapping[str, Tensor]
    where: str
    source: str = ""
    labels: str | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, source: str = "", labels: str | None = None) -> "Weights":
        """Read a file's.

        Args:
            path: a .safetensors file, or one of torchvision's checkpoints.
            source: see above.
            labels: likewise, where the file does not say it.

        Raises:
            RequestError: the file is missing, corrupt, or holds anything but tensors.
        """
        arrays, about = read_weights(path), metadata(path)
        return cls(arrays, str(path), source, about.get("labels", labels), about)


def load(
    model: nn.Module,
    weights: Weights,
    head: str | None,
    labels: str | None = None,
    fresh_normalization: bool = False,
) -> Initialization:
    """Put weights into a model, in place.

    The head is loaded if all of it fits and else stays fresh; everything else must fit.

    Args:
        model: the freshly built model.
        weights: to put there.
        head: prefix of the head's names, or None.
        labels: what the model's labels mean; None: it does not matter. A head of others does not
            fit, whatever its shape.
        fresh_normalization: leave the scales and shifts of normalisation layers as they are, one
            and zero when the model is new: those of another kind of normalisation, BatchNorm's for
            GroupNorm, were trained with other statistics.

    Raises:
        RequestError: names or shapes do not fit the model.
    """
    arrays, where, source = weights.arrays, weights.where, weights.source or weights.where
    state = model.state_dict()
    own = {name: state[name] for name in Layout.of(model).shapes}  # tied ones once, as we write

    def fits(name: str) -> bool:
        return name in arrays and arrays[name].shape == own[name].shape

    same_labels = labels is None or weights.labels in (None, labels)
    head_fits = all(fits(name) for name in own if in_head(name, head))
    if head and head_fits and not same_labels:
        head_fits, source = False, f"{source}, its labels {weights.labels} and not {labels}"
    normalization = _normalization(model) if fresh_normalization else set()
    record = Initialization(source, about=weights.about)
    for name, value in own.items():
        if name in normalization or (in_head(name, head) and not head_fits):
            record.fresh.append(name)
        elif fits(name):
            record.loaded.append(name)
        else:
            there = f"has shape {tuple(arrays[name].shape)}" if name in arrays else "is missing"
            told = f"'{name}' {there}, the model's is {tuple(value.shape)}"
            if name not in arrays:
                told += f"; the file has {', '.join(list(arrays)[:3]) or 'nothing'} ..."
            elif head is None:
                told += "; an attribute `head` of the model's function names what may stay fresh"
            raise RequestError(f"initialization: {where}: {told}")
        if name in record.loaded and not torch.isfinite(arrays[name]).all():
            raise RequestError(f"initialization: {where}: '{name}' is not finite")
    tied = state.keys() - own.keys()
    record.unused = [name for name in arrays if name not in record.loaded and name not in tied]
    for name in record.unused:
        # A vector of that name is no mask, but a layer's bias.
        no_place = name.endswith(_NO_PLACE) or (name.endswith(_MASKS) and arrays[name].ndim != 1)
        if not in_head(name, head) and name not in normalization and not no_place:
            raise RequestError(f"initialization: {where}: the model has no '{name}'")
    with torch.no_grad():
        for name in record.loaded:
            own[name].copy_(arrays[name])
    return record


def _normalization(model: nn.Module) -> set[str]:
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, _NORMALIZATIONS)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def metadata(path: Path) -> dict[str, Any]:
    """Return what `fedinit pretrain` wrote into a file of weights about them; else nothing."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        read = json.loads(text or "{}")
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {}  # or it is somebody else's, under our name


def _check_sizes(path: Path) -> None:
    """Refuse a checkpoint of torch's that unpacks to more than it is: torch itself packs nothing.

    Raises:
        ValueError: it does.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            claimed = sum(each.file_size for each in archive.infolist())
        if claimed > path.stat().st_size:
            raise ValueError(f"it claims {claimed} bytes and has {path.stat().st_size}")


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Read named tensors; nothing in the file is ever run.

    Raises:
        RequestError: the file is missing, corrupt, or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            _check_sizes(path)
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RequestError(f"initialization: {path}: no such file") from None
    except UnpicklingError:  # torch would say how to read it all the same
        told = "it holds more than tensors, or is none of torch's; save them as .safetensors"
        raise RequestError(f"initialization: {path}: not readable weights: {told}") from None
    except Exception as error:  # whatever the readers raise on a damaged file
        reason = one_line(str(error).split("\n", 1)[0] or type(error).__name__)
        raise RequestError(f"initialization: {path}: not readable weights: {reason}") from None
    if not isinstance(weights, Mapping) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise RequestError(f"initialization: {path}: expected a mapping of names to tensors")
    return weights
