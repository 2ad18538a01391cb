"""Which patch of which image each placeholder of a prompt stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """The language positions that one image fills, in order, and where its patches sit in the tower.

    Attributes:
        rows, columns: size of the grid of image tokens.
        extra: tokens before the grid that belong to the image but to no place in it (a class token).
        tower_extra: positions of the tower's sequence before its first patch.
        skip: cells at the start of the grid that no token stands for.
        scale: patches per image token along one side (more than 1 where patches are merged).
    """

    rows: int
    columns: int
    extra: int = 0
    tower_extra: int = 0
    skip: int = 0
    scale: int = 1

    @property
    def tokens(self) -> int:
        """Language positions that the image fills."""
        return self.extra + self.rows * self.columns - self.skip


def one_grid_per_image(config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """LLaVA: one square grid of patches for each image, with a class token if it is kept."""
    vision = config.vision_config
    has_class_token = vision.model_type == "clip_vision_model"
    first_dropped = config.vision_feature_select_strategy == "default"
    side = vision.image_size // vision.patch_size
    grid = Grid(
        side,
        side,
        extra=int(has_class_token and not first_dropped),
        tower_extra=int(has_class_token),
        skip=int(first_dropped and not has_class_token),
    )
    return [grid] * len(inputs["pixel_values"])
