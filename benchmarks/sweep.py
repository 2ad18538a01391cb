"""What a sweep of activation patching costs, beside one full run of the model for every cell.

A random LLaVA patches sites of pairs of prompts: single positions of the residual stream, heads of
both towers, and the mixture of a first look. Ours is `mechmm.patch`, which runs the whole job in
every round, with everything that belongs to it: pairs are encoded, both prompts run, clean values
are read. The others run the whole model once for every cell (a site of a pair), as their users do,
with ready inputs and with clean values that are there already:

- TransformerLens's bridge in the loop of `transformer_lens.patching.generic_activation_patch`: one
  `run_with_hooks` on the prompt for every cell, which gives all logits. That function itself passes
  on no pictures, so the loop is written out here;
- nnsight, one trace for every cell, and a loop with one PyTorch hook on the Hugging Face model for
  every cell; both ask for the logits of the last position alone.

A cell costs them about the same wherever it is, so each round times them on a few cells, drawn
anew at random, and scales that to all cells of the job. Every value that they find is compared with
ours. Ratios are theirs over ours: how many times less a sweep takes.

The floating-point bound is what it takes to compute every position from the patched one on anew, in
every block from the patched one on, at the rate at which the same process multiplies matrices of
these shapes (`operations`, `Products`).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from _timing import Row, compare, interleaved, milliseconds, parser, peak_bytes, report, settle

# isort: split
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from overhead import BRIDGE, NNSIGHT, Shape, nnsight, shared
from overhead import SHAPES as OVERHEAD
from PIL import Image
from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import mechmm as mm
from mechmm.data.pairs import Prompt
from mechmm.engine.sites import Sites
from mechmm.results.canvas import COLORS, GAP, HEAD, Canvas
from mechmm.results.plots import save_png
from mechmm.testing.processors import tokenizer
from mechmm.testing.vocabulary import WORDS, token

OURS, RAW, BOUND = "mechmm", "Hugging Face, one hook", "rate of matrix products"
GROWTH = "growth"
SHAPES = {
    "small": replace(OVERHEAD["small"], hidden=512),
    "wide": OVERHEAD["small"],
    "7b": OVERHEAD["7b"],
    "tiny": Shape(4, 64, 4, 7, 16, 4, 64, 4, 128, 512, real=False),
}
"""`wide` is `small` with MLPs of twice the width, `tiny` is what `--quick` takes."""
BEFORE, CHANGED = 4, 6
"""Words before the picture, after the first token; and which word behind it, from 0, is another one
in a pair of texts."""
SPANS = ("image", "question", "last")
ANSWER, FOIL = "red", "blue"
SHARPNESS = 2.0
"""Weights of the language model have this standard deviation times d^-0.5, those of the vision
tower this factor. With the usual ones attention of a random model is so flat that many a patched
position moves the metric by less than `CLOSE`, and equal values would prove little."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1.5}
"""How far values may differ, in logits. In bfloat16 rounding alone moves them by half a logit in a
model of 32 layers, so that only gross errors show there."""
NEAR = ">= 0.667"
"""The bound's goal: ours takes one and a half times as long, at most."""
TOKENS = (256, 512, 1024, 2048, 4096)
"""At how many tokens matrix products are tried."""
APART = 8
"""In sweeps that show growth there is a site at every so manieth position."""


@dataclass(frozen=True)
class SweepRow(Row):
    """A row with what its times are made of.

    Attributes:
        cells: sites times pairs of the job.
        sampled: cells that the other side ran in a round.
        rate: of matrix products, in 1e9 floating-point operations a second.
    """

    cells: int | None = None
    sampled: int | None = None
    rate: float | None = None


# The model and its pairs ----------------------------------------------------------------------


