"""The command line: fedinit run, tune, pretrain, data, bench, report, list."""

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedinit.errors import RequestError, WriteError, one_line, unknown

if TYPE_CHECKING:
    from experiments.progress import Progress
    from fedinit.experiment_file import Experiment

# Read once, when torch is loaded: large pages for vectors; and a driver's idle threads spin for
# half a millisecond, not for several, and leave the cores to the workers.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
# Typer would escape what is in brackets for rich, which does not print our help.
typer.core.HAS_RICH = False
EXPERIMENTS = Path(__file__).parent
YAML = (".yaml", ".yml")
_FILE_WIDTH = 160  # columns of a table that is not shown in a terminal
FAILED, WRONG_REQUEST, STOPPED = 1, 2, 130  # exit status; the last is a shell's after Ctrl-C

app = typer.Typer(
    name="fedinit",
    help="How does the initialization of a model change federated learning? "
    "Simulate it, from random or pre-trained weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Run the command line."""
    stopped = False

    def end() -> None:
        """End at once: threads of a Ray that was just starting would crash in Python's own end."""
        if stopped:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(STOPPED)

    atexit.register(end)  # the first that is registered is called last
    try:
        app()
    except SystemExit as ended:
        stopped = ended.code == STOPPED
        raise


def _one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """End in one line: a wrong request with exit status 2, a file that cannot be written with 1."""

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except RequestError as error:
            print(f"fedinit: {one_line(error)}", file=sys.stderr)
            raise typer.Exit(WRONG_REQUEST) from None
        except WriteError as error:
            told = f"fedinit: cannot write {one_line(error)}; what was written before is whole"
            print(told, file=sys.stderr)
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(STOPPED) from None

    return checked


File = Annotated[
    str, typer.Argument(metavar="FILE|NAME", help="An experiment file, or one of ours by name.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting: client.lr=0.1; an axis: grid.seed=[0,1]. Repeatable.",
    ),
]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="One of the file's presets; default: its first.")
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Results folder; default: results/NAME-TIME.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue in DIR: what is done there is kept.")
]
Address = Annotated[str | None, typer.Option(help="Join a running Ray cluster, e.g. auto.")]


@app.command()
@_one_line
def run(
    experiment: File,
    settings: Settings = None,
    preset: Preset = None,
    out: Out = None,
    resume: Resume = False,
    address: Address = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list the runs and what they cost.")
    ] = False,
) -> None:
    """Carry out an experiment and write its results, figures and report page.

    Exit status: 0 done; 1 some runs failed or diverged, the others are reported; 2 the request was
    wrong; 130 stopped: Ctrl-C once finishes the round, --resume goes on from there.
    """
    from experiments.progress import Progress
    from experiments.running import run_experiment
    from experiments.stopping import StoppedError
    from fedinit.results import DONE, SUMMARY, read_summary

    console = _console()
    loaded = _load(experiment, settings, preset)
    folder = _results_folder(out, resume, loaded.name)
    if dry_run:
        os.environ["HF_HUB_OFFLINE"] = "1"  # what is not here yet is said, not fetched
        from experiments.dry_run import cost_table
        from experiments.resuming import check_folder

        check_folder(loaded, folder, resume)
        console.print(cost_table(loaded))
        return
    progress = Progress(console, len(loaded.runs))
    try:
        with _resumable(folder, SUMMARY, progress):
            summary = run_experiment(loaded, folder, progress, resume, address)
    except StoppedError:
        if (folder / SUMMARY).exists():
            _show(console, folder, read_summary(folder))
        raise
    _show(console, folder, summary)
    if any(row["status"] != DONE for row in summary["runs"]):
        raise typer.Exit(FAILED)


@app.command()
@_one_line
def tune(
    experiment: File,
    settings: Settings = None,
    preset: Preset = None,
    out: Out = None,
    resume: Resume = False,
    address: Address = None,
) -> None:
    """Search each arm's rates on held-out training examples; write DIR/rates.yaml."""
    from experiments import tuning
    from experiments.progress import Progress

    console = _console()
    loaded = _load(experiment, settings, preset)
    progress = Progress(console, len(loaded.runs))
    folder = _results_folder(out, resume, loaded.name)
    with _resumable(folder, tuning.REQUEST, progress):
        rates = tuning.tune(loaded, folder, progress, resume, address)
    console.print(f"rates: {rates}", markup=False, highlight=False, soft_wrap=True)


@app.command()
@_one_line
def pretrain(experiment: File, settings: Settings = None, preset: Preset = None) -> None:
    """Train the proxies that an experiment's runs start from (initialization: proxy); print where.

    `run` does this first by itself. What was trained once is found again in ~/.cache/fedinit.
    """
    from experiments.progress import Progress
    from experiments.proxies import check, train_missing
    from experiments.wiring import Datasets

    console = _console()
    loaded = _load(experiment, settings, preset)
    runs = [run for run in loaded.runs.values() if run.initialization == "proxy"]
    if not runs:
        raise RequestError(f"initialization: no run of {experiment} starts from proxy")
    datasets = Datasets()
    for each in runs:
        check(each, datasets)
    for path in train_missing(runs, datasets, Progress(console, len(runs))):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
