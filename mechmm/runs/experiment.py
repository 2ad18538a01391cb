"""What every `experiments/NAME/run.py` does: run a config, print its headlines, bring the README
up to date.

An experiment's folder holds `configs/`, a README with a table of headlines between two marks, a
figure, and in `results/` the run of `configs/demo.toml`. Figures' JSON and the report of that run
are not kept in the repository (`.gitignore`): every number is in the rest.
"""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
from plotly.graph_objects import Figure

from mechmm.results.plots import save_png
from mechmm.results.store import write_whole
from mechmm.runs.command import show
from mechmm.runs.folder import Run
from mechmm.runs.paths import GIVEN, MANIFEST, RunError
from mechmm.runs.runner import resume, run
from mechmm.runs.verification import file_digest

Drawer: TypeAlias = Callable[[Run], Figure | Mapping[str, Figure]]
BEGIN, END = "<!-- headlines -->", "<!-- end of headlines -->"
DEMO = "demo"


def experiment(
    folder: str | Path,
    figure: Drawer | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """Run an experiment from the command line; the exit code: 0, 1 (cannot be run) or 130 (Ctrl-C).

    Args:
        folder: of the experiment.
        figure: draws `figure.png` of a run, or several figures by the names of their files.
        arguments: of the command line; None: the process's own.
    """
    folder, options = Path(folder), _parser().parse_args(arguments)
    path = folder / "configs" / f"{options.config}.toml"
    path = path if path.is_file() else Path(options.config)
    try:
        if options.out is not None:
            found = run(path, options.out)
        elif options.config == DEMO:
            found = renewed(folder, path)
            update(folder, found, figure)
        else:
            raise ValueError("give --out and a new folder: results/ is for the demo config")
        show(found)
        print(f"id: {run_id(found)}")
        return 0
    except (ValueError, OSError) as error:
        print(f"{folder.name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"{folder.name}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Run an experiment.")
    parser.add_argument(
        "config", nargs="?", default=DEMO, help="a file of configs/ without .toml, or a path"
    )
    parser.add_argument("--out", help="a new folder for the run; default: results/ (demo only)")
    return parser


def renewed(folder: Path, config: Path) -> Run:
    """Run a config into `results/`; what was there is replaced when all is done.

    A run of the same config that was interrupted goes on.
    """
    near, results = folder / "results.partial", folder / "results"
    if _interrupted(near, config):
        resume(near)
    else:
        shutil.rmtree(near, ignore_errors=True)
        run(config, near)
    _put(near, results)
    return Run.open(results)


def _interrupted(near: Path, config: Path) -> bool:
    """Whether a folder is the beginning of a run of this config."""
    try:
        begun = not Run.open(near).finished
        return begun and (near / GIVEN).read_bytes() == config.read_bytes()
    except (RunError, OSError):
        return False


def _put(near: Path, results: Path) -> None:
    """Take the place of older results, which lie beside it until that is done."""
    aside = results.with_name("results.old.partial")
    if results.exists():
        shutil.rmtree(aside, ignore_errors=True)
        results.rename(aside)
    near.rename(results)
    shutil.rmtree(aside, ignore_errors=True)


def run_id(found: Run) -> str:
    """Name and first eight digits of the manifest's SHA-256."""
    return f"{found.manifest['name']}-{file_digest(found.folder / MANIFEST)[:8]}"


# README --------------------------------------------------------------------------------------


def update(folder: Path, found: Run, figure: Drawer | None = None) -> None:
    """Write a run's headlines into the README, and draw the figures where kaleido is there.

    Raises:
        ValueError: a README without the two marks.
    """
    readme = folder / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(
            f"{readme} has no table to bring up to date; put {BEGIN} and {END} into it"
        )
    head, tail = text.split(BEGIN)[0], text.split(END)[-1]
    table = headline_table(found.headlines)
    write_whole(readme, f"{head}{BEGIN}\n{table}\n{END}{tail}".encode())
    if figure is None:
        return
    drawn = figure(found)
    try:
        for name, each in (drawn if isinstance(drawn, Mapping) else {"figure": drawn}).items():
            save_png(each, folder / f"{name}.png", scale=1.5)
    except RuntimeError as error:
        print(f"figures stay as they are: {error}", file=sys.stderr)


def headline_table(headlines: pd.DataFrame) -> str:
    """Headlines as a Markdown table: value with its 95 % interval, expectation, verdict."""
    lines = ["| headline | value | expected | agrees |", "|---|---|---|---|"]
    for row in headlines.to_dict("records"):
        expect = "" if pd.isna(row["expect"]) else f"`{row['expect']}`"
        agrees = {True: "yes", False: "**no**"}.get(row["agrees"], "")
        lines.append(f"| {row['name']} | {_value(row)} | {expect} | {agrees} |")
    return "\n".join(lines)


def _value(row: Mapping[Any, Any]) -> str:
    value = _number(row["value"])
    if pd.isna(row["low"]) or pd.isna(row["high"]):
        return value
    return f"{value} [{_number(row['low'])}, {_number(row['high'])}]"


def _number(value: float) -> str:
    return f"{value + 0.0:.2f}".replace("-0.00", "0.00") if abs(value) < 1e4 else f"{value:.3g}"
