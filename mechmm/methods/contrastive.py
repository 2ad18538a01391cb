"""Visual contrastive decoding: what the picture adds to the answer, beyond what language expects.

With p the distribution over the next token after the prompt with its picture, and q that after the
same prompt with a distorted picture, logits become

    (1 + alpha) log p - alpha log q      where p >= beta max p,      -inf elsewhere:

what is as likely without seeing well is pushed down, and what is implausible with the picture stays
out. alpha = 0 is greedy decoding's own order. Leng et al. 2311.16922.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor

from mechmm.data.contrast import check_strength, contrasted
from mechmm.data.metrics import continued, last_logits
from mechmm.model.batch import Batch, InputError
from mechmm.model.hooked import HookedMultimodal


@dataclass(eq=False)
class ContrastiveDecoding(LogitsProcessor):
    """For `generate`: contrasts every step with the same text after a distorted picture.

        distorted = model.encode(text, mm.data.corruption.gaussian_noise(picture, 0.5))
        decoding = mm.ContrastiveDecoding(model, batch, distorted)
        model.generate(batch, logits_processor=[decoding], max_new_tokens=5)

    Every step runs the distorted prompt whole, hooks included.

    Attributes:
        batch: what is generated from.
        distorted: the same prompts with distorted pictures.
        alpha, beta: see above.

    Raises:
        InputError: prompts whose tokens differ.
        ValueError: as `contrasted`.
    """

    model: HookedMultimodal
    batch: Batch
    distorted: Batch
    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_strength(self.alpha, self.beta)
        ours, theirs = self.batch.input_ids, self.distorted.input_ids
        if ours.shape != theirs.shape or not bool((ours == theirs).all()):
            raise InputError(
                "the distorted prompts are other texts than those generated from; distort the "
                "picture alone, and encode both with padding on the same side"
            )

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "batch pos"], scores: Float[Tensor, "batch vocab"]
    ) -> Float[Tensor, "batch vocab"]:
        """The scores of the next token, contrasted."""
        new = input_ids[:, self.batch.input_ids.shape[1] :]
        logits = last_logits(self.model, continued(self.distorted, new))
        return contrasted(scores, logits.to(scores), self.alpha, self.beta)
