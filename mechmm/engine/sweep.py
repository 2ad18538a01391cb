"""Many interventions over many pairs: the whole model again for every site, many copies a batch.

A chunk of S sites over a batch of B pairs runs as S * B prompts; each hook point that the chunk
touches gets one hook, which writes the new values of all its rows at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechmm.data.metrics import Metric, prepared, score
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.sites import READING, Sites, places, tower_rows
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

Source = Literal["clean", "corrupt", "zero", "mean", "resample"]
"""Where the values that a site is set to come from: the pair's own clean or corrupt run; zero; the
mean over all pairs and the site's positions in their clean runs; another pair's clean run."""

Report = Callable[[int, int], None]
"""Called with (forward passes done, forward passes in all)."""


@dataclass(frozen=True)
class Plan:
    """What a sweep will run: plain data.

    Attributes:
        cells: sites times pairs.
        passes: forward passes of the whole model.
        rows: prompts per forward pass, at most.
    """

    cells: int
    passes: int
    rows: int


@dataclass(frozen=True)
class Edit:
    """New values for some places of one hook's tensor.

    Attributes:
        rows, positions, heads: one entry per place; head -1: all heads.
        values: [place, d] or [place, head, d_head].
    """

    rows: Tensor
    positions: Tensor
    heads: Tensor
    values: Tensor

    def __call__(self, tensor: Tensor, hook: Any) -> Tensor:
        """A TransformerLens hook that sets the places."""
        tensor = tensor.clone()
        for head in self.heads.unique().tolist():
            at = self.heads == head
            index = (self.rows[at], self.positions[at], *(() if head < 0 else (head,)))
            values = self.values[at] if head < 0 else self.values[at, head]
            tensor[index] = values.to(tensor)
        return tensor


def plan(pairs: PairDataset, sites: Sites, batch_size: int, tokens: int) -> Plan:
    """What `sweep` will run for these arguments."""
    sizes = [batch.clean.input_ids.shape for batch in pairs.batches(batch_size)]
    copies = [_copies(prompts * positions, tokens) for prompts, positions in sizes]
    passes = sum(-(-len(sites) // several) for several in copies)
    rows = max(several * prompts for several, (prompts, _) in zip(copies, sizes, strict=True))
    return Plan(len(sites) * len(pairs), passes, rows)


def _copies(size: int, tokens: int) -> int:
    """How many copies of a batch of `size` tokens run together."""
    return max(1, tokens // size)


@torch.no_grad()
def sweep(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric,
    *,
    base: Literal["clean", "corrupt"],
    source: Source,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int = 16_384,
    report: Report | None = None,
) -> Tensor:
    """The metric of every pair with every site set to new values, one site at a time.

    Args:
        base: which of a pair's prompts runs.
        source: where the new values come from.
        seed: of `resample` and of random sites.
        batch_size: pairs that run together.
        tokens: prompts times positions of one forward pass, at most.

    Returns:
        [site, example], float32 on the CPU.
    """
    done, total = 0, plan(pairs, sites, batch_size, tokens).passes
    values = torch.empty(len(sites), len(pairs))
    donor = _Donor(model, pairs, sites, source, seed, batch_size)
    at = 0
    for batch in pairs.batches(batch_size):
        runs = batch.clean if base == "clean" else batch.corrupt
        per_pass = _copies(runs.input_ids.numel(), tokens)
        given = donor.values(batch, at)
        answers = prepared(model, batch.clean, batch.answers, metric)
        for start in range(0, len(sites), per_pass):
            chunk = range(start, min(start + per_pass, len(sites)))
            edits: list[Any] = list(_edits(sites.table, chunk, batch, given, seed))
            with model.hooks(fwd_hooks=edits):
                found = score(model, tile(runs, len(chunk)), answers.repeat(len(chunk)), metric)
            values[start : chunk.stop, at : at + len(runs)] = (
                found.float().cpu().view(len(chunk), len(runs))
            )
            done += 1
            if report is not None:
                report(done, total)
        at += len(runs)
    return values


def tile(batch: Batch, times: int) -> Batch:
    """A batch that holds every prompt `times` times, all prompts before the first repeats."""
    extra = {k: _repeat(v, times) if isinstance(v, Tensor) else v for k, v in batch.extra.items()}
    layout = batch.layout
    tiled = replace(
        layout,
        modality=_repeat(layout.modality, times),
        image=_repeat(layout.image, times),
        view=_repeat(layout.view, times),
        row=_repeat(layout.row, times),
        column=_repeat(layout.column, times),
        tokens=layout.tokens * times,
        media=layout.media * times,
        windows=layout.windows * times,
        defined={name: _repeat(mask, times) for name, mask in layout.defined.items()},
    )
    return replace(
        batch,
        input_ids=_repeat(batch.input_ids, times),
        attention_mask=_repeat(batch.attention_mask, times),
        position_ids=None if batch.position_ids is None else _repeat(batch.position_ids, times),
        extra=extra,
        layout=tiled,
        images=batch.images * times,
    )


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def cache(model: HookedMultimodal, batch: Batch, hooks: list[str]) -> dict[str, Tensor]:
    """The activations of some hooks on one batch."""
    _, found = model.run_with_cache(batch, names_filter=sorted(set(hooks)), logits_to_keep=1)
    return dict(found.items())


Given = Callable[[int, int, list[tuple[int, int]]], Tensor]
"""(site, prompt, its places) -> the values to write there."""


class _Donor:
    """Finds the values that sites are set to."""

    def __init__(self, model, pairs, sites, source: Source, seed: int, batch_size: int) -> None:
        self.model, self.pairs, self.sites, self.source = model, pairs, sites, source
        self.seed, self.hooks = seed, sites.table["hook"].unique().tolist()
        self.constants = self._constants(batch_size) if source in ("zero", "mean") else []
        others = np.random.default_rng(seed).permutation(len(pairs))
        # A cycle through a random order: every pair gives once, to another pair.
        self.other = dict(zip(others.tolist(), np.roll(others, 1).tolist(), strict=True))

    def values(self, batch: PairBatch, start: int) -> Given:
        """The values for the pairs of one batch."""
        if self.source in ("clean", "corrupt"):
            return self._own(batch)
        if self.source == "resample":
            return self._others(batch, start)
        return self._constant

    def _own(self, batch: PairBatch) -> Given:
        found = cache(self.model, getattr(batch, self.source), self.hooks)
        hooks = self.sites.table["hook"].to_list()

        def given(site: int, prompt: int, where: list[tuple[int, int]]) -> Tensor:
            rows, positions = zip(*where, strict=True)
            return found[hooks[site]][list(rows), list(positions)]

        return given

    def _constant(self, site: int, prompt: int, where: list[tuple[int, int]]) -> Tensor:
        value = self.constants[site]
        return value.expand(len(where), *value.shape)

    def _others(self, batch: PairBatch, start: int) -> Given:
        chosen = [self.other[start + i] for i in range(len(batch.clean))]
        donors = next(iter(self.pairs[chosen].batches(len(chosen)))).clean
        found = cache(self.model, donors, self.hooks)
        table = self.sites.table

        def given(site: int, prompt: int, where: list[tuple[int, int]]) -> Tensor:
            row = table.iloc[site]
            theirs = places(row, donors.layout, prompt, self.seed)
            if not theirs:
                raise ValueError(
                    f"pair {chosen[prompt]} has no position in span {row.span!r} to resample from; "
                    "use another ablation or drop the pair"
                )
            picked = [theirs[i * len(theirs) // len(where)] for i in range(len(where))]
            rows, positions = zip(*picked, strict=True)
            return found[row.hook][list(rows), list(positions)]

        return given

    def _constants(self, batch_size: int) -> list[Tensor]:
        """Per site, zero or the mean over all pairs and the site's positions of the clean run."""
        if self.source == "zero":
            shapes = self._shapes(batch_size)
            return [torch.zeros(shapes.get(hook, ())) for hook in self.sites.table["hook"]]
        sums: list[Any] = [0.0] * len(self.sites)
        counts = [0] * len(self.sites)
        for batch in self.pairs.batches(batch_size):
            found = cache(self.model, batch.clean, self.hooks)
            for site, (_, row) in enumerate(self.sites.table.iterrows()):
                for prompt in range(len(batch.clean)):
                    where = places(row, batch.clean.layout, prompt, self.seed)
                    if where:
                        rows, positions = zip(*where, strict=True)
                        values = found[row.hook][list(rows), list(positions)]
                        sums[site] = sums[site] + values.double().sum(0)
                        counts[site] += len(where)
        pairs = zip(sums, counts, strict=True)
        return [torch.as_tensor(total / max(count, 1)) for total, count in pairs]

    def _shapes(self, batch_size: int) -> dict[str, torch.Size]:
        """What one place of each hook holds; a tower fires only where there are images."""
        shapes: dict[str, torch.Size] = {}
        for batch in self.pairs.batches(batch_size):
            found = cache(self.model, batch.clean, self.hooks)
            shapes |= {hook: value.shape[2:] for hook, value in found.items()}
            if len(shapes) == len(self.hooks):
                break
        return shapes


def _edits(
    table: pd.DataFrame, chunk: range, batch: PairBatch, given: Given, seed: int
) -> Iterator[tuple[str, Edit]]:
    """One edit per hook point that the sites of a chunk touch."""
    layout, n_prompts = batch.clean.layout, len(batch.clean)
    n_images = tower_rows(layout)
    parts: dict[str, list[tuple[int, int, int, Tensor]]] = {}
    for copy, site in enumerate(chunk):
        row = table.iloc[site]
        per_copy = n_prompts if row.tower in READING else n_images
        head = -1 if pd.isna(row["head"]) else int(row["head"])
        for prompt in range(n_prompts):
            where = places(row, layout, prompt, seed)
            if where:
                values = given(site, prompt, where)
                parts.setdefault(row.hook, []).extend(
                    (copy * per_copy + r, p, head, v)
                    for (r, p), v in zip(where, values, strict=True)
                )
    for hook, found in parts.items():
        rows, positions, heads, values = zip(*found, strict=True)
        yield (
            hook,
            Edit(
                torch.tensor(rows),
                torch.tensor(positions),
                torch.tensor(heads),
                torch.stack(values),
            ),
        )
