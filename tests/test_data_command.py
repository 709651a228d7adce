"""`fedinit data`: what is told and drawn of a data set, against counts by hand."""

import csv
import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from experiments.data_summary import Labels, labels_of
from fedinit.data import ClientRows, FederatedDataset
from fedinit.data.federated_dataset import IGNORED
from tests.test_sources import grey, write_femnist

__all__ = ["grey"]


def labelled(
    labels: list[int], clients: dict[str, list[int]] | ClientRows, classes: int | None = None
) -> FederatedDataset:
    """Rows of two zeros with these labels."""
    targets = torch.tensor(labels)
    inputs = torch.zeros(len(labels), 2)
    return FederatedDataset(inputs, targets, clients, inputs[:1], targets[:1], classes)


def counted() -> FederatedDataset:
    """Clients a, b, c have labels {0, 0, 0, 1}, {1, 1}, {0, 2}, their rows interleaved."""
    return labelled([0, 1, 0, 1, 2, 0, 1, 0], {"a": [0, 3, 5, 7], "b": [1, 6], "c": [2, 4]})


def sizes_1_to_41() -> FederatedDataset:
    owners = np.repeat(np.arange(41), np.arange(1, 42))
    return labelled([0] * len(owners), ClientRows.by_owner([f"{each:02d}" for each in owners]))


def ignored() -> FederatedDataset:
    return labelled([0, 1, IGNORED], {"a": [0, 1], "b": [2]}, 2)


def one_too_many() -> FederatedDataset:
    """Counted in a row of two labels for each client, a's label 2 would be b's label 0."""
    return labelled([0, 0, 2, 1], {"a": [0, 1, 2], "b": [3]}, 2)


def skew(table: list[list[int]]) -> Labels:
    """Count the labels of clients (rows of the table) that have so many of each (columns)."""
    labels = [label for row in table for label, count in enumerate(row) for _ in range(count)]
    owners = [str(client) for client, row in enumerate(table) for _ in range(sum(row))]
    found = labels_of(labelled(labels, ClientRows.by_owner(owners), len(table[0])))
    assert found is not None
    return found


def test_label_skew_by_hand():
    """Clients (3, 1) and (0, 2): shares (3/4, 1/4) and (0, 1), everybody's (1/2, 1/2).

    Distances 1/4 and 1/2: 3/8 on average; 2 and 1 different labels.
    """
    labels = skew([[3, 1], [0, 2]])
    assert labels.skew == pytest.approx(3 / 8)
    assert labels.distinct == 1.5
    assert skew([[5, 5], [1, 1]]).skew == 0


