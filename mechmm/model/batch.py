"""Inputs of a model, checked, with the meaning of every position beside them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mechmm.model.grids import Grid
from mechmm.model.layout import IMAGE, PADDING, TEXT, TokenLayout

if TYPE_CHECKING:
    from mechmm.model.hooked import HookedMultimodal

Picture = Image.Image | np.ndarray | str | Path
"""A PIL image, an array [height, width, 3] of uint8, or the path of an image file."""


class InputError(ValueError):
    """Text and pictures do not fit each other or the model."""


@dataclass(frozen=True)
class Batch:
    """One or many prompts, ready for a model.

    Attributes:
        input_ids, attention_mask, position_ids: [batch, pos].
        extra: the model's other inputs (pixels and whatever goes with them).
        layout: what every position is.
        images: per prompt, its pictures as given (empty for batches made from ready tensors).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    position_ids: Int[Tensor, "batch pos"]
    extra: Mapping[str, Any]
    layout: TokenLayout
    images: tuple[tuple[Image.Image, ...], ...] = field(default=(), repr=False)

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the Hugging Face model."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            **self.extra,
        }

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: str | torch.device) -> Batch:
        """The same batch with its tensors on a device; the layout stays on the CPU."""
        extra = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.extra.items()}
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
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
            **inputs: at least `input_ids` [batch, pos]; `attention_mask` and `position_ids` are
                made where they are missing; pixels as the model's processor gives them.

        Raises:
            InputError: placeholders without pixels, pixels without placeholders, counts that do
                not match, pixels of another dtype or device than the model, unknown inputs.
        """
        ids = inputs.pop("input_ids", None)
        if ids is None:
            raise InputError("input_ids are missing; pass the tokens of the prompts")
        mask = inputs.pop("attention_mask", None)
        mask = torch.ones_like(ids) if mask is None else mask
        positions = inputs.pop("position_ids", None)
        if positions is None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        extra = {name: value for name, value in inputs.items() if value is not None}
        _check_names(model, extra)
        _check_pixels(model, extra)
        return cls(ids, mask, positions, extra, layout_of(model, ids, mask, extra))


def _check_names(model: HookedMultimodal, extra: Mapping[str, Any]) -> None:
    parameters = inspect.signature(model.hf_model.forward).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    unknown = [name for name in extra if name not in known]
    if unknown:
        raise InputError(f"the model has no input {unknown[0]!r}; it takes {', '.join(known)}")


def _check_pixels(model: HookedMultimodal, extra: Mapping[str, Any]) -> None:
    pixels = extra.get(model.family.pixels)
    if pixels is None:
        return
    if pixels.dtype != model.dtype:
        raise InputError(
            f"pixels are {pixels.dtype}, the model is {model.dtype}; pass "
            f"{model.family.pixels}.to(model.dtype), or use model.encode"
        )
    if pixels.device != model.device:
        raise InputError(
            f"pixels are on {pixels.device}, the model is on {model.device}; call "
            "batch.to(model.device)"
        )


def layout_of(
    model: HookedMultimodal, ids: Tensor, mask: Tensor, extra: Mapping[str, Any]
) -> TokenLayout:
    """The layout of ready inputs.

    Raises:
        InputError: where placeholders and pixels do not match, with the prompt and both counts.
    """
    ids, mask = ids.cpu(), mask.cpu()
    is_image = (ids == model.placeholder) & (mask > 0)
    has_pixels = extra.get(model.family.pixels) is not None
    grids = model.family.grids(model.config, extra) if has_pixels else []
    counts = is_image.sum(-1).tolist()
    if any(counts) and not has_pixels:
        first = next(i for i, n in enumerate(counts) if n)
        raise InputError(
            f"prompt {first} has {counts[first]} image placeholders but no pixels were given; "
            "pass images to model.encode, or pixel_values here"
        )
    if has_pixels and not any(counts):
        raise InputError(
            f"pixels of {len(grids)} image(s) were given but no prompt has an image placeholder "
            f"({model.image_token!r}); put one into the text for every image"
        )
    shares = _share(grids, counts)
    modality = torch.where(is_image, IMAGE, TEXT).masked_fill(mask == 0, PADDING)
    image, row, column = (torch.full(ids.shape, -1) for _ in range(3))
    for prompt, share in enumerate(shares):
        places = is_image[prompt].nonzero().flatten()
        start = 0
        for number, grid in enumerate(share):
            here = places[start : start + grid.tokens]
            cells = torch.arange(grid.skip, grid.rows * grid.columns)
            image[prompt, here] = number
            row[prompt, here[grid.extra :]] = cells // grid.columns
            column[prompt, here[grid.extra :]] = cells % grid.columns
            start += grid.tokens
    return TokenLayout(
        modality, image, row, column, model.token_texts(ids), shares, text_only=not has_pixels
    )


def _share(grids: Sequence[Grid], counts: Sequence[int]) -> tuple[tuple[Grid, ...], ...]:
    """Deal the images out to the prompts by how many placeholders each prompt has."""
    shares, at = [], 0
    for prompt, count in enumerate(counts):
        start, filled = at, 0
        while filled < count and at < len(grids):
            filled += grids[at].tokens
            at += 1
        if filled != count:
            sizes = [grid.tokens for grid in grids[start:at]]
            raise InputError(
                f"prompt {prompt} has {count} image placeholders, but the {len(sizes)} image(s) "
                f"left for it fill {sum(sizes)} positions; use the model's own processor, or "
                "model.encode, so that placeholders and pixels match"
            )
        shares.append(tuple(grids[start:at]))
    if at < len(grids):
        raise InputError(
            f"{len(grids)} images were given, but the prompts have placeholders for {at} of them; "
            "add placeholders or drop images"
        )
    return tuple(shares)


def open_picture(picture: Picture, prompt: int) -> Image.Image:
    """A picture as an RGB image.

    Raises:
        InputError: where the file is missing, truncated or no image, or an array has a wrong shape.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise InputError(
                f"prompt {prompt}: an image array must be uint8 [height, width, 3], not "
                f"{picture.dtype} {list(picture.shape)}"
            )
        return Image.fromarray(picture)
    try:
        if isinstance(picture, Image.Image):
            return picture.convert("RGB")
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        name = str(getattr(picture, "filename", picture))
        raise InputError(
            f"prompt {prompt}: {name!r} is missing, truncated or no image file ({error}); "
            "check the file or give another"
        ) from error


