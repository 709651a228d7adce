"""Mistakes in one's own modules end in one line that says what was expected, and where it is."""

import pytest

RUN = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:batch_norm_classifier",
    "cohort": 6,
    "rounds": 1,
    "workers": 1,
}


def test_a_mistake_in_ones_own_code_is_told_with_its_line(fedinit, experiment, tmp_path):
    """The last line that is one's own, though torch or Python raised further down."""
    text = (
        "import torch\n"
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(3, num_classes)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"  # line 8: there are 8 inputs
    )
    (tmp_path / "own_model.py").write_text(text)
    (tmp_path / "own_import.py").write_text("import json\n\nimport nowhere_at_all\n")
    for model, line in (("own_model:Model", 8), ("own_import:Model", 3)):
        result = fedinit("run", experiment(RUN | {"model": model}))
        assert result.exit_code == 2
        [told] = result.stderr.splitlines()
        assert told.endswith(f"{model.partition(':')[0]}.py:{line})")


def test_a_module_that_exits_when_it_is_imported(refused, tmp_path):
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    line = refused(RUN | {"model": "script:Model"})
    assert "model: cannot import 'script:Model': SystemExit: 0" in line
    assert line.endswith("script.py:2)")


@pytest.mark.parametrize("returned", ["{'logits': scores}", "(scores, x)"])
def test_a_model_that_returns_no_scores(returned, refused, tmp_path):
    text = (
        "from torch import nn\n"
        "class Model(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(8, num_classes)\n"
        "    def forward(self, x):\n"
        "        scores = self.layer(x)\n"
        f"        return {returned}\n"
    )
    name = f"own_{'dict' if 'logits' in returned else 'tuple'}"
    (tmp_path / f"{name}.py").write_text(text)
    line = refused(RUN | {"model": f"{name}:Model"})
    kind = name.removeprefix("own_")
    expected = f"'{name}:Model' returned a {kind}, loss 'cross-entropy' takes a torch.Tensor"
    assert expected in line


def test_a_model_of_classes_where_the_targets_are_none(refused):
    points = {"curvature": [[1.0]], "optimum": [[0.0]], "examples": [2]}
    line = refused(RUN | {"dataset": "plugged_in:quadratics", "dataset_args": points, "cohort": 1})
    assert "'num_classes'" in line
    assert "targets of 'plugged_in:quadratics' are torch.float64, labels are integers" in line


def test_a_model_that_is_built_lazily(refused, tmp_path):
    text = "from torch import nn\ndef model(num_classes):\n    return nn.LazyLinear(num_classes)\n"
    (tmp_path / "own_lazy.py").write_text(text)
    assert "model: 'weight' has no shape" in refused(RUN | {"model": "own_lazy:model"})


def test_a_model_that_fails_for_another_reason(refused, tmp_path):
    text = "def model(num_classes):\n    return {}['num_classes']\n"
    (tmp_path / "own_keys.py").write_text(text)
    line = refused(RUN | {"model": "own_keys:model"})
    assert "KeyError: 'num_classes'" in line
    assert line.endswith("own_keys.py:2)")


@pytest.mark.parametrize(("size", "alone"), [(19, True), (1, True), (20, False), (18, False)])
def test_batch_normalisation_of_single_rows(size, alone, fedinit, experiment):
    """Clients of 20 rows: batches of 19 leave one of them alone, batches of 18 leave two."""
    file = experiment(RUN | {"client": {"batch_size": size}})
    result = fedinit("run", file, "--dry-run")
    assert result.exit_code == (2 if alone else 0), result.output
    if alone:
        expected = f"client.batch_size: {size} leaves client 'c0' a last batch of one row"
        assert expected in result.stderr
        assert "'plugged_in:batch_norm_classifier'" in result.stderr
        skipping = fedinit("run", file, "--dry-run", "--set", "on_client_error=skip")
        assert skipping.exit_code == 0, skipping.output


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ("nn.GroupNorm(4, 4)", "Expected more than 1 value per channel"),
        (
            "nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2), nn.Flatten(), Second()",
            "IndexError: index 1 is out of bounds",
        ),
    ],
)
def test_other_models_that_fail_on_a_single_row(layers, told, refused, tmp_path):
    text = (
        "from torch import nn\n"
        "class Second(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x + x[1]\n"
        "def model(num_classes):\n"
        f"    return nn.Sequential(nn.Linear(8, 4), {layers}, nn.Linear(4, num_classes))\n"
    )
    name = f"single_{len(layers)}"
    (tmp_path / f"{name}.py").write_text(text)
    settings = {"model": f"{name}:model", "client": {"batch_size": 19}, "trainable": "all"}
    line = refused(RUN | settings)
    assert "client.batch_size: 19 leaves client 'c0' a last batch of one row" in line
    assert told in line


def test_a_single_row_that_is_never_drawn(fedinit, experiment):
    """No round, no draw; of Flower's strategies nobody knows whom they draw."""
    file = experiment(RUN | {"client": {"batch_size": 19}, "rounds": 0})
    assert fedinit("run", file, "--dry-run").exit_code == 0
    flowers = "strategy=flwr.serverapp.strategy:FedAvg"
    assert fedinit("run", file, "--dry-run", "--set", flowers).exit_code == 2
