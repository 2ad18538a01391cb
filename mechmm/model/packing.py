"""Towers that pack the patches of all images into one sequence, shown as [image, patch, ...].

A `Pack` says, for one run of such a tower, where each patch of each image lies in the sequence.
Patches are shown row by row (frame by frame in a video), whatever the order inside the tower;
images with fewer patches than the largest one are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

ABSENT = -1
Index = Int[Tensor, "image n"]
Back = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Pack:
    """Where the patches of one run lie.

    Attributes:
        embed: [image, patch], index into the sequence of the patch embedding, -1 where an image has
            no such patch.
        blocks: the same for the sequence inside the blocks.
        order: [token], where the projector leaves each token, images one after the other; None: in
            order.
    """

    embed: Index
    blocks: Index
    order: Int[Tensor, "token"] | None = None

    def tokens(self, number: int) -> Index:
        """Place of each image's tokens among `number` of them (a projector may merge patches)."""
        counts = (self.blocks >= 0).sum(-1)
        counts = (counts * number // counts.sum()).tolist()
        order = torch.arange(number) if self.order is None else self.order
        return padded(list(order.split(counts)))


@dataclass(frozen=True)
class Packing:
    """How a tower packs.

    Attributes:
        pack: (root module, args, kwargs of its forward) -> the `Pack` of this run.
        axis: of the packed sequence in what enters and leaves the tower's modules.
        chunked: whether its attention is called once per chunk, unless it is told that a flash
            kernel takes them all.
    """

    pack: Callable[[Any, tuple, Mapping[str, Any]], Pack]
    axis: int = 0
    chunked: bool = True


def unpacked(value: Tensor, index: Index, axis: int) -> tuple[Tensor, Back]:
    """A packed value ([sequence, ...], or [1, sequence, ...] where `axis` is 1) as
    [image, patch, ...], and the way back."""
    flat = value.squeeze(0) if axis else value
    index = index.to(value.device)
    there = index >= 0
    present = there.view(there.shape + (1,) * (flat.ndim - 1))
    shown = flat[index.clamp(min=0)].where(present, 0)

    def back(new: Tensor) -> Tensor:
        sequence = new[there][index[there].argsort()]
        return sequence[None] if axis else sequence

    return shown, back


def padded(rows: list[Tensor]) -> Index:
    """Index rows of different lengths as one tensor."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=ABSENT)


def in_rows(root: Any, args: tuple, kwargs: Mapping[str, Any]) -> Pack:
    """Pixtral: patches row by row, image after image; sizes from `image_sizes` in pixels."""
    sizes = kwargs.get("image_sizes")
    if sizes is None:
        pixels = args[0] if args else kwargs["pixel_values"]
        sizes = [pixels.shape[-2:]] * len(pixels)
    counts = [int(h) // root.patch_size * (int(w) // root.patch_size) for h, w in sizes]
    index = padded(list(torch.arange(sum(counts)).split(counts)))
    return Pack(index, index)


def in_groups(root: Any, args: tuple, kwargs: Mapping[str, Any]) -> Pack:
    """Qwen2-VL, Qwen3-VL, GLM-4V: groups of merge x merge patches, one after the other."""
    grid, merge = _grid(args, kwargs), getattr(root, "spatial_merge_size", 1)
    places, seen = [], 0
    for frames, rows, columns in grid.tolist():
        places.append(_group_places(frames, rows, columns, merge) + seen)
        seen += frames * rows * columns
    index = padded(places)
    return Pack(index, index)


def in_windows(root: Any, args: tuple, kwargs: Mapping[str, Any]) -> Pack:
    """Qwen2.5-VL: inside the blocks, these groups lie window by window."""
    plain = in_groups(root, args, kwargs)
    merge = root.spatial_merge_size
    arguments = (_grid(args, kwargs), merge, root.window_size, root.patch_size)
    places = get_vision_window_index(*arguments)[0].argsort()
    unit = merge**2
    inside = places[plain.embed.clamp(min=0) // unit] * unit + plain.embed % unit
    return Pack(plain.embed, inside.where(plain.embed >= 0, ABSENT), places)


def _group_places(frames: int, rows: int, columns: int, merge: int) -> Int[Tensor, "patch"]:
    """Place of each patch, row by row, in a sequence that lists merge x merge groups one by one."""
    ranges = (torch.arange(size) for size in (frames, rows, columns))
    t, r, c = torch.meshgrid(*ranges, indexing="ij")
    group = (t * (rows // merge) + r // merge) * (columns // merge) + c // merge
    return (group * merge**2 + (r % merge) * merge + c % merge).flatten()


def _grid(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The `grid_thw` of a vision tower's forward: [image, (frames, rows, columns)]."""
    return (kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]).cpu()
