"""The model of a run, and the digest of its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechmm.model.hooked import HookedMultimodal
from mechmm.runs import manifest
from mechmm.runs.config import Model
from mechmm.runs.paths import RunError


def load_model(
    config: Model, base: Path, given: Path | None = None
) -> tuple[HookedMultimodal, dict[str, Any]]:
    """The model, and what the manifest says of it.

    Args:
        base: where relative names start from.
        given: folder of the model's files, if not where the config says.

    Raises:
        RunError: the files have another digest than the config says.
        OSError: from `transformers`, where the name cannot be found.
    """
    place = (config.name, base) if given is None else (str(given.absolute()), Path())
    files = manifest.model_files(*place, config.revision)
    folder = manifest.model_folder(*place, config.revision)
    cached = folder is not None and folder.parent.name == "snapshots"
    if files and not cached:  # a cache may hold only some of the files yet
        _check_model(config, files)
    options = {
        "revision": config.revision,
        "device": config.device,
        "device_map": config.device_map,
        "dtype": config.dtype if config.dtype in (None, "auto") else getattr(torch, config.dtype),
    }
    source = base / config.name if given is None else given
    model = HookedMultimodal.from_pretrained(source if source.is_dir() else config.name, **options)
    if not files or cached:  # now the hub's snapshot is whole
        files = manifest.model_files(*place, config.revision)
        _check_model(config, files)
    facts = {"name": config.name, "revision": config.revision, "files": files}
    return model, {**facts, "sha256": manifest.combined(files)}


def _check_model(config: Model, files: Mapping[str, str]) -> None:
    if config.sha256 is not None and manifest.combined(files) != config.sha256:
        raise RunError(
            f"the files of the model {config.name} have the digest {manifest.combined(files)}, not "
            f"{config.sha256} as the config says"
        )
