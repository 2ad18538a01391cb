"""What `make demo` runs: ask the demo model about a picture, patch both towers, write one page."""

from __future__ import annotations

import time
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch
import transformers
from rich.console import Console

from mechmm.data import shapes
from mechmm.data.digits import with_label
from mechmm.data.pairs import PairDataset
from mechmm.data.questions import Question
from mechmm.data.scenes import Scene, Thing
from mechmm.data.shapes import prompt
from mechmm.engine import sites
from mechmm.methods.patching import Patching, patch
from mechmm.model.hooked import DEMO, HookedMultimodal
from mechmm.model.layout import BUILT_IN
from mechmm.results.report import Captioned, Page, Row, Section
from mechmm.runs.patch import SHOWN
from mechmm.runs.terminal import print_table, progress
from mechmm.zoo.evaluation import predictions

N_PAIRS, N_NULL = 24, 12
SPANS = ("object", "distractor", "question", "last")
SCENE = Scene(
    (
        Thing(5, "circle", "red", shift=(0.02, 0.0)),
        Thing(3, "star", "blue", scale=0.9),
        Thing(12, "square", "green", scale=0.8),
        Thing(10, digit=with_label("7", "test")[7], scale=0.95),
    )
)
"""The picture of the demo: three shapes and a handwritten 7 that training never showed."""
QUESTIONS = (
    Question("color", ("circle",)),
    Question("shape", ("blue",)),
    Question("where", ("star",)),
    Question("cell", ("a4",)),
    Question("count", ("green",)),
    Question("same", ("circle", "star")),
    Question("horizontal", ("circle", "star")),
    Question("vertical", ("circle", "square")),
    Question("digit"),
)


def demonstrate(out: Path) -> Path:
    """Run the demo and write `out/report.html`; returns its path."""
    console, started = Console(), time.monotonic()
    model = HookedMultimodal.from_pretrained(DEMO)
    console.print(f"{model!r}\n", highlight=False)
    answers = ask(model)
    print_table(answers, "What the model answers", console)
    color = patch_kind(model, "color", SCENE.replace(0, color="purple"))
    _print_strongest(color[0], "the color of a shape", console)
    other = SCENE.replace(3, digit=with_label("2", "test")[0])
    digit = patch_kind(model, "digit", other)
    _print_strongest(digit[0], "a handwritten digit", console)
    path = _page(model, answers, color, digit).save(out / "report.html")
    console.print(f"\n{time.monotonic() - started:.0f} s; open the report: {path}", highlight=False)
    return path


def _print_strongest(found: Patching, what: str, console: Console) -> None:
    """Where in the residual stream, and which components; all beside their random sites."""
    for kinds, name in ((["resid_pre"], "Residual stream"), (["head", "mlp"], "Heads and MLPs")):
        table = found.strongest(6, kinds)[SHOWN]
        print_table(table, f"{name}: strongest sites for {what}", console)


def ask(model: HookedMultimodal) -> pd.DataFrame:
    """Every question of the demo about the picture, and about the same scene in words."""
    texts = [prompt(question) for question in QUESTIONS]
    words = [prompt(question, SCENE) for question in QUESTIONS]
    picture = SCENE.render()
    return pd.DataFrame(
        {
            "question": [question.text for question in QUESTIONS],
            "right answer": [question.answer(SCENE) for question in QUESTIONS],
            "from the picture": predictions(model, texts, [picture] * len(texts)),
            "from a description": predictions(model, words, []),
        }
    )


def patch_kind(model: HookedMultimodal, kind: str, corrupt: Scene) -> tuple[Patching, Patching]:
    """Denoise both towers: by layer, span and head over random pairs, and by single patch on the
    demo's own picture."""
    about = next(question for question in QUESTIONS if question.kind == kind)
    own = PairDataset([shapes.scene_pair(model, SCENE, corrupt, about)], model)
    random = shapes.pairs(model, kind, N_PAIRS, seed=0)
    spans = [span for span in SPANS if span in (*BUILT_IN, *random.spans)]
    coarse = sites.residual(model, spans) + sites.mlps(model) + sites.heads(model)
    with progress(f"patching {kind}: layers, spans, heads") as report:
        found = patch(model, random, coarse, n_null=N_NULL, report=report)
    with progress(f"patching {kind}: every patch") as report:
        return found, patch(model, own, sites.patches(model), n_null=1, report=report)


def _page(model, answers: pd.DataFrame, color, digit) -> Page:
    picture = Captioned(SCENE.render(), "96 x 96 pixels, 8 x 8 patches; the 7 is a test digit")
    summary = (
        "The demo model, a small LLaVA, looks at a picture and answers questions about it. Then "
        "single activations of a run on a changed picture are set to what they were on this one "
        "(denoising). Where that brings the answer back, the answer is carried."
    )
    sections = [
        Section("What the model sees and answers", [Row([picture, answers])]),
        _section("What color is the circle?", "the circle turns purple", *color),
        _section("What digit is shown?", "another handwritten digit takes the 7's place", *digit),
    ]
    facts = {
        "model": DEMO,
        "pairs": f"{N_PAIRS} random minimal pairs per question, seed 0",
        "mechmm": version("mechmm"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "command": "mechmm demo",
    }
    return Page("From pixel to answer", summary, sections, facts)


def _section(heading: str, change: str, coarse: Patching, fine: Patching) -> Section:
    figures = coarse.plot()
    return Section(
        heading,
        [
            f"One picture: {change}. Every single patch, layer by layer.",
            fine.overlay(),
            f"{len(coarse.clean)} random pairs that differ in the same way. " + coarse.summary(),
            figures["resid_pre"],
            figures["heads"],
            figures["strongest"],
        ],
    )
