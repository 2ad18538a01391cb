"""Do neurons at the picture's positions write words of the answer? Runs a config; the figure: the
change of the answer without them."""

import sys
from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.results.plots import bars
from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run

STEPS = {
    "color": "color",
    "shape": "shape",
    "digit": "digit",
    "color, 200 neurons": "color_many",
    "color, last position": "color_last",
    "color, vision tower": "color_vision",
}


def figure(run: Run) -> Figure:
    """What the logit difference loses without the best neurons, and without random ones."""
    names, rows = [], []
    for name, step in STEPS.items():
        table = run.result(step).effects()
        null = table.loc[table["null"], "change"]
        names += [f"{name}: best", f"{name}: random"]
        rows.append(table.loc[0, ["change", "low", "high"]].tolist())
        rows.append([null.mean(), null.min(), null.max()])
    value, low, high = zip(*rows, strict=True)
    title = "change of the logit difference without neurons (random: range of 20 sets)"
    return bars(names, value, low, high, title, value_title="change")


if __name__ == "__main__":
    sys.exit(experiment(Path(__file__).parent, figure))
