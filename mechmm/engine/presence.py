"""What the metric is of prompts some features of which are absent: the game behind attributions.

With x what the hooks hold at the places of a feature in the clean prompt and x' what they hold
there in the baseline,

    v(z) = m(x' + z (x - x')),     z [feature]: 1 present, 0 absent.

v(1) is the clean prompt's metric; v(0) that of a prompt whose features all are as in the baseline.
Where z is 0 or 1 the engine runs it; anywhere else `slope` gives it with its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from mechmm.data.corruption import blank, blur, mean_patches
from mechmm.data.metrics import Metric, Reading, prepared, score
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.cells import Cells, Filled, concatenated
from mechmm.engine.checks import (
    check_choice,
    check_limits,
    check_metric,
    check_model,
    check_pairs,
)
from mechmm.engine.estimate import constant
from mechmm.engine.features import READ, SEEN, Features, spread
from mechmm.engine.flow import Edit
from mechmm.engine.places import Ints, Places, Values
from mechmm.engine.sweep import Report
from mechmm.engine.whole import tile
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

BLUR = 8
"""The radius of `blur` is the picture's longer side over this."""
BASELINES = ("mean", "black", "blur", "corrupt")
"""What absent patches are: those of the picture's mean colour, of a black or a blurred picture, or
of the pair's corrupt prompt. Absent words are the mean over all words of all pairs, or those of the
corrupt prompt."""


def plain_picture(picture: Image.Image, baseline: str) -> Image.Image:
    """What stands for the whole picture in a baseline."""
    if baseline == "blur":
        return blur(picture, max(picture.size) / BLUR)
    return mean_patches(picture) if baseline == "mean" else blank(picture, color=(0, 0, 0))


