"""The slope of a metric at what every reader of a residual stream reads.

A projection reads the stream x through a norm, n(x) = w * xc / s + b, with xc = x (less its mean,
in a layer norm) and s its scale. With g the slope at what the projection W of one head gives, that
at what the head reads is

    dm/dx = C [ (w * (W g)) / s - xhat (xhat . (w * (W g))) / (d s) ],   xhat = xc / s,

C the centring of a layer norm. All heads share s and xhat, and the product xhat . (w * (W g)) is
(W' (w * xhat)) . g, what the projection gave less its biases, times g: so slopes are kept head by
head and carried to the width of the stream only when scores are computed. The mean over several
runs is the mean of the first terms, and one rank-one term of every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.engine.flow import Flow, slopes_at, stem
from mechmm.engine.wiring import Group
from mechmm.engine.writers import At, Values, weight_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.taps import moments, norm_kind
from mechmm.model.tower import Tower


@dataclass(eq=False)
class Reader:
    """The slope at what one group of readers reads, summed over runs.

    Attributes:
        group: which one.
        dense: of a single reader [row, pos, d_model], or None.
        heads: by projection, slopes at what it gives over the norm's scale [row, pos, head, d].
        terms: of every run: xhat [row, pos, d_model] and its factors [row, pos, reader].
        runs: how many.
    """

    model: HookedMultimodal
    group: Group
    dense: Tensor | None = None
    heads: list[Tensor] = field(default_factory=list)
    terms: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    runs: int = 0

    @property
    def tower(self) -> Tower:
        """Whose stream it is."""
        return self.model.towers[self.group.tower]

    def ran(self, flow: Flow) -> bool:
        """Whether a run came to these readers: not where a medium of their tower is missing."""
        return slopes_at(self.model, self.group)[0] in flow.slopes

    def add(self, flow: Flow) -> None:
        """Add another run."""
        self.runs += 1
        if self.group.kind in ("heads", "queries", "states"):
            self._add_heads(flow)
            return
        new = self._single(flow)
        self.dense = new if self.dense is None else self.dense + new

    def at(
        self, at: At, out: Float[Tensor, "reader place d_model"] | None = None
    ) -> Float[Tensor, "reader place d_model"]:
        """The mean slope at some places, written into `out` if it is given."""
        own = self.dense if self.dense is not None else self.heads[0]
        if out is None:
            first, stop = self.group.nodes
            out = own.new_empty(stop - first, len(own[at]), self.tower.cfg.d_model)
        if out.device != own.device:
            return out.copy_(self.at(at, torch.empty_like(out, device=own.device)))
        if self.dense is not None:
            return torch.div(self.dense[at], self.runs, out=out[0])[None]
        for number, (slot, weight) in enumerate(zip(self._slots, self._weights(), strict=True)):
            slope = self.heads[number][at].transpose(0, 1)
            if number < 3:
                torch.bmm(slope, weight, out=out[slot])
            else:  # a gate, read by its query
                out[slot] += torch.bmm(slope, weight)
        for xhat, factor in self.terms:
            out.addcmul_(factor[at].T[:, :, None], xhat[at][None], value=-1)
        return out.div_(self.runs) if self.runs > 1 else out

    def of_states(
        self, clean: Values, corrupt: Values, examples: int
    ) -> Float[Tensor, "example reader"]:
        """The scores of keys and values that are made of pictures alone, without a norm."""
        names = slopes_at(self.model, self.group)
        changes = [clean[name].float() - corrupt[name].float() for name in names]
        pairs = zip(changes, self.heads, strict=True)
        sums = torch.cat([(a * b).sum((1, 3)) for a, b in pairs], dim=-1) / self.runs
        return sums.unflatten(0, (examples, -1)).sum(1)  # a row is a tile

    # Heads -----------------------------------------------------------------------------------

    def projections(self) -> list[tuple[str, str]]:
        """Hooks of what projections give, and letters of their weights."""
        letters = {"heads": "QKVG", "queries": "Q", "states": "KV"}[self.group.kind]
        return list(zip(slopes_at(self.model, self.group), letters, strict=False))

    @cached_property
    def _parameters(self) -> list[tuple[Float[Tensor, "head d_model d_head"], Tensor | None]]:
        """Weight and bias of every projection, as views."""
        found = []
        for _, letter in self.projections():
            names = (f"{kind}_{letter}" for kind in "Wb")
            weight, bias = (self.tower.weight(n, self.group.layer, self._prefix()) for n in names)
            assert weight is not None
            found.append((weight, bias))
        return found

    def slots(self) -> list[slice]:
        """Which readers of the group every projection belongs to; a gate is read by its query."""
        return self._slots

    @cached_property
    def _slots(self) -> list[slice]:
        found, first = [], 0
        for (_, letter), (weight, _) in zip(self.projections(), self._parameters, strict=True):
            start = 0 if letter == "G" else first
            found.append(slice(start, start + len(weight)))
            first = max(first, start + len(weight))
        return found

    def project(
        self, half: int, x: Float[Tensor, "row pos d_model"]
    ) -> Float[Tensor, "row pos head d_head"]:
        """What one of the projections gives of what all of its heads read."""
        return self.project_each(half, x.flatten(0, 1)[None], None).unflatten(0, x.shape[:2])

    def project_each(
        self, half: int, x: Float[Tensor, "each place d_model"], heads: Tensor | None
    ) -> Float[Tensor, "place head d_head"]:
        """What one of the projections gives of what each of some heads reads; None: all heads,
        which read the same."""
        module, _ = self._norm()
        normed = x if module is None else module(x)
        weight, bias = self._parameters[half]
        weight = weight if heads is None else weight[heads]
        given = torch.matmul(normed, weight).transpose(0, 1)
        if bias is None:
            return given
        return given + (bias if heads is None else bias[heads])

    def _prefix(self) -> str:
        return "cross_" if self.group.part == "cross_attn" else ""

    def _norm(self) -> tuple[nn.Module | None, str]:
        row = self.tower.row
        path = (row.ln_cross or row.ln1) if self._prefix() else row.ln1
        module = self.tower.module(path, self.group.layer)
        return module, row.norm if module is None else norm_kind(module, row.norm)

    def _weights(self) -> list[Float[Tensor, "head d_head d_model"]]:
        """The projections' transposes with the norm's weight and centring folded in."""
        module, kind = self._norm()
        found = []
        for weight, _ in self._parameters:
            weight = weight.transpose(1, 2).float()
            if module is not None:
                weight = weight * weight_of(module, kind, weight)
            if module is not None and kind == "layer":
                weight = weight - weight.mean(-1, keepdim=True)
            found.append(weight)
        return found

    def _add_heads(self, flow: Flow) -> None:
        module, kind = self._norm() if self.group.kind != "states" else (None, "")
        slopes = [flow.slopes[hook].float() for hook, _ in self.projections()]
        if module is not None:
            centred, scale = moments(self._entered(flow), module, kind)  # type: ignore[arg-type]
            given = [flow.values[hook].float() for hook, _ in self.projections()]
            products = [
                ((value if start is None else value - start) * slope).sum(-1)
                for start, value, slope in zip(self._starts(module), given, slopes, strict=True)
            ]
            xhat = centred / scale
            total = torch.cat(products[:3], dim=-1)
            for slot, product in zip(self._slots[3:], products[3:], strict=True):
                total[..., slot] += product
            factors = total / (scale * xhat.shape[-1])
            self.terms.append((xhat, factors))
            slopes = [slope / scale[..., None] for slope in slopes]
        pairs = zip(self.heads or [torch.zeros(())] * len(slopes), slopes, strict=True)
        self.heads = [old.to(new) + new for old, new in pairs]

    def _entered(self, flow: Flow) -> Tensor:
        return flow.values[f"{stem(self.model, self.group)}.hook_resid_pre"]

    def _starts(self, module: nn.Module) -> list[Float[Tensor, "head d_head"] | None]:
        """What every projection gives of a normalised value of zero."""
        shift: Tensor | None = getattr(module, "bias", None)
        if shift is None:
            return [None if bias is None else bias.float() for _, bias in self._parameters]
        moved = [shift.detach().float() @ weight.float() for weight, _ in self._parameters]
        biases = [bias for _, bias in self._parameters]
        return [m if b is None else m + b for m, b in zip(moved, biases, strict=True)]

    # Single readers ----------------------------------------------------------------------------

    def _single(self, flow: Flow) -> Float[Tensor, "row pos d_model"]:
        names = [name for name in slopes_at(self.model, self.group) if name in flow.slopes]
        found = [flow.slopes[name].float() for name in names]
        if self.group.kind in ("attn", "hidden"):
            return found[0] - sum(found[1:], torch.zeros_like(found[0]))
        if self.group.kind == "mlp" and not names[0].endswith("hook_mlp_in"):
            return self._through_mlp(flow, found)
        return found[0]

    def _through_mlp(self, flow: Flow, slopes: Sequence[Tensor]) -> Tensor:
        """The slope at what a parallel MLP, or one without a norm, reads."""
        names = ("W_gate", "W_in") if len(slopes) == 2 else ("W_in",)
        weights = [self.tower.weight(name, self.group.layer) for name in names]
        pairs = zip(slopes, weights, strict=True)
        out = sum(slope @ weight.float().T for slope, weight in pairs if weight is not None)
        row = self.tower.row
        module = self.tower.module(row.ln1, self.group.layer) if row.mid is None else None
        if module is None:
            return out  # type: ignore[return-value]
        kind = norm_kind(module, row.norm)
        centred, scale = moments(self._entered(flow), module, kind)
        xhat, out = centred / scale, out * weight_of(module, kind, centred)
        if kind == "layer":
            out = out - out.mean(-1, keepdim=True)
        return (out - xhat * (xhat * out).mean(-1, keepdim=True)) / scale
