"""Corruptions of pictures, scenes and texts, and pairs made with them.

Every corruption is pure: it returns a new picture or text and draws from its own seed. A picture's
corruption acts inside a `region`: a pixel box, some cells of a grid, or everywhere.

`make_pairs` and `corrupt` make pairs out of prompts and a corruption; `pairs.check()` then says of
each pair whether the corruption flips the answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageFilter

from mechmm.data.pairs import Pair, PairDataset, Prompt
from mechmm.data.scenes import Scene
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import Box, Where

Corruption = Callable[[Prompt], Prompt]
"""What makes a corrupt prompt of a clean one."""


class CorruptionError(ValueError):
    """A corruption does not fit the picture, scene or text."""


@dataclass(frozen=True)
class Cells:
    """Some (row, column) cells of a picture that is cut into a grid of (rows, columns)."""

    cells: tuple[tuple[int, int], ...]
    grid: tuple[int, int]


Region = Box | Cells | None
"""Where a picture is changed; None: everywhere."""


def region_mask(size: tuple[int, int], region: Region) -> Bool[np.ndarray, "height width"]:
    """Which pixels of a picture of (width, height) a region covers.

    Raises:
        CorruptionError: where the region is not inside the picture.
    """
    width, height = size
    mask = np.zeros((height, width), dtype=bool)
    for left, top, right, bottom in _boxes(size, region):
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise CorruptionError(
                f"{region} is not inside the picture of {width} x {height} pixels; choose a region "
                "within it"
            )
        mask[floor(top) : ceil(bottom), floor(left) : ceil(right)] = True
    return mask


def _boxes(size: tuple[int, int], region: Region) -> Iterable[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of every part of a region."""
    width, height = size
    if region is None:
        return [(0, 0, width, height)]
    if isinstance(region, Box):
        return [(region.left, region.top, region.right, region.bottom)]
    rows, columns = region.grid
    ys = [round(row * height / rows) for row in range(rows + 1)]
    xs = [round(column * width / columns) for column in range(columns + 1)]
    for row, column in region.cells:
        if not (0 <= row < rows and 0 <= column < columns):
            raise CorruptionError(
                f"cell ({row}, {column}) is not on the grid of {rows} x {columns}; count rows and "
                "columns from 0"
            )
    return [(xs[column], ys[row], xs[column + 1], ys[row + 1]) for row, column in region.cells]


# Pictures ------------------------------------------------------------------------------------


def swap_patches(image: Image.Image, other: Image.Image, region: Region = None) -> Image.Image:
    """The picture with `other`'s pixels inside the region.

    Raises:
        CorruptionError: where the two have different sizes, or the region is not inside.
    """
    if image.size != other.size:
        raise CorruptionError(
            f"the picture has {image.size[0]} x {image.size[1]} pixels, the other one "
            f"{other.size[0]} x {other.size[1]}; resize one of them"
        )
    return _pasted(image, np.asarray(other.convert("RGB")), region)


def mean_patches(image: Image.Image, region: Region = None) -> Image.Image:
    """The picture with its mean colour inside the region."""
    mean = np.asarray(image.convert("RGB")).mean((0, 1)).round()
    return blank(image, region, color=tuple(int(value) for value in mean))


def blank(
    image: Image.Image, region: Region = None, color: tuple[int, ...] = (128, 128, 128)
) -> Image.Image:
    """The picture with one colour (red, green, blue; 0 to 255) inside the region."""
    flat = np.asarray(Image.new("RGB", image.size, color))
    return _pasted(image, flat, region)


def gaussian_noise(
    image: Image.Image, sd: float, seed: int = 0, region: Region = None
) -> Image.Image:
    """The picture with normal noise of standard deviation `sd` (in steps of 0 to 255) added.

    The noise of a seed is the same for pictures of the same size.

    Raises:
        CorruptionError: where `sd` is negative, or the region is not inside.
    """
    if sd < 0:
        raise CorruptionError(f"the standard deviation is {sd}; give 0 or more")
    pixels = np.asarray(image.convert("RGB"))
    noise = np.random.default_rng(seed).normal(0, sd, pixels.shape)
    noisy = (pixels + noise).round().clip(0, 255).astype(np.uint8)
    return _pasted(image, noisy, region)


def blur(image: Image.Image, radius: float, region: Region = None) -> Image.Image:
    """The picture with a Gaussian blur of `radius` pixels inside the region.

    Raises:
        CorruptionError: where the radius is negative, or the region is not inside.
    """
    if radius < 0:
        raise CorruptionError(f"the radius is {radius} pixels; give 0 or more")
    blurred = image.convert("RGB").filter(ImageFilter.GaussianBlur(radius))
    return _pasted(image, np.asarray(blurred), region)


def _pasted(image: Image.Image, changed: np.ndarray, region: Region) -> Image.Image:
    mask = region_mask(image.size, region)
    return Image.fromarray(np.where(mask[..., None], changed, np.asarray(image.convert("RGB"))))


# Scenes and texts ----------------------------------------------------------------------------


def drop_object(scene: Scene, index: int) -> Scene:
    """A scene without one of its things.

    Raises:
        CorruptionError: where there is no such thing.
    """
    if not 0 <= index < len(scene.things):
        raise CorruptionError(
            f"the scene has {len(scene.things)} things; there is no thing {index}"
        )
    return scene.drop(index)


