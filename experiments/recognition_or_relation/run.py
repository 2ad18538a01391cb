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
    """The dissociation table: what closing each way of the changed thing takes, by kind."""
    names, rows, ends = [], [], []
    for kind, what in KINDS.items():
        table = run.table(f"margin_{kind}")
        for way, row in zip(("direct", "mediated", "both"), table.to_dict("records"), strict=True):
            names.append(f"{what}, {kind}: {way}")
            rows.append([row[name] for name in ("effect", "low", "high")])
            ends += [row["null_low"], row["null_high"]]
    value, low, high = zip(*rows, strict=True)
    title = "ways of the changed thing closed: share of the logit difference lost"
    null = min(ends), max(ends)
    return bars(names, value, low, high, title, null=null, null_title="random patches")


if __name__ == "__main__":
    raise SystemExit(experiment(Path(__file__).parent, draw))
