"""What it costs to cut every edge of a language model, beside one bare forward pass an edge.

The random LLaVA of `sweep.py` is given a pair of texts of as many positions as its prompts with
pictures have. Ours cuts edges with all that belongs to it (the clean run is recorded, changes are
found); both prompts have run. In every round it cuts the edges into one reader of every attention
layer, drawn anew, and some of those into MLPs and logits; what both take is scaled to all edges,
which is a little too much: readers of one layer share what is computed of their writers.

Beside it runs the Hugging Face model on ready inputs, with all logits, as it is called, and with
those of the last position alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import pairwise

from _timing import Row, compare, interleaved, parser, report, settle

# isort: split
import numpy as np
import torch
from overhead import Shape
from sweep import SHAPES, Task

from mechmm.data.metrics import logit_diff
from mechmm.data.pairs import Prompt
from mechmm.engine.contrast import Contrast, contrasts
from mechmm.engine.cutting import edge_losses
from mechmm.engine.wiring import wired
from mechmm.testing.vocabulary import WORDS

ALL, LAST = "one bare forward pass an edge", "one bare forward pass an edge, logits of one position"
GOAL = ">= 5"
SHARE = 8
"""One in so many edges into MLPs and logits is cut."""


def texts(task: Task) -> Contrast:
    """Both runs of a pair of texts of words drawn at random."""
    prompts = []
    for seed in range(2):
        drawn = random.Random(seed)
        words = (drawn.choice(WORDS) for _ in range(task.positions - 1))
        prompts.append(Prompt(" ".join(words)))
    wiring, pairs = wired(task.hooked), task.dataset([(prompts[0], prompts[1])])
    ((contrast,),) = contrasts(task.hooked, pairs, wiring, logit_diff)
    return contrast


def groups(contrast: Contrast, drawn: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Edges that are cut together, and how many times as many there are of their kind."""
    graph = contrast.wiring.graph
    written = graph.writers["kind"].to_numpy()[graph.src] != "projector"
    heads, others = (np.zeros(len(graph), dtype=bool) for _ in range(2))
    every = np.zeros((2, len(graph)), dtype=bool)
    for block, (first, stop) in zip(graph.blocks, pairwise(graph.starts), strict=True):
        if block.tower != "language":
            continue
        part, several = slice(first, stop), block.shape[2] > 1
        every[int(several), part] = True
        if several:
            heads[part] = graph.dst[part] == block.readers[0] + drawn.integers(block.shape[2])
    some = np.flatnonzero(every[0] & written)
    others[drawn.choice(some, max(1, len(some) // SHARE), replace=False)] = True
    parts = ((others, every[0]), (heads, every[1]))
    return [
        (some & written, float((kind & written).sum() / (some & written).sum()))
        for some, kind in parts
    ]


def seconds(contrast: Contrast, drawn: np.random.Generator) -> float:
    """CPU seconds of all edges of the language model, from some of them."""
    nothing = np.zeros(len(contrast.wiring.graph), dtype=bool)
    total = fixed = taken(lambda: edge_losses(contrast, nothing))
    for edges, times in groups(contrast, drawn):
        total += times * (taken(lambda e=edges: edge_losses(contrast, e)) - fixed)
    return total


def taken(side: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    side()
    return time.process_time() - start


@torch.no_grad()
def measure(shape: Shape, rounds: int) -> list[Row]:
    """Ours beside both passes."""
    task = Task(shape, "cpu", torch.float32)
    contrast, drawn = texts(task), np.random.default_rng(0)
    graph = contrast.wiring.graph
    language = np.array([b.tower == "language" for b in graph.blocks]).repeat(np.diff(graph.starts))
    written = graph.writers["kind"].to_numpy()[graph.src] != "projector"
    count = int((language & written).sum())
    inputs = dict(contrast.clean_part.batch.inputs)
    sides = {
        ALL: lambda: task.model(**inputs, use_cache=False),
        LAST: lambda: task.model(**inputs, use_cache=False, logits_to_keep=1),
    }
    edge_losses(contrast, np.zeros(len(graph), dtype=bool))  # tries how large a pass should be
    ours: list[float] = []
    theirs: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        found = interleaved(sides, 5)
        for name, milliseconds in found.items():
            theirs[name].append(count * float(np.median(milliseconds)) / 1000)
        ours.append(seconds(contrast, drawn))
    job, goal = f"exact, text, {count} edges", GOAL if shape.real else None
    return [compare(job, name, "s", ours, theirs[name], goal, turned=True) for name in sides]


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=3, help="each side runs so often (3)")
    chosen = options.parse_args()
    settle()
    shape, rounds = (SHAPES["tiny"], 1) if chosen.quick else (SHAPES["small"], chosen.rounds)
    report(measure(shape, rounds), chosen.json)


if __name__ == "__main__":
    main()
