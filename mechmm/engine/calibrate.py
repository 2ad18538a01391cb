"""How many tokens a forward pass should hold: found by a short trial on the model itself."""

from __future__ import annotations

import math
import time
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mechmm.engine.record import Recording
from mechmm.engine.reenter import Reenter
from mechmm.engine.tokens import Tokens
from mechmm.model.attention import reentering
from mechmm.model.hooked import LANGUAGE, HookedMultimodal

SIZES = [size << step for step in range(8) for size in (256, 384)]
DEFAULT = 4096
WORTH = 0.04
"""A larger pass has to be so much faster per token to be worth its memory."""
TIMES = 4
"""Each size is tried so often; the shortest time counts."""

_FOUND: WeakKeyDictionary[HookedMultimodal, dict[tuple, int]] = WeakKeyDictionary()


def calibrated(model: HookedMultimodal, recording: Recording) -> int:
    """Tokens of one forward pass: as many as are fastest, which is found once for a model on a
    device, but no more than take as much memory as the recorded blocks."""
    if not recording.blocks:
        return DEFAULT
    found = _FOUND.setdefault(model, {})
    key = (model.device, model.dtype, torch.get_num_threads())
    if key not in found:
        found[key] = _best(model, recording)
    return max(SIZES[0], min(found[key], _most(model, recording)))


def _most(model: HookedMultimodal, recording: Recording) -> int:
    """Tokens that take as much memory in a block as all recorded blocks.

    In attention there are up to ten tensors of the stream's size at once, in the MLP four and
    three of the hidden layer's.
    """
    parts = [(b.stream, b.keys, b.values) for b in recording.blocks]
    state = sum(part.numel() for block in parts for part in block if part is not None)
    d_model, d_mlp = model.cfg.d_model, model.cfg.d_mlp or 0
    return state // max(10 * d_model, 4 * d_model + 3 * d_mlp)


@torch.no_grad()
def _best(model: HookedMultimodal, recording: Recording) -> int:
    each: dict[int, float] = {}
    best, idle = math.inf, 0
    for size in SIZES:
        try:
            each[size] = _seconds(model, recording, size)
        except torch.OutOfMemoryError:
            break
        idle = 0 if each[size] < best * (1 - WORTH / 4) else idle + 1
        best = min(best, each[size])
        if idle == 2:
            break
    for _ in range(TIMES - 1):  # in turn, so that whatever else the machine does meets all alike
        for size in each:
            each[size] = min(each[size], _seconds(model, recording, size))
    enough = min(each.values(), default=0) / (1 - WORTH)
    return min((size for size, taken in each.items() if taken <= enough), default=SIZES[0])


def _seconds(model: HookedMultimodal, recording: Recording, size: int) -> float:
    """Time of one block for each token, over trials that begin in the middle of a prompt."""
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
    return (time.perf_counter() - start) / len(tokens)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
