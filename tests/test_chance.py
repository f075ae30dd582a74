"""Means and deviations over seeds, as the tables have them."""

import sys

import pytest
from test_readme import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import chance  # noqa: E402


def test_spread_over_seeds():
    """Mean and standard deviation of a sample; a value alone has no deviation that could stand."""
    assert chance.spread([1.0]) == "1.0"
    assert chance.spread([1.0, 2.0]) == "1.5 ± 0.7"  # the square root of 1 / 2
    assert chance.spread([1000, 2000, 3000], ",.0f") == "2,000 ± 1,000"
    assert chance.mean_and_deviation([3]) == (3, 0)
    assert chance.mean_and_deviation([1, 3]) == pytest.approx((2, 2**0.5))
