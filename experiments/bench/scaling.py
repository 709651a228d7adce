"""How a round's cost grows with the cohort and shrinks with the workers."""

from collections.abc import Callable
from typing import Any

from matplotlib.ticker import ScalarFormatter

from experiments.bench.measuring import RAY_GRID, TUNED, measure
from fedinit.config import Run
from fedinit.drawing import Drawing, canvas, colours, to_csv
from fedinit.simulation import Workers

COHORTS = (10, 100, 1000, 10000)
_ROUNDS = 3


def over_cohorts(run: Run, import_path: list[str], note: Callable[[str], None]) -> Drawing:
    """Milliseconds for an update and peak memory of one run with cohorts of 10 to 10,000."""
    rows: list[list[Any]] = []
    with Workers(import_path=import_path) as workers:
        for cohort in COHORTS:
            note(f"a cohort of {cohort}")
            measured = measure(sized(run, cohort), workers, 1, note, with_loops=False)
            timings = measured.contenders[RAY_GRID]
            seconds = timings.round_seconds / cohort
            rows.append([cohort, 1e3 * seconds, timings.peak_bytes / 2**30])
    described = "; ".join(f"{c}: {ms:.1f} ms, {gib:.2f} GiB" for c, ms, gib in rows)
    with canvas(
        "cohorts", 4.4, f"An update's time and peak memory by cohort. {described}"
    ) as drawn:
        time, memory = drawn.panels(2, sharex=True)
        for ax, place, label in ((time, 1, "ms for an update"), (memory, 2, "peak memory, GiB")):
            ax.plot([row[0] for row in rows], [row[place] for row in rows], "o-", clip_on=False)
            ax.set_ylim(bottom=0)
            ax.set_ylabel(label)
        memory.set_xscale("log")
        memory.xaxis.set_major_formatter(ScalarFormatter())
        memory.set_xlabel("clients in a round")
    header = ["cohort", "ms_per_update", "peak_gib"]
    return Drawing("cohorts", "Cost of an update by cohort", drawn.svg, to_csv(header, rows))


def sized(run: Run, cohort: int) -> Run:
    """Return a run of a few rounds with the cohort, of as many clients as the largest has."""
    clients = run.dataset_args | {"clients": max(COHORTS)}
    return run.model_copy(update={"dataset_args": clients, "rounds": _ROUNDS, "cohort": cohort})


def over_workers(run: Run, import_path: list[str], note: Callable[[str], None]) -> Drawing:
    """Updates for a second of one run with one worker, two, and so on, beside the tuned loop's."""
    rows: list[list[Any]] = []
    with Workers() as every:
        most = every.number
    for number in range(1, most + 1):
        note(f"{number} workers")
        with Workers(number, import_path=import_path) as workers:
            found = measure(run, workers, 1, note).contenders
        rows += [
            [number, name, found[name].updates / found[name].round_seconds]
            for name in (RAY_GRID, TUNED)
        ]
    described = "; ".join(f"{name} with {n}: {rate:.0f}" for n, name, rate in rows)
    with canvas("workers", 2.8, f"Updates for a second by workers. {described}") as drawn:
        (ax,) = drawn.panels(1)
        for colour, name in zip(colours(2), (RAY_GRID, TUNED), strict=True):
            points = [(number, rate) for number, each, rate in rows if each == name]
            ax.plot(*zip(*points, strict=True), "o-", color=colour, label=name, clip_on=False)
        ax.set_ylim(bottom=0)
        ax.set_xticks(sorted({number for number, _, _ in rows}))
        ax.set_xlabel("workers")
        ax.set_ylabel("client updates for a second")
        ax.legend()
    header = ["workers", "contender", "updates_per_second"]
    return Drawing("workers", "Speed by workers", drawn.svg, to_csv(header, rows))
