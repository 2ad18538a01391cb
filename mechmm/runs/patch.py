"""One patching run from folders: pairs in, numbers and a report out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechmm.data.metrics import METRICS
from mechmm.data.pairs import PairDataset
from mechmm.engine import sites as places
from mechmm.engine.sites import Sites
from mechmm.methods.patching import SOURCES, Patching, patch
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs.terminal import print_table, progress

SITES = ("residual", "attention", "mlps", "heads", "patches", "projector")
SHOWN = ["label", "effect", "low", "high", "null_low", "null_high"]


def make_sites(model: HookedMultimodal, names: Sequence[str], spans: Sequence[str]) -> Sites:
    """The table of sites for names of `SITES`.

    Raises:
        ValueError: for an unknown name, with those there are.
    """
    unknown = [name for name in names if name not in SITES]
    if unknown or not names:
        raise ValueError(f"unknown sites {unknown or 'none'}; use {', '.join(SITES)}")
    with_spans = {"residual": places.residual, "attention": places.attention, "mlps": places.mlps}
    whole = {"heads": places.heads, "patches": places.patches, "projector": places.projector}
    found = [with_spans[n](model, spans) if n in with_spans else whole[n](model) for n in names]
    return sum(found[1:], found[0])


def patch_folder(
    model: HookedMultimodal,
    pairs: Path,
    out: Path,
    sites: Sequence[str] = ("residual", "heads"),
    spans: Sequence[str] = ("image", "question", "last"),
    metric: str = "logit_diff",
    direction: str = "denoise",
    seed: int = 0,
    quiet: bool = False,
) -> Patching:
    """Patch the pairs of a folder and write `out/result` and `out/report.html`.

    Raises:
        ValueError: an unknown metric, direction or site; an output folder that is not empty.
    """
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; use {', '.join(METRICS)}")
    if direction not in SOURCES:
        raise ValueError(f"unknown direction {direction!r}; use {', '.join(SOURCES)}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"the folder {str(out)!r} is not empty; give a new one")
    table = make_sites(model, sites, spans)
    loaded = PairDataset.load(pairs, model)
    with progress("patching") as report:
        found = patch(model, loaded, table, METRICS[metric], direction, seed=seed, report=report)
    found.save(out / "result")
    page = found.page(f"Patching {pairs.name}")
    page.save(out / "report.html")
    if not quiet:
        print_table(found.strongest(10)[SHOWN], "Strongest sites")
        print(f"result: {out / 'result'}\nreport: {out / 'report.html'}")
    return found
