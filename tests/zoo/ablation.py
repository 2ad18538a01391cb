"""Edges of planted models ablated by the reference, which shares nothing with the engine."""

from __future__ import annotations

import torch

from mechmm.data.metrics import logit_diff
from mechmm.testing.edges import EdgeReference
from mechmm.zoo import planted


class Ablation:
    """Pairs of a planted model, and the metric with any of its edges ablated."""

    def __init__(self, made: planted.Planted, n: int) -> None:
        self.made, self.pairs = made, made.pairs(n, seed=1)
        (batch,) = self.pairs.batches(n)
        self.answers = batch.answers
        self.clean, self.corrupt = dict(batch.clean.inputs), dict(batch.corrupt.inputs)
        self.reference = EdgeReference(made.model.hf_model)
        self.other = self.reference.values(self.corrupt)
        self.full = self.metric(self.reference.logits(self.clean))
        self.empty = self.metric(self.reference.logits(self.corrupt))

    def metric(self, logits):
        """Answer less foil [batch]; all pairs may be repeated along the batch."""
        return logit_diff(logits, self.answers.repeat(len(logits) // len(self.pairs)))

    def faithfulness(self, on):
        m = self.metric(self.reference.logits(self.clean, on, self.other))
        return (m - self.empty) / (self.full - self.empty)

    def effects(self, edges, at_once: int = 48):
        """What ablating each edge alone takes from the metric, as a share [edge, pair]."""
        found, n = [], len(self.pairs)
        for start in range(0, len(edges), at_once):
            part = {edge: i for i, edge in enumerate(edges[start : start + at_once])}
            row = torch.arange(len(part) * n) // n
            repeat = [
                {name: x.repeat(len(part), *[1] * (x.ndim - 1)) for name, x in values.items()}
                for values in (self.clean, self.other)
            ]
            logits = self.reference.logits(
                repeat[0], lambda e, row=row, part=part: e not in part or row != part[e], repeat[1]
            )
            left = self.metric(logits).view(len(part), n)
            found.append((self.full - left) / (self.full - self.empty))
        return torch.cat(found)
