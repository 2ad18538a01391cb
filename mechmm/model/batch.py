"""Inputs of a model, checked, with the meaning of every position beside them."""

from __future__ import annotations

import mimetypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mechmm.model.grids import NOWHERE, Medium
from mechmm.model.layout import MODALITIES, PADDING, TEXT, TokenLayout
from mechmm.model.rows import MediumInput

if TYPE_CHECKING:
    from mechmm.model.hooked import HookedMultimodal

Picture = Image.Image | np.ndarray | str | Path
"""A PIL image, an array [height, width, 3] of uint8, or the path of an image file."""
NOUNS = {"image": "picture", "video": "video", "audio": "clip"}
"""What one medium of a kind is called."""
ARGUMENTS = {"image": "images", "video": "videos", "audio": "audio"}
"""The argument of `model.encode` with the media of a kind."""


TYPES = {"image": 1, "video": 2}
"""What `transformers` writes into `mm_token_type_ids`."""


class InputError(ValueError):
    """Text and pictures do not fit each other or the model."""


@dataclass(frozen=True)
class Batch:
    """One or many prompts, ready for a model.

    Attributes:
        input_ids, attention_mask: [batch, pos]; no positions for a model that reads no text.
        position_ids: [batch, pos], or None where the model computes its own.
        extra: the model's other inputs (pixels and whatever goes with them).
        layout: what every position is.
        images: per prompt, its pictures as given (empty for batches made from ready tensors).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"] | None
    extra: Mapping[str, Any]
    layout: TokenLayout
    images: tuple[tuple[Image.Image, ...], ...] = field(default=(), repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the Hugging Face model."""
        if not self.input_ids.shape[1]:
            return dict(self.extra)
        texts = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.position_ids is not None:
            texts["position_ids"] = self.position_ids
        return {**texts, **self.extra}

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on a device; the layout stays on the CPU."""
        extra = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=None if self.position_ids is None else self.position_ids.to(device),
            extra=extra,
        )

    def with_layout(self, layout: TokenLayout) -> Batch:
        """The same inputs with another layout, for example one with more spans."""
        return replace(self, layout=layout)

    @classmethod
    def from_inputs(cls, model: HookedMultimodal, **inputs: Any) -> Batch:
        """A batch from ready Hugging Face inputs.

        Args:
            model: what the inputs are for.
            **inputs: at least `input_ids` [batch, pos], unless the model reads no text;
                `attention_mask` and `position_ids` are made where they are missing (positions not
                for encoders, nor where the model computes its own); pixels as the model's
                processor gives them.

        Raises:
            InputError: placeholders without pixels, pixels without placeholders, counts that do
                not match, pixels of another dtype or device than the model, unknown inputs.
        """
        ids, mask = inputs.pop("input_ids", None), inputs.pop("attention_mask", None)
        positions = inputs.pop("position_ids", None)
        extra = {name: value for name, value in inputs.items() if value is not None}
        _check_names(model, extra)
        _check_pixels(model, extra)
        if ids is None:
            ids = _no_text(model, extra)
        mask = torch.ones_like(ids) if mask is None else mask
        continues = model.family.unembed is not None and not model.family.own_positions
        if positions is None and continues and model.takes("position_ids"):
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        if model.config.is_encoder_decoder and "decoder_input_ids" not in extra:
            start = model.hf_model.generation_config.decoder_start_token_id
            extra["decoder_input_ids"] = torch.full_like(ids[:, :1], start)
        return cls(ids, mask, positions, extra, layout_of(model, ids, mask, extra))


def _no_text(model: HookedMultimodal, extra: Mapping[str, Any]) -> Int[Tensor, "batch pos"]:
    """No tokens, one prompt per image, for a model that reads no text."""
    if model.takes("input_ids"):
        raise InputError("input_ids are missing; pass the tokens of the prompts")
    (medium,) = model.family.media
    if medium.pixels not in extra:
        raise InputError(f"{medium.pixels} are missing; pass what the processor gives")
    count = len(medium.grids(model.config, extra))
    return torch.zeros(count, 0, dtype=torch.long, device=model.device)


def _check_names(model: HookedMultimodal, extra: Mapping[str, Any]) -> None:
    unknown = [name for name in extra if not model.takes(name)]
    if unknown:
        raise InputError(
            f"the model has no input {unknown[0]!r}; it takes {', '.join(model.inputs)}"
        )


def _check_pixels(model: HookedMultimodal, extra: Mapping[str, Any]) -> None:
    for medium in model.family.media:
        pixels = extra.get(medium.pixels)
        if pixels is None:
            continue
        if pixels.dtype != model.dtype:
            raise InputError(
                f"{medium.pixels} are {pixels.dtype}, the model is {model.dtype}; pass "
                f"{medium.pixels}.to(model.dtype), or use model.encode"
            )
        if pixels.device != model.device:
            raise InputError(
                f"{medium.pixels} are on {pixels.device}, the model is on {model.device}; call "
                "batch.to(model.device)"
            )


def layout_of(
    model: HookedMultimodal, ids: Tensor, mask: Tensor, extra: Mapping[str, Any]
) -> TokenLayout:
    """The layout of ready inputs.

    Raises:
        InputError: where placeholders and media do not match, with the prompt and both counts.
    """
    ids, mask = ids.cpu(), mask.cpu()
    modality = torch.where(mask > 0, TEXT, PADDING)
    image, view, row, column = (torch.full(ids.shape, NOWHERE) for _ in range(4))
    dealt: list[list[tuple[int, int, Medium, list[int]]]] = [[] for _ in ids]
    for kind in model.family.media:
        is_kind = (ids == model.placeholder_of(kind)) & (mask > 0) & _of_kind(model, kind, extra)
        modality[is_kind] = MODALITIES.index(kind.kind)
        shares = _dealt(model, kind, ids, is_kind, extra)
        for prompt, share in enumerate(shares):
            places = is_kind[prompt].nonzero().flatten().tolist()
            for number, medium in enumerate(share):
                here, places = places[: medium.tokens], places[medium.tokens :]
                dealt[prompt].append((here[0] if here else -1, number, medium, here))
    for prompt, share in enumerate(dealt):
        share.sort(key=lambda entry: entry[0])
        for number, (_, _, medium, here) in enumerate(share):
            for position, (seen, cell) in zip(here, medium.placed, strict=True):
                image[prompt, position], view[prompt, position] = number, seen
                if cell != NOWHERE:
                    columns = medium.views[seen].columns
                    row[prompt, position] = cell // columns
                    column[prompt, position] = cell % columns
    media = tuple(tuple(medium for _, _, medium, _ in share) for share in dealt)
    texts = model.token_texts(ids)
    return TokenLayout(modality, image, view, row, column, texts, media, text_only=not any(media))


def _of_kind(model: HookedMultimodal, kind: MediumInput, extra: Mapping[str, Any]) -> Tensor | bool:
    """Which placeholders belong to a kind of medium, where two kinds share one (GLM-4V)."""
    types = extra.get("mm_token_type_ids")
    sharing = [m for m in model.family.media if m.placeholder == kind.placeholder]
    return True if types is None or len(sharing) < 2 else types.cpu() == TYPES[kind.kind]


def _dealt(
    model: HookedMultimodal,
    kind: MediumInput,
    ids: Tensor,
    is_kind: Tensor,
    extra: Mapping[str, Any],
) -> tuple[tuple[Medium, ...], ...]:
    """The media of one kind, by prompt."""
    given = extra.get(kind.pixels) is not None
    try:
        media = kind.grids(model.config, {**extra, "input_ids": ids}) if given else []
    except ValueError as error:
        raise InputError(str(error)) from error
    counts = is_kind.sum(-1).tolist()
    if kind.placeholder is None:
        if len(media) == len(counts):
            return tuple((medium,) for medium in media)
        return (tuple(media), *(() for _ in counts[1:]))
    if any(counts) and not given:
        first = next(i for i, n in enumerate(counts) if n)
        raise InputError(
            f"prompt {first} has {counts[first]} {kind.kind} placeholders but no {kind.pixels} "
            f"were given; pass {kind.kind}s to model.encode, or {kind.pixels} here"
            + _others(model, kind, extra)
        )
    if given and not any(counts):
        raise InputError(
            f"{kind.pixels} of {len(media)} {kind.kind}(s) were given but no prompt has a "
            f"{kind.kind} placeholder ({model.token_of(kind)!r}); put one into the text for every "
            f"{kind.kind}"
        )
    return _share(kind, media, counts)


def _others(model: HookedMultimodal, kind: MediumInput, extra: Mapping[str, Any]) -> str:
    """A hint where another kind of medium was given."""
    others = [o.kind for o in model.family.media if o is not kind and o.pixels in extra]
    return f" ({others[0]}s were given instead)" if others else ""


def _share(
    kind: MediumInput, media: Sequence[Medium], counts: Sequence[int]
) -> tuple[tuple[Medium, ...], ...]:
    """Deal the media out to the prompts by how many placeholders each prompt has."""
    shares, at = [], 0
    for prompt, count in enumerate(counts):
        start, filled = at, 0
        while filled < count and at < len(media):
            filled += media[at].tokens
            at += 1
        if filled != count:
            sizes = [medium.tokens for medium in media[start:at]]
            raise InputError(
                f"prompt {prompt} has {count} {kind.kind} placeholders, but the {len(sizes)} "
                f"{kind.kind}(s) left for it fill {sum(sizes)} positions; use the model's own "
                "processor, or model.encode, so that placeholders and pixels match"
            )
        shares.append(tuple(media[start:at]))
    if at < len(media):
        raise InputError(
            f"{len(media)} {kind.kind}s were given, but the prompts have placeholders for {at} of "
            f"them; add placeholders or drop {kind.kind}s"
        )
    return tuple(shares)


def open_picture(picture: Picture, prompt: int) -> Image.Image:
    """A picture as an RGB image.

    Raises:
        InputError: where the file is missing, truncated or no image, or an array has a wrong shape.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            video = "; a video is passed as videos=" if picture.ndim == 4 else ""
            raise InputError(
                f"prompt {prompt}: an image array must be uint8 [height, width, 3], not "
                f"{picture.dtype} {list(picture.shape)}{video}"
            )
        return Image.fromarray(picture)
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        name = str(getattr(picture, "filename", picture))
        if (mimetypes.guess_type(name)[0] or "").startswith("video/"):
            raise InputError(
                f"prompt {prompt}: {name!r} is a video where a picture is expected; pass its "
                "frames as videos=, or one frame as a picture"
            ) from error
        raise InputError(
            f"prompt {prompt}: {name!r} is missing, truncated or no image file ({error}); "
            "check the file or give another"
        ) from error


