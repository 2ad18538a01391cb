"""Grids of families that cut pictures into tiles, beside or instead of showing them whole.

How many tiles a picture has, and how they lie, is in the sizes of the pictures (LLaVA), in the id
of its aspect ratio (Mllama), or only in the tokens that the processor puts between the tiles.
Some processors write no more than how many there are: then the place of a tile is `UNKNOWN`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from jaxtyping import Int
from transformers.image_processing_utils import select_best_resolution

from mechmm.model.grids import NOWHERE, WHOLE, Grid, Medium, plain, sources

Window = tuple[float, float, float, float]
Inputs = Mapping[str, Any]

UNKNOWN: Window = (math.nan, math.nan, math.nan, math.nan)
"""The window of a tile whose place in its picture the inputs do not tell."""


def tile_windows(rows: int, columns: int) -> list[Window]:
    """The windows of the tiles of a picture, row by row."""
    return [
        (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        for row in range(rows)
        for column in range(columns)
    ]


# Pictures shown whole, in one piece.


def untiled(config: Any, inputs: Inputs) -> list[Medium]:
    """DeepSeek-VL, Janus: one square grid of patches for each image, no class token."""
    side = _side(config.vision_config)
    medium = Medium((plain(side, side),), tower_positions=side * side)
    return [medium] * len(inputs["pixel_values"])


# Pictures of any resolution, tiles put together again to one grid with a newline after each row.


def anyres(config: Any, inputs: Inputs) -> list[Medium]:
    """LLaVA-NeXT, LLaVA-OneVision: the picture whole; then its tiles as one grid, without padding.

    A newline feature ends each row of that grid. LLaVA-OneVision makes a large one smaller, and
    shows pictures that share a prompt with others (`batch_num_images`) only whole, one newline
    after them.
    """
    sizes = inputs["image_sizes"].tolist()
    alone = [True] * len(sizes)
    if inputs.get("batch_num_images") is not None and _shrinks(config):
        counts = inputs["batch_num_images"].tolist()
        alone = [count == 1 for count in counts for _ in range(count)]
    return [
        _anyres(config, size) if one else _only_whole(config)
        for size, one in zip(sizes, alone, strict=True)
    ]


def _shrinks(config: Any) -> bool:
    """Whether large grids are made smaller (LLaVA-OneVision)."""
    return hasattr(config, "vision_aspect_ratio")


def _only_whole(config: Any) -> Medium:
    grid, positions = _whole(config)
    ended = plain(
        grid.rows,
        grid.columns,
        first=positions - grid.rows * grid.columns,
        cells=(*grid.cells, NOWHERE),
    )
    return Medium((ended,), tower_positions=positions)


def _whole(config: Any) -> tuple[Grid, int]:
    """The view of the whole picture, and the positions of its row of the tower."""
    vision = config.vision_config
    side, first = _side(vision), _class_tokens(vision)
    cells: list[int] = [NOWHERE] * first + list(range(side * side))
    if config.vision_feature_select_strategy == "default":
        cells = cells[1:]
    return plain(side, side, first=first, cells=tuple(cells)), first + side * side


def _anyres(config: Any, size: Sequence[int]) -> Medium:
    """The views of one picture of a size (height, width) in pixels."""
    vision = config.vision_config
    side, tile = _side(vision), _first(vision.image_size)
    resolution = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    down, across = (pixels // tile for pixels in resolution)
    where = _put_together(down, across, side, _class_tokens(vision))
    margins = _margins(size, where.shape[:2])
    window = _window(size, resolution, margins, tile / side)
    where = where[margins[0] : len(where) - margins[0], margins[1] : where.shape[1] - margins[1]]
    if _shrinks(config):
        where = _at_most(where, int(config.vision_aspect_ratio.removeprefix("anyres_max_")), side)
    whole, positions = _whole(config)
    tiles = _with_newlines(where, window)
    return Medium((whole, tiles), tower_positions=positions, tower_rows=1 + down * across)


def _put_together(
    down: int, across: int, side: int, first: int
) -> Int[np.ndarray, "row column n two"]:
    """Sources of the grid that the tiles (rows 1, 2, ... of the tower) make together."""
    tiles = [
        sources(side, side, tower_row=1 + number, first=first).reshape(side, side, 1, 2)
        for number in range(down * across)
    ]
    rows = [np.concatenate(tiles[r * across : (r + 1) * across], axis=1) for r in range(down)]
    return np.concatenate(rows)


def _margins(size: Sequence[int], cells: Sequence[int]) -> tuple[int, int]:
    """Rows above and below, and columns left and right, that hold only padding.

    The arithmetic of `unpad_image` of `transformers`, which cuts whole cells off a grid.
    """
    height, width = size
    rows, columns = cells
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _window(
    size: Sequence[int], resolution: Sequence[int], margins: Sequence[int], cell: float
) -> Window:
    """What the cells within the margins show: a little more than the picture, or a little less.

    The processor scales the picture into the resolution and pads it on both sides.
    """
    scale = min(whole / part for whole, part in zip(resolution, size, strict=True))
    ends = []
    for whole, part, margin in zip(resolution, size, margins, strict=True):
        shown = min(math.ceil(part * scale), whole)
        before = (whole - shown) // 2
        ends.append(((margin * cell - before) / shown, (whole - margin * cell - before) / shown))
    (top, bottom), (left, right) = ends
    return left, top, right, bottom


def _at_most(
    where: Int[np.ndarray, "row column n two"], tiles: int, side: int
) -> Int[np.ndarray, "new_row new_column m two"]:
    """A grid made smaller where it is larger than a number of tiles allows."""
    rows, columns = where.shape[:2]
    ratio = math.sqrt(rows * columns / (tiles * side**2))
    return _interpolated(where, int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else where


def _interpolated(
    where: Int[np.ndarray, "row column n two"], rows: int, columns: int
) -> Int[np.ndarray, "new_row new_column m two"]:
    """Sources after bilinear interpolation: of each cell, the four it is a mean of."""
    down, across = _neighbours(where.shape[0], rows), _neighbours(where.shape[1], columns)
    around = where[down[:, None, :, None], across[None, :, None, :]]
    return around.reshape(rows, columns, -1, 2)


def _neighbours(old: int, new: int) -> Int[np.ndarray, "new two"]:
    """Along one axis, which old cells each new one lies between (twice the one it lies on)."""
    place = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    return np.stack([np.floor(place), np.minimum(np.ceil(place), old - 1)], -1).astype(int)


def _with_newlines(where: Int[np.ndarray, "row column n two"], window: Window) -> Grid:
    rows, columns = where.shape[:2]
    lines = np.full((rows, columns + 1), NOWHERE)
    lines[:, :-1] = np.arange(rows * columns).reshape(rows, columns)
    flat = where.reshape(rows * columns, where.shape[2], 2)
    cells = tuple(lines.ravel().tolist())
    return Grid(rows, columns, cells, flat, window, mixed=where.shape[2] > 1)


# Videos, each frame shown whole and made smaller.


def averaged_frames(config: Any, inputs: Inputs) -> list[Medium]:
    """LLaVA-NeXT-Video: each frame with one cell for each square of `spatial_pool_stride` patches.

    Rows and columns of patches that fill no square are not seen.
    """
    side, stride = _side(config.vision_config), config.spatial_pool_stride
    cells = side // stride
    kept = sources(side, side, first=_class_tokens(config.vision_config)).reshape(side, side, 1, 2)
    blocks = kept[: cells * stride, : cells * stride].reshape(cells, stride, cells, stride, 2)
    return _frames(config, inputs, blocks.swapaxes(1, 2).reshape(cells, cells, -1, 2))


def halved_frames(config: Any, inputs: Inputs) -> list[Medium]:
    """LLaVA-OneVision: each frame interpolated to half its rows and columns, one newline at the end
    of the video."""
    side = _side(config.vision_config)
    kept = sources(side, side, first=_class_tokens(config.vision_config)).reshape(side, side, 1, 2)
    half = math.ceil(side / 2)
    return _frames(config, inputs, _interpolated(kept, half, half), newlines=1, mixed=True)


def _frames(
    config: Any,
    inputs: Inputs,
    where: Int[np.ndarray, "row column n two"],
    newlines: int = 0,
    mixed: bool = False,
) -> list[Medium]:
    """Videos whose frames all have the same grid (given for the first row of the tower)."""
    rows, columns = where.shape[:2]
    videos, frames = inputs["pixel_values_videos"].shape[:2]
    grids = [
        Grid(
            rows,
            columns,
            cells=(*range(rows * columns), *[NOWHERE] * (newlines * (frame == frames - 1))),
            sources=where.reshape(rows * columns, -1, 2) + np.array([frame, 0]),
            frame=frame,
            mixed=mixed,
        )
        for frame in range(frames)
    ]
    side = _side(config.vision_config)
    positions = _class_tokens(config.vision_config) + side * side
    medium = Medium(tuple(grids), tower_positions=positions, tower_rows=frames, kind="video")
    return [medium] * videos


# Tiles one after the other, each a view of its own; what lies between them tells how they lie.

Run = tuple[int, list[int]]
"""How many placeholders stand side by side, and the tokens from there to the next ones."""


def unmarked_tiles(config: Any, inputs: Inputs) -> list[Medium]:
    """InternVL: tiles without a token between them, the whole picture last.

    A frame of a video is a picture that is not cut.
    """
    vision = config.vision_config
    merge = round(1 / config.downsample_ratio)
    cells = _side(vision) // merge

    def cut(runs: Sequence[Run]) -> list[list[Window]]:
        return [_unplaced(length // cells**2) for length, _ in runs]

    return _square_tiles(inputs, config, cut, cells, merge, first=1, positions=1)


def lone_marks(config: Any, inputs: Inputs) -> list[Medium]:
    """Aya Vision, Cohere2 Vision: one token before or after each tile, the whole picture last."""
    merge = config.downsample_factor
    cells = _side(config.vision_config) // merge
    return _square_tiles(inputs, config, _cut_at_lone_marks, cells, merge)


def row_marks(config: Any, inputs: Inputs) -> list[Medium]:
    """Idefics3, SmolVLM: two tokens before each tile, one more before each row and before the whole
    picture, which comes last.

    Two pictures side by side are told from two rows of one by the token after a picture, the one
    that stands before the first tile's mark.
    """
    merge = config.scale_factor
    cells = _side(config.vision_config) // merge
    ids = inputs["input_ids"]
    starts = (ids == config.image_token_id).int().argmax(-1).tolist()
    around = {ids[prompt, start - 2].item() for prompt, start in enumerate(starts) if start > 1}

    def cut(runs: Sequence[Run]) -> list[list[Window]]:
        pictures = _split(runs, lambda gap: len(gap) > 2 and gap[0] in around)
        return [_placed(picture, lambda gap: len(gap) > 2) for picture in pictures]

    return _square_tiles(inputs, config, cut, cells, merge)


def separated_tiles(config: Any, inputs: Inputs) -> list[Medium]:
    """Llama 4: one token between tiles and another after each row; the whole picture last."""
    vision = config.vision_config
    merge = round(1 / vision.pixel_shuffle_ratio)
    cells = _side(vision) // merge

    def cut(runs: Sequence[Run]) -> list[list[Window]]:
        pictures = _split(runs, lambda gap: gap[0] == config.eoi_token_index)
        # Two tokens before the whole picture: what ends a row, and a mark.
        ends = {gap[0] for picture in pictures for _, gap in picture[:-1] if len(gap) == 2}
        return [_placed(picture, lambda gap: gap[0] in ends) for picture in pictures]

    # The class token comes after the patches.
    return _square_tiles(inputs, config, cut, cells, merge, first=0, positions=1)


def indicated_tiles(config: Any, inputs: Inputs) -> list[Medium]:
    """Ovis2: the whole picture first; then tiles with one token between them and another between
    rows (`visual_indicator_token_ids`: start, grid, column, row, end)."""
    merge = config.vision_config.hidden_stride
    cells = _side(config.vision_config) // merge
    row_break = config.visual_indicator_token_ids[3]

    def cut(runs: Sequence[Run]) -> list[list[Window]]:
        pictures = _split(runs, lambda gap: len(gap) != 1)
        return [
            [WHOLE, *_arranged(picture[1:], lambda gap: gap[0] == row_break)]
            for picture in pictures
        ]

    return _square_tiles(inputs, config, cut, cells, merge)


def native_tiles(config: Any, inputs: Inputs) -> list[Medium]:
    """LFM2-VL: pictures in their own proportions, or square tiles and the whole picture last, one
    token before each; rows of the tower are padded to the longest."""
    merge = config.downsample_factor
    shapes = inputs["spatial_shapes"].tolist()
    pictures = [picture for runs in _runs(config, inputs) for picture in _cut_at_lone_marks(runs)]
    _check(pictures, len(shapes))
    left, media = iter(shapes), []
    for picture in pictures:
        views = []
        for number, window in enumerate(picture):
            rows, columns = (patches // merge for patches in next(left))
            views.append(plain(rows, columns, merge=merge, tower_row=number, window=window))
        positions = inputs["pixel_values"].shape[1]
        media.append(Medium(tuple(views), tower_positions=positions, tower_rows=len(views)))
    return media


def _square_tiles(
    inputs: Inputs,
    config: Any,
    cut: Callable[[Sequence[Run]], list[list[Window]]],
    cells: int,
    merge: int,
    *,
    first: int = 0,
    positions: int = 0,
) -> list[Medium]:
    """Pictures of square tiles, each one row of the tower.

    Args:
        cut: the windows of the tiles of each picture of one prompt, from its placeholders.
        cells: along one side of a tile; merge: patches along one side of a cell.
        first: place of the first patch in a row; positions: how many are no patches.
    """
    pictures = [picture for runs in _runs(config, inputs) for picture in cut(runs)]
    _check(pictures, _rows_of_tower(inputs["pixel_values"]))
    total = positions + (cells * merge) ** 2
    return [
        Medium(
            tuple(
                plain(cells, cells, merge=merge, tower_row=number, first=first, window=window)
                for number, window in enumerate(picture)
            ),
            tower_positions=total,
            tower_rows=len(picture),
        )
        for picture in pictures
    ]


def _rows_of_tower(pixels: Any) -> int:
    """Tiles that reach the tower; Idefics3 drops those of [prompt, tile, ...] that are zero."""
    return len(pixels) if pixels.ndim == 4 else int((pixels != 0).flatten(2).any(-1).sum())


def _check(pictures: Sequence[Sequence[Window]], given: int) -> None:
    found = sum(len(picture) for picture in pictures)
    if found != given:
        raise ValueError(
            f"the placeholders of the prompts stand for {found} tile(s), but pixels of {given} "
            "were given; use the model's own processor, so that placeholders and pixels match"
        )


def _runs(config: Any, inputs: Inputs) -> Iterator[list[Run]]:
    """The runs of placeholders of each prompt."""
    for ids in inputs["input_ids"].tolist():
        pieces = [
            (is_image, list(piece))
            for is_image, piece in groupby(ids, lambda i: i == config.image_token_id)
        ]
        pieces = pieces if pieces and pieces[0][0] else pieces[1:]
        yield [
            (len(pieces[n][1]), pieces[n + 1][1] if n + 1 < len(pieces) else [])
            for n in range(0, len(pieces), 2)
        ]


def _split(runs: Sequence[Run], ends: Callable[[list[int]], bool]) -> list[list[Run]]:
    """The runs of each picture, given what lies after the last one of a picture."""
    pictures: list[list[Run]] = []
    fresh = True
    for run in runs:
        if fresh:
            pictures.append([])
        pictures[-1].append(run)
        fresh = not run[1] or ends(run[1])
    return pictures


def _placed(picture: Sequence[Run], new_row: Callable[[list[int]], bool]) -> list[Window]:
    """Windows of tiles row by row and, after them, of the whole picture."""
    return [*_arranged(picture[:-1], new_row), WHOLE]


def _arranged(tiles: Sequence[Run], new_row: Callable[[list[int]], bool]) -> list[Window]:
    """Windows of tiles row by row, given what lies between two rows."""
    if not tiles:
        return []
    rows = 1 + sum(new_row(gap) for _, gap in tiles[:-1])
    return tile_windows(rows, len(tiles) // rows)


def _unplaced(tiles: int) -> list[Window]:
    """Windows of tiles of which only the number is known, the whole picture last."""
    return [*[UNKNOWN] * (tiles - 1), WHOLE]


def _cut_at_lone_marks(runs: Sequence[Run]) -> list[list[Window]]:
    pictures = _split(runs, lambda gap: len(gap) != 1)
    return [_unplaced(len(picture)) for picture in pictures]


# Pictures that the language model reads by cross attention, one placeholder each.


def attended_tiles(config: Any, inputs: Inputs) -> list[Medium]:
    """Mllama: one grid over all tiles of a picture, which lie one after the other in one row of the
    tower, each a class token, its patches, and padding to a multiple of eight.

    `aspect_ratio_ids` [prompt, image] tell how the tiles lie; 0 is padding, counted to the image
    before it. The picture fills the grid but for padding on the right and below.
    """
    vision = config.vision_config
    side = _side(vision)
    step = 8 * math.ceil((1 + side * side) / 8)
    ids = inputs["aspect_ratio_ids"].flatten().tolist()
    real = [row for row, number in enumerate(ids) if number]
    media = []
    for number, row in enumerate(real):
        start = row if number else 0
        end = real[number + 1] if number + 1 < len(real) else len(ids)
        down, across = vision.supported_aspect_ratios[ids[row] - 1]
        where = _put_together(down, across, side, first=1)
        tile = where[..., :1] - 1
        where = np.concatenate([np.full_like(tile, row - start), where[..., 1:] + step * tile], -1)
        cells = where.reshape(-1, 1, 2)
        grid = Grid(down * side, across * side, (NOWHERE,), cells, mixed=True)
        total = vision.max_num_tiles * step
        media.append(Medium((grid,), tower_positions=total, tower_rows=end - start))
    return media


def _side(vision: Any) -> int:
    """Patches along one side of a picture or tile."""
    return _first(vision.image_size) // _first(vision.patch_size)


def _first(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _class_tokens(vision: Any) -> int:
    return int(vision.model_type == "clip_vision_model")
