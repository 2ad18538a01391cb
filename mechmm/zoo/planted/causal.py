"""Causal models of three tasks: what trained models are to compute, and in which of their nodes.

A causal model is a list of variables, each with the node that is to hold it and the edges that it
is computed from. An interchange lets some edges carry what their writer holds in a second case; the
answer that follows is the one that a model has to give when the same edges between its nodes carry
what they carried in a run on that second case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mechmm.zoo.planted.pictures import PLACES
from mechmm.zoo.planted.tasks.prior_overridden import PRIOR
from mechmm.zoo.planted.tasks.task import CELLS, Case

SEEN, SAID = "vision.input", "input"
Value = Any
Where = Literal["last", "swatches", "glyphs"]


@dataclass(frozen=True)
class Shown:
    """A word at the last position, or one per cell at the patch that shows its color or its glyph,
    that can be told from what a node writes there."""

    where: Where
    of: Callable[[Value], Value] = lambda value: value

    def words(self, value: Value) -> tuple[str | None, ...]:
        """One per position."""
        found = self.of(value)
        return (found,) if self.where == "last" else tuple(found)


@dataclass(frozen=True)
class Variable:
    """One variable.

    Attributes:
        node: that holds it.
        reads: edges `writer->reader` into that node, in the order of the function's arguments.
        function: of what these edges carry.
        shown: where and as which words it can be told from what the node writes.
    """

    node: str
    reads: tuple[str, ...]
    function: Callable[..., Value]
    shown: tuple[Shown, ...] = ()


@dataclass(frozen=True)
class Causal:
    """A causal model; the last variable is the answer.

    Attributes:
        variables: in the order in which they are computed.
        why: how the answer is computed.
    """

    variables: tuple[Variable, ...]
    why: str

    @property
    def edges(self) -> tuple[str, ...]:
        """The edges of the circuit."""
        return tuple(edge for variable in self.variables for edge in variable.reads)

    def values(
        self, case: Case, swapped: Collection[str] = (), other: Mapping[str, Value] | None = None
    ) -> dict[str, Value]:
        """What every node holds.

        Args:
            swapped: edges that carry what their writer holds in `other`.
        """
        found: dict[str, Value] = {SEEN: case.scene, SAID: case.asked}
        for variable in self.variables:
            carried = []
            for edge in variable.reads:
                holds = other if other is not None and edge in swapped else found
                carried.append(holds[edge.partition("->")[0]])
            found[variable.node] = variable.function(*carried)
        return found

    def answer(self, values: Mapping[str, Value]) -> str:
        return values[self.variables[-1].node]


def _into(reader: str, *writers: str) -> tuple[str, ...]:
    return tuple(f"{writer}->{reader}" for writer in writers)


def _same(value: Value) -> Value:
    return value


def _ask(node: str, place: int) -> Variable:
    """A head moves a word of the question to the last position."""
    reads = _into(f"{node}<v>", SAID)
    return Variable(node, reads, lambda asked: asked[place], (Shown("last"),))


def _say(node: str) -> tuple[Variable, ...]:
    """The logits repeat what the last MLP says."""
    return (Variable("logits", _into("logits", node), _same),)


def _see_colors(bring: str) -> tuple[Variable, ...]:
    """An MLP sees the colors, a head brings each to the glyph of its cell, the projector passes
    them on from there."""
    return (
        Variable(
            "vision.m0",
            _into("vision.m0", SEEN),
            lambda scene: scene.colors,
            (Shown("swatches"),),
        ),
        Variable(bring, _into(f"{bring}<v>", "vision.m0"), _same, (Shown("glyphs"),)),
        Variable("projector", _into("projector", bring), _same, (Shown("glyphs"),)),
    )


COLOR_AT_CELL = Causal(
    (
        *_see_colors("vision.a1.h2"),
        _ask("a0.h0", 0),
        _ask("a0.h3", 1),
        Variable("m0", _into("m0", "a0.h0", "a0.h3"), "{}_{}".format, (Shown("last"),)),
        Variable(
            "a1.h1",
            ("m0->a1.h1<q>", "projector->a1.h1<v>"),
            lambda place, colors: colors[PLACES.index(place)],
            (Shown("last"),),
        ),
        Variable("m1", _into("m1", "a1.h1"), _same),
        *_say("m1"),
    ),
    "a0.h0 and a0.h3 move the asked row and column to the last position, m0 combines them into a "
    "cell, and by it a1.h1 reads the color that vision.m0 has seen and vision.a1.h2 has brought to "
    "the glyph of that cell; m1 makes it the answer.",
)


def _reader(read: str, ask: str) -> Variable:
    """Reads the color of the cell that is named by what another head has moved."""
    return Variable(
        read,
        (f"{ask}->{read}<q>", f"projector->{read}<v>"),
        lambda name, colors: colors[PLACES.index(CELLS[name])],
        (Shown("last"),),
    )


SAME_COLOR = Causal(
    (
        *_see_colors("vision.a1.h0"),
        _ask("a0.h1", 0),
        _ask("a0.h2", 1),
        _reader("a1.h0", "a0.h1"),
        _reader("a1.h3", "a0.h2"),
        Variable("m1", _into("m1", "a1.h0", "a1.h3"), lambda a, b: "yes" if a == b else "no"),
        *_say("m1"),
    ),
    "a0.h1 and a0.h2 move the names of two cells to the last position; by them a1.h0 and a1.h3 "
    "read the colors that vision.m0 has seen and vision.a1.h0 has brought to the glyphs of the "
    "cells; m1 compares them.",
)


def _found(asked: str, keys: Value, values: Value) -> str | None:
    """The color where the asked shape is, if it is at one place."""
    shapes, colors = keys[1], values[0]
    return colors[shapes.index(asked)] if shapes.count(asked) == 1 else None


PRIOR_OVERRIDDEN = Causal(
    (
        Variable(
            "vision.m0",
            _into("vision.m0", SEEN),
            lambda scene: (scene.colors, scene.shapes),
            (Shown("swatches", lambda v: v[0]), Shown("glyphs", lambda v: v[1])),
        ),
        Variable(
            "vision.a1.h3",
            _into("vision.a1.h3<v>", "vision.m0"),
            lambda seen: seen[0],
            (Shown("glyphs"),),
        ),
        Variable(
            "projector",
            _into("projector", "vision.a1.h3", "vision.m0"),
            lambda colors, seen: (colors, seen[1]),
            (Shown("glyphs", lambda v: v[0]), Shown("glyphs", lambda v: v[1])),
        ),
        _ask("a0.h2", 0),
        Variable("m0", _into("m0", "a0.h2"), lambda shape: PRIOR[shape], (Shown("last"),)),
        Variable(
            "a1.h1",
            ("a0.h2->a1.h1<q>", "projector->a1.h1<k>", "projector->a1.h1<v>"),
            _found,
            (Shown("last"),),
        ),
        Variable("m1", _into("m1", "a1.h1", "m0"), lambda color, prior: color or prior),
        *_say("m1"),
    ),
    "a0.h2 moves the asked thing to the last position, where m0 knows the color of such things; by "
    "it a1.h1 finds the glyph that vision.m0 has seen and reads the color that vision.a1.h3 has "
    "brought to it; m1 says that color, or without one that of the prior.",
)

CAUSAL: Mapping[str, Causal] = {
    "color_at_cell": COLOR_AT_CELL,
    "same_color": SAME_COLOR,
    "prior_overridden": PRIOR_OVERRIDDEN,
}
"""By task."""
