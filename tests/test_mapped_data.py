"""A data set in files: the same rows, mapped by every process and copied by none."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fedinit.data import FederatedDataset
from fedinit.errors import RequestError
from tests.plugged_in import gaussians
from tests.test_simulation import FINAL, GAUSSIANS, numbers


def test_a_run_on_files_is_the_run_in_memory(finals, tmp_path):
    """Bit for bit; with a validation split and another partition as well."""
    gaussians().save(tmp_path / "data")
    in_files = {"dataset": "plugged_in:saved", "dataset_args": {"folder": str(tmp_path / "data")}}
    grid = [
        {"validation": [0.0]},
        {"validation": [0.2], "partition.kind": ["iid"], "partition.clients": [5]},
    ]
    in_memory = finals(GAUSSIANS | {"grid": grid}, "memory")
    mapped = finals(GAUSSIANS | in_files | {"grid": grid}, "files")
    assert len(in_memory) == 2
    for label, one in in_memory.items():
        assert numbers(one) == numbers(mapped[label])
        assert (one / FINAL).read_bytes() == (mapped[label] / FINAL).read_bytes()


def test_what_travels_is_the_path(tmp_path):
    """8,000,000 bytes of rows: a reader's copy is a map of the file, the message is small."""
    rows = torch.arange(1_000_000, dtype=torch.int64).reshape(-1, 10)
    labels = torch.zeros(len(rows), dtype=torch.int64)
    data = FederatedDataset(rows, labels, {"a": range(3), "b": range(3, 9)}, rows[:5], labels[:5])
    data.save(tmp_path / "data")
    opened = FederatedDataset.open(tmp_path / "data")
    message = pickle.dumps(opened.with_clients(opened.owners))
    assert len(message) < 10_000
    received = pickle.loads(message)  # noqa: S301 - our own
    assert torch.equal(received.inputs, rows)
    assert received.owners["b"].tolist() == [3, 4, 5, 6, 7, 8]
    assert "inputs.arrow" in Path("/proc/self/maps").read_text()


def test_a_large_column_is_written_from_its_own_file(tmp_path):
    source = np.memmap(tmp_path / "raw", np.uint8, "w+", shape=(50, 4))
    source[:] = np.arange(200).reshape(50, 4)
    labels = torch.zeros(50, dtype=torch.int64)
    rows = torch.from_numpy(source)
    FederatedDataset(rows, labels, None, rows[:1], labels[:1]).save(tmp_path / "data")
    opened = FederatedDataset.open(tmp_path / "data")
    assert opened.inputs.tolist() == source.tolist()
    assert opened.clients is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "inputs.arrow").unlink(), "inputs.arrow"),
        (
            lambda folder: (folder / "targets.arrow").write_bytes(b"\xff\xff"),
            "not a saved data set",
        ),
        (lambda folder: (folder / "dataset.json").write_text("{}"), "clients"),
        (lambda folder: (folder / "dataset.json").write_text("{"), "not a saved data set"),
    ],
)
def test_a_damaged_folder_is_one_line(damage, expected, tmp_path):
    folder = tmp_path / "data"
    gaussians().save(folder)
    with pytest.raises(RequestError, match="not empty"):
        gaussians().save(folder)
    damage(folder)
    with pytest.raises(RequestError) as refused:
        FederatedDataset.open(folder)
    assert expected in str(refused.value)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