def replace_token(model: HookedMultimodal, text: str, old: str, new: str, nth: int = 0) -> str:
    """The text with the `nth` (from 0) whole-word `old` replaced by `new`, as many tokens long.

    Symmetric token replacement (Zhang and Nanda, arXiv 2309.16042) keeps the text in the model's
    vocabulary of inputs, where noise does not.

    Raises:
        CorruptionError: where `old` is not there, the number of tokens would change, or the
            tokenizer does not know `new`.
    """
    found = list(re.finditer(rf"(?<!\w){re.escape(old)}(?!\w)", text))
    if not 0 <= nth < len(found):
        raise CorruptionError(
            f"occurrence {nth} of {old!r} is not in {text!r} (found {len(found)})"
        )
    replaced = text[: found[nth].start()] + new + text[found[nth].end() :]
    before, after = model.to_tokens(text)[0].tolist(), model.to_tokens(replaced)[0].tolist()
    if len(before) != len(after):
        raise CorruptionError(
            f"replacing {old!r} by {new!r} turns {len(before)} tokens into {len(after)}; choose a "
            "word of the same number of tokens"
        )
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and after.count(unknown) > before.count(unknown):
        raise CorruptionError(f"the tokenizer does not know {new!r}; choose another word")
    return replaced


# Pairs ---------------------------------------------------------------------------------------


def on_images(
    change: Callable[..., Image.Image], *, image: int | None = None, **options: Any
) -> Corruption:
    """A corruption of prompts from one of pictures: `on_images(blur, radius=4)`.

    Args:
        change: called as `change(picture, **options)`.
        image: which picture of a prompt, from 0; None: all of them.
        **options: of `change`, for example `region`.

    Raises (when called):
        CorruptionError: where the prompt has no such picture.
    """

    def corruption(prompt: Prompt) -> Prompt:
        count = len(prompt.images)
        if not count or (image is not None and not 0 <= image < count):
            wanted = "picture" if image is None else f"picture {image}"
            raise CorruptionError(f"the prompt has {count} picture(s); there is no {wanted}")
        changed = (
            change(picture, **options) if image in (None, number) else picture
            for number, picture in enumerate(prompt.images)
        )
        return replace(prompt, images=tuple(changed))

    return _named(corruption, change)


def on_text(change: Callable[[str], str]) -> Corruption:
    """A corruption of prompts from one of texts: `on_text(lambda text: ...)`."""
    return _named(lambda prompt: replace(prompt, text=change(prompt.text)), change)


def make_pairs(
    model: HookedMultimodal,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    foils: Sequence[str],
    corruption: Corruption | Sequence[Corruption],
    spans: Sequence[Mapping[str, Where]] | None = None,
) -> PairDataset:
    """Pairs of each prompt and its corruption; `PairDataset.check` reports which of them flip.

    Args:
        model: what to align for.
        prompts: the clean ones.
        answers, foils: one per prompt.
        corruption: one for all prompts, or one per prompt (for regions or seeds of their own).
        spans: one mapping per prompt, or None.

    Raises:
        CorruptionError: another number of answers, foils, corruptions or spans than prompts; the
            number of a prompt that the corruption does not fit.
        PairError: a pair that is not aligned.
    """
    count = len(prompts)
    corruptions = [corruption] * count if callable(corruption) else list(corruption)
    places = [{} for _ in prompts] if spans is None else list(spans)
    given = {"answers": answers, "foils": foils, "corruptions": corruptions, "spans": places}
    for name, values in given.items():
        if len(values) != count:
            raise CorruptionError(f"{len(values)} {name} for {count} prompts; give one each")
    rows = zip(prompts, answers, foils, places, strict=True)
    return _corrupted([Pair(p, p, a, f, s) for p, a, f, s in rows], corruptions, model)


def corrupt(pairs: PairDataset, corruption: Corruption | Sequence[Corruption]) -> PairDataset:
    """The same clean prompts, answers and spans with other corrupt prompts.

    Errors as `make_pairs`. `PairDataset.check` reports which pairs flip.
    """
    corruptions = [corruption] * len(pairs) if callable(corruption) else list(corruption)
    if len(corruptions) != len(pairs):
        raise CorruptionError(
            f"{len(corruptions)} corruptions for {len(pairs)} pairs; give one each"
        )
    return _corrupted(pairs, corruptions, pairs.model)


def _corrupted(
    pairs: Iterable[Pair], corruptions: Sequence[Corruption], model: HookedMultimodal
) -> PairDataset:
    """Pairs with their corrupt prompts made anew, labelled with the corruption's name."""
    made = []
    for number, (pair, corruption) in enumerate(zip(pairs, corruptions, strict=True)):
        try:
            changed = corruption(pair.clean)
        except CorruptionError as error:
            raise CorruptionError(f"prompt {number}: {error}") from error
        name = getattr(corruption, "__name__", type(corruption).__name__)
        made.append(replace(pair, corrupt=changed, meta={**pair.meta, "corruption": name}))
    return PairDataset(made, model)


def _named(corruption: Corruption, change: Callable[..., Any]) -> Corruption:
    corruption.__name__ = getattr(change, "__name__", type(change).__name__)
    return corruption
