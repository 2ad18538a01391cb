"""The documentation: no link in it is dead, and its site has every page and every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import mechmm

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for room in (".", "docs", "experiments", "mechmm", "benchmarks", "notebooks", "tests")
    for path in (ROOT / room).glob("*.md" if room == "." else "**/*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.M | re.S)
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(r"(?:benchmarks|docs|experiments|mechmm|notebooks|tests)/[\w./-]*\w\.\w+")


def dead_links(page: Path) -> list[str]:
    """Links of a Markdown page to files that do not exist, or to headings that are not in them."""
    text = CODE.sub("", FENCE.sub("", page.read_text()))
    links = [unquote(link) for link in LINK.findall(text) if not re.match(r"\w+:", link)]
    return [link for link in links if not leads_somewhere(page, link)]


def leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    path = page.parent / name if name else page
    return path.exists() and (not anchor or anchor in anchors(path.read_text()))


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = [name for code in CODE.findall(page.read_text()) for name in PATH.findall(code)]
    assert [name for name in named if not exists(name)] == []


def exists(name: str) -> bool:
    return "NAME" in name or (ROOT / name).exists()


def test_dead_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text(
        "# Title\n\n## Every *edge*: `x`\n\n```\n# No heading\n```\n"
    )
    page.write_text(
        "[a](other.md#every-edge-x) [b](other.md) [c](https://nowhere.invalid) `[d](code.md)`\n"
        "[e](other.md#no-heading) ![f](missing.png) [g](#here)\n"
    )
    assert dead_links(page) == ["other.md#no-heading", "missing.png", "#here"]


class Parsed(HTMLParser):
    """The ids of a page, its links, and what it loads when it is opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.ids.add(found.get("id", ""))
        if tag == "a":
            self.links.append(found.get("href", "#"))
        elif tag in ("script", "img", "iframe", "link"):
            self.loaded.append(found.get("src", found.get("href", "")))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Parsed]:
    """Every page of the built site."""
    if not all(find_spec(name) for name in ("sphinx", "myst_parser", "furo")):
        pytest.skip('sphinx is not installed: pip install ".[docs]"')
    out = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, str(ROOT / "docs" / "build_site.py"), str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {page: Parsed(page.read_text()) for page in out.rglob("*.html")}


def top(site: dict[Path, Parsed]) -> Path:
    return min(site, key=lambda page: len(page.parts)).parent


@pytest.mark.slow
def test_site_has_every_page(site):
    folder = top(site)
    for page in PAGES:
        if page.relative_to(ROOT).parts[0] in ("docs", "experiments"):
            assert folder / page.relative_to(ROOT).with_suffix(".html") in site
    start = {(folder / link).resolve() for link in site[folder / "index.html"].links}
    for method in (ROOT / "docs" / "methods").glob("*.md"):
        assert folder / "docs" / "methods" / f"{method.stem}.html" in start  # in the contents


@pytest.mark.slow
def test_site_has_every_public_name(site):
    ids = set().union(*(page.ids for page in site.values()))
    names = [n for n in mechmm.__all__ if not isinstance(getattr(mechmm, n), ModuleType)]
    names += ["sites.residual", "data.shapes.color_pairs", "HookedMultimodal.encode", "runs.run"]
    assert [name for name in names if f"mechmm.{name}" not in ids] == []


@pytest.mark.slow
def test_links_within_the_site_hold_and_nothing_comes_from_the_network(site):
    for page, parsed in site.items():
        for link in parsed.links:
            name, _, anchor = unquote(link).partition("#")
            if re.match(r"\w+:", link):
                continue
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page}: {link}"
            assert not anchor or path not in site or anchor in site[path].ids, f"{page}: {link}"
        assert not [source for source in parsed.loaded if re.match(r"(\w+:)?//", source)]
