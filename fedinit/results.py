"""A run's folder, written as the run goes, and the summary of a folder of runs.

DIR/summary.json, summary.csv      one row for each run
DIR/<run>/run.yaml                 the run, fully specified
DIR/<run>/initialization.json      what was loaded, what is fresh, what did not fit
DIR/<run>/rounds.jsonl             one line for each round, from round 0 on
DIR/<run>/final.safetensors        the last weights; its presence says that the run is done
DIR/<run>/x/, distance.json        x at evaluated rounds; its distance to the final one
DIR/<run>/error.txt                why a run failed
"""

import csv
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from fedinit.config import Run, get, make_run, to_yaml
from fedinit.errors import RequestError
from fedinit.experiment_file import Experiment, read_settings

SUMMARY = "summary.json"


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def to_json(value: Any, **options: Any) -> str:
    """Encode as strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class RunFolder:
    """One run's folder: what is written while it runs and read afterwards."""

    path: Path

    def begin(self, run: Run, initialization: dict[str, Any]) -> None:
        """Start the folder: the run, its initialization, and no rounds."""
        self.path.mkdir(parents=True, exist_ok=True)
        for stale in ("rounds.jsonl", "final.safetensors", "error.txt", "distance.json"):
            (self.path / stale).unlink(missing_ok=True)
        for stale_x in (self.path / "x").glob("*.safetensors"):
            stale_x.unlink()
        write_atomically(self.path / "run.yaml", to_yaml(run).encode())
        write_atomically(
            self.path / "initialization.json", to_json(initialization, indent=1).encode()
        )

    def append(self, line: dict[str, Any]) -> None:
        """Append one round's line to rounds.jsonl."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(to_json(line) + "\n")

    def keep(self, server_round: int, x: torch.Tensor) -> None:
        """Keep the vector x of an evaluated round, to measure its distance to the final one."""
        (self.path / "x").mkdir(exist_ok=True)
        write_atomically(self._kept(server_round), save({"x": x.contiguous()}))

    def measure_distances(self, final: torch.Tensor) -> None:
        """Write distance.json: ||x - final|| for every x that was kept, by round, in float64."""
        distances = {}
        for line in self.rounds:
            path = self._kept(line["round"])
            if path.exists():
                x = load_file(path)["x"]
                distances[line["round"]] = (x.double() - final.double()).norm().item()
        write_atomically(self.path / "distance.json", to_json(distances).encode())

    @property
    def distances(self) -> dict[int, float]:
        """||x - final x|| by evaluated round; empty where it was not asked for."""
        path = self.path / "distance.json"
        if not path.exists():
            return {}
        read = json.loads(path.read_text(encoding="utf-8"))
        return {int(server_round): distance for server_round, distance in read.items()}

    def _kept(self, server_round: int) -> Path:
        return self.path / "x" / f"round-{server_round:06d}.safetensors"

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the final weights; after this the run is done."""
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        write_atomically(self.path / "final.safetensors", save(contiguous))

    def fail(self, reason: str) -> None:
        """Record why the run failed."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "error.txt", reason.encode())

    @property
    def status(self) -> str:
        """`done`, `failed` or `unfinished`."""
        if (self.path / "final.safetensors").exists():
            return "done"
        return "failed" if (self.path / "error.txt").exists() else "unfinished"

    @property
    def run(self) -> Run:
        """The run that this folder holds."""
        return make_run(read_settings(self.path / "run.yaml"))

    @property
    def initialization(self) -> dict[str, Any]:
        """What was loaded, what is fresh and what did not fit when the run began."""
        path = self.path / "initialization.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    @property
    def error(self) -> str | None:
        """Why the run failed, or None."""
        path = self.path / "error.txt"
        return path.read_text(encoding="utf-8") if path.exists() else None

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The final weights by state-dict name."""
        return load_file(self.path / "final.safetensors")

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The lines of rounds.jsonl; none while the run has not begun.

        Raises:
            RequestError: a line is not JSON; the file and line are named.
        """
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        lines = []
        whole, _, _torn = path.read_text(encoding="utf-8").rpartition("\n")
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise RequestError(f"{path}, line {number}: not JSON: {error}") from None
        return lines


def summarize(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Write summary.json and summary.csv of the runs under `folder`; return the summary."""
    rows = [
        _summary_row(folder, label, experiment.varied, run)
        for label, run in experiment.runs.items()
    ]
    summary = {
        "name": experiment.name,
        "study": experiment.study,
        "varied": experiment.varied,
        "runs": rows,
    }
    write_atomically(folder / SUMMARY, to_json(summary, indent=1).encode())
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "summary.csv", table.getvalue().encode())
    return summary


def read_summary(folder: Path) -> dict[str, Any]:
    """Read a results folder's summary.

    Raises:
        RequestError: `folder` holds no results.
    """
    path = folder / SUMMARY
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RequestError(f"{folder}: no results here ({SUMMARY} is missing)") from None
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}") from None


def _summary_row(folder: Path, label: str, varied: list[str], run: Run) -> dict[str, Any]:
    at = RunFolder(folder / label)
    rounds = at.rounds
    tested = [line for line in rounds if line.get("test_loss") is not None]
    accuracies = [line for line in tested if line.get("test_accuracy") is not None]
    last = tested[-1] if tested else {}
    target = run.target_accuracy
    reached = [
        line["round"]
        for line in accuracies
        if target is not None and line["test_accuracy"] >= target
    ]
    return {
        "run": label,
        "status": at.status,
        **{key: get(run, key) for key in varied},
        "rounds_done": rounds[-1]["round"] if rounds else 0,
        "initial_test_loss": rounds[0]["test_loss"] if rounds else None,
        "final_test_accuracy": last.get("test_accuracy"),
        "final_test_loss": last.get("test_loss"),
        "final_test_perplexity": last.get("test_perplexity"),
        "best_test_accuracy": max((line["test_accuracy"] for line in accuracies), default=None),
        "best_test_loss": min((line["test_loss"] for line in tested), default=None),
        "rounds_to_target": min(reached, default=None),
        "wall_seconds": round(sum(line["wall_seconds"] for line in rounds), 3),
        "error": at.error,
    }