def is_picture(entry: Any) -> bool:
    """Whether an entry is one picture, readable or not."""
    return isinstance(entry, Picture)


def per_prompt(
    texts: Sequence[str],
    media: Any,
    token: str,
    kind: str = "image",
    is_one: Callable[[Any], bool] = is_picture,
) -> list[list[Any]]:
    """The media of every prompt, from what a caller passed as `images` (or `videos`, `audio`).

    Args:
        texts: the prompts.
        media: one medium, a list of them, or a list with one entry (or list of entries) per text.
        token: what stands for a medium in a text; "" where the processor puts it there by itself.
        kind: of the media.
        is_one: tells one medium from a list of them.

    Raises:
        InputError: where the list is missing or has the wrong length, or a prompt has another
            number of placeholders than media.
    """
    name, noun = ARGUMENTS[kind], NOUNS[kind]
    if media is None:
        raise InputError(
            f"{name} are missing; pass one {noun} (or a list of them) per text, or {name}=[] to "
            "run on text alone on purpose"
        )
    groups = _groups(texts, media, noun, is_one)
    if len(groups) != len(texts):
        raise InputError(
            f"{name} has {len(groups)} entries for {len(texts)} texts; give one entry (a {noun} "
            f"or a list of {noun}s, empty for none) per text"
        )
    for prompt, (text, group) in enumerate(zip(texts, groups, strict=True)):
        if token:
            _check_count(prompt, text.count(token), len(group), token, kind)
        elif len(group) != len(groups[0]) or len(group) > 1:
            raise InputError(
                f"prompt {prompt} has {len(group)} {noun}s; the processor of this model puts one "
                f"{noun} before every text, so give every prompt one {noun}, or none of them any"
            )
    return groups


