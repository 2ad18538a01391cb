"""What tells that an answer is expected and not seen, and what mends it?"""

from pathlib import Path

from plotly.graph_objects import Figure

from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run


def draw(run: Run) -> dict[str, Figure]:
    """What predicts errors, and how often the expected answer is given under each intervention."""
    return dict(run.result("strong").plot())


if __name__ == "__main__":
    raise SystemExit(experiment(Path(__file__).parent, draw))
