"""Workers that die, nodes that leave, and where workers are placed: on real processes and nodes."""

import json
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray
import torch

from fedinit.simulation import Workers
from tests.test_simulation import numbers

BIN = Path(sys.executable).parent
QUADRATICS = {
    "dataset": "plugged_in:quadratics",
    "dataset_args": {
        "curvature": [[1.0, 3.0], [2.0, 0.5], [1.0, 1.0]],
        "optimum": [[0.0, 1.0], [4.0, -2.0], [1.0, 7.0]],
        "examples": [4, 8, 12],
        "test_optimum": [0.0, 0.0],
    },
    "model": "plugged_in:Point",
    "client": {"lr": 0.1, "batch_size": 4},
    "cohort": 3,
    "rounds": 3,
    "workers": 2,
}


def mortal(folder: Path, **arguments: float) -> dict:
    """The same runs, with a loss that notes in a folder what becomes of its workers.

    On a GPU they would die of the measurement for `together` before a run begins.
    """
    args = {"folder": str(folder), **arguments}
    together = 1 if torch.cuda.is_available() else "auto"
    return QUADRATICS | {"loss": "plugged_in:mortal", "loss_args": args, "together": together}


def final(run: Path) -> bytes:
    return (run / "final.safetensors").read_bytes()


@pytest.fixture
def undisturbed(finals) -> Path:
    """The run that nothing happens to."""
    (run,) = finals(QUADRATICS | {"loss": "plugged_in:half_squared_error"}, "undisturbed").values()
    return run


@pytest.mark.parametrize("deaths", [1, 2])
def test_a_share_whose_worker_is_killed_is_done_again(deaths, undisturbed, finals, tmp_path):
    """kill -9 in a client's first step, once and twice: the same bits."""
    (run,) = finals(mortal(tmp_path / "noted", deaths=deaths)).values()
    assert len(list((tmp_path / "noted").glob("death-*"))) == deaths
    assert final(run) == final(undisturbed)
    assert numbers(run) == numbers(undisturbed)


def test_three_deaths_on_a_share_end_the_run_and_the_next_goes_on(
    fedinit, experiment, ray_started, tmp_path
):
    """One worker, so that all three are on the same share; its clients are named.

    The next run has another batch size, so it is measured first, by a process that is not there.
    """
    settings = mortal(tmp_path / "noted", deaths=3) | {"workers": 1}
    file = experiment(settings | {"grid": {"client.batch_size": [4, 2]}})
    assert fedinit("run", file, "--out", tmp_path / "out").exit_code == 1
    failed, done = json.loads((tmp_path / "out" / "summary.json").read_text())["runs"]
    assert (failed["status"], done["status"]) == ("failed", "done")
    named = "3 workers died on the same share, of clients 0 'client 0', 1 'client 1'"
    assert named in failed["error"]
    assert len(list((tmp_path / "noted").glob("death-*"))) == 3


def test_a_process_that_dies_at_the_start_is_replaced(ray_started):
    """Before anybody has used it: nothing is missing but the process."""
    with Workers(1) as workers:
        first = ray.get(workers._actors[0].call.remote(os.getpid))
        os.kill(first, signal.SIGKILL)
        assert psutil.Process(workers.measure("process", os.getpid)).pid != first


