"""A dual encoder that sees with the vision tower of another model.

A language model's vision tower mostly is that of a dual encoder, as it was or trained further. With
its weights in the place of the encoder's own, the encoder's last norm, projection and texts read
what that tower does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mechmm.engine.embeddings import check_dual
from mechmm.model.hooked import VISION, HookedMultimodal

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SAME = (*SIZES, "image_size", "patch_size", "hidden_act", "layer_norm_eps")
"""Entries of a vision tower's config on which its activations depend, beside the weights."""


def check_lent(model: HookedMultimodal, dual: HookedMultimodal) -> None:
    """Refuse a vision tower that is not of the kind that a dual encoder has.

    Raises:
        ValueError: a model that is no dual encoder, or no vision tower of its kind and sizes.
    """
    check_dual(dual)
    name, theirs = model.family.architecture, dual.family.architecture
    if VISION not in model.towers:
        raise ValueError(f"{name} has no vision tower; its towers are {', '.join(model.towers)}")
    towers = [one.towers[VISION].config for one in (model, dual)]
    kinds = [tower.model_type for tower in towers]
    odd = [key for key in SAME if len({getattr(tower, key, None) for tower in towers}) > 1]
    if kinds[0] != kinds[1] or odd:
        own, other = ([getattr(tower, key, None) for key in odd] for tower in towers)
        why = f"{odd} are {own} and {other}" if odd else f"they are {kinds[0]} and {kinds[1]}"
        raise ValueError(
            f"the vision tower of {name} is not of the kind that {theirs} has: {why}; give the "
            "dual encoder from which the tower was taken"
        )


@contextmanager
def lent(model: HookedMultimodal, dual: HookedMultimodal) -> Iterator[None]:
    """Let a dual encoder see with the weights of a model's vision tower, for a while. What that
    tower lacks (SigLIP's pooling head, which language models leave out) stays the encoder's.

    Raises:
        ValueError: as `check_lent`.
    """
    check_lent(model, dual)
    theirs = dict(model.towers[VISION].root.named_parameters())
    mine = {
        name: value for name, value in dual.towers[VISION].root.named_parameters() if name in theirs
    }
    kept = {name: value.data for name, value in mine.items()}
    try:
        for name, value in mine.items():
            value.data = theirs[name].data.to(value)
        yield
    finally:
        for name, value in mine.items():
            value.data = kept[name]
