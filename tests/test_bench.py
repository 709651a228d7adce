"""`fedinit bench`: the bare loop does what RayGrid does, and every contender is in the table."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from experiments.bench.bare_loop import BareLoop, loop_leaves_out
from experiments.bench.measuring import Contender, measure
from experiments.wiring import Datasets, simulation
from fedinit.config import make_run
from fedinit.registry import add_to_path
from fedinit.simulation import Workers
from strategies.fedopt import draw_cohort
from tests.test_nothing_lost import commanded, wait_for

RUN = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:small_classifier",
    "client": {"lr": 0.1, "batch_size": 100},  # one full batch: its order does not matter
    "cohort": 4,
    "rounds": 3,
    "workers": 2,
}


def test_the_bare_loop_does_what_ray_grid_does(finals, monkeypatch):
    """The floor is no floor if it does less: the same cohorts, steps and means, the same x."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (folder,) = finals(RUN).values()
    run = make_run(RUN)
    prepared = simulation(run, Datasets())
    layout = prepared.problem.layout
    arrays = load_file(folder / "final.safetensors")
    final = torch.cat([arrays[name].reshape(-1) for name in layout.trainable])
    loop = BareLoop(run, prepared.problem, 2)
    try:
        assert torch.equal(loop.x, layout.flatten(prepared.arrays))
        for server_round in range(1, run.rounds + 1):
            loop.round(draw_cohort(run.seed, server_round, prepared.clients, run.cohort))
        assert (loop.x - layout.flatten(prepared.arrays)).abs().max() > 0.01
        assert torch.allclose(loop.x, final, rtol=0, atol=1e-6)
    finally:
        loop.close()


def test_what_the_loop_does_without_is_known():
    """What a run asks for beyond plain SGD and its mean, and nothing else of it."""
    unread = {
        "client": {"lr": 0.2, "mu": 0.1, "shuffle": False},
        "server": {"momentum": 0.5},
        "stragglers": {"epochs": [2, 3]},
        "reduce": "worker",
    }
    assert loop_leaves_out(make_run(RUN | unread | {"rounds": 7, "seed": 3})) == {}
    more = {
        "client": {"optimizer": "proximal", "mu": 0.1, "lr": 0.2, "epochs": 3},
        "server": {"optimizer": "adam"},
        "stragglers": {"fraction": 0.5},
        "strategy_args": {"extra": 2},
        "reduce": "client",
    }
    assert loop_leaves_out(make_run(RUN | more)) == {
        "client.optimizer": "proximal",
        "client.mu": 0.1,
        "server.optimizer": "adam",
        "stragglers.fraction": 0.5,
        "strategy_args": {"extra": 2},
        "reduce": "client",
    }


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"rounds": 0}, "small: rounds: bench times one at least, got 0"),
        ({"cohort": 1000}, "small: cohort: 1000 of only "),
        ({"initialization": "none.safetensors"}, "none.safetensors: no such file"),
        ({"workers": 9999}, "small: workers: 9999 workers, but there are "),
        ({"grid": {"seed": [0, 1]}}, "small: bench times one run, this file asks for 2"),
    ],
)
def test_what_cannot_be_timed_is_refused_before_anything_is(
    settings, told, fedinit, experiment, tmp_path
):
    out = tmp_path / "out"
    file = experiment(RUN | {"name": "small"} | settings)
    for files in ([file], ["w1", file]):
        result = fedinit("bench", *files, "--out", out)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        [line] = result.stderr.splitlines()
        assert told in line
    assert not out.exists()


def test_what_was_measured_is_not_overwritten(fedinit, experiment, tmp_path):
    file = experiment(RUN | {"name": "small"})
    result = fedinit("bench", file, file, "--out", tmp_path / "out")
    told = "fedinit: small: the name of two files; change it in one of them"
    assert (result.exit_code, result.stderr.splitlines()) == (2, [told])
    (tmp_path / "bench.json").write_text("{}")
    result = fedinit("bench", file, "--out", tmp_path)
    told = f"fedinit: --out {tmp_path}: holds another bench.json; name another folder"
    assert (result.exit_code, result.stderr.splitlines()) == (2, [told])
    assert (tmp_path / "bench.json").read_text() == "{}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_bench_that_is_stopped_says_what_it_has(number, experiment, tmp_path):
    """While the loops start, which a terminal's Ctrl-C reaches too."""
    out = tmp_path / "out"
    with commanded("bench", experiment(RUN | {"name": "small"}), "--out", out) as process:
        family = psutil.Process(process.pid)
        assert wait_for(process, lambda: _loops_of(family)), process.communicate()
        loops = _loops_of(family)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=120)
    assert loops
    assert (process.returncode, errors) == (130, "")
    assert said.splitlines()[-1] == "  stopped; measured: nothing"
    assert not out.exists()
    assert not any(each.is_running() for each in loops)


