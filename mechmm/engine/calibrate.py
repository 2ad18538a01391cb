"""How many tokens a forward pass should hold: found by a short trial on the model itself."""

from __future__ import annotations

import time
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mechmm.engine.record import Recording
from mechmm.engine.reenter import Reenter
from mechmm.engine.tokens import Tokens
from mechmm.model.attention import reentering
from mechmm.model.hooked import LANGUAGE, HookedMultimodal

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
DEFAULT = 4096
WORTH = 0.05
"""A larger pass has to be so much faster per token to be worth its memory."""

_FOUND: WeakKeyDictionary[HookedMultimodal, dict[tuple, int]] = WeakKeyDictionary()


def calibrated(model: HookedMultimodal, recording: Recording) -> int:
    """Tokens of one forward pass; found once for a model on a device."""
    if not recording.blocks:
        return DEFAULT
    found = _FOUND.setdefault(model, {})
    key = (model.device, model.dtype, torch.get_num_threads())
    if key not in found:
        found[key] = _best(model, recording)
    return found[key]


@torch.no_grad()
def _best(model: HookedMultimodal, recording: Recording) -> int:
    best, chosen = float("inf"), SIZES[0]
    for size in SIZES:
        try:
            each = min(_seconds(model, recording, size) for _ in range(2)) / size
        except torch.OutOfMemoryError:
            break
        if each > best * (1 - WORTH):
            break
        best, chosen = each, size
    return chosen


def _seconds(model: HookedMultimodal, recording: Recording, size: int) -> float:
    """Time of one block over trials that begin in the middle of a prompt."""
    tower, layer = model.towers[LANGUAGE], len(recording.blocks) // 2
    block, core = recording.blocks[layer], tower.part(layer, "attn", tower.row.core)
    assert core is not None
    width = block.stream.shape[1]
    own = np.arange(width // 2, width)
    count = max(1, size // len(own))
    trial, position = np.repeat(np.arange(count), len(own)), np.tile(own, count)
    tokens = Tokens(trial, position, np.zeros(count, np.int64), width, model.device)
    stream = tokens.of(block.stream)
    tower.shape = stream.shape
    _wait(model.device)
    start = time.perf_counter()
    with reentering(core, Reenter(tokens, block)):
        tower.blocks[layer](stream, **tokens.options(block))
    _wait(model.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
