"""`fedinit tune` on a quadratic whose best rate is known, and what an experiment does with it."""

import sqlite3
from itertools import count
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import save_file

from experiments import tuning
from experiments.cli import EXPERIMENTS
from experiments.progress import Progress
from experiments.studies import STUDIES
from fedinit.config import Partition, Run, get
from fedinit.data import partitioned, with_validation
from fedinit.errors import RequestError
from fedinit.experiment_file import load_experiment
from tests.plugged_in import gaussians
from tests.test_studies import UNTRAINED

# One step of one client: x = lr b from 0, with b = 1. The test set's optimum is 1.5: whoever looked
# at it would take another rate.
QUADRATIC = {
    "name": "search",
    "dataset": "plugged_in:quadratics",
    "dataset_args": {
        "curvature": [[1.0, 1.0]],
        "optimum": [[1.0, 1.0]],
        "examples": [10],
        "test_optimum": [1.5, 1.5],
    },
    "model": "plugged_in:Point",
    "loss": "plugged_in:half_squared_error",
    "client": {"batch_size": 10},
    "cohort": 1,
    "rounds": 1,
    "evaluate_every": 1,
    "validation": 0.2,
    "workers": 1,
    "tune": {"trials": 9, "search": [{"match": {}, "set": {"client.lr": [0.5, 1.0, 1.5]}}]},
}


def rates(folder: Path) -> list[dict]:
    return yaml.safe_load((folder / "rates.yaml").read_text())["when"]


def trials(folder: Path) -> list[tuple]:
    """Every finished trial: its number, state and when it ended."""
    with sqlite3.connect(folder / "trials.db") as database:
        return database.execute(
            "select trial_id, state, datetime_complete from trials where state != 'RUNNING' "
            "order by trial_id"
        ).fetchall()


