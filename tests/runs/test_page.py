"""The page of a run says what was asked, expected and found, from the run's folder alone."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pandas as pd
import pytest

from mechmm.runs.folder import Run
from mechmm.runs.page import page, write
from mechmm.runs.runner import run
from mechmm.runs.said import control_of, number_text, verdict_of

CONFIG = """
format = 1
name = "tokens"
question = "Does <script>alert(1)</script> it need them?"
prediction = "It does."

[model]
name = "mechmm/demo"

[pairs.color]
make = "shapes.pairs"
kind = "color"
n = 3

[[steps]]
name = "objects"
method = "ablate_tokens"
spans = ["object"]
n_random = 2

[[steps]]
name = "scores"
method = "attribute"

[[steps]]
name = "faithful"
method = "faithfulness"
circuit = { step = "scores", n = 30 }
n_random = 2

[[headlines]]
name = "accuracy without it"
step = "objects"
column = "value"
where = { span = "object" }
expect = "<= 2"

[[headlines]]
name = "faithfulness"
step = "faithful"
column = "faithfulness"
where = { null = false }
expect = ">= 7"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    (base / "config.toml").write_text(CONFIG)
    run(base / "config.toml", base / "out")
    return base / "out"


def text_of(html: str) -> str:
    bare = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", bare)).split())


def test_it_says_what_was_asked_expected_and_found(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    text = text_of(html)
    assert len(html) < 5_000_000
    assert "Does <script>alert(1)</script> it need them?" in text
    assert "Predicted before the run: It does." in text
    assert "disagrees with the prediction. 1 of 2 headlines agree, not: faithfulness." in text
    for found in json.loads((folder / "headlines.json").read_text()):
        assert f"{found['name']} {number_text(found['value'])} 95 % interval" in text
    assert "expected ≤ 2" in text
    assert "control (random): " in text
    assert "control (null): " in text
    assert "mechmm replay DIR" in text
    assert text.count("→") == 2, "the first pair, clean and corrupt"


def test_every_figure_and_the_circuit_are_on_it(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    count = len(list((folder / "figures").glob("*.json")))
    assert html.count('class="drawing"') == count + 1
    assert "scores: the circuit of faithful: " in text_of(html)


def test_every_table_can_be_taken_from_it(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    links = dict(re.findall(r'<a download="([^"]+)" href="data:[^,"]+,([^"]+)">', html))
    assert set(links) == {"objects.csv", "scores.csv.gz", "faithful.csv"}
    for name, data in links.items():
        packed = "gzip" if name.endswith(".gz") else None
        found = pd.read_csv(io.BytesIO(base64.b64decode(data)), compression=packed)
        own = pd.read_csv(folder / "results" / name.removesuffix(".gz"))
        pd.testing.assert_frame_equal(found, own)


def test_it_comes_out_the_same_from_the_folder_alone(folder: Path, tmp_path: Path) -> None:
    first = (folder / "report.html").read_bytes()
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest |= {"started": "2030", "seconds": 1e6, "peak_memory_bytes": 1}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    assert write(moved).read_bytes() == first


def test_no_path_of_the_machine_is_on_it(folder: Path) -> None:
    assert str(folder.parent) not in (folder / "report.html").read_text()


def test_a_figure_that_a_stranger_made_is_shown_and_does_not_run(
    folder: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "odd"
    shutil.copytree(folder, moved)
    odd = {"data": [{"type": "bar", "x": ["</script><script>alert(1)</script>"], "y": [1]}]}
    (moved / "figures" / "objects.odd.json").write_text(json.dumps(odd))
    html = page(moved).html()
    assert html.count('class="drawing"') == 1 + (folder / "report.html").read_text().count(
        'class="drawing"'
    )
    assert "<script>alert" not in html


def test_a_notebook_shows_a_run_with_its_headlines(folder: Path) -> None:
    shown = Run.open(folder)._repr_html_()
    assert "<b>Run tokens</b> (finished)" in shown
    assert "accuracy without it" in shown
    assert "<script" not in shown


@pytest.mark.parametrize(
    ("agrees", "said"),
    [
        ([None], "none, as no headline says"),
        ([True, None, True], "agrees with the prediction, in all of 2"),
        ([True, False], "disagrees with the prediction. 1 of 2 headlines agree, not: 1"),
        ([], "none, as no headline says"),
    ],
)
def test_verdicts(agrees: list[bool | None], said: str) -> None:
    assert said in verdict_of([{"name": str(i), "agrees": a} for i, a in enumerate(agrees)])


def test_controls_are_of_the_same_rows() -> None:
    table = pd.DataFrame(
        {
            "span": ["a", "b"],
            "value": [1.0, 2.0],
            "drop": [0.5, 0.5],
            "random_mean": [0.25, 9],
            "random_low": [0.1, 9],
            "random_high": [0.4, 9],
            "drop_null_low": [-1.0, 9],
            "drop_null_high": [1.0, 9],
        }
    )
    row = {"where": {"span": "a"}}
    assert (
        control_of({**row, "column": "value"}, table) == "control (random): 0.250 (0.100 to 0.400)"
    )
    assert control_of({**row, "column": "drop"}, table) == "control (null): -1 to 1"
    assert control_of({"column": "value"}, table) == "", "two rows"
    nulls = pd.DataFrame({"null": [False, True, True], "f": [1.0, 0.5, 0.25]})
    said = control_of({"where": {"null": False}, "column": "f"}, nulls)
    assert said == "control (null): 0.375 (0.250 to 0.500)"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.25, "0.250"), (1.0, "1"), (12.3456, "12.35"), (1e-5, "1.00e-05"), (None, "none")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number_text(value) == text
