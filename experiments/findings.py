"""What the studies share: finished runs by task and arm, and how a verdict is worded."""

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedinit import wording
from fedinit.config import Run
from fedinit.drawing import Drawing
from fedinit.figures import draw_figures, label, shorten
from fedinit.results import RunFolder
from fedinit.statistics import Spread, paired_difference

RANDOM, PRETRAINED = "random", "pretrained"
BOTH = (RANDOM, PRETRAINED)
BySeed = dict[int, float]


@dataclass(frozen=True)
class Result:
    """One finished run: its settings, its lines and its folder."""

    run: Run
    rounds: list[dict[str, Any]]
    folder: RunFolder

    @property
    def final_accuracy(self) -> float | None:
        """Test accuracy after the last round, in [0, 1]; None where targets are not labels."""
        return self.rounds[-1]["test_accuracy"]

    @property
    def start(self) -> str:
        """RANDOM or PRETRAINED: whatever is not random was trained before, published or proxy."""
        return RANDOM if self.run.initialization == RANDOM else PRETRAINED

    @property
    def method(self) -> tuple[str, str]:
        """Client and server optimizer."""
        return self.run.client.optimizer, self.run.server.optimizer


def tasks(
    folder: Path, summary: Mapping[str, Any], compared: Iterable[str] = ()
) -> dict[str, list[Result]]:
    """Return the finished runs, grouped by all that a study does not compare.

    Args:
        folder: the results folder.
        summary: its summary.
        compared: the varied keys that the study compares, beside the initialization and the seed.

    Returns:
        Name of a task (data set, and any other varied setting) -> its runs. What has started from
        several weights is as many tasks, which share the runs from random ones.
    """
    keys = _apart(summary, {"initialization", "seed", *compared})
    by_task: dict[str, list[Result]] = {}
    given: dict[str, str] = {}  # initializations as the experiment file has them
    for row in summary["runs"]:
        if row["status"] == "done":
            at = RunFolder(folder / row["run"])
            result = Result(at.run, at.rounds, at)
            start = result.run.initialization
            given[start] = row.get("initialization", start)
            by_task.setdefault(label(row, keys) or result.run.dataset, []).append(result)
    apart: dict[str, list[Result]] = {}
    for task, results in by_task.items():
        others = dict.fromkeys(r.run.initialization for r in results if r.start == PRETRAINED)
        for other in others or [PRETRAINED]:
            name = f"{task} from {shorten(given[other])}" if len(others) > 1 else task
            apart[name] = [r for r in results if r.run.initialization in (RANDOM, other)]
    return apart


def _apart(summary: Mapping[str, Any], own: set[str]) -> list[str]:
    """Return the varied keys that set tasks apart, `own` being what a study compares.

    So does a rate that is varied, but not one that goes with its method (`server: [{optimizer: sgd,
    lr: 1}, {optimizer: adam, lr: 0.01}]`): of an optimizer's settings, and in a section that is
    compared, what follows from the other settings belongs to them.
    """
    sections = {"client", "server", *(key.partition(".")[0] for key in own)}
    keys = [key for key in summary["varied"] if key not in own]
    beside = [key for key in keys if key.partition(".")[0] in sections]
    others = [key for key in summary["varied"] if key not in (*beside, "seed")]

    def follows(key: str) -> bool:
        values: dict[str, set[str]] = {}
        for row in summary["runs"]:
            values.setdefault(str([row[each] for each in others]), set()).add(str(row[key]))
        return all(len(found) == 1 for found in values.values())

    return [key for key in keys if key not in beside or not follows(key)]


def curves(name: str, title: str, folder: Path, summary: dict[str, Any]) -> Drawing:
    """Draw test accuracy by round, a colour for each method and a dash for each initialization."""
    drawn = draw_figures(folder, summary, ["test_accuracy"])
    return replace(drawn[0], name=name, title=title) if drawn else Drawing(name, title, "", "")


def by_arm(
    results: Iterable[Result],
    arm: Callable[[Result], Hashable],
    value: Callable[[Result], float | None],
) -> dict[Any, BySeed]:
    """Return each arm's values by seed; runs without the value are left out."""
    arms: dict[Any, BySeed] = {}
    for result in results:
        if (found := value(result)) is not None:
            arms.setdefault(arm(result), {})[result.run.seed] = found
    return arms


def spread(values: BySeed) -> Spread:
    """Mean and standard deviation over seeds."""
    return Spread.of(list(values.values()))


def change(before: BySeed, after: BySeed) -> str:
    """Write the paired difference of two arms' accuracies, with its confidence interval."""
    difference = paired_difference(before, after)
    if difference is None:
        return "no seed in common"
    if difference.pairs == 1:
        return wording.points(difference.mean)
    return (
        f"{wording.points(difference.mean)}, 95% interval {wording.points(difference.low)} to "
        f"{wording.points(difference.high)} over {difference.pairs} seeds"
    )


def from_both(arms: Mapping[Any, BySeed], *keys: Hashable) -> dict[Any, BySeed]:
    """Return the arms (key, initialization), without keys the initializations, to be compared.

    They have the seeds that all of them have: where a run is missing, as it diverged, its pair says
    nothing. Empty if an arm is missing, or no seed is left.
    """
    wanted: list[Hashable] = [(key, start) for key in keys for start in BOTH] or [*BOTH]
    shared = on_shared_seeds({arm: arms[arm] for arm in wanted if arm in arms})
    return shared if len(shared) == len(wanted) else {}


def paired(results: Iterable[Result], pair: Mapping[Any, BySeed]) -> list[Result]:
    """Return the runs with the seeds of arms that are compared; all if none are."""
    seeds = set().union(*pair.values())
    return [result for result in results if not pair or result.run.seed in seeds]


def on_shared_seeds(arms: Mapping[Any, BySeed]) -> dict[Any, BySeed]:
    """Return arms at the seeds that all of them have; of those without one in common the fewest."""
    kept = dict(arms)
    while kept:
        if seeds := set.intersection(*map(set, kept.values())):
            return {arm: {seed: by[seed] for seed in sorted(seeds)} for arm, by in kept.items()}
        del kept[min(kept, key=lambda arm: len(kept[arm]))]
    return {}


def against(random: BySeed, pretrained: BySeed) -> str:
    """Write two arms' mean accuracies and their paired difference."""
    return (
        f"{wording.share(spread(pretrained).mean)} from pre-trained against "
        f"{wording.share(spread(random).mean)} from random weights ({change(random, pretrained)})"
    )


def verdict(claim: str, found: Mapping[str, tuple[str, bool]]) -> str:
    """Word a study's sentence: its claim, the numbers here, and whether they agree.

    Args:
        claim: what the study finds, to follow "The study finds that".
        found: task -> its numbers in words, and whether they agree with the claim.
    """
    return _worded(
        claim,
        [f"on {task} {numbers}, {_which(agrees)}" for task, (numbers, agrees) in found.items()],
    )


def verdict_on_all(claim: str, found: Mapping[str, str], agrees: bool) -> str:
    """Word the sentence of a claim that is about all tasks together; arguments as `verdict`'s."""
    told = "; ".join(f"on {task} {numbers}" for task, numbers in found.items())
    return _worded(claim, [f"{told}, {_which(agrees)}"] if told else [])


def _which(agrees: bool) -> str:
    return "which agrees" if agrees else "which does not agree"


def _worded(claim: str, told: list[str]) -> str:
    if not told:
        return f"The study finds that {claim}; here there are no finished runs to compare."
    return f"The study finds that {claim}; here, {'; '.join(told)}."
