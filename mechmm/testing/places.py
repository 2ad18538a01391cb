"""Whether the layout of a tiny model says the truth: from pixel to patch to language position."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mechmm.model.tower import Tower
from mechmm.testing.conformance import Case

NO_TOWER = "images are tokens of a codebook: there is no tower"
ALL_MIXED = "no projected token has a place of its own"
MIXED = "every token of the image is made from all of its patches"
NO_LANGUAGE = "an encoder has no language positions"
EXEMPT = {
    ("chameleon", "pixels"): NO_TOWER,
    ("emu3", "pixels"): NO_TOWER,
    ("chameleon", "features"): NO_TOWER,
    ("emu3", "features"): NO_TOWER,
    ("chameleon", "projected"): NO_TOWER,
    ("emu3", "projected"): NO_TOWER,
    ("florence2", "pixels"): "overlapping convolutions: a patch sees more than its own pixels",
    ("qwen2_audio", "pixels"): "overlapping convolutions: a position hears more than its own time",
    ("idefics2", "features"): MIXED,
    ("blip-2", "features"): MIXED,
    ("instructblip", "features"): MIXED,
    ("mllama", "features"): "the language model reads the picture by cross-attention",
    ("idefics2", "projected"): "a resampler stands behind the projector",
    ("lfm2_vl", "projected"): "its projector has no hooks",
    ("blip-2", "projected"): "OPT adds position embeddings to what it is given",
    ("florence2", "projected"): "BART adds position embeddings to what it is given",
}
"""(family, point) -> why the family cannot pass it."""


def pixels(case: Case) -> None:
    """The pixels that reach a position of the patch embedding are the block at its row and column.

    Positions of packed towers are those of ready patches: the order of their pixels is that of a
    processor.
    """
    tower = _tower(case)
    name = next(m.pixels for m in case.model.family.media if m.kind == case.kind)
    given = case.batch.extra[name].detach().clone().requires_grad_()
    caught: list[Tensor] = []

    def catch(value: Tensor, hook: HookPoint) -> None:
        caught.append(value)

    batch = case.batch.__class__.from_inputs(case.model, **{**case.inputs, name: given})
    case.model.run_with_hooks(batch, fwd_hooks=[(f"{tower.prefix}hook_embed", catch)])
    medium = next(medium for media in batch.layout.media for medium in media)
    patches = sorted({tuple(place) for view in medium.views for place in _places(view.sources)})
    packing, view = tower.row.packed, medium.views[-1]
    ready = given.ndim < 4 or (packing is not None and packing.chunked)
    columns = None if packing is None else view.columns * math.isqrt(view.sources.shape[1])
    rows = sum(medium.tower_rows for media in batch.layout.media for medium in media)
    stride = medium.tower_positions // max(1, given.shape[:-3].numel() // rows)  # Mllama: tiles
    first = min(position for _, position in patches)
    for row, position in patches[:: max(1, len(patches) // 5)]:
        value = caught[0][row, position - (caught[0].shape[1] < medium.tower_positions) * first]
        (gradient,) = torch.autograd.grad(value.sum(), given, retain_graph=True)
        reached = (gradient != 0).nonzero()
        assert len(reached), f"no pixel reaches ({row}, {position})"
        if ready:
            apart = reached[:, : 2 if given.ndim == 3 else 1]
            assert len(apart.unique(dim=0)) == 1, "more than one ready patch reaches it"
        else:
            _is_block(reached[:, -2:], position % stride - first, columns, given.shape[-1])


def _is_block(reached: Tensor, patch: int, columns: int | None, width: int) -> None:
    """Whether pixels (row, column) are the block of a patch, patches lying row by row: as many in a
    row as are told, or as there is room for in the width."""
    low, high = reached.amin(0), reached.amax(0)
    side = high - low + 1
    found = tuple((low // side).tolist())
    wanted = divmod(patch, columns or width // int(side[1]))
    assert found == wanted, f"patch {patch} sees the block at {found}"
    assert len(reached.unique(dim=0)) == int(side.prod()), "a patch sees more or less than a block"


def features(case: Case) -> None:
    """A change at one position of the tower reaches exactly the language positions whose cells were
    made from it."""
    tower = _tower(case)
    name = f"{tower.prefix}blocks.{_last_read(case, tower)}.hook_mlp_out"
    layout, into = case.batch.layout, "blocks.0.hook_resid_pre"
    into = f"encoder.{into}" if "encoder" in case.model.towers else into
    wanted: dict[tuple[int, int], set[tuple[int, int]]] = {}
    start = 0
    for prompt, media in enumerate(layout.media):
        for number, medium in enumerate(media):
            here = (layout.image[prompt] == number).nonzero().flatten().tolist()
            for position, (view, cell) in zip(here, medium.placed, strict=True):
                for row, place in [] if cell < 0 else _places(medium.views[view].sources[cell]):
                    wanted.setdefault((start + row, place), set()).add((prompt, position))
            start += medium.tower_rows
    every = sorted(wanted)
    assert every, "no language position has a place in the picture"
    placed = layout.row >= 0
    for row, place in every[:: max(1, len(every) // 7)]:

        def push(value: Tensor, hook: HookPoint, row: int = row, place: int = place) -> Tensor:
            value[row, place] += torch.linspace(-3, 3, value.shape[-1]).to(value)
            return value

        with torch.no_grad(), case.model.hooks(fwd_hooks=[(name, push)]):
            changed = case.model.run_with_cache(case.batch, names_filter=into)[1][into]
            plain = case.cache[into]
        moved = ((changed - plain).abs().amax(-1) > 1e-3).cpu() & placed
        found = {tuple(at) for at in moved.nonzero().tolist()}
        assert found == wanted[row, place], f"({row}, {place}) reaches {found}"


def projected(case: Case) -> None:
    """The language model is given at every image position what the projector gave for it."""
    layout = case.batch.layout
    prefix = next(p for p, row in case.model.family.projectors.items() if row.tower != "text")
    prefix = "projector" if "projector" in case.model.family.projectors else prefix
    out = case.cache[f"{prefix}.hook_out"]
    into = "encoder.hook_embed" if "encoder" in case.model.towers else "blocks.0.hook_resid_pre"
    stream, start, compared = case.cache[into], 0, 0
    for prompt, media in enumerate(layout.media):
        for number, medium in enumerate(media):
            here = (layout.image[prompt] == number).nonzero().flatten().tolist()
            for position, place in zip(here, medium.projected, strict=True):
                if place is not None:
                    given = out[start + place[0], place[1]]
                    assert case.near(stream[prompt, position], given), f"position {position}"
                    compared += 1
            start += medium.tower_rows
    assert compared, "no projected token has a place of its own"


POINTS = {"pixels": pixels, "features": features, "projected": projected}
"""By name."""


def exempt(case: Case, point: str) -> str | None:
    """Why a family cannot pass a point, or None where it has to."""
    if case.model.family.unembed is None and point != "pixels":
        return NO_LANGUAGE
    views = [view for media in case.batch.layout.media for m in media for view in m.views]
    if point == "projected" and all(view.mixed for view in views):
        return ALL_MIXED
    return EXEMPT.get((case.family, point))


def _tower(case: Case) -> Tower:
    """The tower that sees or hears the media of a case."""
    return next(t for t in case.awake if t.name in ("vision", "video", "audio"))


def _last_read(case: Case, tower: Tower) -> int:
    """The last block of a tower that the model reads."""
    unread = case.model.family.unread(case.model.config)
    names = {i: f"{tower.prefix}blocks.{i}.hook_mlp_out" for i in range(len(tower.blocks))}
    return max(i for i, n in names.items() if not any(re.fullmatch(p, n) for p in unread))


def _places(sources) -> list[tuple[int, int]]:
    return [(int(row), int(position)) for row, position in sources.reshape(-1, 2)]
