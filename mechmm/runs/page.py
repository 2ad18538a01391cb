"""A run on one page: what was asked and expected, what came out, and how to do it again.

The page holds no time and no memory, so that a run that was taken up again has the same page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.io
from plotly.graph_objects import Figure

from mechmm.data.pairs import PairDataset
from mechmm.methods.attribution import Attribution
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph
from mechmm.results.report import (
    Block,
    Captioned,
    Code,
    Download,
    Facts,
    Folded,
    Number,
    Page,
    Row,
    Section,
)
from mechmm.results.result import Result
from mechmm.runs.folder import load_result
from mechmm.runs.paths import REPORT
from mechmm.runs.said import control_of, expectation, flat, number_text, verdict_of

PASSING = (
    *("started", "seconds", "peak_memory_bytes", "outputs"),
    *("headlines", "verdict", "state", "base"),
)
"""Of a manifest: what is not the same when a run is taken up again, stands elsewhere, or is not yet
known when the page is made."""
SHARE = 0.02
"""Of edges, in the figure of scores of which no later step takes a circuit."""
NONE = "none"
"""How a config writes None."""
_SHOWN = 12


def write(folder: str | Path) -> Path:
    """Make the page of a run and save it in its folder as `report.html`; returns its path."""
    folder = Path(folder)
    return page(folder).save(folder / REPORT)


def page(folder: str | Path) -> Page:
    """The page of a run, from its folder alone.

    Raises:
        FileNotFoundError, ValueError: what the page shows is not in the folder, or is damaged.
    """
    run = _Files(Path(folder))
    config = run.json("resolved.json")
    sections = [
        Section("Prediction and verdict", _verdict(run, config)),
        Section("What was asked", list(_asked(run, config))),
        *(_step(run, config, step) for step in config["steps"]),
        Section("How to do it again", _again()),
        Section("How it was made", _made(run)),
    ]
    return Page(config["name"], config.get("question") or "", sections)


class _Files:
    """The files of a run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.headlines: list[dict[str, Any]] = self.json("headlines.json")

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_bytes())

    def text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else ""

    def csv(self, step: str) -> bytes:
        return (self.folder / "results" / f"{step}.csv").read_bytes()

    def table(self, step: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / "results" / f"{step}.csv")

    def result(self, step: str) -> Result:
        return load_result(self.folder / "results" / step)

    def figures(self, step: str) -> list[Figure]:
        paths = sorted((self.folder / "figures").glob("*.json"))
        own = [path for path in paths if path.stem.rpartition(".")[0] == step]
        return [plotly.io.from_json(path.read_text(encoding="utf-8")) for path in own]


# Parts --------------------------------------------------------------------------------------------


def _verdict(run: _Files, config: Mapping[str, Any]) -> list[Block]:
    """What was expected, and all headlines."""
    predicted = config.get("prediction")
    said = f"Predicted before the run: {predicted}" if predicted else "Nothing was predicted."
    asked = {headline["name"]: headline for headline in config.get("headlines", ())}
    numbers = [_number(run, asked.get(found["name"], {}), found) for found in run.headlines]
    return [said, verdict_of(run.headlines), *([Row(numbers)] if numbers else [])]


def _number(run: _Files, asked: Mapping[str, Any], found: Mapping[str, Any]) -> Number:
    """A headline with its interval, its control, and what was expected."""
    low, high = (number_text(found.get(end)) for end in ("low", "high"))
    known = found.get("low") is not None and found.get("high") is not None
    count = f", over {found['n']} rows" if found.get("n", 1) > 1 else ""
    notes = [
        f"95 % interval {low} to {high}{count}" if known else count.strip(", "),
        control_of(asked, run.table(found["step"])),
        f"expected {expectation(found['expect'])}"
        if found.get("expect")
        else "nothing was expected",
        f"step {found['step']}",
    ]
    said = {True: "agrees", False: "disagrees", None: ""}[found.get("agrees")]
    value = number_text(found["value"])
    return Number(found["name"], value, [n for n in notes if n], said, found.get("agrees"))


