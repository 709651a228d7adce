"""Problems as a user would plug them in: quadratics whose federated training is known by hand."""

import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import ray
import torch
from torch import Tensor, nn

from fedinit.data import FederatedDataset
from fedinit.data.federated_dataset import IGNORED


def quadratics(
    curvature: list[list[float]],
    optimum: list[list[float]],
    examples: list[int],
    test_optimum: list[float] | None = None,
) -> FederatedDataset:
    """Client i holds examples[i] equal rows: its loss is 1/2 sum_k a_ik (x_k - b_ik)^2."""
    rows = {}
    inputs, targets = [], []
    for client, (a, b, n) in enumerate(zip(curvature, optimum, examples, strict=True)):
        rows[f"client {client}"] = range(len(inputs), len(inputs) + n)
        inputs += [a] * n
        targets += [b] * n
    x, y = torch.tensor(inputs, dtype=torch.float64), torch.tensor(targets, dtype=torch.float64)
    if test_optimum is None:
        return FederatedDataset(x, y, rows, x, y)
    elsewhere = torch.tensor([test_optimum], dtype=torch.float64)
    return FederatedDataset(x, y, rows, torch.ones_like(elsewhere), elsewhere)


class Point(nn.Module):
    """The point x itself, in float64; its output for a row is (x, the row's curvature)."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, curvature: Tensor) -> Tensor:
        return torch.stack([self.x.expand_as(curvature), curvature], dim=1)


class Itself(nn.Module):
    """The point again, whatever the row: its output is the parameter's own memory."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.x.expand(len(inputs), 1)


def first_output(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs[:, 0]


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    x, curvature = outputs[:, 0], outputs[:, 1]
    return (curvature * (x - targets).square()).sum(1) / 2


def gaussians(clients: int = 6, classes: int = 3, per_client: int = 20) -> FederatedDataset:
    """Noisy points around `classes` corners; clients of unequal size."""
    generator = torch.Generator().manual_seed(1)
    sizes = [per_client + 5 * client for client in range(clients)]
    targets = torch.randint(classes, (sum(sizes) + 60,), generator=generator)
    inputs = torch.eye(8)[targets] + 0.3 * torch.randn(len(targets), 8, generator=generator)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    rows = {
        f"c{i}": range(end - size, end)
        for i, (end, size) in enumerate(zip(ends, sizes, strict=True))
    }
    last = ends[-1]
    return FederatedDataset(inputs[:last], targets[:last], rows, inputs[last:], targets[last:])


def batch_norm_classifier(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, num_classes))


def dropout_classifier(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, num_classes))


dropout_classifier.head = "3"


def linear_classifier(num_classes: int, dtype: str) -> nn.Module:
    return nn.Linear(8, num_classes, dtype=getattr(torch, dtype))


def small_classifier(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, num_classes))


class PointWithMemory(Point):
    """A point that keeps, in a float buffer, the mean of what it was last trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, curvature: Tensor) -> Tensor:
        if self.training:
            self.seen.copy_(curvature.mean())
        return super().forward(curvature)


class Counting(Point):
    """A point that counts the steps it was trained, in tensors that it makes anew each time."""

    def __init__(self) -> None:
        super().__init__(size=1)
        zero = torch.zeros((), dtype=torch.float64)
        self.register_buffer("steps", zero.clone())
        self.register_buffer("of_round", zero.clone())
        self.register_buffer("own", zero.clone(), persistent=False)
        self.register_buffer("last", torch.zeros(5, dtype=torch.float64))
        self.teacher = nn.Parameter(zero.clone(), requires_grad=False)

    def forward(self, curvature: Tensor) -> Tensor:
        if self.training:
            self.steps = self.steps + 1
            self.teacher.data = self.teacher.data + 1
            self.last = curvature  # of another shape: not the model's to keep
            self.own = self.own + 1
            self.of_round = self.own.clone()
        return super().forward(curvature)


class Noisy(Point):
    """A point whose training sees it elsewhere, by what NumPy and Python draw."""

    def __init__(self) -> None:
        super().__init__(size=1)

    def forward(self, curvature: Tensor) -> Tensor:
        noise = random.random() + np.random.random() if self.training else 0.0
        return super().forward(curvature) + noise


def noise_images(clients: int = 4, per_client: int = 12) -> FederatedDataset:
    """Images of two channels, without meaning."""
    generator = torch.Generator().manual_seed(2)
    images = torch.rand((clients * per_client, 2, 8, 8), generator=generator)
    labels = torch.randint(3, (len(images),), generator=generator)
    rows = {f"c{i}": range(i * per_client, (i + 1) * per_client) for i in range(clients)}
    return FederatedDataset(images, labels, rows, images[:10], labels[:10], 3)


class Convolution(nn.Module):
    """One convolution, summed over the image."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, num_classes, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolution(images).sum((2, 3))


class Viewing(Convolution):
    """Flattens by `view`, which activations in channels_last refuse."""

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.convolution(images)
        return outputs.view(len(images), -1).view(len(images), outputs.shape[1], -1).sum(2)


class SlowUnless(Convolution):
    """Slow in any memory format but one."""

    def __init__(self, num_classes: int, fast: str) -> None:
        super().__init__(num_classes)
        self.fast = getattr(torch, fast)

    def forward(self, images: Tensor) -> Tensor:
        if not self.convolution.weight.is_contiguous(memory_format=self.fast):
            time.sleep(0.02)
        return super().forward(images)


