"""Texts, pictures, videos and sound become batches, by the model's own processor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from mechmm.model.batch import ARGUMENTS, Batch, InputError, Picture, open_picture, per_prompt
from mechmm.model.grids import Medium
from mechmm.model.layout import TokenLayout, Window
from mechmm.model.media import IS_ONE, Clip, Video, loose, open_clip, open_video
from mechmm.model.processors import (
    INSTALL,
    PICTURED,
    UNMARKED,
    MissingVideoProcessor,
    padding_first,
    padding_on,
    part_of,
)
from mechmm.model.reading import Reading
from mechmm.model.windows import placed, window

if TYPE_CHECKING:
    from mechmm.model.hooked import HookedMultimodal

Texts = list[str] | None
Groups = Mapping[str, list[list[Any]]]
"""By kind of medium: the media of each prompt."""
READERS = {"image": "image_processor", "video": "video_processor", "audio": "feature_extractor"}
"""The part of a processor that reads media of a kind."""
RENAMED = {"pixel_values_images": "pixel_values"}
"""What some processors (Video-LLaVA) call otherwise than the model."""
NEVER = ("labels",)
"""What some processors give that a model would take for training."""


class Encoding(Reading):
    """How a model's processor turns texts and media into batches."""

    def encode(
        self,
        text: str | Sequence[str] | None,
        images: Picture | Sequence[Any] | None = None,
        *,
        videos: Video | Sequence[Any] | None = None,
        audio: Clip | np.ndarray | Sequence[Any] | None = None,
        padding_side: str | None = None,
    ) -> Batch:
        """Turn texts and pictures, videos or sound into a batch.

        Args:
            text: one prompt or many; each has one placeholder (`model.image_token`) per picture,
                and likewise for videos and sound. `model.chat` writes prompts with the
                processor's template. None for a model that reads no text.
            images: for one text, a picture or a list of pictures; for many, one such entry per
                text. `images=[]` runs on text alone, on purpose. A model that compares texts with
                pictures, or reads no text, takes one list of pictures.
            videos: the same of videos: arrays uint8 [frame, height, width, 3] or lists of pictures.
            audio: the same of clips: pairs of samples [sample], from -1 to 1, and their rate in Hz.
            padding_side: `"left"` (the last positions of all prompts line up) or `"right"`.
                Default: left, or as the tokenizer has it where an encoder reads the texts.

        Raises:
            InputError: placeholders and media do not match, with the prompt and both counts; a
                medium that the model does not take, that is unreadable or, of sound, at another
                rate; no processor.
        """
        if self.processor is None:
            raise self._lack("processor")
        texts = self._texts(text)
        given = {"image": images, "video": videos, "audio": audio}
        media = self._media(texts, given)
        return self._batch(self._processed(texts, media, padding_side), media)

    def chat(self, messages: Sequence[Any], *, add_generation_prompt: bool = True) -> str:
        """The text of a conversation, as the processor's chat template writes it.

        Args:
            messages: as `transformers` has them: `{"role": "user", "content": [{"type": "image"},
                {"type": "text", "text": "What is this?"}]}`.
            add_generation_prompt: whether the answer's start is added.

        Raises:
            InputError: the processor has no template.
        """
        if getattr(self.processor, "chat_template", None) is None:
            if self.processor is None:
                raise self._lack("processor")
            raise InputError(
                f"{type(self.processor).__name__} has no chat template; write the prompt as the "
                f"model was trained, with {self.image_token!r} for each picture"
            )
        return self.processor.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )

    def _texts(self, text: str | Sequence[str] | None) -> Texts:
        """The prompts, or None where the model reads no text."""
        if not self.takes("input_ids"):
            if text is not None:
                raise InputError(f"{self.family.architecture} reads no text; pass None as text")
            return None
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise InputError("no text was given; pass at least one prompt")
        return texts

    def _media(self, texts: Texts, given: Mapping[str, Any]) -> Groups:
        """The media of each prompt by kind, opened and counted."""
        kinds = {medium.kind: medium for medium in self.family.media}
        self._check_kinds(kinds, given)
        found = {}
        for kind, medium in kinds.items():
            missing = all(given[other] is None for other in kinds)
            media = given[kind] if given[kind] is not None or missing else []
            if medium.placeholder is None or texts is None:
                groups = loose(texts, media, kind)
            else:
                groups = per_prompt(texts, media, self.mark_of(medium), kind, IS_ONE[kind])
            found[kind] = [
                [self._opened(kind, one, prompt) for one in group]
                for prompt, group in enumerate(groups)
            ]
        name = type(self.processor).__name__
        if name in PICTURED and not all(found["image"]):
            prompt = found["image"].index([])
            raise InputError(f"prompt {prompt} has no picture, and {name} reads none without one")
        return found

    def _check_kinds(self, kinds: Collection[str], given: Mapping[str, Any]) -> None:
        """Refuse media that the model, or its processor as it is installed, does not take."""
        for kind, media in given.items():
            if media is not None and kind not in kinds:
                names = " and ".join(ARGUMENTS[other] for other in kinds)
                raise InputError(
                    f"{self.family.architecture} takes {names}, but {ARGUMENTS[kind]} were given"
                )
        reader = part_of(self.processor, READERS["video"])
        videos = given["video"]
        if videos is not None and len(videos) and isinstance(reader, MissingVideoProcessor):
            raise InputError(f"videos are read with torchvision, which is missing; {INSTALL}")

    def _opened(self, kind: str, one: Any, prompt: int) -> Any:
        """A picture as an RGB image, a video or a clip as an array."""
        if kind == "audio":
            return open_clip(one, prompt, self._part(READERS["audio"]))
        return (open_picture if kind == "image" else open_video)(one, prompt)

    def _processed(self, texts: Texts, media: Groups, padding_side: str | None) -> dict[str, Any]:
        """What the processor makes of prompts and their media, of which the model takes it."""
        call = self._call(texts, media)
        whole = self._part(READERS["image"]) if texts is None else self.processor
        side = None if texts is None else self._side(padding_side)
        with padding_on(whole, side) as padding:
            try:
                made = dict(whole(**call, **padding))
            except ValueError as error:
                name = type(whole).__name__
                raise InputError(f"{name} refuses these prompts: {error}") from error
        if type(whole).__name__ in UNMARKED and side == "left":
            made = padding_first(made)
        made = {RENAMED.get(name, name): value for name, value in made.items()}
        return {k: v for k, v in made.items() if self.takes(k) and k not in NEVER}

    def _call(self, texts: Texts, media: Groups) -> dict[str, Any]:
        """What the processor is called with, but for the side of padding."""
        call: dict[str, Any] = {"return_tensors": "pt"}
        if texts is not None:
            self._part("tokenizer")
            call |= {"text": texts, **self._padding(), **self._special(texts)}
        if self.takes("mm_token_type_ids"):
            call["return_mm_token_type_ids"] = True
        # Where texts have placeholders, processors take lists by prompt, and some nothing else.
        by_prompt = texts is not None and self.family.media[0].placeholder is not None
        for kind, groups in media.items():
            flat = [one for group in groups for one in group]
            if flat:
                self._part(READERS[kind])
                call[ARGUMENTS[kind]] = groups if by_prompt and kind == "image" else flat
        if "audio" in call:
            call["sampling_rate"] = self._part(READERS["audio"]).sampling_rate
        return call

    def _part(self, name: str) -> Any:
        """A part of the processor that is needed."""
        part = part_of(self.processor, name)
        if part is None:
            raise self._lack(name.replace("_", " "))
        return part

    def _side(self, side: str | None) -> str | None:
        """The side that texts are padded on, None for the tokenizer's own."""
        if self.family.unembed is None and side == "left":
            raise InputError("this model only compares texts, and reads them padded on the right")
        # An encoder counts positions from the left, whatever is padding; nothing follows its text.
        encoded = self.family.unembed is None or self.config.is_encoder_decoder
        return side or (None if encoded else "left")

    def _padding(self) -> dict[str, Any]:
        """How far texts are padded, unless the processor says so itself."""
        if "padding" in getattr(self.processor, "text_kwargs", {}):
            return {}
        # A model that is told no mask reads the padding too, and was trained on all of it (SigLIP).
        masked = "attention_mask" in self.tokenizer.model_input_names
        return {"padding": True if masked else "max_length"}

    def _special(self, texts: list[str]) -> dict[str, Any]:
        """No second start token where a chat template has put one."""
        start = self.tokenizer.bos_token
        begun = [bool(start) and text.startswith(start) for text in texts]
        if self.family.unembed is None or not any(begun):
            return {}
        if not all(begun):
            raise InputError(
                f"prompt {begun.index(True)} starts with {start!r}, prompt {begun.index(False)} "
                "does not; pass either all of them through model.chat, or none"
            )
        return {"add_special_tokens": False}

    def _batch(self, inputs: dict[str, Any], media: Groups) -> Batch:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value = value.to(self.device)
                inputs[name] = value.to(self.dtype) if value.is_floating_point() else value
        batch = Batch.from_inputs(cast("HookedMultimodal", self), **inputs)
        images = tuple(tuple(group) for group in media.get("image", ()))
        return replace(batch, layout=self._seen(batch, media), images=images)

    def _seen(self, batch: Batch, media: Groups) -> TokenLayout:
        """The layout, with what each medium shows of what was given."""
        layout = batch.layout
        counts = Counter(medium.kind for share in layout.media for medium in share)
        given = {kind: [one for group in groups for one in group] for kind, groups in media.items()}
        if any(counts[kind] != len(flat) for kind, flat in given.items()):
            return layout  # the processor made several media of one
        left = {kind: iter(flat) for kind, flat in given.items()}
        shown = []
        for share in layout.media:
            alone = sum(medium.kind == "image" for medium in share) == 1
            shown.append([self._shown(medium, next(left[medium.kind]), alone) for medium in share])
        found = tuple(tuple(medium for medium, _ in share) for share in shown)
        windows = [[part for _, part in share if part is not None] for share in shown]
        known = all(len(a) == len(b) for a, b in zip(windows, found, strict=True))
        parts = tuple(map(tuple, windows)) if known else ()
        return replace(layout, media=found, windows=parts)

    def _shown(self, medium: Medium, given: Any, alone: bool) -> tuple[Medium, Window | None]:
        """A medium whose tiles have their places, and the part of what was given that it shows."""
        if medium.kind == "audio":
            seconds = len(given) / self._part(READERS["audio"]).sampling_rate
            return medium, (0.0, 0.0, seconds, 1.0)
        reader = self._part(READERS[medium.kind])
        if medium.kind == "video":
            height, width = given.shape[1:3]
            return medium, window(reader, width, height)
        part = window(reader, *given.size, alone=alone)
        return placed(medium, reader, *given.size), part
