"""Numbers read off tables, with their intervals and verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from mechmm.results.statistics import bootstrap_interval
from mechmm.runs.config import Headline
from mechmm.runs.headlines import AGREE, DISAGREE, NONE, HeadlineError, measured, verdict

TABLE = pd.DataFrame(
    {
        "span": ["a", "a", "a", "b"],
        "layer": pd.array([0, 1, 2, None], dtype="Int64"),
        "value": [0.1, 0.3, 0.8, 0.5],
        "random_mean": [0.1, 0.1, 0.1, 0.2],
        "low": [0.0, 0.2, 0.7, 0.4],
        "high": [0.2, 0.4, 0.9, 0.6],
    }
)


def read(**options):
    return measured(Headline("h", "step", "value", **options), TABLE)


def test_a_single_row_has_its_own_interval():
    found = read(where={"span": "a", "layer": 1}, expect="<= 0.35")
    assert (found["value"], found["low"], found["high"]) == (0.3, 0.2, 0.4)
    assert (found["n"], found["agrees"]) == (1, True)
    less = read(where={"span": "b"}, minus="random_mean")
    assert [less[k] for k in ("value", "low", "high")] == pytest.approx([0.3, 0.2, 0.4])
    named = read(where={"span": "b"}, low="random_mean")
    assert (named["low"], named["high"]) == (0.2, 0.6)


def test_several_rows_are_resampled():
    values = np.array([0.1, 0.3, 0.8])
    found = read(where={"span": "a"})
    low, high = bootstrap_interval(values)
    assert found["value"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx((float(low), float(high)))
    middle = read(where={"span": "a"}, statistic="median")
    assert (middle["value"], middle["low"], middle["high"]) == (0.3, 0.1, 0.8)


def test_rows_are_selected_by_comparisons():
    """A missing number fits none."""
    assert read(where={"layer": ">= 1"})["n"] == 2
    assert read(where={"span": "a", "low": "in [0.1, 0.7]"}, statistic="min")["value"] == 0.3
    with pytest.raises(HeadlineError, match="no row with layer = '> 2'"):
        read(where={"layer": "> 2"})


@pytest.mark.parametrize(("statistic", "value"), [("max", 0.8), ("min", 0.1), ("count", 3.0)])
def test_extremes_and_counts_have_no_interval(statistic, value):
    found = read(where={"span": "a"}, statistic=statistic)
    assert (found["value"], found["low"], found["high"]) == (value, None, None)
    one = read(where={"span": "b"}, statistic=statistic)
    assert (one["low"], one["high"]) == (None, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": {"spam": "a"}}, "'step' has no column 'spam'; it has span, layer"),
        ({"where": {"span": "c"}}, "has no row with span = 'c'; there is 'a', 'b'"),
        ({"where": {"span": "b", "layer": 1}}, "has no row that fits all of"),
        ({"minus": "span"}, "has no numbers in column 'span'"),
        ({"low": "lo"}, "has no column 'lo'"),
    ],
)
def test_what_is_not_there_is_named(options, message):
    with pytest.raises(HeadlineError, match=message):
        read(**options)


def test_the_verdict_of_a_run():
    stated = read(where={"span": "b"}, expect="> 0")
    missed = read(where={"span": "b"}, expect="> 1")
    silent = read(where={"span": "b"})
    assert verdict([silent]) == verdict([]) == NONE
    assert verdict([silent, stated]) == AGREE
    assert verdict([stated, missed]) == DISAGREE
