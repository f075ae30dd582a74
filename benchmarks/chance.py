"""How far chance alone goes: means and deviations over seeds, p of paired differences."""

import math
import statistics

import torch


def mean_and_deviation(values):
    """Mean and standard deviation over seeds; one value alone deviates by 0."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), deviation


def spread(values, form=".1f"):
    """Mean ± standard deviation over seeds, as text; of one value the mean alone."""
    texts = [format(number, form) for number in mean_and_deviation(values)]
    return " ± ".join(texts if len(values) > 1 else texts[:1])


def p_value(differences):
    """Two-sided p of the paired t-test: how often chance gives a mean at least as far from 0.

    differences: at least two, one a seed. The test takes them for normally distributed. Student's t
    with n - 1 degrees of freedom is sqrt(n - 1) tan(x), where the density of the angle x goes with
    cos(x)^(n - 2): p is the share of the area under that which lies beyond the observed angle.
    """
    n = len(differences)
    mean, deviation = mean_and_deviation(differences)
    observed = math.atan2(abs(mean) * n**0.5, deviation * (n - 1) ** 0.5)
    return area(observed, n - 2) / area(0.0, n - 2)


def area(first, power):
    """The integral of cos(x)^power from `first` to pi / 2, by 10,000 narrow columns."""
    width = (math.pi / 2 - first) / 10_000
    middles = first + width * (torch.arange(10_000, dtype=torch.float64) + 0.5)
    return width * (middles.cos() ** power).sum().item()


def holm(p_values):
    """{comparison: p} with Holm's correction for how many there are.

    Where all that is below 0.05 after it counts as a difference, the chance that even one of these
    is none is below 0.05.
    """
    corrected = {}
    least = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        least = max(least, (len(p_values) - rank) * p_values[name])
        corrected[name] = min(1.0, least)
    return corrected
