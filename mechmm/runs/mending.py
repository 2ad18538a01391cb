"""Other headlines for a run whose steps are done: what numbers depend on stays as it was.

Three writes, so that a run killed between them can be taken up: the manifest tells the digest of
the config to come, the config takes its place, and the manifest has it among its outputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256

from mechmm.results.store import write_whole
from mechmm.runs import config as configs
from mechmm.runs.folder import Run, as_json
from mechmm.runs.overrides import apply
from mechmm.runs.paths import MANIFEST, RESOLVED, RunError
from mechmm.runs.place import Place
from mechmm.runs.verification import file_digest

MENDED = "mended"
"""What the manifest calls the digest of a config that is about to take its place."""


def mend(found: Run, overrides: Sequence[str]) -> Run:
    """Set values of headlines, as `key=value` on the command line would have at the beginning.

    Raises:
        ConfigError: an override that cannot be applied, or a headline that cannot be.
        RunError: an override of anything but headlines.
    """
    raw = json.loads((found.folder / RESOLVED).read_text())
    before = raw.pop("overrides", [])
    keys = apply(raw, overrides)
    others = sorted(key for key in keys if key != "headlines" and not key.startswith("headlines["))
    if others:
        raise RunError(
            f"a run that has begun can be given other headlines, not another {others[0]}: what it "
            "computed would not belong together; begin anew in another folder"
        )
    config = configs.parse(raw, Place(RESOLVED, overridden=keys), found.config.base)
    asked = config.to_dict()["headlines"]
    new = as_json({**raw, "headlines": asked, "overrides": [*before, *overrides]})
    _write_manifest(found, {**found.manifest, MENDED: sha256(new).hexdigest()})
    write_whole(found.folder / RESOLVED, new)
    return settled(Run.open(found.folder))


def settled(found: Run) -> Run:
    """A run whose manifest has the digest of its config among the outputs, and no other."""
    known = dict(found.manifest)
    if known.pop(MENDED, None) is None:
        return found
    digest = file_digest(found.folder / RESOLVED)
    _write_manifest(found, {**known, "outputs": {**known["outputs"], RESOLVED: digest}})
    return Run.open(found.folder)


def _write_manifest(found: Run, record: dict[str, object]) -> None:
    write_whole(found.folder / MANIFEST, as_json(record))
