"""The paper's presets run: two rounds on small parts of real data that stand in for the paper's.

Published weights are stood in for by files of their names and layouts: what is tested is that each
data set, model and initialization of a preset goes together, from the experiment file to the
sentence.
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torchvision import models
from torchvision.models import ResNet18_Weights, SqueezeNet1_0_Weights
from transformers import GPT2Config, GPT2LMHeadModel

from experiments.cli import EXPERIMENTS
from experiments.progress import Progress
from experiments.running import run_experiment
from experiments.studies import STUDIES, find
from fedinit.data.stack_exchange import read_posts
from fedinit.experiment_file import Experiment, load_experiment, with_settings
from tests.test_language import TINY, learn_tokenizer
from tests.test_text_sources import REAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data"),
]
SMALL = {
    "rounds": 2,
    "cohort": 2,
    "evaluate_every": 1,
    "workers": 2,
    "client.batch_size": 8,
    "memory_format": "contiguous",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, dict]:
    """Arguments for each of the paper's data sets."""
    root = tmp_path_factory.mktemp("data")
    cifar = root / "cifar10"
    cifar.mkdir()
    for split, rows in (("train", 200), ("test", 16)):
        (path,) = (REAL / "cifar10-jpeg" / "plain_text").glob(f"{split}-*.parquet")
        pq.write_table(pq.read_table(path).slice(0, rows), cifar / path.name)
    posts = read_posts(REAL / "stackexchange-beer" / "Posts.xml")
    reddit, wikitext = root / "reddit", root / "wikitext"
    reddit.mkdir()
    wikitext.mkdir()
    comments = {"author": posts.owners[:400].tolist(), "body": posts.texts[:400]}
    pq.write_table(pa.table(comments), reddit / "RC_2009-01.parquet")
    (wikitext / "wiki.txt").write_text("\n".join(posts.texts[400:430]), encoding="utf-8")
    texts = {"max_clients": 8, "max_examples_per_client": 6, "max_test_examples": 8, "length": 12}
    learn_tokenizer(root / "tokenizer")
    texts |= {"vocabulary": 300, "tokenizer": str(root / "tokenizer")}
    writers = {"max_clients": 10, "max_examples_per_client": 8}
    return {
        "cifar10": {"data_dir": str(cifar)},
        "femnist": {"data_dir": str(REAL / "mnist-writers"), **writers},
        "stackoverflow": {"data_dir": str(REAL / "stackexchange-beer"), **texts},
        "reddit": {"data_dir": str(reddit), **texts},
        "wikitext": {"data_dir": str(wikitext), "length": 12, "vocabulary": 300},
    }


@pytest.fixture
def published(tmp_path, monkeypatch) -> None:
    """Weights where torchvision and the hub keep them when they have been downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoints = tmp_path / "torch" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    for model, weights in (
        (models.squeezenet1_0(), SqueezeNet1_0_Weights.IMAGENET1K_V1),
        (models.resnet18(), ResNet18_Weights.IMAGENET1K_V1),
    ):
        torch.save(model.state_dict(), checkpoints / Path(weights.url).name)
    repository = tmp_path / "hub" / "models--distilbert--distilgpt2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    (repository / "snapshots" / "0123").mkdir(parents=True)
    config = GPT2Config(vocab_size=400, n_layer=2, n_head=2, n_embd=16, n_positions=32)
    weights = GPT2LMHeadModel(config).state_dict()
    del weights["lm_head.weight"]  # tied: the file holds it once
    save_file(weights, repository / "snapshots" / "0123" / "model.safetensors")


@pytest.mark.parametrize("study", list(STUDIES))
def test_a_paper_preset_runs(study, stand_ins, published, ray_started, tmp_path):
    """With the first of its methods; a ranking needs two.

    Convergence with every data set, model and initialization, the others with one data set of
    images and one of texts: what they have beside it is what they measure.
    """
    paper = load_experiment(EXPERIMENTS / f"{study}.yaml", preset="paper")
    runs, seen = {}, set()
    for label, run in paper.runs.items():
        method = run.server.optimizer if study == "ranking" else None
        arm = (run.dataset, run.model, run.initialization, run.partition.kind, method)
        if run.seed or arm in seen or method == "adam":
            continue
        if study != "convergence" and run.dataset not in ("cifar10", "stackoverflow"):
            continue
        seen.add(arm)
        arguments = {f"dataset_args.{key}": value for key, value in stand_ins[run.dataset].items()}
        small = SMALL | {"rounds": min(run.rounds, 2)} | arguments
        if run.model == "distilgpt2":
            small["model_args"] = TINY
        if run.model == "charlm":
            small |= {"proxy.dataset_args": stand_ins["wikitext"], "proxy.epochs": 1}
        if run.measure.hessian:
            small["measure.hessian"] = 2
        runs[label] = with_settings(run, small)
    experiment = Experiment(
        name=paper.name, folder=paper.folder, varied=paper.varied, runs=runs, study=study
    )
    progress = Progress(Console(quiet=True), len(runs))
    summary = run_experiment(experiment, tmp_path / "out", progress)
    assert [row["error"] for row in summary["runs"]] == [None] * len(runs)
    assert {row["status"] for row in summary["runs"]} == {"done"}
    found = find(tmp_path / "out", summary)
    assert found is not None
    assert found.drawing.csv.count("\n") > 1
