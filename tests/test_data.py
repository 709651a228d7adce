"""Embedded data, partitions, and what a data set checks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedinit.config import Partition
from fedinit.data import (
    DATASETS,
    ClientRows,
    FederatedDataset,
    partitioned,
    with_validation,
)
from fedinit.errors import RequestError


def labelled(rows: int, classes: int = 10) -> FederatedDataset:
    targets = torch.arange(rows) % classes
    return FederatedDataset(torch.zeros(rows, 1), targets, None, torch.zeros(1, 1), targets[:1])


def check_dealt(dataset: FederatedDataset) -> None:
    """Every row is given once and no client is empty."""
    assert sorted(dataset.owners.rows.tolist()) == list(range(len(dataset)))
    assert dataset.owners.sizes.min() >= 1


@settings(max_examples=60, deadline=None)
@given(
    alpha=st.floats(min_value=5e-324, max_value=1e308),
    rows=st.integers(20, 300),
    clients=st.integers(1, 20),
    classes=st.integers(1, 12),
    seed=st.integers(0, 2**32),
)
def test_dirichlet_never_fails(alpha, rows, clients, classes, seed):
    partition = Partition(kind="dirichlet", alpha=alpha, clients=clients)
    dealt = partitioned(labelled(rows, classes), partition, seed)
    check_dealt(dealt)
    assert len(dealt.owners) == clients
    assert np.ptp(dealt.owners.sizes) <= 1


def test_alpha_sets_the_skew():
    """alpha -> 0: one label for each client while labels last; alpha -> infinity: all alike."""

    def labels_of(alpha: float) -> list[np.ndarray]:
        partition = Partition(kind="dirichlet", alpha=alpha, clients=50)
        dealt = partitioned(labelled(5000), partition, 3)
        return [np.bincount(dealt.targets[dealt.owners.at(k)], minlength=10) for k in range(50)]

    pure = np.mean([counts.max() == 100 for counts in labels_of(1e-9)])
    assert pure > 0.7  # a client whose label ran out in mid-draw has two or more
    even = labels_of(1e9)
    # the first clients draw from full labels: 100 draws of 10 equal labels have deviation 3
    assert np.abs(np.array(even[:25]) - 10).max() <= 15
    # proportions q ~ Dir(0.1, ..., 0.1): E sum q^2 = (1 + a) / (1 + K a) = 1.1 / 2
    shares = np.array(labels_of(0.1)[:15]) / 100
    assert (shares**2).sum(1).mean() == pytest.approx(0.55, abs=0.15)


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_rows_that_no_client_owns_are_dealt_to_none(kind):
    """A test set may lie among the rows, as README's own example has it."""
    rows, labels = torch.zeros(20, 1), torch.arange(20) % 2
    clients = {"a": range(3, 9), "b": range(7, 13)}
    data = FederatedDataset(rows, labels, clients, rows[15:], labels[15:])
    dealt = partitioned(data, Partition(kind=kind, clients=4), 0)
    assert sorted(dealt.owners.rows.tolist()) == list(range(3, 13))
    assert data.owned.tolist() == list(range(3, 13))
    with pytest.raises(RequestError, match="11 clients cannot share 10 rows"):
        partitioned(data, Partition(kind=kind, clients=11), 0)


def test_a_row_of_two_clients_is_held_out_of_both():
    rows = torch.zeros(40, 1)
    both = {"a": range(30), "b": range(10, 40)}
    held = with_validation(FederatedDataset(rows, rows, both, rows, rows), 0.2, seed=0)
    assert held.held_out is not None
    assert not set(held.held_out) & set(held.owners.rows)
    assert sorted({*held.held_out, *held.owners.rows}) == list(range(40))
    assert 6 <= len(held.held_out) <= 12  # of each client's 30 rows 6


def test_clients_of_the_same_rows_hold_out_the_same():
    rows = torch.zeros(100, 1)
    clients = {str(client): range(100) for client in range(10)}
    held = with_validation(FederatedDataset(rows, rows, clients, rows, rows), 0.2, seed=0)
    assert held.held_out is not None
    assert len(held.held_out) == 20
    assert held.owners.sizes.tolist() == [80] * 10
    clients = {"all": range(100)} | {str(row): [row] for row in range(100)}
    with pytest.raises(RequestError, match=r"validation: a share of 0\.2 leaves client"):
        with_validation(FederatedDataset(rows, rows, clients, rows, rows), 0.2, seed=0)


@pytest.mark.parametrize(("share", "held"), [(0.29, 29), (0.57, 57), (0.005, 0)])
def test_a_share_is_counted_as_it_is_written(share, held):
    """0.29 * 100 is 28.999999999999996 in binary."""
    rows = torch.zeros(101, 1)
    clients = {"a": range(100), "b": range(100, 101)}
    data = FederatedDataset(rows, rows, clients, rows, rows)
    if held:
        found = with_validation(data, share, seed=0).held_out
        assert found is not None
        assert len(found) == held
    else:
        with pytest.raises(RequestError, match="less than one row"):
            with_validation(data, share, seed=0)


