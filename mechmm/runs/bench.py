"""Every method of edge attribution on every model whose circuit is known, and on the demo model.

Scores are made on some pairs; circuits that they give run on others. A method is as good as its
scores rank the known edges (areas under ROC curves, `mechmm.results.ranking`), and as its circuits
behave as the whole model does (CPR by signed scores, CMD by |score|; `mechmm.methods.circuits`).
"""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from rich.console import Console

from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_choice, check_limits, check_seed
from mechmm.methods.attribution import METHODS, Attribution, attribute
from mechmm.methods.circuits import FRACTIONS, faithfulness, faithfulness_curve
from mechmm.results import plots
from mechmm.results.circuit import Circuit
from mechmm.results.graph import Graph
from mechmm.results.ranking import auroc, greedy_auroc
from mechmm.results.report import Page, Section
from mechmm.runs.cases import Case, chosen_cases
from mechmm.runs.terminal import print_table

HELD_OUT = 1000
"""Added to the seed of the pairs that scores are made on."""
NULLS = 3
"""Draws of random scores."""
WANTED = 0.85
"""Faithfulness of the smallest circuit that is looked for."""
QUICK = ("eap", "eap-ig-inputs", "clean-corrupt", "random")
"""Methods that take seconds."""


@dataclass(frozen=True)
class Bench:
    """What to run.

    Attributes:
        models: names or kinds of `mechmm.runs.cases`; none: all.
        methods: of attribution; none: all.
        pairs: to make scores on, and as many others to test circuits on.
        steps: of integrated gradients.
        seed: of pairs and random scores.
        quick: fewer pairs, and only quick methods where none is named.
    """

    models: Sequence[str] = ()
    methods: Sequence[str] = ()
    pairs: int = 12
    steps: int = 5
    seed: int = 0
    quick: bool = False

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: an unknown model or method, with those there are; no pairs or steps.
        """
        chosen_cases(self.models)
        for method in self.methods:
            check_choice("method", method, METHODS)
        check_limits(pairs=self.pairs, steps=self.steps)
        check_seed(self.seed)

    @property
    def tried(self) -> tuple[str, ...]:
        """The methods that run."""
        return tuple(self.methods) or (QUICK if self.quick else METHODS)

    @property
    def count(self) -> int:
        return min(self.pairs, 8) if self.quick else self.pairs


@dataclass(frozen=True)
class Truth:
    """The known circuit of a model, by exact ablation: faithfulness of its edges alone, and of all
    others alone."""

    model: str
    edges: int
    true: int
    circuit: float
    rest: float


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        steps: of integrated gradients; 1 elsewhere.
        edge_auroc, greedy_auroc: see `mechmm.results.ranking`; NaN without a known circuit.
        node_auroc: of the scores that the method gives nodes.
        cpr, cmd: on held-out pairs.
        share: of edges in the smallest circuit with a faithfulness of at least .85 on held-out
            pairs; vision: how many of those lie in the vision tower.
        seconds: of the CPU, to make the scores. megabytes: by which resident memory rose meanwhile.
    """

    model: str
    method: str
    steps: int
    edge_auroc: float
    greedy_auroc: float
    node_auroc: float
    cpr: float
    cmd: float
    share: float
    vision: int
    seconds: float
    megabytes: float


def run(bench: Bench) -> tuple[list[Truth], list[Row]]:
    """Run all of it, model by model.

    Raises:
        ValueError: as `Bench.check`.
    """
    bench.check()
    truths, rows = [], []
    for name in chosen_cases(bench.models):
        case = Case.of(name)
        known, held_out = (case.pairs(bench.count, bench.seed + more) for more in (0, HELD_OUT))
        first = attribute(case.model, known, method="random", seed=bench.seed)
        true = Circuit.named(first.graph, case.edges) if case.edges else None
        if true is not None:
            truths.append(_truth(case, held_out, true))
        for method in bench.tried:
            rows.append(_row(case, bench, method, known, held_out, true))
    return truths, rows


def _truth(case: Case, pairs: PairDataset, true: Circuit) -> Truth:
    found = faithfulness(case.model, pairs, [true, ~true], n_random=0).faithfulness()
    return Truth(case.name, len(true.graph), len(true), *(float(f) for f in found))


def _row(
    case: Case,
    bench: Bench,
    method: str,
    known: PairDataset,
    held_out: PairDataset,
    true: Circuit | None,
) -> Row:
    draws = NULLS if method == "random" else 1
    options = {"method": method, "steps": bench.steps}

    def drawn(**more: Any) -> list[Attribution]:
        seeds = range(bench.seed, bench.seed + draws)
        return [attribute(case.model, known, seed=seed, **options, **more) for seed in seeds]

    scores, seconds, megabytes = _measured(drawn)
    each = pd.DataFrame([_quality(case, one, held_out, true) for one in scores])
    mean = each.mean()
    nodes = [] if case.nodes is None else drawn(granularity="node")
    return Row(
        case.name,
        method,
        scores[0].steps,
        **{name: float(mean[name]) for name in each.columns.drop("vision")},
        node_auroc=_found_nodes(nodes, case.nodes or ()),
        vision=round(float(mean["vision"])),
        seconds=seconds / draws,
        megabytes=megabytes,
    )


