"""Does the answer depend on the asked object's own image tokens, and can it be read there?"""

from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.results.plots import bars
from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run


def draw(run: Run) -> Figure:
    """Accuracy without the tokens of every place, each kind of question with its random tokens."""
    names, rows = [], []
    for kind in ("color", "shape", "cell"):
        for row in run.table(f"mean_{kind}").to_dict("records"):
            names.append(f"{kind}: without {row['span']}")
            rows.append([row[name] for name in ("value", "low", "high")])
            if row["span"] == "object":
                names.append(f"{kind}: without as many others")
                rows.append([row[f"random_{name}"] for name in ("mean", "low", "high")])
    value, low, high = zip(*rows, strict=True)
    title = "image tokens set to the mean of all"
    return bars(names, value, low, high, title, value_title="accuracy")


if __name__ == "__main__":
    raise SystemExit(experiment(Path(__file__).parent, draw))
