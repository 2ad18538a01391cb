"""Both runs of a batch of pairs, seen from the residual streams of the model.

The clean run is compared with a reference: the corrupt prompt's run, the mean over all clean runs
(of every position of a span, per component), or zeros.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from mechmm.data.metrics import Answers, Metric, prepared, readings
from mechmm.data.metrics import Reading as Part
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.checks import check_choice, check_metric, check_pairs
from mechmm.engine.flow import Flow, hooks_of, slopes, values
from mechmm.engine.hidden import HIDDEN, PROJECTOR, standing
from mechmm.engine.places import spot_of
from mechmm.engine.spans import Places, places_of
from mechmm.engine.splice import Splice, stream_at
from mechmm.engine.wiring import Wiring
from mechmm.engine.writers import Values, Writer, writers_of
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import IMAGE

TARGETS = ("corrupt", "mean", "zero")
"""What takes the place of what is cut off."""
Means = dict[str, dict[str, list[Tensor]]]
"""By tower and hook: the mean in every span, over all clean runs."""


@dataclass(frozen=True, eq=False)
class Contrast:
    """One reading of a batch of pairs.

    Attributes:
        clean_part, corrupt_part: what runs for both prompts.
        clean: the clean run.
        reference: the reference; without a metric where it is no run.
        indices: of the pairs.
    """

    model: HookedMultimodal
    wiring: Wiring
    clean_part: Part
    corrupt_part: Part
    answers: Answers
    clean: Flow
    reference: Flow
    indices: tuple[int, ...]

    @property
    def paired(self) -> bool:
        """Whether the reference is a run of the corrupt prompt."""
        return len(self.reference.metric) > 0

    def between(self, hook: str, way: float) -> Tensor:
        """What a writers' hook gave a part of the way from the reference to the clean run."""
        clean, reference = self.clean.values[hook], self.reference.values[hook]
        return reference + way * (clean - reference)

    def changes(self) -> tuple[Values, Values]:
        """What the writers' hooks gave in the clean run and in the reference."""
        return self.clean.values, self.reference.values

    @cached_property
    def writers(self) -> list[Writer]:
        """How every group of writers writes that ran."""
        seen = self.clean_part.batch.layout.modality >= IMAGE
        groups = [g for g in self.wiring.writers if g.tower in self._ran]
        return writers_of(self.model, groups, seen, self.clean.values)

    @cached_property
    def _ran(self) -> set[str]:
        return {name for name in self.model.towers if self._first(name) in self.clean.values}

    @cached_property
    def places(self) -> Places:
        """Where the spans of the graph lie, also in the projector if its hidden layer is held."""
        layout, spans = self.clean_part.batch.layout, self.wiring.graph.spans
        towers = [t for t in dict.fromkeys(g.tower for g in self.wiring.readers) if t in self._ran]
        found = places_of(layout, towers, spans)
        if HIDDEN in self.clean.values:
            (found[PROJECTOR],) = places_of(layout, [standing(self.model)], spans).values()
        return found

    def _first(self, tower: str) -> str:
        """A hook that shows how many rows and positions a tower has."""
        if tower == PROJECTOR:
            return HIDDEN
        return f"{self.model.towers[tower].prefix}blocks.0.hook_resid_pre"

    def spans(self) -> dict[str, Int[Tensor, "row pos"]]:
        """By tower, the number of the span of every place; -1 for padding."""
        found = {}
        for tower, examples in self.places.items():
            shape = self.clean.values[self._first(tower)].shape[:2]
            found[tower] = torch.full(shape, -1)
            for parts in examples:
                for number, at in enumerate(parts):
                    found[tower][at[:, 0], at[:, 1]] = number
        return found

    def rows(self) -> dict[str, Int[Tensor, " row"]]:
        """By tower, the example of every row; 0 for rows without places."""
        found = {}
        for tower, spans in self.spans().items():
            found[tower] = torch.zeros(len(spans), dtype=torch.long)
            for example, parts in enumerate(self.places[tower]):
                for at in parts:
                    found[tower][at[:, 0]] = example
        return found

    def splice(self) -> Splice:
        """What runs circuits on the batch."""
        return Splice(
            self.model,
            self.wiring,
            self.clean_part,
            self.answers,
            self.writers,
            *self.changes(),
            self.spans(),
            self.rows(),
        )


def contrasts(
    model: HookedMultimodal,
    pairs: PairDataset,
    wiring: Wiring,
    metric: Metric,
    target: str = "corrupt",
    batch_size: int = 16,
    *,
    sloped: Collection[str] = (),
    streams: bool = False,
    also: Sequence[str] = (),
) -> Iterator[list[Contrast]]:
    """Batch by batch, both runs for every reading of the metric, which is the sum over them.

    Args:
        sloped: `"clean"`, `"corrupt"`: runs whose slopes are wanted.
        streams: whether the streams of the corrupt run are wanted, as `Contrast.splice` does.
        also: hooks inside blocks whose values are wanted too.

    Raises:
        ValueError: as `check_contrast`.
        SpanError: a span of the graph that the pairs do not have.
    """
    check_contrast(model, pairs, metric, target)
    runs, means = _Runs(model, wiring, sloped, streams, also), None
    if target == "mean":
        means = mean_values(model, pairs, wiring, metric, batch_size, also)
    for batch in pairs.batches(batch_size):
        yield _batch(runs, batch, metric, target, means)