@dataclass(frozen=True, eq=False)
class Presence:
    """The metric of every pair's clean prompt, features present or absent.

    Attributes:
        baseline: a name in `BASELINES`.
        batch_size, tokens: as for `Cells`.

    Raises:
        ValueError: an unknown baseline; as `Cells`.
    """

    model: HookedMultimodal
    pairs: PairDataset
    features: Features
    metric: Metric
    baseline: str = "mean"
    batch_size: int = 16
    tokens: int | None = None

    def __post_init__(self) -> None:
        check_game(self.model, self.pairs, self.metric, self.baseline)
        check_limits(tokens=self.tokens, batch_size=self.batch_size)

    @property
    def hooks(self) -> tuple[str, ...]:
        """Where features are, as `Spread.hook` numbers them."""
        return (SEEN, READ) if SEEN in self.model.hook_dict else (READ, READ)

    # Features present or absent --------------------------------------------------------------

    def values(
        self, absent: Bool[Tensor, "cell example feature"], report: Report | None = None
    ) -> Filled:
        """The metric with some features absent, cell by cell."""
        known = absent & self.features.present
        changes = partial(self._changes, known.numpy())
        what = (self.model, self.pairs, len(absent), changes, self.metric)
        return Cells(*what, self.batch_size, self.tokens).run(report)

    def _changes(
        self, absent: Bool[np.ndarray, "cell example feature"], batch: PairBatch, part: Reading
    ) -> tuple[Places, Values]:
        count, rows = len(batch), []
        for prompt, pair in enumerate(batch.indices):
            own = spread(batch.clean.layout, prompt, self.features.own[pair])
            cell, at = absent[:, pair][:, own.feature].nonzero()
            where = (own.hook[at], own.row[at], own.position[at], np.full(len(at), -1))
            rows.append(Places((), np.zeros(0, int), cell * count + prompt, *where))
        places = concatenated(self.hooks, count, len(absent), rows)
        instead = self.instead(batch)

        def give(hook: str, at: Ints, now: Tensor) -> Tensor:
            new = instead[hook]
            index = (torch.as_tensor(a[at]) for a in (places.row, places.position))
            return new[tuple(index)].to(now)

        return places, give

    # The baseline ----------------------------------------------------------------------------

    @torch.no_grad()
    def instead(self, batch: PairBatch) -> dict[str, Tensor]:
        """What the hooks hold in the baseline of a batch, on the CPU."""
        if self.baseline == "corrupt":
            return self._caught(batch.corrupt)
        found = self._caught(self._plain(batch))
        if bool((self.features.present & ~self.features.image).any()):
            words = torch.zeros(found[READ].shape[:2], dtype=torch.bool)
            for prompt, pair in enumerate(batch.indices):
                own = spread(batch.clean.layout, prompt, self.features.own[pair])
                kind = ~self.features.image[pair][torch.from_numpy(own.feature)]
                words[own.row[kind], own.position[kind]] = True
            found[READ] = torch.where(words[..., None], self._word.to(found[READ]), found[READ])
        return found

    def _plain(self, batch: PairBatch) -> Batch:
        """The clean prompts with the baseline's pictures."""
        prompts = [pair.clean for pair in batch.pairs]
        pictures = [[plain_picture(i, self.baseline) for i in p.images] for p in prompts]
        found = self.model.encode([p.text for p in prompts], pictures)
        if found.layout.media != batch.clean.layout.media:
            raise ValueError(
                f"the {self.baseline} picture is cut into other patches than the picture; use the "
                "baseline corrupt"
            )
        return found

    def _caught(self, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {hook: [] for hook in self.hooks}

        def catch(value: Tensor, hook: Any) -> None:
            found[hook.name].append(value.detach().cpu().clone())

        with self.model.hooks(fwd_hooks=[(hook, catch) for hook in found]):
            self.model(batch, logits_to_keep=1)
        return {hook: torch.cat(values) for hook, values in found.items()}

    @cached_property
    def _word(self) -> Float[Tensor, " d_model"]:
        """The mean over all words of all pairs."""
        total, count = torch.zeros(()), 0
        for batch in self.pairs.batches(self.batch_size):
            stream = self._caught(batch.clean)[READ].double()
            for prompt, pair in enumerate(batch.indices):
                own = spread(batch.clean.layout, prompt, self.features.own[pair])
                kind = ~self.features.image[pair][torch.from_numpy(own.feature)]
                total = total + stream[own.row[kind], own.position[kind]].sum(0)
                count += int(kind.sum())
        return total / max(1, count)

    # Anywhere between ------------------------------------------------------------------------

    def graded(self, batch: PairBatch) -> Graded:
        """v with its gradient, on one batch."""
        return Graded(self, batch)


class Graded:
    """v(z) with its gradient, on one batch of pairs."""

    def __init__(self, presence: Presence, batch: PairBatch) -> None:
        self.presence, self.batch = presence, batch
        model = presence.model
        self.answers = prepared(model, batch.clean, batch.answers, presence.metric)
        self.instead = {h: v.to(model.device) for h, v in presence.instead(batch).items()}
        layout, own = batch.clean.layout, presence.features.own
        self.spreads = [spread(layout, n, own[pair]) for n, pair in enumerate(batch.indices)]

    def __call__(self, z: Float[Tensor, "row feature"]) -> Float[Tensor, " row"]:
        """v of every row; the batch may be repeated, all of its prompts before the first again."""
        model, times = self.presence.model, len(z) // len(self.batch)
        copies = tile(self.batch.clean, times)
        edits: list[Edit] = [(hook, self._edit(hook, z)) for hook in self.instead]
        with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=edits):
            found = score(model, copies, self.answers.repeat(times), self.presence.metric)
        return found

    def _edit(self, hook: str, z: Tensor) -> Any:
        base, seen = self.instead[hook], 0
        where = [self._at(hook, prompt) for prompt in range(len(self.batch))]
        prompt = np.repeat(np.arange(len(where)), [len(s[0]) for s in where])
        feature, row, position = (np.concatenate(part) for part in zip(*where, strict=True))
        times = len(z) // len(self.batch)
        copy = np.arange(times)[:, None]
        columns = (copy * len(self.batch) + prompt, copy * 0 + feature)
        own, which = (torch.as_tensor(c.ravel(), device=z.device) for c in columns)
        there = torch.as_tensor((copy * len(base) + row).ravel(), device=z.device)
        at = torch.as_tensor(np.tile(position, times), device=z.device)

        def edit(value: Tensor, hook: Any) -> Tensor:
            nonlocal seen  # a tower may run in several parts, and a metric may read several runs
            start, seen = seen, (seen + len(value)) % (len(base) * times)
            mine = (there >= start) & (there < start + len(value))
            rows, places = there[mine] - start, at[mine]
            old = base[there[mine] % len(base), places].to(value)
            share = z[own[mine], which[mine]].to(value)[:, None]
            new = old + share * (value[rows, places] - old)
            return value.index_put((rows, places), new)

        return edit

    def _at(self, hook: str, prompt: int) -> Sequence[np.ndarray]:
        own, number = self.spreads[prompt], self.presence.hooks.index(hook)
        here = own.hook == number if len(set(self.presence.hooks)) > 1 else own.hook >= 0
        return own.feature[here], own.row[here], own.position[here]


def check_game(model: HookedMultimodal, pairs: PairDataset, metric: Metric, baseline: str) -> None:
    """Refuse what cannot be played, before anything runs.

    Raises:
        ValueError: an unknown baseline; no pairs, or those of another model; a model that gives no
            logits after a prompt; a metric that does not give one number per example.
    """
    check_model(model)
    check_pairs(pairs, "clean")
    check_choice("baseline", baseline, BASELINES)
    if pairs.model is not model:
        raise ValueError(
            "the pairs are aligned for another model; align them for this one: "
            "PairDataset(pairs, model)"
        )
    check_metric(model, pairs, metric)
