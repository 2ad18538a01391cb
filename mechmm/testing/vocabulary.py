"""The small vocabulary of tiny models, and a tokenizer for it."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "<video>",
    "<audio>",
    "<start>",
    "<end>",
    "<break>",
    "<row>",
    "<tile>",
)
"""Placeholders of images, videos and audio; then what may stand around, after a row, and before a
tile."""
SENTENCE = (
    "what color is the shape left of right above below in and a : , . ? answer yes no red blue "
    "green black circle square star moon one two three four"
)
WORDS = SENTENCE.split()


def token(name: str) -> int:
    """The id of a special token."""
    return SPECIAL.index(name)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words of a small vocabulary, punctuation alone, `<s>` first."""
    core = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="<unk>")
    )
    splits = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split(Regex(r"[?.,:]"), "isolated"),
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(splits)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    names = dict(zip(("pad", "bos", "eos", "unk"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        additional_special_tokens=list(SPECIAL[4:]),
        **{f"{name}_token": token for name, token in names.items()},
    )
    # Only a tokenizer that was loaded knows its own name, which processors ask for.
    with TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return PreTrainedTokenizerFast.from_pretrained(folder)
