"""How long work shows itself: a live bar in a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

Report = Callable[[dict[str, Any]], None]


class Progress:
    """Shows an experiment's runs on a console."""

    def __init__(self, console: Console, runs: int) -> None:
        self._console = console
        self._runs = runs
        self._begun = 0

    @contextmanager
    def run(self, label: str, rounds: int, initialization: str) -> Iterator[Report]:
        """Show one run; the yielded function takes each round's line."""
        self._begin(label)
        self._say(f"  {initialization}")
        if self._console.is_terminal:
            with self._bar("round") as bar:
                task = bar.add_task("", total=rounds, score="")
                yield lambda line: self._live(line, bar, task)
        else:
            ends: list[float] = []
            yield lambda line: self._plain(line, rounds, ends)

    @contextmanager
    def arm(self, label: str, trials: int) -> Iterator[Callable[[int, str], None]]:
        """Show one arm's search; the yielded function takes each trial's number and outcome."""
        self._begin(label)
        if self._console.is_terminal:
            with self._bar("trial") as bar:
                task = bar.add_task("", total=trials, score="")
                yield lambda done, text: bar.update(task, completed=done, score=text)
        else:
            yield lambda done, text: self._say(f"  trial {done}/{trials}  {text}")

    @contextmanager
    def pretraining(self, label: str) -> Iterator[Callable[[int, int, float], None]]:
        """Show a proxy's training; the yielded function takes steps done, all steps, the loss."""
        self._say(label)
        if self._console.is_terminal:
            with self._bar("step") as bar:
                task = bar.add_task("", total=None, score="")
                yield lambda done, steps, loss: bar.update(
                    task, completed=done, total=steps, score=f"loss {loss:.4g}"
                )
        else:
            yield self._plain_step

    def note(self, text: str) -> None:
        """Say what is going on."""
        self._say(text)

    def ended(self, label: str, status: str, reason: str) -> None:
        """Say that a run failed or diverged, and why."""
        self._console.print(f"[red]{status}[/] {escape(label)}: {escape(reason)}", highlight=False)

    def _begin(self, label: str) -> None:
        self._begun += 1
        self._say(f"[{self._begun}/{self._runs}] {label}")

    def _bar(self, unit: str) -> Bar:
        return Bar(
            TextColumn(f"  {unit}"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[score]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )

    @staticmethod
    def _live(line: dict[str, Any], bar: Bar, task: TaskID) -> None:
        bar.update(task, completed=line["round"])
        if line["test_loss"] is not None:
            bar.update(task, score=_score(line))

    def _plain(self, line: dict[str, Any], rounds: int, ends: list[float]) -> None:
        """Say how x scores; `ends` are the times at which rounds were shown, this one's included.

        What comes before the second tells nothing: round 0 trains nothing, and the first that does
        warms up.
        """
        ends.append(time.perf_counter())
        if line["test_loss"] is None:
            return
        done, timed = line["round"], len(ends) - 2
        text = f"  round {done}/{rounds}  {_score(line)}"
        if timed > 0:
            text += f"  {(ends[-1] - ends[1]) / timed * (rounds - done):.0f} s left"
        self._say(text)

    def _plain_step(self, done: int, steps: int, loss: float) -> None:
        if done * 10 // steps > (done - 1) * 10 // steps:  # a line for each tenth
            self._say(f"  step {done}/{steps}  loss {loss:.4g}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def _score(line: dict[str, Any]) -> str:
    accuracy = line["test_accuracy"]
    text = "" if accuracy is None else f"accuracy {accuracy:.1%}  "
    return f"{text}loss {line['test_loss']:.4g}"
