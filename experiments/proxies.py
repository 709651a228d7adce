"""The proxies that runs start from: checked with the runs, trained before them, once each."""

from collections.abc import Iterable
from pathlib import Path

from experiments.progress import Progress
from experiments.wiring import Datasets, check_together, problem_of, simulation, try_out
from fedinit.config import Run
from fedinit.pretraining import pretrain, proxy_path, proxy_run
from fedinit.problem import build_problem


def check(run: Run, datasets: Datasets) -> None:
    """Check everything that can be wrong with a run, whether or not its proxy is trained.

    Raises:
        RequestError: as `simulation` does; or the proxy's data, model or loss are wrong.
    """
    if run.initialization != "proxy" or proxy_path(run).exists():
        simulation(run, datasets)
        return
    problem = problem_of(run, datasets)
    try_out(run, problem)
    check_together(run, problem)
    like = proxy_run(run)
    try_out(like, build_problem(like, datasets.load(like)))


def train_missing(runs: Iterable[Run], datasets: Datasets, progress: Progress) -> list[Path]:
    """Train each proxy that the runs start from and that is not there yet; return where all are.

    Raises:
        RequestError: a loss is not finite, or a file cannot be written.
    """
    proxies = {proxy_path(run): run for run in runs if run.initialization == "proxy"}
    for path, run in proxies.items():
        if not path.exists():
            label = f"pre-training {run.model} on {run.proxy.dataset}"
            with progress.pretraining(label) as report:
                pretrain(run, datasets.load(proxy_run(run)), report)
    return list(proxies)
