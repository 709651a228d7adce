"""Data sets from files: real ones where they are at hand, and small ones of the same layout."""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from fedinit.data import DATASETS
from fedinit.data.clients import Choice, held_out_clients
from fedinit.data.sources import hashed
from fedinit.errors import RequestError

REAL = Path(__file__).parents[2] / "shared" / "data"
cifar10, femnist = DATASETS["cifar10"], DATASETS["femnist"]
RNG = np.random.default_rng(0)
WRITERS = ["f01", "f02", "f02", "f03", "f03", "f03"]


def png(pixels: np.ndarray, mode: str | None = None) -> dict[str, object]:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_cifar(folder: Path, split: str, images: np.ndarray, labels: list[int]) -> Path:
    """The hub's layout."""
    path = folder / "plain_text" / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(exist_ok=True, parents=True)
    pq.write_table(pa.table({"img": [png(each) for each in images], "label": labels}), path)
    return path


def write_femnist(folder: Path, images: np.ndarray, labels: list[int]) -> Path:
    path = folder / "train-00000-of-00001.parquet"
    columns = {
        "image": [png(each) for each in images],
        "writer_id": WRITERS,
        "hsf_id": [0] * len(WRITERS),
        "character": labels,
    }
    pq.write_table(pa.table(columns), path)
    return path


