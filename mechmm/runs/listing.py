"""The runs in some folders: found, listed on a page, and two of them side by side."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from mechmm.results.drawn import digest
from mechmm.results.report import Page, Section, document
from mechmm.runs.difference import diff
from mechmm.runs.paths import HEADLINES, MANIFEST, REPORT, RESOLVED
from mechmm.runs.said import expectation, number_text, verdict_of

DEEP = 4
"""Levels below a folder in which runs are looked for."""


@dataclass(frozen=True)
class Listed:
    """A run in a list.

    Attributes:
        place: in addresses: the number of the folder, and the way from there.
        wrong: why it cannot be read, or nothing.
    """

    place: str
    folder: Path
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    headlines: Sequence[Mapping[str, Any]] = ()
    wrong: str = ""

    @classmethod
    def read(cls, place: str, folder: Path) -> Listed:
        """What its files say, or why they cannot be read."""
        found: list[Any] = []
        for name, kind in ((MANIFEST, dict), (RESOLVED, dict), (HEADLINES, list)):
            path = folder / name
            try:
                value = json.loads(path.read_bytes()) if path.is_file() else kind()
            except (ValueError, OSError, RecursionError) as error:
                return cls(place, folder, wrong=f"{name} cannot be read: {error}")
            if not isinstance(value, kind):
                return cls(place, folder, wrong=f"{name} is not what a run writes")
            found.append(value)
        headlines = [line for line in found[2] if isinstance(line, dict)]
        return cls(place, folder, found[0], found[1], headlines)

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.manifest.get("name") or self.folder.name)

    @property
    def state(self) -> str:
        return str(self.manifest.get("state", ""))

    @property
    def verdict(self) -> str:
        if self.wrong or self.state != "finished":
            return self.wrong or f"Not finished ({self.state or 'unknown'})."
        return verdict_of(self.headlines)

    @property
    def good(self) -> bool | None:
        judged = [line.get("agrees") for line in self.headlines]
        known = [bool(agrees) for agrees in judged if agrees is not None]
        return all(known) if known and self.state == "finished" else None

    @property
    def date(self) -> str:
        return str(self.manifest.get("started", ""))[:16].replace("T", " ")

    @property
    def model(self) -> str:
        found = self.config.get("model") or self.manifest.get("model")
        return str(found.get("name", "")) if isinstance(found, Mapping) else ""

    @property
    def address(self) -> str:
        """Of its page; nothing where there is none yet."""
        has = (self.folder / REPORT).is_file()
        return f"/runs/{quote(self.place)}/{REPORT}" if has else ""


@dataclass(frozen=True)
class Listing:
    """Folders in which runs are."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, folders: Sequence[Path]) -> Listing:
        """Look for runs.

        Raises:
            ValueError: no folder, one that does not exist, or one without a run.
        """
        if not folders:
            raise ValueError("give at least one folder with runs")
        for folder in folders:
            if not folder.is_dir():
                raise ValueError(f"{str(folder)!r} is no folder")
            if next(_runs_in(folder.resolve()), None) is None:
                raise ValueError(
                    f"{str(folder)!r} holds no run: neither it nor a folder in it has a {MANIFEST}"
                )
        return cls(tuple(folder.resolve() for folder in folders))

    def runs(self) -> list[Listed]:
        """All runs as they are now, the latest first."""
        found = [
            Listed.read("/".join([str(i), *run.relative_to(folder).parts]), run)
            for i, folder in enumerate(self.folders)
            for run in _runs_in(folder)
        ]
        return sorted(found, key=lambda run: run.date, reverse=True)


def _runs_in(folder: Path) -> Iterator[Path]:
    """The folder, or those in it that are runs; links are not followed."""
    for path, inner, names in os.walk(folder):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if MANIFEST in names:
            yield Path(path)
            inner.clear()
        elif len(Path(path).relative_to(folder).parts) >= DEEP:
            inner.clear()


# Pages ------------------------------------------------------------------------------------------


