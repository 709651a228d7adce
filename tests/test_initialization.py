"""Models, and the weights that a run starts from."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models as torchvision_models

from experiments.wiring import Datasets, simulation
from fedinit.assets import asset
from fedinit.config import make_run
from fedinit.errors import RequestError
from fedinit.initialization import Weights, load
from fedinit.models import MODELS
from fedinit.parameters import ArrayRecord, Layout

FASHION = {
    "dataset": "fashion-mnist",
    "partition": {"kind": "iid", "clients": 10},
    "model": "squeezenet1_1",
}
SHAKESPEARE = {
    "dataset": "shakespeare",
    "dataset_args": {"examples_per_client": 2, "test_examples": 500},
    "model": "charrnn",
}


@pytest.fixture(scope="module")
def datasets() -> Datasets:
    return Datasets()


def weights(datasets: Datasets, **settings) -> dict[str, torch.Tensor]:
    prepared = simulation(make_run(settings), datasets)
    return prepared.problem.layout.named(prepared.arrays)


def test_both_arms_of_a_pair_have_the_same_fresh_head(datasets):
    random = weights(datasets, **FASHION, seed=3)
    pretrained = weights(datasets, **FASHION, seed=3, initialization="pretrained")
    another = weights(datasets, **FASHION, seed=4, initialization="pretrained")
    shipped = load_file(asset("squeezenet1_1-imagenet.fp16.safetensors"))
    for name in random:
        if name.startswith("classifier.1."):
            assert torch.equal(random[name], pretrained[name])
        else:
            assert torch.equal(pretrained[name], shipped[name].float())
            assert not torch.equal(random[name], pretrained[name])
    assert not torch.equal(pretrained["classifier.1.weight"], another["classifier.1.weight"])


def test_what_was_loaded_is_recorded(datasets):
    run = make_run(FASHION | {"initialization": "pretrained"})
    record = simulation(run, datasets).initialization
    assert record.source == "pretrained (squeezenet1_1-imagenet.fp16.safetensors)"
    assert len(record.loaded) == 50
    assert record.fresh == ["classifier.1.weight", "classifier.1.bias"]
    assert record.unused == ["classifier.1.bias", "classifier.1.weight"]
    assert str(record).endswith(
        "50 arrays loaded, 2 fresh (classifier.1.weight, classifier.1.bias), 2 unused"
    )


def test_a_head_that_fits_is_loaded_too(datasets):
    """The label space of shakespeare is the character model's own: nothing is fresh."""
    prepared = simulation(make_run(SHAKESPEARE | {"initialization": "pretrained"}), datasets)
    assert prepared.initialization.fresh == []
    assert len(prepared.initialization.loaded) == 12


def test_imagenets_head_means_imagenets_labels(datasets):
    """Of 1,000 other labels it fits the shape alone; of data that are ImageNet's it is loaded."""
    own = {"dataset": "tests.plugged_in:one_image", "cohort": 1, "model": "squeezenet1_1"}
    birds = {"shape": [3, 32, 32], "classes": 1000}
    for labels, fresh in (
        ("birds", ["classifier.1.weight", "classifier.1.bias"]),
        ("imagenet", []),
    ):
        args = {"dataset_args": birds | {"labels": labels}, "initialization": "pretrained"}
        found = simulation(make_run(own | args), datasets).initialization
        assert found.fresh == fresh
        assert ("its labels imagenet and not birds" in str(found)) == bool(fresh)


def test_the_head_of_a_run_fits_its_own_labels(finals, datasets):
    """Other data with as many classes have a fresh head; of one's own, `labels` says which."""
    (run,) = finals(FASHION | {"model": "cnn", "rounds": 0, "cohort": 1}).values()
    again = {"model": "cnn", "cohort": 1, "initialization": str(run / "final.safetensors")}
    ten = {"shape": [1, 28, 28], "classes": 10}
    for own, fresh in ((ten, ["9.weight", "9.bias"]), (ten | {"labels": "fashion-mnist"}, [])):
        run = make_run(again | {"dataset": "tests.plugged_in:one_image", "dataset_args": own})
        assert simulation(run, datasets).initialization.fresh == fresh
    assert simulation(make_run(FASHION | again), datasets).initialization.fresh == []


def test_pretrained_characters_know_english(datasets):
    """Far better than chance on Shakespeare before any training: under 3 bits, not log2 465."""
    prepared = simulation(make_run(SHAKESPEARE | {"initialization": "pretrained"}), datasets)
    problem = prepared.problem
    with torch.no_grad():
        inputs, targets = problem.dataset.test_batch(0, 500)
        bits = float(problem.loss(problem.model.eval()(inputs), targets).mean()) / 0.6931
    assert bits < 3.2


def test_a_file_gives_the_weights_it_holds(datasets, tmp_path):
    start = weights(datasets, **FASHION, seed=9)
    save_file(start, tmp_path / "w.safetensors")
    loaded = weights(datasets, **FASHION, seed=0, initialization=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(start[name], loaded[name]) for name in start)