def random_llava(shape: Shape, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA from its config classes; the projector reads the last vision layer but one."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.patches * shape.patch,
        patch_size=shape.patch,
        initializer_factor=SHARPNESS,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        initializer_range=SHARPNESS * shape.width**-0.5,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token("<image>"),
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def processor(shape: Shape) -> LlavaProcessor:
    """One that needs no download: a word a token, pictures stretched to the tower's size."""
    side = dict.fromkeys(("height", "width"), shape.patches * shape.patch)
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer(),
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def picture(seed: int) -> Image.Image:
    """8 x 8 coloured fields in 320 x 240 pixels, which the processor resizes."""
    fields = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(fields).resize((320, 240), Image.Resampling.NEAREST)


def prompt(shape: Shape, seed: int, changed: int | None = None) -> Prompt:
    """Words around a picture, `shape.words` of them with the first token; one may be another."""
    words = [WORDS[i % len(WORDS)] for i in range(shape.words - 1)]
    if changed is not None:
        words[changed] = WORDS[(changed + 1) % len(WORDS)]
    return Prompt(" ".join([*words[:BEFORE], "<image>", *words[BEFORE:]]), (picture(seed),))


class Task:
    """A model, wrapped and bare, and pairs of prompts for it.

    Attributes:
        pairs: `"image"`: two pictures each; `"word"`: one word differs, one pair.
        positions: of every prompt.
        changed: the position of that word.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, pairs: int = 1) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.model = self.make()
        self.hooked = mm.HookedMultimodal.from_hf(shared(self.model), processor(shape))
        self.positions = shape.words + shape.patches**2
        word = BEFORE + min(CHANGED, shape.words - BEFORE - 2)
        self.changed = 1 + shape.patches**2 + word
        images = [(prompt(shape, 2 * i), prompt(shape, 2 * i + 1)) for i in range(pairs)]
        words = [(prompt(shape, 0), prompt(shape, 0, word))]
        self.pairs = {"image": self.dataset(images), "word": self.dataset(words)}
        self.answer, self.foil = (self.hooked.answer_tokens(text)[0] for text in (ANSWER, FOIL))

    def make(self) -> LlavaForConditionalGeneration:
        return random_llava(self.shape, self.device, self.dtype)

    def dataset(self, prompts: Sequence[tuple[Prompt, Prompt]]) -> mm.PairDataset:
        pairs = [mm.Pair(clean, corrupt, ANSWER, FOIL) for clean, corrupt in prompts]
        return mm.PairDataset(pairs, self.hooked)

    def score(self, logits: Tensor) -> float:
        """The logit difference after the last position, from [1, pos, vocab]."""
        return (logits[0, -1, self.answer] - logits[0, -1, self.foil]).item()


# Jobs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What is swept.

    Attributes:
        name: as the table has it.
        pair: which of a task's pairs.
        sites: those of a task.
        goal: how many times less than TransformerLens's loop it is to take on the small model.
    """

    name: str
    pair: str
    sites: Callable[[Task], Sites]
    goal: float = 1


def residual(task: Task, start: int = 0, step: int = 1) -> Sites:
    """The language model's residual stream before every block, position by position."""
    positions = range(start, task.positions, step)
    return mm.sites.residual(task.hooked, positions=positions, towers=["language"])


def affected(task: Task) -> Sites:
    """The same from the changed word on: before it the two prompts are one."""
    return residual(task, start=task.changed)


def heads(task: Task, tower: str) -> Sites:
    """All heads of a tower, each at all positions together."""
    return mm.sites.heads(task.hooked, towers=[tower])


def mixed(task: Task) -> Sites:
    """A first look: residual stream, heads, MLPs and attention of both towers, span by span."""
    kinds = (mm.sites.residual, mm.sites.heads, mm.sites.mlps, mm.sites.attention)
    tables = [kind(task.hooked, SPANS).table for kind in kinds]
    return Sites(pd.concat(tables, ignore_index=True))


RESIDUAL = Job("residual, image pair", "image", residual, 11)
JOBS = {
    "residual": RESIDUAL,
    "word": Job("residual, word pair", "word", residual, 300),
    "affected": Job("residual, word pair, affected cells", "word", affected, 30),
    "language-heads": Job("language heads", "image", partial(heads, tower="language"), 4),
    "vision-heads": Job("vision heads", "image", partial(heads, tower="vision"), 1.8),
    "mixed": Job("mixed", "image", mixed, 6),
}
SPARSE = Job("sparse residual", "image", partial(residual, step=APART))
"""What growth is shown on."""


class Ours:
    """`mechmm.patch` on a whole job.

    Attributes:
        values: what the last run found [site, example].
    """

    values: Tensor

    def __init__(self, task: Task, job: Job) -> None:
        self.model, self.pairs, self.sites = task.hooked, task.pairs[job.pair], job.sites(task)

    def __call__(self) -> None:
        self.values = mm.patch(self.model, self.pairs, self.sites, n_null=0).values


# Cells ----------------------------------------------------------------------------------------

PLACES = {
    "resid_pre": ("", "", "input"),
    "head": ("self_attn.out_proj", "self_attn.o_proj", "input"),
    "attn": ("self_attn.out_proj", "self_attn.o_proj", "output"),
    "mlp": ("mlp", "mlp", "output"),
}
"""Of every kind of site: a module in a block of the vision tower, one in a block of the language
model, and whether the site is what this is given or what it gives [1, pos, d]."""
BLOCKS = {"vision": "model.vision_tower.encoder.layers", "language": "model.language_model.layers"}
BRIDGE_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "head": "attn.hook_z",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
}
"""The bridge has hooks at all of these places, in both towers."""
BRIDGE_BLOCKS = {"vision": "vision_encoder.encoder_layers", "language": "blocks"}


