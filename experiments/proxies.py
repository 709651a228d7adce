"""The proxies that runs start from: checked with the runs, trained before them, once each."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from experiments.progress import Progress
from experiments.trying_out import try_out
from experiments.wiring import Datasets, simulation
from fedinit.config import Run
from fedinit.errors import RequestError
from fedinit.initialization import Weights
from fedinit.locking import locked
from fedinit.pretraining import pretrain, proxy_path, proxy_run, weights_of
from fedinit.problem import build_problem


def check(run: Run, datasets: Datasets) -> None:
    """Check everything that can be wrong with a run, whether or not its proxy is trained.

    Raises:
        RequestError: as `simulation` does; or the proxy's data, model or loss are wrong.
    """
    weights = None
    if run.initialization == "proxy" and not proxy_path(run).exists():
        like = proxy_run(run)
        proxy = build_problem(like, datasets.load(like))
        try_out(like, proxy)
        weights = Weights(weights_of(proxy), f"proxy ({run.proxy.dataset})")
    simulation(run, datasets, weights)


def train_missing(runs: Iterable[Run], datasets: Datasets, progress: Progress) -> list[Path]:
    """Train each proxy that the runs start from and that is not there yet; return where all are.

    Of several processes that want the same proxy one trains it, and the others wait.

    Raises:
        RequestError: a loss is not finite, or a file cannot be written.
    """
    proxies = {proxy_path(run): run for run in runs if run.initialization == "proxy"}
    for path, run in proxies.items():
        if path.exists():
            continue
        label = f"pre-training {run.model} on {run.proxy.dataset}"
        with _alone(path, partial(progress.note, f"{label}: another fedinit does it; waiting")):
            if not path.exists():
                with progress.pretraining(label) as report:
                    pretrain(run, datasets.load(proxy_run(run)), report)
    return list(proxies)


def lock_of(path: Path) -> Path:
    """Return the lock of a file of the cache, in a folder of its own: the cache holds weights."""
    return path.parent.parent / "locks" / path.with_suffix(".lock").name


@contextmanager
def _alone(path: Path, taken: Callable[[], None]) -> Iterator[None]:
    """Be the one process that writes a file of the cache."""
    with ExitStack() as stack:
        try:
            lock = lock_of(path)
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(lock, taken))
        except OSError as error:
            raise RequestError(f"proxy: cannot write {path}: {error.strerror}") from None
        yield
