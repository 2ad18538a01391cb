"""What edge attribution costs, beside the model's own passes and beside other circuit libraries.

Scores of all edges of the random LLaVA of `sweep.py`. Ours is `mm.attribute`, whole, with
everything that belongs to it: prompts are encoded, both run, every edge has a score. Beside it run

- the bare passes that edge attribution cannot do without: a forward pass on one prompt, a forward
  and a backward pass on the other, of the Hugging Face model, with ready inputs;
- the language model alone, on text, in the EAP-IG package, in auto-circuit's mask gradient and in
  TransformerLens's `attribution_patch`, with ready tokens.

The first two of these import classes that TransformerLens 4 no longer has. They run in a process of
their own (`_peers.py`), started with an interpreter that has them (`--peers`), in turn with the
others; what they take is the CPU time of that process. Scores are compared before anything is
timed. Ratios of the others are theirs over ours: how many times less ours takes.

Exact scores, one patched run an edge, are timed on some edges and scaled to all: of three layers of
readers of the language model with us, of edges drawn at random with the others.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _timing import (
    Elsewhere,
    Row,
    compare,
    interleaved,
    parser,
    peak_bytes,
    peak_resident,
    report,
    settle,
)

# isort: split
import numpy as np
import torch
from _peers import AUTO_CIRCUIT, EAP_IG
from exact import seconds, texts
from overhead import Shape, shared
from safetensors.torch import load_file, save_file
from sweep import SHAPES, Task
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    attribution_patch,
)
from transformers import LlamaForCausalLM

import mechmm as mm
from mechmm.data.pairs import Prompt
from mechmm.testing.vocabulary import WORDS

OURS, LENS = "mechmm", "TransformerLens"
ALL, BARE = "bare passes", "bare passes, logits of one position"
STEPS = 5
LENGTHS = (16, 64, 230, 460)
CLOSE = 1e-3
"""How far scores may differ, as a share of the largest."""
INSTALL = "pass --peers an interpreter that has it (docs/benchmarks.md)"


class Case(Task):
    """A model and pairs of prompts, with pictures or of text alone.

    Attributes:
        pairs: `"image"` has pictures, `"text"` has none; both have as many positions.
    """

    def __init__(self, shape: Shape, pairs: int = 1, words: int | None = None) -> None:
        super().__init__(shape, "cpu", torch.float32, pairs)
        self.words = self.positions if words is None else words
        texts = [tuple(text(self.words, 2 * i + j) for j in range(2)) for i in range(pairs)]
        self.pairs["text"] = self.dataset(texts)

    def ours(self, pair: str, method: str, **options: Any) -> mm.Attribution:
        """Scores of all edges."""
        return mm.attribute(self.hooked, self.pairs[pair], method=method, **options)

    def batch(self, pair: str) -> Any:
        """All pairs, ready to run."""
        return self.pairs[pair].batch(range(len(self.pairs[pair])))

    def passes(self, pair: str, keep: int = 1) -> Bare:
        """The bare passes on the same prompts; `keep`: logits of so many positions, 0: of all."""
        return Bare(self, pair, keep)

    def language(self, attribution: mm.Attribution) -> Tensor:
        """Mean scores of the language model alone, in the order of `_peers.Peers.flat`."""
        graph, found = attribution.graph, []
        for block, part in zip(graph.blocks, graph.by_block(attribution.mean()), strict=True):
            if block.tower == "language":
                kinds = graph.writers["kind"].iloc[slice(*block.writers)].to_numpy()
                found.append(torch.from_numpy(part[0][kinds != "projector"]).flatten())
        return torch.cat(found)

    @cached_property
    def alone(self) -> LlamaForCausalLM:
        """The language model by itself, with the same weights."""
        model = LlamaForCausalLM(self.model.config.text_config)
        model.model, model.lm_head = self.model.model.language_model, self.model.lm_head
        return model.eval().requires_grad_(False)


def text(words: int, seed: int) -> Prompt:
    """Words drawn at random; the first position is the tokenizer's own."""
    drawn = random.Random(seed)
    return Prompt(" ".join(drawn.choice(WORDS) for _ in range(words - 1)))