def _groups(
    texts: Sequence[str], media: Any, noun: str, is_one: Callable[[Any], bool]
) -> list[list[Any]]:
    if is_one(media):
        return [[media]]
    if not len(media):
        return [[] for _ in texts]
    if len(texts) == 1 and all(is_one(entry) for entry in media):
        return [list(media)]
    wrong = [entry for entry in media if not is_one(entry) and not isinstance(entry, list | tuple)]
    if wrong:
        raise InputError(f"{wrong[0]!r} is no {noun}; for a text without one give []")
    return [[entry] if is_one(entry) else list(entry) for entry in media]


def _check_count(prompt: int, wanted: int, given: int, token: str, kind: str) -> None:
    """Refuse a prompt with another number of placeholders than media."""
    name, noun = ARGUMENTS[kind], NOUNS[kind]
    if wanted and not given:
        raise InputError(
            f"prompt {prompt} has {wanted} {token!r} placeholder(s) but no {noun}; pass "
            f"{name}, or remove the placeholder"
        )
    if given and not wanted:
        raise InputError(
            f"prompt {prompt} has {given} {noun}(s) but no {token!r} placeholder in its "
            f"text; put {token!r} where the {noun} belongs"
        )
    if wanted != given:
        raise InputError(
            f"prompt {prompt} has {wanted} {token!r} placeholders but {given} {noun}s; "
            f"give one {noun} for each placeholder"
        )