def test_many_clients_of_many_labels_are_counted():
    """60,000 clients of one row, 60 clients for each of 1,000 labels: 1 - 1/1000 from everybody."""
    labels = labels_of(
        labelled([k % 1000 for k in range(60_000)], ClientRows.by_owner(np.arange(60_000)))
    )
    assert labels is not None
    assert labels.skew == pytest.approx(0.999)
    assert labels.distinct == 1


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_a_data_set_is_told_and_drawn(fedinit, experiment, tmp_path):
    """Six clients of 20, 25, ..., 45 points in three corners; 60 to test on."""
    file = experiment({"dataset": "plugged_in:gaussians", "model": "plugged_in:Point"})
    result = fedinit("data", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for text in ("195", "60", "[8] float32", "natural", "20 to 45, median 32.5, mean 32.5"):
        assert text in result.stdout
    counts = rows(tmp_path / "out" / "labels.csv")
    by_client: dict[str, int] = {}
    for row in counts:
        by_client[row["client"]] = by_client.get(row["client"], 0) + int(row["examples"])
    assert by_client == {f"c{place}": 20 + 5 * place for place in range(6)}
    histogram = rows(tmp_path / "out" / "sizes.csv")
    assert sum(int(row["clients"]) for row in histogram) == 6
    for name in ("labels", "sizes"):
        svg = ElementTree.fromstring((tmp_path / "out" / f"{name}.svg").read_text())  # noqa: S314
        assert "plugged_in:gaussians" in svg.attrib["aria-label"]


def test_what_is_told_and_drawn_by_hand(fedinit, tmp_path):
    """Sizes 4, 2, 2; everybody's shares (4, 3, 1)/8; distances 2/8, 5/8, 3/8: 10/24 on average.

    2, 1 and 2 different labels: 5/3 on average.
    """
    result = fedinit("data", "tests.test_data_command:counted", "--out", tmp_path)
    told = dict(re.findall(r"^  (\w[\w ]*?)  +(.+?) *$", result.stdout, re.MULTILINE))
    assert told["training examples"] == "8"
    assert told["test examples"] == "1"
    assert told["clients"] == "3"
    assert told["labels"] == "3"
    assert told["examples of a client"] == "2 to 4, median 2, mean 2.667"
    assert told["labels of a client"] == "mean 1.67"
    assert told["label skew"].startswith("0.417 ")
    expected = "client,label,examples\na,0,3\na,1,1\nb,1,2\nc,0,1\nc,2,1\n"
    assert (tmp_path / "labels.csv").read_text() == expected
    assert (tmp_path / "sizes.csv").read_text() == "from,to,clients\n2,2,2\n3,3,0\n4,4,1\n"


def test_rows_held_out_to_validate_are_nobodys(fedinit, tmp_path):
    """Half of 4, 2 and 2 rows."""
    result = fedinit(
        "data", "tests.test_data_command:counted", "--out", tmp_path, "--set", "validation=0.5"
    )
    told = dict(re.findall(r"^  (\w[\w ]*?)  +(.+?) *$", result.stdout, re.MULTILINE))
    assert (told["training examples"], told["validation examples"]) == ("4", "4")
    assert told["examples of a client"] == "1 to 2, median 1, mean 1.333"


def test_a_bubble_is_where_and_as_large_as_its_count(fedinit, tmp_path):
    """Counts 3 and 1 of a, 2 of b, 1 and 1 of c: areas in this ratio; columns a, b, c."""
    fedinit("data", "tests.test_data_command:counted", "--out", tmp_path)
    svg = (tmp_path / "labels.svg").read_text()
    (group,) = re.findall(r'id="labels-PathCollection_1">(.*?)</g>', svg, re.DOTALL)
    outlines = [
        np.array(re.findall(r"([\d.]+) ([\d.]+) *\n", outline), dtype=float)
        for outline in re.findall(r'd="(.*?)"', group, re.DOTALL)
    ]
    areas = np.square([np.ptp(outline[:, 1]) for outline in outlines])
    assert areas / areas[0] * 3 == pytest.approx([3, 1, 2, 1, 1], rel=1e-4)
    centres = [(outline.min(0) + outline.max(0)) / 2 for outline in outlines]
    columns, labels = np.transpose(centres)
    assert np.unique(columns.round(3), return_inverse=True)[1].tolist() == [0, 0, 1, 2, 2]
    upwards = np.unique(-labels.round(3), return_inverse=True)[1]
    assert upwards.tolist() == [0, 1, 1, 0, 2]


def test_bars_stand_for_equally_many_sizes(fedinit, tmp_path):
    """A client of each size 1 .. 41: 20 bars of two sizes and one of the last."""
    fedinit("data", "tests.test_data_command:sizes_1_to_41", "--out", tmp_path)
    bars = [tuple(map(int, row.values())) for row in rows(tmp_path / "sizes.csv")]
    assert bars == [(low, low + 1, 2) for low in range(1, 41, 2)] + [(41, 42, 1)]
    title = ElementTree.fromstring((tmp_path / "labels.svg").read_text()).attrib["aria-label"]  # noqa: S314
    assert "labels of 30 of 41 clients: clients, evenly spaced" in title


def test_roles_are_natural_and_too_many_labels_are_not_drawn(fedinit, tmp_path):
    result = fedinit("data", "shakespeare", "--out", tmp_path)
    assert re.search(r"partition +natural", result.stdout)
    assert re.search(r"clients x labels +not drawn: more than 100 labels", result.stdout)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["sizes.csv", "sizes.svg"]
    sizes = rows(tmp_path / "sizes.csv")
    (clients,) = re.findall(r"^  clients  +(\d+)", result.stdout, re.MULTILINE)
    assert sum(int(row["clients"]) for row in sizes) == int(clients)


def test_your_module_is_found_in_the_folder_you_are_in(fedinit, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("from tests.test_data_command import counted\n")
    monkeypatch.chdir(tmp_path)
    # As for the installed command, whose import path does not begin with the current folder.
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")])
    result = fedinit("data", "only_here:counted", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_data_without_clients_are_dealt_by_labels_unless_said(fedinit, tmp_path):
    skewed = fedinit("data", "fashion-mnist", "--out", tmp_path / "a")
    assert "dirichlet(0.1), seed 0" in skewed.stdout
    even = fedinit(
        "data", "fashion-mnist", "--out", tmp_path / "b", "--set", "partition.kind=iid",
        "--set", "partition.clients=7",
    )  # fmt: skip
    assert "iid, seed 0" in even.stdout
    assert "857 to 858" in even.stdout  # 6,000 / 7
    assert len({row["client"] for row in rows(tmp_path / "b" / "labels.csv")}) == 7


def test_the_folder_of_a_data_set_of_ones_own_has_no_colon(
    fedinit, experiment, tmp_path, monkeypatch
):
    monkeypatch.chdir(experiment({}).parent)
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "own.py").write_text("from plugged_in import gaussians")
    assert fedinit("data", "lab.own:gaussians").exit_code == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert folder.name.startswith("data-lab.own-gaussians-")


def test_tokens_are_counted_without_padding(fedinit, experiment, tmp_path):
    file = experiment({"dataset": "plugged_in:two_tokens", "model": "plugged_in:Unigram"})
    result = fedinit("data", file, "--out", tmp_path / "out")
    (line,) = [line for line in result.stdout.splitlines() if "tokens to predict" in line]
    assert line.split()[-1] == "4"
    assert "not drawn: a row has no single label" in result.stdout
    assert not (tmp_path / "out" / "labels.svg").exists()


def test_a_partition_that_cannot_be_is_not_called_missing_data(fedinit, experiment, tmp_path):
    file = experiment(
        {
            "dataset": "plugged_in:gaussians",
            "model": "plugged_in:Point",
            "partition": {"kind": "iid"},
            "grid": {"partition.clients": [5, 196]},
        }
    )
    result = fedinit("data", file, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "196 clients cannot share 195 rows" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_not_here_is_listed_with_the_reason(fedinit, experiment, tmp_path, grey):
    write_femnist(tmp_path, grey, [0, 5, 61, 7, 8, 9])
    missing = str(tmp_path / "nowhere")
    file = experiment(
        {
            "dataset": "femnist",
            "model": "cnn",
            "partition": {"kind": "iid", "clients": 2},
            "grid": {
                "dataset_args": [{"data_dir": missing}, {"data_dir": str(tmp_path)}],
                "seed": [0, 1],
            },
        }
    )
    result = fedinit("data", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    reason = f"femnist is not here: dataset_args.data_dir: {missing}: no such folder"
    assert result.stdout.count(reason) == 1
    shown = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert shown == ["3-femnist", "4-femnist"]
    alone = fedinit("data", "femnist", "--set", f"dataset_args={json.dumps({'data_dir': missing})}")
    assert (alone.exit_code, "no such folder" in alone.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["shakespere"], "did you mean 'shakespeare'?"),
        (["fashion-mnist", "--set", "partition.clients=0"], "partition.clients"),
        (["fashion-mnist", "--set", "partition.kind=natural"], "no natural clients"),
        (["fashion-mnist", "--set", "cohort"], "expected dotted.key=value"),
        (["none:here"], "cannot import 'none:here'"),
        (["tests.test_data_command:ignored"], "labels must lie in 0..1, got -100..1"),
        (["tests.test_data_command:one_too_many"], "labels must lie in 0..1, got 0..2"),
        (["qickstart"], "did you mean 'quickstart'?"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, expected, fedinit, tmp_path):
    result = fedinit("data", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