def test_partitions_are_keyed_by_the_seed():
    data = labelled(200)
    for kind in ("iid", "dirichlet"):
        partition = Partition(kind=kind, clients=7)
        one, again, other = (partitioned(data, partition, seed).owners.rows for seed in (1, 1, 2))
        assert np.array_equal(one, again)
        assert not np.array_equal(one, other)
        check_dealt(partitioned(data, partition, 1))


def test_natural_clients_keep_their_rows():
    owners = ClientRows.by_owner(["b", "a", "b", "c", "a"])
    assert {client: rows.tolist() for client, rows in owners.items()} == {
        "a": [1, 4],
        "b": [0, 2],
        "c": [3],
    }
    assert ClientRows.of({"b": [0, 2], "a": [1, 4], "c": [3]}).rows.tolist() == owners.rows.tolist()


def test_a_dataset_checks_its_clients():
    x = torch.zeros(3, 1)
    y = torch.zeros(3, dtype=torch.long)
    with pytest.raises(RequestError, match="3 rows with 2 targets"):
        FederatedDataset(x, y[:2], None, x, y)
    with pytest.raises(RequestError, match="client 'b' has no rows"):
        FederatedDataset(x, y, {"a": [0, 1, 2], "b": []}, x, y)
    with pytest.raises(RequestError, match=r"must lie in 0\.\.2, got 0\.\.3"):
        FederatedDataset(x, y, {"a": [0, 3]}, x, y)
    with pytest.raises(RequestError, match="test set is empty"):
        FederatedDataset(x, y, None, x[:0], y[:0])
    for mask in ([True, False, True], [0.0, 2.0], [[0, 1], [1, 2]]):
        with pytest.raises(RequestError, match=r"client 'b' has .* expected row numbers"):
            FederatedDataset(x, y, {"a": [0], "b": mask}, x, y)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", ["inputs", "targets", "test_inputs", "test_targets"])
def test_a_number_that_is_not_finite_is_named(column, number, tmp_path):
    columns = {
        "inputs": torch.zeros(3, 2, 2),
        "targets": torch.zeros(3),
        "test_inputs": torch.zeros(2, 2, 2),
        "test_targets": torch.zeros(2),
    }
    FederatedDataset(clients=None, **columns).save(tmp_path / "whole")
    columns[column].view(-1)[-1] = number
    damaged = FederatedDataset(clients=None, **columns)
    told = f"dataset: {column}, row {len(columns[column]) - 1}: a number is not finite"
    with pytest.raises(RequestError, match=told):
        damaged.save(tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_what_a_model_reads():
    """uint8 inputs are read as floats in [0, 1], other integers as int64, floats as they are."""
    images = torch.tensor([[0], [51], [255]], dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2], dtype=torch.int16)
    data = FederatedDataset(images, labels, {"a": [2, 1]}, images, labels.byte())
    assert data.test_batch(1, 3)[1].tolist() == [1, 2]
    inputs, targets = data.batch(data.owners["a"])
    assert inputs.tolist() == [[1.0], [pytest.approx(0.2)]]
    assert targets.dtype == torch.int64
    assert targets.tolist() == [2, 1]
    assert data.num_classes == 3


def test_fashion_mnist():
    data = DATASETS["fashion-mnist"]()
    assert data.inputs.shape == (6000, 1, 28, 28)
    assert data.test_inputs.shape == (1000, 1, 28, 28)
    assert np.bincount(data.targets).tolist() == [600] * 10
    assert np.bincount(data.test_targets).tolist() == [100] * 10
    inputs, _ = data.batch(np.arange(10))
    assert 0 <= inputs.min() < inputs.max() <= 1


def test_shakespeare():
    data = DATASETS["shakespeare"](examples_per_client=50, test_examples=100)
    assert len(data.owners) == 422 - 42
    assert data.owners.sizes.tolist() == [50] * 380
    assert data.test_inputs.shape == (100, 40)
    assert data.num_classes == 465
    rows = data.owners["hamlet/HAMLET"] if "hamlet/HAMLET" in data.owners else data.owners.at(0)
    inputs, targets = data.batch(rows)
    assert inputs.shape == (50, 40)
    # the first window of a speech holds nothing but padding and the start mark; no later one does
    assert inputs[0, :39].sum() == 0
    assert (targets > 0).float().mean() > 0.99  # characters outside the vocabulary are rare
    # consecutive windows of one speech overlap: with every window kept, each shifts by one
    dense = DATASETS["shakespeare"](examples_per_client=10**6, test_roles=421, test_examples=10)
    inputs, targets = dense.batch(dense.owners.at(0)[:30])
    assert torch.equal(inputs[1:, :-1], inputs[:-1, 1:])
    assert torch.equal(inputs[1:, -1], targets[:-1])
    with pytest.raises(RequestError, match=r"dataset_args\.window"):
        DATASETS["shakespeare"](window=0)


def test_a_label_below_zero_cannot_be_dealt_by_label():
    targets = torch.tensor([0, -100, 1])
    data = FederatedDataset(torch.zeros(3, 1), targets, None, torch.zeros(1, 1), targets[:1])
    with pytest.raises(RequestError, match=r"dirichlet: a label is -100"):
        partitioned(data, Partition(kind="dirichlet", clients=2), 0)
