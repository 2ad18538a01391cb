"""How well a dual encoder (CLIP, SigLIP) matches images with texts, one number per image.

Each metric takes `logits_per_image` [image, text] and for every image the number of its own text.
The scores of CLIP are compared by softmax over texts (Radford et al. 2103.00020).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "image text"]
Own = Int[Tensor, "image"] | None


def match_logit_diff(logits: Logits, own: Own = None) -> Float[Tensor, "image"]:
    """The logit of the own text minus the largest of the others.

    Args:
        own: number of each image's own text; default: image i belongs to text i.

    Raises:
        ValueError: fewer than two texts, or an own text that is not there.
    """
    at = _own(logits, own)
    mine = logits.gather(1, at[:, None])[:, 0]
    others = logits.scatter(1, at[:, None], -torch.inf)
    return mine - others.amax(1)


def match_log_prob(logits: Logits, own: Own = None) -> Float[Tensor, "image"]:
    """The log-probability of the own text among all texts (arguments as `match_logit_diff`)."""
    return logits.log_softmax(1).gather(1, _own(logits, own)[:, None])[:, 0]


def match_accuracy(logits: Logits, own: Own = None) -> Float[Tensor, "image"]:
    """1 where the own text has the largest logit (arguments as `match_logit_diff`)."""
    return (logits.argmax(1) == _own(logits, own)).to(logits.dtype)


def _own(logits: Tensor, own: Tensor | None) -> Tensor:
    images, texts = logits.shape
    if texts < 2:
        raise ValueError("one text leaves nothing to compare it with; give the batch two or more")
    at = torch.arange(images, device=logits.device) if own is None else own.to(logits.device)
    if len(at) != images or bool(((at < 0) | (at >= texts)).any()):
        raise ValueError(
            f"{images} images and {texts} texts: give every image the number of its own text, "
            f"from 0 to {texts - 1}; got {at.tolist()}"
        )
    return at
