"""How numbers are written in tables and sentences."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedinit.statistics import Difference, Spread

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def cell(value: Any) -> Any:
    """Return what a CSV holds for a value: no text that a spreadsheet would carry out."""
    return f"'{value}" if isinstance(value, str) and value.startswith(tuple("=+-@\t\r")) else value


def left_out(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """Say which of a summary's runs diverged, and that no mean has them; None if none did."""
    diverged = [
        f"{row['run']} in round {row['diverged_in_round']}"
        for row in rows
        if row["status"] == "diverged"
    ]
    if not diverged:
        return None
    many = len(diverged)
    told = f"{many} runs diverged and are" if many > 1 else "1 run diverged and is"
    return f"{told} left out of every mean and figure: {'; '.join(diverged)}."


def share(value: float) -> str:
    """Write a share in percent: 67.9%."""
    return f"{value:.1%}"


def points(value: float) -> str:
    """Write a difference of two shares in percentage points, signed: +5.4 points."""
    return f"{round(100 * value, 1) + 0.0:+.1f} points".replace("-", MINUS)  # there is no -0.0


def number(value: float, sign: str = "") -> str:
    """Write a number in three digits: 2.30."""
    return f"{value:{sign}#.3g}".removesuffix(".").replace("-", MINUS)


def change(value: float) -> str:
    """Write a difference of two numbers in three digits, signed: +0.120."""
    return number(value, "+")


def spread(values: Spread | None, write: Callable[[float], str]) -> str:
    """Write a mean and, over several seeds, its standard deviation: 67.9% +- 1.2%."""
    if values is None:
        return MISSING
    more = f" \N{PLUS-MINUS SIGN} {write(values.deviation)}" if values.count > 1 else ""
    return write(values.mean) + more


def difference(found: Difference | None, write: Callable[[float], str]) -> str:
    """Write a mean difference and, over several pairs, its 95% confidence interval."""
    if found is None:
        return MISSING
    more = f" (95%: {write(found.low)} to {write(found.high)})" if found.pairs > 1 else ""
    return write(found.mean) + more
