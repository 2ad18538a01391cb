"""What leaves every block, read by the model's own end: final norm, unembedding, softcap."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.data.metrics import logits_at
from mechmm.engine.checks import check_model
from mechmm.engine.head import Head, head_of
from mechmm.engine.record import Recording
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal


class HeadError(ValueError):
    """A model's logits are not what its final norm and unembedding give."""


def exits_of(model: HookedMultimodal, batch: Batch) -> Iterator[Float[Tensor, "batch vocab"]]:
    """Logits after the last position: of what enters block 0, of what leaves each block, and in the
    place of the last one the model's own.

    Raises:
        ValueError: a model without logits after a prompt.
        HeadError: where the last one is not what the model gives.
    """
    check_model(model)
    streams, logits = _streams(model, batch)
    head = checked_head(model, batch, streams[-1], logits)
    return _read(head, streams[:-1], logits)


@torch.no_grad()
def _streams(model: HookedMultimodal, batch: Batch) -> tuple[list[Tensor], Tensor]:
    """What enters block 0 and leaves each block at the last positions [batch, 1, d_model], and the
    logits there."""
    count = len(model.towers[LANGUAGE].blocks)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in range(count))]
    wanted, kept = batch.layout.last[:, None], {}
    keep = partial(_keep, kept, wanted)
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        logits = logits_at(model, batch, wanted)
    return [kept[name] for name in names], logits


def _read(head: Head, streams: list[Tensor], logits: Tensor) -> Iterator[Tensor]:
    prompts = torch.arange(len(logits), device=logits.device)
    for stream in streams:
        with torch.no_grad():
            found = head(stream[:, 0][None], prompts, prompts[:, None])[:, 0]
        yield found
    yield logits[:, 0]


@torch.no_grad()
def checked_head(
    model: HookedMultimodal,
    batch: Batch,
    stream: Float[Tensor, "batch one d_model"],
    logits: Float[Tensor, "batch one vocab"],
) -> Head:
    """The model's end, checked on what left the last block at the last positions.

    Raises:
        HeadError: where it does not give the logits.
    """
    first = torch.zeros(len(batch), 1, dtype=torch.long)
    head = head_of(model, Recording(batch, first, logits, {}, {}, end=stream), None)
    if head is None:
        raise HeadError(
            f"{model.family.architecture}: final norm and unembedding do not give the model's "
            "logits, so that earlier layers cannot be read by them"
        )
    return head


def _keep(kept: dict[str, Tensor], wanted: Tensor, value: Tensor, hook: Any) -> None:
    """The stream at the last positions [batch, 1, d_model]."""
    rows = torch.arange(len(wanted), device=value.device)[:, None]
    kept[hook.name] = value[rows, wanted.to(value.device)].detach().clone()
