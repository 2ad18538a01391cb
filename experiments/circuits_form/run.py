"""When does the circuit of the color form? The figure: what is there at each checkpoint."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from mechmm.results.lines import lines
from mechmm.results.statistics import bootstrap_interval
from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run

HISTORY = Path("trained/history")
FIRST = 4
"""Checkpoints before this one know too little for f to be a number."""


def figure(run: Run) -> Figure:
    """Accuracy, f of the final circuit and overlap with it, by checkpoint."""
    answers, circuit, own = (
        run.table(name) for name in ("answers", "final_circuit", "own_circuit")
    )
    names = [name for name in dict.fromkeys(answers["checkpoint"]) if name != "untrained"]
    right = answers.groupby("checkpoint")["clean_right"].agg(list)[names]
    ends = [bootstrap_interval(np.array(values, float)) for values in right]
    low, high = zip(*ends, strict=True)
    alone = circuit[~circuit["null"].astype(bool)].set_index("checkpoint").loc[names[FIRST:]]
    overlap = own[own["span"] == "all"].set_index("checkpoint").loc[names]
    series = {
        "accuracy": _points(names, right.map(np.mean), low, high),
        "f of the final circuit": _points(
            names, alone["faithfulness"], alone["low"], alone["high"], FIRST
        ),
        "IoU with the final circuit": _points(names, overlap["iou"]),
        "IoU of random circuits": _points(names, overlap["random_mean"]),
    }
    steps = ", ".join(f"{number}: {name}" for number, name in enumerate(names))
    return lines(series, "the color circuit over training", steps, x_title="checkpoint", y_title="")


def _points(names, value, low=(), high=(), first=0) -> pd.DataFrame:
    nothing = [np.nan] * (len(names) - first)
    ends = {"low": list(low) or nothing, "high": list(high) or nothing}
    columns = {"x": range(first, len(names)), "value": list(value), **ends}
    return pd.DataFrame(columns).assign(name=names[first:])


if __name__ == "__main__":
    if len(sys.argv) == 1 and not HISTORY.is_dir():
        sys.exit(f"no {HISTORY}; make it: mechmm zoo train --out {HISTORY.parent} --phases 2")
    sys.exit(experiment(Path(__file__).parent, figure))
