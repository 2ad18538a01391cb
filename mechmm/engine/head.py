"""From the stream behind the last block to logits: final norm, unembedding, softcap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mechmm.data.metrics import chosen
from mechmm.engine.record import Recording
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower


@dataclass(frozen=True, eq=False)
class Head:
    """The end of a language model.

    Attributes:
        tower: the language model.
        unembed: its output layer.
        softcap: of the logits, or None.
        rows: the only tokens whose logits are read, by prompt [prompt, token], or None.
        banned: tokens that the model never says, by prompt [prompt, vocab or token]: their logits
            are the lowest number (Chameleon's image tokens).
    """

    tower: Tower
    unembed: nn.Linear
    softcap: float | None
    rows: Int[Tensor, "prompt token"] | None = None
    banned: Bool[Tensor, "prompt token"] | None = None

    def __call__(self, stream: Tensor, prompts: Tensor, at: Tensor) -> Tensor:
        """Logits [trial, token, vocab] (or the chosen ones) of tokens in one row.

        Args:
            stream: what left the last block [1, token, d_model].
            prompts: the prompt of every trial [trial].
            at: where the tokens of every trial are [trial, token].
        """
        self.tower.shape = stream.shape
        norm = self.tower.module(self.tower.row.ln_final)
        normed = (stream if norm is None else norm(stream))[0][at]
        if self.rows is None:
            logits = self.unembed(normed)
        else:
            rows = self.rows[prompts]
            logits = torch.einsum("ntd,nvd->ntv", normed, self.unembed.weight[rows])
            if self.unembed.bias is not None:
                logits = logits + self.unembed.bias[rows][:, None]
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.banned is not None:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(self.banned[prompts][:, None], lowest)
        return logits


def head_of(
    model: HookedMultimodal, recording: Recording, rows: Int[Tensor, "prompt token"] | None
) -> Head | None:
    """The end of a language model, or None where its logits are not what this module computes.

    Checked against the recorded logits, on the tokens that are read.
    """
    tower = model.towers[LANGUAGE]
    unembed = tower.unembed
    if not isinstance(unembed, nn.Linear) or recording.wanted is None:
        return None
    wanted = recording.wanted.to(recording.logits.device)
    there = torch.arange(len(wanted), device=wanted.device)[:, None]
    stream = recording.stream(len(recording.blocks))[there, wanted].flatten(0, 1)[None]
    at = torch.arange(wanted.numel(), device=wanted.device).view(wanted.shape)
    real = chosen(recording.logits, rows)
    banned = (real == torch.finfo(real.dtype).min).all(1)
    caps = [None, getattr(tower.config, "final_logit_softcapping", None)]
    for cap in dict.fromkeys(caps):
        head = Head(tower, unembed, cap, rows, banned if banned.any() else None)
        both = (head(stream, there[:, 0], at), real)
        if close(*(logits.masked_fill(banned[:, None], 0) for logits in both)):
            return head
    return None


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of one thing agree, up to the order of their sums."""
    error = 1e-4 if a.dtype == torch.float32 else 2e-2
    scale = float(b.float().abs().max().clamp(min=1e-6))
    return float((a.float() - b.float()).abs().max()) <= error * scale
