"""AtP*: edges into queries and keys, against patterns that the model itself computes again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from contrasted import Contrasted

from mechmm.engine.atp import atp_scores
from mechmm.engine.edges import edge_scores
from mechmm.engine.flow import Flow, hooks_of, slopes, stem
from mechmm.engine.readers import Reader
from mechmm.engine.writers import grid
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.testing import tiny_hf


class Brute:
    """The scores of single edges in float64: the head's query or key is set at its hook to what its
    projection gives of the changed stream, behind the derivative of the norm, and the model's own
    pattern is read. Where queries and keys are normed, the scores are moved by a difference
    quotient of the model's scores instead."""

    def __init__(self, case: Contrasted) -> None:
        self.case = case
        self.model = HookedMultimodal.from_hf(tiny_hf(case.family, **dict(case.options)).double())
        inputs = dict(case.batches[1].inputs)
        double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        self.part = replace(case.parts[1], batch=Batch.from_inputs(self.model, **double))

    def run(self, edits=(), hooks=(), gradient=False):
        caught = {}

        def catch(value, hook):
            caught[hook.name] = value if value.requires_grad else value.detach().requires_grad_()
            return caught[hook.name].clone()

        live = [*edits, *((hook, catch) for hook in hooks)]
        with torch.enable_grad(), self.model.hooks(fwd_hooks=live):
            total = self.part.reduce(self.part.logits(self.model), self.case.answers).sum()
        names = list(caught)
        slope = torch.autograd.grad(total, [caught[n] for n in names]) if gradient else ()
        return {k: v.detach() for k, v in caught.items()}, dict(zip(names, slope, strict=False))

    def score(self, number: int, writer: int, letter: str, head: int, normed: bool) -> torch.Tensor:
        """Of one edge, for every example; `number`: of the readers' block."""
        case, group = self.case, self.case.wiring.readers[number]
        tower, block = self.model.towers[group.tower], stem(self.model, group)
        own = next(
            w for w in case.contrast.writers if w.group.nodes[0] <= writer < w.group.nodes[1]
        )
        at = grid(case.contrast.clean.values[own.hooks[0]])
        change = own.change(*case.contrast.changes(), at)[writer - own.group.nodes[0]].double()
        pattern, scores = (f"{block}.attn.hook_{name}" for name in ("pattern", "attn_scores"))
        stream, hook = f"{block}.hook_resid_pre", f"{block}.attn.hook_{letter}"
        values, slope = self.run((), (stream, hook, scores, pattern), gradient=True)
        x = values[stream]
        moved = through(tower.module(tower.row.ln1, group.layer), x, change.view(x.shape))
        weight = tower.weight(f"W_{letter.upper()}", group.layer)[head]
        step = 1e-2 if normed else 1.0  # norms of queries are computed in single precision

        def set_to(way):
            def edit(value, hook):
                new = value.clone()
                new[:, :, head] += way * (moved @ weight)
                return new

            return [(hook, edit)]

        if normed:
            up, down = (self.run(set_to(way), (scores,))[0][scores] for way in (step, -step))
            new = (values[scores] + (up - down) / (2 * step)).softmax(-1)
        else:
            new = self.run(set_to(1.0), (pattern,))[0][pattern]
        by_row = ((new - values[pattern]) * slope[pattern]).sum((1, 2, 3))
        sums = torch.zeros(len(case.contrast.indices), dtype=torch.double)
        return sums.index_add_(0, case.contrast.rows()[group.tower], by_row)