def test_the_best_rate_on_validation_examples_is_found(fedinit, experiment, ray_started, tmp_path):
    """1 reaches the clients' optimum in one step; 1.5 would reach the test set's."""
    result = fedinit("tune", experiment(QUADRATIC), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    [rule] = rates(tmp_path / "out")
    assert rule["set"] == {"client.lr": 1.0}
    assert rule["note"].startswith("validation loss 0, best of 3 of 3 combinations")
    assert "edge" not in rule["note"]
    assert len(trials(tmp_path / "out")) == 3


def test_an_experiment_reads_the_rates_of_its_arms(fedinit, experiment, ray_started, tmp_path):
    """With curvature 2 the best rate is 1/2, the lowest searched: on the edge, and said so."""
    searched = QUADRATIC | {
        "grid": {"dataset_args.curvature": [[[1.0, 1.0]], [[2.0, 2.0]]]},
        "dataset_args": QUADRATIC["dataset_args"],
    }
    file = experiment(searched)
    assert fedinit("tune", file, "--out", tmp_path / "out").exit_code == 0
    first, second = rates(tmp_path / "out")
    assert second["set"] == {"client.lr": 0.5}
    assert "client.lr 0.5 is on the edge of [0.5, 1.0, 1.5]" in second["note"]
    study = {key: value for key, value in searched.items() if key not in ("tune", "validation")}
    file.write_text(yaml.safe_dump(study | {"rules": ["out/rates.yaml"]}))
    runs = load_experiment(file).runs.values()
    assert [run.client.lr for run in runs] == [1.0, 0.5]
    assert first["match"] == {"dataset_args.curvature": [[1.0, 1.0]]}


def test_poor_trials_are_stopped_early(fedinit, experiment, ray_started, tmp_path):
    """Six rates, the higher the better, in twelve rounds: some fall behind the median at once."""
    search = [{"match": {}, "set": {"client.lr": [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]}}]
    settings = QUADRATIC | {"rounds": 12, "tune": {"search": search}}
    result = fedinit("tune", experiment(settings), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    states = [state for _, state, _ in trials(tmp_path / "out")]
    assert len(states) == 6
    assert "PRUNED" in states
    assert "stopped after round 1" in result.output
    assert rates(tmp_path / "out")[0]["set"] == {"client.lr": 0.4}


def test_no_trial_is_stopped_in_its_last_round(fedinit, experiment, ray_started, tmp_path):
    """It has paid for its score by then."""
    search = [{"match": {}, "set": {"client.lr": [0.01, 0.02, 0.05, 0.1, 0.2, 0.4]}}]
    file = experiment(QUADRATIC | {"tune": {"search": search}})
    assert fedinit("tune", file, "--out", tmp_path / "out").exit_code == 0
    assert [state for _, state, _ in trials(tmp_path / "out")] == ["COMPLETE"] * 6


def test_weights_under_search_lie_beside_the_file(fedinit, experiment, ray_started, tmp_path):
    """These are the clients' optimum."""
    save_file({"x": torch.ones(2, dtype=torch.float64)}, tmp_path / "start.safetensors")
    search = [{"match": {}, "set": {"initialization": ["random", "start.safetensors"]}}]
    settings = QUADRATIC | {"client": {"lr": 0.5, "batch_size": 10}, "tune": {"search": search}}
    assert fedinit("tune", experiment(settings), "--out", tmp_path / "out").exit_code == 0
    [rule] = rates(tmp_path / "out")
    assert rule["set"] == {"initialization": "start.safetensors"}
    assert rule["note"] == "validation loss 0, best of 2 of 2 combinations (0 stopped early)"


def test_a_search_whose_every_trial_diverges_keeps_the_files_rates(
    fedinit, experiment, ray_started, tmp_path
):
    search = [{"match": {}, "set": {"client.lr": [1e200, 1e300]}}]
    settings = QUADRATIC | {"rounds": 3, "tune": {"search": search}}
    result = fedinit("tune", experiment(settings), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    [rule] = rates(tmp_path / "out")
    assert rule["set"] == {}
    assert rule["note"] == "none of 2 trials was finite"


def test_a_trial_that_diverges_was_not_stopped(fedinit, experiment, ray_started, tmp_path):
    """Nor does the last of values in any order lie on their edge."""
    search = [{"match": {}, "set": {"client.lr": [0.5, 1e300, 1.0]}}]
    settings = QUADRATIC | {"rounds": 3, "tune": {"search": search}}
    result = fedinit("tune", experiment(settings), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "client.lr=1e+300  diverged after round" in result.output
    [rule] = rates(tmp_path / "out")
    assert rule["set"] == {"client.lr": 1.0}
    assert "best of 3 of 3 combinations (0 stopped early, 1 diverged)" in rule["note"]
    assert "edge" not in rule["note"]


def test_a_trial_that_fails_is_told_and_counted(fedinit, experiment, ray_started, tmp_path):
    """There is no model of size -1: it fails before it trains."""
    search = [{"match": {}, "set": {"model_args.size": [2, -1]}}]
    settings = QUADRATIC | {"tune": {"search": search}}
    result = fedinit("tune", experiment(settings), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "failed: RequestError" in result.output
    [rule] = rates(tmp_path / "out")
    assert "best of 2 of 2 combinations (0 stopped early, 1 failed)" in rule["note"]


def test_arms_are_told_by_weights_as_the_file_names_them(
    fedinit, experiment, ray_started, tmp_path
):
    """And each value of a proxy's own settings has a proxy."""
    save_file({"x": torch.zeros(2, dtype=torch.float64)}, tmp_path / "start.safetensors")
    search = [
        {"match": {}, "set": {"client.lr": [0.5]}},
        {"match": {"initialization": "start.safetensors"}, "set": {"client.lr": [1.0]}},
        {"match": {"initialization": "proxy"}, "set": {"proxy.lr": [0.1, 0.2]}},
    ]
    settings = QUADRATIC | {
        "grid": {"initialization": ["start.safetensors", "proxy"]},
        "proxy": {key: QUADRATIC[key] for key in ("dataset", "dataset_args")},
        "tune": {"search": search},
    }
    result = fedinit("tune", experiment(settings), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    weights, proxy = rates(tmp_path / "out")
    assert weights["set"] == {"client.lr": 1.0}
    assert "best of 2 of 2 combinations (0 stopped early)" in proxy["note"]


class Interrupting(Progress):
    """Ctrl-C after so many trials."""

    def __init__(self, after: int) -> None:
        super().__init__(Console(quiet=True), 1)
        self.left = after

    def _say(self, text: str) -> None:
        self.left -= text.startswith("  trial")
        if self.left == 0:
            raise KeyboardInterrupt


def test_a_search_goes_on_where_it_was_interrupted(fedinit, experiment, ray_started, tmp_path):
    """The trials that had finished are the same rows afterwards, and the rates are the same."""
    settings = QUADRATIC | {"grid": {"client.optimizer": ["sgd", "proximal"]}}
    file, out = experiment(settings), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        tuning.tune(load_experiment(file), out, Interrupting(after=4))
    before = trials(out)
    assert len(before) == 4
    assert len(rates(out)) == 1  # the first arm was done
    refused = fedinit("tune", file, "--out", out)
    assert refused.exit_code == 2
    assert fedinit("tune", file, "--out", out, "--resume").exit_code == 0
    after = trials(out)
    assert after[:4] == before
    assert len(after) == 6
    assert fedinit("tune", file, "--out", tmp_path / "other").exit_code == 0
    assert rates(out) == rates(tmp_path / "other")


@pytest.mark.parametrize("broken_off", [1, 2, 3])
def test_a_trial_that_is_broken_off_is_tried_again(
    broken_off, fedinit, experiment, ray_started, tmp_path, monkeypatch
):
    """Ctrl-C when it has trained and has no score yet."""
    numbers, real = count(1), tuning.train

    def interrupted(*arguments):
        trained = real(*arguments)
        if next(numbers) == broken_off:
            raise KeyboardInterrupt
        return trained

    file, out = experiment(QUADRATIC), tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tuning.tune(load_experiment(file), out, Progress(Console(quiet=True), 1))
    assert fedinit("tune", file, "--out", out, "--resume").exit_code == 0
    [rule] = rates(out)
    assert rule["set"] == {"client.lr": 1.0}
    assert rule["note"] == "validation loss 0, best of 3 of 3 combinations (0 stopped early)"


def test_the_most_workers_that_an_arm_asks_for_are_started(
    fedinit, experiment, ray_started, tmp_path
):
    file = experiment(QUADRATIC | {"grid": {"workers": [1, 999]}})
    result = fedinit("tune", file, "--out", tmp_path / "out")
    assert (result.exit_code, "999 workers, but" in result.stderr) == (2, True)


def test_another_request_does_not_resume(fedinit, experiment, ray_started, tmp_path):
    """Another number of workers is the same one."""
    out = tmp_path / "out"
    assert fedinit("tune", experiment(QUADRATIC), "--out", out).exit_code == 0
    more = ("--resume", "--set", "workers=auto")
    assert fedinit("tune", experiment(QUADRATIC), "--out", out, *more).exit_code == 0
    file = experiment(QUADRATIC | {"rounds": 2})
    result = fedinit("tune", file, "--out", out, "--resume")
    assert result.exit_code == 2
    assert "made with another request" in result.stderr


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"tune": None}, ["no `tune` section"]),
        ({"validation": 0.0}, ["validation", "fedinit tune"]),
        ({"rounds": 0}, ["rounds", "fedinit tune"]),
        ({"tune": {"trials": 0, "search": []}}, ["tune.trials", "greater than 0"]),
        ({"tune": {"trails": 3, "search": []}}, ["tune.trails", "mean 'tune.trials'?"]),
        ({"tune": {"search": []}}, ["tune.search", "no rule matches"]),
        ({"tune": {"search": [{"match": {}}]}}, ["tune.search", "match"]),
        (
            {"tune": {"search": [{"match": {}, "set": {"client.lr": 0.1}}]}},
            ["tune.search", "client.lr", "list of values"],
        ),
        (
            {"tune": {"search": [{"match": {}, "set": {"validation": [0.2, 0.0]}}]}},
            ["validation", "fedinit tune"],
        ),
        (
            {"tune": {"search": [{"match": {}, "set": {"rounds": [1, 0]}}]}},
            ["rounds", "fedinit tune"],
        ),
        (
            {"tune": {"search": [{"match": {}, "set": {"client.rate": [0.1]}}]}},
            ["unknown key 'client.rate'"],
        ),
        (
            {"tune": {"search": [{"match": {}, "set": {"client.lr": [0.1, -1]}}]}},
            ["client.lr", "greater than 0"],
        ),
    ],
)
def test_a_wrong_search_ends_in_one_line(fedinit, experiment, tmp_path, change, texts):
    result = fedinit("tune", experiment(QUADRATIC | change), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(text in result.stderr for text in texts), result.stderr
    assert not (tmp_path / "out").exists()


def test_validation_rows_are_of_every_client_and_trained_on_by_none():
    """A fifth of each client's rows, rounded down: of sizes 20, 25, ... 45: 4, 5, ... 9."""
    whole = partitioned(gaussians(), Partition(), 0)
    dealt = with_validation(whole, 0.2, 3)
    assert dealt.held_out is not None
    held = set(dealt.held_out.tolist())
    for client, rows in whole.owners.items():
        kept = set(dealt.owners[client].tolist())
        assert kept <= set(rows.tolist())
        assert set(rows.tolist()) - kept == set(rows.tolist()) & held
        assert len(rows) - len(kept) == len(rows) // 5
    assert dealt.test_size == len(held) == 4 + 5 + 6 + 7 + 8 + 9
    inputs, targets = dealt.test_batch(2, 5)
    assert inputs.equal(whole.inputs[dealt.held_out[2:5]])
    assert targets.equal(whole.targets[dealt.held_out[2:5]])
    again, other = (with_validation(whole, 0.2, seed).held_out for seed in (3, 4))
    assert again is not None
    assert (again == dealt.held_out).all()
    assert other is not None
    assert (other != dealt.held_out).any()
    with pytest.raises(RequestError, match="less than one row"):
        with_validation(whole, 0.01, 0)


def arm(run: Run) -> tuple[str, ...]:
    method = (run.client.optimizer, run.server.optimizer)
    return run.dataset, run.model, *method, run.initialization


def test_the_paper_arms_can_be_tuned_and_begin_within_the_search() -> None:
    """So a proximal client has its term, and Adam a rate that it can bear."""
    search = load_experiment(EXPERIMENTS / "tuning.yaml", preset="paper")
    settings = tuning._settings(search)
    values = {
        arm(run): tuning._arm(search, label, settings).values for label, run in search.runs.items()
    }
    for study in STUDIES.keys() - UNTRAINED:
        for run in load_experiment(EXPERIMENTS / f"{study}.yaml", preset="paper").runs.values():
            for key, found in values[arm(run)].items():
                assert min(found) <= get(run, key) <= max(found), (study, arm(run), key)