def test_torchvisions_checkpoint_by_path(datasets, tmp_path, monkeypatch):
    """A checkpoint in torch hub's folder is found; BatchNorm's statistics have no place.

    The file is a real ResNet-18 checkpoint in its layout, from the network with BatchNorm.
    """
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    original = torchvision_models.resnet18().state_dict()
    torch.save(original, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    run = make_run(FASHION | {"model": "resnet18", "initialization": "pretrained"})
    prepared = simulation(run, datasets)
    state = prepared.problem.model.state_dict()
    assert torch.equal(state["layer1.0.conv1.weight"], original["layer1.0.conv1.weight"])
    assert prepared.initialization.fresh == ["fc.weight", "fc.bias"]
    assert "bn1.running_var" in prepared.initialization.unused
    assert not any(isinstance(each, nn.BatchNorm2d) for each in prepared.problem.model.modules())
    assert sum(isinstance(each, nn.GroupNorm) for each in prepared.problem.model.modules()) == 20


def test_a_checkpoint_that_cannot_be_had_says_where_to_put_it(datasets, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*_args, **_kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    run = make_run(FASHION | {"model": "squeezenet1_0", "initialization": "pretrained"})
    with pytest.raises(RequestError, match=r"put that file at .*squeezenet1_0-b66bff10\.pth"):
        simulation(run, datasets)


def test_every_model_is_built_for_the_data(datasets):
    """Shapes of the scores, and the parameters: the CNN's by hand, the others as published."""
    by_hand = (25 * 16 + 16) + (25 * 16 * 32 + 32) + (7 * 7 * 32 * 64 + 64) + (64 * 10 + 10)
    counts = {"cnn": by_hand, "squeezenet1_0": 740_554, "resnet18": 11_181_642}
    for name, parameters in counts.items():
        prepared = simulation(make_run(FASHION | {"model": name}), datasets)
        inputs, _ = prepared.problem.dataset.test_batch(0, 2)
        assert prepared.problem.model(inputs).shape == (2, 10)
        counted = sum(each.numel() for each in prepared.problem.model.parameters())
        assert counted == parameters, name


def test_grey_and_small_images_become_imagenet_input():
    """A constant image c stays (c - mean) / std in every channel, and 28 pixels become 32."""
    network = MODELS["squeezenet1_1"].build(num_classes=10)
    seen = []
    network.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()(torch.full((1, 1, 28, 28), 0.5))
    assert seen[0].shape == (1, 3, 32, 32)
    network(torch.full((1, 1, 28, 200), 0.5))
    assert seen[1].shape == (1, 3, 32, 200)
    expected = [
        (0.5 - mean) / std for mean, std in ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    ]
    assert seen[0][0, :, 7, 7].tolist() == pytest.approx(expected, abs=1e-6)


def test_a_head_fits_as_a_whole_or_not_at_all(tmp_path):
    """A bias of the right size beside a weight of the wrong one stays fresh."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    own = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value + 1 for name, value in own.items()} | {"1.weight": torch.ones(4, 9)}
    save_file(given, tmp_path / "w.safetensors")
    record = load(model, Weights.of(tmp_path / "w.safetensors"), "1")
    assert record.loaded == ["0.weight", "0.bias"]
    assert record.fresh == ["1.weight", "1.bias"]
    assert torch.equal(model[1].bias, own["1.bias"])
    assert torch.equal(model[0].bias, given["0.bias"])


def test_records_travel_as_flower_expects():
    """Encoded bytes are Flower's; an entry that is changed is the one that is read."""
    model = nn.Linear(2, 1)
    layout = Layout.of(model)
    record = layout.record_of(model)
    plain = ArrayRecord(model.state_dict())
    assert {name: array.data for name, array in record.items()} == {
        name: array.data for name, array in plain.items()
    }
    assert record.object_id == plain.object_id
    flat = layout.flatten(record)
    assert flat.data_ptr() == record.flat.data_ptr()
    record["weight"] = type(record["weight"])((model.weight.detach() * 2).numpy())
    assert record.flat is None
    assert torch.equal(layout.flatten(record)[:2], model.weight.detach().reshape(-1) * 2)


class Tied(nn.Module):
    """An embedding whose weights are the output layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


@pytest.mark.parametrize("names", [["embedding.weight"], ["embedding.weight", "output.weight"]])
def test_tied_weights_are_read_as_they_are_written(tmp_path, names):
    """A tied parameter is written once; a file of another tool may hold it under both names."""
    values = torch.arange(15.0).reshape(5, 3)
    save_file({name: values.clone() for name in names}, tmp_path / "tied.safetensors")
    model = Tied()
    load(model, Weights.of(tmp_path / "tied.safetensors"), None)
    assert torch.equal(model.output.weight, values)
    assert model.output.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("weights", "texts"),
    [
        ({"0.weight": torch.full((3, 2), torch.nan)}, ["'0.weight' is not finite"]),
        ({"module.0.weight": torch.ones(3, 2)}, ["'0.weight' is missing", "module.0.weight ..."]),
        ({"0.weight": torch.ones(4, 2)}, ["(4, 2)", "an attribute `head`"]),
        (
            {"0.weight": torch.ones(3, 2), "attn.bias": torch.ones(3)},  # a layer's, and no mask
            ["the model has no 'attn.bias'"],
        ),
    ],
)
def test_weights_that_do_not_fit_say_what_would(weights, texts, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    with pytest.raises(RequestError) as refused:
        load(model, Weights.of(tmp_path / "w.safetensors"), None)
    assert all(text in str(refused.value) for text in texts), refused.value
