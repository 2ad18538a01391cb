"""In which layers does what is seen enter the question, and when does the last position get it?"""

from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run


def draw(run: Run) -> dict[str, Figure]:
    """Effect of every route by third of the layers, a figure for every kind of question."""
    return {
        kind: run.result(f"closed_{kind}")
        .plot()["language"]
        .update_layout(title_text=f"{kind}: routes closed in two layers of six")
        for kind in ("color", "same")
    }


if __name__ == "__main__":
    raise SystemExit(experiment(Path(__file__).parent, draw))