class Bare:
    """A forward pass on the clean prompts, a forward and a backward pass on the corrupt ones."""

    def __init__(self, case: Case, pair: str, keep: int) -> None:
        self.case, self.batch, self.keep = case, case.batch(pair), keep

    def __call__(self) -> None:
        with torch.no_grad():
            self.logits(dict(self.batch.clean.inputs))
        self.both()

    def both(self) -> None:
        """Forward and backward: the slopes at what the first block is given."""
        inputs = dict(self.batch.corrupt.inputs)
        if "pixel_values" in inputs:
            leaf = inputs["pixel_values"] = inputs["pixel_values"].clone().requires_grad_()
        else:
            embed = self.case.model.get_input_embeddings()
            leaf = embed(inputs.pop("input_ids")).detach().requires_grad_()
            inputs["inputs_embeds"] = leaf
        last = self.logits(inputs)
        metric = (last[:, self.case.answer] - last[:, self.case.foil]).sum()
        torch.autograd.grad(metric, leaf)

    def logits(self, inputs: dict[str, Any]) -> Tensor:
        """After the last position."""
        options = {"use_cache": False, "logits_to_keep": self.keep}
        return self.case.model(**inputs, **options).logits[:, -1]


# The others -----------------------------------------------------------------------------------


class Process:
    """`_peers.py` in another interpreter, for one case.

    Attributes:
        missing: by library, why it is not there.
    """

    def __init__(self, case: Case, python: str | None) -> None:
        self.missing: dict[str, str] = {}
        self.folder = TemporaryDirectory()
        if python is None:
            self.missing = dict.fromkeys((EAP_IG, AUTO_CIRCUIT), f"not installed: {INSTALL}")
            return
        self._write(case, Path(self.folder.name))
        script = Path(__file__).with_name("_peers.py")
        command = [python, str(script), self.folder.name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.child = subprocess.Popen(command, **pipes)
        for library in (EAP_IG, AUTO_CIRCUIT):
            found = self.ask(library, "prepare")
            if "missing" in found:
                self.missing[library] = f"not installed: {found['missing']}; {INSTALL}"

    def _write(self, case: Case, folder: Path) -> None:
        config, batch = case.model.config.text_config, case.batch("text")
        setup = {
            "answer": case.answer,
            "foil": case.foil,
            "config": {
                "n_layers": config.num_hidden_layers,
                "d_model": config.hidden_size,
                "n_heads": config.num_attention_heads,
                "d_head": config.hidden_size // config.num_attention_heads,
                "d_mlp": config.intermediate_size,
                "d_vocab": config.vocab_size,
                "n_ctx": case.words,
                "eps": config.rms_norm_eps,
                "rotary_dim": config.hidden_size // config.num_attention_heads,
            },
        }
        (folder / "setup.json").write_text(json.dumps(setup))
        prompts = {name: getattr(batch, name).input_ids for name in ("clean", "corrupt")}
        weights = {name: value.contiguous() for name, value in case.alone.state_dict().items()}
        save_file({**weights, **prompts}, folder / "model.safetensors")

    def ask(self, library: str, job: str, **options: Any) -> dict[str, Any]:
        """One line there, one line back."""
        line = {"library": library, "job": job, "options": options}
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(line) + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError(f"{library} failed at {job}; its error is printed above")
        return json.loads(answer)

    def side(self, library: str, job: str, **options: Any) -> Callable[[], Elsewhere]:
        """A job to be timed."""
        return lambda: Elsewhere(self.ask(library, job, **options)["milliseconds"])

    def scores(self, library: str, job: str, **options: Any) -> Tensor:
        """What a job finds."""
        return load_file(self.ask(library, job, **options)["scores"])["scores"]

    def close(self) -> None:
        """End the process."""
        if hasattr(self, "child"):
            self.child.communicate()
        self.folder.cleanup()


def agree(ours: Tensor, theirs: Tensor, what: str) -> float:
    """The largest difference, as a share of the largest score.

    Raises:
        AssertionError: above `CLOSE`.
    """
    gap = float((ours - theirs).abs().max() / ours.abs().max())
    assert gap <= CLOSE, f"{what}: scores differ by {gap:.2g} of the largest"
    return gap


def told(row: Row) -> Row:
    """The row, printed as soon as it is there."""
    print(" | ".join(map(str, asdict(row).values())), flush=True)
    return row


# Jobs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """How often and with what."""

    rounds: int
    python: str | None
    real: bool
    lengths: Sequence[int]
    sample: int


def text_rows(case: Case, process: Process, run: Run) -> list[Row]:
    """EAP and EAP-IG on text, beside the passes and both packages."""
    rows = []
    goals = {
        "eap": {ALL: "<= 1.6", BARE: "<= 1.6", EAP_IG: ">= 9", AUTO_CIRCUIT: ">= 9"},
        "eap-ig": {EAP_IG: ">= 8", AUTO_CIRCUIT: ">= 11"},
    }
    for job, options in (("eap", {}), ("eap-ig", {"steps": STEPS})):
        method = {"eap": "eap", "eap-ig": "eap-ig-inputs"}[job]
        sides: dict[str, Any] = {OURS: lambda m=method, o=options: case.ours("text", m, **o)}
        ours, gaps = case.language(sides[OURS]()), {}
        if job == "eap":
            sides |= {ALL: case.passes("text", 0), BARE: case.passes("text")}
        passes = (ALL, BARE)
        for library in (name for name in goals[job] if name not in (*passes, *process.missing)):
            sides[library] = process.side(library, job, **options)
            theirs = process.scores(library, job, **options)
            if (library, job) != (AUTO_CIRCUIT, "eap-ig"):  # it integrates over masks
                gaps[library] = agree(ours, theirs, f"{job}, {library}")
        times = interleaved(sides, run.rounds, warm=job == "eap-ig")
        name = {"eap": "EAP", "eap-ig": f"EAP-IG, {STEPS} steps"}[job]
        name += f", text, {len(ours)} edges"
        for other, goal in goals[job].items():
            if other in process.missing:
                rows.append(told(Row(name, other, "ms", note=process.missing[other])))
                continue
            pair = times[OURS], times[other]
            bound, turned = goal if run.real else None, other not in passes
            row = compare(name, other, "ms", *pair, bound, gaps.get(other), turned)
            rows.append(told(row))
    return rows


def tower_rows(shape: Shape, pairs: int, run: Run) -> list[Row]:
    """EAP over both towers as a multiple of the bare passes."""
    case = Case(shape, pairs)
    passes = {ALL: case.passes("image", 0), BARE: case.passes("image")}
    times = interleaved({OURS: lambda: case.ours("image", "eap"), **passes}, run.rounds)
    name = f"EAP, both towers: {shape.layers} layers, {case.positions} positions, pairs: {pairs}"
    goal = "<= 1.6" if run.real else None
    return [told(compare(name, other, "ms", times[OURS], times[other], goal)) for other in passes]


def memory_row(case: Case, run: Run, pairs: int) -> Row:
    """Peak memory of EAP beside that of one forward and backward pass."""
    ours = peak_bytes(lambda: case.ours("image", "eap")) / 1e6
    theirs = peak_bytes(case.passes("image").both) / 1e6
    goal = "<= 2" if run.real else None
    name = f"EAP, both towers, pairs: {pairs}: peak memory"
    return told(compare(name, "one forward and backward pass", "MB", [ours], [theirs], goal))


def split_rows(shape: Shape, run: Run) -> list[Row]:
    """EAP split by position, beside TransformerLens, which has no other edges."""
    rows = []
    for words in run.lengths:
        case = Case(shape, words=words)
        bridge = build_bridge_from_module(
            shared(case.alone), "LlamaForCausalLM", hf_config=case.alone.config
        )
        lens, ours = Lens(case, bridge), lambda c=case: c.ours("text", "eap", spans="positions")
        gap = lens.gap(ours())
        rounds = run.rounds if words < 200 else 1
        times = interleaved({OURS: ours, LENS: lens}, rounds, warm=True)
        above, name = words >= 64 and run.real, f"EAP split by position, {words} positions"
        goals = (">= 30", ">= 9") if above else (None, None)
        pair = times[OURS], times[LENS]
        rows.append(told(compare(name, LENS, "ms", *pair, goals[0], gap, turned=True)))
        memory = [[peak_resident(side) / 1e6] for side in (ours, lens)]
        rows.append(told(compare(f"{name}: memory", LENS, "MB", *memory, goals[1], turned=True)))
    return rows


class Lens:
    """TransformerLens's `attribution_patch`, which takes no pictures."""

    def __init__(self, case: Case, bridge: Any) -> None:
        batch = case.batch("text")
        self.case, self.bridge = case, bridge
        self.tokens = batch.clean.input_ids, batch.corrupt.input_ids

    def __call__(self) -> Any:
        config = EdgeAttributionConfig(granularity="edge")
        weight = self.case.alone.get_input_embeddings().weight
        weight.requires_grad_()  # without it nothing has a gradient
        try:
            return attribution_patch(self.bridge, *self.tokens, self.metric, config=config)
        finally:
            weight.requires_grad_(False)

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, self.case.answer] - logits[0, -1, self.case.foil]

    def gap(self, ours: mm.Attribution) -> float:
        """How far all of its scores, summed over positions, are from ours."""
        sums: dict[tuple, float] = {}
        for (writer, reader), score in self().edge_scores.items():
            ends = (
                (writer.kind, writer.layer, writer.head),
                (reader.kind, reader.layer, reader.head),
            )
            sums[ends] = sums.get(ends, 0.0) + score
        graph = ours.graph
        mean = [part.sum(0, keepdims=True) for part in graph.by_block(ours.mean())]
        flat = []
        for block, part in zip(graph.blocks, mean, strict=True):
            if block.tower == "language":
                kinds = graph.writers["kind"].iloc[slice(*block.writers)].to_numpy()
                flat.append(torch.from_numpy(part[0][kinds != "projector"]).flatten())
        theirs = torch.tensor(self._ordered(sums))
        return agree(torch.cat(flat), theirs, LENS)

    def _ordered(self, sums: dict[tuple, float]) -> list[float]:
        config = self.case.alone.config
        heads, layers = range(config.num_attention_heads), range(config.num_hidden_layers)
        seen: list[tuple] = [("embed", None, None)]
        found = []
        for layer in layers:
            readers = [(f"{letter}_input", layer, head) for letter in "qkv" for head in heads]
            found += [sums[writer, reader] for writer in seen for reader in readers]
            seen += [("attn_head_out", layer, head) for head in heads]
            found += [sums[writer, ("mlp_in", layer, None)] for writer in seen]
            seen.append(("mlp_out", layer, None))
        return found + [sums[writer, ("logits", layers[-1], None)] for writer in seen]


