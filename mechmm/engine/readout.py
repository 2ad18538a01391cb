"""Streams read through the unembedding, without the logits of all words at once.

For every row x of the stream and every word v the logit is

    z_v = bend(W_U[v] . norm(x) + b_v),    bend: the model's scale and softcap.

Rows go through in groups, words in strips: a matrix product into one small buffer, from which,
while the processor's cache holds it,

- the softmax's normaliser log sum_v exp(z_v), by a running sum: where a strip has a larger maximum
  m, the sum so far is multiplied with exp(m_old - m);
- the entropy, H = log s - u / s with s = sum exp(z - m), u = sum exp(z - m) (z - m), likewise;
- the rank of chosen words: how many others have a larger logit;
- the k largest: the maximum of every block of 16 words is kept, and only the k best blocks are
  looked at, in which the k largest lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmm.engine.head import Head

BLOCK = 16
"""Words of a block."""


@dataclass(frozen=True)
class Sizes:
    """How much goes through at once.

    Attributes:
        rows: of the stream.
        strip: words whose logits one product makes.
        strips: after how many of them the largest logits are looked up.
    """

    rows: int
    strip: int
    strips: int

    @classmethod
    def of(cls, device: torch.device, rows: int | None, words: int) -> Sizes:
        """On a CPU a strip of float32 is 1 MiB, so that it stays in its cache, and all strips
        together 32 MiB; elsewhere strips are wide, because every step has a price of its own."""
        default, strip, strips = (256, 1024, 32) if device.type == "cpu" else (2048, 16384, 1)
        return cls(rows or default, min(strip, -(-words // BLOCK) * BLOCK), strips)


@dataclass(frozen=True, eq=False)
class Readout:
    """What rows of a stream say, read as words.

    Attributes:
        ids, logits: of the largest logits, in order [row, k].
        normaliser: log sum exp of all logits, so that a log-probability is a logit less it [row].
        targets: logits of the chosen words [row, target].
        ranks: how many words have a larger logit than these: 0 is the top [row, target].
        entropy: of the distribution over words, in nats [row], or None.
    """

    ids: Int[Tensor, "row k"]
    logits: Float[Tensor, "row k"]
    normaliser: Float[Tensor, " row"]
    targets: Float[Tensor, "row target"]
    ranks: Int[Tensor, "row target"]
    entropy: Float[Tensor, " row"] | None = None


@torch.no_grad()
def read_out(
    head: Head,
    stream: Float[Tensor, "row d_model"],
    k: int,
    targets: Int[Tensor, "row target"] | None = None,
    *,
    entropy: bool = False,
    rows: int | None = None,
) -> Readout:
    """Read rows of the stream through the final norm and the unembedding.

    Args:
        k: how many of the largest logits.
        targets: words whose logits and ranks are wanted, for every row its own.
        rows: that go through together; more of them take more memory, fewer more time. Default: 256
            on a CPU, 2048 elsewhere.
    """
    weight = head.unembed.weight
    sizes = Sizes.of(weight.device, rows, len(weight))
    if targets is None:
        targets = torch.zeros(len(stream), 0, dtype=torch.long)
    parts, rooms = [], Rooms(sizes, weight)
    for some, own in zip(stream.split(sizes.rows), targets.split(sizes.rows), strict=True):
        parts.append(_read(head, some.to(weight), k, own.to(weight.device), entropy, rooms))
    names = [name for name in Readout.__annotations__ if entropy or name != "entropy"]
    return Readout(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@torch.no_grad()
def nearest(
    rows: Float[Tensor, "row d"], table: Float[Tensor, "entry d"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """The k largest products of every row with the entries of a table, and their numbers."""
    sizes = Sizes.of(table.device, None, len(table))
    rooms, found = Rooms(sizes, table), []
    for some in rows.to(table).split(sizes.rows):
        top = Largest(len(some), k, rooms)
        for first, strip in top.strips(len(table)):
            torch.mm(some, table[first : first + strip.shape[1]].T, out=strip)
            top.seen(strip)
        found.append(top.found())
    values, ids = zip(*found, strict=True)
    return torch.cat(values), torch.cat(ids)


def _read(
    head: Head, stream: Tensor, k: int, targets: Tensor, entropy: bool, rooms: Rooms
) -> Readout:
    """A few rows."""
    normed = head.normed(stream[None])[0]
    top, sums = Largest(len(stream), k, rooms), _Sums(len(stream), entropy, rooms)
    ranks = _Ranks(head, normed, targets, rooms)
    for first, strip in _strips(head, normed, top):
        sums.add(strip, top.seen(strip))
        ranks.add(strip, first)
    logits, ids = top.found()
    return Readout(ids, logits, sums.normaliser, ranks.logits, ranks.counts, sums.entropy)


def _strips(head: Head, normed: Tensor, top: Largest) -> Iterator[tuple[int, Tensor]]:
    """(first word, logits of some words) until all have come."""
    weight, bias = head.unembed.weight, head.unembed.bias
    banned = None if head.banned is None else head.banned.all(0)
    for first, strip in top.strips(len(weight)):
        words = slice(first, first + strip.shape[1])
        torch.mm(normed, weight[words].T, out=strip)
        if bias is not None:
            strip += bias[words]
        head.bent(strip)
        if banned is not None:
            strip.masked_fill_(banned[words], torch.finfo(strip.dtype).min)
        yield first, strip


class Rooms:
    """Memory that every group of rows uses anew.

    Attributes:
        logits: a few strips, one after another [strip, row, word].
        numbers: what is made of one strip, twice [two, row, word].
    """

    def __init__(self, sizes: Sizes, like: Tensor) -> None:
        self.sizes = sizes
        self.logits = like.new_empty(sizes.strips, sizes.rows, sizes.strip)
        self.numbers = like.new_empty(2, sizes.rows, sizes.strip, dtype=torch.float32)

    def number(self, which: int, like: Tensor) -> Tensor:
        """Room for the numbers of a strip."""
        return self.numbers[which, : len(like), : like.shape[1]]


class Largest:
    """The k largest of values that come in strips.

    An element is one of the k largest only where the maximum of its block is one of the k largest
    maxima: each larger one has an element that is larger, too.
    """

    def __init__(self, rows: int, k: int, rooms: Rooms) -> None:
        self.k, self.sizes = k, rooms.sizes
        self.logits = rooms.logits[:, :rows]
        self.values = rooms.numbers.new_full((rows, k), -torch.inf)
        self.ids = torch.zeros(rows, k, dtype=torch.long, device=self.values.device)
        self.maxima: list[Tensor] = []
        self.first = 0

    def strips(self, words: int) -> Iterator[tuple[int, Tensor]]:
        """(first word, room for values [row, word]); what is written there is kept by `seen`."""
        step = self.sizes.strip
        for first in range(0, words, step):
            number = len(self.maxima)
            if number == 0:
                self.first = first
            yield first, self.logits[number][:, : min(step, words - first)]

    def seen(self, strip: Tensor) -> Float[Tensor, " row"]:
        """Note the strip that was filled; its maxima."""
        room = self.logits[len(self.maxima)]
        room[:, strip.shape[1] :] = -torch.inf
        # Block b has every strip/16-th word from b on: maxima over a far axis are quick.
        blocks = room.unflatten(1, (BLOCK, -1)).amax(1)
        self.maxima.append(blocks)
        largest = blocks.amax(1)
        if len(self.maxima) == self.sizes.strips:
            self._look()
        return largest

    def found(self) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
        """The k largest, in order, and their numbers."""
        if self.maxima:
            self._look()
        return self.values, self.ids

    def _look(self) -> None:
        """The k largest of what there is and the best blocks of the strips."""
        maxima = torch.cat(self.maxima, 1)
        lanes = self.sizes.strip // BLOCK
        best = maxima.topk(min(self.k, maxima.shape[1]), dim=1).indices[..., None]
        strip, lane = best // lanes, best % lanes
        word = lane + lanes * torch.arange(BLOCK, device=best.device)
        row = torch.arange(len(best), device=best.device)[:, None, None]
        values = self.logits[strip, row, word].flatten(1).float()
        ids = (self.first + strip * self.sizes.strip + word).flatten(1)
        values, ids = torch.cat([self.values, values], 1), torch.cat([self.ids, ids], 1)
        self.values, order = values.topk(self.k, dim=1)
        self.ids = ids.gather(1, order)
        self.maxima.clear()


class _Sums:
    """Running sums over words: s of exp(z - m), u of exp(z - m) (z - m), m the maximum so far."""

    def __init__(self, rows: int, entropy: bool, rooms: Rooms) -> None:
        self.rooms = rooms
        numbers = rooms.numbers
        self.m = numbers.new_full((rows,), torch.finfo(numbers.dtype).min)
        self.s = torch.zeros_like(self.m)
        self.u = torch.zeros_like(self.m) if entropy else None

    def add(self, strip: Tensor, maximum: Tensor) -> None:
        """Add the words of a strip."""
        m = torch.maximum(self.m, maximum.float())
        down = self.m - m
        shifted = torch.sub(strip, m[:, None], out=self.rooms.number(0, strip))
        if self.u is None:
            each = shifted.exp_()
        else:
            each = torch.exp(shifted, out=self.rooms.number(1, strip))
            self.u = (self.u + down * self.s) * down.exp() + (shifted.mul_(each)).sum(1)
        self.s = self.s * down.exp() + each.sum(1)
        self.m = m

    @property
    def normaliser(self) -> Float[Tensor, " row"]:
        return self.m + self.s.log()

    @property
    def entropy(self) -> Float[Tensor, " row"] | None:
        return None if self.u is None else self.s.log() - self.u / self.s


class _Ranks:
    """How many words have larger logits than some chosen ones."""

    def __init__(self, head: Head, normed: Tensor, targets: Tensor, rooms: Rooms) -> None:
        self.targets, self.rooms = targets, rooms
        logits = torch.einsum("rd,rtd->rt", normed, head.unembed.weight[targets])
        if head.unembed.bias is not None:
            logits += head.unembed.bias[targets]
        logits = head.bent(logits)
        if head.banned is not None:
            logits[head.banned.all(0)[targets]] = torch.finfo(logits.dtype).min
        self.thresholds, self.logits = logits, logits.float()
        self.counts = torch.zeros_like(targets)

    def add(self, strip: Tensor, first: int) -> None:
        """Count in a strip. A word is not counted against itself, though its logit by another
        product may differ in the last digit."""
        for number, (target, threshold) in enumerate(
            zip(self.targets.T, self.thresholds.T[..., None], strict=True)
        ):
            larger = torch.gt(strip, threshold, out=self.rooms.number(0, strip)).sum(1).long()
            at = target - first
            inside = (at >= 0) & (at < strip.shape[1])
            own = strip.gather(1, at.clamp(0, strip.shape[1] - 1)[:, None]) > threshold
            self.counts[:, number] += larger - (inside & own[:, 0]).long()
