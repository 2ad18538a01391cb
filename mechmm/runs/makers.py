"""Sets of pairs by the name of what makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechmm.data import corruption, shapes
from mechmm.data.pairs import PairDataset, PairError
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs.arguments import Distortion, Known, Scene, filled, table_of, typed
from mechmm.runs.place import Place

MAKERS: dict[str, Callable[..., PairDataset]] = {
    "shapes.pairs": shapes.pairs,
    "shapes.color_pairs": shapes.color_pairs,
    "shapes.prior_pairs": shapes.prior_pairs,
}
KEEP = ("flips", "right", "all")
"""Which pairs stay: those that the model answers rightly and that flip, those that it answers
rightly, or all."""


def check_options(make: str, options: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """A maker's options with every default filled in.

    Raises:
        ConfigError: an unknown or missing option, or one of a wrong type.
    """
    plain = {name: value for name, value in options.items() if name != "sampler"}
    given = ("model", "sampler")
    if "sampler" in options and make != "shapes.pairs":
        raise place.at("sampler").error(f"{make} takes no sampler")
    found = filled(MAKERS[make], plain, place, given)
    if "sampler" in options:
        at = place.at("sampler")
        value = table_of(options["sampler"], at, '{ combos = "unseen" }')
        found["sampler"] = filled(shapes.Sampler, value, at)
    return found


def made(make: str, options: Mapping[str, Any], model: HookedMultimodal) -> PairDataset:
    """The pairs that a maker gives."""
    plain = {name: value for name, value in options.items() if name != "sampler"}
    own = typed(MAKERS[make], plain)
    if "sampler" in options:
        own["sampler"] = shapes.Sampler(**typed(shapes.Sampler, options["sampler"]))
    return MAKERS[make](model, **own)


def loaded(folder: Path, model: HookedMultimodal) -> PairDataset:
    """The pairs of a folder."""
    return PairDataset.load(folder, model)


def distorted(pairs: PairDataset, value: Any, scene: Scene) -> PairDataset:
    """The same pairs with distorted pictures in the clean prompts."""
    change = Distortion().make(value, scene)
    return PairDataset([replace(pair, clean=change(pair.clean)) for pair in pairs], scene.model)


def corrupted(pairs: PairDataset, value: Any, scene: Scene) -> PairDataset:
    """The same clean prompts with other corrupt ones."""
    return corruption.corrupt(pairs, Distortion().make(value, scene))


def check_corruption(value: Any, place: Place) -> Any:
    return Distortion().check(value, place, Known((), {}))


def kept(pairs: PairDataset, keep: str, name: str) -> PairDataset:
    """The pairs that stay.

    Raises:
        PairError: none does.
    """
    if keep == "all":
        return pairs
    found = pairs.check()
    mask = found["clean_right"] & found["flips"] if keep == "flips" else found["clean_right"]
    if not mask.any():
        raise PairError(
            f"of the {len(pairs)} pairs of {name!r} the model answers "
            f"{int(found['clean_right'].sum())} rightly, and none is left by keep = {keep!r}"
        )
    return pairs[mask.to_numpy()]
