"""`fedinit data`: what a data set and its partition look like, before a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from experiments.listing import source
from experiments.wiring import Datasets
from fedinit.config import Run, make_run
from fedinit.data import DATASETS, FederatedDataset
from fedinit.drawing import PALETTE, Drawing, canvas, to_csv
from fedinit.errors import RequestError
from fedinit.experiment_file import Experiment, override, with_settings
from fedinit.measurements.evaluation import count_targets
from fedinit.results import write_atomically

_DRAWN_CLIENTS, _DRAWN_LABELS = 30, 100  # more are too small to see
_BARS = 30


@dataclass(frozen=True)
class Labels:
    """How labels lie over clients: the client at position `client` has `count` rows of `label`.

    Only pairs that occur are held, by client and label: many clients have few of many labels.
    """

    client: np.ndarray
    label: np.ndarray
    count: np.ndarray
    clients: int

    @property
    def distinct(self) -> float:
        """Mean number of different labels that a client has."""
        return len(self.client) / self.clients

    @property
    def skew(self) -> float:
        """Mean total variation distance of a client's label distribution from everybody's.

        1/2 sum_k |p_ik - p_k|: 0 where all clients are alike, towards 1 where none are. Both sum to
        one, so it is the sum of p_ik - p_k where that is positive, which needs p_ik > 0.
        """
        own = self.count / np.bincount(self.client, self.count)[self.client]
        everybody = np.bincount(self.label, self.count) / self.count.sum()
        return float(np.maximum(own - everybody[self.label], 0).sum() / self.clients)


def named(name: str, overrides: Iterable[str], datasets: Datasets) -> Run:
    """Return a run that has a data set and the given settings, and nothing else of its own.

    Data without clients of their own are dealt by labels, dirichlet, unless the settings say how.

    Raises:
        RequestError: a setting is unknown or wrong, or the data are not here.
    """
    settings = dict(map(override, overrides))
    run = with_settings(make_run({"dataset": name, "model": "none"}), settings)
    if datasets.load(run).clients is None and not {"partition", "partition.kind"} & settings.keys():
        return with_settings(run, {"partition.kind": "dirichlet"})
    return run


def different(experiment: Experiment) -> list[Run]:
    """Return the first run of each data set, dealt in each way, that an experiment has."""
    runs: dict[tuple[object, ...], Run] = {}
    for run in experiment.runs.values():
        drawn = run.partition.kind != "natural" or run.validation  # with the seed
        how = (run.partition.model_dump_json(), run.validation, run.seed) if drawn else ()
        runs.setdefault((Datasets.key(run), *how), run)
    return list(runs.values())


def labels_of(dataset: FederatedDataset) -> Labels | None:
    """Count each client's labels; None where rows have no single label.

    Raises:
        RequestError: a label is not among those that the data set says it has.
    """
    classes, owners = dataset.num_classes, dataset.owners
    if dataset.targets.ndim != 1 or dataset.targets.is_floating_point() or classes is None:
        return None
    labels = dataset.targets.numpy()[owners.rows]
    if labels.min() < 0 or labels.max() >= classes:
        raise RequestError(
            f"dataset: labels must lie in 0..{classes - 1}, got {labels.min()}..{labels.max()}"
        )
    owner = np.repeat(np.arange(len(owners)), owners.sizes)
    cells, count = np.unique(owner * classes + labels, return_counts=True)
    return Labels(*np.divmod(cells, classes), count, len(owners))


def facts(run: Run, dataset: FederatedDataset) -> Table:
    """Tabulate where the data come from, their size, and how they lie over the clients.

    Raises:
        RequestError: a label is not among those that the data set says it has.
    """
    sizes, found = dataset.owners.sizes, labels_of(dataset)
    partition = run.partition
    tested = "test" if dataset.held_out is None else "validation"
    how = {"natural": "natural", "iid": f"iid, seed {run.seed}"}.get(
        partition.kind, f"{partition.kind}({partition.alpha:g}), seed {run.seed}"
    )
    rows = {
        "read from": run.dataset_args.get("data_dir")
        or (source(run.dataset) if run.dataset in DATASETS else "your code"),
        "training examples": f"{len(dataset.owned):,}",
        f"{tested} examples": f"{dataset.test_size:,}",
        "a row": f"{list(dataset.inputs.shape[1:])} {str(dataset.inputs.dtype)[6:]}",
        "labels": f"{dataset.num_classes:,}" if dataset.num_classes else "none: numbers",
        "partition": how,
        "clients": f"{len(sizes):,}",
        "examples of a client": f"{sizes.min():,} to {sizes.max():,}, median {np.median(sizes):g}, "
        f"mean {sizes.mean():.4g}",
    }
    if dataset.has_sequences:
        rows["tokens to predict"] = f"{int(count_targets(dataset.targets)):,}"
    if found is not None:
        rows["labels of a client"] = f"mean {found.distinct:.3g}"
        rows["label skew"] = f"{found.skew:.3f} (mean total variation distance; 0: alike)"
    if found is None:
        rows["clients x labels"] = "not drawn: a row has no single label"
    elif not _drawable(dataset):
        rows["clients x labels"] = f"not drawn: more than {_DRAWN_LABELS} labels"
    table = Table(title=run.dataset, title_justify="left", box=SIMPLE_HEAD, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def drawings(run: Run, dataset: FederatedDataset) -> list[Drawing]:
    """Draw the clients' sizes and, where rows have one of a few labels, clients x labels.

    Raises:
        RequestError: a label is not among those that the data set says it has.
    """
    found = [_sizes(run, dataset.owners.sizes)]
    labels = labels_of(dataset)
    if labels is not None and _drawable(dataset):
        found.append(_bubbles(run, dataset.owners.ids, labels))
    return found


def _drawable(dataset: FederatedDataset) -> bool:
    return dataset.num_classes is not None and dataset.num_classes <= _DRAWN_LABELS


def write(drawing: Drawing, folder: Path) -> Path:
    """Write a drawing's SVG, and its numbers beside it; return the SVG's path.

    Raises:
        RequestError: the folder cannot be written.
    """
    path = folder / f"{drawing.name}.svg"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawing.svg.encode())
        write_atomically(path.with_suffix(".csv"), drawing.csv.encode())
    except OSError as error:
        raise RequestError(f"--out {folder}: {error.strerror}") from None
    return path


def _sizes(run: Run, sizes: np.ndarray) -> Drawing:
    # Of whole width, so that every bar stands for equally many sizes.
    width = -(-(int(np.ptp(sizes)) + 1) // _BARS)
    counts, edges = np.histogram(sizes, np.arange(sizes.min(), sizes.max() + width + 1, width))
    title = f"{run.dataset}: examples of a client"
    with canvas("sizes", 2.2, f"Histogram. {title}, {sizes.min()} to {sizes.max()}") as drawn:
        (ax,) = drawn.panels(1)
        ax.stairs(counts, edges - 0.5, fill=True, color=PALETTE[0])
        ax.set_xlabel("examples")
        ax.set_ylabel("clients")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.set_title(title)
    rows = zip(edges[:-1], edges[1:] - 1, counts, strict=True)
    return Drawing("sizes", title, drawn.svg, to_csv(["from", "to", "clients"], rows))


def _bubbles(run: Run, ids: Sequence[str], labels: Labels) -> Drawing:
    """Draw a bubble for each client and label, its area the number of examples."""
    places = np.linspace(0, len(ids) - 1, min(_DRAWN_CLIENTS, len(ids))).astype(int)
    shown = np.isin(labels.client, places)
    x = np.searchsorted(places, labels.client[shown])
    y, count = labels.label[shown], labels.count[shown]
    some = len(places) < len(ids)
    title = f"{run.dataset}: labels of "
    title += f"{len(places)} of {len(ids):,} clients" if some else "the clients"
    order = f"clients, {'evenly spaced through' if some else 'in the order of'} their sorted ids"
    described = f"Bubble chart. {title}: {order}; a bubble's area is a number of examples"
    with canvas("labels", 3.4, described) as drawn:
        (ax,) = drawn.panels(1)
        largest = min(16, 320 / len(places), 280 / (y.max() + 1)) ** 2  # points squared
        ax.scatter(x, y, s=count / count.max() * largest, color=PALETTE[0], alpha=0.7, lw=0)
        ax.set_xlabel(order)
        ax.set_ylabel("label")
        ax.tick_params(labelbottom=False)  # a place among those drawn is nobody's id
        ax.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        ax.margins(0.04)
        ax.set_title(title)
    cells = zip(labels.client.tolist(), labels.label, labels.count, strict=True)
    rows = ([ids[client], label, count] for client, label, count in cells)
    return Drawing("labels", title, drawn.svg, to_csv(["client", "label", "examples"], rows))
