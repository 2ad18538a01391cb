"""What a sweep over many pairs of a model of 7 billion weights takes on many GPUs, by arithmetic.

The plan of a job on one pair (`Sweep.plan()`) counts its floating-point operations; the model has
the shape of LLaVA-1.5-7B and no weights, so that this runs anywhere in seconds. Everything else is
division by what is given: how many operations a card does in a second (`--rate`, an assumption),
which share of that a sweep reaches (`--efficiency`; docs/performance.md has what was measured on a
CPU), how many cards and pairs there are, and how many pairs a chunk has.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

import sweep
import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

import mechmm as mm
from mechmm.engine.plan import scaled

MEASURED = 1 / 1.12
"""Share of the rate of bare matrix products that the residual job reached on a CPU."""
JOBS = ("mixed", "language-heads", "residual")


@dataclass(frozen=True)
class Cluster:
    """What there is.

    Attributes:
        rate: operations a second that a card sustains in matrix products.
        efficiency: share of that which a sweep reaches.
    """

    cards: int
    pairs: int
    chunk: int
    rate: float
    efficiency: float

    @property
    def rounds(self) -> int:
        """Chunks that the busiest card runs."""
        return math.ceil(math.ceil(self.pairs / self.chunk) / self.cards)

    def seconds(self, flops: float) -> float:
        """Until the last card is done, for so many operations per pair."""
        return self.rounds * self.chunk * flops / (self.rate * self.efficiency)


def weightless(model: nn.Module) -> None:
    """Give every weight of a model on the meta device its shape and no memory."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(1, dtype=weight.dtype).expand(weight.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)


class Planned(sweep.Task):
    """A task that can be planned and not run."""

    def make(self) -> LlavaForConditionalGeneration:
        model = sweep.random_llava(self.shape, "meta", self.dtype)
        weightless(model)
        return model


def plans(shape: str, dtype: torch.dtype, tokens: int) -> dict[str, mm.Sweep]:
    """Sweeps of one pair, by job."""
    task = Planned(sweep.SHAPES[shape], "cpu", dtype)
    jobs = {name: sweep.JOBS[name] for name in JOBS}
    return {
        name: mm.Sweep(task.hooked, task.pairs[job.pair], job.sites(task), tokens=tokens)
        for name, job in jobs.items()
    }


def line(name: str, job: mm.Sweep, cluster: Cluster) -> str:
    """One job in words."""
    plan = job.plan()
    flops, sites = float(plan.flops.sum()), len(job.sites)
    hours = cluster.seconds(flops) / 3600
    naive = cluster.seconds(plan.naive_flops) / 3600
    values = 4 * sites * cluster.pairs
    return (
        f"{name}: {sites:,} sites, {scaled(flops)}FLOP a pair, {scaled(flops * cluster.pairs)}FLOP "
        f"in all; {hours:.2f} h ({naive:.2f} h with a full run a cell, at the same efficiency); "
        f"recorded state {scaled(plan.state_bytes)}B; values {scaled(values)}B"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--shape", choices=sweep.SHAPES, default="7b")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--pairs", type=int, default=10_000)
    options.add_argument("--cards", type=int, default=64)
    options.add_argument("--chunk", type=int, default=32, help="pairs of a chunk (32)")
    options.add_argument("--rate", type=float, default=400e12, help="FLOP/s of a card (400e12)")
    options.add_argument("--efficiency", type=float, default=MEASURED, help="share (1 / 1.12)")
    options.add_argument("--tokens", type=int, default=4096, help="of one pass (4096)")
    chosen = options.parse_args()
    cluster = Cluster(chosen.cards, chosen.pairs, chosen.chunk, chosen.rate, chosen.efficiency)
    chunks = math.ceil(chosen.pairs / chosen.chunk)
    used = chosen.pairs / (cluster.rounds * chosen.chunk * chosen.cards)
    print(
        f"{chunks} chunks, {cluster.rounds} a card at most: cards are busy {used:.1%} of the time"
    )
    dtype = getattr(torch, chosen.dtype)
    for name, job in plans(chosen.shape, dtype, chosen.tokens).items():
        weights = sum(p.numel() for p in job.model.hf_model.parameters()) * dtype.itemsize
        print(line(name, job, cluster), f"weights {scaled(weights)}B", sep="; ")


if __name__ == "__main__":
    main()
