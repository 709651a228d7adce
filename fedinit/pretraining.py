"""Proxy weights: supervised pre-training on other data, where nobody has published any.

The file is named by the hash of all that decides it, so that what was trained once is found again,
and tells in its metadata how it came to be.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fedinit.config import Proxy, Run
from fedinit.data import FederatedDataset
from fedinit.device import device
from fedinit.errors import RequestError, WriteError, located
from fedinit.initialization import METADATA
from fedinit.measurements.evaluation import evaluate, per_example
from fedinit.problem import Problem, build_problem, label_space
from fedinit.randomness import Draw, draws_undone, keyed, seed_all, torch_seed
from fedinit.registry import source_of
from fedinit.results import to_json, write_atomically, writing

Report = Callable[[int, int, float], None]


def proxy_run(run: Run) -> Run:
    """Return the run whose data set, weights and loss a run's proxy is trained with.

    Raises:
        RequestError: the run names no proxy data.
    """
    if run.proxy.dataset is None:
        raise RequestError("proxy.dataset: required with initialization: proxy")
    same = {
        "dataset": run.proxy.dataset,
        "dataset_args": run.proxy.dataset_args,
        "seed": run.proxy.seed,
        "trainable": "all",
    }
    return run.model_copy(update=same)


def proxy_path(run: Run) -> Path:
    """Return where a run's proxy weights are, or will be: in the user's cache.

    The cache is $XDG_CACHE_HOME/fedinit/proxy, by default ~/.cache/fedinit/proxy.
    """
    text = json.dumps(_decides(run), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = run.model.replace(":", "-").replace("/", "-")
    return cache / "fedinit" / "proxy" / f"{name}-{digest}.safetensors"


def _decides(run: Run) -> dict[str, Any]:
    """Return everything that the proxy's weights depend on, but for the machine.

    Of one's own modules that are the files themselves, but not what they import; of an argument
    that is a path, where it leads and what a file has in it, but not what a folder has.
    """
    settings = run.model_dump(mode="json")
    decides = {key: settings[key] for key in ("model", "model_args", "loss", "loss_args", "proxy")}
    files = {}
    for arguments in (
        decides["model_args"],
        decides["loss_args"],
        decides["proxy"]["dataset_args"],
    ):
        for name, value in arguments.items():
            if isinstance(value, str) and os.path.exists(value):
                path = arguments[name] = os.path.abspath(value)  # another folder has another
                if os.path.isfile(path):
                    files[path] = _digest(path, os.stat(path).st_mtime_ns)
    named = {"model": run.model, "loss": run.loss, "dataset": run.proxy.dataset or ""}
    sources = {kind: found for kind, name in named.items() if (found := source_of(kind, name))}
    return decides | {
        key: found for key, found in (("sources", sources), ("files", files)) if found
    }


@cache
def _digest(path: str, _modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pretrain(run: Run, dataset: FederatedDataset, report: Report) -> Path:
    """Train a run's model on its proxy data and keep the weights.

    Args:
        run: the run; its `proxy` says how.
        dataset: the proxy data.
        report: called after each step with steps done, steps in all, and the step's loss.

    Returns:
        The path, a .safetensors file.

    Raises:
        RequestError: the model or loss does not suit the data or raises, a loss or a weight is not
            finite, or the file cannot be written.
    """
    like, path, decides = proxy_run(run), proxy_path(run), _decides(run)
    problem = build_problem(like, dataset).on(device())
    try:
        epochs = list(_epochs(run.proxy, problem, report))
    except RequestError:
        raise
    except Exception as error:  # whatever a user's model or loss raises
        raise RequestError(f"proxy: training '{run.model}' failed: {located(error)}") from None
    record = {
        **decides,
        "labels": label_space(like, dataset),
        "examples": _size(run.proxy, dataset),
        "input_shape": list(dataset.inputs.shape[1:]),
        "epochs": epochs,
        "torch": torch.__version__,
    }
    weights = {name: each.contiguous() for name, each in weights_of(problem).items()}
    if not all(each.isfinite().all() for each in weights.values()):
        raise RequestError(f"proxy.lr: {run.proxy.lr}: the weights are not finite")
    try:
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(weights, metadata={METADATA: to_json(record)}))
    except WriteError as error:
        raise RequestError(f"proxy: cannot write {error}") from None
    return path


def weights_of(problem: Problem) -> dict[str, Tensor]:
    """Return a model's arrays by name, tied ones once, as a proxy's file has them."""
    state = problem.model.state_dict()
    return {name: state[name] for name in problem.layout.shapes}


def _epochs(proxy: Proxy, problem: Problem, report: Report) -> Iterator[dict[str, float]]:
    """Train, and yield what each epoch ended with."""
    rng = keyed(Draw.PROXY, proxy.seed)
    rows = rng.permutation(problem.dataset.owned)[: _size(proxy, problem.dataset)]
    steps = proxy.epochs * math.ceil(len(rows) / proxy.batch_size)
    parameters = list(problem.model.parameters())
    optimizer = torch.optim.SGD(
        parameters, proxy.lr, proxy.momentum, weight_decay=proxy.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _SCHEDULES[proxy.schedule](steps))
    done = 0
    with draws_undone():
        seed_all(torch_seed(rng))
        for epoch in range(1, proxy.epochs + 1):
            problem.model.train()
            order, total = rng.permutation(rows), 0.0
            for first in range(0, len(order), proxy.batch_size):
                inputs, targets = problem.dataset.batch(order[first : first + proxy.batch_size])
                losses = per_example(problem.loss(problem.model(inputs), targets), targets)
                optimizer.zero_grad()
                losses.mean().backward()
                if proxy.max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(parameters, proxy.max_grad_norm)
                optimizer.step()
                schedule.step()
                done += 1
                loss = losses.detach().sum().item()
                if not math.isfinite(loss):
                    raise RequestError(f"proxy.lr: {proxy.lr}: the loss is not finite, step {done}")
                total += loss
                report(done, steps, loss / len(losses))
            tested = _tested(problem, proxy.batch_size)
            yield {"epoch": epoch, "train_loss": total / len(order), **tested}


def _tested(problem: Problem, batch_size: int) -> dict[str, float]:
    size = problem.dataset.test_size
    batches = (
        problem.dataset.test_batch(at, min(at + batch_size, size))
        for at in range(0, size, batch_size)
    )
    found = evaluate(problem.model, problem.loss, batches)
    return {f"test_{name}": found[name] for name in ("loss", "accuracy") if name in found}


def _size(proxy: Proxy, dataset: FederatedDataset) -> int:
    return min(len(dataset.owned), proxy.max_examples or len(dataset))


_SCHEDULES: dict[str, Callable[[int], Callable[[int], float]]] = {
    "constant": lambda _steps: lambda _step: 1.0,
    "cosine": lambda steps: lambda step: (1 + math.cos(math.pi * step / steps)) / 2,
}
