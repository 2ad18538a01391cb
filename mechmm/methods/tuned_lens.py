"""Tuned lens: a logit lens that first says each layer's state in the last layer's terms.

For every state x of the language model before the last an affine map is fitted,

    x' = x + A x + b,    A = 0, b = 0 at the start, which is the logit lens,

so that reading x' comes close to what the model says in the end: it minimises
KL(p_model || p(x')) over the positions of the user's own prompts. How close it comes is measured on
prompts that were held out, beside the logit lens, and beside the null: maps that were fitted on
states of other positions than those whose predictions they were to meet, which can learn no more
than what the model says on the whole.

A tuned lens shows what could be read by a map that was looked for, not what the model reads.

Belrose et al. 2303.08112.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from plotly.graph_objects import Figure
from torch import Tensor
from torch.nn import functional as F

from mechmm.data.pairs import PairDataset
from mechmm.engine.head import Head, head_for
from mechmm.engine.lensed import chosen, prompts_of
from mechmm.engine.streams import read_states, states
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

SOME = 4096
"""Numbers of the unembedding that tell models apart."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TunedLens(Result):
    """Translators of states, and how well they do on prompts that were held out.

    Attributes:
        states: tower, layer, point, hook and label of every state.
        weight, bias: A [state, d_model, d_model] and b [state, d_model]; of the last state zero.
        kl: mean KL(p_model || p) over positions of a held-out prompt, in nats [state, example].
        kl_logit_lens: the same of the logit lens.
        kl_null: of maps fitted on states of other positions.
        curve: the loss at every step of the fit [state, step].
        held_out: numbers of the prompts that were held out.
        rows: how many positions the maps were fitted on.
        architecture, fingerprint: of the model.
    """

    states: pd.DataFrame
    weight: Float[Tensor, "state d_model d_model"]
    bias: Float[Tensor, "state d_model"]
    kl: Float[Tensor, "state example"] = field(metadata={"axis": 1})
    kl_logit_lens: Float[Tensor, "state example"] = field(metadata={"axis": 1})
    kl_null: Float[Tensor, "state example"] = field(metadata={"axis": 1})
    curve: Float[Tensor, "state step"]
    held_out: Int[Tensor, " example"] = field(metadata={"axis": 0})
    rows: int
    architecture: str
    fingerprint: str

    def check(self, model: HookedMultimodal) -> None:
        """Refuse a model that the lens was not fitted for.

        Raises:
            ValueError: with both.
        """
        if model.family.unembed is None or _fingerprint(model) != self.fingerprint:
            raise ValueError(
                f"this tuned lens was fitted for another model ({self.architecture}, d_model "
                f"{self.bias.shape[1]}) than {model.family.architecture}, d_model "
                f"{model.cfg.d_model}, or for other weights of it; fit one with "
                "mm.tuned_lens(model, prompts)"
            )

    def translated(
        self, hook: str, stream: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, "row d_model"]:
        """States of a hook, x + A x + b.

        Raises:
            ValueError: a hook without translator.
        """
        hooks = self.states["hook"].tolist()
        if hook not in hooks:
            raise ValueError(
                f"this tuned lens has no translator for {hook}; it has those of "
                f"{hooks[0]} to {hooks[-1]}: leave middle=True away"
            )
        number = hooks.index(hook)
        weight, bias = self.weight[number].to(stream), self.bias[number].to(stream)
        return stream + stream @ weight.T + bias

    def to_dataframe(self) -> pd.DataFrame:
        """One row per state: held-out divergence of the tuned lens with its 95 % interval over
        prompts, of the logit lens and of the null."""
        low, high = bootstrap_interval(self.kl)
        table = self.states[["tower", "layer", "label"]].assign(kl=self.kl.mean(1).numpy())
        table["low"], table["high"] = low.numpy(), high.numpy()
        table["logit_lens"] = self.kl_logit_lens.mean(1).numpy()
        return table.assign(null=self.kl_null.mean(1).numpy())

    def plot(self) -> Figure:
        """Held-out divergence, layers by lenses."""
        table = self.to_dataframe()[::-1]
        names = {"kl": "tuned", "logit_lens": "logit lens", "null": "other positions"}
        return plots.heat_map(
            table[list(names)].to_numpy(float),
            table["label"].tolist(),
            list(names.values()),
            "KL(model || lens) on held-out prompts, in nats",
            x_title="lens",
            y_title="state",
            n=self.kl.shape[1],
            value_title="nats",
        )

    def page(self, title: str, facts: dict | None = None) -> Page:
        """A report: the figure and its table."""
        section = Section("Held-out divergence", [self.plot(), self.to_dataframe()])
        return Page(title, self.summary(), [section], facts or {})

    def summary(self) -> str:
        """How well the lens does, in words."""
        ends = [kl[:-1].mean() for kl in (self.kl, self.kl_logit_lens, self.kl_null)]
        return (
            f"Translators of {len(self.states) - 1} states, fitted on {self.rows} positions. On "
            f"{self.kl.shape[1]} held-out prompts the mean divergence from the model is "
            f"{ends[0]:.3f} nats; of the logit lens {ends[1]:.3f}; of maps fitted on states of "
            f"other positions {ends[2]:.3f}."
        )


