"""The command line: fedinit run, report, list."""

import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fedinit.errors import RequestError, unknown

EXPERIMENTS = Path(__file__).parent
WRONG_REQUEST = 2

app = typer.Typer(
    name="fedinit",
    help="How does the initialization of a model change federated learning? "
    "Simulate it, from random or pre-trained weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _one_line(command: Callable[..., Any]) -> Callable[..., Any]:
    """End a wrong request in one line and exit status 2."""

    @wraps(command)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except RequestError as error:
            print(f"fedinit: {error}", file=sys.stderr)
            raise typer.Exit(WRONG_REQUEST) from None

    return checked


@app.command()
@_one_line
def run(
    experiment: Annotated[
        str, typer.Argument(metavar="FILE|NAME", help="An experiment file, or one of ours by name.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a setting: client.lr=0.1; an axis: grid.seed=[0,1]. Repeatable.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Results folder; default: results/NAME-TIME."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue in DIR: runs that are done are kept.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Join a running Ray cluster, e.g. auto.")
    ] = None,
) -> None:
    """Carry out an experiment and write its results, figures and report page.

    Exit status: 0 done; 1 some runs failed, the others are reported; 2 the request was wrong.
    """
    from experiments.progress import Progress
    from experiments.running import run_experiment
    from fedinit.config import load_experiment
    from fedinit.registry import add_to_path
    from fedinit.report import console_table, write_report

    console = Console()
    loaded = load_experiment(find_experiment(experiment), settings or [])
    add_to_path([str(loaded.folder)])
    folder = out or Path("results") / f"{loaded.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    progress = Progress(console, len(loaded.runs))
    summary = run_experiment(loaded, folder, progress, resume, address)
    console.print(console_table(summary))
    console.print(f"report: {write_report(folder)}", markup=False, highlight=False, soft_wrap=True)
    if any(row["status"] != "done" for row in summary["runs"]):
        raise typer.Exit(1)


@app.command()
@_one_line
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A results folder.")],
) -> None:
    """Make the figures and the report page of a results folder again."""
    from fedinit.report import console_table, write_report
    from fedinit.results import read_summary

    console = Console()
    console.print(console_table(read_summary(folder)))
    console.print(f"report: {write_report(folder)}", markup=False, highlight=False, soft_wrap=True)


@app.command(name="list")
@_one_line
def list_names() -> None:
    """Show what an experiment file can name, and what each needs."""
    from experiments.listing import tables

    console = Console()
    for table in tables():
        console.print(table)


def find_experiment(name: str) -> Path:
    """Return the file of an experiment: a path, or the name of one of ours.

    Raises:
        RequestError: there is no such file or experiment.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    known = {each.stem: each for each in EXPERIMENTS.glob("*.yaml")}
    if name not in known:
        raise unknown("experiment", name, [*known, "FILE.yaml"])
    return known[name]
