"""Grids of families that show every picture whole, in one piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mechmm.model.grids import NOWHERE, WHOLE, Grid, Medium, plain

QUARTERS = (
    (0.0, 0.0, 0.5, 0.5),
    (0.5, 0.0, 1.0, 0.5),
    (0.0, 0.5, 0.5, 1.0),
    (0.5, 0.5, 1.0, 1.0),
    WHOLE,
)
"""Parts of a picture that Idefics2 shows where it splits pictures, in order."""


def llava(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """LLaVA: one square grid of patches for each image, with a class token if it is kept."""
    first_dropped = config.vision_feature_select_strategy == "default"
    medium = _square(config.vision_config, first_dropped)
    return [medium] * len(inputs["pixel_values"])


def llava_without_first(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """ViP-LLaVA: as LLaVA, the first position of the tower always dropped."""
    return [_square(config.vision_config, first_dropped=True)] * len(inputs["pixel_values"])


def frames(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Video-LLaVA: videos frame by frame, always with the class token; images are as in LLaVA."""
    frame = _square(config.vision_config, first_dropped=False)
    (view,) = frame.views
    media = []
    for video in inputs["pixel_values_videos"]:
        views = [
            Grid(view.rows, view.columns, view.cells, view.sources + np.array([i, 0]), frame=i)
            for i in range(len(video))
        ]
        media.append(Medium(tuple(views), frame.tower_positions, len(views), kind="video"))
    return media


def patches(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """PaliGemma: one square grid of patches for each image."""
    side = _side(config.vision_config)
    medium = Medium((plain(side, side),), tower_positions=side**2)
    return [medium] * len(inputs["pixel_values"])


def averaged(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Gemma 3: one square grid for each image, each cell the average of a square of patches.

    Crops of a picture (pan and scan) are media of their own: nothing in the inputs says which
    picture they come from.
    """
    side = _side(config.vision_config)
    merge = side // int(config.mm_tokens_per_image**0.5)
    medium = Medium((plain(side // merge, side // merge, merge=merge),), tower_positions=side**2)
    return [medium] * len(inputs["pixel_values"])


def resampled(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Idefics2: queries of a resampler, over images of any size padded to the largest one.

    A picture may be split into its quarters and itself. This shows in `input_ids`: the five stand
    side by side, one token between them. Five pictures with nothing else between them look alike.
    """
    pixels, masks = inputs["pixel_values"], inputs.get("pixel_attention_mask")
    patch = config.vision_config.patch_size
    tall, wide = (int(size) // patch for size in pixels.shape[-2:])
    sizes = [(tall, wide)] * int((pixels != 0).flatten(2).any(-1).sum())
    if masks is not None:
        real = masks[(pixels != 0).flatten(2).any(-1)]
        sizes = [(int(m[:, 0].sum()) // patch, int(m[0].sum()) // patch) for m in real]
    parts = QUARTERS if _is_split(config, inputs) else (WHOLE,)
    views = [
        Grid(
            *size,
            cells=(NOWHERE,) * config.perceiver_config.resampler_n_latents,
            sources=padded_sources(*size, wide, tower_row=i % len(parts)),
            window=parts[i % len(parts)],
        )
        for i, size in enumerate(sizes)
    ]
    together = [tuple(views[i : i + len(parts)]) for i in range(0, len(views), len(parts))]
    return [Medium(group, tower_positions=tall * wide, tower_rows=len(group)) for group in together]


def padded_sources(
    rows: int, columns: int, wide: int, *, tower_row: int = 0
) -> Int[np.ndarray, "cell n two"]:
    """Where the cells of a grid come from, one patch each, at the top left of a wider one.

    Args:
        rows, columns: of the grid.
        wide: columns of the grid that the tower sees, with padding.
        tower_row: row of the tower's batch, counted from the medium's first.
    """
    position = (np.arange(rows)[:, None] * wide + np.arange(columns)).reshape(-1, 1)
    return np.stack([np.full_like(position, tower_row), position], -1)


def _side(vision: Any) -> int:
    """Patches along a side of a square tower."""
    return vision.image_size // vision.patch_size


def _square(vision: Any, first_dropped: bool) -> Medium:
    """One square grid of patches; CLIP's class token comes before them."""
    has_class_token = vision.model_type == "clip_vision_model"
    side = _side(vision)
    cells = list(range(side * side))
    if first_dropped and not has_class_token:
        cells = cells[1:]
    if has_class_token and not first_dropped:
        cells = [NOWHERE, *cells]
    first = int(has_class_token)
    grid = plain(side, side, first=first, cells=tuple(cells))
    return Medium((grid,), tower_positions=first + side * side)


def _is_split(config: Any, inputs: Mapping[str, Any]) -> bool:
    """Whether images always come five at a time, with one token between them."""
    if "input_ids" not in inputs:
        return False
    neighbours: list[int] = []
    for row in inputs["input_ids"].tolist():
        last = None
        for start in _runs(row, config.image_token_id, config.perceiver_config.resampler_n_latents):
            end = start + config.perceiver_config.resampler_n_latents
            if last is not None and start == last + 1:
                neighbours[-1] += 1
            else:
                neighbours.append(1)
            last = end
    return bool(neighbours) and all(number % len(QUARTERS) == 0 for number in neighbours)


def _runs(ids: Sequence[int], token: int, length: int) -> list[int]:
    """Where the media of a prompt start, each filling `length` positions with a token."""
    return [i for i, other in enumerate(ids) if other == token][::length]