def check_contrast(
    model: HookedMultimodal, pairs: PairDataset, metric: Metric, target: str
) -> None:
    """Refuse what no circuit can be found or tested with.

    Raises:
        ValueError: pairs that are no dataset, a model that gives no logits after a prompt, a metric
            that does not give one number per example, an unknown target.
    """
    check_choice("target", target, TARGETS)
    check_pairs(pairs, "clean")
    if model.family.unembed is None:
        raise ValueError(
            f"circuits are measured by the logits after the last token of a prompt, and "
            f"{model.family.architecture} gives none: it only encodes; mm.graph(model) has its "
            "edges, and model.hooks or run_with_hooks edits what they carry"
        )
    check_metric(model, pairs, metric)


@dataclass(frozen=True)
class _Runs:
    """What is wanted of runs (arguments as `contrasts`)."""

    model: HookedMultimodal
    wiring: Wiring
    sloped: Collection[str] = ()
    streams: bool = False
    also: Sequence[str] = ()

    def of(self, prompt: str, part: Part, answers: Answers) -> Flow:
        """One run."""
        written, at, normed = hooks_of(self.model, self.wiring)
        streams = self.streams and prompt == "corrupt"
        written = [*written, *self.also]
        also = [*written, *(streams_of(self.model, self.wiring) if streams else ())]
        if prompt not in self.sloped:
            return values(self.model, part, answers, list(dict.fromkeys(also)))
        also = list(dict.fromkeys([*also, *normed]))
        return slopes(self.model, part, answers, at, also)


def _batch(
    runs: _Runs, batch: PairBatch, metric: Metric, target: str, means: Means | None
) -> list[Contrast]:
    answers = prepared(runs.model, batch.clean, batch.answers, metric)
    parts = [readings(prompt, answers, metric) for prompt in (batch.clean, batch.corrupt)]
    found = []
    for both in zip(*parts, strict=True):
        clean = runs.of("clean", both[0], answers)
        reference = runs.of("corrupt", both[1], answers) if target == "corrupt" else Flow({})
        clean_part, corrupt_part = both
        contrast = Contrast(
            runs.model,
            runs.wiring,
            clean_part,
            corrupt_part,
            answers,
            clean,
            reference,
            batch.indices,
        )
        if target != "corrupt":
            contrast = replace(contrast, reference=Flow(_instead(contrast, means)))
        found.append(contrast)
    return found


def streams_of(model: HookedMultimodal, wiring: Wiring) -> list[str]:
    """Hooks of what readers read."""
    names = [stream_at(model, group) for group in wiring.readers]
    return [name for name in dict.fromkeys(names) if name is not None and name in model.hook_dict]


def _instead(contrast: Contrast, means: Means | None) -> dict[str, Tensor]:
    """Zeros, or the means at the places of every span, in the shapes of the clean run."""
    new = {name: torch.zeros_like(value) for name, value in contrast.clean.values.items()}
    if means is None:
        return new
    for tower, hooks in means.items():
        for name, by_span in hooks.items():
            for parts in contrast.places.get(tower, []):
                for number, at in enumerate(parts):
                    new[name][at[:, 0], at[:, 1]] = by_span[number].to(new[name])
    return new


def mean_values(
    model: HookedMultimodal,
    pairs: PairDataset,
    wiring: Wiring,
    metric: Metric,
    batch_size: int,
    also: Sequence[str] = (),
) -> Means:
    """The mean of what every hook of a writer gives, and others (`also`), over all positions of a
    span in the clean runs of all pairs."""
    sums: dict[str, dict[str, list[Tensor]]] = defaultdict(dict)
    counts: dict[str, list[int]] = {}
    for batch in pairs.batches(batch_size):
        runs = _Runs(model, wiring, also=also)
        for contrast in _batch(runs, batch, metric, "zero", None)[:1]:
            hooks = [(w.group.tower, name) for w in contrast.writers for name in w.hooks]
            there = contrast.clean.values
            hooks += [(spot_of(model, name).tower, name) for name in also if name in there]
            for tower, name in dict.fromkeys(hooks):
                _gather(sums[tower], name, contrast, tower)
            _count(counts, contrast.places)
    return {
        tower: {
            name: [total / max(1, n) for total, n in zip(by_span, counts[tower], strict=True)]
            for name, by_span in hooks.items()
        }
        for tower, hooks in sums.items()
    }


def _gather(sums: dict[str, list[Tensor]], name: str, contrast: Contrast, tower: str) -> None:
    value = contrast.clean.values[name].double()
    examples = contrast.places[tower]
    spans = len(examples[0])
    old = sums.get(name, [torch.zeros(value.shape[2:], dtype=torch.float64)] * spans)
    sums[name] = [
        old[s].to(value)
        + sum(
            (value[e[s][:, 0], e[s][:, 1]].sum(0) for e in examples), torch.zeros_like(value[0, 0])
        )
        for s in range(spans)
    ]


def _count(counts: dict[str, list[int]], places: Places) -> None:
    for tower, examples in places.items():
        own = [sum(len(parts[s]) for parts in examples) for s in range(len(examples[0]))]
        counts[tower] = [a + b for a, b in zip(counts.get(tower, [0] * len(own)), own, strict=True)]
