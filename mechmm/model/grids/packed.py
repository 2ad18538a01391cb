"""Grids of families whose tower reads the patches of all pictures as one sequence.

Positions of such a tower are counted row by row over the patches of one picture, frame by frame in
a video, whatever order the model keeps them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechmm.model.grids import Grid, Medium, plain


def images_by_size(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Pictures whose sizes in pixels come with them (Pixtral; Mistral 3 merges patches)."""
    patch, merge = config.vision_config.patch_size, getattr(config, "spatial_merge_size", 1)
    media = []
    for height, width in inputs["image_sizes"].tolist():
        rows, columns = height // patch // merge, width // patch // merge
        grid = plain(rows, columns, merge=merge)
        media.append(Medium((grid,), tower_positions=rows * columns * merge**2))
    return media


def images_by_grid(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Pictures whose grids of patches come with them (Qwen-VL, GLM-4V, PaddleOCR-VL)."""
    return _by_grid(config, inputs["image_grid_thw"], "image")


def videos_by_grid(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """Videos whose grids of patches come with them, the whole clip one row of the tower (Qwen-VL).

    A frame of the grid stands for `temporal_patch_size` frames of the video.
    """
    return _by_grid(config, inputs["video_grid_thw"], "video")


def videos_by_frame(config: Any, inputs: Mapping[str, Any]) -> list[Medium]:
    """The same where each frame is a row of the tower by itself (GLM-4V)."""
    merge = config.vision_config.spatial_merge_size
    media = []
    for frames, rows, columns in inputs["video_grid_thw"].tolist():
        views = tuple(_frame(rows, columns, merge, t, tower_row=t) for t in range(frames))
        size = rows * columns
        media.append(Medium(views, tower_positions=size, tower_rows=frames, kind="video"))
    return media


def _by_grid(config: Any, grids: Any, kind: str) -> list[Medium]:
    """One tower row per [frames, patch rows, patch columns]."""
    merge = config.vision_config.spatial_merge_size
    media = []
    for frames, rows, columns in grids.tolist():
        size = rows * columns
        views = tuple(_frame(rows, columns, merge, t, first=t * size) for t in range(frames))
        media.append(Medium(views, tower_positions=frames * size, kind=kind))
    return media


def _frame(rows: int, columns: int, merge: int, frame: int, **place: int) -> Grid:
    """A frame of rows x columns patches, merge x merge of them a cell."""
    return plain(rows // merge, columns // merge, merge=merge, frame=frame, **place)