# Exact scores ---------------------------------------------------------------------------------


def exact_rows(case: Case, process: Process, run: Run) -> list[Row]:
    """A patched run an edge, of some drawn at random, scaled to all; ours as in `exact.py`."""
    edges = len(case.language(case.ours("text", "random")))
    name = f"exact, text, {edges} edges"
    if EAP_IG in process.missing:
        return [Row(name, EAP_IG, "s", note=process.missing[EAP_IG])]
    mine = seconds(texts(case), np.random.default_rng(0))
    options = {"edges": run.sample, "seed": 0}
    taken = process.ask(EAP_IG, "exact", **options)["milliseconds"] * edges / run.sample / 1000
    goal = ">= 120" if run.real else None
    return [compare(name, EAP_IG, "s", [mine], [taken], goal, turned=True)]


# The table ------------------------------------------------------------------------------------


def measure(shape: Shape, run: Run, jobs: Sequence[str]) -> list[Row]:
    """The table."""
    rows: list[Row] = []
    alone = {"text": text_rows, "exact": exact_rows}
    for made in (alone[job] for job in alone if job in jobs):
        case = Case(shape)
        with closing(Process(case, run.python)) as process:
            rows += made(case, process, run)
    if "towers" in jobs:
        for size in sizes(shape, run.real):
            rows += tower_rows(*size, run)
    if "memory" in jobs:
        rows += [memory_row(Case(shape, pairs), run, pairs) for pairs in (1, 4)]
    if "split" in jobs:
        rows += split_rows(shape, run)
    return rows


