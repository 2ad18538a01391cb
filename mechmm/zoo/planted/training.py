"""Trains a small LLaVA to compute a causal model in the nodes that the causal model names.

Strict interchange intervention training (Gupta et al. 2407.14494), edge by edge: a batch runs as it
is, and once more while some edges of every example carry what they carried in the run on another
example. For edges of the circuit the answer has to be what the causal model gives after the same
interchange; edges outside it must change nothing, be it one node's, any set, or all together; and
if all edges of the circuit carry the other example, the answer is the other one's.

Answers are logits: `LOGIT` for the answer, 0 for all others, by squared error, so that what is left
of the influence of all other edges is small in the metric as well. All parameters are trained, from
a random start. At first throwaway linear readers tell the words that a variable stands for
from what its node writes, as end-to-end training is slow to find any of it.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from mechmm.engine.wiring import wired
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.graph import Graph
from mechmm.zoo.planted.causal import CAUSAL, Causal, Shown
from mechmm.zoo.planted.models import TRAINED, Planted
from mechmm.zoo.planted.pictures import (
    COLORS,
    PLACES,
    SIDE,
    drawing,
    swatch,
)
from mechmm.zoo.planted.tasks import TASKS
from mechmm.zoo.planted.tasks.task import Case, Task
from mechmm.zoo.planted.walk import Run, walk
from mechmm.zoo.planted.words import VOCABULARY, build_config, build_processor

WIDTH, HIDDEN, LAYERS, HEADS = 48, 96, 2, 4
"""Of both towers; all vision layers are read."""
LOGIT = 5.0
"""The logit of the answer."""


@dataclass(frozen=True)
class Recipe:
    """How long what is trained.

    Attributes:
        steps: of the optimiser. first: share of them in which the circuit alone is trained.
        told: share of them with throwaway readers. loud: the weight of their loss at the start,
            from which it falls to 0.
    """

    steps: int = 1200
    first: float = 0.4
    told: float = 0.6
    loud: float = 4.0


RECIPES = dict.fromkeys(TRAINED, Recipe()) | {"same_color": Recipe(900, 0.5, 0.5, 0.5)}
BATCH, RATE, WARM = 32, 2e-3, 100
CASES = 2000
"""Cases, and as many changed ones, that batches are drawn from."""
GRAIN = 0.03
"""Noise of pixels, drawn anew for every batch."""
FAINT = 0.02
"""Weight of the logits of words that are no answers."""
WORDS = (None, *VOCABULARY, *PLACES)
"""What throwaway readers tell apart."""
POSITIONS = {
    "last": [-1],
    "swatches": [1 + swatch(i) for i in range(4)],
    "glyphs": [1 + drawing(i) for i in range(4)],
}
"""Behind the first token, in both towers."""
Tell = Callable[[dict[str, Any]], None]


def untrained(seed: int) -> LlavaForConditionalGeneration:
    """The model before training, with streams in which every part is heard."""
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    text = {**sizes, "num_key_value_heads": HEADS, "max_position_embeddings": 64}
    config = build_config(sizes, text, read=-1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration._from_config(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "embed" in name and "patch" not in name:
                    weight.normal_()
                elif weight.ndim > 1:
                    weight.normal_(0, weight[0].numel() ** -0.5)
    return model


@dataclass(frozen=True)
class Examples:
    """Cases, number 2i and its changed one 2i + 1, ready for the model.

    Attributes:
        values: of every variable in a plain run, by case.
    """

    cases: Sequence[Case]
    values: Sequence[Mapping[str, Any]]
    pixels: Float[Tensor, "case channel height width"]
    ids: Int[Tensor, "case pos"]

    @classmethod
    def drawn(cls, task: Task, causal: Causal, n: int, random: np.random.Generator) -> Examples:
        """Cases and changes of a task; most changes change the answer."""
        cases: list[Case] = []
        kinds = list(task.changes)
        while len(cases) < 2 * n:
            number = len(cases) // 2
            case = _repeated(task.draw(random), random) if number % 2 else task.draw(random)
            after = task.changes[kinds[number % len(kinds)]](random, case)
            answers = task.answer(case), task.answer(after)
            if None in answers or (answers[0] == answers[1] and random.random() < 0.7):
                continue
            cases += [case, after]
        pictures = np.stack([np.asarray(case.scene.render(), np.float32) for case in cases])
        image = VOCABULARY.index("<image>")
        before = [VOCABULARY.index("<s>"), *[image] * SIDE**2]
        said = [task.template.format(*case.asked).split() for case in cases]
        return cls(
            cases,
            [causal.values(case) for case in cases],
            torch.from_numpy(pictures / 127.5 - 1).permute(0, 3, 1, 2).contiguous(),
            torch.tensor([[*before, *map(VOCABULARY.index, words)] for words in said]),
        )


def _repeated(case: Case, random: np.random.Generator) -> Case:
    """Colors that may repeat: where all four are there, none says more than another until it is
    known where to look."""
    if None in case.scene.colors:
        return case
    colors = tuple(str(color) for color in random.choice(list(COLORS), len(PLACES)))
    return case.showing(replace(case.scene, colors=colors))


@dataclass(frozen=True)
class Swaps:
    """Draws which edges carry another example.

    Attributes:
        circuit: numbers of the circuit's edges. outside: whether an edge lies outside it.
    """

    graph: Graph
    circuit: Int[np.ndarray, " some"]
    outside: Bool[np.ndarray, " edge"]

    @classmethod
    def of(cls, graph: Graph, causal: Causal) -> Swaps:
        circuit, outside = graph.edges(causal.edges), np.ones(len(graph), dtype=bool)
        outside[circuit] = False
        return cls(graph, circuit, outside)

    def draw(
        self, n: int, first: bool, random: np.random.Generator
    ) -> Bool[np.ndarray, "example edge"]:
        """For every example one of: all edges outside, any of them, those of one node, none, or all
        of the circuit; with some edges of the circuit in most.

        Args:
            first: all edges outside, always.
        """
        swap = np.zeros((n, len(self.graph)), dtype=bool)
        for row, kind in zip(swap, random.integers(8, size=n), strict=True):
            if first or kind <= 2:
                row[self.outside] = True
            elif kind == 3:
                row[self.circuit] = True
                continue
            elif kind <= 5:
                row |= self.outside & (random.random(len(row)) < random.random())
            elif kind == 6:
                row |= self.outside & (self.graph.src == random.integers(len(self.graph.writers)))
            some = random.random()
            if some < 0.35:
                row[random.choice(self.circuit)] = True
            elif some < 0.6:
                row[self.circuit] = random.random(len(self.circuit)) < random.random()
        return swap


class Readers(nn.Module):
    """Throwaway linear readers of the variables."""

    def __init__(self, graph: Graph, causal: Causal) -> None:
        super().__init__()
        names, towers = graph.writers["name"].tolist(), graph.writers["tower"].tolist()
        self.vision = towers.count(towers[0])
        self.shown: list[tuple[str, int, Shown]] = [
            (variable.node, names.index(variable.node), shown)
            for variable in causal.variables
            for shown in variable.shown
        ]
        self.maps = nn.ModuleList([nn.Linear(WIDTH, len(WORDS)) for _ in self.shown])

    def loss(self, run: Run, values: Sequence[Mapping[str, Any]]) -> Tensor:
        losses = []
        for (node, number, shown), linear in zip(self.shown, self.maps, strict=True):
            seen = number < self.vision
            written = run.seen[number] if seen else run.said[number - self.vision]
            x = written[:, POSITIONS[shown.where]]
            x = 3 * x / x.norm(dim=-1, keepdim=True).clamp_min(0.3)
            words = [[WORDS.index(w) for w in shown.words(value[node])] for value in values]
            losses.append(cross_entropy(linear(x).flatten(0, 1), torch.tensor(words).flatten()))
        return torch.stack(losses).mean()


class Trainer:
    """Training of one task from a seed: the same weights for the same seed, on one machine."""

    def __init__(self, task: str, seed: int = 0, recipe: Recipe | None = None) -> None:
        self.causal, self.recipe = CAUSAL[task], recipe or RECIPES[task]
        self.random = np.random.default_rng([zlib.crc32(task.encode()), 2, seed])
        self.grain = torch.Generator().manual_seed(seed)
        self.model: Any = untrained(seed)
        wrapped = HookedMultimodal.from_hf(self.model, build_processor())
        self.graph = graph = wired(wrapped).graph
        self.swaps = Swaps.of(graph, self.causal)
        wrapped.unwrap()
        self.examples = Examples.drawn(TASKS[task], self.causal, CASES, self.random)
        self.weight = torch.full((len(VOCABULARY),), FAINT)
        answers = {self.causal.answer(values) for values in self.examples.values}
        self.weight[[VOCABULARY.index(word) for word in answers]] = 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.readers = Readers(graph, self.causal)
        parameters = [*self.model.parameters(), *self.readers.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)

    def run(self, tell: Tell = print) -> LlavaForConditionalGeneration:
        """Train to the end."""
        started, sums = time.process_time(), np.zeros(5)
        for step in range(self.recipe.steps):
            sums += self._step(step)
            if (step + 1) % 100 == 0:
                names = ("plain_loss", "plain_right", "swapped_loss", "swapped_right", "readers")
                row = dict(zip(names, (sums / 100).round(4).tolist(), strict=True))
                seconds = round(time.process_time() - started)
                tell({"step": step + 1, "seconds": seconds, **row})
                sums[:] = 0
        return self.model

    def _step(self, step: int) -> np.ndarray:
        recipe = self.recipe
        way = step / recipe.steps
        for group in self.optimizer.param_groups:
            decay = 0.02 + 0.98 * 0.5 * (1 + np.cos(np.pi * way))
            group["lr"] = RATE * min(1.0, (step + 1) / WARM) * decay
        rows, other = self._rows()
        pixels = self.examples.pixels[rows]
        pixels = pixels + GRAIN * torch.randn(pixels.shape, generator=self.grain)
        inputs = (self.model, self.graph, pixels, self.examples.ids[rows])
        plain = walk(*inputs)
        swap = self.swaps.draw(len(rows), way < recipe.first, self.random)
        source = Run(plain.logits[other], plain.seen[:, other], plain.said[:, other])
        swapped = walk(*inputs, torch.from_numpy(swap.astype(np.float32)), source)
        values = self._values(rows, rows[other], swap)
        losses = [
            self._loss(plain, [self.examples.values[row] for row in rows]),
            self._loss(swapped, values),
        ]
        loss, told = (
            2 * losses[1][0] + (losses[0][0] if way >= recipe.first else 0.0),
            torch.zeros(()),
        )
        if way < recipe.told:
            told = self.readers.loss(swapped, values)
            loss = loss + recipe.loud * (1 - way / recipe.told) * told
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return torch.stack([*(x for both in losses for x in both), told]).detach().numpy()

    def _rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Cases and their changed ones side by side; and which example each is swapped with: that
        one, or any."""
        half = self.random.integers(CASES, size=BATCH // 2)
        rows = np.stack([2 * half, 2 * half + 1], axis=1).ravel()
        other, far = np.arange(BATCH) ^ 1, self.random.random(BATCH) < 0.4
        other[far] = self.random.integers(BATCH, size=int(far.sum()))
        return rows, other

    def _values(
        self, rows: np.ndarray, others: np.ndarray, swap: np.ndarray
    ) -> list[Mapping[str, Any]]:
        """What the causal model holds after the same interchange."""
        found, examples = [], self.examples
        for row, other, own in zip(rows, others, swap[:, self.swaps.circuit], strict=True):
            on = {self.causal.edges[i] for i in np.flatnonzero(own)}
            found.append(self.causal.values(examples.cases[row], on, examples.values[other]))
        return found

    def _loss(self, run: Run, values: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """Squared error of the logits, and the share of right answers."""
        answers = torch.tensor([VOCABULARY.index(self.causal.answer(value)) for value in values])
        wanted = LOGIT * torch.eye(len(VOCABULARY))[answers]
        error = (((run.logits - wanted) / LOGIT).square() * self.weight).sum(1)
        return error.mean(), (run.logits.argmax(1) == answers).float().mean()


def train(task: str, seed: int = 0, recipe: Recipe | None = None, tell: Tell = print) -> Planted:
    """Train a model with a planted circuit: two minutes on one core.

    Args:
        task: one of `TRAINED`.
        seed: of the weights at the start and of every batch.
        recipe: default: that of the shipped model.
        tell: is called with losses every 100 steps.

    Raises:
        ValueError: an unknown task, or a negative seed.
    """
    if task not in TRAINED:
        raise ValueError(f"no causal model of a task {task!r}; there are {', '.join(TRAINED)}")
    if seed < 0:
        raise ValueError(f"a seed must be 0 or more, not {seed}")
    trainer = Trainer(task, seed, recipe)
    model = HookedMultimodal.from_hf(trainer.run(tell).requires_grad_(False), build_processor())
    roles = {variable.node: variable.node for variable in trainer.causal.variables}
    return Planted(task, seed, model, trainer.causal.edges, roles, trainer.causal.why)
