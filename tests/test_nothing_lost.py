"""Real processes that are killed, stopped, run twice or run out of disk: nothing written is lost.

FEDINIT_KILLS is the number of kills (3), FEDINIT_SOAK_ROUNDS the length of the soak (300).
"""

import ctypes
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from experiments.proxies import lock_of
from experiments.resuming import results_folder
from experiments.running import execute
from experiments.wiring import Datasets, simulation
from fedinit.config import make_run
from fedinit.locking import locked
from fedinit.results import RunFolder, read_summary
from fedinit.simulation import Workers

HERE = Path(__file__).parent
KILLS = int(os.environ.get("FEDINIT_KILLS", "3"))
SOAK_ROUNDS = int(os.environ.get("FEDINIT_SOAK_ROUNDS", "300"))
SWEEP = {
    "dataset": "plugged_in:gaussians",
    "model": "plugged_in:dropout_classifier",
    "client": {"lr": 0.02, "batch_size": 8},
    "server": {"lr": 0.02},
    "cohort": 3,
    "rounds": 40 * KILLS,
    "evaluate_every": 7,
    "checkpoint_every": 3,
    "measure": {"distance": True},
    "workers": 2,
    "grid": {"server.optimizer": ["adam", "momentum"]},
}
SLOW = SWEEP | {"model": "plugged_in:slow_classifier", "rounds": 6, "evaluate_every": 4}
RUNS = ["server.optimizer=adam", "server.optimizer=momentum"]


def outcome(out: Path) -> dict[str, object]:
    """What the runs of a sweep leave, but for the seconds they took."""
    found: dict[str, object] = {}
    for run in RUNS:
        folder = out / run
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        found[f"{run} rounds"] = [line | {"wall_seconds": 0} for line in lines]
        found |= {
            f"{run} {path.relative_to(folder)}": path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != "rounds.jsonl"
        }
    return found


