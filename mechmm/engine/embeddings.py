"""What a dual encoder makes of pictures and texts: one vector each, compared by their cosine."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal


def is_dual(model: HookedMultimodal) -> bool:
    """Whether a model encodes pictures and texts apart and compares them."""
    return model.family.output == "logits_per_image"


def check_dual(model: HookedMultimodal, instead: str = "use CLIP or SigLIP") -> None:
    """Refuse any other model.

    Args:
        instead: what to do.

    Raises:
        ValueError: with what it is.
    """
    if not is_dual(model):
        raise ValueError(
            f"{model.family.architecture} is no dual encoder: it has no embeddings of pictures and "
            f"texts in one space; {instead}"
        )


@torch.no_grad()
def embeddings(
    model: HookedMultimodal, batch: Batch
) -> tuple[Float[Tensor, "image d"], Float[Tensor, "text d"]]:
    """The embeddings of a batch's pictures and texts, of norm 1, on the CPU. Live hooks act."""
    output = model.hf_model(**batch.inputs)
    image, text = (getattr(output, f"{name}_embeds") for name in ("image", "text"))
    return image.float().cpu(), text.float().cpu()
