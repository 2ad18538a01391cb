"""Early exit: from which layer on does the model say what it will say?

After every block, the stream at the last position goes straight through the final norm and the
unembedding, as if the blocks behind it were left out:

    logits_l = unembed(norm(x_l)),   x_l what leaves block l (l = -1: what enters block 0).

`agreement` is whether the likeliest token is that of the whole model, `logit_diff` the answer's
logit less the foil's. This is what the model would say if it ended there, so it is an intervention
on the model itself; that a layer is readable does not say that later layers read it so. Its null
compares a layer's token with what the whole model says to other pairs.

nostalgebraist 2020 (logit lens); Schuster et al. 2207.07061 (confident early exit); Elhoushi et al.
2404.16710 (exits of a model that was not trained for them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import logit_diff
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.exits import exits_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval


@dataclass(frozen=True, eq=False)
class EarlyExit(Result):
    """What the model would say after every layer.

    Attributes:
        said: the likeliest token [layer, example]; the first row is what enters block 0, the last
            what the whole model says.
        answered: whether it is the answer [layer, example].
        logit_diff: logit of the answer less that of the foil [layer, example].
        layers: -1 (what enters block 0), 0, 1, ...
    """

    said: Int[Tensor, "layer example"] = field(metadata={"axis": 1})
    answered: Bool[Tensor, "layer example"] = field(metadata={"axis": 1})
    logit_diff: Float[Tensor, "layer example"] = field(metadata={"axis": 1})
    layers: tuple[int, ...]

    @property
    def agreement(self) -> Bool[Tensor, "layer example"]:
        """Whether a layer says what the whole model says."""
        return self.said == self.said[-1]

    def null(self) -> Float[Tensor, "layer example"]:
        """How often a layer says to an example what the whole model says to another one."""
        final = self.said[-1]
        same = (self.said[:, :, None] == final).float()
        same.diagonal(dim1=1, dim2=2).zero_()
        return same.sum(2) / max(1, len(final) - 1)

    def exits(self) -> Int[Tensor, " example"]:
        """The first layer from which on an example's token stays what it is in the end."""
        stays = self.agreement.flip(0).int().cumprod(0).sum(0)
        return torch.tensor(self.layers)[len(self.layers) - stays]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per layer: shares of examples that agree, with interval, and the null; share
        answered; mean logit difference, with interval; share that has come to its end (`settled`).
        """
        low, high = bootstrap_interval(self.agreement)
        diff_low, diff_high = bootstrap_interval(self.logit_diff)
        null_low, null_high = bootstrap_interval(self.null())
        exits = self.exits()
        return pd.DataFrame(
            {
                "layer": self.layers,
                "agreement": self.agreement.float().mean(1),
                "low": low,
                "high": high,
                "null": self.null().mean(1),
                "null_low": null_low,
                "null_high": null_high,
                "answered": self.answered.float().mean(1),
                "logit_diff": self.logit_diff.mean(1),
                "diff_low": diff_low,
                "diff_high": diff_high,
                "settled": [float((exits <= layer).float().mean()) for layer in self.layers],
            }
        )

    def plot(self) -> dict[str, Figure]:
        """Figures by name: `agreement` (with the share answered) and `logit_diff` over layers."""
        table = self.to_dataframe()
        x = table.assign(x=table["layer"])
        nothing = x.assign(low=np.nan, high=np.nan)
        of = f"{self.said.shape[1]} pairs; layer −1 is what enters the first block"
        agreement = plots.lines(
            {
                "as the whole model": x.assign(value=x["agreement"]),
                "the answer": nothing.assign(value=x["answered"]),
            },
            "what the model says if it ends after a layer",
            of,
            y_title="share of pairs",
            null=pd.DataFrame({"x": x["layer"], "low": x["null_low"], "high": x["null_high"]}),
            null_title="as it says to other pairs",
        )
        diff = x.assign(value=x["logit_diff"], low=x["diff_low"], high=x["diff_high"])
        series = {"answer less foil": diff}
        title = "logit difference if the model ends after a layer"
        return {
            "agreement": agreement,
            "logit_diff": plots.lines(series, title, of, y_title="logit difference"),
        }

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: both figures and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Layers", contents)], facts or {})

    def summary(self) -> str:
        """When half of the pairs, and when all, have come to their end."""
        exits = self.exits().float()
        return (
            f"{len(exits)} pairs, {len(self.layers) - 1} layers. Half of the pairs say what the "
            f"whole model says from layer {exits.median():.0f} on, all from layer "
            f"{exits.max():.0f} on."
        )


def early_exit(
    model: HookedMultimodal, pairs: PairDataset, *, prompt: str = "clean", batch_size: int = 16
) -> EarlyExit:
    """Read every layer at the last position with the final norm and the unembedding.

    Args:
        prompt: `"clean"` or `"corrupt"`: which of a pair's prompts runs.
        batch_size: pairs that run together.

    Raises:
        ValueError: an unknown prompt; answers of several tokens; a model whose logits are not what
            its final norm and unembedding give.
    """
    if prompt not in ("clean", "corrupt"):
        raise ValueError(f"unknown prompt {prompt!r}; use clean, corrupt")
    parts = [_batch(model, batch, prompt) for batch in pairs.batches(batch_size)]
    said, answered, diff = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return EarlyExit(said, answered, diff, tuple(range(-1, len(said) - 1)))


def _batch(model: HookedMultimodal, batch: PairBatch, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, whether they are the answers, and logit differences [layer, example]."""
    if not batch.answers.single:
        raise ValueError(
            "an answer or foil has several tokens; an exit says one token: use answers of one token"
        )
    said, diffs = [], []
    for logits in exits_of(model, getattr(batch, prompt)):
        said.append(logits.argmax(-1).cpu())
        diffs.append(logit_diff(logits, batch.answers).float().cpu())
    tokens = torch.stack(said)
    return tokens, tokens == batch.answers.answer_ids[:, 0].cpu(), torch.stack(diffs)