@dataclass(frozen=True)
class Place:
    """A tensor of the model: a kind of site in a block of a tower."""

    tower: str
    kind: str
    layer: int

    @property
    def path(self) -> str:
        """Of the module in the Hugging Face model."""
        inside = PLACES[self.kind][self.tower == "language"]
        return f"{BLOCKS[self.tower]}.{self.layer}.{inside}".rstrip(".")

    @property
    def before(self) -> bool:
        """Whether it is what the module is given."""
        return PLACES[self.kind][2] == "input"

    @property
    def hook(self) -> str:
        """Of the bridge."""
        return f"{BRIDGE_BLOCKS[self.tower]}.{self.layer}.{BRIDGE_HOOKS[self.kind]}"

    def listen(self, model: nn.Module, function: Callable[[Tensor], None]) -> Any:
        """Call a function with the tensor, which it may write to; returns the handle."""
        module = model.get_submodule(self.path)
        if self.before:
            return module.register_forward_pre_hook(lambda _, args: function(args[0]))
        return module.register_forward_hook(lambda _, args, output: function(output))


@dataclass(frozen=True)
class Cell:
    """One site of one pair.

    Attributes:
        where: positions and columns of the place's tensor, as an index of [1, pos, d].
        value: clean values to write there.
        inputs: the corrupt prompt.
    """

    place: Place
    where: tuple[Any, ...]
    value: Tensor
    inputs: dict[str, Any]

    def write(self, tensor: Tensor) -> None:
        """Write the values into the place's tensor, which has its heads apart or not."""
        tensor.view(*tensor.shape[:2], -1)[self.where] = self.value


def cells_of(task: Task, job: Job) -> list[Cell]:
    """The cells of a job in the order of values [site, example], with the values of one run of
    every clean prompt."""
    rows = list(job.sites(task).table.itertuples())
    batches = list(task.pairs[job.pair].batches(1))
    places = [Place(str(row.tower), str(row.kind), int(row.layer)) for row in rows]
    indices = [_where(task, row, batches[0].clean.layout) for row in rows]
    clean = [_read(task, dict.fromkeys(places), _inputs(batch.clean)) for batch in batches]
    corrupt = [_inputs(batch.corrupt) for batch in batches]
    return [
        Cell(place, where, values[place][where], inputs)
        for place, where in zip(places, indices, strict=True)
        for values, inputs in zip(clean, corrupt, strict=True)
    ]


def _inputs(batch: mm.Batch) -> dict[str, Any]:
    """Of a Hugging Face model that is to keep no keys and values."""
    return {**batch.inputs, "use_cache": False}


