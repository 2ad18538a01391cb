"""Pairs that ask for a generated token have the logits of generating it."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import generated, shapes
from mechmm.data.metrics import last_logits
from mechmm.data.pairs import PairError
from mechmm.testing import tiny_pairs


@pytest.fixture(scope="module")
def demo():
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


@pytest.fixture(scope="module")
def pairs(demo):
    return shapes.color_pairs(demo, 3, seed=0)


def never(model):
    """Tokens that are no words."""
    return {"suppress_tokens": [model.to_tokens(word)[0, -1].item() for word in ("</s>", ".", ",")]}


def test_every_step_is_what_generation_gives_next(demo, pairs):
    steps = generated.steps(demo, pairs, 3, **never(demo))
    assert [len(step) for step in steps] == [3, 3, 3]
    said = demo.generate(next(pairs.batches(3)).clean, max_new_tokens=3, **never(demo))
    for number, step in enumerate(steps):
        batch = next(step.batches(3))
        assert batch.answers.answer_ids[:, 0].tolist() == said[:, number].tolist()
        texts = [pair.clean.text for pair in step]
        before = [len(pair.clean.text.split()) for pair in pairs]
        assert [len(text.split()) - number for text in texts] == before


@pytest.mark.parametrize("family", ["llava", "gemma3", "llava_next", "idefics3"])
def test_written_text_has_the_logits_of_generating_it_step_by_step(family):
    model, pairs = tiny_pairs(family, 2)
    words = model.to_tokens("red blue green black circle square star moon")[0].tolist()
    others = sorted(set(range(model.cfg.d_vocab)) - set(words[-8:]))
    steps = generated.steps(model, pairs, 3, suppress_tokens=others)
    batch = next(pairs.batches(2)).clean
    kept = []

    def keep(input_ids, scores):
        kept.append(scores.clone())
        return scores

    model.generate(
        batch, max_new_tokens=3, do_sample=False, suppress_tokens=others, logits_processor=[keep]
    )
    for step, scores in zip(steps, kept, strict=True):
        logits = last_logits(model, next(step.batches(2)).clean)
        seen = scores > -torch.inf
        torch.testing.assert_close(logits[seen], scores[seen], atol=2e-4, rtol=1e-4)


def test_pairs_that_have_ended_are_in_no_further_step(demo, pairs):
    (step,) = generated.steps(demo, pairs, 4)
    assert [pair.answer for pair in step] == [pair.answer for pair in pairs]


def test_bad_input_is_refused(demo, pairs, monkeypatch):
    with pytest.raises(ValueError, match="0 tokens were asked for"):
        generated.steps(demo, pairs, 0)
    with pytest.raises(ValueError, match="reads prompts otherwise"):
        generated.steps(*tiny_pairs("paligemma"), 2)
    ids = demo.to_tokens("<unk>")[0, -1].item()
    monkeypatch.setattr(demo.hf_model.generation_config, "eos_token_id", None)
    keep = sorted(set(range(demo.cfg.d_vocab)) - {ids})
    with pytest.raises(PairError, match=r"is no word of its own|are read as"):
        generated.steps(demo, pairs, 2, suppress_tokens=keep)