def tuned_lens(
    model: HookedMultimodal,
    prompts: PairDataset | Batch | Sequence[Batch],
    *,
    spans: Sequence[str] | None = None,
    positions: Sequence[int] | None = None,
    held_out: float = 0.25,
    steps: int = 300,
    rate: float = 1e-3,
    decay: float = 0.0,
    rows: int = 256,
    seed: int = 0,
    batch_size: int = 16,
) -> TunedLens:
    """Fit an affine translator for every state of the language model.

    The states of all positions are kept while it is fitted: states x positions x d_model numbers.

    Args:
        prompts: pairs, of which the clean prompts are used, or one or more batches.
        spans, positions: where; default: all positions.
        held_out: share of the prompts that the maps are not fitted on, in (0, 1).
        steps: of Adam (Kingma & Ba 1412.6980), its rate falling linearly from `rate` to 0.
        decay: weight decay of A and b, towards the logit lens.
        rows: positions in a step.
        seed: of the split, of the steps and of the null.

    Raises:
        ValueError: a model without unembedding; fewer than two prompts; no positions; a share
            outside (0, 1); fewer than one step.
        SpanError: a span that the prompts do not have.
    """
    if not 0 < held_out < 1 or min(steps, rows) < 1:
        raise ValueError(
            f"held_out is {held_out}, steps {steps}, rows {rows}; give a share in (0, 1), and one "
            "step and row at least"
        )
    batches = _batches(model, prompts, batch_size)
    head = head_for(model, batches[0])
    table = states(model, batches[0].layout, [LANGUAGE])
    streams, owner = _collected(model, batches, table, spans, positions, seed)
    count = int(owner.max()) + 1 if len(owner) else 0
    if count < 2:
        raise ValueError(
            f"a tuned lens is fitted on some prompts and tried on others, but there are {count} "
            "with positions to read; give two or more"
        )
    rng = np.random.default_rng(seed)
    split = rng.permutation(count)[: min(count - 1, max(1, round(held_out * count)))]
    tried = torch.from_numpy(np.sort(split))
    aside = torch.isin(owner, tried)
    last = streams[-1]
    order = torch.from_numpy(rng.permutation(int((~aside).sum())))
    fits, nulls, curves = [], [], []
    fit = partial(_fitted, head, steps=steps, rate=rate, decay=decay, rows=rows, seed=seed)
    for stream in streams[:-1]:
        own, curve = fit(stream[~aside], last[~aside])
        fits.append(own)
        curves.append(curve)
        nulls.append(fit(stream[~aside][order], last[~aside])[0])
    nothing = (torch.zeros_like(fits[0][0]), torch.zeros_like(fits[0][1]))
    maps = {"kl": fits, "kl_logit_lens": [nothing] * len(fits), "kl_null": nulls}
    found = {
        name: _divergences(head, streams[:, aside], owner[aside], [*each, nothing], rows)
        for name, each in maps.items()
    }
    return TunedLens(
        **found,
        states=table,
        weight=torch.stack([weight for weight, _ in (*fits, nothing)]),
        bias=torch.stack([bias for _, bias in (*fits, nothing)]),
        curve=torch.stack([*curves, torch.zeros(steps)]),
        held_out=tried,
        rows=int((~aside).sum()),
        architecture=model.family.architecture,
        fingerprint=_fingerprint(model),
    )


def _batches(
    model: HookedMultimodal, prompts: PairDataset | Batch | Sequence[Batch], size: int
) -> list[Batch]:
    if not isinstance(prompts, PairDataset) and isinstance(prompts, Sequence):
        return [batch for some in prompts for batch in _batches(model, some, size)]
    return [batch for batch, _, _ in prompts_of(model, prompts, size)]


