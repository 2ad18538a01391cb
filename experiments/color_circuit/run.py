"""Which edges carry the color? Runs a config; the figure: f over the share of edges, by method."""

import sys
from pathlib import Path

import pandas as pd
from plotly.graph_objects import Figure

from mechmm.results.plots import curves
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
    tables = {name: _named(result.curve()) for name, result in results.items()}
    tables["random circuits"] = _named(results["EAP-IG (inputs)"].curve(null=True))
    return curves(
        tables,
        "color: faithfulness of circuits",
        f"logit difference, corrupt; {len(results['EAP'].full)} held-out pairs",
        x_title="share of edges kept",
        y_title="faithfulness",
        null="random circuits",
    )


def _named(curve: pd.DataFrame) -> pd.DataFrame:
    return curve.rename(columns={"fraction": "share", "faithfulness": "value"})


if __name__ == "__main__":
    sys.exit(experiment(Path(__file__).parent, figure))