def _found_nodes(scores: Sequence[Attribution], nodes: Sequence[str]) -> float:
    """How well scores of nodes tell the known ones, on average; NaN for no scores."""
    areas = [auroc(one.mean(), np.isin(one.graph.names(), nodes)) for one in scores]
    return float(np.mean(areas)) if areas else math.nan


def _quality(
    case: Case, scores: Attribution, pairs: PairDataset, true: Circuit | None
) -> dict[str, float]:
    """What a method's scores are worth."""
    mean, graph = scores.mean(), scores.graph
    assert isinstance(graph, Graph)
    found = dict.fromkeys(("edge_auroc", "greedy_auroc"), math.nan)
    if true is not None:
        found["edge_auroc"] = auroc(mean, true.keep)
        found["greedy_auroc"] = greedy_auroc(graph, mean, true.keep, FRACTIONS)
    signed = faithfulness_curve(case.model, pairs, scores, signed=True, n_random=0)
    plain = faithfulness_curve(case.model, pairs, scores, n_random=0)
    curve = plain.curve()
    share = float(curve.loc[curve["faithfulness"] >= WANTED, "fraction"].min())
    circuit = scores.circuit(n=round(share * len(graph)), prune=False)
    tower = graph.writers["tower"].to_numpy()[graph.src[circuit.keep]]
    vision = int((tower != graph.writers["tower"].iat[-1]).sum())
    return {**found, "cpr": signed.cpr(), "cmd": plain.cmd(), "share": share, "vision": vision}


def _measured(work: Callable[[], list[Attribution]]) -> tuple[list[Attribution], float, float]:
    """What some work gives, its seconds of the CPU, and by how many megabytes resident memory rose
    (NaN where the system does not tell)."""
    gc.collect()
    _reset_peak()
    before, start = _resident("VmRSS"), time.process_time()
    found = work()
    return found, time.process_time() - start, (_resident("VmHWM") - before) / 1e3


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def _resident(field: str) -> float:
    """Kilobytes, from Linux's account of this process."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return float(found[0]) if found else math.nan


# What is shown -------------------------------------------------------------------------------


SHORT = {
    "method": "method",
    "edge_auroc": "AUROC",
    "greedy_auroc": "greedy",
    "node_auroc": "nodes",
    "cpr": "CPR",
    "cmd": "CMD",
    "share": "share",
    "seconds": "s",
}
"""Columns for the terminal."""


def tables(truths: Sequence[Truth], rows: Sequence[Row]) -> dict[str, pd.DataFrame]:
    """A table per model, under what is known of its circuit."""
    known = {truth.model: truth for truth in truths}
    found = {}
    for model, table in pd.DataFrame(rows).groupby("model", sort=False):
        truth, title = known.get(str(model)), str(model)
        if truth is not None:
            title += f": {truth.true} of {truth.edges} edges are true; faithfulness"
            title += f" {truth.circuit:.3f} with them alone, {truth.rest:.3f} with all others"
        found[title] = table.drop(columns="model").reset_index(drop=True)
    return found


def figures(rows: Sequence[Row]) -> Iterator[Figure]:
    """Maps of models by methods."""
    table = pd.DataFrame(rows)
    shown = {
        "edge_auroc": "area under the ROC curve of |score| against the known edges",
        "cmd": "CMD: area under |1 - faithfulness| on held-out pairs, less is better",
    }
    for column, title in shown.items():
        known = table[table[column].notna()]
        if len(known):
            wide = known.pivot_table(index="model", columns="method", values=column, sort=False)
            names = list(wide.index), list(wide.columns)
            yield plots.heat_map(
                wide.to_numpy(float),
                *names,
                title,
                x_title="method",
                y_title="model",
                value_title=column,
            )


def page(bench: Bench, truths: Sequence[Truth], rows: Sequence[Row]) -> Page:
    """One page: tables and maps."""
    summary = (
        f"{bench.count} pairs to make scores on and {bench.count} others to test circuits on. "
        "Planted models have circuits that are known; random scores are the null."
    )
    sections = [Section(title, [table]) for title, table in tables(truths, rows).items()]
    sections.append(Section("Models by methods", list(figures(rows))))
    facts = {"steps": bench.steps, "seed": bench.seed, "command": "mechmm bench circuits"}
    return Page("Circuits that methods find", summary, sections, facts)


def bench_circuits(bench: Bench, file: Path | None = None, out: Path | None = None) -> None:
    """Run, print the tables, and write the rows as JSON and the page where they are wanted.

    Raises:
        ValueError: as `Bench.check`.
        OSError: a file that cannot be written.
    """
    bench.check()
    for target in (file, out / "circuits.html" if out else None):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
    truths, rows = run(bench)
    console = Console()
    for title, table in tables(truths, rows).items():
        print_table(table[list(SHORT)].rename(columns=SHORT), title, console)
    if file is not None:
        file.write_text(as_json(bench, truths, rows), encoding="utf-8")
    if out is not None:
        path = page(bench, truths, rows).save(out / "circuits.html")
        console.print(f"report: {path}", highlight=False)


def as_json(bench: Bench, truths: Sequence[Truth], rows: Sequence[Row]) -> str:
    """Settings and all rows; null for NaN."""

    def plain(row: Truth | Row) -> dict:
        values = asdict(row).items()
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values}

    found = {
        "pairs": bench.count,
        "steps": bench.steps,
        "seed": bench.seed,
        "truths": [plain(truth) for truth in truths],
        "rows": [plain(row) for row in rows],
    }
    return json.dumps(found, indent=1) + "\n"
