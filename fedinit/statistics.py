"""What several seeds say together: mean and spread, paired differences, agreement of two orders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import mean, stdev

LEVEL = 0.95  # of the confidence intervals


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds; one value has no deviation (nan)."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Summarize at least one value."""
        return cls(mean(values), stdev(values) if len(values) > 1 else nan, len(values))


@dataclass(frozen=True)
class Difference:
    """A mean paired difference and its confidence interval (nan for one pair) over `pairs`."""

    mean: float
    low: float
    high: float
    pairs: int


def paired_difference(before: Mapping[int, float], after: Mapping[int, float]) -> Difference | None:
    """Return after - before, seed by seed: what the seeds share (data, cohorts, head) cancels.

    The interval is Student's, mean +- t s / sqrt(n), with n - 1 degrees of freedom.

    Args:
        before: seed -> value of one arm.
        after: seed -> value of the other.

    Returns:
        The difference over the seeds that both have; None if there is none.
    """
    from scipy.special import stdtrit

    differences = [after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())]
    if not differences:
        return None
    spread = Spread.of(differences)
    degrees = spread.count - 1
    quantile = stdtrit(degrees, (1 + LEVEL) / 2) if degrees else nan
    half = float(quantile) * spread.deviation / sqrt(spread.count)
    return Difference(spread.mean, spread.mean - half, spread.mean + half, spread.count)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b of two scores of the same things: 1 same order, -1 reversed, nan undefined.

    Kendall 1945, "The treatment of ties in ranking problems".
    """
    from scipy.stats import kendalltau

    return float(kendalltau(first, second).statistic)
