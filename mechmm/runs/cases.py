"""Models that circuit discovery is tried on: planted ones, whose circuit is known, and the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mechmm.data import shapes
from mechmm.data.pairs import PairDataset
from mechmm.model.hooked import HookedMultimodal
from mechmm.zoo import planted

DEMO = "demo/color"
MAKERS: dict[str, tuple[tuple[str, ...], Callable[[str], planted.Planted]]] = {
    "compiled": (planted.TASKS, planted.build),
    "redundant": (planted.REDUNDANT, planted.build),
    "trained": (planted.TRAINED, planted.load),
}
"""Kinds of planted models: their tasks, and what makes the model of one."""


@dataclass(frozen=True)
class Case:
    """A model, pairs, and the edges and nodes that compute the answer where they are known."""

    name: str
    model: HookedMultimodal
    pairs: Callable[[int, int], PairDataset]
    edges: tuple[str, ...] | None = None
    nodes: tuple[str, ...] | None = None

    @classmethod
    def of(cls, name: str) -> Case:
        """Build or load one of `case_names`."""
        if name == DEMO:
            model = HookedMultimodal.from_pretrained("mechmm/demo")
            return cls(name, model, lambda n, seed: shapes.pairs(model, "color", n, seed))
        kind, _, task = name.partition("/")
        made = MAKERS[kind][1](task)
        return cls(name, made.model, made.pairs, made.edges, made.nodes)


def case_names() -> tuple[str, ...]:
    """Every case: `compiled/color_at_cell`, ..., `demo/color`."""
    planned = [f"{kind}/{task}" for kind, (tasks, _) in MAKERS.items() for task in tasks]
    return (*planned, DEMO)


def chosen_cases(names: Sequence[str]) -> tuple[str, ...]:
    """Cases by name or kind; all for none.

    Raises:
        ValueError: an unknown name, with those there are.
    """
    known, found = case_names(), []
    for name in names:
        own = [case for case in known if name in (case, case.partition("/")[0])]
        if not own:
            kinds = ", ".join((*MAKERS, "demo"))
            raise ValueError(
                f"no model {name!r} to try circuits on; there are {', '.join(known)}, and all of a "
                f"kind: {kinds}"
            )
        found += own
    return tuple(dict.fromkeys(found)) or known
