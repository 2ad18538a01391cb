"""From the stream behind the last block to logits: final norm, unembedding, scale, softcap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechmm.data.metrics import chosen, logits_at
from mechmm.engine.record import Recording
from mechmm.model.batch import Batch
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
        scale: that logits are multiplied with, before any softcap (Cohere).
    """

    tower: Tower
    unembed: nn.Linear
    softcap: float | None
    rows: Int[Tensor, "prompt token"] | None = None
    banned: Bool[Tensor, "prompt token"] | None = None
    scale: float = 1.0

    def __call__(self, stream: Tensor, prompts: Tensor, at: Tensor) -> Tensor:
        """Logits [trial, token, vocab] (or the chosen ones) of tokens in one row.

        Args:
            stream: what left the last block [1, token, d_model].
            prompts: the prompt of every trial [trial].
            at: where the tokens of every trial are [trial, token].
        """
        normed = self.normed(stream)[0][at]
        if self.rows is None:
            logits = self.unembed(normed)
        else:
            rows = self.rows[prompts]
            logits = torch.einsum("ntd,nvd->ntv", normed, self.unembed.weight[rows])
            if self.unembed.bias is not None:
                logits = logits + self.unembed.bias[rows][:, None]
        logits = self.bent(logits)
        if self.banned is not None:
            lowest = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(self.banned[prompts][:, None], lowest)
        return logits

    def normed(self, stream: Float[Tensor, "1 token d_model"]) -> Float[Tensor, "1 token d_model"]:
        """What the unembedding is given."""
        self.tower.shape = stream.shape
        norm = self.tower.module(self.tower.row.ln_final)
        return stream if norm is None else norm(stream)

    def bent(self, logits: Tensor) -> Tensor:
        """Products of the unembedding, scaled and capped in place: logits."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def head_of(
    model: HookedMultimodal, recording: Recording, rows: Int[Tensor, "prompt token"] | None
) -> Head | None:
    """The end of a language model, or None where its logits are not what this module computes.

    Checked against the recorded logits, on the tokens that are read.
    """
    if recording.wanted is None:
        return None
    wanted = recording.wanted.to(recording.logits.device)
    there = torch.arange(len(wanted), device=wanted.device)[:, None]
    stream = recording.stream(len(recording.blocks))[there, wanted]
    return _fitting(model, stream, chosen(recording.logits, rows), rows)


def head_for(model: HookedMultimodal, batch: Batch) -> Head:
    """The end of a language model, checked against its logits after the last token of some prompts.

    Raises:
        ValueError: an encoder, which has no unembedding; logits that are made in another way.
    """
    name = model.family.architecture
    if model.family.unembed is None:
        raise ValueError(
            f"{name} is an encoder without an unembedding, so nothing reads its stream as words; "
            "use a model that writes text"
        )
    kept: list[Tensor] = []
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    last = batch.layout.last[:, None]

    def keep(value: Tensor, hook: Any) -> None:
        kept.append(value.detach())

    with torch.no_grad(), model.hooks(fwd_hooks=[(hook, keep)]):
        if model.config.is_encoder_decoder:
            logits = model(batch)[:, -1:]  # the layout is that of the encoder
            last = torch.full_like(last, kept[0].shape[1] - 1)
        else:
            logits = logits_at(model, batch, last)
    there = torch.arange(len(last), device=kept[0].device)[:, None]
    head = _fitting(model, kept[0][there, last.to(kept[0].device)], logits, None)
    if head is None:
        raise ValueError(
            f"final norm and unembedding of {name} do not give its logits; a lens would read "
            "something else than the model does"
        )
    return head


@torch.no_grad()
def _fitting(
    model: HookedMultimodal,
    stream: Float[Tensor, "prompt token d_model"],
    real: Float[Tensor, "prompt token word"],
    rows: Int[Tensor, "prompt row"] | None,
) -> Head | None:
    """The end that makes the real logits of what left the last block, if there is one."""
    tower = model.towers[LANGUAGE]
    if not isinstance(tower.unembed, nn.Linear):
        return None
    count = stream.shape[:2]
    at = torch.arange(count.numel(), device=real.device).view(count)
    prompts = torch.arange(count[0], device=real.device)
    banned = (real == torch.finfo(real.dtype).min).all(1)
    for scale, cap in _bends(tower):
        head = Head(tower, tower.unembed, cap, rows, banned if banned.any() else None, scale)
        both = (head(stream.flatten(0, 1)[None], prompts, at), real)
        if close(*(logits.masked_fill(banned[:, None], 0) for logits in both)):
            return head
    return None


def _bends(tower: Tower) -> Iterator[tuple[float, float | None]]:
    """Scales and softcaps that logits may have: not every model does what its config says."""
    scales = (1.0, getattr(tower.config, "logit_scale", None))
    caps = (None, getattr(tower.config, "final_logit_softcapping", None))
    for scale, cap in product(dict.fromkeys(scales), dict.fromkeys(caps)):
        if scale is not None:
            yield scale, cap


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two computations of one thing agree, up to the order of their sums."""
    error = 1e-4 if a.dtype == torch.float32 else 2e-2
    scale = float(b.float().abs().max().clamp(min=1e-6))
    return float((a.float() - b.float()).abs().max()) <= error * scale