def write_leaf(folder: Path, split: str, users: dict[str, tuple[list, list]]) -> Path:
    path = folder / split / f"all_data_0_{split}.json"
    path.parent.mkdir(parents=True)
    content = {
        "users": list(users),
        "num_samples": [len(y) for _, y in users.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in users.items()},
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def colour() -> np.ndarray:
    return RNG.integers(256, size=(4, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def grey() -> np.ndarray:
    return RNG.integers(256, size=(6, 28, 28), dtype=np.uint8)


def test_cifar10_in_the_hubs_layout(tmp_path, colour):
    write_cifar(tmp_path, "train", colour[:3], [3, 1, 9])
    write_cifar(tmp_path, "test", colour[3:], [0])
    data = cifar10(str(tmp_path))
    assert data.inputs.numpy().tolist() == colour[:3].transpose(0, 3, 1, 2).tolist()
    assert data.targets.tolist() == [3, 1, 9]
    assert data.test_inputs[0].numpy().tolist() == colour[3].transpose(2, 0, 1).tolist()
    assert data.clients is None


def test_a_palette_is_its_colours_and_16_bits_are_refused(tmp_path):
    few = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    few[:, 16:] = (255, 0, 51)  # one of the palette's
    for split in ("train", "test"):
        path = write_cifar(tmp_path, split, few, [1, 2])
        images = [png(each, mode="P") for each in few]
        pq.write_table(pa.table({"img": images, "label": [1, 2]}), path)
    assert torch.equal(cifar10(str(tmp_path)).inputs, torch.from_numpy(few).permute(0, 3, 1, 2))
    images = [png(np.full((32, 32), 300, dtype=np.uint16))] * 2
    pq.write_table(pa.table({"img": images, "label": [1, 2]}), path)
    with pytest.raises(RequestError, match="row 0: not an image: its pixels are"):
        cifar10(str(tmp_path))


def test_cifar10_in_its_original_layout(tmp_path, colour):
    """Rows of 3,072 bytes, red first, pickled as Python 2 did: batches by name, in their order."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = colour.transpose(0, 3, 1, 2).reshape(4, -1)
    for name, part, labels in (
        ("data_batch_1", rows[:2], [3, 1]),
        ("data_batch_2", rows[2:3], [9]),
        ("test_batch", rows[3:], [0]),
    ):
        batch = {b"data": part, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    data = cifar10(str(tmp_path))
    assert data.inputs.numpy().tolist() == colour[:3].transpose(0, 3, 1, 2).tolist()
    assert data.targets.tolist() == [3, 1, 9]
    assert data.test_targets.tolist() == [0]


def test_a_pickle_that_would_run_code_is_refused_unrun(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Attack(), b"labels": []}))
    with pytest.raises(RequestError, match=r"data_batch_1: not a batch.*it names"):
        cifar10(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(not (REAL / "cifar10-jpeg").exists(), reason="needs ../shared/data")
def test_the_real_cifar10():
    data = cifar10(str(REAL / "cifar10-jpeg"))
    assert tuple(data.inputs.shape) == (50000, 3, 32, 32)
    assert torch.bincount(data.targets).tolist() == [5000] * 10
    assert torch.bincount(data.test_targets).tolist() == [1000] * 10


def test_femnist_in_the_hubs_layout(tmp_path, grey):
    """Three writers of 1, 2 and 3 images; a share of 0.3 holds out one of them."""
    write_femnist(tmp_path, grey, [0, 5, 61, 7, 8, 9])
    data = femnist(str(tmp_path), test_share=0.3)
    assert data.num_classes == 62
    assert len(data.owners) == 2
    assert len(data.inputs) + data.test_size == 6
    known = {hashed(writer) for writer in WRITERS}
    assert set(data.owners) < known
    everything = torch.cat([data.inputs, data.test_inputs]).numpy()
    assert sorted(map(bytes, everything)) == sorted(map(bytes, grey))
    for client, rows in data.owners.items():
        writer = next(name for name in WRITERS if hashed(name) == client)
        own = [grey[place].tolist() for place, name in enumerate(WRITERS) if name == writer]
        assert [image.tolist() for image in data.inputs[rows][:, 0].numpy()] == own


def test_femnist_of_leaf_keeps_its_own_split(tmp_path, grey):
    """LEAF holds 784 numbers in [0, 1]: k / 255 is the byte k."""

    def flat(images: np.ndarray) -> list:
        return (images.reshape(len(images), -1) / 255).tolist()

    write_leaf(tmp_path, "train", {"b": (flat(grey[:2]), [1, 2]), "a": (flat(grey[2:5]), [3] * 3)})
    write_leaf(tmp_path, "test", {"a": (flat(grey[5:]), [61])})
    data = femnist(str(tmp_path))
    assert data.inputs[:, 0].numpy().tolist() == grey[:5].tolist()
    assert data.owners[hashed("b")].tolist() == [0, 1]
    assert data.owners[hashed("a")].tolist() == [2, 3, 4]
    assert data.test_inputs[0, 0].numpy().tolist() == grey[5].tolist()
    assert data.test_targets.tolist() == [61]


@pytest.mark.skipif(not (REAL / "mnist-writers").exists(), reason="needs ../shared/data")
def test_real_digits_by_real_writers():
    data = femnist(str(REAL / "mnist-writers"), test_share=0.1, min_examples=10)
    assert tuple(data.inputs.shape[1:]) == (1, 28, 28)
    assert data.owners.sizes.min() >= 10
    assert 0.05 < data.test_size / (len(data.inputs) + data.test_size) < 0.2
    capped = femnist(str(REAL / "mnist-writers"), max_clients=20, max_examples_per_client=5)
    assert len(capped.owners) == 18  # of the twenty chosen, two are held out
    assert capped.owners.sizes.max() <= 5


def test_a_choice_of_clients():
    """Sizes 1, 2, 3, 4: from 2 examples on three clients are left, of which two are drawn."""
    owners = np.repeat(["a", "b", "c", "d"], [1, 2, 3, 4])
    assert Choice(min_examples=3).rows(owners).tolist() == [3, 4, 5, 6, 7, 8, 9]
    rows = Choice(max_clients=2, min_examples=2, max_examples_per_client=1).rows(owners)
    assert len(rows) == 2
    assert len(set(owners[rows])) == 2
    assert "a" not in owners[rows]
    chosen = {tuple(Choice(max_clients=1, seed=seed).rows(owners)) for seed in range(20)}
    assert chosen == {(0,), (1, 2), (3, 4, 5), (6, 7, 8, 9)}
    with pytest.raises(RequestError, match=r"min_examples: no client has 5 examples; .* 4"):
        Choice(min_examples=5).rows(owners)
    held = held_out_clients(owners, 0.25, 0)
    assert len(set(owners[held])) == 1
    assert held.sum() == np.isin(owners, owners[held]).sum()


def damaged_cifar(folder: Path, colour: np.ndarray) -> Path:
    path = write_cifar(folder, "train", colour[:3], [3, 1, 9])
    write_cifar(folder, "test", colour[3:], [0])
    return path


@pytest.mark.parametrize("damage", ["truncated", "column", "image", "shape", "label", "split"])
def test_a_damaged_parquet_is_one_line_that_names_it(tmp_path, colour, damage):
    path = damaged_cifar(tmp_path, colour)
    images = [png(each) for each in colour[:3]]
    labels: list[int | None] = [3, 1, 9]
    expected = "row 1"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
        expected = "Parquet"
    elif damage == "column":
        pq.write_table(pa.table({"picture": images, "label": labels}), path)
        expected = "img"
    elif damage == "image":
        images[1] = {"bytes": b"not a picture", "path": None}
    elif damage == "shape":
        images[1] = png(colour[1][:16])
    elif damage == "label":
        labels[1], expected = None, "integer label"
    if damage in ("image", "shape", "label"):
        pq.write_table(pa.table({"img": images, "label": labels}), path)
    if damage == "split":
        path.unlink()
        expected = "holds no train-*.parquet"
    with pytest.raises(RequestError) as refused:
        cifar10(str(tmp_path))
    text = str(refused.value)
    assert expected in text
    assert "\n" not in text
    assert damage == "split" or path.name in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"users": ["a", "b"]}, "no x and y of users[1]"),
        ({"user_data": {"a": {"x": [], "y": []}}}, "users[0] has no examples"),
        ({"user_data": {"a": {"x": [[0.0] * 784], "y": [1, 2]}}}, "has 1 x and 2 y"),
        ({"user_data": {"a": {"x": [[0.0] * 7], "y": [1]}}}, "reshape"),
        ({"user_data": {"a": {"x": [[255.0] * 784], "y": [1]}}}, "a pixel outside [0, 1]"),
        ({"user_data": {"a": {"x": [[0.0] * 784], "y": [3.7]}}}, "a label that is no whole number"),
        ({"user_data": 3}, "expected LEAF's keys"),
        ({"users": []}, "users: expected names"),
        ({"users": [["a"]]}, "users: expected names"),
        ({"users": ["a", "a"]}, "users: one is listed twice"),
    ],
)
def test_a_damaged_leaf_file_is_one_line_that_names_it(tmp_path, change, expected):
    path = write_leaf(tmp_path, "train", {"a": ([[0.0] * 784], [1])})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RequestError) as refused:
        femnist(str(tmp_path))
    assert expected in str(refused.value)
    assert str(tmp_path) in str(refused.value)


def test_an_image_of_nobody_is_refused(tmp_path, grey):
    """It would be a writer's named None."""
    path = write_femnist(tmp_path, grey, [0, 5, 61, 7, 8, 9])
    table = pq.read_table(path)
    writers = pa.array([*WRITERS[:-2], None, None])
    at = table.column_names.index("writer_id")
    pq.write_table(table.set_column(at, "writer_id", writers), path)
    with pytest.raises(RequestError, match=f"{path.name}: writer_id is empty in 2 rows"):
        femnist(str(tmp_path))


def test_without_the_network_it_is_said_which_file_goes_where():
    with pytest.raises(RequestError, match=r"train-\*\.parquet.*dataset_args\.data_dir") as refused:
        cifar10()
    assert "\n" not in str(refused.value)
