"""The sets of pairs of a run: made as its config says, or read where a run saved them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mechmm.data.pairs import PairDataset, PairError
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.result import Result
from mechmm.runs import makers
from mechmm.runs.arguments import Scene
from mechmm.runs.config import Config, PairSet
from mechmm.runs.paths import RunError


def scene_of(
    model: HookedMultimodal,
    config: Config,
    saved: Path | None,
    result: Callable[[str], Result],
) -> Scene:
    """What steps run on.

    Args:
        saved: folder of the sets, which are read there instead of being made.
        result: of an earlier step.

    Raises:
        PairError, RunError: pairs that cannot be made, or are others than the config says.
    """
    sets = {
        name: makers.loaded(saved / name, model) if saved else _made(one, model, config)
        for name, one in config.pairs.items()
    }
    return Scene(model, sets, result, config.base)


def _made(one: PairSet, model: HookedMultimodal, config: Config) -> PairDataset:
    """A set of pairs."""
    try:
        if one.folder is not None:
            pairs = makers.loaded(config.base / one.folder, model)
        else:
            pairs = makers.made(str(one.make), one.options, model)
        scene = Scene(model, {}, _nothing, config.base)
        if one.clean is not None:
            pairs = makers.distorted(pairs, one.clean, scene)
        if one.corrupt is not None:
            pairs = makers.corrupted(pairs, one.corrupt, scene)
        pairs = makers.kept(pairs, one.keep, one.name)
    except PairError as error:
        raise PairError(f"pairs.{one.name}: {error}") from error
    if one.sha256 not in (None, pairs.content_hash()):
        raise RunError(
            f"pairs.{one.name} have the digest {pairs.content_hash()}, not {one.sha256} as the "
            "config says"
        )
    return pairs


def _nothing(step: str) -> Result:
    raise KeyError(step)