def test_what_two_workers_die_of_is_not_measured(ray_started):
    """One sentence of Ray's, and the next measurement has a process again."""
    with Workers(1) as workers:
        with pytest.raises(RuntimeError, match=r"^2 workers died while they measured: [^\n]+$"):
            workers.measure("death", lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert psutil.pid_exists(workers.measure("process", os.getpid))


def test_what_a_worker_raises_is_raised_as_it_is(ray_started):
    with Workers(1) as workers, pytest.raises(ZeroDivisionError) as raised:
        workers.measure("nothing", lambda: 1 // 0)
    assert str(raised.value) == "integer division or modulo by zero"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told so")
def test_a_driver_keeps_the_memory_that_it_frees(ray_started):
    """A vector of 48 MB is hundreds of page faults, which the kernel need not serve twice."""
    with Workers(1):
        for _ in range(8):  # it may take some places in turn
            torch.ones(12_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(12_000_000)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50


def test_ray_runs_nothing_that_is_not_asked_for():
    """Twice in one process: what is left runs, as nice as the driver, and ends."""
    code = """
import os
from contextlib import suppress
import psutil
from fedinit.simulation import Workers

def running():
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that has just ended
            yield each.pid, " ".join(each.cmdline())

for _ in range(2):
    with Workers(1) as workers:
        pid, niceness = workers.measure("process", lambda: (os.getpid(), os.nice(0)))
        assert niceness == os.nice(0)
        found = dict(running())
        assert pid in found  # by number: once in fifty times Ray gives it no title
        print(*found.values(), sep="\\n")
    assert not psutil.Process().children(recursive=True)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "raylet" in done.stdout
    assert not re.search(r"monitor\.py|dashboard\.py", done.stdout)


def test_nothing_listens_beyond_loopback(experiment, tmp_path):
    """Of the driver's process and all those below it, while a run goes on."""
    listening: set[str] = set()
    with started(experiment(mortal(tmp_path / "noted", seconds=0.05)), tmp_path / "out") as driver:
        while driver.poll() is None:
            for process in psutil.Process(driver.pid).children(recursive=True):
                try:
                    found = process.net_connections("tcp")
                except psutil.Error:  # it has just ended
                    continue
                listening |= {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
            time.sleep(0.3)
    assert driver.returncode == 0
    assert listening
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


class Cluster:
    """Real Ray nodes on this machine, each of one CPU and one logical GPU, by `ray start`."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._folder = folder
        # Else whoever starts a Ray on this machine meanwhile joins this cluster.
        self._environment = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp()}
        self.nodes: list[subprocess.Popen] = []

    def add(self) -> None:
        """Start a node: the first is the head."""
        port = self.address.partition(":")[2]
        role = ["--head", "--port", port, "--include-dashboard=false"]
        if self.nodes:
            role = ["--address", self.address]
        command = [BIN / "ray", "start", "--block", "--num-cpus=1", "--num-gpus=1", *role]
        command += ["--object-store-memory=200000000", "--disable-usage-stats"]
        with (self._folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            self.nodes.append(
                subprocess.Popen(
                    command, env=self._environment, stdout=log, stderr=log, start_new_session=True
                )
            )

    def kill(self, node: int) -> None:
        """End every process of a node at once, as when its machine is switched off."""
        process = psutil.Process(self.nodes[node].pid)
        for each in [*process.children(recursive=True), process]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        self.nodes[node].wait(30)

    def wait_for(self, gpus: int) -> None:
        """Wait until so many GPUs have joined, as `ray status` says."""
        deadline = time.monotonic() + 90
        command = [BIN / "ray", "status", "--address", self.address]
        while time.monotonic() < deadline:
            done = subprocess.run(
                command, env=self._environment, capture_output=True, text=True, check=False
            )
            if f"/{gpus}.0 GPU" in done.stdout:
                return
            time.sleep(0.5)
        pytest.fail(f"no {gpus} GPUs at {self.address}: {done.stdout} {done.stderr}")


@pytest.fixture
def cluster(tmp_path):
    """Two nodes."""
    nodes = Cluster(tmp_path)
    try:
        nodes.add()
        nodes.wait_for(1)
        nodes.add()
        nodes.wait_for(2)
        yield nodes
    finally:
        for node in reversed(range(len(nodes.nodes))):
            if nodes.nodes[node].poll() is None:
                nodes.kill(node)


def started(file: Path, out: Path, *options: str) -> subprocess.Popen:
    """`fedinit run` in a process of its own, with a Ray of its own unless told otherwise."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [BIN / "fedinit", "run", file, "--out", out, *options]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_cluster_and_a_node_that_leaves_in_mid_round(cluster, undisturbed, experiment, tmp_path):
    """Two workers, a GPU and a node each, with the code that Ray shipped; then one node is gone.

    Rounds go on with both shares on the node that is left, and end in the same bits.
    """
    noted, out = tmp_path / "noted", tmp_path / "out"
    file = experiment(mortal(noted, seconds=0.5) | {"workers": "auto"})
    with started(file, out, "--address", cluster.address) as driver:
        lines = out / "experiment" / "rounds.jsonl"
        deadline = time.monotonic() + 120
        while not (lines.exists() and lines.read_text().count("\n") > 1):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        placed = sorted(each.name for each in noted.glob("node-*"))
        cluster.kill(1)
        assert driver.wait(180) == 0
    assert len({each.split("-")[1] for each in placed}) == 2
    assert [each[-6:] for each in placed] == ["-gpu-0"] * 2
    assert not (noted / f"code-{tmp_path.name}").exists()  # not from the driver's folder
    assert final(out / "experiment") == final(undisturbed)
    assert numbers(out / "experiment") == numbers(undisturbed)


def test_workers_share_gpus_evenly(monkeypatch, ray_started):
    """Whole GPUs while there are enough, then equal shares; without GPUs the CPUs count."""
    for gpus, number, most, expected in (
        (0, None, None, (4, 0)),
        (0, None, 3, (3, 0)),
        (2, None, None, (2, 1)),
        (2, None, 1, (1, 1)),
        (2, 2, None, (2, 1)),
        (2, 3, None, (3, 1 / 2)),
        (1, 4, None, (4, 1 / 4)),
        (8, None, None, (4, 1)),
    ):
        resources = {"CPU": 4.0, "GPU": float(gpus)}
        monkeypatch.setattr(ray, "cluster_resources", lambda found=resources: found)
        monkeypatch.setattr(Workers, "_new_actor", lambda _: None)
        workers = Workers(number, most)
        assert (workers.number, workers.gpu_share) == expected
