"""What vision components add to a logit through one reading of the picture by language heads.

Nothing that a vision component writes reaches the last position directly. The shortest way is

    component -> projector -> stream of image position k -> value that a head reads there -> logit,

and with patterns and the scales of norms frozen it is linear behind the projector. With p_k what
the projector gives position k,

    read = sum_k <p_k, g_k>,   g_k = sum_{layers, heads} pattern[last, k] C(w1 * W_V r) / s1_k,

r what a unit of the head's z adds to the logit (`mechmm.engine.direct`). That is an exact share of
what heads add to the logit: it is what their values owe to the projector's output itself, not to
what language blocks add at image positions. The projector is not linear; it is replaced by its
Jacobian J at the clean run, in which the scales of its norms, and of the norm behind the tower, are
constants too (a norm's own Jacobian takes what points along the stream to 0, that is, the sum of
all components). With x what is read and c a component,

    read = sum_c <c, J^T g> + constant,   constant = read - <x, J^T g>.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.data.metrics import Answers, Reading
from mechmm.engine.direct import Component, Run, reading_direction
from mechmm.engine.flow import Flow, slopes, slopes_at
from mechmm.engine.freeze import frozen
from mechmm.engine.head import close
from mechmm.engine.located import tower_rows
from mechmm.engine.readers import Reader
from mechmm.engine.sites import SEEING
from mechmm.engine.wiring import Group, Wiring
from mechmm.engine.writers import Writer, weight_of, writers_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import IMAGE
from mechmm.model.taps import affine, moments, norm_kind

Terms = list[tuple[Component, Float[Tensor, " batch"]]]


@torch.no_grad()
def reads(
    writers: Sequence[Writer], run: Run, direction: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    """g: what a unit of the stream at every image position adds through the values that heads of
    the last position read there, layers together; 0 elsewhere."""
    count, width = run.batch.input_ids.shape
    total = direction.new_zeros(count, width, direction.shape[-1])
    for writer in writers:
        layer = writer.group.layer
        if writer.group.kind != "heads" or layer not in run.patterns:
            continue
        total += _layer(writer, run, reading_direction(writer, run, direction))
    seen = (run.batch.layout.modality >= IMAGE).to(total.device)
    return total * seen[..., None]


def _layer(
    writer: Writer, run: Run, r: Float[Tensor, "batch head d_head"]
) -> Float[Tensor, "batch pos d_model"]:
    """The share of one layer."""
    tower, layer = writer.tower, writer.group.layer
    weight = tower.weight("W_V", layer)
    assert weight is not None  # [key-value head, d_model, d_head]
    groups = len(weight)
    pattern = run.patterns[layer].float().unflatten(1, (groups, -1))  # [batch, group, head, key]
    by_key = torch.einsum("bgjk,bgje->bgke", pattern, r.unflatten(1, (groups, -1)))
    found = torch.einsum("bgke,gde->bkd", by_key, weight.float())
    module = tower.module(tower.row.ln1, layer)
    if module is None:
        return found
    kind = norm_kind(module, tower.row.norm)
    found = found * weight_of(module, kind, found)
    if kind == "layer":
        found = found - found.mean(-1, keepdim=True)
    return found / run.scales[layer]


def vision_terms(
    model: HookedMultimodal, wiring: Wiring, run: Run, answers: Answers, g: Tensor
) -> tuple[Terms, Float[Tensor, " batch"]]:
    """Every vision component's part and the projector's constant, and what they add up to; nothing
    where the model has no such tower, or no prompt a picture."""
    hidden = [group for group in wiring.readers if group.kind == "hidden"]
    towers = list(dict.fromkeys(group.tower for group in hidden))
    nothing = g.new_zeros(len(g))
    if not hidden or model.family.resume == "cross" or not bool((g != 0).any()):
        return [], nothing
    flow, read = _flow(model, wiring, run, answers, g)
    terms: Terms = []
    for tower in towers:
        terms += _tower(model, wiring, [h for h in hidden if h.tower == tower], flow, run)
    known = torch.stack([score for _, score in terms]).sum(0)
    prefix = Component(f"{towers[0]}.projector constant", towers[0], "bias", -1)
    return [*terms, (prefix, read - known)], read


def _flow(
    model: HookedMultimodal, wiring: Wiring, run: Run, answers: Answers, g: Tensor
) -> tuple[Flow, Float[Tensor, " batch"]]:
    """A run with the slopes of what is read at the ends of towers, and values of their writers."""
    caught: list[Tensor] = []

    def catch(value: Tensor, hook: Any) -> None:
        caught[:] = [value]

    def read(logits: Tensor, answers: Answers) -> Tensor:
        return (caught[0].float() * g).sum((1, 2))

    hidden = (group for group in wiring.readers if group.kind == "hidden")
    hooks = [hook for group in hidden for hook in slopes_at(model, group)]
    there = [hook for hook in dict.fromkeys(hooks) if hook in model.hook_dict]
    written = [h for w in _writers(model, wiring) for h in w.hooks]
    part = Reading(run.batch, run.batch.layout.last[:, None], None, read)
    edits = [("blocks.0.hook_resid_pre", catch)]
    with scales_frozen(norms_behind(model)):
        flow = slopes(model, part, answers, there, list(dict.fromkeys(written)), edits)
    return flow, flow.metric


def norms_behind(model: HookedMultimodal) -> list[nn.Module]:
    """The norms between the stream of a tower that sees and the language model's."""
    ends = [model.towers[name] for name in model.towers if name in SEEING]
    found = [tower.module(tower.row.ln_final) for tower in ends]
    roots = [model.hf_model.get_submodule(row.root) for row in model.family.projectors.values()]
    inside = (module for root in roots for module in root.modules())
    found += [module for module in inside if "Norm" in type(module).__name__]
    return list({id(module): module for module in found if module is not None}.values())


