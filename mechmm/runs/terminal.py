"""Tables in the terminal."""

from __future__ import annotations

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mechmm.runs.progress import progress

__all__ = ["print_table", "progress"]


def print_table(frame: pd.DataFrame, title: str, console: Console | None = None) -> None:
    """A data frame as a table; numbers to three places, texts as they are."""
    table = Table(title=escape(title), title_justify="left")
    for name in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(escape(str(name)), justify="right" if numeric else "left")
    for row in frame.itertuples(index=False):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
    (console or Console()).print(table)