def _where(task: Task, row: Any, layout: mm.TokenLayout) -> tuple[Any, ...]:
    """A site as an index of its place's tensor [1, pos, d]."""
    columns = slice(None)
    if row.kind == "head":
        shape, vision = task.shape, row.tower == "vision"
        width, count = (
            (shape.vision_width, shape.vision_heads) if vision else (shape.width, shape.heads)
        )
        columns = slice(row.head * width // count, (row.head + 1) * width // count)
    return slice(None), _positions(task, row, layout), columns


def _positions(task: Task, row: Any, layout: mm.TokenLayout) -> slice | Tensor:
    if not row.span:
        return slice(row.position, row.position + 1)
    if row.span == "all":
        return slice(None)
    if row.tower == "vision":
        found = [position for _, position in layout.vision_positions(row.span)]
    else:
        found = layout.positions(row.span)
    return torch.tensor(found, device=task.device)


def _read(task: Task, places: Iterable[Place], inputs: dict[str, Any]) -> dict[Place, Tensor]:
    """What places hold in one run of the Hugging Face model."""
    found: dict[Place, Tensor] = {}

    def keep(place: Place) -> Callable[[Tensor], None]:
        return lambda tensor: found.update({place: tensor.clone()})

    handles = [place.listen(task.model, keep(place)) for place in places]
    task.model(**inputs, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return found


# The others -----------------------------------------------------------------------------------


class Bridge:
    """TransformerLens's bridge, as its own patching loop runs it."""

    def __init__(self, task: Task) -> None:
        model = shared(task.model)
        self.model = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def logits(self, cell: Cell) -> Tensor:
        def restore(value: Tensor, hook: Any) -> Tensor:
            cell.write(value)
            return value

        ids, others = self.split(cell.inputs)
        return self.model.run_with_hooks(ids, fwd_hooks=[(cell.place.hook, restore)], **others)

    def cache(self, cells: Sequence[Cell]) -> object:
        """What all places of some cells of one prompt hold."""
        ids, others = self.split(cells[0].inputs)
        names = list(dict.fromkeys(cell.place.hook for cell in cells))
        return self.model.run_with_cache(ids, names_filter=names, **others)

    def split(self, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Tokens, and everything else."""
        return inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}


class NNsight:
    """nnsight, one trace for every cell."""

    def __init__(self, task: Task) -> None:
        self.model = nnsight.NNsight(shared(task.model))

    def logits(self, cell: Cell) -> Tensor:
        module, before = self.module(cell.place.path), cell.place.before
        with self.model.trace(**cell.inputs, logits_to_keep=1):
            if before:
                module.input[cell.where] = cell.value
            else:
                module.output[cell.where] = cell.value
            logits = self.model.output.logits.save()
        return logits

    def module(self, path: str) -> Any:
        """A module as nnsight wraps it."""
        found = self.model
        for name in path.split("."):
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        return found


class Raw:
    """The Hugging Face model with one PyTorch hook."""

    def __init__(self, task: Task) -> None:
        self.model = shared(task.model)

    def logits(self, cell: Cell) -> Tensor:
        handle = cell.place.listen(self.model, cell.write)
        try:
            return self.model(**cell.inputs, logits_to_keep=1).logits
        finally:
            handle.remove()


PEERS = {BRIDGE: Bridge, NNSIGHT: NNsight, RAW: Raw}


def peers(task: Task, names: Iterable[str] = PEERS) -> dict[str, Any]:
    """The others by name, without those that are not installed."""
    return {name: PEERS[name](task) for name in names if name != NNSIGHT or nnsight is not None}


class Sampled:
    """Another library on some cells of a job, drawn anew in every call.

    Attributes:
        found: (cell's number, value) of all calls.
    """

    def __init__(self, task: Task, peer: Any, cells: Sequence[Cell], sample: int) -> None:
        self.task, self.peer, self.cells, self.sample = task, peer, cells, sample
        self.random = np.random.default_rng(0)  # all of them draw the same cells
        self.found: list[tuple[int, float]] = []

    def __call__(self) -> None:
        for number in self.random.choice(len(self.cells), self.sample, replace=False).tolist():
            logits = self.peer.logits(self.cells[number])
            self.found.append((number, self.task.score(logits)))

    def gap(self, values: Tensor, what: str) -> float:
        """The largest difference from ours [site, example], in logits.

        Raises:
            AssertionError: where a cell has another value.
        """
        numbers, theirs = zip(*self.found, strict=True)
        gaps = (values.flatten()[list(numbers)] - torch.tensor(theirs)).abs()
        worst, place = float(gaps.max()), self.cells[numbers[int(gaps.argmax())]].place
        assert worst <= CLOSE[self.task.dtype], f"{what}: values differ by {worst:.2g} at {place}"
        return worst


# The bound ------------------------------------------------------------------------------------


def matrices(shape: Shape) -> list[tuple[int, int, int]]:
    """(in, out, how many) of the weights of one block of the language model."""
    return [
        (shape.width, shape.width, 4),
        (shape.width, shape.hidden, 2),
        (shape.hidden, shape.width, 1),
    ]


def per_token(shape: Shape) -> int:
    """Floating-point operations of a block's weights on one token; a sum and a product are two."""
    return sum(2 * width * height * many for width, height, many in matrices(shape))


def operations(shape: Shape, positions: int, layer: int, at: int) -> int:
    """Floating-point operations that follow one position of the residual stream before a block.

    Counted are products with weights and (causal) attention: in every block from `layer` on, at
    every position from `at` on; in the last block only keys and values there, and everything else
    at the last position; then two logits. Keys and values before `at` are there already. (In
    block `layer` itself only one position's queries, keys and values are new, so that a few per
    cent less is possible.)
    """
    new, width, block = positions - at, shape.width, per_token(shape)
    seen = (positions * (positions + 1) - at * (at + 1)) // 2  # by all new positions together
    full = new * block + 4 * width * seen
    keys_values = 4 * width**2
    last = new * keys_values + (block - keys_values) + 4 * width * positions
    return (shape.layers - 1 - layer) * full + last + 4 * width


def bound(shape: Shape, positions: int) -> int:
    """Operations of a whole sweep of the residual stream, position by position."""
    cells = ((layer, at) for layer in range(shape.layers) for at in range(positions))
    return sum(operations(shape, positions, *cell) for cell in cells)


@dataclass(frozen=True)
class Products:
    """The products of many tokens with the weights of one block, each alone, some times over.

    Every weight comes as often as in a block, so that the rate is that of the mixture, and lies as
    a model has it, [out, in].

    Attributes:
        rate: floating-point operations a second.
        parts: tokens [token, in], weights [in, out], and how many of these a block has.
    """

    shape: Shape
    tokens: int
    parts: list[tuple[Tensor, Tensor, int]]
    rate: float = 0
    times: int = 1

    @classmethod
    def fastest(cls, task: Task, seconds: float = 0.5) -> Products:
        """Those with the number of tokens that has the highest rate, for about so many seconds: few
        tokens wait for weights to be read, many for themselves."""
        best = max((cls.of(task, tokens) for tokens in TOKENS), key=lambda found: found.rate)
        return replace(best, times=max(1, round(seconds * best.rate / best.operations)))

    @classmethod
    def of(cls, task: Task, tokens: int) -> Products:
        """Those of so many tokens, once, at the best rate of three."""
        options = {"device": task.device, "dtype": task.dtype}
        parts = [
            (torch.randn(tokens, width, **options), torch.randn(height, width, **options).t(), many)
            for width, height, many in matrices(task.shape)
        ]
        products = cls(task.shape, tokens, parts)
        products()
        best = min(milliseconds(products, task.device) for _ in range(3))
        return replace(products, rate=1000 * products.operations / best)

    def __call__(self) -> None:
        for _ in range(self.times):
            for tokens, weights, many in self.parts:
                for _ in range(many):
                    torch.mm(tokens, weights)

    @property
    def operations(self) -> int:
        """Of one call."""
        return self.times * self.tokens * per_token(self.shape)


# Measuring ------------------------------------------------------------------------------------


class Race:
    """Ours on a whole job and the others on some of its cells, one round after another.

    Attributes:
        times: seconds of every side in every round, scaled to all cells.
        gaps: the largest difference of the others' values from ours, in logits.
        values: ours [site, example].
    """

    def __init__(
        self,
        task: Task,
        job: Job,
        others: Mapping[str, Any],
        rounds: int,
        sample: int,
        products: Products | None = None,
    ) -> None:
        self.job, self.cells, self.ours = job, cells_of(task, job), Ours(task, job)
        self.sample = min(sample, len(self.cells))
        drawn = {n: Sampled(task, peer, self.cells, self.sample) for n, peer in others.items()}
        sides: dict[str, Any] = {OURS: self.ours, **drawn}
        scales = {OURS: 1.0} | dict.fromkeys(drawn, len(self.cells) / self.sample)
        if products is not None:
            sides[BOUND] = products
            scales[BOUND] = bound(task.shape, task.positions) / products.operations
        for side in sides.values():
            side()
        self._compare(drawn)  # before anything is timed
        found = interleaved(sides, rounds, task.device, warm=True)
        self.times = {n: [scales[n] * taken / 1000 for taken in found[n]] for n in found}
        self._compare(drawn)

    def _compare(self, drawn: Mapping[str, Sampled]) -> None:
        self.values = self.ours.values
        self.gaps = {n: some.gap(self.values, f"{self.job.name}, {n}") for n, some in drawn.items()}

    def row(self, name: str, job: str, goal: str | None, **more: Any) -> SweepRow:
        """Ours against one other side."""
        gap = self.gaps.get(name)
        row = compare(job, name, "s", self.times[OURS], self.times[name], goal, gap, turned=True)
        return SweepRow(**asdict(row), cells=len(self.cells), **more)

    def tell(self) -> None:
        """Print what there is to know beside the ratios."""
        low, high = float(self.values.min()), float(self.values.max())
        print(f"{self.job.name}: {len(self.cells)} cells; values from {low:.3f} to {high:.3f}")
        for name, taken in self.times.items():
            each = 1000 * statistics.median(taken) / len(self.cells)
            gap = f", values within {self.gaps[name]:.1g}" if name in self.gaps else ""
            print(f"    {name}: {each:.4g} ms per cell{gap}", flush=True)


@torch.no_grad()
def measure(
    shape: Shape,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sample: int = 8,
    jobs: Sequence[str] = tuple(JOBS),
) -> list[SweepRow]:
    """The table: every job beside every other library; for the first also the bound and memory.

    Args:
        sample: cells that the others run in a round.
        jobs: keys of `JOBS`.
    """
    task = Task(shape, device, dtype)
    others, products = peers(task), Products.fastest(task)
    print(
        f"matrix products of a block: {products.rate / 1e9:.4g}e9 floating-point operations a "
        f"second, with {products.tokens} tokens"
    )
    rows = []
    for job in (JOBS[key] for key in jobs):
        bounded = job is RESIDUAL
        race = Race(task, job, others, rounds, sample, products if bounded else None)
        race.tell()
        rows += [_peer_row(task, race, name) for name in PEERS]
        if bounded:
            rows += [_bound_row(task, race), _peak_row(task, race, others[BRIDGE])]
    return rows


def _peer_row(task: Task, race: Race, name: str) -> SweepRow:
    """At least as fast as every other; on the small model, as many times as was aimed at."""
    if name not in race.times:
        return SweepRow(race.job.name, name, "s", note="it is not installed")
    aim = race.job.goal if name == BRIDGE and task.shape == SHAPES["small"] else 1
    goal = f">= {aim}" if task.shape.real else None
    return race.row(name, race.job.name, goal, sampled=race.sample)


def _bound_row(task: Task, race: Race) -> SweepRow:
    """The bound over ours, which is the share of the rate that ours reaches."""
    goal = NEAR if task.shape.real else None
    seconds = statistics.median(race.times[BOUND])
    rate = bound(task.shape, task.positions) / seconds / 1e9
    row = race.row(BOUND, f"{race.job.name}, floating-point bound", goal, rate=rate)
    print(
        f"    the bound is {seconds:.4g} s at {rate:.4g}e9 a second: {OURS} takes "
        f"{row.ours / seconds:.3g} times the bound, {row.ratio:.0%} of the rate"
    )
    return row


def _peak_row(task: Task, race: Race, bridge: Bridge) -> SweepRow:
    """The sweep's peak memory beside that of one run that caches what is patched."""
    mine = peak_bytes(race.ours, task.device, warm=True) / 1e6
    other = peak_bytes(lambda: bridge.cache(race.cells), task.device) / 1e6
    job, against = f"{race.job.name}: peak memory", f"{BRIDGE}, run_with_cache"
    goal = ">= 1" if task.shape.real else None
    row = compare(job, against, "MB", [mine], [other], goal, turned=True)
    return SweepRow(**asdict(row), cells=len(race.cells))


# Growth ---------------------------------------------------------------------------------------

Curves = dict[str, list[tuple[int, float, float]]]
"""By what grows: (size, seconds of ours, seconds of the loop with one hook)."""


def sizes(shape: Shape) -> dict[str, list[tuple[int, Shape, int]]]:
    """By what grows: (size, shape, pairs), three each."""
    layers = (shape.layers // 2, shape.layers, 2 * shape.layers)
    sides = (shape.patches // 2, shape.patches, 3 * shape.patches // 2)
    return {
        "layers": [(n, replace(shape, layers=n), 1) for n in layers],
        "positions": [(shape.words + n**2, replace(shape, patches=n), 1) for n in sides],
        "pairs": [(n, shape, n) for n in (1, 2, 4)],
    }


@torch.no_grad()
def growth(
    shape: Shape,
    rounds: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    sample: int = 8,
) -> tuple[list[SweepRow], Curves]:
    """How a sweep's cost grows, beside that of one run per cell: a row for every size, and one for
    the exponents of both."""
    races: dict[tuple[Shape, int], Race] = {}
    rows: list[SweepRow] = []
    curves: Curves = {what: [] for what in sizes(shape)}
    for what, steps in sizes(shape).items():
        for size, *key in steps:
            grown, pairs = key
            if (grown, pairs) not in races:
                task = Task(grown, device, dtype, pairs)
                races[grown, pairs] = Race(task, SPARSE, peers(task, [RAW]), rounds, sample)
            race, goal = races[grown, pairs], ">= 1" if shape.real else None
            rows.append(race.row(RAW, f"growth, {what} {size}", goal, sampled=race.sample))
            curves[what].append((size, rows[-1].ours, rows[-1].theirs))
        mine, other = exponents(curves[what])
        row = compare(f"growth with {what}", RAW, "exponent", [mine], [other], None, turned=True)
        rows.append(SweepRow(**asdict(row)))
    return rows, curves


def exponents(curve: Sequence[tuple[int, float, float]]) -> tuple[float, float]:
    """Slopes of the logarithms of ours and theirs: seconds go with size to that power."""
    size, mine, other = np.log(np.array(curve, dtype=float)).T
    return float(np.polyfit(size, mine, 1)[0]), float(np.polyfit(size, other, 1)[0])


def figure(curves: Curves) -> go.Figure:
    """Seconds by size, both axes logarithmic, a panel for everything that grows."""
    seconds = [second for curve in curves.values() for _, *both in curve for second in both]
    ends = [math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))]
    left, wide, high = 56, 250, 240
    slot = left + wide + GAP
    subtitle = f"residual stream, a site at every {APART}th position; seconds of all cells"
    canvas = Canvas.titled("What a sweep costs as it grows", subtitle, 3 * slot, HEAD + high + 64)
    for i, (what, curve) in enumerate(curves.items()):
        mine, other = exponents(curve)
        heading = f"{what}: powers {mine:.1f} and {other:.1f}"
        axes = canvas.place(i, (i * slot + left, HEAD, wide, high), heading)
        x, *both = zip(*curve, strict=True)
        for name, color, y in zip((OURS, RAW), (COLORS[-2], COLORS[1]), both, strict=True):
            line = go.Scatter(x=x, y=y, name=name, line_color=color, showlegend=not i, **axes)
            canvas.figure.add_trace(line)
        number = axes["xaxis"].removeprefix("x")
        ticks = {"type": "log", "tickvals": x, "ticktext": x, "zeroline": False, "showgrid": False}
        values = {"type": "log", "range": ends, "dtick": 1, "gridcolor": "#e6e8eb"}
        canvas.figure.update_layout({f"xaxis{number}": ticks, f"yaxis{number}": values})
    legend = {"orientation": "h", "x": 0, "y": 0, "yanchor": "bottom"}
    return canvas.figure.update_layout(legend=legend)


def draw(curves: Curves, file: Path) -> None:
    """Write the figure as HTML, or as PNG where the name says so and kaleido is there."""
    drawn = figure(curves)
    if file.suffix == ".png":
        try:
            save_png(drawn, file)
            return
        except RuntimeError as error:
            file = file.with_suffix(".html")
            print(f"{error}; the figure is {file.name}")
    drawn.write_html(file)


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=5, help="each side runs so often (5)")
    options.add_argument("--sample", type=int, default=8, help="cells of the others a round (8)")
    options.add_argument("--jobs", nargs="+", choices=(*JOBS, GROWTH), default=(*JOBS, GROWTH))
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--figure", type=Path, metavar="FILE", help="growth, as .html or .png")
    chosen = options.parse_args()
    settle()
    shape = SHAPES["tiny" if chosen.quick else chosen.shape]
    how = (2 if chosen.quick else chosen.rounds, chosen.device, getattr(torch, chosen.dtype))
    rows = measure(shape, *how, chosen.sample, [job for job in chosen.jobs if job != GROWTH])
    if GROWTH in chosen.jobs and not chosen.quick:
        grown, curves = growth(shape, *how, chosen.sample)
        rows += grown
        if chosen.figure is not None:
            draw(curves, chosen.figure)
    print(f"times of the others are those of {chosen.sample} cells a round, scaled to all cells")
    report(rows, chosen.json)


if __name__ == "__main__":
    main()
