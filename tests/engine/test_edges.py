"""Edge scores are gradient x difference, and edges are cut exactly, in every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contrasted import NO_EDGES, Contrasted

from mechmm.data.pairs import Pair, PairDataset, Prompt
from mechmm.engine.flow import slopes_at, values
from mechmm.engine.spans import span_names
from mechmm.engine.splice import stream_at
from mechmm.engine.wiring import StreamError, wired
from mechmm.methods.attribution import _by_layer
from mechmm.model.families import FAMILIES
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import PADDING, SpanError
from mechmm.testing import RECIPES, tiny, tiny_hf
from mechmm.testing.edges import EdgeReference

ANSWERING = [
    family
    for family, recipe in RECIPES.items()
    if FAMILIES[recipe.architecture].unembed is not None and family not in NO_EDGES
]


@pytest.fixture(scope="module", params=ANSWERING)
def case(request):
    return Contrasted(request.param)


def test_scores_are_gradient_times_difference(case):
    found, wanted = case.scores().sum(0), case.brute()
    known = ~wanted.isnan()
    assert known.float().mean() > 0.4
    assert (found - wanted)[known].abs().max() < 1e-4 * wanted[known].abs().max()
    assert (wanted[known].abs() > 1e-3 * wanted[known].abs().max()).float().mean() > 0.1


def test_with_all_edges_the_clean_run_and_with_none_the_corrupt_one(case):
    splice, blocks = case.contrast.splice(), case.wiring.graph.blocks
    clean, corrupt = case.contrast.clean.metric, case.contrast.reference.metric
    scale = (clean - corrupt).abs().max()
    assert (splice.run([torch.ones(b.shape) for b in blocks]) - clean).abs().max() < 1e-4 * scale
    assert (splice.run([torch.zeros(b.shape) for b in blocks]) - corrupt).abs().max() < 1e-4 * scale


def test_what_is_written_adds_up_to_the_stream(case):
    values = case.contrast.clean.values
    for number, group in enumerate(case.wiring.readers):
        hook = stream_at(case.model, group)
        if hook is None or hook not in values:
            continue
        rows, positions = np.concatenate(
            [p for e in case.contrast.places[group.tower] for p in e]
        ).T
        at, before = (torch.tensor(rows), torch.tensor(positions)), case.wiring.before(number)
        parts = [w.of(values, at).sum(0) for w in case.contrast.writers if w.group in before]
        assert torch.allclose(sum(parts), values[hook][at], atol=2e-4), hook


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "mllama"])
def test_scores_of_spans_add_up_to_those_of_the_whole(family):
    whole, split = Contrasted(family), Contrasted(family, ("image", "last"))
    parts = split.scores()[0].numpy()
    for block, single, several in zip(
        whole.wiring.graph.blocks,
        whole.wiring.graph.by_block(whole.scores()[0].numpy()),
        split.wiring.graph.by_block(parts),
        strict=True,
    ):
        assert several.shape[1:] == block.shape[1:]
        assert abs(several.sum(0) - single[0]).max() < 1e-4 * abs(parts).max()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize("spans", [("image", "last"), tuple("0123456")])
def test_cutting_every_span_of_an_edge_is_cutting_the_edge(family, spans):
    whole, split = Contrasted(family), Contrasted(family, spans)
    random = torch.Generator().manual_seed(0)
    masks = [
        (torch.rand(b.shape[1:], generator=random) < 0.7).float() for b in whole.wiring.graph.blocks
    ]
    found = split.contrast.splice().run(
        [m.expand(b.shape) for m, b in zip(masks, split.wiring.graph.blocks, strict=True)]
    )
    wanted = whole.contrast.splice().run([mask[None] for mask in masks])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.allclose(found, whole.contrast.clean.metric, atol=1e-2)


def positions_of(case: Contrasted) -> list[int]:
    """How many positions every prompt has."""
    return (case.batches[0].layout.modality != PADDING).sum(-1).tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "llava_next"])
def test_scores_of_positions_are_those_of_spans_that_are_one_position(family):
    lengths = positions_of(whole := Contrasted(family))
    names = tuple(map(str, range(min(lengths))))
    split, last = Contrasted(family, names), Contrasted(family, ("last",))
    single, several, ends = (
        case.wiring.graph.by_block(case.scores().numpy()) for case in (whole, split, last)
    )
    scale = max(abs(part).max() for part in single)
    shortest = lengths.index(min(lengths))
    for block, one, parts, end in zip(
        whole.wiring.graph.blocks, single, several, ends, strict=True
    ):
        assert parts.shape[1] == len(names) + 1
        assert abs(parts.sum(1) - one[:, 0]).max() < 1e-4 * scale
        if block.tower == "language":
            assert abs(parts[shortest, -2] - end[shortest, 0]).max() < 1e-4 * scale
            assert abs(parts[shortest, -2]).max() > 0


def test_a_position_that_a_prompt_has_not_is_refused():
    case = Contrasted("llava", ("1000",))
    with pytest.raises(SpanError, match=r"prompt 0 has \d+ positions, and none with the number"):
        case.scores()


def test_activations_on_the_way_score_keys_and_values_of_pictures_once():
    """Scores of the edges into them add up to what they alone do, up to the sum over steps."""
    contrast = (case := Contrasted("mllama")).contrast
    scores, blocks = _by_layer(contrast, steps=3), case.wiring.graph.by_block
    kinds = [group.kind for group in case.wiring.readers]
    found = sum(
        p.sum((1, 2, 3))
        for p, k in zip(blocks(scores.numpy()), kinds, strict=True)
        if k == "states"
    )
    edits = [
        (hook, lambda value, hook: contrast.clean.values[hook.name])
        for group in case.wiring.readers
        if group.kind == "states"
        for hook in slopes_at(case.model, group)
    ]
    moved = values(case.model, contrast.corrupt_part, case.answers, [], edits).metric
    wanted = moved - contrast.reference.metric
    assert (torch.as_tensor(found) - wanted).abs().max() < 0.3 * wanted.abs().max()


@pytest.mark.parametrize("family", NO_EDGES)
def test_a_normed_stream_is_refused(family):
    with pytest.raises(StreamError, match=r"norms its residual stream.*mm\.patch"):
        wired(HookedMultimodal.from_hf(tiny_hf(family)))


@pytest.mark.parametrize("options", [{}, {"key_value_heads": 2}, {"vision_feature_layer": -2}])
def test_any_edges_cut_are_as_in_the_plain_reference(options):
    """The reference walks the weights in float64 and shares nothing with the engine."""
    case = Contrasted("llava", options=tuple(options.items()))
    reference, graph = EdgeReference(case.model.hf_model), case.wiring.graph
    assert set(graph.names()) == set(reference.edges)
    clean, corrupt = (dict(batch.inputs) for batch in case.batches)
    other, splice = reference.values(corrupt), case.contrast.splice()
    random = np.random.default_rng(0)
    for share in (0.05, 0.5, 0.9):
        keep = random.random(len(graph)) < share
        on = set(graph.names(np.flatnonzero(keep)))
        logits = reference.logits(clean, on, other)
        masks = [torch.from_numpy(part.astype(np.float32)) for part in graph.by_block(keep)]
        wanted = (logits[:, 7] - logits[:, 11]).float()
        assert torch.allclose(splice.run(masks), wanted, atol=1e-4)


def test_positions_are_spans_only_for_pairs_of_one_length():
    model = tiny()
    short, long = ("red circle", "blue circle"), ("the red circle", "the blue circle")
    pairs = [Pair(*map(Prompt, texts), "red", "blue") for texts in (short, long)]
    with pytest.raises(SpanError, match=r"pair 1 has \d+ positions, pair 0 has \d+"):
        span_names("positions", PairDataset(pairs, model))
    alone = PairDataset(pairs[1:], model)
    count = int((alone.batch([0]).clean.layout.modality != PADDING).sum())
    assert span_names("positions", alone) == tuple(map(str, range(count)))
    with pytest.raises(SpanError, match="spans is the word 'image'; give a list of names"):
        span_names("image", alone)
