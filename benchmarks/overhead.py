"""What hooks cost: time and memory of mechmm beside the bare model and two other libraries.

A random LLaVA with one picture does the same jobs wrapped in mechmm, in TransformerLens's bridge
and in nnsight, and runs bare in Hugging Face with fused attention. All sides share one set of
weights, get ready inputs and give all logits; their numbers are compared before anything is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from _timing import Row, compare, interleaved, parser, peak_bytes, report, settle

# isort: split
import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mechmm as mm

try:
    import nnsight
except ImportError:
    nnsight = None

JOBS = {
    "forward": "forward, no hooks",
    "residuals": "cache all residuals",
    "pattern": "cache one layer's patterns",
    "patch_residual": "patch one residual position",
    "patch_head": "patch one head's z",
    "gradients": "gradients at all residuals",
}
"""What is timed, by the method that does it."""
OURS, BARE = "mechmm", "Hugging Face forward, SDPA"
BRIDGE, NNSIGHT = "TransformerLens bridge", "nnsight"
GOALS = {("forward", BARE): "<= 1.03", ("residuals", BARE): "<= 1.10"}
"""Of time; all others are to be below 1."""
PEAK_GOALS = {BRIDGE: "< 1", NNSIGHT: "<= 1"}
HEAVY = ("forward", "residuals")
"""Whose peak memory is measured, too."""
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
"""How far numbers may differ, as a part of the largest: the bridge runs attention step by step."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA whose two towers may differ."""

    vision_layers: int
    vision_width: int
    vision_heads: int
    patches: int  # in a row of the picture
    patch: int
    layers: int
    width: int
    heads: int
    hidden: int
    vocabulary: int = 32_000
    words: int = 34
    real: bool = True  # large enough that goals beside the bare model mean something


SHAPES = {
    "small": Shape(12, 256, 8, 14, 16, 12, 384, 8, 1024),
    "7b": Shape(24, 1024, 16, 24, 14, 32, 4096, 32, 11_008),
    "thin": Shape(12, 32, 2, 3, 4, 12, 32, 2, 64, 64, 8, real=False),
}
"""`thin` has hardly any mathematics in it, so that the cost of the hooks themselves shows."""


