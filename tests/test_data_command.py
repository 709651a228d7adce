"""`fedinit data`: what is told and drawn of a data set, against counts by hand."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.data_summary import Labels
from tests.test_sources import grey, write_femnist

__all__ = ["grey"]


def test_label_skew_by_hand():
    """Clients (3, 1) and (0, 2): shares (3/4, 1/4) and (0, 1), everybody's (1/2, 1/2).

    Distances 1/4 and 1/2: 3/8 on average; 2 and 1 different labels.
    """
    labels = Labels(np.array([[3, 1], [0, 2]]))
    assert labels.skew == pytest.approx(3 / 8)
    assert labels.distinct == 1.5
    assert Labels(np.array([[5, 5], [1, 1]])).skew == 0


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


def test_tokens_are_counted_without_padding(fedinit, experiment, tmp_path):
    file = experiment({"dataset": "plugged_in:two_tokens", "model": "plugged_in:Unigram"})
    result = fedinit("data", file, "--out", tmp_path / "out")
    (line,) = [line for line in result.stdout.splitlines() if "tokens to predict" in line]
    assert line.split()[-1] == "4"
    assert not (tmp_path / "out" / "labels.svg").exists()


def test_what_is_not_here_is_listed_with_the_reason(fedinit, experiment, tmp_path, grey):
    write_femnist(tmp_path, grey, [0, 5, 61, 7, 8, 9])
    missing = str(tmp_path / "nowhere")
    file = experiment(
        {
            "dataset": "femnist",
            "model": "cnn",
            "grid": {"dataset_args": [{"data_dir": missing}, {"data_dir": str(tmp_path)}]},
        }
    )
    result = fedinit("data", file, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert f"not here: dataset_args.data_dir: {missing}: no such folder" in result.stdout
    assert (tmp_path / "out" / "2-femnist" / "sizes.svg").exists()
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
    ],
)
def test_a_wrong_request_is_one_line(arguments, expected, fedinit, tmp_path):
    result = fedinit("data", *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert expected in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
