"""When does the circuit of the color form? The figure: what is there at each checkpoint."""

import sys
from pathlib import Path

from plotly.graph_objects import Figure, Scatter

from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run

FIRST = 4
"""Checkpoints before this one know too little for f to be a number."""


def figure(run: Run) -> Figure:
    """Accuracy, f of the final circuit and overlap with it, by checkpoint."""
    answers, circuit, own = (
        run.table(name) for name in ("answers", "final_circuit", "own_circuit")
    )
    names = [name for name in dict.fromkeys(answers["checkpoint"]) if name != "untrained"]
    alone = circuit[~circuit["null"].astype(bool)].set_index("checkpoint")
    null = circuit[circuit["null"].astype(bool)].groupby("checkpoint")["faithfulness"].mean()
    overlap = own[own["span"] == "all"].set_index("checkpoint")
    right = answers.groupby("checkpoint")["clean_right"].mean()
    late = names[FIRST:]
    found = Figure(layout={"title": "the color circuit over training", "width": 760, "height": 420})
    for name, x, y in (
        ("accuracy", names, right[names]),
        ("IoU of the own circuit with the final one", names, overlap.loc[names, "iou"]),
        ("IoU of random circuits", names, overlap.loc[names, "random_mean"]),
        ("f of the final circuit", late, alone.loc[late, "faithfulness"]),
        ("f of random circuits", late, null[late]),
    ):
        dash = "dot" if "random" in name else "solid"
        found.add_trace(Scatter(x=x, y=y, name=name, mode="lines+markers", line_dash=dash))
    return found.update_yaxes(range=[-0.05, 1.05]).update_layout(legend_orientation="h")


if __name__ == "__main__":
    sys.exit(experiment(Path(__file__).parent, figure))
