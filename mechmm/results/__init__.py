"""The answers: results as folders, intervals, figures, and one page per run."""

from mechmm.results.plots import bars, heat_map, patch_overlay, save_png, tower_maps
from mechmm.results.report import Captioned, Page, Row, Section
from mechmm.results.result import Result, concat
from mechmm.results.statistics import bootstrap_interval

__all__ = [
    "Captioned",
    "Page",
    "Result",
    "Row",
    "Section",
    "bars",
    "bootstrap_interval",
    "concat",
    "heat_map",
    "patch_overlay",
    "save_png",
    "tower_maps",
]
