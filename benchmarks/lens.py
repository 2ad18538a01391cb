"""What reading a stream as words costs: mechmm's logit lens beside the bare matrix products.

A random Llama inside a LLaVA is read on text alone, at every layer and position. First its recorded
streams: the products of streams and unembedding alone (in the same groups of rows, into one buffer,
nothing done with them) beside mechmm's readout, with the largest five and the softmax's normaliser,
and with the entropy too. Then the whole call, run included, beside TransformerLens's `logit_lens`
on the same weights. Numbers are compared before anything is timed.
"""

from __future__ import annotations

from dataclasses import replace

from _timing import Row, compare, interleaved, parser, peak_bytes, report, settle
from overhead import SHAPES, Shape, random_llava

# isort: split
import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformer_lens.tools.analysis import logit_lens, logit_readout
from transformers import LlamaForCausalLM

import mechmm as mm
from mechmm.engine.head import head_for
from mechmm.engine.readout import read_out

VOCABULARIES = (32_000, 128_256)
K = 5
ROWS = 256
"""Of the bare products: fewer of them, or more, were slower here."""
WORDS = 1024
"""Words that the bare products make at once: more of them were slower here, too."""
GOALS = {32_000: "<= 1.3", 128_256: "<= 1.4"}
BARE, PEER, LIMIT = "bare matrix products", "TransformerLens logit_lens", "100 MB"


class Task:
    """A model, a prompt of text, and the streams of all layers at all positions."""

    def __init__(self, shape: Shape) -> None:
        loaded = random_llava(shape, "cpu", torch.float32)
        self.model = mm.HookedMultimodal.from_hf(loaded)
        random = torch.Generator().manual_seed(0)
        ids = torch.randint(3, shape.vocabulary - 1, (1, 64), generator=random)
        self.batch = mm.Batch.from_inputs(self.model, input_ids=ids)
        self.head = head_for(self.model, self.batch)
        hooks = ["blocks.0.hook_resid_pre"]
        hooks += [f"blocks.{layer}.hook_resid_post" for layer in range(shape.layers)]
        _, cache = self.model.run_with_cache(self.batch, names_filter=hooks)
        self.stream = torch.cat([cache[hook].flatten(0, 1) for hook in hooks])
        self.normed = self.head.normed(self.stream[None])[0]
        self.bridge = bridge_of(loaded)

    def bare(self) -> None:
        weight = self.head.unembed.weight
        room = torch.empty(ROWS, min(WORDS, len(weight)))
        for rows in self.normed.split(ROWS):
            for words in weight.split(WORDS):
                torch.mm(rows, words.T, out=room[: len(rows), : len(words)])

    def top(self) -> object:
        return read_out(self.head, self.stream, K)

    def entropy(self) -> object:
        return read_out(self.head, self.stream, K, entropy=True)

    def readout(self) -> object:
        return logit_readout(self.bridge, self.stream, top_k=K)

    def ours(self) -> Tensor:
        found = mm.logit_lens(self.model, self.batch, top_k=K, entropy=True)
        return found.logits

    def theirs(self) -> Tensor:
        found = logit_lens(self.bridge, self.batch.input_ids, positions=None, top_k=K)
        return found.values


def bridge_of(loaded: torch.nn.Module) -> object:
    """TransformerLens's view of the language model, on the same weights."""
    inner = loaded.model.language_model
    alone = LlamaForCausalLM(inner.config).eval().requires_grad_(False)
    alone.model.load_state_dict(inner.state_dict())
    alone.lm_head.load_state_dict(loaded.lm_head.state_dict())
    return build_bridge_from_module(alone, "LlamaForCausalLM", hf_config=alone.config)


@torch.no_grad()
def measure(shape: Shape, rounds: int) -> list[Row]:
    """The rows of one vocabulary."""
    task, words = Task(shape), f"{shape.vocabulary:,} words"
    gap = (task.ours() - task.theirs()).abs().max().item()
    assert gap < 1e-2, f"numbers differ by {gap}"
    names = ("bare", "top", "entropy", "readout")
    times = interleaved({name: getattr(task, name) for name in names}, rounds)
    bare = times["bare"]
    goals = (GOALS.get(shape.vocabulary), "<= 1.75", None) if shape.real else (None,) * 3
    jobs = (f"largest {K}", f"largest {K} and entropy", "TransformerLens logit_readout")
    rows = [
        compare(f"{job}, {words}", BARE, "ms", times[name], bare, goal)
        for job, name, goal in zip(jobs, names[1:], goals, strict=True)
    ]
    whole = interleaved({"ours": task.ours, "theirs": task.theirs}, max(1, rounds // 3))
    job = f"whole lens with entropy, {words}"
    rows.append(compare(job, PEER, "ms", whole["ours"], whole["theirs"], "< 1", gap))
    peaks = {name: [peak_bytes(getattr(task, name)) / 1e6] for name in ("ours", "theirs")}
    job = f"its peak memory, {words}"
    rows.append(compare(job, PEER, "MB", peaks["ours"], peaks["theirs"], "< 1"))
    rows.append(compare(job, LIMIT, "MB", peaks["ours"], [100.0], "<= 1"))
    return rows


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--rounds", type=int, help="default: 15, quick: 3")
    given = options.parse_args()
    settle()
    rounds = given.rounds or (3 if given.quick else 15)
    rows = []
    for vocabulary in VOCABULARIES[: 1 if given.quick else 2]:
        shape = replace(SHAPES["small"], vocabulary=vocabulary)
        rows += measure(shape, rounds)
    report(rows, given.json)


if __name__ == "__main__":
    main()
