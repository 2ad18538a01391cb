"""Reproducible runs: a config in, a folder out that says everything needed to run it again."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechmm.runs.archive import pack, unpack
    from mechmm.runs.config import Config, load
    from mechmm.runs.difference import diff
    from mechmm.runs.folder import Run
    from mechmm.runs.folder import open_run as open
    from mechmm.runs.replaying import replay
    from mechmm.runs.runner import resume, run
    from mechmm.runs.verification import verify

_HOME = {
    "Config": ("mechmm.runs.config", "Config"),
    "Run": ("mechmm.runs.folder", "Run"),
    "diff": ("mechmm.runs.difference", "diff"),
    "load": ("mechmm.runs.config", "load"),
    "open": ("mechmm.runs.folder", "open_run"),
    "pack": ("mechmm.runs.archive", "pack"),
    "replay": ("mechmm.runs.replaying", "replay"),
    "resume": ("mechmm.runs.runner", "resume"),
    "run": ("mechmm.runs.runner", "run"),
    "unpack": ("mechmm.runs.archive", "unpack"),
    "verify": ("mechmm.runs.verification", "verify"),
}

__all__ = [
    "Config",
    "Run",
    "diff",
    "load",
    "open",
    "pack",
    "replay",
    "resume",
    "run",
    "unpack",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        home, own = _HOME[name]
        return getattr(import_module(home), own)
    raise AttributeError(f"module 'mechmm.runs' has no attribute {name!r}")
