"""The hidden layer of a projector: two linear maps with an activation, or a gate, between them.

With h its activation at a token (`projector.hook_post`) the projector gives W h + b. Where that
goes into the language model as it is, unit k writes the column W[:, k] into the residual stream.
"""

from __future__ import annotations

from torch import nn

from mechmm.model.hooked import HookedMultimodal

PROJECTOR = "projector"
HIDDEN = "projector.hook_post"


def lacking(model: HookedMultimodal) -> str:
    """Why a model has no hidden units in its projector, empty where it has some."""
    if HIDDEN in model.hook_dict:
        return ""
    what = "has no hidden layer" if PROJECTOR in model.family.projectors else "is not there"
    return (
        f"the projector of {model.family.architecture} {what}, and so has no neurons; patch what "
        "it gives with mm.patch (sites=mm.sites.projector(model)), or score it as one node with "
        "mm.attribute"
    )


def ahead(model: HookedMultimodal) -> nn.Linear:
    """The linear map that gives the hidden layer what it is activated by."""
    return _linear(model, model.family.projectors[PROJECTOR].pre)


def behind(model: HookedMultimodal) -> nn.Linear:
    """The linear map that reads the hidden layer."""
    return _linear(model, model.family.projectors[PROJECTOR].post)


def standing(model: HookedMultimodal) -> str:
    """The tower whose positions the hidden layer has: the projector's, which are tokens of the
    prompt, or those of the tower that it reads where something else makes tokens of them."""
    row = model.family.projectors[PROJECTOR]
    return PROJECTOR if row.last else row.tower


def writes(model: HookedMultimodal) -> bool:
    """Whether the hidden units write into the language model's residual stream directly."""
    row = model.family.projectors[PROJECTOR]
    linears = [m for m in model.hf_model.get_submodule(row.root).modules() if type(m) is nn.Linear]
    return row.last and linears[-1] is behind(model)


def _linear(model: HookedMultimodal, name: str | None) -> nn.Linear:
    """A linear map of the projector."""
    root = model.family.projectors[PROJECTOR].root
    return model.hf_model.get_submodule(f"{root}.{name}")  # type: ignore[return-value] - as its row says
