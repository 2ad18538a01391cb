"""Grids of Q-Formers, early fusion, encoder-decoders and audio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from mechmm.model.grids import NOWHERE, Grid, Medium, placeless, plain
from mechmm.model.grids.single import padded_sources


def queries(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """BLIP-2 and InstructBLIP: queries of a Q-Former, over patches after a class token."""
    height, width = inputs["pixel_values"].shape[-2:]
    patch = config.vision_config.patch_size
    grid = placeless(config.num_query_tokens, height // patch, width // patch, first=1)
    medium = Medium((grid,), tower_positions=1 + grid.rows * grid.columns)
    return [medium] * len(inputs["pixel_values"])


def mean_and_patches(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Florence-2: the mean of the grid, which has no place, then the grid."""
    size = list(inputs["pixel_values"].shape[-2:])
    vision = config.vision_config
    stages = zip(vision.patch_size, vision.patch_stride, vision.patch_padding, strict=True)
    for kernel, stride, padding in stages:
        size = [(pixels + 2 * padding - kernel) // stride + 1 for pixels in size]
    cells = (NOWHERE, *range(size[0] * size[1]))
    medium = Medium((plain(*size, cells=cells),), tower_positions=size[0] * size[1])
    return [medium] * len(inputs["pixel_values"])


def codes(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Chameleon: one code of the image tokenizer for each cell."""
    shrink = _shrink(config)
    height, width = inputs["pixel_values"].shape[-2:]
    grid = plain(height // shrink, width // shrink)
    medium = Medium((grid,), tower_positions=grid.rows * grid.columns)
    return [medium] * len(inputs["pixel_values"])


def codes_by_row(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Emu3: codes of images of any size padded to the largest one, an end of line after each row.

    Ends of line fill placeholders too, without a place.
    """
    shrink = _shrink(config)
    tall, wide = (int(size) // shrink for size in inputs["pixel_values"].shape[-2:])
    media = []
    for height, width in inputs["image_sizes"].tolist():
        rows, columns = height // shrink, width // shrink
        cells = np.pad(
            np.arange(rows * columns).reshape(rows, columns),
            ((0, 0), (0, 1)),
            constant_values=NOWHERE,
        )
        sources = padded_sources(rows, columns, wide)
        grid = Grid(rows, columns, tuple(cells.flatten().tolist()), sources)
        media.append(Medium((grid,), tower_positions=tall * wide))
    return media


def sound(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Qwen2-Audio: a row of cells for each clip, each from two positions of the tower.

    The tower makes one position of two frames of the spectrogram; its last layer averages two
    positions.
    """
    frames = inputs["feature_attention_mask"].sum(-1).long().tolist()
    positions = config.audio_config.max_source_positions
    media = []
    for number in frames:
        cells = range((((number - 1) // 2 + 1) - 2) // 2 + 1)
        grid = Grid(1, len(cells), tuple(cells), _pairs(len(cells)))
        media.append(Medium((grid,), positions, kind="audio"))
    return media


def _pairs(count: int) -> Int[np.ndarray, "cell n two"]:
    """Where cells come from, each from two positions of the tower that lie side by side."""
    position = np.arange(2 * count).reshape(count, 2)
    return np.stack([np.zeros_like(position), position], -1)


def _shrink(config: Any) -> int:
    """Pixels that one code of the image tokenizer is wide and high."""
    return 2 ** (len(config.vq_config.channel_multiplier) - 1)
