"""What a run that is taken up must share with its beginning: config, libraries, number of threads,
model, pairs, checkpoints, device and dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import mechmm
from mechmm.data.pairs import PairDataset
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs import manifest
from mechmm.runs.config import Config
from mechmm.runs.folder import Run
from mechmm.runs.mending import MENDED
from mechmm.runs.models import differing
from mechmm.runs.paths import GIVEN, PAIRS, RESOLVED, RunError
from mechmm.runs.verification import file_digest

SAME = ("torch", "transformers", "transformer-lens")
"""Packages whose version a resumed run must share with its beginning."""


def check_setting(found: Run) -> None:
    """Refuse to go on with another config, other libraries or another number of threads.

    Raises:
        RunError: which.
    """
    known = found.manifest
    for name in (GIVEN, RESOLVED):
        path = found.folder / name
        digests = [known["outputs"].get(name), known.get(MENDED) if name == RESOLVED else None]
        if not path.is_file() or file_digest(path) not in digests:
            raise RunError(
                f"{path} changed since the run began; put it back, or begin anew in another folder"
            )
    now = {"mechmm": mechmm.__version__, **manifest.packages()}
    before = {"mechmm": known["mechmm"], **known["packages"]}
    for name in ("mechmm", *SAME):
        if now.get(name) != before.get(name):
            raise RunError(
                f"the run began with {name} {before.get(name)}, this is {now.get(name)}: its "
                "numbers would not belong together; install that version, or begin anew"
            )
    threads = torch.get_num_threads()
    if known.get("threads", threads) != threads:
        raise RunError(
            f"the run began with {known['threads']} threads, this process has {threads}, and sums "
            f"depend on it; set OMP_NUM_THREADS={known['threads']}, or begin anew"
        )


def check_model(found: Run, name: str, facts: Mapping[str, Any]) -> None:
    """Refuse other files of the model.

    Raises:
        RunError: which.
    """
    if odd := differing(found.manifest["model"], facts):
        raise RunError(
            f"the files of the model {name} changed since the run began: {', '.join(odd)}"
        )


def check_pairs(found: Run, sets: Mapping[str, PairDataset]) -> None:
    """Refuse other pairs.

    Raises:
        RunError: of which set.
    """
    for name, pairs in sets.items():
        if pairs.content_hash() != found.manifest["pairs"][name]["sha256"]:
            folder = found.folder / PAIRS / name
            raise RunError(f"the pairs in {folder} changed since the run began")


def check_checkpoints(found: Run, config: Config) -> None:
    """Refuse other checkpoints.

    Raises:
        RunError: which.
    """
    known = found.manifest.get("checkpoints", {})
    absent = manifest.combined({})  # then the hub gave it, or still has to
    for name, now in checkpoints_of(config).items():
        if now != known.get(name) and absent not in (now, known.get(name)):
            raise RunError(f"the files of checkpoint {name} changed since the run began")


def check_place(found: Run, model: HookedMultimodal) -> str | None:
    """Refuse another device or dtype; what to note of another processor.

    Raises:
        RunError: which.
    """
    known = found.manifest
    for name, now in place_of(model).items():
        if now != known.get(name, now):
            raise RunError(
                f"the run began with the {name} {known[name]}, this is {now}: its numbers "
                "would not belong together; go on where it began, or begin anew"
            )
    before, now = known.get("processor"), manifest.processor(model.device)
    if before in (None, now):
        return None
    return f"began on the processor {before}, resumed on {now}: last digits may differ"


def place_of(model: HookedMultimodal) -> dict[str, str]:
    """Device and dtype, as a manifest has them."""
    return {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}


def checkpoints_of(config: Config) -> dict[str, str]:
    """SHA-256 over the files of every checkpoint of a step."""
    return {name: manifest.combined(files) for name, files in checkpoints(config).items()}


def checkpoints(config: Config) -> dict[str, dict[str, str]]:
    """Of every checkpoint of a step, the SHA-256 of its files by name; none where none are here."""
    named = [name for step in config.steps for name in step.options.get("checkpoints", ())]
    return {name: manifest.model_files(name, config.base) for name in named}
