"""Which patch of which image each placeholder of a prompt stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """The language positions that one image fills, in order, and its patches' place in the tower.

    Attributes:
        rows, columns: size of the grid of image tokens.
        extra: tokens before the grid that belong to no place in the image (a class token).
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


def window(image_processor: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of a picture that an image processor keeps, in pixels.

    A picture resized to a fixed height and width is kept whole. One resized by its shortest edge
    (CLIP, LLaVA-1.5) and cropped at the centre loses what lies beyond the crop; where the crop is
    larger than the picture, it is padded, and the window reaches beyond the picture.
    """
    size, crop = image_processor.size, getattr(image_processor, "crop_size", None)
    shortest = size.shortest_edge
    if shortest is None:
        scale = width / size.width, height / size.height
    else:
        scale = (min(width, height) / shortest,) * 2
    if not getattr(image_processor, "do_center_crop", False) or crop is None:
        return 0.0, 0.0, float(width), float(height)
    across, down = crop.width * scale[0], crop.height * scale[1]
    left, top = (width - across) / 2, (height - down) / 2
    return left, top, left + across, top + down
