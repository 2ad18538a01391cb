"""The model of a run, and the digest of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechmm.model.hooked import HookedMultimodal
from mechmm.runs import hub, manifest
from mechmm.runs.config import Model
from mechmm.runs.paths import RunError


def load_model(
    config: Model, base: Path, given: Path | None = None
) -> tuple[HookedMultimodal, dict[str, Any]]:
    """The model, and what the manifest says of it: `revision` and `commit` of a hub model are the
    commit that all its files come from.

    Args:
        base: where relative names start from.
        given: folder of the model's files, if not where the config says.

    Raises:
        RunError: the files have another digest than the config says; a hub model that neither the
            hub nor the cache has, or that the cache has only in part.
        OSError: from `transformers`, where it cannot be loaded.
    """
    if given is None and hub.is_hub(config.name, base):
        return _from_hub(config)
    source = base / config.name if given is None else given
    folder = source if source.is_dir() else None
    place = (config.name, base) if given is None else (str(given.absolute()), Path())
    files = manifest.model_files(*place)
    _check_model(config, files)
    model = _loaded(config, config.name if folder is None else folder, config.revision)
    return model, _facts(config.name, config.revision, None, files)


def _from_hub(config: Model) -> tuple[HookedMultimodal, dict[str, Any]]:
    folder = hub.snapshot(config.name, config.revision)
    try:
        model = _loaded(config, config.name, folder.name)
    except OSError as error:
        hub.check_whole(folder, config.name, error)
        raise
    if model.processor is None:
        hub.check_whole(folder, config.name, model.no_processor)
    files = manifest.files_of(folder)  # now that loading has brought what was missing
    _check_model(config, files)
    return model, _facts(config.name, folder.name, folder.name, files)


def _loaded(config: Model, source: str | Path, revision: str | None) -> HookedMultimodal:
    dtype = config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype)
    return HookedMultimodal.from_pretrained(
        source, revision=revision, device=config.device, device_map=config.device_map, dtype=dtype
    )


def _facts(
    name: str, revision: str | None, commit: str | None, files: Mapping[str, str]
) -> dict[str, Any]:
    facts = {"name": name, "revision": revision, "commit": commit, "files": dict(files)}
    return {**facts, "sha256": manifest.combined(files)}


def differing(known: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of a model's files that are others now than a manifest says, sorted. Of one commit of
    the hub, a cache may have more files than it had."""
    before, after = known["files"], now["files"]
    commit = known.get("commit")
    names = before if commit is not None and commit == now.get("commit") else {*before, *after}
    return [name for name in sorted(names) if before.get(name) != after.get(name)]


def _check_model(config: Model, files: Mapping[str, str]) -> None:
    if config.sha256 is not None and manifest.combined(files) != config.sha256:
        raise RunError(
            f"the files of the model {config.name} have the digest {manifest.combined(files)}, not "
            f"{config.sha256} as the config says"
        )