def _asked(run: _Files, config: Mapping[str, Any]) -> Iterator[Block]:
    """The sets of pairs, each with its first pair."""
    yield Facts(flat(config["model"], "model"))
    for name, made in config["pairs"].items():
        folder = run.folder / "pairs" / name
        pair, count = PairDataset.peek(folder)
        yield f"{name}: {count} pairs, the first of which is"
        sides = {"clean": (pair.clean, pair.answer), "corrupt": (pair.corrupt, pair.foil)}
        yield Row(
            [
                Captioned(image, f"{side}: {prompt.text} → {answer}")
                for side, (prompt, answer) in sides.items()
                for image in prompt.images
            ]
            or [f"{side}: {prompt.text} → {answer}" for side, (prompt, answer) in sides.items()]
        )
        yield Folded(f"How {name} is made", [Facts(flat(made))])


def _step(run: _Files, config: Mapping[str, Any], step: Mapping[str, Any]) -> Section:
    name, table = step["name"], run.table(step["name"])
    result = run.result(name)
    summary = getattr(result, "summary", None)
    settings = {key: value for key, value in step.items() if key not in ("name", "method")}
    rows = f"{len(table)} rows, {len(table.columns)} columns"
    contents: list[Block] = [
        *([summary()] if summary else []),
        *run.figures(name),
        *_circuits(run, config, result, name),
        table.head(_SHOWN).dropna(axis=1, how="all"),
        Download(f"{name}.csv", run.csv(name), note=rows, elsewhere=f"It is results/{name}.csv."),
        Folded("Settings of this step", [Facts(flat(settings))]),
    ]
    return Section(f"{name}: {step['method']}", contents)


def _circuits(
    run: _Files, config: Mapping[str, Any], result: Result, name: str
) -> Iterator[Figure | str]:
    """Scores as the circuits that later steps take of them, from picture to answer."""
    if isinstance(result, Circuit):
        yield _drawn(run, config, name, result, name)
    if not isinstance(result, Attribution) or not isinstance(result.graph, Graph):
        return
    taken = [
        (f"{name}: the circuit of {step['name']}", sizes)
        for step in config["steps"]
        for sizes in _taken(step, name)
    ]
    for title, sizes in taken or [(f"{name}: the strongest {SHARE:.0%}", {"fraction": SHARE})]:
        yield _drawn(run, config, name, result.circuit(**sizes), title)


def _drawn(
    run: _Files, config: Mapping[str, Any], step: str, circuit: Circuit, title: str
) -> Figure | str:
    own = next(s for s in config["steps"] if s["name"] == step)
    pairs = own.get("pairs") or next(iter(config["pairs"]))
    pair, _ = PairDataset.peek(run.folder / "pairs" / pairs)
    picture = pair.clean.images[0] if pair.clean.images else None
    try:
        return circuit.plot(picture, title=title)
    except ValueError as error:
        return f"{title} is not drawn: {error}."


def _taken(value: Any, step: str) -> Iterator[dict[str, Any]]:
    """What steps say of circuits of a step's scores: `{step, fraction}` and the like."""
    if isinstance(value, Mapping):
        if value.get("step") == step and len(value) > 1:
            said = {key: item for key, item in value.items() if item not in (None, NONE)}
            yield {key: item for key, item in said.items() if key != "step"}
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _taken(item, step)


def _again() -> list[Block]:
    """Commands. They name no file of this run: a stranger may have named it."""
    commands = [
        "mechmm replay DIR    # run it again, and compare every number",
        "mechmm verify DIR    # are the files those that were written?",
        "mechmm run CONFIG seed=1 --out OTHER    # the same question, another seed",
        "mechmm diff DIR OTHER",
    ]
    return [
        "With mechmm installed, where DIR is this run's folder and CONFIG the original config:",
        Code("\n".join(commands)),
    ]


def _made(run: _Files) -> list[Block]:
    manifest = run.json("manifest.json") if (run.folder / "manifest.json").is_file() else {}
    kept = {name: value for name, value in manifest.items() if name not in PASSING}
    said = "Times, memory and the digest of every file are in manifest.json."
    folds: list[Block] = [Folded("Manifest", [Facts(flat(kept)), said])]
    if text := run.text("config.toml"):
        folds.append(Folded("config.toml", [Code(text)]))
    return [*folds, Folded("resolved.json", [Code(run.text("resolved.json"))])]
