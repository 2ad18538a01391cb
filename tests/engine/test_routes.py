"""A closed route has weight 0, the same in the engine, in full runs and in cached generation."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_runs import Subject, error

from mechmm.data.metrics import continued, logits_at
from mechmm.engine.decoys import decoy
from mechmm.engine.engine import Engine
from mechmm.engine.located import Located
from mechmm.engine.routes import (
    FORWARD,
    Blocked,
    Route,
    RouteError,
    has_attention,
    scores_hook,
)
from mechmm.methods.knockout import knockout_hooks
from mechmm.model.layout import Patches, SpanError, Words
from mechmm.testing import SPECIAL, assert_no_hooks

FAMILIES = ("llava", "gemma3", "qwen2_vl", "paligemma", "internvl", "qwen2_5_vl", "qwen3_5")
ROUTES = (
    "image->last",
    "image->question - last",
    "patch->last + last->last",
    "vision.patch->image",
)


@cache
def subject(family, **options):
    """A tiny model and two prompts with a span of one patch."""
    found = Subject(family, **options)
    if family == "mllama":
        return found
    layout = found.batch.layout.with_span("patch", Patches(((0, 1),)))
    found.__dict__["reading"] = (found.batch.with_layout(layout), found.wanted)
    found.__dict__.pop("batch", None)
    return found


def full(found, route, layers):
    """Logits of a full run with a route closed, and every pattern of the tower."""
    model, tower, kept = found.model, Route.of(route, found.model).tower, {}
    names = [scores_hook(model, tower, i).replace("attn_scores", "pattern") for i in layers]

    def keep(pattern, hook):
        kept[hook.name] = pattern.clone()

    hooks = knockout_hooks(model, found.batch, route, layers)
    with torch.no_grad(), model.hooks(fwd_hooks=[*hooks, *((name, keep) for name in names)]):
        logits = logits_at(model, found.batch, found.wanted)
    return logits, list(kept.values())


def hidden_of(found, route):
    finder, own = Located(found.batch.layout), Route.of(route, found.model)
    return {(0, p): own.hidden(finder, p) for p in range(len(found.batch))}


def engine(found, route, layers):
    """Logits of the engine with a route closed."""
    model, own = found.model, Route.of(route, found.model)
    hooks = tuple(scores_hook(model, own.tower, layer) for layer in layers)
    blocked = Blocked(hidden_of(found, route), [(0, hooks)], [route])
    places, values = blocked.changes(len(found.batch), model.device)
    runs = Engine(model, found.batch, places.hooks, found.wanted, kept=())
    logits = runs.base.clone()
    for trials, own_logits in runs.run(places, values):
        logits[torch.as_tensor(trials)] = own_logits
    return logits, runs.base


def layers_of(found, route):
    return has_attention(found.model, Route.of(route, found.model).tower, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engine_closes_what_a_full_run_with_hooks_closes(family):
    found = subject(family)
    for route in ROUTES:
        every = layers_of(found, route)
        wanted, patterns = full(found, route, every)
        check_patterns(found, route, patterns)
        got, base = engine(found, route, every)
        assert error(got, wanted) < 1e-5, route
        assert error(wanted, base) > 1e-4, route
    first = every[:1]
    assert error(engine(found, route, first)[0], full(found, route, first)[0]) < 1e-5


@pytest.mark.parametrize("family", ["mllama", "chameleon"])
def test_other_kinds_of_attention_close_too(family):
    found = subject(family)
    route = "question - last->last"
    _, patterns = full(found, route, layers_of(found, route))
    check_patterns(found, route, patterns)


def check_patterns(found, route, patterns):
    """Hidden keys have weight 0, and the weights of a row add up to 1."""
    assert len(patterns) == len(layers_of(found, route)) > 0
    for hidden in hidden_of(found, route).values():
        for pattern in patterns:
            rows = pattern[hidden.row, :, hidden.query]  # [query, head, key]
            keys = torch.as_tensor(hidden.keys)[:, : rows.shape[-1]]
            closed = rows.masked_select(keys[:, None].expand_as(rows))
            assert len(closed) > 0
            assert bool((closed == 0).all()), route
            torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "mllama"])
@torch.no_grad()
def test_cached_generation_equals_full_runs_step_by_step(family):
    found = subject(family)
    model, batch = found.model, found.batch
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = list(range(len(SPECIAL)))
    route = "question - last->last" if family == "mllama" else "patch->last + question->last"
    route = route if family == "mllama" else "image->question - last + image->last"
    hooks = knockout_hooks(model, batch, route)
    with model.hooks(fwd_hooks=hooks):
        tokens = model.generate(batch, **options)
        for step in range(4):
            longer = continued(batch, tokens[:, :step])
            last = torch.full((len(batch), 1), longer.input_ids.shape[1] - 1)
            logits = logits_at(model, longer, last)[:, 0]
            logits[:, : len(SPECIAL)] = -torch.inf
            assert torch.equal(logits.argmax(-1), tokens[:, step])
    assert not torch.equal(tokens, model.generate(batch, **options))


def test_nothing_is_left_on_the_model():
    found = Subject("llava")
    hooks = knockout_hooks(found.model, found.batch, "image->last")
    hooks[-1][1].rows[0] = {0: np.ones(found.batch.input_ids.shape[1], dtype=bool)}
    with found.model.hooks(fwd_hooks=hooks), pytest.raises(RouteError):
        found.model(found.batch)
    assert_no_hooks(found.model.unwrap())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_random_routes_hide_as_many_pairs_elsewhere(family):
    found = subject(family)
    finder, causal = Located(found.batch.layout), found.model.family.resume in FORWARD
    expected = {"patch->last": "positions", "vision.patch->image": "positions"}
    for text in ("patch->last", "image->last", "vision.patch->image", *ROUTES[1:3]):
        route = Route.of(text, found.model)
        for prompt in range(2):
            own = route.hidden(finder, prompt)
            other, kind = decoy(route, own, finder, prompt, causal, np.random.default_rng(3))
            assert kind == expected.get(text, "pairs")
            if kind == "positions":
                assert other.count == own.count
                assert not (other.keys & own.keys).any()
            mine, theirs = (
                {
                    (r, q, k)
                    for r, q, row in zip(h.row, h.query, h.keys, strict=True)
                    for k in np.flatnonzero(row)
                }
                for h in (own, other)
            )
            assert not mine & theirs
            assert len(theirs) > 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "is no route"),
        ("image->", "is no route"),
        ("image->question->last", "is no route"),
        ("image - ->last", "is no route"),
        ("projector.image->last", "unknown span"),
        ("picture->last", "unknown span 'picture'"),
        ("image->last + vision.image->image", "each tower a route"),
        ("all->last", "leaves position"),
        ("vision.image->image", "nothing to attend to"),
        ("image->patch - patch", "both of its ends"),
        ("last->before_image", None),
    ],
)
def test_routes_that_are_refused(text, message):
    found = subject("qwen2_vl")
    if message is None:  # closes what nothing reads: allowed, as it says what it does
        assert len(knockout_hooks(found.model, found.batch, text)) > 0
        return
    with pytest.raises((RouteError, SpanError), match=message):
        knockout_hooks(found.model, found.batch, text)


def test_pictures_that_are_no_keys_are_refused():
    model = Subject("mllama").model
    with pytest.raises(RouteError, match="cross-attention"):
        Route.of("image->last", model)


def test_a_row_that_the_model_masks_to_nothing_is_refused_while_it_runs():
    found = subject("gemma3")
    hook = dict(knockout_hooks(found.model, found.batch, "patch->last"))
    hiding = next(iter(hook.values()))
    hiding.rows[0] = {0: np.ones(found.batch.input_ids.shape[1], dtype=bool)}
    scores = torch.zeros(2, 1, found.batch.input_ids.shape[1], found.batch.input_ids.shape[1])
    with pytest.raises(RouteError, match="position 0"):
        hiding(scores, SimpleNamespace(name="x"))


def test_words_may_be_an_end():
    found = Subject("llava")
    text = found.batch.layout.tokens[0][-2].strip()
    layout = found.batch.layout.with_span("word", [Words(text), Patches(((0, 0),))])
    route = Route.of("word->last", found.model)
    hidden = route.hidden(Located(layout), 0)
    assert hidden.query.tolist() == [int(layout.last[0])]
    assert hidden.count == int(layout.mask("word")[0].sum())
