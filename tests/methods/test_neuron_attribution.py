"""Neuron scores and ablations are those of hand-made hooks; the best neurons carry the answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.data.metrics import last_logits
from mechmm.engine.checks import SiteError
from mechmm.model.layout import SpanError
from mechmm.results.result import Result
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def same(demo):
    return shapes.pairs(demo, "same", 24, seed=0)


@pytest.fixture(scope="module")
def found(demo, same):
    return mm.neuron_attribution(demo, same, span="last", n_random=4)


def metric_of(model, batch):
    logits = last_logits(model, batch.clean)
    return mm.logit_diff(logits, batch.answers)


def by_hand(model, batch, layer, places):
    """Activation times slope of every neuron of a layer, summed over places [neuron]."""
    kept = {}

    def keep(value, hook):
        kept["value"] = value if value.requires_grad else value.detach().requires_grad_()
        kept["value"].retain_grad()
        return kept["value"]

    with torch.enable_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", keep)]):
        metric_of(model, batch).sum().backward()
    return (kept["value"] * kept["value"].grad)[0, places].sum(0).detach()


def zeroed(places, numbers):
    def zero(value, hook):
        value = value.clone()
        for number in numbers:
            value[0, places, number] = 0
        return value

    return zero


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "idefics3", "internvl"])
def test_it_is_what_hooks_by_hand_give(family):
    model, pairs = tiny_pairs(family, 4)
    found = mm.neuron_attribution(model, pairs, top=6, n_random=1)
    for number in range(4):
        batch = pairs.batch([number])
        places = torch.tensor(batch.clean.layout.positions("image", 0))
        for layer, own in found.neurons.groupby("layer"):
            expected = by_hand(model, batch, layer, places)
            columns = torch.tensor(own.index.tolist())
            torch.testing.assert_close(
                found.scores[number, columns], expected, rtol=1e-3, atol=1e-5
            )
        for columns, value in ((found.top, found.ablated), (found.random[0], found.nulls[0])):
            chosen = found.neurons.iloc[list(columns)].groupby("layer")["neuron"]
            hooks = [
                (f"blocks.{layer}.mlp.hook_post", zeroed(places, own)) for layer, own in chosen
            ]
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                expected = metric_of(model, batch)[0]
            torch.testing.assert_close(value[number], expected, rtol=1e-3, atol=1e-4)


HIDDEN = "projector.hook_post"


def at_projector(model, prompt, baseline, way=1.0):
    """What a prompt has in the projector's hidden layer, and its slope part of the way there."""
    kept = {}

    def keep(value, hook):
        kept["clean"] = value.detach().clone()
        mixed = baseline + way * (kept["clean"] - baseline)
        kept["value"] = mixed.requires_grad_()
        return kept["value"] + 0.0

    with torch.enable_grad(), model.hooks(fwd_hooks=[(HIDDEN, keep)]):
        mm.logit_diff(last_logits(model, prompt.clean), prompt.answers).sum().backward()
    return kept["clean"], kept["value"].grad


def stream_of(model, batch, hooks):
    """What enters the language model's first block [pos, d]."""
    kept = {}
    watch = ("blocks.0.hook_resid_pre", lambda value, hook: kept.update(value=value.clone()))
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, watch]):
        model(batch)
    return kept["value"][0]


def without(numbers, by=None):
    """Hooks that set neurons of the projector to zero, or add to them, at all tokens."""

    def edit(value, hook):
        value = value.clone()
        value[..., numbers] = 0 if by is None else value[..., numbers] + by
        return value

    return [(HIDDEN, edit)]


# One linear map, merged patches (four cells a token), gates, a resampler behind the projector.
PROJECTORS = ["llava", "qwen2_vl", "aya_vision", "glm4v", "idefics2", "llava_next"]


