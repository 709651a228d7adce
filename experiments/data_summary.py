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

_MOST_CELLS = 50_000_000  # of the table of clients and labels
_DRAWN_CLIENTS, _DRAWN_LABELS = 30, 100  # more are too small to see


@dataclass(frozen=True)
class Labels:
    """How labels lie over clients: `counts` (clients, labels)."""

    counts: np.ndarray

    @property
    def distinct(self) -> float:
        """Mean number of different labels that a client has."""
        return float((self.counts > 0).sum(1).mean())

    @property
    def skew(self) -> float:
        """Mean total variation distance of a client's label distribution from everybody's.

        1/2 sum_k |p_ik - p_k|: 0 where all clients are alike, towards 1 where none are.
        """
        own = self.counts / self.counts.sum(1, keepdims=True)
        everybody = self.counts.sum(0) / self.counts.sum()
        return float(np.abs(own - everybody).sum(1).mean() / 2)


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
    """Return the first run of each data set, partition and seed that an experiment has."""
    runs: dict[tuple[object, ...], Run] = {}
    for run in experiment.runs.values():
        drawn = run.partition.kind != "natural"  # with the seed
        how = (run.partition.model_dump_json(), run.seed) if drawn else ()
        runs.setdefault((Datasets.key(run), *how), run)
    return list(runs.values())


def labels_of(dataset: FederatedDataset) -> Labels | None:
    """Count each client's labels; None where rows have no single label, or there are too many."""
    classes, owners = dataset.num_classes, dataset.owners
    if dataset.targets.ndim != 1 or dataset.targets.is_floating_point() or classes is None:
        return None
    if len(owners) * classes > _MOST_CELLS:
        return None
    owner = np.repeat(np.arange(len(owners)), owners.sizes)
    cells = owner * classes + dataset.targets.numpy()[owners.rows]
    counts = np.bincount(cells, minlength=len(owners) * classes)
    return Labels(counts.reshape(len(owners), classes))


def facts(run: Run, dataset: FederatedDataset) -> Table:
    """Tabulate where the data come from, their size, and how they lie over the clients."""
    sizes, found = dataset.owners.sizes, labels_of(dataset)
    partition = run.partition
    how = {"natural": "natural", "iid": f"iid, seed {run.seed}"}.get(
        partition.kind, f"{partition.kind}({partition.alpha:g}), seed {run.seed}"
    )
    known = DATASETS.get(run.dataset)
    rows = {
        "read from": run.dataset_args.get("data_dir") or (source(known) if known else "your code"),
        "training examples": f"{len(dataset):,}",
        "test examples": f"{dataset.test_size:,}",
        "a row": f"{list(dataset.inputs.shape[1:])} {str(dataset.inputs.dtype)[6:]}",
        "labels": f"{dataset.num_classes:,}" if dataset.num_classes else "none: numbers",
        "partition": how,
        "clients": f"{len(sizes):,}",
        "examples of a client": f"{sizes.min():,} to {sizes.max():,}, median {np.median(sizes):g}, "
        f"mean {sizes.mean():.4g}",
    }
    if dataset.has_sequences:
        rows["tokens to predict"] = f"{count_targets(dataset.targets):,}"
    if found is not None:
        rows["labels of a client"] = f"mean {found.distinct:.3g}"
        rows["label skew"] = f"{found.skew:.3f} (mean total variation distance; 0: alike)"
    table = Table(title=run.dataset, title_justify="left", box=SIMPLE_HEAD, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))
    return table


def drawings(run: Run, dataset: FederatedDataset) -> list[Drawing]:
    """Draw the clients' sizes and, where rows have one of a few labels, clients x labels."""
    found = [_sizes(run, dataset.owners.sizes)]
    labels = labels_of(dataset)
    if labels is not None and labels.counts.shape[1] <= _DRAWN_LABELS:
        found.append(_bubbles(run, dataset.owners.ids, labels.counts))
    return found


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
    bins = np.histogram_bin_edges(sizes, bins=min(30, int(np.ptp(sizes)) + 1))
    counts, edges = np.histogram(sizes, bins)
    title = f"{run.dataset}: examples of a client"
    with canvas("sizes", 2.2, f"Histogram. {title}, {sizes.min()} to {sizes.max()}") as drawn:
        (ax,) = drawn.panels(1)
        ax.stairs(counts, edges, fill=True, color=PALETTE[0])
        ax.set_xlabel("examples")
        ax.set_ylabel("clients")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(title)
    rows = zip(edges[:-1], edges[1:], counts, strict=True)
    return Drawing("sizes", title, drawn.svg, to_csv(["from", "to", "clients"], rows))


def _bubbles(run: Run, ids: Sequence[str], counts: np.ndarray) -> Drawing:
    """Draw a bubble for each client and label, its area the number of examples."""
    places = np.linspace(0, len(ids) - 1, min(_DRAWN_CLIENTS, len(ids))).astype(int)
    shown = counts[places]
    x, y = np.nonzero(shown)
    title = f"{run.dataset}: labels of "
    title += f"{len(places)} of {len(ids):,} clients" if len(places) < len(ids) else "the clients"
    described = f"Bubble chart. {title}; a bubble's area is a number of examples"
    with canvas("labels", 3.4, described) as drawn:
        (ax,) = drawn.panels(1)
        largest = min(16, 320 / len(places), 280 / shown.shape[1]) ** 2  # points squared
        ax.scatter(x, y, s=shown[x, y] / shown.max() * largest, color=PALETTE[0], alpha=0.7, lw=0)
        ax.set_xlabel("client")
        ax.set_ylabel("label")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        ax.margins(0.04)
        ax.set_title(title)
    rows = (
        [ids[place], label, count]
        for place in range(len(ids))
        for label, count in enumerate(counts[place])
        if count
    )
    return Drawing("labels", title, drawn.svg, to_csv(["client", "label", "examples"], rows))
