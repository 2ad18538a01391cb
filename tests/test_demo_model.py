"""The shipped demo model knows what its card says, and the demo runs as a newcomer runs it."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import mechmm as mm
from mechmm.data.questions import KINDS, TWO_HOPS
from mechmm.zoo.evaluation import evaluate

FOLDER = files("mechmm") / "zoo" / "demo"


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


def test_it_is_small_enough_to_ship():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 15e6


def test_accuracy_on_scenes_never_seen(model):
    table = evaluate(model, n=120, seed=7)
    fresh = table[table["about"] == "fresh scenes"]
    assert set(fresh["kind"]) == set(KINDS) - set(TWO_HOPS)
    assert set(fresh["form"]) == {"image", "text"}
    digits = table[table["about"] == "every test digit"]
    # The card's bar of .97 less twice the standard error of 120 questions.
    assert (fresh["accuracy"] >= 0.94).all(), fresh
    assert (digits["accuracy"] >= 0.95).all()
    assert (digits["n"] == 360).all()


def test_no_hook_is_dead(model):
    pair = next(mm.data.shapes.color_pairs(model, n=1).batches(1))
    found = mm.audit(model, pair.clean)
    assert found.dead == []


def test_the_demo_writes_its_page(tmp_path):
    mechmm = Path(sys.executable).with_name("mechmm")
    done = subprocess.run([mechmm, "demo", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "report.html").read_text()
    assert "What color is the circle?" in page
    assert "vision layer 0" in page
