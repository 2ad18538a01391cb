"""Questions about any token that a model generates: of an answer, or of a chain of thought.

A pair asks for the next token after its prompt. Written behind the prompt, the tokens that the
model generated make pairs that ask for the next of them, and every method runs on those:

    steps = mm.data.generated.steps(model, pairs, 8)
    mm.patch(model, steps[5], sites)            # what carries the sixth token

Logits after a text that is written there (teacher forcing) are those of generating it step by step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechmm.data.metrics import last_logits
from mechmm.data.pairs import Pair, PairBatch, PairDataset, PairError, Prompt
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal

PREFIXED = ("both ways", "encoder-decoder", "encoder")
"""Kinds of `Family.resume` that treat a prompt unlike what follows it."""


@torch.no_grad()
def steps(
    model: HookedMultimodal, pairs: PairDataset, count: int, batch_size: int = 16, **options: Any
) -> list[PairDataset]:
    """What the model generates after the clean prompts, greedily, as pairs for every token.

    Of step t the prompts are those of the pairs with the first t generated tokens behind them, the
    answer is token t, and the foil the likeliest other word after the corrupt prompt with the same
    text. Spans that are named by words or boxes stay where they are.

    Args:
        count: tokens to generate; pairs that have generated an end are in no further step.
        batch_size: pairs that run together.
        options: of `generate`, for example `suppress_tokens`.

    Returns:
        One dataset per step; fewer than `count` where all pairs have ended.

    Raises:
        ValueError: fewer than one token; a model that reads its prompt both ways or by an encoder,
            for which a text behind the prompt is another prompt.
        PairError: generated tokens that the tokenizer writes otherwise as a text, with the pair.
    """
    if count < 1:
        raise ValueError(f"{count} tokens were asked for; ask for at least 1")
    if model.family.resume in PREFIXED:
        raise ValueError(
            f"{model.family.architecture} reads prompts otherwise than what it generates, so that "
            "text written behind the prompt is no generated text; ask about its first token"
        )
    found: list[list[Pair]] = [[] for _ in range(count)]
    for batch in pairs.batches(batch_size):
        own = [pairs[number] for number in batch.indices]
        ids = _greedy(model, batch, count, options)
        for step in range(count):
            going = [i for i in range(len(own)) if bool((ids[i, : step + 1] >= 0).all())]
            if going:
                found[step] += _written(model, [own[i] for i in going], ids[going], step)
    return [PairDataset(step, model) for step in found if step]


def _greedy(
    model: HookedMultimodal, batch: PairBatch, count: int, options: dict[str, Any]
) -> Int[Tensor, "pair token"]:
    """The tokens generated after the clean prompts; -1 from the end of the text on."""
    options = {"max_new_tokens": count, "do_sample": False, **options}
    made = model.generate(batch.clean, **options).cpu()
    ends = model.hf_model.generation_config.eos_token_id
    stop = torch.isin(made, torch.tensor([-1] if ends is None else ends))
    return made.masked_fill(stop.cumsum(1) > 0, -1)


def _written(
    model: HookedMultimodal, pairs: list[Pair], ids: Int[Tensor, "pair token"], step: int
) -> list[Pair]:
    """Pairs that ask for one of the generated tokens."""
    texts = list(model.to_string(ids[:, :step])) if step else [""] * len(ids)
    told = [
        [_behind(prompt, text) for prompt in (pair.clean, pair.corrupt)]
        for pair, text in zip(pairs, texts, strict=True)
    ]
    _check_written(model, [clean for clean, _ in told], ids[:, :step])
    logits = last_logits(model, _encoded(model, [corrupt for _, corrupt in told])).cpu()
    logits[torch.arange(len(ids)), ids[:, step]] = -torch.inf
    answers, foils = _words(model, ids[:, step]), [_likeliest(model, row) for row in logits]
    return [
        replace(pair, clean=clean, corrupt=corrupt, answer=answer, foil=foil)
        for pair, (clean, corrupt), answer, foil in zip(pairs, told, answers, foils, strict=True)
    ]


def _encoded(model: HookedMultimodal, prompts: list[Prompt]) -> Batch:
    return model.encode([p.text for p in prompts], [list(p.images) for p in prompts])


def _check_written(
    model: HookedMultimodal, prompts: list[Prompt], ids: Int[Tensor, "pair token"]
) -> None:
    """Refuse texts that are other tokens than those generated."""
    batch, count = _encoded(model, prompts), ids.shape[1]
    for number, (row, last) in enumerate(zip(batch.input_ids, batch.layout.last, strict=True)):
        there = row[last + 1 - count : last + 1].cpu()
        if count and not torch.equal(there, ids[number]):
            raise PairError(
                f"prompt {number} of a batch: the generated tokens {ids[number].tolist()} are read "
                f"as {there.tolist()} when they are written as text; generate fewer tokens"
            )


def _words(model: HookedMultimodal, ids: Int[Tensor, " pair"]) -> list[str]:
    """Tokens as words that are these tokens again."""
    words = [word.strip() for word in model.to_string(ids[:, None])]
    for word, token in zip(words, ids.tolist(), strict=True):
        if not _is_word(model, word, token):
            raise PairError(
                f"token {token} ({word!r}) is no word of its own; ask about the steps before it"
            )
    return words


def _likeliest(model: HookedMultimodal, logits: Float[Tensor, " vocab"]) -> str:
    """The likeliest word."""
    for token in logits.argsort(descending=True).tolist():
        word = str(model.to_string(torch.tensor([token]))).strip()
        if _is_word(model, word, token):
            return word
    raise PairError("the tokenizer has no words")


def _is_word(model: HookedMultimodal, word: str, token: int) -> bool:
    try:
        special = token in model.tokenizer.all_special_ids or word == model.image_token
        return not special and model.answer_tokens(word) == [token]
    except ValueError:  # an empty or an unknown one
        return False


def _behind(prompt: Prompt, text: str) -> Prompt:
    return replace(prompt, text=f"{prompt.text} {text.strip()}".rstrip())
