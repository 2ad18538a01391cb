"""Build the documentation site: `python docs/build_site.py build/docs`.

The pages are the Markdown files of the repository, laid out as they are there, so that their links
hold; the README is the first one. The pages of the API are made by `docs/api_pages.py`.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from api_pages import ROOMS, api_pages
from sphinx.cmd.build import main

ROOT = Path(__file__).parents[1]
FIRST = ROOT / "README.md"
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(?=[)#])")
"""Text and target of a link to another file."""
FENCED = re.compile(r"(^```.*?^```)", re.M | re.S)
LEAD = re.compile(r"\n(?=\*\*[^*\n]+\.\*\* )")
"""In front of a line that begins with bold words, which is to begin a paragraph."""
CONTENTS = {
    "Guide": tuple(
        f"docs/{name}.md" for name in ("guide", "runs", "replay", "report", "scale", "families")
    ),
    "Methods": ("docs/methods/patching.md", "docs/methods/circuits.md", "docs/methods/*.md"),
    "API": tuple(f"api/{room}.rst" for room in ROOMS),
    "Findings": (
        "experiments/README.md",
        "experiments/LOG.md",
        "experiments/*/README.md",
        "experiments/*/*.md",
    ),
    "About": ("docs/performance.md", "docs/benchmarks.md", "docs/*.md", "*.md", "mechmm/**/*.md"),
}
"""The pages in their order; a pattern stands for all that have not been named."""


def build(out: Path) -> int:
    """Build the site into `out`, from nothing; 0 where there was nothing to warn about."""
    if out.exists() and any(out.iterdir()) and not (out / "objects.inv").exists():
        sys.exit(f"{out} holds something that is no site; give a new folder")
    with TemporaryDirectory() as folder:
        source, trees, site = (Path(folder) / name for name in ("source", "trees", "site"))
        lay_out(source)
        options = ["-q", "-W", "--keep-going", "-c", str(ROOT / "docs"), "-d", str(trees)]
        failed = main([*options, str(source), str(site)])
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(site, out)  # at the end, so that an interrupted build leaves what was there
    return failed


def lay_out(source: Path) -> None:
    """Write all that Sphinx reads into the folder `source`."""
    for page in pages():
        _lay(page, source)
    for name, text in api_pages():
        _write(source / "api" / f"{name}.rst", text)
    index = source / "index.md"
    index.write_text(index.read_text() + "".join(_contents(source)))


def pages() -> list[Path]:
    """Every Markdown file that is a page of the site."""
    rooms = [ROOT / room for room in ("docs", "experiments", "mechmm")]
    return [*ROOT.glob("*.md"), *(path for room in rooms for path in room.rglob("*.md"))]


def _lay(page: Path, source: Path) -> None:
    """Write a page, and the files that it links to, to be downloaded."""

    def link(match: re.Match) -> str:
        text, target = match.groups()
        path = (page.parent / target).resolve()
        if path.is_file() and path.suffix != ".md":
            _write(source / path.relative_to(ROOT), path.read_bytes())
        if path == FIRST:
            target = target.removesuffix("README.md") + "index.md"
        return f"[{'' if text.endswith('.md') else text}]({target}"  # no text: the page's title

    name = "index.md" if page == FIRST else page.relative_to(ROOT)
    parts = FENCED.split(page.read_text())
    parts[::2] = [LEAD.sub("\n\n", LINK.sub(link, part)) for part in parts[::2]]
    _write(source / name, "".join(parts))


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _contents(source: Path) -> Iterator[str]:
    """The table of contents, which the theme shows at the side."""
    named = {name for names in CONTENTS.values() for name in names} | {"index.md"}
    for caption, names in CONTENTS.items():
        yield f"\n```{{toctree}}\n:hidden:\n:titlesonly:\n:caption: {caption}\n\n"
        yield "Start <self>\n" if caption == "Guide" else ""
        for name in names:
            found = sorted(str(path.relative_to(source)) for path in source.glob(name))
            fresh = [one for one in found if one == name or one not in named]
            named.update(fresh)
            yield from map(_entry, fresh)
        yield "```\n"


def _entry(name: str) -> str:
    page = Path(name).with_suffix("")
    return f"Log of {page.parent.name} <{page}>\n" if page.name == "LOG" else f"{page}\n"


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1]).resolve()))