@_one_line
def data(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A data set, or an experiment's data.")
    ],
    settings: Settings = None,
    out: Out = None,
) -> None:
    """Show what a data set and its partition look like, and draw the clients' sizes and labels.

    Of an experiment's data sets, those that are not here are listed with the reason.
    """
    from experiments import data_summary
    from experiments.wiring import Datasets
    from fedinit.data import DATASETS
    from fedinit.registry import add_to_path

    console = _console()
    datasets = Datasets()
    if name in DATASETS or ":" in name:
        add_to_path([os.getcwd()])  # as an experiment file's folder is
        runs = [data_summary.named(name, settings or [], datasets)]
    elif name in our_experiments() or Path(name).suffix in YAML:
        runs = data_summary.different(_load(name, settings, None))
    else:
        raise unknown("data set or experiment", name, [*DATASETS, *our_experiments(), "FILE.yaml"])
    folder = out or _new_folder(
        "data-" + (name.replace(":", "-") if ":" in name else Path(name).stem)
    )
    ready, missing = {}, {}
    for number, run in enumerate(runs, start=1):
        try:
            datasets.load(run)
        except RequestError as error:
            missing[str(error)] = run.dataset  # seeds of the same data have the same reason
        else:
            ready[number] = (run, datasets.dealt(run))
    if not ready:
        raise RequestError(next(iter(missing)))
    for number, (run, dataset) in ready.items():
        console.print(data_summary.facts(run, dataset))
        at = folder if len(runs) == 1 else folder / f"{number}-{run.dataset.replace(':', '-')}"
        for drawing in data_summary.drawings(run, dataset):
            path = data_summary.write(drawing, at)
            console.print(f"{drawing.title}: {path}", markup=False, soft_wrap=True)
    for reason, where in missing.items():
        said = f"{where} is not here: {reason}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)


@app.command()
@_one_line
def bench(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|NAME...", help="w1, w2, w3, skewed, or files of one run."),
    ] = None,
    settings: Settings = None,
    out: Out = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Each from the initialization.")] = 3,
    flower: Annotated[
        bool, typer.Option("--flower", help="Also Flower's own simulation runtime, with FedAvg.")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also the figures over cohorts and workers.")
    ] = False,
) -> None:
    """Time rounds through RayGrid beside those of a bare PyTorch loop; write DIR/bench.json.

    The bare loop trains the same cohorts by SGD and averages, with as many processes: as PyTorch
    comes, and tuned with our workers' settings. So do pfl-research and BlazeFL, as they come, where
    they are installed. Nothing else should be running on the machine.
    """
    from experiments.bench import command

    console = _console()
    names = experiments or ["w1", "w2", "w3"]
    loaded = [_load(name, settings, None) for name in names]
    command.bench(loaded, out or _new_folder("bench"), repetitions, flower, scaling, console)


@app.command()
@_one_line
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder.")],
) -> None:
    """Make the summary, the figures and the report page of a results folder again."""
    from experiments.resuming import results_folder
    from fedinit.results import present_summary, write_summary

    summary = present_summary(folder)
    with suppress(RequestError), results_folder(folder):  # a run under way writes its own
        write_summary(folder, present_summary(folder))
    _show(_console(), folder, summary)


@app.command(name="list")
@_one_line
def list_names() -> None:
    """Show what an experiment file can name, and what each needs."""
    from experiments.listing import tables

    console = _console()
    for table in tables():
        console.print(table)


def _load(experiment: str, settings: list[str] | None, preset: str | None) -> "Experiment":
    from fedinit.experiment_file import load_experiment
    from fedinit.registry import add_to_path

    loaded = load_experiment(find_experiment(experiment), settings or [], preset)
    if loaded.study is not None:
        from experiments.studies import check_study

        check_study(loaded.study)
    add_to_path([str(loaded.folder)])
    return loaded


@contextmanager
def _resumable(folder: Path, begun: str, progress: "Progress") -> Iterator[None]:
    """Say how to go on, where Ctrl-C stops what writes the file `begun` to its folder first."""
    try:
        yield
    except KeyboardInterrupt:
        how = f"--out {folder} --resume goes on, with the same file, --preset and --set"
        progress.note(f"stopped; {how if (folder / begun).exists() else f'{folder} holds no run'}")
        raise


def _show(console: Console, folder: Path, summary: dict[str, Any]) -> None:
    """Print the table of a results folder and what it says, and write its page."""
    from experiments.studies import find
    from fedinit.report import console_table, write_report

    def say(text: object) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    console.print(console_table(summary))
    for row in summary["runs"]:
        if row["error"]:
            say(f"{row['status']}: {row['run']}: {row['error']}")
    finding = find(folder, summary)
    if finding is not None:
        say(finding.sentence)
    say(f"report: {write_report(folder, finding)}")


def _console() -> Console:
    """Return the console; what goes into a file or a pipe need not be broken at 80 columns."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _FILE_WIDTH
    return console


def _results_folder(out: Path | None, resume: bool, name: str) -> Path:
    if resume and out is None:
        raise RequestError("--resume needs --out DIR, the results folder to go on in")
    return out or _new_folder(name)


def _new_folder(name: str) -> Path:
    return Path("results") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def our_experiments() -> dict[str, Path]:
    """Return the files of our experiments by name; those that `bench` times come last."""
    files = [*sorted(EXPERIMENTS.glob("*.yaml")), *sorted(EXPERIMENTS.glob("bench/*.yaml"))]
    return {each.stem: each for each in files}


def find_experiment(name: str) -> Path:
    """Return the file of an experiment: a path, or the name of one of ours.

    Raises:
        RequestError: there is no such file or experiment.
    """
    path = Path(name)
    if path.suffix in YAML or path.is_file():
        return path
    known = our_experiments()
    if name not in known:
        raise unknown("experiment", name, [*known, "FILE.yaml"])
    return known[name]
