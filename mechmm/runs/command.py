"""`mechmm run`: what is printed, and the exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mechmm.runs.folder import Run
from mechmm.runs.runner import resume, run
from mechmm.runs.terminal import print_table

SHOWN = ["name", "value", "low", "high", "n", "expect", "agrees"]


def run_command(
    config: str | None, overrides: Sequence[str], out: Path | None, old: Path | None
) -> int:
    """Run a config, or go on with a run; the exit code: 0, 1 (cannot be run) or 130."""
    try:
        found = _found(config, overrides, out, old)
    except KeyboardInterrupt as error:
        print(f"mechmm: {str(error) or 'interrupted; nothing was written'}", file=sys.stderr)
        return 130
    except (ValueError, KeyError, OSError) as error:
        print(f"mechmm: {error}", file=sys.stderr)
        return 1
    show(found)
    return 0


def _found(config: str | None, overrides: Sequence[str], out: Path | None, old: Path | None) -> Run:
    if old is not None:
        given = [] if config is None else [config, *overrides]
        if out is not None or not all("=" in text for text in given):
            raise ValueError(
                "--resume takes the folder, and key=value of headlines: mechmm run --resume DIR"
            )
        return resume(old, given)
    if config is None or out is None:
        raise ValueError("give a config and a new folder: mechmm run CONFIG.toml --out DIR")
    return run(config, out, overrides)


def show(found: Run) -> None:
    """Headlines, the verdict, and where the run lies."""
    table = found.headlines
    if len(table):
        print_table(
            table[SHOWN].astype({"value": float, "low": float, "high": float}),
            found.manifest["name"],
        )
    print(f"{found.verdict}\nrun: {found.folder}")