def lines_written(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/rounds.jsonl"))


def running(file: Path, out: Path):
    """A `fedinit run --resume`, as `commanded`."""
    return commanded("run", file, "--out", out, "--resume")


@contextmanager
def commanded(*arguments: object):
    """A `fedinit` in a session of its own; whatever is left of it ends with this."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from experiments.cli import app; app()", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started at once, as a machine that dies does."""
    family = []
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        family = [*parent.children(recursive=True), parent]
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def wait_for(process: subprocess.Popen, reached) -> bool:
    """Wait until something is reached, or the process has ended; return whether it was."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if reached():
            return True
        time.sleep(0.002)
    return False


@pytest.fixture(scope="module")
def outcomes() -> dict[str, dict[str, object]]:
    """Outcomes of sweeps that nothing happened to, by their settings."""
    return {}


@pytest.fixture
def whole(fedinit, experiment, ray_started, tmp_path, outcomes):
    """Carry out a sweep that nothing happens to, once; return its file and its outcome."""

    def run(settings: dict) -> tuple[Path, dict[str, object]]:
        file = experiment(settings)
        if (key := str(settings)) not in outcomes:
            result = fedinit("run", file, "--out", tmp_path / "whole")
            assert result.exit_code == 0, result.output
            outcomes[key] = outcome(tmp_path / "whole")
        return file, outcomes[key]

    return run


def test_kills_at_random_moments(whole, fedinit, tmp_path):
    """kill -9 of the driver and its Ray, again and again; each time --resume goes on.

    Most moments lie within the rounds, with their checkpoints; every fifth anywhere from the start.
    """
    file, expected = whole(SWEEP)
    seed = time.time_ns()
    draw = random.Random(seed)
    kills = failed = attempt = 0
    while kills < KILLS:
        out = tmp_path / f"killed-{attempt}"
        attempt += 1
        finished = False
        while not finished and kills < KILLS:
            with running(file, out) as process:
                before = lines_written(out)
                if kills % 5 != 4:
                    wait_for(process, lambda n=before, at=out: lines_written(at) > n)
                    time.sleep(draw.uniform(0, 0.6))
                else:
                    time.sleep(draw.uniform(0, 10))
                finished = process.poll() is not None
            kills += not finished
            if lines_written(out):
                assert [row["run"] for row in read_summary(out)["runs"]] == RUNS
        result = fedinit("run", file, "--out", out, "--resume")
        failed += result.exit_code != 0 or outcome(out) != expected
    print(f"kills: {kills}, failed: {failed}")
    assert failed == 0, f"seed {seed}"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_one_signal_finishes_the_round_and_reports(number, whole, fedinit, tmp_path):
    file, expected = whole(SLOW)
    out = tmp_path / "stopped"
    with running(file, out) as process:
        assert wait_for(process, lambda: lines_written(out) >= 2), process.communicate()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does: Ray's processes get it too
        else:
            process.send_signal(number)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert f"stopped; --out {out} --resume goes on" in said
    statuses = [row["status"] for row in read_summary(out)["runs"]]
    assert statuses == ["unfinished", "unfinished"]
    assert "2 unfinished" in (out / "report.html").read_text()
    done = lines_written(out) - 1
    newest = RunFolder(out / RUNS[0]).checkpoints[0]
    assert newest.name == f"round-{done:06d}.safetensors"
    if number == signal.SIGTERM:
        return  # the rest is the same
    again = fedinit("run", file, "--out", out, "--resume")
    assert f"goes on after round {done}" in again.output
    assert outcome(out) == expected


def test_two_signals_stop_at_once(experiment, tmp_path):
    """A round of two minutes is not waited for."""
    slow = {"model_args": {"seconds": 60.0}, "client": {"lr": 0.02, "batch_size": 100}}
    out = tmp_path / "stopped"
    with running(experiment(SLOW | slow), out) as process:
        assert wait_for(process, lambda: lines_written(out) >= 1), process.communicate()
        time.sleep(0.5)
        since = time.monotonic()
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert time.monotonic() - since < 60
    assert f"stopped; --out {out} --resume goes on" in said
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert [line["round"] for line in RunFolder(out / RUNS[0]).rounds] == [0]
    assert [row["status"] for row in read_summary(out)["runs"]] == ["unfinished", "unfinished"]


def test_a_second_process_is_refused(fedinit, experiment, tmp_path):
    search = [{"match": {}, "set": {"client.lr": [0.1]}}]
    file = experiment(SWEEP | {"tune": {"search": search}, "validation": 0.5})
    out = tmp_path / "out"
    with results_folder(out):
        for command in ("run", "tune"):
            result = fedinit(command, file, "--out", out)
            assert result.exit_code == 2, result.output
            line = f"fedinit: --out {out}: another fedinit is at work there"
            assert result.stderr.splitlines() == [line]


def test_of_two_processes_one_trains_a_proxy(fedinit, experiment, tmp_path, monkeypatch):
    """The other one waits, and then finds it trained."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    proxy = {"dataset": "plugged_in:gaussians", "epochs": 1}
    file = experiment(
        {key: value for key, value in SWEEP.items() if key != "grid"}
        | {"initialization": "proxy", "proxy": proxy}
    )
    with ThreadPoolExecutor(1) as threads:
        trained = fedinit("pretrain", file)
        assert trained.exit_code == 0, trained.output
        path = Path(trained.stdout.splitlines()[-1])
        weights = path.read_bytes()
        path.unlink()
        with locked(lock_of(path), lambda: pytest.fail("the lock was left behind")):
            waiting = threads.submit(fedinit, "pretrain", file)
            time.sleep(1)
            assert not waiting.done()
            path.write_bytes(weights)
        result = waiting.result(timeout=60)
    assert "another fedinit does it; waiting" in result.stdout
    assert result.stdout.splitlines()[-1] == str(path)
    assert path.read_bytes() == weights


def test_a_changed_setting_is_named(fedinit, experiment, ray_started, tmp_path):
    """Of two settings of the first run the one is named; how it is carried out may change."""
    file, out = experiment(SWEEP | {"rounds": 1}), tmp_path / "out"
    assert fedinit("run", file, "--out", out).exit_code == 0
    changed = fedinit("run", file, "--out", out, "--resume", "--set", "client.lr=0.3")
    assert changed.exit_code == 2
    assert changed.stderr.splitlines() == [
        f"fedinit: --resume: {out / RUNS[0] / 'run.yaml'} was made with other settings: "
        "client.lr was 0.02, now 0.3; name another --out"
    ]
    same = fedinit("run", file, "--out", out, "--resume", "--set", "checkpoint_every=1")
    assert same.exit_code == 0, same.output
    before = outcome(out)
    other = fedinit("run", file, "--out", out, "--resume", "--set", "server.optimizer=adam")
    assert other.exit_code == 2
    assert f"holds another experiment's runs, '{RUNS[0]}' ...; name another --out" in other.stderr
    assert outcome(out) == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(path).encode(), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield path
    libc.umount2(str(path).encode(), 2)  # MNT_DETACH


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - left)
    return filler


