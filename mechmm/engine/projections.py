"""Queries, keys and values of positions that enter a block unchanged: computed once for all trials.

A trial that changes some positions at the beginning of a block leaves the others as they were
recorded until attention has mixed them. So the linear layers in front of attention run for what
it changes alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from torch import Tensor, nn

from mechmm.engine.freeze import Halt, frozen
from mechmm.engine.record import Recording
from mechmm.engine.reenter import Reenter
from mechmm.engine.tokens import Tokens
from mechmm.model.attention import reentering
from mechmm.model.tower import Tower

KEYS = ("k", "v")
NAMES = ("q", *KEYS, "qkv")
Found = dict[nn.Module, Tensor]


class Projections:
    """What the linear layers in front of attention give for the recorded prompts.

    One block's are kept at a time, for trials come in the order of their blocks.
    """

    def __init__(self, tower: Tower, recording: Recording) -> None:
        self.tower, self.recording = tower, recording
        self._layer, self._found = -1, Found()

    def forwards(
        self, layer: int, tokens: Tokens, unchanged: np.ndarray
    ) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
        """Forward functions that compute what is changed and know the rest.

        Args:
            unchanged: which tokens are as recorded [token].
        """
        if not unchanged.any():
            return {}
        at = tokens.tensor(np.flatnonzero(~unchanged))
        prompt, position = tokens.index
        known = prompt * tokens.width + position
        return {
            module: partial(_completed, module.forward, found, known, at)
            for module, found in self._of(layer).items()
        }

    def _of(self, layer: int) -> Found:
        """Of all positions of the recorded prompts, by linear layer [prompt * pos, ...]."""
        if layer != self._layer:
            self._layer, self._found = layer, self._computed(layer)
        return self._found

    def _computed(self, layer: int) -> Found:
        stream = self.recording.stream(layer)
        count, width = stream.shape[:2]
        trial, position = np.divmod(np.arange(count * width), width)
        device = self.recording.logits.device
        tokens = Tokens(trial, position, np.arange(count), width, device)
        hidden, block = tokens.of(stream), self.recording.blocks[layer]
        modules = [self.tower.linear(layer, name) for name in NAMES]
        found = Found()
        noting: dict[nn.Module, Callable] = {
            m: partial(_noted, m, m.forward, found) for m in modules if m is not None
        }
        core = self.tower.part(layer, "attn", self.tower.row.core)
        assert core is not None
        self.tower.shape = hidden.shape
        with reentering(core, Reenter(tokens, block, collect=True)), frozen(noting):
            try:
                self.tower.blocks[layer](hidden, **tokens.options(block))
            except Halt:
                return found
        raise AssertionError("attention was not reached")


def _completed(
    forward: Callable[[Tensor], Tensor], found: Tensor, known: Tensor, at: Tensor, x: Tensor
) -> Tensor:
    """What a linear layer gives for tokens [1, token, ...], of which some are known."""
    every = found[known]
    every[at] = forward(x[:, at])[0]
    return every[None]


def _noted(
    module: nn.Module, forward: Callable[[Tensor], Tensor], found: Found, x: Tensor
) -> Tensor:
    found[module] = forward(x)[0]
    return found[module][None]
