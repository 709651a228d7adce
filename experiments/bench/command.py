"""What `fedinit bench` does: each work measured, a table for each, bench.json, scaling figures."""

import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.bench.bare_loop import loop_leaves_out
from experiments.bench.measuring import RAY_GRID, TUNED, Measured, measure, with_untimed
from experiments.bench.scaling import COHORTS, over_cohorts, over_workers, sized
from experiments.resuming import results_folder
from experiments.stopping import Stop, StoppedError
from experiments.wiring import Datasets, simulation
from fedinit.config import Run, to_yaml
from fedinit.errors import RequestError
from fedinit.experiment_file import Experiment
from fedinit.results import write_atomically
from fedinit.simulation import Workers

FLOWER, PFL, BLAZEFL = "Flower's runtime", "pfl", "BlazeFL"
FOUND = "bench.json"
_START_UP_LIMIT = 300  # seconds
_FLOWER = "import sys; from experiments.bench.flower import main; main(sys.argv[1])"
_LAUNCHER = ["-m", "torch.distributed.run", "--standalone"]
_PEER_ROUNDS = 5
_COMMAND = [sys.executable, "-c", "from experiments.cli import app; app()"]


class PeerError(RuntimeError):
    """Another simulator failed."""


class Peer(NamedTuple):
    """Another simulator.

    Attributes:
        command: what Python is to run, before a file's path.
        settings: of the run it does, where they differ.
    """

    command: list[str]
    settings: dict[str, Any]


