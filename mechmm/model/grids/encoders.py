"""Grids of encoders without a language model: no token stands for a patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mechmm.model.grids import Medium, plain

CLASSLESS = ("siglip_vision_model", "siglip2_vision_model")
"""Vision towers, by `model_type`, that put no class token before the patches."""


def patches(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """A grid of patches for each picture, after a class token and registers where there are any."""
    vision = getattr(config, "vision_config", config)
    number, _, height, width = inputs["pixel_values"].shape
    tall, wide = _sides(vision.patch_size)
    rows, columns = height // tall, width // wide
    has_class_token = vision.model_type not in CLASSLESS
    first = int(has_class_token) + getattr(vision, "num_register_tokens", 0)
    grid = plain(rows, columns, first=first, cells=())
    return [Medium((grid,), tower_positions=first + rows * columns)] * number


def padded_patches(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """A grid of patches for each picture, padded to the same number (SigLIP 2)."""
    width = inputs["pixel_values"].shape[1]
    shapes = inputs["spatial_shapes"].tolist()
    return [Medium((plain(*shape, cells=()),), tower_positions=width) for shape in shapes]


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of what is given by one number where it is square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
