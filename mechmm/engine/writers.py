"""What every writer of a residual stream adds to it, so that the sum of all is the stream.

A head's share of what attention adds is z_h W_O,h + b_O / H, carried through what lies between the
output projection and the stream: a constant gain of every channel (layer scale, gates), or a norm,
whose scale all heads share:

    share_h = w * (z_h W_O,h + b_O / H) / scale(sum_h z_h W_O,h + b_O)     (a sandwich block)

The picture's part of what enters the language model is what stands at the positions of pictures,
the tokens' part what stands at all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechmm.engine.flow import written_at
from mechmm.engine.wiring import Group
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.taps import moments, norm_kind
from mechmm.model.tower import Tower

At = tuple[Int[Tensor, " place"], Int[Tensor, " place"]] | tuple[int, slice]
"""Rows and positions of some places of a stream."""
Values = Mapping[str, Tensor]
"""Values of hooks [row, pos, ...]."""


@dataclass(frozen=True, eq=False)
class Writer:
    """How one group of writers writes.

    Attributes:
        group: which one.
        seen: of `input` and `projector`: which places pictures take [row, pos].
        gain: what every channel of attention's output is multiplied by, or None [d_model].
    """

    model: HookedMultimodal
    group: Group
    seen: Tensor | None = None
    gain: Tensor | None = None

    @property
    def tower(self) -> Tower:
        """Whose stream it is."""
        return self.model.towers[self.group.tower]

    @cached_property
    def hooks(self) -> list[str]:
        """Hooks that tell what was written."""
        return written_at(self.model, self.group)

    def of(self, values: Values, at: At) -> Float[Tensor, "writer place d_model"]:
        """What the writers wrote at some places in one run."""
        if self.group.kind != "heads":
            return self._whole(values[self.hooks[0]][at], at)[None]
        return self.carried(self.heads(self.z(values, at)))

    def change(
        self,
        clean: Values,
        corrupt: Values,
        at: At,
        out: Float[Tensor, "writer place d_model"] | None = None,
    ) -> Float[Tensor, "writer place d_model"]:
        """What they wrote at some places in the clean run, less what they wrote in the other.

        Args:
            out: where it is written, if given.
        """
        first = self.hooks[0]
        if out is not None and out.device != clean[first].device:
            return out.copy_(self.change(clean, corrupt, at))
        if self.group.kind != "heads":
            difference = self._whole(clean[first][at].float() - corrupt[first][at].float(), at)
            return difference[None] if out is None else out.copy_(difference)
        if self._post is not None:
            return torch.sub(self.of(clean, at), self.of(corrupt, at), out=out)
        difference = self.z(clean, at) - self.z(corrupt, at)
        made = torch.bmm(difference.transpose(0, 1), self._weight.float(), out=out)
        return made if self.gain is None else made.mul_(self.gain)

    def _whole(self, value: Tensor, at: At) -> Tensor:
        """The part of the tokens or of pictures in what enters the stream."""
        there = self.own(value)
        return value.float() if there.ndim == 0 else value.float() * there[at]

    def own(self, value: Tensor) -> Tensor:
        """Which places of its hook's value are these writers' [row, pos, ...]."""
        if self.seen is None or self.group.kind not in ("input", "projector"):
            return torch.ones((), dtype=torch.bool, device=value.device)
        return (self.seen == (self.group.kind == "projector"))[..., None].to(value.device)

    def z(self, values: Values, at: At) -> Float[Tensor, "place head d_head"]:
        """What the heads give at some places, gated where the model gates it."""
        z = values[self.hooks[0]][at].float()
        if self.tower.row.q_gate and self.group.part == "attn":
            z = z * values[self.hooks[1]][at].float().sigmoid()
        return z

    def heads(self, z: Tensor) -> Float[Tensor, "head place d_model"]:
        """What each head's z [place, head, d_head] gives behind the output projection."""
        out = torch.bmm(z.transpose(0, 1), self._weight.float())
        b = self.tower.weight("b_O", self.group.layer, self._crossing)
        return out if b is None else out + b.float() / len(out)

    @property
    def _crossing(self) -> str:
        return "cross_" if self.group.part == "cross_attn" else ""

    @property
    def _weight(self) -> Float[Tensor, "head d_head d_model"]:
        weight = self.tower.weight("W_O", self.group.layer, self._crossing)
        assert weight is not None
        return weight

    @cached_property
    def _post(self) -> nn.Module | None:
        """The norm between attention and the stream."""
        path = self.tower.row.ln1_post if self.group.part == "attn" else None
        return self.tower.module(path, self.group.layer)

    def carried(self, heads: Tensor) -> Tensor:
        """What lies between the output projection and the stream."""
        if self._post is not None:
            return _normed(heads, self._post, self.tower)
        return heads if self.gain is None else heads * self.gain

    def with_gain(self, values: Values) -> Writer:
        """The same, with the gain that a run shows: it is read where each channel is largest."""
        if self.group.kind != "heads" or self._post is not None or not self.scaled:
            return self
        z, out = values[self.hooks[0]], values[self.hooks[-1]].flatten(0, 1).float()
        before = self.heads(self.z(values, grid(z))).sum(0)
        largest = before.abs().argmax(0, keepdim=True)
        gain = (out.gather(0, largest) / before.gather(0, largest))[0].nan_to_num()
        return replace(self, gain=gain)

    @property
    def scaled(self) -> bool:
        """Whether something multiplies what attention gives, channel by channel."""
        return self.hooks[-1].endswith("attn_out")


def grid(value: Tensor) -> At:
    """Rows and positions of all places of a stream, one after the other."""
    rows, positions = value.shape[:2]
    every = torch.arange(rows * positions, device=value.device)
    return every // positions, every % positions


def _normed(parts: Tensor, module: nn.Module, tower: Tower) -> Tensor:
    """The shares of some parts in the norm of their sum."""
    kind = norm_kind(module, tower.row.norm)
    scale = moments(parts.sum(0), module, kind)[1]
    if kind == "layer":
        parts = parts - parts.mean(-1, keepdim=True)
    bias = getattr(module, "bias", None)
    share = parts / scale * weight_of(module, kind, parts)
    return share if bias is None else share + bias.float() / len(parts)


def weight_of(module: nn.Module, kind: str, like: Tensor) -> Float[Tensor, " d_model"]:
    """What a norm multiplies normalised values by."""
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None:
        return torch.ones(like.shape[-1], device=like.device)
    weight = weight.detach().float()
    return 1.0 + weight if kind == "rms_plus_one" else weight


def writers_of(
    model: HookedMultimodal, groups: Sequence[Group], seen: Tensor | None, values: Values
) -> list[Writer]:
    """How every group of writers writes.

    Args:
        seen: positions of the language model that pictures take [batch, pos].
        values: of the writers' hooks in some run.
    """
    placed = any(g.kind == "projector" for g in groups) and model.family.resume != "cross"
    split = {LANGUAGE: seen} if placed else {}
    writers = [Writer(model, group, split.get(group.tower)) for group in groups]
    return [writer.with_gain(values) for writer in writers if writer.hooks]
