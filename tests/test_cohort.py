"""The sums over a cohort's updates: their mean and measures, in one process and travelled."""

import copy
import gc

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedinit.cohort import CohortSums, Trained
from fedinit.parameters import Array, Layout
from fedinit.partial_sums import inner_product


def layout() -> Layout:
    return Layout({"w": (3,)}, ("w",))


def test_measurements_of_known_updates():
    """Identical, orthogonal, opposite and zero updates, and one client, by hand."""

    def sums(*updates: list[float]) -> CohortSums:
        total = CohortSums(layout())
        for update in updates:
            arrays = ArrayRecord()
            arrays["w"] = Array(-np.array(update))
            reply = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
            total.add(torch.zeros(3, dtype=torch.float64), reply)
        return total

    same = sums([1, 2, 2], [1, 2, 2], [1, 2, 2])
    assert same.gradient_diversity() == pytest.approx(1 / 3)
    assert same.mean_pairwise_cosine() == pytest.approx(1)
    orthogonal = sums([3, 0, 0], [0, 4, 0])
    assert orthogonal.gradient_diversity() == pytest.approx(1)
    assert orthogonal.mean_pairwise_cosine() == pytest.approx(0)
    opposite = sums([1, 0, 0], [-1, 0, 0])
    assert opposite.gradient_diversity() == np.inf
    assert opposite.mean_pairwise_cosine() == pytest.approx(-1)
    with_zero = sums([1, 0, 0], [0, 0, 0], [0, 2, 0])
    assert with_zero.gradient_diversity() == pytest.approx(1)
    assert with_zero.mean_pairwise_cosine() == pytest.approx(0)
    assert sums([1, 1, 1]).gradient_diversity() == pytest.approx(1)
    assert np.isnan(sums([1, 1, 1]).mean_pairwise_cosine())
    assert np.isnan(sums([0, 0, 0]).gradient_diversity())
    merged = sums([3, 0, 0])
    merged.merge(sums([0, 4, 0]))
    assert merged.gradient_diversity() == orthogonal.gradient_diversity()
    assert merged.mean_update().tolist() == [1.5, 2, 0]


def test_alignment_is_the_same_however_a_cohort_is_reduced():
    """One share, three shares, client by client: nine unequal updates of unequal examples."""
    rng = np.random.default_rng(0)
    updates = rng.normal(size=(9, 3)) + 0.5
    examples = rng.integers(1, 50, size=9)

    def share(clients: range) -> CohortSums:
        total = CohortSums(layout())
        for client in clients:
            arrays = ArrayRecord()
            arrays["w"] = Array(-updates[client])
            metrics = MetricRecord({"num-examples": int(examples[client])})
            total.add(
                torch.zeros(3, dtype=torch.float64),
                RecordDict({"arrays": arrays, "metrics": metrics}),
            )
        return total

    norms = np.linalg.norm(updates, axis=1)
    units = updates / norms[:, None]
    cosines = (units @ units.T)[~np.eye(9, dtype=bool)]
    for shares in (
        [range(9)],
        [range(2), range(2, 7), range(7, 9)],
        [range(k, k + 1) for k in range(9)],
    ):
        first, *others = map(share, shares)
        for other in others:
            first.merge(other)
        expected = (norms**2).sum() / (updates.sum(0) ** 2).sum()
        assert first.gradient_diversity() == pytest.approx(expected, abs=1e-6)
        assert first.mean_pairwise_cosine() == pytest.approx(cosines.mean(), abs=1e-6)
        mean = examples @ updates / examples.sum()
        assert first.mean_update().numpy() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize("size", [1_000, 150_000])
