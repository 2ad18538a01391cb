"""How to cite a run: an entry in the Citation File Format 1.2.0 (https://citation-file-format.github.io)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def citation(
    manifest: Mapping[str, Any], digest: str, authors: Sequence[str] = (), question: str = ""
) -> str:
    """`CITATION.cff` from a run's manifest; add authors and a DOI before publishing.

    Args:
        manifest: of the run.
        digest: SHA-256 of the manifest's file.
        authors: names; default: one entry that says that they are not named.
        question: that the run asked, for the title.
    """
    begun = str(manifest.get("started") or "")
    named = authors or (f"the authors of the run {manifest['name']}",)
    lines = [
        "cff-version: 1.2.0",
        "message: If you use this run, cite it as below.",
        "type: dataset",
        f"title: {_text(question or manifest['name'])}",
        f"abstract: {_text(_abstract(manifest))}",
        "authors:",
        *(f"  - name: {_text(name)}" for name in named),
        *([f"date-released: {_text(begun[:10])}"] if begun else []),
        "identifiers:",
        "  - type: other",
        f"    value: {_text('sha256:' + digest)}",
        "    description: SHA-256 of manifest.json, which names every other file by its own",
        "references:",
        "  - type: software",
        "    title: mechmm",
        f"    version: {_text(str(manifest.get('mechmm', '')))}",
        "    authors:",
        "      - name: the mechmm authors",
    ]
    return "\n".join(lines) + "\n"


def _abstract(manifest: Mapping[str, Any]) -> str:
    """Model, number of pairs, and what came out."""
    model, pairs = manifest["model"], manifest["pairs"]
    counts = ", ".join(f"{found.get('n')} {name}" for name, found in pairs.items())
    said = [f"{h.get('name')}: {_number(h.get('value'))}" for h in manifest.get("headlines") or []]
    asked = [f"pairs: {counts}"] if counts else []
    return ". ".join([f"Model {model.get('name')}", *asked, *said]) + "."


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _text(value: str) -> str:
    """A string as YAML takes it; JSON's quotes are YAML's."""
    return json.dumps(value, ensure_ascii=False)
