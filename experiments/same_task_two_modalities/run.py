"""The same circuit for a picture and its description? The figure: exchanged parts."""

import sys
from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run


def figure(run: Run) -> Figure:
    """Faithfulness of the picture's circuit with its parts exchanged, left out or random."""
    return run.result("interchange").plot()["image"]


if __name__ == "__main__":
    sys.exit(experiment(Path(__file__).parent, figure))
