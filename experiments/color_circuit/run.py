"""Which edges carry the color? Runs a config; the figure: f over the share of edges, by method."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure

from mechmm.results.lines import lines
from mechmm.runs.experiment import experiment
from mechmm.runs.folder import Run

CURVES = {
    "EAP": "curve_eap",
    "EAP-IG (inputs)": "curve_eap_ig_inputs",
    "EAP-IG (activations)": "curve_eap_ig_activations",
    "both gradients": "curve_clean_corrupt",
    "AtP*": "curve_atp_star",
}


def figure(run: Run) -> Figure:
    """Faithfulness over the share of edges kept."""
    results = {name: run.result(step) for name, step in CURVES.items()}
    tables = {name: _points(result.curve()) for name, result in results.items()}
    random = _points(results["EAP-IG (inputs)"].curve(null=True))
    found = lines(
        {**tables, "random circuits": random},
        "color: faithfulness of circuits",
        f"logit difference, corrupt; {len(results['EAP'].full)} held-out pairs",
        x_title="share of edges kept",
        y_title="faithfulness",
    )
    shares = [f"{share:.1%}" for share in 10 ** random["x"]]
    return found.update_xaxes(tickvals=random["x"], ticktext=shares, tickangle=0)


def _points(curve: pd.DataFrame) -> pd.DataFrame:
    named = curve.rename(columns={"faithfulness": "value"})
    return named.assign(x=np.log10(curve["fraction"]))


if __name__ == "__main__":
    sys.exit(experiment(Path(__file__).parent, figure))
