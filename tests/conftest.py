"""Shared by the tests: one Ray for all of them, and `fedinit` as a user calls it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner, Result

from experiments.cli import app

HERE = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before `datasets` is imported: no test reaches for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is: tests run side by side, one for each core


@pytest.fixture(scope="session", autouse=True)
def one_ray() -> Iterator[None]:
    """Start Ray when the first simulation does, and end it with the session."""
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_started(one_ray: None) -> None:
    """A Ray that is kept between tests."""
    if not ray.is_initialized():
        quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
        ray.init("local", num_cpus=4, **quiet)


@pytest.fixture
def fedinit() -> Callable[..., Result]:
    """Call the command line in this process."""
    runner = CliRunner()

    def call(*arguments: object) -> Result:
        return runner.invoke(app, [str(each) for each in arguments])

    return call


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[dict], Path]:
    """Write an experiment file with the tests' own problems beside it."""

    def write(settings: dict) -> Path:
        for own in HERE.glob("plugged_in*.py"):
            shutil.copy(own, tmp_path)
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False))
        return path

    return write


@pytest.fixture
def finals(fedinit, experiment, ray_started, tmp_path):
    """Run settings and return each run's folder."""

    def run(settings: dict, out: str = "out") -> dict[str, Path]:
        result = fedinit("run", experiment(settings), "--out", tmp_path / out)
        assert result.exit_code == 0, result.output
        return {
            each.parent.name: each.parent for each in (tmp_path / out).glob("*/final.safetensors")
        }

    return run


@pytest.fixture
def refused(fedinit, experiment, tmp_path, monkeypatch):
    """Run a request that must be refused and return its one line."""

    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started for a request that is wrong")

    def run(settings: dict, *arguments: str) -> str:
        monkeypatch.setattr(ray, "init", no_ray)
        monkeypatch.setattr("experiments.running.Workers", no_ray)
        out = tmp_path / "out"
        result = fedinit("run", experiment(settings), "--out", out, *arguments)
        assert result.exit_code == 2, result.output
        lines = result.stderr.splitlines()
        assert len(lines) == 1, result.stderr
        assert not result.stdout
        assert not out.exists()
        return lines[0]

    return run