@pytest.mark.parametrize("family", PROJECTORS)
def test_the_projector_is_scored_and_ablated_as_by_hand(family):
    model, pairs = tiny_pairs(family, 4)
    own = {"tower": "projector", "top": 1, "n_random": 1}
    found = mm.neuron_attribution(model, pairs, **own)
    assert found.neurons["layer"].unique().tolist() == [-1]
    for number in range(4):
        batch = pairs.batch([number])
        clean, slope = at_projector(model, batch, 0.0)
        expected = (clean * slope).sum((0, 1))
        torch.testing.assert_close(found.scores[number], expected, rtol=1e-3, atol=1e-5)
        for columns, value in ((found.top, found.ablated), (found.random[0], found.nulls[0])):
            with torch.no_grad(), model.hooks(fwd_hooks=without(list(columns))):
                lost = metric_of(model, batch)[0]
            torch.testing.assert_close(value[number], lost, rtol=1e-3, atol=1e-4)
    # What a neuron writes is its column, unless a resampler stands between.
    assert bool(found.words) == (family != "idefics2")
    if found.words:
        batch, neuron = pairs.batch([0]).clean, found.top[0]
        moved = stream_of(model, batch, without([neuron], by=1.0)) - stream_of(model, batch, [])
        written = moved[moved.norm(dim=-1) > 1e-6]
        path = model.family.projectors["projector"]
        column = model.hf_model.get_submodule(f"{path.root}.{path.post}").weight[:, neuron]
        torch.testing.assert_close(written, column.expand_as(written), rtol=1e-3, atol=1e-4)
        said = model.to_string((column @ model.W_U).topk(5).indices[:, None])
        assert found.words[0] == " ".join(word.strip() for word in said)


def test_integrated_gradients_of_the_projector_are_those_by_hand():
    """From the corrupt prompt's activations: the mean slope of runs on the way, times the way."""
    model, pairs = tiny_pairs("llava", 4)
    own = {"tower": "projector", "top": 2, "n_random": 1, "steps": 2}
    found = mm.neuron_attribution(model, pairs, method="ig", reference="corrupt", **own)
    for number in range(4):
        batch = pairs.batch([number])
        _, cache = model.run_with_cache(batch.corrupt, names_filter=HIDDEN)
        runs = [at_projector(model, batch, cache[HIDDEN], way) for way in (0.5, 1.0)]
        slope = torch.stack([slope for _, slope in runs]).mean(0)
        expected = ((runs[0][0] - cache[HIDDEN]) * slope).sum((0, 1))
        # Slopes are taken on the corrupt prompt, whose text is the same.
        torch.testing.assert_close(found.scores[number], expected, rtol=1e-3, atol=1e-5)


def test_a_projector_without_a_hidden_layer_has_no_neurons():
    model, pairs = tiny_pairs("gemma3", 4)
    with pytest.raises(SiteError, match=r"no hidden layer.*mm\.sites\.projector"):
        mm.neuron_attribution(model, pairs, tower="projector")
    with pytest.raises(ValueError, match="no hidden layer"):
        mm.sites.neurons(model, {-1: [0]}, tower="projector")


@pytest.mark.parametrize("tower", ["language", "vision"])
@pytest.mark.parametrize("reference", ["zero", "corrupt"])
def test_scores_are_those_of_attribute(tower, reference):
    model, pairs = tiny_pairs("llava", 4)
    found = mm.neuron_attribution(
        model, pairs, tower=tower, method="ig", reference=reference, steps=2, top=2, n_random=1
    )
    other = mm.attribute(
        model,
        pairs,
        spans=["image"],
        granularity="neuron",
        method="eap-ig-activations",
        steps=2,
        target=reference,
    )
    table = other.graph.table(np.arange(len(other.graph)))
    here = (table["tower"] == tower) & (table["kind"] == "mlp") & (table["span"] == "image")
    own = table[here]
    assert own[["layer", "neuron"]].to_numpy().tolist() == found.neurons.to_numpy().tolist()
    torch.testing.assert_close(found.scores, other.scores[:, torch.tensor(here.tolist())])


def test_the_best_neurons_carry_the_answer_and_random_ones_do_not(found):
    table = found.effects().set_index("neurons")
    assert table.loc["top", "high"] < -1
    assert table.loc["random 1":, "change"].abs().max() < 0.3
    layers = found.neurons["layer"].to_numpy()
    for draw in found.random:
        assert sorted(layers[list(draw)]) == sorted(layers[list(found.top)])
        assert not set(draw) & set(found.top)


def test_the_effect_is_read_on_pairs_that_chose_nothing(found):
    best = found.scores[found.train].mean(0).argsort(descending=True)[:20]
    assert best.tolist() == list(found.top)
    change = (found.ablated - found.base)[~found.train].mean()
    assert found.effects()["change"][0] == pytest.approx(float(change))
    assert found.to_dataframe()["score"].mean() > 0


def test_words_are_the_largest_direct_logits(demo, found):
    row = found.to_dataframe().iloc[0]
    tower = demo.towers["language"]
    logits = tower.weight("W_out", int(row.layer))[row.neuron] @ tower.W_U
    top = demo.to_string(logits.topk(5).indices[:, None])
    assert row.words == " ".join(word.strip() for word in top)


