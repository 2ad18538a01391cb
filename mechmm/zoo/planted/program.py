"""Programs: what the heads and MLPs of a planted model compute, in named symbols.

A residual stream is a sum of orthogonal directions, one per symbol. Symbols are written
`register.value` (`color.red`), flags `register` alone (`last`). A symbol is 1 where it holds and 0
elsewhere; `one` is 1 at every position. Terms are linear combinations of symbols. A head matches
terms of its query with terms of its keys and moves values; an MLP or the projector applies rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

Terms = Mapping[str, float]
ONE = "one"
SHARPNESS = 12.0
"""What a match adds to a score: a key that matches gets all but a thousandth of the attention."""


@dataclass(frozen=True)
class Match:
    """Adds `weight` times (query terms) times (key terms) to an attention score before softmax.

    Attributes:
        back: only for rotary attention: the weight is multiplied by the cosine of (distance from
            the key, less `back`), so that among few keys the one so far back wins.
    """

    query: Terms
    key: Terms
    weight: float = SHARPNESS
    back: int | None = None


@dataclass(frozen=True)
class Move:
    """Reads terms where a head attends, and writes terms where it attends from."""

    value: Terms
    out: Terms


@dataclass(frozen=True)
class Head:
    """A head of a circuit."""

    name: str
    matches: tuple[Match, ...]
    moves: tuple[Move, ...]


@dataclass(frozen=True)
class Rule:
    """Writes `then` where `when` is above `at`: a ramp that rises from `at - 0.3` to `at + 0.3`."""

    when: Terms
    then: Terms
    at: float = 0.5


@dataclass(frozen=True)
class Mlp:
    """The rules of one MLP of a circuit."""

    name: str
    rules: tuple[Rule, ...]


Step = Head | Mlp


@dataclass(frozen=True)
class Program:
    """All of a model but its pixels.

    Attributes:
        vision, language: heads and MLPs, in an order in which they could run.
        projector: its rules, from symbols of the vision tower to those of the language model.
        words: what the embedding of a word writes.
        answers: the symbol that the unembedding of a word reads.
        constant: registers with the same value at every position of both prompts of every pair, so
            that no edge which carries them alone can matter.
    """

    vision: tuple[Step, ...]
    projector: tuple[Rule, ...]
    language: tuple[Step, ...]
    words: Mapping[str, Terms]
    answers: Mapping[str, str]
    constant: frozenset[str] = field(default_factory=frozenset)


def register(symbol: str) -> str:
    return symbol.partition(".")[0]


def registers(terms: Sequence[Terms]) -> set[str]:
    return {register(symbol) for some in terms for symbol in some}


def reads(step: Step) -> list[Terms]:
    """Everything that a step reads."""
    if isinstance(step, Mlp):
        return [rule.when for rule in step.rules]
    sides = [side for match in step.matches for side in (match.query, match.key)]
    return sides + [move.value for move in step.moves]


def writes(step: Step) -> list[Terms]:
    """Everything that a step writes."""
    if isinstance(step, Mlp):
        return [rule.then for rule in step.rules]
    return [move.out for move in step.moves]


def symbols(parts: Sequence[Terms]) -> list[str]:
    """All symbols of some terms, `one` first."""
    return list(dict.fromkeys([ONE, *(symbol for terms in parts for symbol in terms)]))


# Where steps are placed ----------------------------------------------------------------------


def place(
    steps: Sequence[Step], layers: int, heads: int, random: np.random.Generator
) -> dict[str, str]:
    """The node of every step by its name (`a1.h3`, `m2`): layers at random among all ways in which
    everything is computed before it is read, heads at random within a layer.

    Raises:
        ValueError: where the steps do not fit into so many layers.
    """
    ways = list(_ways(steps, layers))
    if not ways:
        raise ValueError(f"{len(steps)} steps do not fit into {layers} layers")
    chosen = ways[random.integers(len(ways))]
    free = [random.permutation(heads).tolist() for _ in range(layers)]
    return {
        step.name: f"m{layer}" if isinstance(step, Mlp) else f"a{layer}.h{free[layer].pop()}"
        for step, layer in zip(steps, chosen, strict=True)
    }


def _ways(steps: Sequence[Step], layers: int) -> Iterator[tuple[int, ...]]:
    """Layers for all steps such that writers come before readers and no two share an MLP."""
    needs = [
        [i for i, other in enumerate(steps) if registers(writes(other)) & registers(reads(step))]
        for step in steps
    ]
    for way in product(range(layers), repeat=len(steps)):
        order = [2 * layer + isinstance(s, Mlp) for s, layer in zip(steps, way, strict=True)]
        mlps = [layer for s, layer in zip(steps, way, strict=True) if isinstance(s, Mlp)]
        ordered = all(order[i] < order[k] for k, before in enumerate(needs) for i in before)
        if ordered and len(set(mlps)) == len(mlps):
            yield way


# Which edges are true ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """One output of a node: the registers it writes, and by reader those that it depends on."""

    node: str
    out: frozenset[str]
    sides: Mapping[str, frozenset[str]]


def true_edges(program: Program, vision: Mapping[str, str], language: Mapping[str, str]):
    """The edges that carry, from the pixels or words to the logits, what the answer is made of.

    Followed backwards from the answer, register by register: a node may write several registers,
    and only those of its inputs count on which a needed one depends.

    Args:
        program: what the model computes.
        vision, language: the node of every step.

    Returns:
        Names `writer->reader` of the edges, in the order of the model.
    """
    towers = [
        _flows("vision.", "vision.input", [{"pixels": 1.0}], program.vision, vision),
        [_rule_flow("projector", rule) for rule in program.projector],
        _flows("", "input", list(program.words.values()), program.language, language),
    ]
    behind = {"vision": towers[0], "language": towers[1] + towers[2]}
    logits = registers([{symbol: 1.0} for symbol in program.answers.values()])
    todo = [("logits", "language", name) for name in logits]
    found: dict[str, None] = {}
    seen = set(todo)
    while todo:
        reader, tower, name = todo.pop()
        for flow in behind[tower]:
            if name in program.constant or name not in flow.out:
                continue
            found[f"{flow.node}->{reader}"] = None
            below = "vision" if flow.node == "projector" else tower
            for side, needed in flow.sides.items():
                new = [(side, below, one) for one in needed]
                todo += [item for item in new if item not in seen]
                seen.update(new)
    return tuple(sorted(found, key=_depth))


def _flows(
    prefix: str, source: str, inputs: list[Terms], steps: Sequence[Step], nodes: Mapping[str, str]
) -> list[_Flow]:
    flows = [_Flow(source, frozenset(registers(inputs)), {})]
    for step in steps:
        node = prefix + nodes[step.name]
        if isinstance(step, Mlp):
            flows += [_rule_flow(node, rule) for rule in step.rules]
            continue
        queries = frozenset(registers([match.query for match in step.matches]))
        keys = frozenset(registers([match.key for match in step.matches]))
        for move in step.moves:
            values = frozenset(registers([move.value]))
            sides = {f"{node}<q>": queries, f"{node}<k>": keys, f"{node}<v>": values}
            flows.append(_Flow(node, frozenset(registers([move.out])), sides))
    return flows


def _rule_flow(node: str, rule: Rule) -> _Flow:
    when = frozenset(registers([rule.when]))
    return _Flow(node, frozenset(registers([rule.then])), {node: when})


def _depth(edge: str) -> tuple:
    """Sorts edges as the model computes their readers, then their writers."""
    writer, reader = edge.split("->")
    return (*_order(reader), *_order(writer))


def _order(node: str) -> tuple[int, int, int, str]:
    tower = 0 if node.startswith("vision.") else 2
    name = node.removeprefix("vision.")
    if name in ("input", "projector", "logits"):
        return {"input": tower, "projector": 1, "logits": 3}[name], -1, -1, ""
    layer = int(name[1:].split(".")[0])
    return tower, layer, int(name[0] == "m"), name