def through(norm: torch.nn.Module, x: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """The derivative of a norm along a change, in float64."""
    if isinstance(norm, torch.nn.LayerNorm):
        x, change = (value - value.mean(-1, keepdim=True) for value in (x, change))
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    along = x * (x * change).mean(-1, keepdim=True) / scale**2
    return norm.weight.detach() * (change - along) / scale


@pytest.mark.parametrize(
    ("family", "options", "normed"),
    [
        ("llava", {"heads": 4, "key_value_heads": 2}, False),
        ("qwen2_vl", {}, False),
        ("idefics2", {}, False),
        ("qwen3_vl", {}, True),
        ("internvl", {}, True),
    ],
)
def test_patterns_are_what_the_model_makes_of_a_changed_query_or_key(family, options, normed):
    """Rotary embeddings of one, two and three axes, grouped queries, both ways and causal, packed,
    norms of queries and keys."""
    case = Contrasted(family, options=tuple(options.items()))
    brute, graph = Brute(case), case.wiring.graph
    found, eap = atp_scores(case.contrast), case.scores()
    random, errors, sizes = np.random.default_rng(0), [], []
    for number, group in enumerate(case.wiring.readers):
        if group.kind != "heads" or group.layer == 0:
            continue
        block = graph.blocks[number]
        own = found[:, graph.starts[number] :][:, : block.size].view(-1, *block.shape)[:, 0]
        old = eap[:, graph.starts[number] :][:, : block.size].view(-1, *block.shape)[:, 0]
        heads = case.model.towers[group.tower].heads(group.layer)
        keys = (block.shape[2] - heads) // 2
        for letter, first, many in (("q", 0, heads), ("k", heads, keys)):
            for writer in (0, int(random.integers(1, block.shape[1]))):
                head = int(random.integers(many))
                wanted = brute.score(number, block.writers[0] + writer, letter, head, normed)
                scores = own[:, writer, first + head]
                # In float64 a prompt with padding has none: its lowest number is none in float32.
                known = ~wanted.isnan()
                assert known.any()
                errors.append(float((scores - wanted)[known].abs().max() / own.abs().max()))
                sizes.append(float(wanted[known].abs().max() / own.abs().max()))
        assert (own - old)[..., : heads + keys].abs().max() > 0.05 * old.abs().max()
        rest = (own - old)[..., heads + keys :]
        assert rest.abs().max() < 1e-4 * old.abs().max()
    assert np.mean(np.array(sizes) > 1e-2) > 0.5
    assert max(errors) < (1e-3 if normed else 1e-4)


def eap_at_clean(case: Contrasted, contrast) -> torch.Tensor:
    _, at, normed = hooks_of(case.model, case.wiring)
    flow = slopes(case.model, case.parts[0], case.answers, at, normed)
    readers = [Reader(case.model, group) for group in case.wiring.readers]
    for reader in readers:
        reader.add(flow)
    rest = (*contrast.changes(), contrast.places)
    return edge_scores(case.wiring, contrast.writers, readers, *rest)


@pytest.mark.parametrize("family", ["llava", "qwen3_5", "mllama", "gemma3"])
def test_of_small_changes_the_softmax_is_linear(family):
    """Towards no corrupt prompt too, where the clean run is changed."""
    case, small = Contrasted(family), 1e-3
    clean, other = case.contrast.changes()
    kinds = case.wiring.graph.readers["kind"].to_numpy()[case.wiring.graph.dst]
    own = torch.from_numpy(np.isin(kinds, ("q", "k")))
    near = {name: value + small * (clean[name] - value) for name, value in other.items()}
    paired = replace(case.contrast, clean=Flow(near, metric=case.contrast.clean.metric))
    near = {name: value - small * (value - other[name]) for name, value in clean.items()}
    alone = replace(case.contrast, reference=Flow(near))
    wanted = (Contrasted.scores(_like(case, paired)), eap_at_clean(case, alone))
    for contrast, eap in zip((paired, alone), wanted, strict=True):
        error = (atp_scores(contrast) - eap)[:, own].abs().max()
        assert error < 2e-2 * eap[:, own].abs().max()


def _like(case: Contrasted, contrast) -> Contrasted:
    new = Contrasted(case.family, case.spans, case.options)
    new.__dict__ |= {"model": case.model, "contrast": contrast}
    return new


def test_scores_of_queries_add_up_over_spans():
    whole, split = Contrasted("qwen2_vl"), Contrasted("qwen2_vl", ("image", "last"))
    graph, parts = whole.wiring.graph, atp_scores(split.contrast)[0].numpy()
    single = graph.by_block(atp_scores(whole.contrast)[0].numpy())
    for number, several in enumerate(split.wiring.graph.by_block(parts)):
        kinds = graph.readers["kind"].iloc[slice(*graph.blocks[number].readers)].to_numpy()
        error = abs(several.sum(0) - single[number][0])
        assert error[:, kinds == "q"].max(initial=0) < 1e-4 * abs(parts).max()
    assert abs(parts).max() > 0
