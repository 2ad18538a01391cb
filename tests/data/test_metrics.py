"""Metrics against plain torch, and answers of several tokens against a loop written by hand."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from mechmm.data.metrics import (
    METRICS,
    Answers,
    accuracy,
    continued,
    forced_logits,
    kl,
    last_logits,
    log_prob,
    logit_diff,
    prepared,
    prob,
    score,
)
from mechmm.data.scenes import Scene, Thing
from mechmm.model.layout import PADDING, TEXT

PICTURES = [Scene((Thing(cell, "circle", "red"),)).render() for cell in (0, 5)]
TEXTS = [
    "<image> what color is the circle ? answer :",
    "red circle in b2 . what color is the circle ? answer :",
    "<image> <image> what is in a1 ? answer :",
]
GROUPS = [PICTURES[:1], [], PICTURES]
ANSWERS = ["red circle in b2", "red", "blue heart"]
FOILS = ["green", "yellow star", "blue circle"]


@pytest.fixture(scope="module")
def logits():
    return torch.randn(4, 11, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def answers():
    return Answers(torch.tensor([[1], [2], [3], [4]]), torch.tensor([[5], [6], [7], [8]]))


def by_hand(model, prompt: int, answer: str, hooks=()):
    """Log-probability of an answer and whether it is said greedily: one prompt, token by token."""
    batch = model.encode([TEXTS[prompt]], [GROUPS[prompt]])
    ids, total, greedy = batch.input_ids, 0.0, True
    for token in model.answer_tokens(answer):
        with model.hooks(fwd_hooks=list(hooks)), torch.no_grad():
            logits = model.hf_model(input_ids=ids, **batch.extra).logits[0, -1]
        total += log_softmax(logits, -1)[token].item()
        greedy &= logits.argmax().item() == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return total, greedy


def test_logit_diff_is_the_difference_of_two_logits(logits, answers):
    wanted = [logits[i, i + 1] - logits[i, i + 5] for i in range(4)]
    torch.testing.assert_close(logit_diff(logits, answers), torch.stack(wanted))


def test_log_prob_and_prob_are_those_of_softmax(logits, answers):
    wanted = torch.stack([logits.softmax(-1)[i, i + 1] for i in range(4)])
    torch.testing.assert_close(prob(logits, answers), wanted)
    torch.testing.assert_close(log_prob(logits, answers), wanted.log())


def test_kl_is_minus_the_divergence_from_the_clean_run(logits, answers):
    clean = logits.flip(0)
    wanted = -kl_div(
        log_softmax(logits, -1), log_softmax(clean, -1), log_target=True, reduction="none"
    ).sum(-1)
    known = answers.with_reference(clean)
    torch.testing.assert_close(kl(logits, known), wanted)
    assert (kl(logits, known) < 0).all()
    torch.testing.assert_close(kl(clean, known), torch.zeros(4), atol=1e-6, rtol=0)


def test_accuracy_is_one_where_the_answer_is_likeliest(logits, answers):
    logits = logits.clone()
    logits[1, 2] = 50
    wanted = [float(logits[i].argmax() == i + 1) for i in range(4)]
    assert accuracy(logits, answers).tolist() == wanted
    assert wanted[1] == 1.0


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_larger_is_more_the_clean_answer(metric):
    rising = torch.zeros(3, 5)
    rising[:, 2] = torch.tensor([-2.0, 0.0, 6.0])
    answers = Answers(torch.full((3, 1), 2), torch.full((3, 1), 4))
    values = metric(rising, answers.with_reference(rising[[2, 2, 2]]))
    assert values[0] <= values[1] <= values[2]
    assert values[0] < values[2]


def test_half_precision_does_not_blunt_probabilities(answers):
    logits = torch.zeros(4, 1000, dtype=torch.float16)
    assert log_prob(logits, answers).dtype == torch.float32


def test_kl_without_the_clean_run_is_refused(logits, answers):
    with pytest.raises(ValueError, match=r"with_reference\(clean_logits\)"):
        kl(logits, answers)


@pytest.mark.parametrize("metric", [logit_diff, log_prob, prob, accuracy])
def test_several_tokens_cannot_be_read_off_one_position(logits, metric):
    long = Answers(torch.tensor([[1, 2]] * 4), torch.tensor([[3]] * 4))
    with pytest.raises(ValueError, match="use score"):
        metric(logits, long)


def test_answers_are_padded_selected_repeated_and_swapped(model):
    answers = Answers.of(model, ANSWERS, FOILS)
    assert answers.answer_ids.shape == (3, 4)
    assert (answers.answer_ids >= 0).sum(-1).tolist() == [4, 1, 2]
    assert not answers.single
    assert answers[1:2].answer_ids.tolist() == answers.answer_ids[1:2].tolist()
    assert torch.equal(answers.repeat(2).foil_ids, torch.cat([answers.foil_ids] * 2))
    assert torch.equal(answers.swapped.answer_ids, answers.foil_ids)
    assert torch.equal(answers.swapped.swapped.answer_ids, answers.answer_ids)


def test_answers_and_foils_of_different_number_are_refused(model):
    with pytest.raises(ValueError, match="2 answers but 1 foils"):
        Answers.of(model, ["red", "blue"], ["green"])


@pytest.mark.parametrize("side", ["left", "right"])
def test_last_logits_of_a_mixed_batch_are_those_of_single_runs(model, side):
    together = last_logits(model, model.encode(TEXTS, GROUPS, padding_side=side))
    for i, (text, group) in enumerate(zip(TEXTS, GROUPS, strict=True)):
        alone = model(model.encode([text], [group]))[0, -1]
        torch.testing.assert_close(together[i], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_of_several_tokens_score_as_in_a_loop_by_hand(model, side):
    batch = model.encode(TEXTS, GROUPS, padding_side=side)
    answers = Answers.of(model, ANSWERS, FOILS)
    of_answers = [by_hand(model, i, text)[0] for i, text in enumerate(ANSWERS)]
    of_foils = [by_hand(model, i, text)[0] for i, text in enumerate(FOILS)]
    wanted = torch.tensor(of_answers)
    with torch.no_grad():
        found = {
            name: score(model, batch, answers, METRICS[name]) for name in METRICS if name != "kl"
        }
    torch.testing.assert_close(found["log_prob"], wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(found["prob"], wanted.exp(), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        found["logit_diff"], wanted - torch.tensor(of_foils), atol=1e-4, rtol=0
    )
    assert found["accuracy"].tolist() == [0.0, 0.0, 0.0]


def test_what_the_model_says_greedily_is_accurate(model):
    batch = model.encode(TEXTS, GROUPS)
    ids = model.generate(batch, max_new_tokens=3, do_sample=False)
    said = Answers(ids.masked_fill(torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 1]]).bool(), -1), ids)
    assert score(model, batch, said, accuracy).tolist() == [1.0, 1.0, 1.0]
    wrong = said.answer_ids.clone()
    wrong[0, 2] = (wrong[0, 2] + 1) % 5 + 5
    assert score(model, batch, replace(said, answer_ids=wrong), accuracy)[0] == 0.0


def test_a_hook_on_a_position_acts_on_answers_of_several_tokens_too(model):
    batch = model.encode(TEXTS, GROUPS)
    row, position = 1, int(batch.layout.last[1]) - 2
    alone = position - (batch.layout.shape[1] - model.encode(TEXTS[1], []).layout.shape[1])

    def edit(at):
        def hook(tensor, hook):
            tensor = tensor.clone()
            tensor[at] = 3.0
            return tensor

        return [("blocks.2.hook_resid_pre", hook)]

    with model.hooks(fwd_hooks=edit((row, position))), torch.no_grad():
        found = score(model, batch, Answers.of(model, ANSWERS, ANSWERS[::-1]), log_prob)
    wanted = [by_hand(model, i, text)[0] for i, text in enumerate(ANSWERS)]
    wanted[row] = by_hand(model, row, ANSWERS[row], edit((0, alone)))[0]
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-4, rtol=0)
    assert abs(wanted[row] - by_hand(model, row, ANSWERS[row])[0]) > 1e-3


def test_single_tokens_score_as_the_metric_of_the_last_position(model):
    batch = model.encode(TEXTS, GROUPS)
    answers = Answers.of(model, ["red", "blue", "heart"], ["green", "red", "star"])
    logits = model(batch)[:, -1]
    for metric in (logit_diff, log_prob, prob, accuracy):
        torch.testing.assert_close(score(model, batch, answers, metric), metric(logits, answers))
    both = score(model, batch, answers, log_prob) - score(model, batch, answers.swapped, log_prob)
    torch.testing.assert_close(both, score(model, batch, answers, logit_diff), atol=1e-5, rtol=0)


def test_a_metric_of_ones_own_works_on_single_tokens_only(model):
    batch = model.encode(TEXTS, GROUPS)

    def top(logits, answers):
        return logits.amax(-1)

    single = Answers.of(model, ["red"] * 3, ["blue"] * 3)
    assert torch.equal(score(model, batch, single, top), last_logits(model, batch).amax(-1))
    with pytest.raises(ValueError, match="no rule; use one of logit_diff"):
        score(model, batch, Answers.of(model, ANSWERS, FOILS), top)


def test_kl_reads_the_position_after_the_prompt_for_any_answers(model):
    clean, other = (model.encode(TEXTS[0], picture) for picture in PICTURES)
    answers = prepared(model, clean, Answers.of(model, ["red heart"], ["blue"]), kl)
    wanted = kl(last_logits(model, other), answers)
    torch.testing.assert_close(score(model, other, answers, kl), wanted)
    assert wanted < 0
    assert score(model, clean, answers, kl).abs() < 1e-5
    assert prepared(model, clean, answers, prob) is answers


def test_another_number_of_answers_than_prompts_is_refused(model):
    with pytest.raises(ValueError, match="1 answers for 3 prompts"):
        score(model, model.encode(TEXTS, GROUPS), Answers.of(model, ["red"], ["blue"]))


def test_gradients_flow_through_a_score(model):
    batch = model.encode(TEXTS, GROUPS)
    seen = []

    def keep(tensor, hook):
        tensor.retain_grad()
        seen.append(tensor)

    with model.hooks(fwd_hooks=[("vision.blocks.1.hook_resid_post", keep)]):
        score(model, batch, Answers.of(model, ANSWERS, FOILS)).sum().backward()
    assert len(seen) == 2
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in seen)


def test_continued_keeps_the_positions_of_the_prompts(model):
    batch = model.encode(TEXTS, GROUPS)
    types = (batch.input_ids == model.placeholder).long()
    batch = replace(batch, extra={**batch.extra, "mm_token_type_ids": types})
    longer = continued(batch, torch.tensor([[7, 8], [9, -1], [7, 8]]))
    width = batch.input_ids.shape[1]
    assert torch.equal(longer.input_ids[:, :width], batch.input_ids)
    assert longer.attention_mask[:, width:].tolist() == [[1, 1], [1, 0], [1, 1]]
    last = batch.position_ids[:, -1:]
    assert torch.equal(longer.position_ids[:, width:], last + torch.tensor([[1, 2]]))
    assert longer.layout.modality[1, width:].tolist() == [TEXT, PADDING]
    assert longer.layout.last.tolist() == [width + 1, width, width + 1]
    assert longer.extra["mm_token_type_ids"][:, width:].abs().sum() == 0
    assert longer.extra["pixel_values"] is batch.extra["pixel_values"]
    assert (longer.input_ids != model.placeholder)[:, width:].all()


def test_forced_logits_are_those_of_the_whole_text(model):
    batch = model.encode(TEXTS[0], PICTURES[0])
    whole = model.encode(TEXTS[0] + " red circle", PICTURES[0])
    ids = torch.tensor([model.answer_tokens("red circle")])
    torch.testing.assert_close(
        forced_logits(model, batch, ids), model(whole)[:, -3:-1], atol=1e-5, rtol=0
    )