def bench(
    experiments: Sequence[Experiment],
    out: Path,
    repetitions: int,
    flower: bool,
    scaling: bool,
    console: Console,
) -> None:
    """Measure each experiment's run and write what was found, after each, to out/bench.json.

    Raises:
        RequestError: a file asks for several runs, or for one that cannot be done or timed, two
            have one name, or `out` holds another bench.json or cannot be written.
        StoppedError: Ctrl-C or SIGTERM; what was measured before is in bench.json.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    stop, measured = Stop(), []

    def note(text: str) -> None:
        if stop.requested:  # what it raised may have been lost
            raise StoppedError
        console.print(f"  {text}", markup=False, highlight=False)

    found: dict[str, Any] = {"machine": _machine(), "work": {}}
    try:
        with results_folder(out), stop.caught():
            if (out / FOUND).exists():
                raise RequestError(f"--out {out}: holds another {FOUND}; name another folder")
            runs = _timeable(experiments, scaling)
            folders = {each.name: [str(each.folder)] for each in experiments}
            for name, run in runs.items():
                console.print(f"{name}:")
                found["work"][name] = _measured(run, folders[name], repetitions, flower, note)
                _write(out / FOUND, found)
                measured.append(name)
                console.print(_table(name, found["work"][name]))
            if scaling:
                first = next(iter(runs))
                for make in (over_cohorts, over_workers):
                    drawing = make(runs[first], folders[first], note)
                    _write(out / f"{drawing.name}.svg", drawing.on_white)
                    _write(out / f"{drawing.name}.csv", drawing.csv)
    except KeyboardInterrupt:
        console.print(f"  stopped; measured: {', '.join(measured) or 'nothing'}", markup=False)
        raise
    console.print(f"bench: {out}", markup=False, highlight=False, soft_wrap=True)


def _timeable(experiments: Sequence[Experiment], scaling: bool) -> dict[str, Run]:
    """Return each file's run by the file's name; all that will be done is checked.

    Raises:
        RequestError: it cannot be done or timed, or two files have one name.
    """
    runs: dict[str, Run] = {}
    cpus = os.cpu_count() or 1
    for each in experiments:
        name, asked = each.name, len(each.runs)
        if name in runs:
            raise RequestError(f"{name}: the name of two files; change it in one of them")
        if asked != 1:
            raise RequestError(f"{name}: bench times one run, this file asks for {asked}")
        (run,) = each.runs.values()
        if run.rounds == 0:
            raise RequestError(f"{name}: rounds: bench times one at least, got 0")
        if run.workers != "auto" and run.workers > cpus:
            raise RequestError(f"{name}: workers: {run.workers} workers, but there are {cpus} CPUs")
        wide = [sized(run, max(COHORTS))] if scaling and not runs else []
        for done in (run, *wide):
            try:  # with data that are not kept: another work's memory would count them
                simulation(with_untimed(done), Datasets())
            except RequestError as error:
                raise RequestError(f"{name}: {error}") from None
        runs[name] = run
    return runs


def _measured(
    run: Run, import_path: list[str], repetitions: int, flower: bool, note: Callable[[str], None]
) -> Any:
    beyond = loop_leaves_out(run)
    if beyond:
        told = ", ".join(f"{key} {value}" for key, value in beyond.items())
        note(f"the loops do plain SGD and its mean, without {told}")
    note("starting up, to the end of the first round")
    start_up = _start_up_seconds(run)
    number = None if run.workers == "auto" else run.workers
    with Workers(number, most=run.cohort, import_path=import_path) as workers:
        measured = measure(run, workers, repetitions, note)
    record = _record(measured)
    record["contenders"][RAY_GRID]["start_up_seconds"] = start_up
    for name, peer in _peers(flower, run, measured.workers).items():
        note(name)
        try:
            seconds = _peer_seconds(run, peer)
        except PeerError as error:  # what was measured before stays
            note(f"{name} takes no part: {error}")
            continue
        middle = median(seconds)
        ratio = middle / measured.contenders[TUNED].round_seconds
        record["contenders"][name] = {
            "seconds": [seconds],
            "round_seconds": middle,
            "updates_per_second": run.cohort / middle,
            "ratios": [ratio],
        }
    return record


def _record(measured: Measured) -> dict[str, Any]:
    return {
        "run": measured.run.model_dump(mode="json"),
        "workers": measured.workers,
        "loops_leave_out": loop_leaves_out(measured.run),
        "contenders": {name: each.record() for name, each in measured.contenders.items()},
    }


def _table(name: str, record: dict[str, Any]) -> Table:
    ours = record["contenders"][RAY_GRID]["round_seconds"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "seconds for a round": lambda each: f"{each['round_seconds']:.3f}",
        f"times the {TUNED}": lambda each: f"{median(each['ratios']):.2f}",
        "least to most": lambda each: f"{min(each['ratios']):.2f}-{max(each['ratios']):.2f}",
        f"seconds, times {RAY_GRID}'s": lambda each: f"{each['round_seconds'] / ours:.2f}",
        "updates for a second": lambda each: f"{each['updates_per_second']:.1f}",
        "CPU ms for an update": lambda each: f"{1e3 * each['cpu_seconds_per_update']:.2f}",
        "of it the driver's": lambda each: f"{1e3 * each['driver_cpu_seconds_per_update']:.2f}",
        "peak memory, GiB": lambda each: f"{each['peak_bytes'] / 2**30:.2f}",
        "start-up, seconds": lambda each: f"{each['start_up_seconds']:.1f}",
    }
    rounds = sum(map(len, record["contenders"][RAY_GRID]["seconds"]))
    title = f"{name}: {rounds} rounds in turn, {record['workers']} processes, {_format(record)}"
    table = Table("", title=title, box=SIMPLE)
    for contender in record["contenders"]:
        table.add_column(contender, justify="right")
    for row, show in rows.items():
        table.add_row(row, *(_cell(show, each) for each in record["contenders"].values()))
    return table


def _cell(show: Callable[[dict[str, Any]], str], numbers: dict[str, Any]) -> str:
    try:
        return show(numbers)
    except KeyError:  # not measured of this contender
        return ""


def _format(record: dict[str, Any]) -> str:
    settled = record["run"]
    return f"memory format {settled['memory_format']}, {settled['together']} together"


def _start_up_seconds(run: Run) -> float:
    """Seconds from a command of its own to its first finished round."""
    with tempfile.TemporaryDirectory() as folder:
        path, results = _written(run, folder), Path(folder) / "out"
        begun = time.perf_counter()
        with subprocess.Popen(  # noqa: S603
            [*_COMMAND, "run", str(path), "--set", "rounds=1", "--out", str(results)],
            env=_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                while process.poll() is None and time.perf_counter() - begun < _START_UP_LIMIT:
                    lines = next(iter(results.glob("*/rounds.jsonl")), None)
                    if lines is not None and lines.read_text(encoding="utf-8").count("\n") > 1:
                        seconds = time.perf_counter() - begun
                        process.wait()  # it ends its Ray
                        return seconds
                    time.sleep(0.02)
            except KeyboardInterrupt:
                with suppress(psutil.NoSuchProcess):
                    for each in psutil.Process(process.pid).children(recursive=True):
                        each.kill()
                process.kill()
                raise
            process.kill()
    return float("nan")


def _peers(flower: bool, run: Run, processes: int) -> dict[str, Peer]:
    """Return the simulators that take part, by name.

    pfl's processes have equal shares of a cohort, or draw other clients than they should.
    """
    found = {}
    if flower:
        strategy = {"strategy": "flwr.serverapp.strategy:FedAvg", "strategy_args": {}}
        found[FLOWER] = Peer(["-c", _FLOWER], strategy)
    if find_spec("pfl") and run.cohort % processes == 0:
        module = ["-m", "experiments.bench.pfl_research"]
        found[PFL] = Peer([*_LAUNCHER, f"--nproc-per-node={processes}", *module], {})
    if find_spec("blazefl"):
        found[BLAZEFL] = Peer(["-m", "experiments.bench.blazefl_threads"], {"workers": processes})
    return found


def _peer_seconds(run: Run, peer: Peer) -> list[float]:
    """Seconds of rounds of federated averaging by another simulator, in processes of its own.

    Raises:
        PeerError: it cannot do it.
    """
    settings = {"rounds": _PEER_ROUNDS, "evaluate_every": 1000, **peer.settings}
    with tempfile.TemporaryDirectory() as folder:
        path = _written(run.model_copy(update=settings), folder)
        done = subprocess.run(  # noqa: S603
            [sys.executable, *peer.command, str(path)],
            env=_environment() | {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        reason = re.search(r"^(?:\[rank\d+\]: )?(\S+(?:Error|Exception)\b.*)", done.stderr, re.M)
        raise PeerError(reason[1] if reason else f"exit status {done.returncode}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _environment() -> dict[str, str]:
    """The environment of a process that finds the modules that this one finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


def _written(run: Run, folder: str) -> Path:
    path = Path(folder) / "run.yaml"
    path.write_text(to_yaml(run), encoding="utf-8")
    return path


def _machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "flwr", "ray")}
    return {"cores": os.cpu_count(), "python": platform.python_version(), **packages}


def _write(path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content, indent=1)
    write_atomically(path, text.encode())