@pytest.mark.parametrize(("dtype", "digits"), [(np.float64, 1e-13), (np.float32, 1e-6)])
def test_sums_keep_the_digits_of_the_updates(size, dtype, digits):
    """Short vectors and long ones, forty clients alike, then a large one at rest, and unequal ones.

    They are added up in groups of 32; examples differ from the second group on. Of float32 updates
    a group's sum is within 32 roundings, 32 * 6e-8, of its terms' magnitudes.
    """
    rng = np.random.default_rng(0)
    examples = np.array([7] * 40 + [1_000_000] + list(range(1, 40)))
    updates = rng.normal(size=(80, size)).astype(dtype)
    updates[40] = 0
    layout = Layout.of(torch.nn.Linear(size, 1, bias=False))
    start = torch.zeros(size, dtype=getattr(torch, np.dtype(dtype).name))
    sums, other = CohortSums(layout), CohortSums(layout)
    for client in range(80):  # two that take turns keep to themselves
        trained = Trained(
            torch.from_numpy(-updates[client]), {"num-examples": int(examples[client])}, {}, {}
        )
        sums.add_trained(start, trained)
        other.add_trained(start, trained._replace(weights=torch.full_like(start, client)))
    exact = updates.astype(np.float64)
    mean = examples @ exact / examples.sum()
    magnitudes = examples @ np.abs(exact) / examples.sum()
    for found in (sums.mean_update().numpy(), sums.pseudo_gradient().numpy()):
        assert (np.abs(found - mean) / magnitudes).max() < digits
    assert sums.update_norm() == pytest.approx(np.linalg.norm(mean), rel=digits)
    norms = np.linalg.norm(exact, axis=1)
    diversity = (norms**2).sum() / (exact.sum(0) ** 2).sum()
    assert sums.gradient_diversity() == pytest.approx(diversity, rel=digits)
    units = np.delete(exact / np.where(norms, norms, 1)[:, None], 40, axis=0)
    cosines = (units @ units.T)[~np.eye(79, dtype=bool)]
    assert sums.mean_pairwise_cosine() == pytest.approx(cosines.mean(), abs=digits)
    assert other.mean_update().numpy() == pytest.approx(-(examples @ range(80)) / examples.sum())


def float32_sums(updates: np.ndarray, alignment: bool = True) -> CohortSums:
    """Sums over clients of one example each."""
    sums = CohortSums(Layout.of(torch.nn.Linear(updates.shape[1], 1, bias=False)), alignment)
    for update in updates.astype(np.float32):
        trained = Trained(torch.from_numpy(-update), {"num-examples": 1}, {}, {})
        sums.add_trained(torch.zeros(len(update)), trained)
    return sums


def test_groups_of_updates_are_added_up_in_float64():
    """32 times 2^20, 1/32 and -2^20: float32 has no 2^25 + 1, of which 1 is left."""
    mean = float32_sums(np.repeat([[2.0**20], [2.0**-5], [-(2.0**20)]], 32, axis=0)).mean_update()
    assert mean.tolist() == [1 / 96]


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_updates_whose_squares_float32_cannot_hold(scale):
    """D_1 = (3, 0), D_2 = (0, 4), times a scale: ||D|| = 2.5, orthogonal; D with itself: 1."""
    sums = float32_sums(np.array([[3, 0], [0, 4]]) * scale)
    assert sums.update_norm() == pytest.approx(2.5 * scale)
    assert sums.gradient_diversity() == pytest.approx(1)
    assert sums.mean_pairwise_cosine() == pytest.approx(0, abs=1e-6)
    mean = sums.pseudo_gradient()
    assert inner_product(mean, mean) == pytest.approx((2.5 * scale) ** 2)


def test_float32_updates_that_are_equal_or_cancel():
    """The cosine of equal vectors is 1 and no more; three times u and -u leave last digits."""
    u = np.random.default_rng(0).normal(size=(1, 5_000))
    assert 1 - 1e-6 < float32_sums(u.repeat(7, axis=0)).mean_pairwise_cosine() <= 1
    cancelling = float32_sums(np.concatenate([u.repeat(3, axis=0), -u.repeat(3, axis=0)]))
    assert cancelling.gradient_diversity() == np.inf
    assert cancelling.mean_pairwise_cosine() == pytest.approx((6 - 9) / 15, abs=1e-6)