def random_llava(shape: Shape, device: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """A LLaVA from its config classes; every vision layer feeds the answer, so none is idle."""
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.patches * shape.patch,
        patch_size=shape.patch,
    )
    text = LlamaConfig(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=shape.vocabulary - 1,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_inputs(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One picture amid words."""
    random = torch.Generator().manual_seed(1)
    words = torch.randint(3, shape.vocabulary - 1, (shape.words,), generator=random)
    picture = torch.full((shape.patches**2,), shape.vocabulary - 1)
    ids = torch.cat([words[:5], picture, words[5:]])[None]
    side = shape.patches * shape.patch
    pixels = torch.randn(1, 3, side, side, generator=random).to(device, dtype)
    ids = ids.to(device)
    # Weights are frozen and pixels ask for a gradient, so that every residual has one.
    pixels.requires_grad_()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def shared(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A copy with modules and configs of its own, and the same weights."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


class Task:
    """What every side is given, and where it patches: half way, in the language model."""

    position, head = 7, 1

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.model = random_llava(shape, device, dtype)
        self.inputs = random_inputs(shape, device, dtype)
        self.shape, self.layer, self.d_head = shape, shape.layers // 2, shape.width // shape.heads
        self.patch = torch.linspace(-2, 2, shape.width, device=device, dtype=dtype)
        self.patch_z = self.patch[: self.d_head]


def score(logits: Tensor) -> Tensor:
    """The logit difference of two words at the last position."""
    return logits[0, -1, 3] - logits[0, -1, 4]


class Bare:
    """The Hugging Face model alone, which only runs."""

    def __init__(self, task: Task) -> None:
        self.model, self.inputs = shared(task.model), {**task.inputs, "use_cache": False}

    def forward(self) -> list[Tensor]:
        return [self.model(**self.inputs).logits]


class Hooks:
    """Ours and the bridge, which have TransformerLens's functions and differ in names."""

    model: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    vision = "vision.blocks.{}.hook_resid_pre"

    def __init__(self, task: Task) -> None:
        self.task = task
        self.layer = f"blocks.{task.layer}"
        self.names = [self.vision.format(layer) for layer in range(task.shape.vision_layers)]
        self.names += [f"blocks.{layer}.hook_resid_pre" for layer in range(task.shape.layers)]
        self.patch, self.patch_z = task.patch, task.patch_z

    def forward(self) -> list[Tensor]:
        return [self.model(*self.args, **self.kwargs)]

    def residuals(self) -> list[Tensor]:
        return self.cached(self.names)

    def pattern(self) -> list[Tensor]:
        return self.cached([f"{self.layer}.attn.hook_pattern"])

    def cached(self, names: list[str]) -> list[Tensor]:
        logits, cache = self.model.run_with_cache(*self.args, names_filter=names, **self.kwargs)
        return [logits, *(cache[name] for name in names)]

    def patch_residual(self) -> list[Tensor]:
        def write(value: Tensor, hook: Any) -> Tensor:
            value[:, self.task.position] = self.patch
            return value

        return self.hooked(f"{self.layer}.hook_resid_pre", write)

    def patch_head(self) -> list[Tensor]:
        def write(value: Tensor, hook: Any) -> Tensor:
            self.heads(value)[:, :, self.task.head] = self.patch_z
            return value

        return self.hooked(f"{self.layer}.attn.hook_z", write)

    def heads(self, value: Tensor) -> Tensor:
        return value.view(*value.shape[:2], -1, self.task.d_head)

    def hooked(self, name: str, function: Callable) -> list[Tensor]:
        return [self.model.run_with_hooks(*self.args, fwd_hooks=[(name, function)], **self.kwargs)]

    def gradients(self) -> list[Tensor]:
        found: dict[str, Tensor] = {}

        def keep(gradient: Tensor, hook: Any) -> None:
            found[hook.name] = gradient

        with torch.enable_grad(), self.model.hooks(bwd_hooks=[(n, keep) for n in self.names]):
            logits = self.model(*self.args, **self.kwargs)
            score(logits).backward()
        return [logits.detach(), *found.values()]


class Ours(Hooks):
    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.model = mm.HookedMultimodal.from_hf(shared(task.model))
        self.args, self.kwargs = (mm.Batch.from_inputs(self.model, **task.inputs),), {}


class Bridge(Hooks):
    vision = "vision_encoder.encoder_layers.{}.hook_in"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        model = shared(task.model)
        self.model = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
        self.kwargs = {**task.inputs, "use_cache": False}
        self.args = (self.kwargs.pop("input_ids"),)


class NNsight:
    """Reads patterns from a copy with eager attention, since fused attention gives none."""

    def __init__(self, task: Task) -> None:
        self.task, self.inputs = task, {**task.inputs, "use_cache": False}
        eager = shared(task.model)
        eager.set_attn_implementation("eager")
        self.model, self.eager = nnsight.NNsight(shared(task.model)), nnsight.NNsight(eager)
        inner, language = self.model.model, self.eager.model.language_model
        self.blocks = [*inner.vision_tower.encoder.layers, *inner.language_model.layers]
        self.block = inner.language_model.layers[task.layer]
        self.attention = language.layers[task.layer].self_attn
        self.patch, self.patch_z = task.patch, task.patch_z
        self.head = slice(task.head * task.d_head, (task.head + 1) * task.d_head)

    def forward(self) -> list[Tensor]:
        with self.model.trace(**self.inputs):
            logits = self.model.output.logits.save()
        return [logits]

    def residuals(self) -> list[Tensor]:
        with self.model.trace(**self.inputs):
            values = [block.input for block in self.blocks].save()
            logits = self.model.output.logits.save()
        return [logits, *values]

    def pattern(self) -> list[Tensor]:
        with self.eager.trace(**self.inputs):
            pattern = self.attention.output[1].save()
            logits = self.eager.output.logits.save()
        return [logits, pattern]

    def patch_residual(self) -> list[Tensor]:
        with self.model.trace(**self.inputs):
            self.block.input[:, self.task.position] = self.patch
            logits = self.model.output.logits.save()
        return [logits]

    def patch_head(self) -> list[Tensor]:
        with self.model.trace(**self.inputs):
            self.block.self_attn.o_proj.input[:, :, self.head] = self.patch_z
            logits = self.model.output.logits.save()
        return [logits]

    def gradients(self) -> list[Tensor]:
        with torch.enable_grad(), self.model.trace(**self.inputs):
            values = [block.input for block in self.blocks]
            logits = self.model.output.logits.save()
            with score(logits).backward():
                gradients = [value.grad for value in reversed(values)].save()
        return [logits.detach(), *gradients]


def difference(mine: list[Tensor], theirs: list[Tensor], job: str) -> float:
    """The largest between the logits, which come first.

    Raises:
        AssertionError: where these, or whatever else a job gives, are not the same numbers.
    """
    gaps = []
    for one, other in zip(mine, theirs, strict=True):
        gaps.append((one.float() - other.float()).abs().max().item())
        part = gaps[-1] / other.float().abs().max().item()
        assert part <= CLOSE[one.dtype], f"{job}: numbers differ by {part:.1%} of the largest"
    return gaps[0]


@torch.no_grad()
def measure(
    shape: Shape, rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[Row]:
    """The table: the time of every job, then peak memory of the heavy ones."""
    task = Task(shape, device, dtype)
    ours, bare, bridge = Ours(task), Bare(task), Bridge(task)
    peer = NNsight(task) if nnsight is not None else None
    times, peaks = [], []
    for job, what in JOBS.items():
        sides = {OURS: getattr(ours, job), BRIDGE: getattr(bridge, job)}
        if peer is not None:
            sides[NNSIGHT] = getattr(peer, job)
        gaps = {name: difference(sides[OURS](), side(), what) for name, side in sides.items()}
        if (job, BARE) in GOALS:
            sides[BARE] = bare.forward
            gaps[BARE] = difference(sides[OURS]()[:1], bare.forward(), what)
        goals: dict[str, str | None] = {name: GOALS.get((job, name), "< 1") for name in sides}
        if not shape.real:
            goals[BARE] = None
        times += rows(what, "ms", interleaved(sides, rounds, device), goals, gaps)
        if job in HEAVY:
            found = {name: [peak_bytes(side, device) / 1e6] for name, side in sides.items()}
            peaks += rows(f"{what}: peak memory", "MB", found, PEAK_GOALS, gaps)
    return times + peaks


def rows(
    job: str,
    unit: str,
    found: dict[str, list[float]],
    goals: Mapping[str, str | None],
    gaps: dict[str, float],
) -> list[Row]:
    """Ours against every other side; a peer that is not installed has a row, too."""
    made = [
        compare(job, name, unit, found[OURS], found[name], goals[name], gaps[name])
        for name in (BARE, BRIDGE, NNSIGHT)
        if name in found and name in goals
    ]
    if NNSIGHT not in found:
        made.append(Row(job, NNSIGHT, unit, note="it is not installed"))
    return made


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=31, help="each side runs so often (31)")
    options.add_argument("--shape", choices=SHAPES, default="small")
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = options.parse_args()
    settle()
    rounds = 3 if chosen.quick else chosen.rounds
    dtype = getattr(torch, chosen.dtype)
    report(measure(SHAPES[chosen.shape], rounds, chosen.device, dtype), chosen.json)


if __name__ == "__main__":
    main()