def list_page(runs: Sequence[Listed]) -> str:
    """All runs with their verdicts and numbers, to be filtered; two can be chosen."""
    head = f"<header><h1>Runs</h1><p>{len(runs)} found.</p></header>"
    body = (
        '<form action="/compare" method="get"><div class="tools">'
        '<label>Filter <input id="filter" type="search" autocomplete="off"></label>'
        '<button id="compare">Compare two</button>'
        '<span id="count" role="status"></span></div>'
        f'<ul class="runs">{"".join(map(_shown, runs))}</ul></form>'
    )
    script = f"<script>{_asset('view.js')}</script>"
    return document("Runs", head, body, script, own_policy(), _asset("view.css"))


def _shown(run: Listed) -> str:
    """A run in the list; one that a stranger made unfit for it does not take the others along."""
    try:
        return _item(run)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        wrong = f"It cannot be shown: {type(error).__name__}."
        return _item(Listed(run.place, run.folder, wrong=wrong))


def _item(run: Listed) -> str:
    kind = {True: " good", False: " bad", None: ""}[run.good]
    name = escape(run.name)
    link = f'<a href="{run.address}">{name}</a>' if run.address else f"{name} (no page yet)"
    facts = " · ".join(escape(text) for text in (run.date, run.model, run.place) if text)
    question = escape(str(run.config.get("question") or ""))
    numbers = "".join(f"<li>{escape(_line(line))}</li>" for line in run.headlines)
    return (
        f'<li class="headline run{kind}"><label class="choose"><input type="checkbox" name="run" '
        f'value="{escape(run.place)}" aria-label="compare {name} ({escape(run.place)})"></label>'
        f'<div><h2>{link}</h2><div class="note">{facts}</div><p>{question}</p>'
        f'<div class="verdict">{escape(run.verdict)}</div>'
        f'<ul class="numbers">{numbers}</ul></div></li>'
    )


def _line(line: Mapping[str, Any]) -> str:
    """A headline in a line: `accuracy: 0.25 (0.10 to 0.40), expected ≤ 0.35`."""
    known = line.get("low") is not None and line.get("high") is not None
    ends = f" ({number_text(line['low'])} to {number_text(line['high'])})" if known else ""
    expect = f", expected {expectation(line['expect'])}" if line.get("expect") else ""
    return f"{line.get('name')}: {number_text(line.get('value'))}{ends}{expect}"


def compared(first: Listed, second: Listed) -> str:
    """Two runs: their verdicts and headlines, and what differs between them."""
    runs, titles = (first, second), [f"{run.name} ({run.place})" for run in (first, second)]
    lines = [{str(line.get("name")): _line(line) for line in run.headlines} for run in runs]
    numbers = [{name: line.partition(": ")[2] for name, line in own.items()} for own in lines]
    sections = [
        Section("Verdicts", [_beside("", titles, [{"verdict": run.verdict} for run in runs])]),
        Section("Headlines", [_beside("headline", titles, numbers)]),
        *_differences(first.folder, second.folder, titles),
    ]
    return Page("Two runs", " and ".join(titles), sections).html()


def _differences(first: Path, second: Path, titles: Sequence[str]) -> list[Section]:
    """As `mechmm diff` finds them."""
    try:
        found = diff(first, second)
    except (ValueError, KeyError, OSError) as error:
        return [Section("Differences", [f"They cannot be compared: {error}"])]
    tables = {
        "Settings that differ": found.settings,
        "Versions that differ": found.versions,
        "Numbers that differ": found.differing().drop(columns="same"),
    }
    names = dict(zip(("first", "second"), titles, strict=True))
    return [
        Section(name, [table.rename(columns=names) if len(table) else "None."])
        for name, table in tables.items()
    ]


def _beside(what: str, titles: Sequence[str], found: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    one, other = found
    names = list(dict.fromkeys([*one, *other]))
    rows = [[name, one.get(name, "—"), other.get(name, "—")] for name in names]
    return pd.DataFrame(rows, columns=[what, *titles])


@cache
def _asset(name: str) -> str:
    return (files("mechmm.runs") / "assets" / name).read_text(encoding="utf-8")


@cache
def own_policy() -> str:
    """Of the server's own pages."""
    return (
        f"default-src 'none'; script-src {digest(_asset('view.js'))}; style-src 'unsafe-inline'; "
        "base-uri 'none'; form-action 'self'"
    )
