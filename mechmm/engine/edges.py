"""Edge scores: what a writer's change would do to the metric through one reader alone.

    score(u -> v) = sum over positions and d_model of (u_clean - u_corrupt) * dm/dx_v

For each chunk of positions the changes of all writers and the slopes of one group of readers after
the other are laid out at the width of the stream, and multiplied. So memory does not grow with the
length of prompts, and neither heads nor edges are looped over.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.located import Located
from mechmm.engine.readers import Reader
from mechmm.engine.sites import READING
from mechmm.engine.wiring import Wiring
from mechmm.engine.writers import At, Values, Writer
from mechmm.model.layout import TokenLayout
from mechmm.results.graph import REST

Places = dict[str, list[list[np.ndarray]]]
"""By tower: for every example and span, (row, position) of every place."""
CHUNK = 64
"""Places that are laid out at the width of the stream at once."""


def places_of(layout: TokenLayout, towers: Sequence[str], spans: Sequence[str]) -> Places:
    """Where the positions of every span lie in some towers; each is in the first that covers it.

    Raises:
        SpanError: for a span that the layout has not.
    """
    finder, found = Located(layout), {}
    for tower in towers:
        kind = tower if tower in READING else "vision"
        found[tower] = [_split(finder, kind, spans, prompt) for prompt in range(layout.shape[0])]
    return found


def _split(finder: Located, tower: str, spans: Sequence[str], prompt: int) -> list[np.ndarray]:
    left = {tuple(place): None for place in finder.covered(tower, "all", prompt).tolist()}
    parts = []
    for span in spans:
        if span in ("", REST):
            chosen = list(left)
        else:
            covered = finder.covered(tower, span, prompt).tolist()
            chosen = [place for place in map(tuple, covered) if place in left]
        left = {place: None for place in left if place not in set(chosen)}
        parts.append(np.array(chosen, dtype=np.int64).reshape(-1, 2))
    return parts


def edge_scores(
    wiring: Wiring,
    writers: Sequence[Writer],
    readers: Sequence[Reader],
    clean: Values,
    corrupt: Values,
    places: Places,
) -> Float[Tensor, "example edge"]:
    """The score of every edge for every example of a batch.

    Args:
        clean, corrupt: values of the hooks of the writers, in both runs.
    """
    graph = wiring.graph
    examples = len(next(iter(places.values())))
    sums = [torch.zeros(examples, *block.shape) for block in graph.blocks]
    for tower in dict.fromkeys(group.tower for group in wiring.readers):
        if not any(w.group.tower == tower and w.hooks[0] in clean for w in writers):
            continue  # a tower that did not run: prompts without its medium
        own = [i for i, g in enumerate(wiring.readers) if g.tower == tower and readers[i].runs]
        for i in [i for i in own if wiring.readers[i].kind == "states"]:
            sums[i][:, 0, 0] = readers[i].of_states(clean, corrupt, examples).cpu()
            own.remove(i)
        there = [w for w in writers if w.group.tower == tower and w.hooks]
        for example, parts in enumerate(places[tower]):
            for span, at in enumerate(parts):
                for chunk in _chunks(at):
                    changes = _changes(there, clean, corrupt, chunk)
                    for i in own:
                        block = graph.blocks[i]
                        seen, rows = _seen(block.writers, *changes)
                        if rows:
                            scores = seen.flatten(1) @ readers[i].at(chunk).flatten(1).T
                            sums[i][example, span, slice(*rows)] += scores.cpu()
    return torch.cat([block.flatten(1) for block in sums], dim=1)


def _changes(
    writers: Sequence[Writer], clean: Values, corrupt: Values, at: At
) -> tuple[int, Float[Tensor, "writer place d_model"]]:
    """The changes of all writers of a stream, and the number of the first."""
    first, stop = writers[0].group.nodes[0], writers[-1].group.nodes[1]
    every: Tensor | None = None
    for writer in writers:
        change = writer.change(clean, corrupt, at)
        if every is None:
            every = change.new_empty(stop - first, *change.shape[1:])
        every[writer.group.nodes[0] - first : writer.group.nodes[1] - first] = change
    assert every is not None
    return first, every


def _seen(
    writers: tuple[int, int], first: int, changes: Tensor
) -> tuple[Tensor, tuple[int, int] | None]:
    """The changes that a block sees, and from which to which of its writers; None: it sees none."""
    start, stop = max(writers[0], first), min(writers[1], first + len(changes))
    if start >= stop:
        return changes, None
    return changes[start - first : stop - first], (start - writers[0], stop - writers[0])


def _chunks(places: np.ndarray) -> Iterator[At]:
    for start in range(0, len(places), CHUNK):
        rows, positions = torch.from_numpy(places[start : start + CHUNK].T.copy())
        yield rows, positions
