"""Reproducible runs: a config in, a folder out that says everything needed to run it again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechmm.runs.config import Config, load
    from mechmm.runs.folder import Run
    from mechmm.runs.folder import open_run as open
    from mechmm.runs.runner import resume, run

_HOME = {
    "Config": ("mechmm.runs.config", "Config"),
    "Run": ("mechmm.runs.folder", "Run"),
    "load": ("mechmm.runs.config", "load"),
    "open": ("mechmm.runs.folder", "open_run"),
    "resume": ("mechmm.runs.runner", "resume"),
    "run": ("mechmm.runs.runner", "run"),
}

__all__ = ["Config", "Run", "load", "open", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home, own = _HOME[name]
        return getattr(import_module(home), own)
    raise AttributeError(f"module 'mechmm.runs' has no attribute {name!r}")
