"""Which part of a picture a model sees: what image processors do to its sides and its tiles."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

from mechmm.model.grids import Medium
from mechmm.model.grids.tiles import tile_windows
from mechmm.model.layout import Window

UNKNOWN_GEOMETRY = ("Llama4ImageProcessor",)
"""Image processors whose views do not show the same part of a picture."""


def window(image_processor: Any, width: int, height: int, *, alone: bool = True) -> Window | None:
    """The part of a picture that an image processor keeps.

    Most processors stretch the whole picture. One that is resized by its shortest edge and cropped
    at the centre (CLIP, LLaVA-1.5) loses what lies beyond the crop; one that is padded to a square
    (Janus, LLaVA with `do_pad`), to a canvas of tiles (Mllama) or to its crop is seen with an edge,
    so that the window reaches beyond the picture.

    Args:
        image_processor: of the model's processor.
        width, height: of the picture in pixels.
        alone: whether it is the only one of its prompt (LLaVA-OneVision cuts only such into tiles).

    Returns:
        The window, or None where it is not known of this image processor.
    """
    name = type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")
    if name in UNKNOWN_GEOMETRY:
        return None
    if hasattr(image_processor, "max_image_tiles"):
        return _canvas(image_processor, width, height)
    if hasattr(image_processor, "image_grid_pinpoints"):  # its crop is that of tiles
        squares = not alone and hasattr(image_processor, "pad_to_square")
        return _square(width, height) if squares else _whole(width, height)
    padded = _on(image_processor, "do_pad") and hasattr(image_processor, "pad_to_square")
    seen = _square(width, height) if padded else _whole(width, height)
    crop = getattr(image_processor, "crop_size", None)
    if not _on(image_processor, "do_center_crop") or crop is None:
        return seen
    return _cropped(image_processor, crop, seen)


def _on(image_processor: Any, switch: str) -> bool:
    return bool(getattr(image_processor, switch, False))


def _whole(width: int, height: int) -> Window:
    return 0.0, 0.0, float(width), float(height)


def _square(width: int, height: int) -> Window:
    """The smallest square around a picture, the picture in its middle."""
    side = max(width, height)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return float(left), float(top), float(left + side), float(top + side)


def _cropped(image_processor: Any, crop: Any, seen: Window) -> Window:
    """The middle of what is seen, given the crop in pixels after resizing."""
    left, top, right, bottom = seen
    wide, high = _pixels(image_processor, right - left, bottom - top)
    across, down = _get(crop, "width") * wide, _get(crop, "height") * high
    x, y = (left + right - across) / 2, (top + bottom - down) / 2
    return x, y, x + across, y + down


def _pixels(image_processor: Any, width: float, height: float) -> tuple[float, float]:
    """Width and height in the picture of one pixel after resizing."""
    size = getattr(image_processor, "size", None)
    if not _on(image_processor, "do_resize") or size is None:
        return 1.0, 1.0
    if _get(size, "height") and _get(size, "width"):
        return width / _get(size, "width"), height / _get(size, "height")
    edges = {"shortest_edge": min(width, height), "longest_edge": max(width, height)}
    scales = [given / _get(size, name) for name, given in edges.items() if _get(size, name)]
    scale = max(scales, default=1.0)
    return scale, scale


def _get(size: Any, name: str) -> Any:
    """An entry of a size, which is a dict or (in newer image processors) an object like one."""
    return size.get(name) if hasattr(size, "get") else getattr(size, name, None)


def _canvas(image_processor: Any, width: int, height: int) -> Window:
    """A canvas of tiles with the picture in its upper left (Mllama)."""
    # Only here, since few models need it and other versions of transformers have it elsewhere.
    from transformers.models.mllama.image_processing_pil_mllama import (
        get_image_size_fit_to_canvas,
        get_optimal_tiled_canvas,
    )

    tile = _get(image_processor.size, "height")
    most = image_processor.max_image_tiles
    down, across = (int(side) for side in get_optimal_tiled_canvas(height, width, most, tile))
    high, wide = get_image_size_fit_to_canvas(height, width, down, across, tile)
    return 0.0, 0.0, float(width * across / wide), float(height * down / high)


def placed(medium: Medium, image_processor: Any, width: int, height: int) -> Medium:
    """A picture whose tiles lie where the image processor puts them, where inputs do not tell.

    Tiles of which it does not tell either keep a window of NaN.
    """
    lost = [n for n, view in enumerate(medium.views) if math.isnan(view.window[0])]
    rows, columns = _arrangement(image_processor, width, height)
    if not lost or rows * columns != len(lost):
        return medium
    views = list(medium.views)
    for n, part in zip(lost, tile_windows(rows, columns), strict=True):
        views[n] = replace(views[n], window=part)
    return replace(medium, views=tuple(views))


def _arrangement(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles, (0, 0) where the image processor does not tell."""
    # InternVL, Aya Vision, Cohere2 Vision: a function beside the class, in both of its versions.
    module = sys.modules[type(image_processor).__module__]
    arrange = getattr(module, "get_optimal_tiled_canvas", None)
    fewest, most = (getattr(image_processor, name, None) for name in ("min_patches", "max_patches"))
    if arrange is None or fewest is None or most is None:
        return 0, 0
    tile = image_processor.size.height, image_processor.size.width
    columns, rows = arrange((height, width), tile, fewest, most)
    return int(rows), int(columns)