def test_neurons_that_write_an_answer_are_counted_beside_random_ones(demo, found):
    """Each word of every set is compared with the answers of the pairs, by hand."""
    tower, answers = demo.towers["language"], set(found.answers)
    shares = []
    for own in (found.top, *found.random):
        rows = [
            tower.weight("W_out", int(layer))[neuron] @ tower.W_U
            for layer, neuron in found.neurons.iloc[list(own)].to_numpy()
        ]
        top = torch.stack(rows).topk(5).indices
        said = [{word.strip() for word in demo.to_string(row[:, None])} for row in top]
        shares.append(np.mean([bool(words & answers) for words in said]))
    table = found.decoded()
    assert table["share"].tolist() == pytest.approx(shares)
    assert table["null"].tolist() == [False] + [True] * len(found.random)
    assert table["random_mean"][0] == pytest.approx(np.mean(shares[1:]))


def test_mean_ablation_keeps_more_than_nothing_to_ablate(demo, same):
    """A neuron whose activation is its mean everywhere changes nothing: one pair, twice."""
    alone = mm.PairDataset([same[0]] * 4, demo)
    options = {"span": "last", "top": 3, "n_random": 1}
    kept = mm.neuron_attribution(demo, alone, ablation="mean", **options)
    lost = mm.neuron_attribution(demo, alone, ablation="zero", **options)
    torch.testing.assert_close(kept.ablated, kept.base, rtol=1e-4, atol=1e-4)
    assert (lost.base - lost.ablated).min() > 0.05


@pytest.mark.parametrize("tower", ["language", "vision", "projector"])
def test_places_are_the_largest_activations(demo, same, tower):
    found = mm.neuron_attribution(demo, same[:6], tower=tower, top=3, n_random=1, n_places=4)
    prefix = "" if tower == "language" else f"{tower}."
    layer, neuron = found.neurons.iloc[found.top[0]]
    own = found.places.query("layer == @layer and neuron == @neuron")
    batch = same[:6].batch(range(6)).clean
    hook = HIDDEN if tower == "projector" else f"{prefix}blocks.{layer}.mlp.hook_post"
    _, cache = demo.run_with_cache(batch, names_filter=hook)
    values = cache[hook][..., int(neuron)]
    if tower == "language":
        values = torch.stack(
            [values[i, list(batch.layout.positions("image", i))] for i in range(6)]
        )
    elif tower == "vision":
        values = values[:, 1:]  # the class token stands for no patch
    expected = values.flatten().topk(4).values
    assert own["activation"].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    if tower == "projector":
        assert found.sheet(0).width > 0  # its tokens have boxes
        labels = found.plot()["neurons"].layout.yaxis.ticktext
        assert any(label.startswith(f"projector.n{neuron} ") for label in labels)
    row = own.iloc[0]
    picture = found.pictures[int(row["picture"])]
    assert 0 <= row["left"] < row["right"] <= picture.width
    assert found.sheet(0).width > found.sheet(0).height
    with pytest.raises(ValueError, match="rank is 3"):
        found.sheet(3)


def test_saved_is_loaded_and_figures_show_the_numbers(found, tmp_path):
    assert Result.load(found.save(tmp_path / "found")).equals(found)
    figures = found.plot()
    assert list(figures["ablation"].data[0].x) == pytest.approx(found.effects()["change"].tolist())
    assert list(figures["neurons"].data[0].x) == pytest.approx(found.to_dataframe()["score"])
    assert "20 best of 12 pairs" in found.summary()
    found.page("Neurons")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "audio"}, "unknown tower"),
        ({"method": "eap"}, "unknown method"),
        ({"reference": "none"}, "unknown reference"),
        ({"ablation": "noise"}, "unknown ablation"),
        ({"top": 0}, "top is 0"),
        ({"top": 10**6}, "ask for fewer"),
        ({"n_random": 0}, "n_random is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"train": 1.0}, "to report on"),
        ({"metric": mm.flipped}, "gradient"),
    ],
)
def test_bad_input_is_refused(demo, same, options, message):
    with pytest.raises(ValueError, match=message):
        mm.neuron_attribution(demo, same, **options)


def test_a_span_that_is_not_there_is_refused(demo, same):
    with pytest.raises(SpanError, match="nowhere"):
        mm.neuron_attribution(demo, same, span="nowhere")
    with pytest.raises(SpanError, match="vision tower"):
        mm.neuron_attribution(demo, same, span="last", tower="vision")
    with pytest.raises(SpanError, match="of the projector"):
        mm.neuron_attribution(demo, same, span="last", tower="projector")