def _collected(
    model: HookedMultimodal,
    batches: Sequence[Batch],
    table: pd.DataFrame,
    spans: Sequence[str] | None,
    positions: Sequence[int] | None,
    seed: int,
) -> tuple[Float[Tensor, "state row d_model"], Int[Tensor, " row"]]:
    """The states at all positions, and the number of the prompt that each belongs to."""
    found: list[list[Tensor]] = [[] for _ in table.index]
    owner, first = [], 0
    for batch in batches:
        numbers = range(first, first + len(batch))
        at = chosen(model, batch, spans, positions, numbers, seed)

        def read(number: int, there: Tensor, rows: Tensor) -> None:
            found[number].append(rows.float())

        read_states(model, batch, table, at.places, read)
        owner.append((at.places >= 0).nonzero()[:, 0] + first)
        first += len(batch)
    return torch.stack([torch.cat(each) for each in found]), torch.cat(owner)


def _log_probs(head: Head, stream: Float[Tensor, "row d_model"]) -> Float[Tensor, "row word"]:
    """What some states say; gradients flow."""
    weight, bias = head.unembed.weight, head.unembed.bias
    normed = head.normed(stream.to(weight)[None])[0]
    logits = F.linear(normed, weight, bias).float() * head.scale
    if head.softcap is not None:
        logits = torch.tanh(logits / head.softcap) * head.softcap
    if head.banned is not None:
        logits = logits.masked_fill(head.banned.all(0), torch.finfo(logits.dtype).min)
    return logits.log_softmax(-1)


def _divergence(target: Tensor, said: Tensor) -> Float[Tensor, " row"]:
    """KL(target || said), of log-probabilities; a word of probability 0 adds nothing."""
    return (target.exp() * (target - said).clamp(-1e4, 1e4)).sum(-1)


@torch.enable_grad()
def _fitted(
    head: Head,
    stream: Float[Tensor, "row d_model"],
    last: Float[Tensor, "row d_model"],
    *,
    steps: int,
    rate: float,
    decay: float,
    rows: int,
    seed: int,
) -> tuple[tuple[Tensor, Tensor], Float[Tensor, " step"]]:
    """A and b of one state, and the loss at every step."""
    d = stream.shape[1]
    weight = torch.zeros(d, d, device=stream.device, requires_grad=True)
    bias = torch.zeros(d, device=stream.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=rate, weight_decay=decay)
    random, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        own = torch.randint(len(stream), (min(rows, len(stream)),), generator=random)
        own = own.to(stream.device)
        x = stream[own]
        with torch.no_grad():
            target = _log_probs(head, last[own])
        loss = _divergence(target, _log_probs(head, x + x @ weight.T + bias)).mean()
        # Of the two alone: the model's own parameters are left without gradients.
        weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.step()
        losses.append(loss.detach())
    return (weight.detach(), bias.detach()), torch.stack(losses).cpu()


@torch.no_grad()
def _divergences(
    head: Head,
    streams: Float[Tensor, "state row d_model"],
    owner: Int[Tensor, " row"],
    maps: Sequence[tuple[Tensor, Tensor]],
    rows: int,
) -> Float[Tensor, "state example"]:
    """Mean divergence of every prompt."""
    found = torch.zeros(len(streams), len(owner))
    for part in torch.arange(len(owner)).split(rows):
        target = _log_probs(head, streams[-1, part])
        for state, (weight, bias) in enumerate(maps):
            x = streams[state, part]
            said = _log_probs(head, x + x @ weight.T + bias)
            found[state, part] = _divergence(target, said).cpu()
    return torch.stack([found[:, owner == one].mean(1) for one in owner.unique()], 1)


def _fingerprint(model: HookedMultimodal) -> str:
    """Of the unembedding and the final norm, which differ between models and between weights."""
    tower = model.towers[LANGUAGE]
    norm = tower.module(tower.row.ln_final)
    parts = [tower.W_U.T.flatten()]
    parts += [] if norm is None else [p.detach().flatten() for p in norm.parameters()]
    digest = sha256(str([model.family.architecture, *tower.W_U.shape]).encode())
    for part in parts:
        step = max(1, part.numel() // SOME)
        digest.update(part[::step].float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
