"""Distorted clean pictures, headlines of other tables, and headlines without interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mechmm as mm
from mechmm.data import corruption, shapes
from mechmm.runs.config import load
from mechmm.runs.place import ConfigError
from mechmm.runs.terminal import print_table

CONFIG = """
name = "dim"
[model]
name = "mechmm/demo"
[pairs.dim]
make = "shapes.prior_pairs"
n = 3
clean = { kind = "blur", radius = 2.5 }
[[steps]]
name = "ways"
method = "mediation"
n_null = 1
[[headlines]]
name = "joint"
step = "ways"
table = "paths"
column = "joint"
low = ""
high = ""
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dim")
    (folder / "dim.toml").write_text(CONFIG)
    return mm.runs.run(folder / "dim.toml", folder / "out")


def test_clean_pictures_are_distorted_and_corrupt_ones_are_not(found):
    model = mm.HookedMultimodal.from_pretrained("mechmm/demo")
    sharp = shapes.prior_pairs(model, 3, seed=0)
    dim = mm.PairDataset.load(found.folder / "pairs" / "dim", model)
    for one, other in zip(sharp, dim, strict=True):
        (own,), (theirs,) = one.clean.images, other.clean.images
        assert np.array_equal(corruption.blur(own, radius=2.5), theirs)
        assert not np.array_equal(own, theirs)
        assert np.array_equal(one.corrupt.images[0], other.corrupt.images[0])
        assert (one.answer, one.foil, one.spans) == (other.answer, other.foil, other.spans)


def test_a_headline_of_another_table(found):
    (row,) = found.headlines.to_dict("records")
    assert row["value"] == pytest.approx(found.result("ways").paths()["joint"].item(), abs=1e-9)
    assert row["low"] is None
    assert row["high"] is None


def test_a_run_keeps_how_it_was_made(found):
    resolved = found.config
    assert resolved.pairs["dim"].clean == {"kind": "blur", "radius": 2.5}
    assert resolved.headlines[0].table == "paths"


@pytest.mark.parametrize(
    ("old", "new", "error", "message"),
    [
        ('"blur"', '"blurr"', ConfigError, "pairs.dim.clean.kind: .*did you mean"),
        ('"paths"', '"to_csv"', ConfigError, r"headlines\[0\].table: .*paths"),
        ('"paths"', '"predictors"', ConfigError, "unknown table 'predictors'; use one of .*paths"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, old, new, error, message):
    (tmp_path / "dim.toml").write_text(CONFIG.replace(old, new))
    with pytest.raises(error, match=message):
        mm.runs.run(load(tmp_path / "dim.toml"), tmp_path / "out")


def test_the_terminal_shows_texts_as_they_are(capsys):
    table = pd.DataFrame({"[/a]": ["[/x] [bold]b", "c"]})
    print_table(table, "[/t]")
    said = capsys.readouterr().out
    assert all(text in said for text in ("[/a]", "[/x] [bold]b", "[/t]"))
