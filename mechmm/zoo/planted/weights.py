"""Weights of heads, MLPs and the projector: the rules of a program, filled up with noise.

What is left of a component of the circuit - dimensions of its values, hidden units - is filled with
the same noise that all other components are made of: it reads symbols and noise alike and writes
into the noise directions, which nothing but noise reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmm.zoo.planted.program import ONE, Head, Rule
from mechmm.zoo.planted.space import Space

STEEPNESS = 20.0
"""By which the input of an activation function is multiplied, and its output divided: close to a
rectifier, for SiLU and GELU alike."""
RAMP = 0.6
"""Width of the ramp of a rule."""


@dataclass(frozen=True)
class HeadWeights:
    """Of one head, for a stream of unit gain: query, key, value [d_head, width], output [width,
    d_head]."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out: np.ndarray


def rotation(size: int, random: np.random.Generator) -> np.ndarray:
    """A random orthogonal matrix [size, size]."""
    return np.linalg.qr(random.standard_normal((size, size)))[0]


def head_weights(
    space: Space,
    head: Head | None,
    size: int,
    slow: Sequence[int],
    random: np.random.Generator,
) -> HeadWeights:
    """The weights of a head of the circuit, or of a noise head where `head` is None.

    Args:
        space: the stream.
        head: what it does.
        size: d_head.
        slow: dimensions of queries and keys that rotary positions leave alone.
        random: draws the noise and the basis inside the head.

    Raises:
        ValueError: where the head has more matches than slow dimensions, or more moves than `size`.
    """
    if head is None:
        query, key = space.scramble(size, random), space.scramble(size, random)
    else:
        query, key = _matching(space, head, size, slow, random)
    moves = head.moves if head else ()
    if len(moves) > size:
        raise ValueError(f"head {head.name if head else ''} has more moves than d_head, {size}")
    value = [space.read(move.value) for move in moves]
    out = [space.write(move.out) for move in moves]
    left = size - len(moves)
    values = np.concatenate(
        [np.array(value).reshape(-1, space.width), space.scramble(left, random)]
    )
    outs = np.concatenate([np.array(out).reshape(-1, space.width), space.babble(left, random).T])
    turn = rotation(size, random)
    return HeadWeights(query, key, turn @ values, outs.T @ turn.T)


def _matching(
    space: Space, head: Head, size: int, slow: Sequence[int], random: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Query and key [size, width] of a head of the circuit.

    Each match has a dimension of its own, before the slow ones are rotated together. A match at a
    distance has the fastest pair of rotary dimensions, in which a step turns by one radian.
    """
    query, key = np.zeros((2, size, space.width))
    near = [match for match in head.matches if match.back is None]
    if len(near) > len(slow):
        raise ValueError(f"head {head.name} has {len(near)} matches, more than {len(slow)}")
    for dim, match in zip(slow, near, strict=False):
        scale = np.sqrt(match.weight * np.sqrt(size))
        query[dim], key[dim] = scale * space.read(match.query), scale * space.read(match.key)
    turn = rotation(len(slow), random)
    query[slow], key[slow] = turn @ query[slow], turn @ key[slow]
    for match in head.matches:
        if match.back is not None:
            scale, angle = np.sqrt(match.weight * np.sqrt(size)), random.uniform(0, 2 * np.pi)
            pair = [0, size // 2]
            query[pair] = np.outer(_arrow(angle), scale * space.read(match.query))
            key[pair] = np.outer(_arrow(angle + match.back), scale * space.read(match.key))
    return query, key


def _arrow(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


@dataclass(frozen=True)
class MlpWeights:
    """Of two layers, for a stream of unit gain: into hidden units [unit, width] (`gate`, and `up`
    that multiplies it where the MLP is gated), out of them [out width, unit]."""

    gate: np.ndarray
    up: np.ndarray
    down: np.ndarray


def mlp_weights(
    source: Space,
    target: Space,
    rules: Sequence[Rule],
    size: int,
    random: np.random.Generator,
    *,
    gated: bool = False,
) -> MlpWeights:
    """The weights of an MLP that reads one stream and writes another (or the same).

    Every rule takes two hidden units, whose difference is its ramp; the others are noise.

    Raises:
        ValueError: where the rules need more hidden units than `size`.
    """
    if 2 * len(rules) > size:
        raise ValueError(f"{len(rules)} rules need {2 * len(rules)} hidden units, there are {size}")
    gate, down = [], []
    for rule in rules:
        when, then = source.read(rule.when), target.write(rule.then) / (STEEPNESS * RAMP)
        for edge, sign in ((rule.at - RAMP / 2, 1.0), (rule.at + RAMP / 2, -1.0)):
            gate.append(STEEPNESS * (when - edge * source.read({ONE: 1.0})))
            down.append(sign * then)
    left = size - len(gate)
    gates = np.concatenate(
        [np.array(gate).reshape(-1, source.width), source.scramble(left, random)]
    )
    ones = np.tile(source.read({ONE: 1.0}), (len(gate), 1))
    ups = np.concatenate([ones, source.scramble(left, random)])
    downs = np.concatenate(
        [np.array(down).reshape(-1, target.width), target.babble(left, random).T]
    )
    # A gated unit may be made larger before its output is made smaller; others may not.
    spread = 0.3 if gated else 0.0
    order, scale = random.permutation(size), np.exp(random.normal(0, spread, size))[:, None]
    return MlpWeights(gates[order], (ups * scale)[order], (downs / scale)[order].T)
