"""A run's folder, written as the run goes, and the summary of a folder of runs.

DIR/summary.json, summary.csv      one row for each run
DIR/<run>/run.yaml                 the run, fully specified
DIR/<run>/initialization.json      what was loaded, what is fresh, what did not fit
DIR/<run>/rounds.jsonl             one line for each round, from round 0 on
DIR/<run>/final.safetensors        the last weights; its presence says that the run is done
DIR/<run>/x/, distance.json        x at evaluated rounds; its distance to the final one
DIR/<run>/checkpoints/             what the run goes on from, the last two; none when it is done
DIR/<run>/error.txt                why a run failed
DIR/<run>/diverged.json            in which round a run diverged, and what was not finite
"""

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from fedinit.checkpoints import DamagedError
from fedinit.config import Run, make_run, to_yaml
from fedinit.errors import RequestError, WriteError, one_line
from fedinit.experiment_file import Experiment
from fedinit.initialization import METADATA
from fedinit.wording import cell
from fedinit.yaml_settings import read_settings

SUMMARY = "summary.json"
DONE, DIVERGED, FAILED, UNFINISHED = "done", "diverged", "failed", "unfinished"
ENDED = (DONE, DIVERGED)  # a result either way: not to be run again
_KEPT_CHECKPOINTS = 2


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file, or folder, in whatever goes wrong with writing it.

    Raises:
        WriteError: the disk is full, the folder is read-only, ...
    """
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path}: {error.strerror or one_line(error)}") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at `path` so that a reader sees the old content or the new, never a part.

    The content is on the disk, under its name, when this returns.

    Raises:
        WriteError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)  # a full disk needs the room
            raise
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, **options: Any) -> str:
    """Encode as strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ENDINGS = ("error.txt", "diverged.json")


@dataclass(frozen=True)
class RunFolder:
    """One run's folder: what is written while it runs and read afterwards."""

    path: Path

    def begin(self, run: Run, initialization: dict[str, Any]) -> None:
        """Start the folder: the run, its initialization, and no rounds."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._forget_checkpoints()
            for stale in ("rounds.jsonl", "final.safetensors", "distance.json", *_ENDINGS):
                (self.path / stale).unlink(missing_ok=True)
            for stale_x in (self.path / "x").glob("*.safetensors"):
                stale_x.unlink()
        write_atomically(self.path / "run.yaml", to_yaml(run).encode())
        write_atomically(
            self.path / "initialization.json", to_json(initialization, indent=1).encode()
        )

    def go_on(self, run: Run, server_round: int) -> None:
        """Take the run up again after a round: later lines are cut, and how it had ended.

        Raises:
            DamagedError: the lines up to that round are not all there.
        """
        path, kept = self.path / "rounds.jsonl", server_round + 1
        lines = path.read_bytes().split(b"\n")[:kept] if path.exists() else []
        try:
            found = [_line(line)["round"] for line in lines]
        except ValueError:
            found = []
        if found != list(range(kept)):
            raise DamagedError(f"{path} does not hold rounds 0 to {server_round}")
        write_atomically(path, b"\n".join([*lines, b""]))
        write_atomically(self.path / "run.yaml", to_yaml(run).encode())
        with writing(self.path):
            for stale in _ENDINGS:
                (self.path / stale).unlink(missing_ok=True)

    def append(self, line: dict[str, Any]) -> None:
        """Append one round's line to rounds.jsonl."""
        path = self.path / "rounds.jsonl"
        with writing(path), path.open("ab") as file:
            file.write(to_json(line).encode() + b"\n")

    def checkpoint(self, server_round: int, content: bytes) -> None:
        """Write what the run can go on from after a round; the one before it is kept as well."""
        folder = self.path / "checkpoints"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            _sync(self.path / "rounds.jsonl")  # no checkpoint is ahead of its lines
        write_atomically(folder / f"round-{server_round:06d}.safetensors", content)
        with writing(folder):
            for old in self.checkpoints[_KEPT_CHECKPOINTS:]:
                old.unlink()

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints, the newest first."""
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"), reverse=True)

    def set_aside(self, checkpoint: Path) -> None:
        """Keep a checkpoint that cannot be used from being one of the last two."""
        with writing(checkpoint):
            checkpoint.replace(checkpoint.with_suffix(".unusable"))

    def _keep_lines(self) -> None:
        """Wait until the lines are on the disk: no ending may be there before them."""
        with writing(self.path):
            if (self.path / "rounds.jsonl").exists():
                _sync(self.path / "rounds.jsonl")

    def _forget_checkpoints(self) -> None:
        if (self.path / "checkpoints").exists():
            shutil.rmtree(self.path / "checkpoints")

    def keep(self, server_round: int, x: torch.Tensor) -> None:
        """Keep the vector x of an evaluated round, to measure its distance to the final one."""
        with writing(self.path / "x"):
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
        read = self._read_json("distance.json")
        return {int(server_round): distance for server_round, distance in read.items()}

    def _kept(self, server_round: int) -> Path:
        return self.path / "x" / f"round-{server_round:06d}.safetensors"

    def finish(self, weights: dict[str, torch.Tensor], **about: str) -> None:
        """Write the final weights, with what is to be known of them; after this the run is done."""
        contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
        content = save(contiguous, {METADATA: to_json(about)} if about else None)
        self._keep_lines()
        write_atomically(self.path / "final.safetensors", content)
        with writing(self.path):
            self._forget_checkpoints()

    def fail(self, reason: str) -> None:
        """Record why the run failed."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "error.txt", reason.encode("utf-8", "backslashreplace"))

    def diverge(self, server_round: int, reason: str) -> None:
        """Record in which round the run diverged; nothing is to be learned from it any more."""
        ending = {"round": server_round, "reason": reason}
        self._keep_lines()
        write_atomically(self.path / "diverged.json", to_json(ending).encode())
        with writing(self.path):
            self._forget_checkpoints()

    @property
    def status(self) -> str:
        """DONE, DIVERGED, FAILED or UNFINISHED."""
        endings = (DONE, "final.safetensors"), (DIVERGED, "diverged.json"), (FAILED, "error.txt")
        found = (status for status, name in endings if (self.path / name).exists())
        return next(found, UNFINISHED)

    @property
    def divergence(self) -> dict[str, Any]:
        """The `round` in which the run diverged and the `reason`; empty where it did not."""
        return self._read_json("diverged.json")

    @property
    def run(self) -> Run:
        """The run that this folder holds."""
        settings = read_settings(path := self.path / "run.yaml")
        try:
            return make_run(settings)
        except RequestError as error:
            raise RequestError(f"{path}: {error}") from None

    @property
    def initialization(self) -> dict[str, Any]:
        """What was loaded, what is fresh and what did not fit when the run began."""
        return self._read_json("initialization.json")

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        if not path.exists():
            return {}
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(f"{path} is not JSON: {error}") from None
        if not isinstance(read, dict):
            raise RequestError(f"{path}: expected an object")
        return read

    @property
    def error(self) -> str | None:
        """Why the run failed or what diverged, or None."""
        if self.status == DIVERGED:
            return self.divergence.get("reason")
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
            RequestError: a line is not a round's; the file and line are named.
        """
        path = self.path / "rounds.jsonl"
        if not path.exists():
            return []
        lines = []
        whole, _, _torn = path.read_bytes().rpartition(b"\n")
        for number, text in enumerate(whole.splitlines(), start=1):
            try:
                lines.append(_line(text))
            except ValueError as error:
                raise RequestError(f"{path}, line {number}: not JSON: {error}") from None
        return lines


def _line(text: bytes) -> dict[str, Any]:
    """Read a line of rounds.jsonl; raise a ValueError where it is no round's."""
    read = json.loads(text)
    if not isinstance(read, dict) or type(read.get("round")) is not int:
        raise ValueError("no round's line")
    return read