def per_prompt(texts: Sequence[str], images: Any, token: str) -> list[list[Picture]]:
    """The pictures of every prompt, from what a caller passed as `images`.

    Raises:
        InputError: where the list is missing or has the wrong length, or a prompt has another
            number of placeholders than pictures.
    """
    if images is None:
        raise InputError(
            "images are missing; pass one picture (or a list of them) per text, or images=[] to "
            "run on text alone on purpose"
        )
    groups: list[list[Picture]]
    if isinstance(images, Picture):
        groups = [[images]]
    elif not len(images):
        groups = [[] for _ in texts]
    elif len(texts) == 1 and all(isinstance(image, Picture) for image in images):
        groups = [list(images)]
    else:
        wrong = [entry for entry in images if not isinstance(entry, Picture | Sequence)]
        if wrong:
            raise InputError(f"{wrong[0]!r} is no picture; for a text without one give []")
        groups = [[entry] if isinstance(entry, Picture) else list(entry) for entry in images]
    if len(groups) != len(texts):
        raise InputError(
            f"images has {len(groups)} entries for {len(texts)} texts; give one entry (a picture "
            "or a list of pictures, empty for none) per text"
        )
    for prompt, (text, group) in enumerate(zip(texts, groups, strict=True)):
        wanted = text.count(token)
        if wanted and not group:
            raise InputError(
                f"prompt {prompt} has {wanted} {token!r} placeholder(s) but no picture; pass "
                "images, or remove the placeholder"
            )
        if group and not wanted:
            raise InputError(
                f"prompt {prompt} has {len(group)} picture(s) but no {token!r} placeholder in its "
                f"text; put {token!r} where the picture belongs"
            )
        if wanted != len(group):
            raise InputError(
                f"prompt {prompt} has {wanted} {token!r} placeholders but {len(group)} pictures; "
                "give one picture for each placeholder"
            )
    return groups