def _loops_of(family: psutil.Process) -> list[psutil.Process]:
    """Return the processes of the loops that have been started."""
    found = []
    for each in family.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(each.cmdline()):
                found.append(each)
    return found


def test_cpu_seconds_are_of_all_processes_and_the_driver():
    """While the driver computes for 0.3 s of CPU time, and another process for 0.2 s at least."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            other = psutil.Process(busy.pid)
            contender = Contender(updates=1, processes=[psutil.Process(), other])
            contender.timings.seconds.append([])
            since, theirs = time.process_time(), other.cpu_times().user
            contender.begin()
            while time.process_time() < since + 0.35 or other.cpu_times().user < theirs + 0.25:
                pass
            contender.end()
        finally:
            busy.kill()
    timings = contender.timings
    [[seconds]] = timings.seconds
    assert 0.3 < timings.driver_seconds <= seconds
    assert timings.driver_seconds + 0.2 < timings.cpu_seconds < timings.driver_seconds + 2 * seconds


@pytest.mark.parametrize("peer", ["pfl_research", "blazefl_threads"])
def test_a_peer_does_what_ray_grid_does(finals, monkeypatch, peer):
    """As the bare loop: what another simulator is timed at is the same work."""
    module = pytest.importorskip(f"experiments.bench.{peer}", reason="it is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (folder,) = finals(RUN).values()
    run = make_run(RUN)
    problem = simulation(run, Datasets()).problem
    assert len(module.train(run, problem)) == run.rounds
    trained = problem.model.state_dict()
    for name, value in load_file(folder / "final.safetensors").items():
        assert torch.allclose(trained[name], value, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_where_clients_train_as_one_the_same_is_timed_one_by_one(ray_started):
    """Each beside loops that take turns with it, in every repetition; short rounds have a peak."""
    here = str(Path(__file__).parent)
    add_to_path([here])
    run = make_run(RUN | {"together": 2})
    with Workers(2, import_path=[here]) as workers:
        measured = measure(run, workers, 2, note=print)
    names = ["RayGrid", "bare loop", "tuned loop", "RayGrid, one by one"]
    assert list(measured.contenders) == names
    assert measured.run.together == 2
    asked = measured.run.rounds, measured.run.evaluate_every
    assert asked == (run.rounds, run.evaluate_every)  # bench has two rounds more of its own
    loop, alone = (measured.contenders[name] for name in names[2:])
    assert measured.contenders["RayGrid"].floor is loop.floor is loop
    assert alone.floor is not loop
    for timings in measured.contenders.values():
        assert list(map(len, timings.seconds)) == [3, 3]
        assert len(timings.ratios) == 2
        assert timings.peak_bytes > 1 << 20


@pytest.mark.slow
def test_each_contender_is_timed_on_a_file_of_ones_own(fedinit, experiment, tmp_path):
    """Its modules are found by the loops, by the command that starts, and by Flower's runtime."""
    out = tmp_path / "out"
    result = fedinit(
        *("bench", experiment(RUN | {"name": "small"}), "--out", out),
        *("--repetitions", 1, "--flower"),
    )
    assert result.exit_code == 0, result.output
    found = json.loads((out / "bench.json").read_text())["work"]["small"]["contenders"]
    installed = [name for name in ("pfl", "BlazeFL") if find_spec(name.lower())]
    peers = ["Flower's runtime", *installed]
    assert list(found) == ["RayGrid", "bare loop", "tuned loop", *peers]
    assert found["RayGrid"]["start_up_seconds"] > 0
    for name, numbers in found.items():
        assert name in result.output
        assert numbers["updates_per_second"] == pytest.approx(4 / numbers["round_seconds"])
        assert all(ratio > 0 for ratio in numbers["ratios"])
    assert found["tuned loop"]["ratios"] == [1.0]
    assert len(found["RayGrid"]["seconds"][0]) == len(found["bare loop"]["seconds"][0])
