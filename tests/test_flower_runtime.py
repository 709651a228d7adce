"""The same strategy and ClientApp under Flower's own Simulation Runtime, by `flwr run .`."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from experiments.cli import find_experiment
from fedinit.config import to_yaml
from fedinit.experiment_file import load_experiment
from tests.test_simulation import difference, numbers

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def superlink(tmp_path_factory):
    """A private Flower SuperLink; the environment in which `flwr` finds it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("flwr")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--database", str(home / "state.db")]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield environment
        process.terminate()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fedopt", "flwr.serverapp.strategy:FedAvg"])
def test_flowers_runtime_gives_the_same_weights(strategy, superlink, finals, tmp_path):
    """FedAvg, three rounds, every client, a real CNN on real images: `flwr run .` and RayGrid."""
    # A small rate: Flower sums float32 replies as they arrive, and training amplifies what differs.
    client = "client={lr: 0.003, batch_size: 64}"
    settings = f"strategy={strategy}; partition.clients=8; cohort=8; {client}"
    settings += "; memory_format=contiguous"  # as it is under Flower's runtime
    flower = tmp_path / "flower"
    command = ["flwr", "run", ".", "--stream"]
    command += ["--federation-config", "num-supernodes=8 client-resources-num-cpus=1"]
    command += ["--run-config", f"out='{flower}' settings='{settings}'"]
    done = subprocess.run(
        command,
        env=superlink,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (flower / "run" / "final.safetensors").exists(), done.stdout + done.stderr

    overrides = [each.strip() for each in settings.split(";")]
    (run,) = load_experiment(find_experiment("flower"), overrides).runs.values()
    (ours,) = finals(yaml.safe_load(to_yaml(run)) | {"workers": 2}).values()
    assert difference(ours, flower / "run") < 1e-6
    for one, other in zip(numbers(ours), numbers(flower / "run"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, nan_ok=True)