class SlowToStart(Convolution):
    """Takes a while whatever the number of images, as a GPU does."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(images)


class Recurrent(nn.Module):
    """An LSTM, which vmap cannot do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, num_classes, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.lstm(images.flatten(2).transpose(1, 2).reshape(len(images), -1, 16))[0][:, -1]


def signs(least: int = -1, classes: int | None = None) -> FederatedDataset:
    """Labels of -1 and 1, for a loss that takes them."""
    points, labels = torch.ones(4, 8), torch.tensor([least, 1, least, 1])
    rows = {"a": [0], "b": [1], "c": [2], "d": [3]}
    return FederatedDataset(points, labels, rows, points, labels, classes)


def one_image(shape: list[int], classes: int, labels: str | None = None) -> FederatedDataset:
    """An image of one of so many classes."""
    image, label = torch.zeros(1, *shape), torch.tensor([classes - 1])
    return FederatedDataset(image, label, {"a": [0]}, image, label, labels=labels)


def other_gaussians() -> FederatedDataset:
    """The same points, of which nobody says that their labels mean the same."""
    return gaussians()


def two_tokens() -> FederatedDataset:
    """One client with two texts of three tokens and one, of a vocabulary of two."""
    inputs = torch.zeros((2, 3), dtype=torch.int64)
    targets = torch.tensor([[0, 0, 1], [1, IGNORED, IGNORED]])
    return FederatedDataset(inputs, targets, {"a": [0, 1]}, inputs, targets, 2)


class Unigram(nn.Module):
    """One score for each token, whatever came before; zero at first."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(num_classes))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.scores[None, :, None].expand(len(tokens), -1, tokens.shape[1])


def group_norm_network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(2, 4))


def saved(folder: str) -> FederatedDataset:
    return FederatedDataset.open(Path(folder))


class FailingPoint(Point):
    """A point that client `victim`, known by its curvature, cannot be trained on."""

    def __init__(self, victims: list[float], size: int = 2) -> None:
        super().__init__(size)
        self.victims = victims

    def forward(self, curvature: Tensor) -> Tensor:
        if self.training and curvature[0, 0].item() in self.victims:
            raise ValueError("out of luck")
        return super().forward(curvature)


class Slow(nn.Module):
    """Waits in every forward pass in training."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            time.sleep(self.seconds)
        return inputs


def slow_classifier(num_classes: int, seconds: float = 0.01) -> nn.Module:
    return nn.Sequential(Slow(seconds), dropout_classifier(num_classes))


UNEQUAL = (9, 3, 5, 8, 1, 12, 7)  # rows of each client


def unequal_images(sizes: tuple[int, ...] = UNEQUAL) -> FederatedDataset:
    """Grey images of random brightness, of clients of unequal size."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (sum(sizes),), generator=generator)
    images = torch.rand((len(labels), 1, 8, 8), generator=generator) + labels.view(-1, 1, 1, 1)
    return FederatedDataset(images, labels, _dealt(sizes), images[:10], labels[:10], 3)


def unequal_texts(sizes: tuple[int, ...] = UNEQUAL) -> FederatedDataset:
    """Texts of one to six tokens, padded, of clients of unequal size."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(5, (sum(sizes), 7), generator=generator)
    inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:].clone()
    lengths = torch.randint(1, 7, (len(tokens), 1), generator=generator)
    targets[torch.arange(6) >= lengths] = IGNORED
    return FederatedDataset(inputs, targets, _dealt(sizes), inputs[:10], targets[:10], 5)


def _dealt(sizes):
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return {
        f"c{i}": range(end - n, end) for i, (end, n) in enumerate(zip(ends, sizes, strict=True))
    }


class NextToken(nn.Module):
    """A token's embedding, scaled, scores the next; one parameter is never used."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.unused = nn.Parameter(torch.ones(3))
        self.output = nn.Linear(4, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.scale * self.embedding(tokens))).transpose(1, 2)


class MixesRows(nn.Linear):
    """Scores beside those of the batch's mean row."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(8, num_classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs - inputs.mean(0))


def scores(outputs: Tensor, targets: Tensor) -> Tensor:
    """No loss of a row."""
    return outputs


class Scaled(nn.Module):
    """A classifier whose head is the parameter that scales its scores."""

    head = "scale"

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Linear(8, num_classes)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs) * self.scale


def headless(num_classes: int) -> nn.Module:
    """A network whose head's prefix is no parameter's."""
    return nn.Sequential(nn.Linear(8, num_classes))


headless.head = "nowhere"


def listed():
    """Targets in a list."""
    data = gaussians()
    return FederatedDataset(
        data.inputs, data.targets.tolist(), None, data.test_inputs, data.test_targets
    )


def superstitious(outputs: Tensor, targets: Tensor) -> Tensor:
    if (targets == 13).any():
        raise ValueError("thirteen")
    return half_squared_error(outputs, targets)


def mortal(folder: str, deaths: int = 0, seconds: float = 0.0):
    """Half the squared error, in a worker that is killed, without a word, the first few times.

    It notes in `folder` each death, and where it was computed.
    """
    noted = Path(folder)
    noted.mkdir(exist_ok=True)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.requires_grad:  # in training, which is done by workers alone
            context = ray.get_runtime_context()
            died = len(list(noted.glob("death-*")))
            if died < deaths:
                (noted / f"death-{died}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            gpus = "".join(context.get_accelerator_ids().get("GPU", []))
            (noted / f"node-{context.get_node_id()}-gpu-{gpus}").touch()
            (noted / f"code-{Path(__file__).parent.name}").touch()
            time.sleep(seconds)
        return half_squared_error(outputs, targets)

    return loss
