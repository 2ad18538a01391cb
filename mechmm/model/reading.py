"""What a wrapped model is told and tells: its inputs, its placeholders, its tokens as text."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import PreTrainedModel

from mechmm.model.batch import InputError
from mechmm.model.processors import UNMARKED, part_of
from mechmm.model.rows import Family, MediumInput


class Reading(HookedRootModule):
    """What a wrapped model is told and tells: its inputs, its placeholders, its text.

    Attributes:
        family: the row of the architecture.
        processor: turns text and media into inputs, or None.
        no_processor: why a checkpoint gave none; "" where none was looked for.
    """

    hf_model: PreTrainedModel
    family: Family
    processor: Any
    no_processor: str = ""

    @property
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.hf_model.config

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.hf_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.hf_model.dtype

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the Hugging Face model takes."""
        parameters = inspect.signature(self.hf_model.forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)

    def takes(self, name: str) -> bool:
        """Whether the Hugging Face model has an input of this name."""
        return name in self.inputs

    # Placeholders ----------------------------------------------------------------------------

    def placeholder_of(self, medium: MediumInput) -> int:
        """The token id that a medium fills, -1 where it fills none."""
        return -1 if medium.placeholder is None else getattr(self.config, medium.placeholder)

    def token_of(self, medium: MediumInput) -> str:
        """The token that a medium fills, as text; "" where it fills none."""
        token = self.placeholder_of(medium)
        if medium.placeholder is None:
            return ""
        if self.tokenizer is None:
            return f"token {token}"
        return self.tokenizer.convert_ids_to_tokens(token)

    def mark_of(self, medium: MediumInput) -> str:
        """What a prompt has in the place of one medium; "" where it needs nothing.

        The processor makes of it the tokens that the medium fills, and others around them.
        """
        if medium.placeholder is None or type(self.processor).__name__ in UNMARKED:
            return ""
        own = getattr(self.processor, f"{medium.kind}_token", None)
        return self.token_of(medium) if own is None else str(own)

    @property
    def placeholder(self) -> int:
        """The token id that a picture fills."""
        return self.placeholder_of(self.family.media[0])

    @property
    def marks(self) -> dict[str, str]:
        """What a prompt has in the place of a medium of each kind (`mark_of`)."""
        return {medium.kind: self.mark_of(medium) for medium in self.family.media}

    @property
    def image_token(self) -> str:
        """What a prompt has in the place of a picture; "" where it needs nothing.

        Of a model that hears instead of sees: in the place of a clip.
        """
        return self.mark_of(self.family.media[0])

    # Text ------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """The processor's tokenizer, or None."""
        return part_of(self.processor, "tokenizer")

    def _lack(self, what: str) -> InputError:
        """The error where a part of the processor is needed that is not there."""
        reason = f" ({self.no_processor})" if self.no_processor else ""
        if self.processor is not None:
            what = f"{what} ({type(self.processor).__name__} has none)"
        return InputError(
            f"this model has no {what}{reason}; pass one to from_hf, or use Batch.from_inputs"
        )

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise self._lack("tokenizer")
        return self.tokenizer

    def token_texts(self, ids: Int[Tensor, "batch pos"]) -> tuple[tuple[str, ...], ...]:
        """Every token as text, with its leading space where it starts a word."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            return tuple(tuple(f" {i}" for i in row) for row in ids.tolist())
        names = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        return tuple(tuple(_readable(name, self._spaced) for name in row) for row in names)

    @cached_property
    def _spaced(self) -> bool:
        """Whether the tokenizer marks the space before a word."""
        return any(name.startswith(("▁", "Ġ")) for name in self.tokenizer.get_vocab())

    def to_tokens(self, text: str) -> Int[Tensor, "1 pos"]:
        """Token ids of a text, as the tokenizer gives them."""
        ids = self._needed_tokenizer()(text, return_tensors="pt")["input_ids"]
        return ids.to(self.device)

    def to_string(self, ids: Int[Tensor, "..."]) -> str | list[str]:
        """Text of token ids: one string, or one per row."""
        if ids.ndim <= 1:
            return self._needed_tokenizer().decode(ids)
        return self._needed_tokenizer().batch_decode(ids)

    def to_single_token(self, word: str) -> int:
        """The id of a word that is one token in the middle of a text.

        Raises:
            ValueError: where it is several tokens or unknown.
        """
        ids = self.answer_tokens(word)
        if len(ids) != 1:
            raise ValueError(f"{word!r} is {len(ids)} tokens, not one")
        return ids[0]

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer as it follows a prompt.

        Raises:
            ValueError: where the answer is empty or the tokenizer does not know it.
        """
        tokenizer = self._needed_tokenizer()
        ids = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
        bare = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
        ids = bare if len(bare) < len(ids) else ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"the tokenizer cannot write the answer {answer!r}")
        return ids


def _readable(token: str, marked: bool) -> str:
    if token.startswith(("▁", "Ġ")):
        return " " + token[1:]
    return token if marked else f" {token}"