def test_float32_updates_that_nearly_cancel():
    """1 and -1 + 2^-20 leave 2^-20, exact in float32: Q / ||S||^2 is 2^41, less 1 in 2^20."""
    sums = float32_sums(np.array([[1.0], [2.0**-20 - 1]]))
    assert sums.gradient_diversity() == pytest.approx(2.0**41, rel=1e-5)
    assert sums.clients == 2


def test_a_modules_own_setting_does_not_take_digits_away():
    """On a processor that can, products of medium precision have 8 bits."""
    updates = np.random.default_rng(0).normal(size=(32, 100_000))
    torch.set_float32_matmul_precision("medium")
    try:
        mean = float32_sums(updates).mean_update().numpy()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert mean == pytest.approx(updates.mean(0), abs=1e-6)


@pytest.mark.parametrize("first", [True, False])
def test_parts_of_which_one_has_no_directions_are_read_together(first):
    total = float32_sums(np.array([[3.0, 0]]), alignment=first)
    total.merge(float32_sums(np.array([[0.0, 4]]), alignment=not first))
    assert total.pseudo_gradient().tolist() == [1.5, 2]
    assert total.update_norm() == pytest.approx(2.5)


@pytest.mark.parametrize("size", [1000, 150_000, 1_200_000])
@pytest.mark.parametrize("examples", [[1_000_000, 1, 5, 5], [7, 7, 7, 7]])
def test_sums_that_travelled_are_exact_to_the_updates_own_digits(size, examples):
    """Two shares, of clients alike, or one of them of a million examples and of one.

    The mean is then the first client's, nearly. The second one's update is large: its weight is not
    to be taken from the first's.
    """
    rng = np.random.default_rng(0)
    updates = (rng.normal(size=(4, size)) * [[1], [1e3], [2], [3]]).astype(np.float32)
    examples = np.array(examples)
    layout = Layout.of(torch.nn.Linear(size, 1, bias=False))
    start, total = torch.zeros(size), CohortSums(layout)
    for clients in ((0, 1), (2, 3)):
        share = CohortSums(layout)
        for client in clients:
            metrics = {"num-examples": int(examples[client])}
            share.add_trained(start, Trained(torch.from_numpy(-updates[client]), metrics, {}, {}))
        total.merge(copy.deepcopy(share))
    exact = updates.astype(np.float64)
    mean = examples @ exact / examples.sum()
    assert np.abs(total.mean_update().numpy() - mean).max() < 1e-6 * np.abs(mean).max()
    assert total.pseudo_gradient().dtype == torch.float32
    assert np.abs(total.pseudo_gradient().numpy() - mean).max() < 1e-6 * np.abs(mean).max()
    assert total.update_norm() == pytest.approx(np.linalg.norm(mean), rel=1e-7)
    norms = np.linalg.norm(exact, axis=1)
    diversity = (norms**2).sum() / (exact.sum(0) ** 2).sum()
    assert total.gradient_diversity() == pytest.approx(diversity, rel=1e-7)
    units = exact / norms[:, None]
    cosines = (units @ units.T)[~np.eye(4, dtype=bool)]
    assert total.mean_pairwise_cosine() == pytest.approx(cosines.mean(), abs=1e-8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", [5, 300_000])  # in one block, and in several
def test_groups_of_clients_go_through_the_sums_together(size, dtype):
    """Groups of 6, of 33, which there is no room for at once, one alone, 5, as NumPy sums them."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=(45, size)).astype(dtype)
    examples = rng.integers(1, 9, size=45)
    start = torch.from_numpy(np.ones(size, dtype))
    sums = CohortSums(Layout.of(torch.nn.Linear(size, 1, bias=False)))
    clients = [
        Trained(torch.from_numpy(row), {"num-examples": int(count), "loss": float(count)}, {}, {})
        for row, count in zip(y, examples, strict=True)
    ]
    for first, last in ((0, 6), (6, 39), (39, 40), (40, 45)):
        sums.add_trained(start, *clients[first:last])
    updates = 1.0 - y.astype(np.float64)
    mean = examples @ updates / examples.sum()
    assert (sums.clients, sums.examples) == (45, examples.sum())
    assert sums.mean_metrics()["loss"] == pytest.approx((examples**2).sum() / examples.sum())
    assert np.abs(sums.mean_update().numpy() - mean).max() < 1e-6
    norms = np.linalg.norm(updates, axis=1)
    diversity = (norms**2).sum() / (updates.sum(0) ** 2).sum()
    assert sums.gradient_diversity() == pytest.approx(diversity, rel=1e-6)
    units = (updates / norms[:, None]).sum(0)
    cosine = ((units**2).sum() - 45) / (45 * 44)
    assert sums.mean_pairwise_cosine() == pytest.approx(cosine, abs=1e-7)


def test_what_was_found_is_read_anew_once_a_share_is_added():
    """One client's (3, 0, 0), asked for its measures, then another's (0, 4, 0)."""

    def share(*update: float) -> CohortSums:
        sums = CohortSums(layout())
        weights = -torch.tensor(update, dtype=torch.float64)
        start = torch.zeros(3, dtype=torch.float64)
        sums.add_trained(start, Trained(weights, {"num-examples": 1}, {}, {}))
        return copy.deepcopy(sums)  # as pickling does, it asks what travels

    total = CohortSums(layout())
    total.merge(share(3, 0, 0))
    assert total.pseudo_gradient().tolist() == [3, 0, 0]
    assert total.pseudo_gradient() is total.pseudo_gradient()  # read once
    total.merge(share(0, 4, 0))
    assert total.pseudo_gradient().tolist() == [1.5, 2, 0]
    assert total.update_norm() == pytest.approx(2.5)
    assert total.gradient_diversity() == pytest.approx(1)

    first, second = share(3, 0, 0), share(0, 4, 0)
    one, other = CohortSums(layout()), CohortSums(layout())
    for sums, parts in ((one, (first, second)), (other, (second, first))):
        for part in parts:
            sums.merge(part)
    assert one.pseudo_gradient().tolist() == [1.5, 2, 0]
    assert other.pseudo_gradient() is one.pseudo_gradient()  # a strategy and who records the round
    del one, other, second, sums, parts, part
    gc.collect()
    assert first.pseudo_gradient().tolist() == [3, 0, 0]


def test_updates_with_a_local_norm_are_averaged_by_it_and_measured_as_they_are():
    """D = (2, 6) with a = (2, 6), one example each: tau_eff = 4, D / a = 1, so the mean is 4.

    Diversity is of D itself: (4 + 36) / 8^2. A share's reply says the same as its clients.
    """

    def reply(update: float, norm: float) -> RecordDict:
        arrays = ArrayRecord()
        arrays["w"] = Array(np.full(3, -update))
        return RecordDict(
            {
                "arrays": arrays,
                "metrics": MetricRecord({"num-examples": 1, "local-norm": norm}),
            }
        )

    start = torch.zeros(3, dtype=torch.float64)
    both, first, second = (CohortSums(layout()) for _ in range(3))
    for sums, (update, norm) in ((both, (2, 2)), (both, (6, 6)), (first, (2, 2)), (second, (6, 6))):
        sums.add(start, reply(update, norm))
    assert both.mean_update().tolist() == pytest.approx([4] * 3)
    assert both.gradient_diversity() == pytest.approx(40 / 64)
    x = layout().record(start, {})
    replies = CohortSums(layout(), alignment=False)
    replies.add(start, both.reply(x, torch.float64))
    assert replies.mean_update().tolist() == pytest.approx([4] * 3)
    first.merge(second)
    assert first.mean_update().tolist() == pytest.approx([4] * 3)