def test_a_full_disk_in_mid_run(whole, fedinit, small_disk):
    """One line, status 1; the rounds until then are whole, and with room again they go on."""
    file, expected = whole(SWEEP)
    filler = fill(small_disk, 20 * 4096)
    out = small_disk / "out"
    result = fedinit("run", file, "--out", out)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"fedinit: cannot write {out / RUNS[0]}")
    assert "No space left on device" in line
    assert [line["round"] for line in RunFolder(out / RUNS[0]).rounds][:2] == [0, 1]
    filler.unlink()
    again = fedinit("run", file, "--out", out, "--resume")
    assert again.exit_code == 0, again.output
    assert "goes on after round" in again.output
    assert outcome(out) == expected


def test_a_disk_that_is_full_from_the_start(fedinit, experiment, ray_started, small_disk):
    fill(small_disk, 0)
    out = small_disk / "out"
    result = fedinit("run", experiment(SWEEP), "--out", out)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert f"{out}" in line
    assert "No space left on device" in line
    assert not out.exists()


def test_a_folder_that_cannot_be_made(fedinit, experiment):
    result = fedinit("run", experiment(SWEEP), "--out", "/proc/nowhere/out")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "fedinit: --out /proc/nowhere/out: No such file or directory"
    ]


def family() -> tuple[int, int]:
    """Memory (proportional set size, bytes) and open files of this process and all its children."""
    parent = psutil.Process()
    memory = files = 0
    for each in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            memory += each.memory_full_info().pss
            files += each.num_fds()
    return memory, files


@pytest.mark.slow
def test_a_long_run_grows_in_nothing(ray_started, tmp_path, monkeypatch):
    """At the end memory and open files are within 5% of those after a tenth of the rounds."""
    monkeypatch.syspath_prepend(HERE)
    settings = {key: value for key, value in SWEEP.items() if key not in ("grid", "measure")}
    run = make_run(settings | {"rounds": SOAK_ROUNDS, "checkpoint_every": 10})
    datasets, found = Datasets(), []
    with Workers(2, import_path=[str(HERE)]) as workers:
        prepared = simulation(run, datasets)

        def report(line: dict) -> None:
            if line["round"] in (SOAK_ROUNDS // 10, SOAK_ROUNDS):
                gc.collect()
                found.append(family())

        grid = prepared.grid(workers, datasets)
        execute(prepared, grid, RunFolder(tmp_path / "soak"), report)
    (memory, files), (memory_at_end, files_at_end) = found
    print(f"soak: {memory / 1e6:.1f} to {memory_at_end / 1e6:.1f} MB, {files} to {files_at_end}")
    assert memory_at_end <= 1.05 * memory
    assert files_at_end <= 1.05 * files
