"""Make the figures of the pages in `docs/methods/`, on the demo model.

    python docs/figures.py                   all but the next one, about five minutes on one core
    python docs/figures.py over_checkpoints  needs a training run: see that page
    python docs/figures.py patching probe    some, by page

Every figure is what the method's own `plot()` draws. Needs the extra `static` (kaleido) and a
Chromium; writes `docs/images/PAGE.png`, with 256 colors, which keeps the files small.

A new page: a function that returns its figure, and a line in `FIGURES`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from pandas import DataFrame, concat
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor

import mechmm as mm
from mechmm.data import corruption, shapes
from mechmm.results import plots
from mechmm.results.plots import save_png
from mechmm.testing import tiny

IMAGES = Path(__file__).parent / "images"
HISTORY = Path("trained/history")
RANDOM = "random circuits"
SHARE = 0.05
"""Of the edges, in a circuit."""


@cache
def demo() -> mm.HookedMultimodal:
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


def colors(n: int = 24, seed: int = 3) -> mm.PairDataset:
    return shapes.color_pairs(demo(), n, seed=seed)


def ablate_tokens() -> Figure:
    return mm.ablate_tokens(demo(), colors(48, 0)).plot()["tokens"]


def acdc() -> Figure:
    return mm.acdc(demo(), colors(2), threshold=1.0).plot()["edges"]


def attention() -> Figure:
    return mm.attention_maps(demo(), colors(32, 0)).plot()["coverage"]


def back_patch() -> Figure:
    pairs = shapes.pairs(demo(), "beside", 48, seed=3)
    return mm.back_patch(demo(), pairs, n_null=3).plot()["held out"]


def cascade() -> Figure:
    found = mm.input_attribution(demo(), colors(6, 0), "grad-cam", cascade=True)
    return found.plot()["cascade"]


def circuits() -> Figure:
    scores = mm.attribute(demo(), colors(16), method="eap-ig-inputs", steps=5)
    return mm.faithfulness_curve(demo(), colors(16, 99), scores).plot()["curve"]


def cka() -> Figure:
    return mm.cka(demo(), colors(), mm.sites.residual(demo(), ["image"])).plot()


def dictionary() -> Figure:
    site = mm.sites.named(demo(), "vision.blocks.2.hook_resid_post", ["image"])
    sae = mm.train_sae(demo(), colors(32, 0), site, d_sae=128, k=8, steps=150)
    found = mm.dictionary(demo(), colors(12, 1), sae, span="image", fit=colors(32, 0))
    return found.plot()["features"]


def deletion_insertion() -> Figure:
    scores = mm.input_attribution(demo(), colors(6, 0), "occlusion", untrained=False)
    found = mm.deletion_insertion(demo(), colors(6, 0), scores.image_scores(), n_random=3)
    return found.plot()["deletion"]


def direct_logit_attribution() -> Figure:
    found = mm.direct_logit_attribution(demo(), colors(), spans=("object", "image", "question"))
    return found.plot()["strongest"]


def dissection() -> Figure:
    concepts = shapes.concepts(shapes.scenes("color", 96, seed=0))
    return mm.dissection(demo(), colors(96, 0), concepts).plot()["units"]


def early_exit() -> Figure:
    return mm.early_exit(demo(), shapes.pairs(demo(), "where", 48, seed=3)).plot()["agreement"]


def emap() -> Figure:
    return mm.emap(demo(), colors(32, 0)).plot()["accuracy"]


def hallucination() -> Figure:
    blur, spans = corruption.on_images(corruption.blur, radius=2.5), ("object", "image")
    asked = [replace(p, clean=blur(p.clean)) for p in shapes.prior_pairs(demo(), 48, seed=0)]
    unseen = corruption.on_images(corruption.blur, radius=10)
    pairs = mm.PairDataset(asked, demo())
    found = mm.hallucination(demo(), pairs, unseen, spans=spans, beta=1e-3, scale=8)
    return found.plot()["signals"]


def input_attribution() -> Figure:
    return mm.input_attribution(demo(), colors(6, 0), "occlusion").plot()["mass"]


def interchange() -> Figure:
    def forms(seed: int) -> list[mm.PairDataset]:
        options = {"seed": seed, "spans": "data"}
        return [shapes.pairs(demo(), "color", 8, form=f, **options) for f in ("image", "text")]

    spans = ("data", "last", "question")
    scores = [mm.attribute(demo(), pairs, spans=spans) for pairs in forms(3)]
    found = mm.interchange(demo(), *forms(99), *(s.circuit(fraction=0.02) for s in scores))
    return found.plot()["image"]


def knockout() -> Figure:
    routes = [*mm.mediation(), "object->question", "distractor->question"]
    found = mm.knockout(demo(), colors(16), routes, window=2, metric=mm.accuracy, n_null=2)
    return found.plot()["language"]


def latent_lens() -> Figure:
    texts = [p.clean.text for p in shapes.color_pairs(demo(), 48, seed=11, form="text")]
    return mm.latent_lens(demo(), colors(16), mm.latent_bank(demo(), texts)).plot()["spans"]


def logit_lens() -> Figure:
    return mm.logit_lens(demo(), colors(8)).plot()["tokens"]


def modality_gap() -> Figure:
    return mm.modality_gap(demo(), colors(16, 0)).plot()["closed"]


def modality_shares() -> Figure:
    return mm.modality_shares(demo(), colors(8, 0), n_orders=2).plot()["shares"]


def neurons() -> Figure:
    pairs = shapes.pairs(demo(), "same", 32, seed=0)
    return mm.neuron_attribution(demo(), pairs, span="last").plot()["ablation"]


def patching() -> Figure:
    sites = mm.sites.residual(demo(), ["object", "distractor", "question", "last"])
    return mm.patch(demo(), colors(16), sites).plot()["resid_pre"]


def probe() -> Figure:
    sites = mm.sites.residual(demo(), ["last"], towers=["language"])
    return mm.probe(demo(), colors(80, 0), "answer", sites).plot()["erased"]


def pruning() -> Figure:
    return mm.pruning_curve(demo(), colors(32, 0), layer=0, n_random=2).plot()["most"]


def steering() -> Figure:
    site = mm.sites.residual(demo(), ("last",), towers=["language"], layers=[0, 1, 2, 3])
    return mm.steering(demo(), colors(64, 0), site, n_random=3).plot()["steering"]


def subspace_interchange() -> Figure:
    options = {"rank": 8, "epochs": 8, "lr": 3e-2}
    found = mm.subspace_interchange(demo(), colors(24), "blocks.3.hook_resid_pre", **options)
    return found.plot()["accuracy"]


def text_span() -> Figure:
    """On a tiny CLIP with random weights: the demo model is no dual encoder."""
    scenes = shapes.scenes("shape", 24, seed=0)
    texts = {
        "color": ["red", "blue", "green", "yellow"],
        "shape": ["circle", "square", "star", "ring"],
    }
    return mm.text_span(tiny("clip"), [scene.render() for scene in scenes], texts).plot()[
        "variance"
    ]


def over_checkpoints() -> Figure:
    """Of a training run, which takes about twenty minutes and is made beforehand."""
    if not HISTORY.is_dir():
        sys.exit(f"no {HISTORY}; make it: mechmm zoo train --out {HISTORY.parent} --phases 2")
    table = forming([*sorted(HISTORY.iterdir()), "mechmm/demo"])
    print(table.round(3).to_string(), flush=True)
    return formed(table)


def formed(table: DataFrame) -> Figure:
    """A line for each measure; the untrained model is the first checkpoint already."""
    table = table[table["checkpoint"] != "untrained"].dropna(subset="value")
    names = table["checkpoint"].unique().tolist()
    table = table.assign(x=table["checkpoint"].map(names.index), name=table["checkpoint"])
    null = table[table["measure"] == RANDOM]
    series = {str(m): rows for m, rows in table.groupby("measure", sort=False) if m != RANDOM}
    steps = ", ".join(f"{i}: {name.lstrip('0123456789-')}" for i, name in enumerate(names))
    extra = {"x_title": "checkpoint", "y_title": "share", "null_title": f"f of {RANDOM}"}
    title = "how the circuit for the color of a thing forms"
    return plots.lines(series, title, steps, null=null, **extra)


def forming(checkpoints: list[Path | str]) -> DataFrame:
    """Over training: how often the answer beats the foil, what the strongest edges have in common
    with those in the end, and how much of what the model does they do alone."""

    def attribution(model: mm.HookedMultimodal) -> mm.Attribution:
        pairs = shapes.color_pairs(model, 16, seed=0)
        return mm.attribute(model, pairs, method="eap-ig-inputs")

    def alone(model: mm.HookedMultimodal) -> mm.Faithfulness:
        pairs = shapes.color_pairs(model, 16, seed=99)
        return mm.faithfulness(model, pairs, next(scores).circuit(fraction=SHARE), n_random=5)

    found = mm.over_checkpoints(attribution, checkpoints)
    last, scores = found.results[-2].circuit(fraction=SHARE), iter(found.results)
    faithful = mm.over_checkpoints(alone, checkpoints)
    edges = {
        "answer beats foil": lambda own: own.clean > 0,
        "edges shared with the end": lambda own: shared(own.circuit(fraction=SHARE), last),
    }
    runs = {"f of these edges": lambda own: shares(own)[0], RANDOM: lambda own: shares(own)[1]}
    table = concat([found.measured(edges), faithful.measured(runs)], ignore_index=True)
    return table


def shared(circuit: mm.Circuit, other: mm.Circuit) -> float:
    """Intersection over union."""
    return float(circuit.overlap(other)["iou"].iloc[0])


def shares(found: mm.Faithfulness) -> tuple[Tensor, Tensor]:
    """f of the circuit and of the random ones, by example; NaN where there is too little to be
    faithful to."""
    whole = (found.full - found.empty).mean()
    values = (found.values - found.empty) / (whole if whole > 0.5 else torch.nan)
    return values[0], values[1:].mean(0)


def tuned_lens() -> Figure:
    return mm.tuned_lens(demo(), colors(48, 11), steps=150, rate=3e-3).plot()


FIGURES: dict[str, Callable[[], Figure]] = {
    "ablate_tokens": ablate_tokens,
    "acdc": acdc,
    "attention": attention,
    "back_patch": back_patch,
    "cascade": cascade,
    "circuits": circuits,
    "cka": cka,
    "deletion_insertion": deletion_insertion,
    "dictionary": dictionary,
    "direct_logit_attribution": direct_logit_attribution,
    "dissection": dissection,
    "early_exit": early_exit,
    "emap": emap,
    "hallucination": hallucination,
    "input_attribution": input_attribution,
    "interchange": interchange,
    "knockout": knockout,
    "latent_lens": latent_lens,
    "logit_lens": logit_lens,
    "modality_gap": modality_gap,
    "modality_shares": modality_shares,
    "neurons": neurons,
    "over_checkpoints": over_checkpoints,
    "patching": patching,
    "probe": probe,
    "pruning": pruning,
    "steering": steering,
    "subspace_interchange": subspace_interchange,
    "text_span": text_span,
    "tuned_lens": tuned_lens,
}
"""Page of `docs/methods/`, or a second figure of one -> what draws it."""


def draw(page: str) -> None:
    """Write one page's figure."""
    started = time.monotonic()
    path = save_png(FIGURES[page](), IMAGES / f"{page}.png", scale=1)
    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)
    size, seconds = path.stat().st_size / 1000, time.monotonic() - started
    print(f"{page}: {few.width} x {few.height}, {size:.0f} kB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pages = sys.argv[1:] or [page for page in FIGURES if page != "over_checkpoints"]
    if unknown := set(pages) - set(FIGURES):
        sys.exit(f"no figure is made for {', '.join(sorted(unknown))}; give {', '.join(FIGURES)}")
    for page in pages:
        draw(page)