def summarize(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Write summary.json and summary.csv of the runs under `folder`; return the summary."""
    rows = [
        {
            "run": label,
            "status": UNFINISHED,
            **experiment.arm(run),
            **_outcome(RunFolder(folder / label), run.target_accuracy),
        }
        for label, run in experiment.runs.items()
    ]
    summary = {
        "name": experiment.name,
        "study": experiment.study,
        "varied": experiment.varied,
        "runs": rows,
    }
    write_summary(folder, summary)
    return summary


def present_summary(folder: Path) -> dict[str, Any]:
    """Read the summary of `folder`, with what its runs have come to since it was written.

    Raises:
        RequestError: `folder` holds no results.
    """
    summary = read_summary(folder)
    for row in summary["runs"]:
        at = RunFolder(folder / row["run"])
        if (at.path / "run.yaml").exists():
            row.update(_outcome(at, at.run.target_accuracy))
    return summary


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json and summary.csv."""
    rows = summary["runs"]
    write_atomically(folder / SUMMARY, to_json(summary, indent=1).encode())
    table = io.StringIO()
    names = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(table, fieldnames=list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: cell(value) for key, value in row.items()} for row in rows)
    write_atomically(folder / "summary.csv", table.getvalue().encode())


def read_summary(folder: Path) -> dict[str, Any]:
    """Read a results folder's summary.

    Raises:
        RequestError: `folder` holds no results.
    """
    path = folder / SUMMARY
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise RequestError(f"{folder}: no results here ({SUMMARY} is missing)") from None
    except ValueError as error:
        raise RequestError(f"{path} is not JSON: {error}") from None
    try:
        needed = {"run", "status", "rounds_done", "error", *summary["varied"]}
        complete = "name" in summary and all(needed <= row.keys() for row in summary["runs"])
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise RequestError(f"{path} is no summary of runs")
    return summary


def _outcome(at: RunFolder, target: float | None) -> dict[str, Any]:
    status, rounds = at.status, at.rounds
    tested = [line for line in rounds if line.get("test_loss") is not None]
    accuracies = [line for line in tested if line.get("test_accuracy") is not None]
    last = tested[-1] if tested and status == DONE else {}  # what was broken off has no end
    least = math.inf if target is None else target
    counted = [line["failed_clients"] for line in rounds if "failed_clients" in line]
    reached = [line["round"] for line in accuracies if line["test_accuracy"] >= least]
    return {
        "status": status,
        "rounds_done": rounds[-1]["round"] if rounds else 0,
        "initial_test_accuracy": rounds[0].get("test_accuracy") if rounds else None,
        "initial_test_loss": rounds[0]["test_loss"] if rounds else None,
        "final_test_accuracy": last.get("test_accuracy"),
        "final_test_loss": last.get("test_loss"),
        "final_test_perplexity": last.get("test_perplexity"),
        "best_test_accuracy": max((line["test_accuracy"] for line in accuracies), default=None),
        "best_test_loss": min((line["test_loss"] for line in tested), default=None),
        "rounds_to_target": min(reached, default=None),
        "diverged_in_round": at.divergence.get("round"),
        "failed_clients": sum(counted) if counted else None,
        "wall_seconds": round(sum(line["wall_seconds"] for line in rounds), 3),
        "error": at.error,
    }