@contextmanager
def scales_frozen(norms: Sequence[nn.Module]) -> Iterator[None]:
    """While it lasts, no gradient flows through the scales of some norms; a norm that computes
    otherwise than ours do stays as it is."""

    def forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = type(module).forward(module, x, *args, **kwargs)
        for kind in ("layer",) if isinstance(module, nn.LayerNorm) else ("rms", "rms_plus_one"):
            if not hasattr(module, "eps") and not hasattr(module, "variance_epsilon"):
                break
            centred, scale = moments(x, module, kind)
            new = affine(centred / scale.detach(), module, kind).to(out.dtype)
            if new.shape == out.shape and close(new.detach(), out.detach()):
                return out.detach() + (new - new.detach())
        return out

    with frozen({module: partial(forward, module) for module in norms}):
        yield


def _writers(model: HookedMultimodal, wiring: Wiring) -> list[Writer]:
    return [Writer(model, group) for group in wiring.writers if group.tower in SEEING]


@torch.no_grad()
def _tower(
    model: HookedMultimodal, wiring: Wiring, hidden: Sequence[Group], flow: Flow, run: Run
) -> Terms:
    """The parts of one tower's components, over all ways in which its hidden states are read."""
    sums: dict[Component, Tensor] = {}
    media = run.batch.layout.media
    rows = [
        tower_rows(run.batch.layout, n + 1) - tower_rows(run.batch.layout, n)
        for n in range(len(media))
    ]
    for group in hidden:
        reader = Reader(model, group)
        if not reader.ran(flow):
            continue
        reader.add(flow)
        seen = wiring.before(wiring.readers.index(group))
        for writer in writers_of(model, seen, None, flow.values):
            scores = _scores(writer, reader, flow)
            by_prompt = torch.stack([part.sum(1) for part in scores.split(rows, dim=1)], dim=1)
            for component, score in zip(_components(writer.group), by_prompt, strict=True):
                sums[component] = sums.get(component, torch.zeros_like(score)) + score
    return list(sums.items())


def _scores(writer: Writer, reader: Reader, flow: Flow) -> Float[Tensor, "writer row"]:
    """What the writers of a group add, by row of the tower's batch."""
    shape = flow.values[writer.hooks[0]].shape[:2]
    positions = torch.arange(shape[1])
    found = []
    for row in range(shape[0]):  # a picture at a time: heads are as wide as the stream
        at = torch.full_like(positions, row), positions
        found.append(torch.einsum("wpd,pd->w", writer.of(flow.values, at), reader.at(at)[0]))
    return torch.stack(found, dim=1)


def _components(group: Group) -> list[Component]:
    """The components of a group of writers."""
    tower, layer = group.tower, group.layer
    count = group.nodes[1] - group.nodes[0]
    if group.kind == "heads":
        names = [f"{tower}.a{layer}.h{h}" for h in range(count)]
        return [Component(name, tower, "head", layer, h) for h, name in enumerate(names)]
    letter = {"input": "input", "mlp": f"m{layer}", "attn": f"a{layer}"}[group.kind]
    return [Component(f"{tower}.{letter}", tower, group.kind, layer)]