def sizes(shape: Shape, real: bool) -> list[tuple[Shape, int]]:
    """Shapes and numbers of pairs for which both towers are timed."""
    if not real:
        return [(shape, 1), (shape, 2)]
    depths = [replace(shape, layers=layers) for layers in (6, 12, 24)]
    long = [replace(one, patches=20, words=60) for one in depths]
    return [*((one, 1) for one in depths), (depths[1], 4), *((one, 1) for one in long)]


JOBS = ("text", "exact", "towers", "memory", "split")


def main() -> None:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, default=5, help="each side runs so often (5)")
    options.add_argument("--sample", type=int, default=20, help="edges of slow peers (20)")
    options.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="positions, where edges are split"
    )
    options.add_argument("--jobs", nargs="+", choices=JOBS, default=JOBS)
    options.add_argument("--peers", metavar="PYTHON", help="an interpreter that has the packages")
    chosen = options.parse_args()
    settle()
    shape = SHAPES["tiny" if chosen.quick else "small"]
    lengths = LENGTHS[:1] if chosen.quick else chosen.lengths
    rounds = 2 if chosen.quick else chosen.rounds
    run = Run(rounds, chosen.peers, shape.real, lengths, chosen.sample)
    report(measure(shape, run, chosen.jobs), chosen.json)


if __name__ == "__main__":
    main()
