"""Does the answer go from the picture straight to the last position, or through the question?"""

from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.results.plots import bars
from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run

KINDS = {
    "color": "recognition",
    "digit": "recognition",
    "where": "localisation",
    "same": "relation",
    "horizontal": "relation",
}


def draw(run: Run) -> Figure:
    """The dissociation table: what closing each way takes from every kind of question."""
    names, rows = [], []
    for kind, what in KINDS.items():
        table = run.table(kind)
        for way, row in zip(("direct", "mediated", "both"), table.to_dict("records"), strict=True):
            names.append(f"{what}, {kind}: {way}")
            rows.append([row[name] for name in ("effect", "low", "high")])
    value, low, high = zip(*rows, strict=True)
    return bars(names, value, low, high, "ways from the picture closed: share of accuracy lost")


if __name__ == "__main__":
    raise SystemExit(experiment(Path(__file__).parent, draw))
