"""How many tokens a forward pass should hold: found by a short trial on the model itself."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from mechmm.engine.head import Head
from mechmm.engine.places import Places, spot_of, unchanged
from mechmm.engine.plain import ROWS, Plains
from mechmm.engine.record import Recording
from mechmm.engine.rerun import Rerun
from mechmm.model.hooked import HookedMultimodal

SIZES = [size << step for step in range(8) for size in (256, 384)]
DEFAULT = 4096
BLOCKS = 3
"""A trial pass runs through so many, the last one included."""
WORTH = 0.015
"""A larger pass has to be so much faster per token to be worth its memory."""
TIMES = 3
"""Each size is tried so often; the shortest time counts."""

_FOUND: WeakKeyDictionary[HookedMultimodal, dict[tuple, int]] = WeakKeyDictionary()


def calibrated(
    model: HookedMultimodal, recording: Recording, head: Head | None, plains: Plains
) -> int:
    """Tokens of one forward pass: as many as are fastest, which is found once for a model on a
    device, but no more than take as much memory as what is recorded."""
    if head is None:
        return DEFAULT
    found, most = _FOUND.setdefault(model, {}), _most(model, recording, plains.every)
    sizes = [size for size in SIZES if size <= most] or SIZES[:1]
    key = (model.device, model.dtype, torch.get_num_threads(), len(sizes))
    if key not in found:
        found[key] = _best(model, recording, head, plains, sizes)
    return found[key]


def _most(model: HookedMultimodal, recording: Recording, sums: bool) -> int:
    """Tokens that take as much memory in a block as all that is recorded.

    As blocks are written, there are up to ten tensors of the stream's size at once in attention,
    and in the MLP four and three of the hidden layer's. Blocks that are sums have up to eight: the
    stream, queries, keys, values, z, and what is moved between them.
    """
    d_model, d_mlp = model.cfg.d_model, model.cfg.d_mlp or 0
    if not sums:
        return recording.numbers // max(10 * d_model, 4 * d_model + 3 * d_mlp)
    most, few = (recording.numbers // each for each in (8 * d_model, 3 * (d_model + d_mlp)))
    return most if few >= ROWS else min(most, few)


@torch.no_grad()
def _best(
    model: HookedMultimodal, recording: Recording, head: Head, plains: Plains, sizes: list[int]
) -> int:
    each: dict[int, float] = {}
    best, idle = math.inf, 0
    for size in sizes:
        try:
            each[size] = _seconds(model, recording, head, plains, size)
        except torch.OutOfMemoryError:
            break
        idle = 0 if each[size] < best * (1 - WORTH / 3) else idle + 1
        best = min(best, each[size])
        if idle == 2:
            break
    for _ in range(TIMES - 1):  # in turn, so that whatever else the machine does meets all alike
        for size in each:
            each[size] = min(each[size], _seconds(model, recording, head, plains, size))
    enough = min(each.values(), default=0) / (1 - WORTH)
    return min((size for size, taken in each.items() if taken <= enough), default=sizes[0])


def _seconds(
    model: HookedMultimodal, recording: Recording, head: Head, plains: Plains, size: int
) -> float:
    """Time for each token of a pass: trials that begin in the middle of a prompt, at one of the
    last blocks, and change nothing."""
    width = recording.stream(0).shape[1]
    at = width // 2
    hook = f"blocks.{max(0, len(recording.blocks) - BLOCKS)}.hook_resid_pre"
    trials = np.arange(max(1, size // (width - at)))
    zeros = np.zeros_like(trials)
    places = Places((hook,), zeros, trials, zeros, zeros, zeros + at, zeros - 1)
    rerun = Rerun(model, recording, places, [spot_of(model, hook)], unchanged, head, plains)
    entering = replace(rerun.entries.trials(trials), shared=zeros)
    _wait(model.device)
    start = time.perf_counter()
    rerun.run(trials, entering)
    _wait(model.device)
    return (time.perf_counter() - start) / int((rerun.width - entering.start).sum())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
