"""Every text with every picture: logits for all combinations of the parts of some pairs.

Text j with picture i is the clean prompt j in which the embeddings of all patches are those of
prompt i, so that everything behind them runs as if the picture were that one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.engine import Engine
from mechmm.engine.features import READ, SEEN
from mechmm.engine.located import Located, Where
from mechmm.engine.places import Ints, Places
from mechmm.engine.record import values
from mechmm.engine.shelf import Shelf
from mechmm.engine.sweep import Report
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.layout import SpanError


@dataclass(frozen=True, eq=False)
class Crossed:
    """What texts with pictures gave.

    Attributes:
        logits: after every text with every picture, of some tokens [text, picture, token]; NaN
            where it was not reached.
        complete: whether all were.
    """

    logits: Float[Tensor, "text picture token"]
    complete: bool


@torch.no_grad()
def crossed(
    model: HookedMultimodal,
    pairs: PairDataset,
    read: Int[Tensor, " token"],
    batch_size: int = 16,
    tokens: int | None = None,
    report: Report | None = None,
) -> Crossed:
    """The logits of some tokens after every clean text with every clean picture.

    An interrupt from the keyboard ends the run with what is finished.

    Args:
        read: the tokens whose logits are read.
        batch_size: texts that run together, each with all pictures. tokens: as for `patch`.
        report: called with (texts done, texts in all).

    Raises:
        SpanError: a prompt without a picture; pictures that are cut into other patches.
    """
    given = torch.stack(
        [own for batch in pairs.batches(batch_size) for own in _given(model, batch)]
    )
    found = torch.full((len(pairs), len(pairs), len(read)), torch.nan)
    try:
        for batch in pairs.batches(batch_size):
            own = torch.tensor(batch.indices)
            for trials, logits in _batch(model, batch, given, read.to(model.device), tokens):
                picture, text = (torch.as_tensor(part) for part in np.divmod(trials, len(batch)))
                found[own[text], picture] = logits[:, 0].float().cpu()
            if report is not None:
                report(int(own[-1]) + 1, len(pairs))
    except KeyboardInterrupt:
        return Crossed(found, False)
    return Crossed(found, True)


def check_pictures(pairs: PairDataset, batch_size: int) -> None:
    """Refuse pairs whose pictures cannot stand for each other.

    Raises:
        SpanError: a prompt without a picture; pictures that are cut into other patches.
    """
    first = None
    for batch in pairs.batches(batch_size):
        for prompt, pair in enumerate(batch.indices):
            media = batch.clean.layout.media[prompt]
            first = media if first is None else first
            if not media:
                raise SpanError(f"pair {pair}: the clean prompt has no picture; drop the pair")
            if media != first:
                raise SpanError(
                    f"pair {pair}: its pictures are cut into other patches than those of pair 0, "
                    "so that they cannot stand for each other; resize them or drop the pair"
                )


def _hook(model: HookedMultimodal) -> tuple[str, str, str]:
    """Where pictures enter, its tower, and the span that they fill there."""
    tower = SEEN in model.hook_dict
    return (SEEN, "vision", "all") if tower else (READ, LANGUAGE, "image")


def _given(model: HookedMultimodal, batch: PairBatch) -> Iterator[Float[Tensor, "place d"]]:
    """What every picture enters as."""
    hook, tower, span = _hook(model)
    found, finder = values(model, batch.clean, [hook])[hook].cpu(), Located(batch.clean.layout)
    for prompt in range(len(batch)):
        row, position = finder.covered(tower, span, prompt).T
        yield found[row, position]


def _batch(
    model: HookedMultimodal,
    batch: PairBatch,
    given: Float[Tensor, "picture place d"],
    read: Int[Tensor, " token"],
    tokens: int | None,
) -> Iterator[tuple[Ints, Float[Tensor, "trial one token"]]]:
    """Logits of some texts with every picture; trial = picture * texts + text."""
    hook, tower, span = _hook(model)
    finder, count = Located(batch.clean.layout), len(batch)
    rows, wanted = read.expand(count, -1), batch.clean.layout.last[:, None]
    engine = Engine(
        model, batch.clean, (hook,), wanted, rows, tokens=tokens, shelf=Shelf(), kept=()
    )
    yield np.array(batch.indices) * count + np.arange(count), engine.base
    wheres = [finder.covered(tower, span, prompt) for prompt in range(count)]
    others = [i * count + j for j, pair in enumerate(batch.indices) for i in _but(pair, len(given))]
    places = _places(hook, wheres, np.array(others, dtype=np.int64), len(given))
    number = np.tile(np.arange(given.shape[1]), len(others))

    def give(hook: str, at: Ints, now: Tensor) -> Tensor:
        picture = torch.as_tensor(places.trial[at] // count)
        return given[picture, torch.as_tensor(number[at])].to(now)

    yield from engine.run(places, give)


def _but(pair: int, count: int) -> list[int]:
    return [i for i in range(count) if i != pair]


def _places(hook: str, wheres: list[Where], trials: Ints, pictures: int) -> Places:
    """All patches of the text's own picture, for every trial."""
    count, size = len(wheres), len(wheres[0])
    at = np.concatenate([wheres[trial % count] for trial in trials] or [np.zeros((0, 2), int)])
    zeros = np.zeros(len(at), dtype=np.int64)
    prompts, trial = np.tile(np.arange(count), pictures), np.repeat(trials, size)
    return Places((hook,), prompts, trial, zeros, at[:, 0], at[:, 1], zeros - 1)
