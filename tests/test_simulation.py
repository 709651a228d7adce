"""The same numbers whoever does the work; Flower's own strategies and a user's."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from experiments.resuming import as_begun
from fedinit.device import threads_for
from fedinit.experiment_file import load_experiment
from fedinit.randomness import seed_all
from fedinit.results import RunFolder

GAUSSIANS = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:dropout_classifier",
    "client": {"lr": 0.1, "epochs": 2, "batch_size": 8},
    "stragglers": {"fraction": 0.5, "epochs": [2, 4]},
    "cohort": 4,
    "rounds": 4,
    "evaluate_every": 2,
    "workers": 2,
}
# Clients of 1 and 3 rows, losses x^2 / 2 and 3 (x - 2)^2 / 2.
POINT = {
    "dataset": "plugged_in:quadratics",
    "dataset_args": {"curvature": [[1], [3]], "optimum": [[0], [2]], "examples": [1, 3]},
    "model": "plugged_in:Point",
    "model_args": {"size": 1},
    "loss": "plugged_in:half_squared_error",
    "client": {"lr": 0.1, "batch_size": 1},
    "cohort": 2,
    "rounds": 2,
}
FINAL = "final.safetensors"


def numbers(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "wall_seconds"} for line in lines]


def difference(first: Path, second: Path) -> float:
    a, b = (load_file(each / FINAL) for each in (first, second))
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def test_the_same_seed_gives_the_same_bits(finals):
    """Twice with 2 workers: bit-identical. With 1 and 3: the same cohorts, weights to 1e-5."""
    settings = GAUSSIANS | {"server": {"optimizer": "adam", "lr": 0.1}}
    clients = {"client.optimizer": ["sgd", "mimelite"]}
    two = finals(settings | {"grid": clients}, "two")
    others = finals(settings | {"grid": clients | {"workers": [2, 1, 3]}}, "others")
    assert len(two) == 2
    for label, one in two.items():
        again = others[f"{label},workers=2"]
        assert (one / FINAL).read_bytes() == (again / FINAL).read_bytes()
        assert numbers(one) == numbers(again)
        for workers in (1, 3):
            other = others[f"{label},workers={workers}"]
            assert difference(one, other) < 1e-5
            for ours, theirs in zip(numbers(one), numbers(other), strict=True):
                assert ours.get("examples") == theirs.get("examples")
                assert ours == pytest.approx(theirs, abs=1e-5, nan_ok=True)


def test_seeding_torch_is_torchs_own_seeding():
    with torch.random.fork_rng(devices=[]):
        seed_all(2**62 + 1)
        ours = torch.rand(3)
        torch.manual_seed(2**62 + 1)
        assert torch.equal(ours, torch.rand(3))


def test_short_vectors_get_one_thread_and_others_get_theirs_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with threads_for(1000):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with threads_for(10_000_000):
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), threads_for(1000):
            _ = 1 / 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_another_seed_gives_another_run(finals):
    runs = finals(GAUSSIANS | {"grid": {"seed": [0, 1]}})
    first, second = runs.values()
    assert [x.get("examples") for x in numbers(first)] != [
        x.get("examples") for x in numbers(second)
    ]


def test_arms_of_a_pair_meet_the_same_clients(finals):
    """Cohorts depend on seed and round alone: every arm sees the same examples each round."""
    arms = finals(
        GAUSSIANS | {"grid": {"server.optimizer": ["sgd", "adam"], "client.lr": [0.1, 0.2]}}
    )
    seen = {tuple(line.get("examples", 0) for line in numbers(each)) for each in arms.values()}
    assert len(arms) == 4
    assert len(seen) == 1
    assert len(set(seen.pop())) > 2


def test_a_client_by_client_reduction_equals_the_workers(finals):
    """`reduce: client` sends every reply to the strategy; the mean is the same."""
    runs = finals(GAUSSIANS | {"grid": {"reduce": ["worker", "client"]}})
    assert difference(*runs.values()) < 1e-6
    for one, other in zip(*map(numbers, runs.values()), strict=True):
        assert one == pytest.approx(other, abs=1e-6, nan_ok=True)


def test_flowers_own_strategies_and_a_users(finals):
    """FedAvg equals FedOpt with sgd; its reduction may be done in the workers; the others run.

    HalfStep goes half of FedAvg's way: with one round, x + (FedAvg's x' - x) / 2.
    """
    names = [
        "fedopt",
        *(f"flwr.serverapp.strategy:{name}" for name in ("FedAvg", "FedMedian", "Krum")),
    ]
    full = GAUSSIANS | {"cohort": 6, "server": {"lr": 1.0}}
    runs = finals(
        full | {"grid": {"strategy": [*names, "plugged_in_strategies:HalfStep"]}, "rounds": 1}
    )
    ours, average, median, krum, half = (
        runs[f"strategy={name}"]
        for name in (
            "fedopt",
            *(n.replace(":", "_") for n in names[1:]),
            "plugged_in_strategies_HalfStep",
        )
    )
    assert difference(ours, average) < 1e-6
    for other in (median, krum, half):
        assert difference(ours, other) > 1e-4
        assert numbers(other)[1]["cohort_size"] == 6
        assert numbers(other)[1]["gradient_diversity"] == pytest.approx(
            numbers(ours)[1]["gradient_diversity"], abs=1e-6
        )
    (reduced,) = finals(
        full | {"strategy": names[1], "reduce": "worker", "rounds": 1}, "reduced"
    ).values()
    assert difference(average, reduced) < 1e-6
    (start,) = finals(full | {"client": {"lr": 1e-30}, "rounds": 1}, "start").values()
    x, whole, halfway = (load_file(each / "final.safetensors") for each in (start, average, half))
    for name in x:
        assert halfway[name] == pytest.approx((x[name] + whole[name]) / 2, abs=1e-6)


def test_the_cohort_of_flowers_strategies_is_the_runs(finals):
    strategies = ["flwr.serverapp.strategy:FedAvg", "plugged_in_strategies:Handing"]
    for run in finals(GAUSSIANS | {"cohort": 3, "grid": {"strategy": strategies}}).values():
        assert [line.get("cohort_size") for line in numbers(run)] == [None, 3, 3, 3, 3]


def test_what_a_strategy_says_of_a_round_is_recorded(finals):
    """What it adds to its clients' means; and its clients' evaluation, at the round's x.

    One step of each client at rate 0.1: from 0 to 0 and 0.6, so to x = 0.45; from there to 0.405
    and 0.915, so to x = 0.7875.
    """
    telling = {"strategy": "plugged_in_strategies:Telling"}
    settings = {"strategy_args": {"fraction_evaluate": 1.0}, "client": {"lr": 0.1, "batch_size": 4}}
    (run,) = finals(POINT | telling | settings).values()
    start, *lines = numbers(run)
    assert not {"strategy", "client_evaluation"} & set(start)
    assert [line["strategy"] for line in lines] == [
        {"square": 1, "sides": [1, None], "train-loss": 9},
        {"square": 4, "sides": [1, None], "train-loss": 9},
    ]
    for line, x in zip(lines, (0.45, 0.7875), strict=True):
        loss = (x**2 / 2 + 3 * 3 * (x - 2) ** 2 / 2) / 4
        assert line["client_evaluation"] == pytest.approx({"loss": loss})


def test_a_server_optimizer_never_touches_buffers(finals):
    """Float buffers take the weighted mean, integer ones are copied, whatever the server optimizer.

    One client of n rows in ceil(n / 8) batches, two epochs: num_batches_tracked counts them. With
    one client in the cohort the running variance is that client's, the same under sgd and adam.
    """
    run = GAUSSIANS | {
        "model": "plugged_in:batch_norm_classifier",
        "cohort": 1,
        "rounds": 1,
        "stragglers": {"fraction": 0.0},
        "grid": {"server.optimizer": ["sgd", "adam"]},
    }
    runs = finals(run).values()
    sgd, adam = (load_file(each / FINAL) for each in runs)
    (examples,) = {line["examples"] for each in runs for line in numbers(each)[1:]}
    for weights in (sgd, adam):
        assert weights["1.num_batches_tracked"] == 2 * -(-examples // 8)
        assert weights["1.running_var"].min() > 0
    assert torch.equal(sgd["1.running_var"], adam["1.running_var"])
    assert not torch.equal(sgd["0.weight"], adam["0.weight"])


def test_training_the_head_alone(finals):
    runs = finals(GAUSSIANS | {"grid": {"trainable": ["all", "head"], "client.lr": [0.1, 1e-30]}})
    whole, head, fresh = (
        load_file(runs[f"trainable={name},client.lr={rate}"] / FINAL)
        for name, rate in (("all", 0.1), ("head", 0.1), ("all", 1e-30))
    )
    assert torch.equal(head["0.weight"], fresh["0.weight"])
    assert not torch.equal(head["3.weight"], fresh["3.weight"])
    assert not torch.equal(whole["0.weight"], fresh["0.weight"])


def test_a_head_may_be_a_single_parameter(finals):
    settings = GAUSSIANS | {"model": "plugged_in:Scaled", "trainable": "head"}
    runs = finals(settings | {"grid": {"rounds": [0, 4]}})
    fresh, end = (load_file(runs[f"rounds={number}"] / FINAL) for number in (0, 4))
    assert end["scale"] != 1
    assert torch.equal(end["body.weight"], fresh["body.weight"])


def test_runs_that_are_resumed_take_what_was_measured_of_their_like(tmp_path):
    """Of the other initialization, but neither of another batch size nor what is set by hand."""
    run = {"dataset": "mine:data", "model": "mine:net"}
    grid = [
        {"initialization": ["random", "pretrained"]},
        {"client.batch_size": [7]},
        {"memory_format": ["contiguous"]},
    ]
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(run | {"grid": grid}))
    experiment = load_experiment(tmp_path / "pair.yaml")
    first, *others = experiment.runs
    settled = {"memory_format": "channels_last", "together": 8}
    RunFolder(tmp_path / first).begin(experiment.runs[first].model_copy(update=settled), {})
    begun = as_begun(experiment, tmp_path)
    assert [(begun[each].memory_format, begun[each].together) for each in (first, *others)] == [
        ("channels_last", 8),
        ("channels_last", 8),
        ("auto", "auto"),
        ("contiguous", "auto"),
    ]


def test_resume_repeats_nothing_that_is_done(fedinit, experiment, ray_started, tmp_path):
    file, out = experiment(GAUSSIANS | {"grid": {"seed": [0, 1]}}), tmp_path / "out"
    assert fedinit("run", file, "--out", out).exit_code == 0
    kept = out / "seed=0" / "final.safetensors"
    kept_time, kept_bytes = kept.stat().st_mtime_ns, kept.read_bytes()
    lost = out / "seed=1" / "final.safetensors"
    lost_bytes = lost.read_bytes()
    lost.unlink()
    assert fedinit("run", file, "--out", out, "--resume").exit_code == 0
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == (kept_time, kept_bytes)
    assert lost.read_bytes() == lost_bytes
    changed = fedinit("run", file, "--out", out, "--resume", "--set", "client.lr=0.3")
    assert (changed.exit_code, "other settings" in changed.stderr) == (2, True)


def test_a_run_that_diverges_fails_and_the_others_go_on(fedinit, experiment, ray_started, tmp_path):
    file = experiment(GAUSSIANS | {"grid": {"client.lr": [1e30, 0.1]}})
    result = fedinit("run", file, "--out", tmp_path / "out")
    assert result.exit_code == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [row["status"] for row in summary["runs"]] == ["diverged", "done"]
    assert "not finite in round" in summary["runs"][0]["error"]
    assert (tmp_path / "out" / "report.html").exists()
