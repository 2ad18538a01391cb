"""Subspace interchange: does a subspace at one place hold the answer?

The base is a pair's corrupt prompt, the source the clean prompt of any pair of the same half. At
one hook and position, inside a subspace with the orthonormal basis B, the base's activation is set
to the source's:

    h' = h_base + (h_source - h_base) B B^T.

If the model then answers as it would answer the source, the subspace holds the answer there. B is
learned on one half of the pairs (distributed alignment search, DAS) and judged on the other. An
accuracy alone is no evidence, for DAS fits much that is not there; so beside it stand

- `nothing`, `everything`: no interchange, and one of the whole activation;
- `class means`: the span of the sources' class means, not learned (where there are several);
- `random subspace`: another of the same rank; `placebo`: a move as far as the learned one, in it;
- `arbitrary labels`: a basis learned for an arbitrary relabelling of the sources' answers;
- `untrained model`: a basis learned on the same architecture before training.

The intervention, the search and the controls are TransformerLens's
(`transformer_lens.tools.analysis.interchange`), which work at any hook of a hooked model; this
gives them pairs of prompts with pictures.

Geiger et al. 2106.02997 (interchange), 2303.02536 (DAS); Arora et al. 2402.12560 (controls).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from plotly.graph_objects import Figure
from torch import Tensor

from mechmm.data.metrics import last_logits
from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_limits, check_model, check_pairs, check_seed
from mechmm.engine.estimate import constant
from mechmm.engine.located import Located
from mechmm.engine.places import spot_of
from mechmm.engine.sites import SEEING
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.untrained import untrained
from mechmm.results import plots
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval

Move = Callable[[Tensor, Tensor], Tensor]
"""(base, source) activations [example, d] -> new ones."""
CONTROLS = ("nothing", "random subspace", "placebo", "arbitrary labels", "untrained model")
"""Conditions whose range is shown as the null."""


@dataclass(frozen=True, eq=False)
class SubspaceInterchange(Result):
    """How often the model answers a base as it would answer the source.

    Attributes:
        correct: whether it does [condition, test case].
        conditions: their names, see above; `learned` is the first.
        basis: the learned one [d, rank].
        losses: of its training, by epoch.
        cases: base, source (numbers of pairs) and the source's answer, of every test case.
        hook, span: where.
    """

    correct: Bool[Tensor, "condition case"]
    conditions: tuple[str, ...]
    basis: Float[Tensor, "d rank"]
    losses: tuple[float, ...]
    cases: pd.DataFrame
    hook: str
    span: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition: accuracy on the test cases, with its 95 % interval."""
        low, high = bootstrap_interval(self.correct)
        accuracy = self.correct.float().mean(1)
        columns = {"condition": self.conditions, "accuracy": accuracy, "low": low, "high": high}
        return pd.DataFrame(columns)

    def plot(self) -> dict[str, Figure]:
        """The figure `accuracy`: every condition, over the range of the controls."""
        table = self.to_dataframe()
        null = table.loc[table["condition"].isin(CONTROLS), "accuracy"]
        accuracy, low, high = (table[name].to_numpy(float) for name in ("accuracy", "low", "high"))
        title = f"interchange at {self.hook}, {self.span}: rank {self.basis.shape[1]}"
        figure = plots.bars(
            list(self.conditions),
            accuracy,
            low,
            high,
            title,
            null=(float(null.min()), float(null.max())),
            value_title="answers as the source",
            null_title="controls",
        )
        return {"accuracy": figure}

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figure and the table."""
        contents = [*self.plot().values(), self.to_dataframe()]
        return Page(title, self.summary(), [Section("Conditions", contents)], facts or {})

    def summary(self) -> str:
        """The learned subspace beside the best control, in words."""
        table = self.to_dataframe().set_index("condition")["accuracy"]
        controls = table[table.index.isin(CONTROLS)]
        return (
            f"A learned subspace of rank {self.basis.shape[1]} at {self.hook} ({self.span}) makes "
            f"the model answer as the source in {table['learned']:.2f} of {len(self.cases)} cases, "
            f"the whole activation in {table['everything']:.2f}; the best control, "
            f"{controls.idxmax()}, reaches {controls.max():.2f}."
        )


def subspace_interchange(
    model: HookedMultimodal,
    pairs: PairDataset,
    hook: str,
    *,
    span: str = "last",
    rank: int = 4,
    sources: int = 2,
    train: float = 0.5,
    epochs: int = 10,
    lr: float = 1e-2,
    seed: int = 0,
    batch_size: int = 32,
) -> SubspaceInterchange:
    """Learn a subspace that carries the answer from prompt to prompt, and judge it beside controls.

    Args:
        hook: one whose value is [batch, pos, d].
        span: of one position in every prompt.
        rank: of the subspace.
        sources: for every base, drawn from the same half of the pairs.
        train: share of the pairs that the basis is learned on.
        epochs, lr: of learning.
        seed: of the halves, the sources and the bases.
        batch_size: prompts of one forward pass.

    Raises:
        UnknownHookError: a hook that the model does not have.
        ValueError: a hook of another shape; a rank outside it; a span that is not one position; too
            few pairs; answers of several tokens, or all the same; numbers below 1.
    """
    from transformer_lens.tools.analysis import interchange

    case = _Case(model, pairs, hook, span, batch_size)
    _check(case, rank, sources, epochs, seed)
    halves = _halves(len(pairs), train, sources, seed)
    fitted, conditions = {}, {}
    own = case.targets(halves)
    shuffled = interchange.arbitrary_targets(range(len(case.classes)), len(case.classes), seed)
    fresh = _Case(untrained(model, seed), pairs, hook, span, batch_size)
    ways = {
        "learned": (case, own),
        "arbitrary labels": (case, [shuffled[target] for target in own]),
        "untrained model": (fresh, own),
    }
    options = {"rank": rank, "epochs": epochs, "lr": lr, "seed": seed}
    for name, (of, targets) in ways.items():
        fitted[name] = of.fit(halves[0], targets[0], **options)
        move = interchange.SubspaceInterchange(fitted[name].basis)
        conditions[name] = of.correct(halves[1], targets[1], move)
    learned = interchange.SubspaceInterchange(fitted["learned"].basis)
    width = len(fitted["learned"].basis)
    other = interchange.random_basis(width, rank, seed)
    moves: dict[str, Move] = {"everything": lambda base, source: source.to(base)}
    if len(set(own[0].tolist())) > 1:
        means = interchange.mean_difference_basis(case.states(halves[0][1]), own[0].tolist())
        moves["class means"] = interchange.SubspaceInterchange(means)
    moves |= {
        "random subspace": interchange.SubspaceInterchange(other),
        "placebo": interchange.NormMatchedPlacebo(learned, other),
        "nothing": lambda base, source: base,
    }
    conditions |= {name: case.correct(halves[1], own[1], move) for name, move in moves.items()}
    order = ("learned", *moves, "arbitrary labels", "untrained model")
    bases, theirs = halves[1]
    answers = [case.classes[target] for target in own[1].tolist()]
    return SubspaceInterchange(
        correct=torch.stack([conditions[name] for name in order]),
        conditions=order,
        basis=fitted["learned"].basis.cpu(),
        losses=fitted["learned"].losses,
        cases=pd.DataFrame({"base": bases, "source": theirs, "answer": answers}),
        hook=hook,
        span=span,
    )


Half = tuple[Int[np.ndarray, " case"], Int[np.ndarray, " case"]]
"""Numbers of pairs: whose corrupt prompt is the base, and whose clean prompt is the source."""


class _Case:
    """One model and the prompts of all pairs as TransformerLens's functions want them: by number,
    corrupt ones first."""

    def __init__(
        self, model: HookedMultimodal, pairs: PairDataset, hook: str, span: str, batch_size: int
    ) -> None:
        check_model(model)
        check_pairs(pairs, "clean")
        check_limits(batch_size=batch_size)
        model.check_names([hook])
        self.model, self.pairs, self.hook, self.size = model, pairs, hook, batch_size
        self.prompts = [pair.corrupt for pair in pairs] + [pair.clean for pair in pairs]
        self.classes = sorted({pair.answer for pair in pairs} | {pair.foil for pair in pairs})
        ids = [model.answer_tokens(text) for text in self.classes]
        if any(len(tokens) != 1 for tokens in ids) or len(ids) < 2:
            raise ValueError(
                f"the answers are {', '.join(map(repr, self.classes))}; give pairs with two or "
                "more answers of one token each"
            )
        self.ids = torch.tensor(ids, device=model.device)[:, 0]
        self.positions = self._positions(span)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def _positions(self, span: str) -> Int[Tensor, " pair"]:
        """The position of the span in every pair, counted from the end in the language model, for
        prompts are padded in front."""
        tower, found = spot_of(self.model, self.hook).tower, []
        for number in range(len(self.pairs)):
            layout = self.pairs.batch([number]).clean.layout
            places = Located(layout).covered(tower, span, 0)
            if len(places) != 1 or places[0, 0] != 0:
                raise ValueError(
                    f"pair {number}: span {span!r} covers {len(places)} positions at {self.hook}; "
                    "an interchange needs one, such as 'last'"
                )
            seen = tower in SEEING
            found.append(int(places[0, 1]) - (0 if seen else layout.shape[1]))
        return torch.tensor(found)

    def logits(self, numbers: Tensor) -> Float[Tensor, "prompt class"]:
        """Logits of the answers after some prompts."""
        own = [self.prompts[number] for number in numbers.tolist()]
        batch = self.model.encode([p.text for p in own], [p.images for p in own])
        return last_logits(self.model, batch)[:, self.ids]

    def targets(self, halves: Sequence[Half]) -> list[Int[Tensor, " case"]]:
        """Which class every source's answer is."""
        number = {answer: i for i, answer in enumerate(self.classes)}
        own = [number[pair.answer] for pair in self.pairs]
        return [torch.tensor([own[source] for source in half[1]]) for half in halves]

    def _inputs(self, half: Half) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers of base and source prompts, and their positions."""
        bases, sources = (torch.as_tensor(numbers) for numbers in half)
        at = self.positions
        return bases, sources + len(self.pairs), at[bases], at[sources]

    def fit(self, half: Half, targets: Tensor, **options: Any) -> Any:
        """A subspace learned by DAS."""
        from transformer_lens.tools.analysis import interchange

        base, source, at, there = self._inputs(half)
        with constant(self.model.hf_model):
            return interchange.fit_das(
                self.model,
                self.hook,
                base,
                source,
                targets,
                self.logits,
                base_positions=at,
                source_positions=there,
                batch_size=self.size,
                device=self.model.device,
                **options,
            )

    def states(self, sources: Int[np.ndarray, " case"]) -> Float[Tensor, "case d"]:
        """Activations of clean prompts."""
        from transformer_lens.tools.analysis import interchange

        key = tuple(sources.tolist())
        if key not in self.kept:
            numbers = torch.as_tensor(sources)
            what = (self.model, self.hook, numbers + len(self.pairs), self.logits)
            given = {"positions": self.positions[numbers], "batch_size": self.size}
            self.kept[key] = interchange.collect_activations(*what, **given)
        return self.kept[key]

    def correct(self, half: Half, targets: Tensor, move: Move) -> Bool[Tensor, " case"]:
        """Whether the model answers every base as its target after a move."""
        from transformer_lens.tools.analysis import interchange

        base, _, at, _ = self._inputs(half)
        what = (self.model, self.hook, move, base, self.states(half[1]), self.logits)
        logits = interchange.intervened_logits(*what, positions=at, batch_size=self.size)
        return logits.argmax(-1) == targets


def _check(case: _Case, rank: int, sources: int, epochs: int, seed: int) -> None:
    check_seed(seed)
    for name, value in (("sources", sources), ("epochs", epochs), ("rank", rank)):
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    tower = case.model.towers.get(spot_of(case.model, case.hook).tower)
    name = case.hook.rpartition(".")[2]
    if tower is None or ".attn." in case.hook or name in ("hook_scale", "hook_router"):
        raise ValueError(
            f"{case.hook} has no value [batch, pos, d] in a tower; use one of the residual stream, "
            "of what attention or MLPs add, or of neurons"
        )
    wide = tower.cfg.d_mlp if ".mlp." in case.hook else tower.cfg.d_model
    if wide is not None and rank > wide:
        raise ValueError(f"rank is {rank}, but {case.hook} has {wide} dimensions")


def _halves(count: int, share: float, sources: int, seed: int) -> list[Half]:
    """Bases and sources to learn on, and to judge on; no pair is in both."""
    rng = np.random.default_rng(seed)
    order, size = rng.permutation(count), round(share * count)
    if not 2 <= size <= count - 2:
        raise ValueError(
            f"train={share} leaves {size} of {count} pairs to learn on and {count - size} to judge "
            "on; both need at least 2"
        )
    halves = []
    for part in (order[:size], order[size:]):
        bases = np.repeat(part, sources)
        halves.append((bases, rng.choice(part, len(bases))))
    return halves
