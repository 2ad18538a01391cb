"""Pairs whose clean prompts have the pictures of other pairs: the null of what a picture says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mechmm.data.pairs import PairDataset, PairError, Prompt


def exchanged(pairs: PairDataset, seed: int = 0) -> PairDataset:
    """The same texts, answers and corrupt prompts; every clean prompt with another pair's pictures.

    Pairs give their pictures along a cycle in random order, each to another one. Spans are left
    out: what they name is not there.

    Raises:
        PairError: one pair alone; the number of a pair whose prompts are not aligned any more,
            because the pictures have other sizes.
    """
    if len(pairs) < 2:
        raise PairError("one pair alone has no other to take a picture from; give two or more")
    order = np.random.default_rng(seed).permutation(len(pairs))
    giver = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
    made = [
        replace(pair, clean=Prompt(pair.clean.text, pairs[giver[i]].clean.images), spans={})
        for i, pair in enumerate(pairs)
    ]
    return PairDataset(made, pairs.model)
