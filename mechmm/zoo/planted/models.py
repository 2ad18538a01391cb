"""Planted models: what `build` makes of a task and a seed, and what `load` finds in a folder."""

from __future__ import annotations

import difflib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mechmm.data.pairs import Pair, PairDataset, Prompt
from mechmm.model.hooked import HookedMultimodal
from mechmm.zoo.planted.causal import CAUSAL
from mechmm.zoo.planted.compiler import compile_program
from mechmm.zoo.planted.tasks import REDUNDANT as _REDUNDANT
from mechmm.zoo.planted.tasks import TASKS as _NECESSARY
from mechmm.zoo.planted.tasks.task import Case, Task
from mechmm.zoo.planted.words import build_processor

TASKS = tuple(_NECESSARY)
"""Names of the tasks in which every edge of the circuit is necessary."""
REDUNDANT = tuple(_REDUNDANT)
"""Names of those in which single edges can be spared."""
TRAINED = tuple(CAUSAL)
"""Names of the tasks for which a trained model is shipped."""
_TASKS = {**_NECESSARY, **_REDUNDANT}
TRUTH = "truth.json"
SHIPPED = Path(__file__).parent / "trained"
_TRIES = 200
"""Draws per pair; far more than any task needs."""


@dataclass(frozen=True)
class Planted:
    """A model whose circuit is known.

    Attributes:
        name: the task.
        seed: what drew the model's weights and where its parts are.
        model: a LLaVA.
        edges: the edges that compute the answer, `writer->reader`.
        roles: the node of each part, the circuit's and decoys', by what it does.
        why: how the answer is computed, and which kind of pair each edge is necessary in.
    """

    name: str
    seed: int
    model: HookedMultimodal
    edges: tuple[str, ...]
    roles: dict[str, str]
    why: str

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of the circuit, in the order in which they are first read."""
        ends = (end.split("<")[0] for edge in self.edges for end in edge.split("->"))
        return tuple(dict.fromkeys(ends))

    def pairs(self, n: int, seed: int = 0) -> PairDataset:
        """Pairs whose kinds take turns; the truth is relative to all kinds together.

        Args:
            n: how many.
            seed: of pictures and questions.

        Raises:
            ValueError: where `n` is below 1.
        """
        if n < 1:
            raise ValueError(f"{n} pairs are impossible; ask for 1 or more")
        random = np.random.default_rng([zlib.crc32(self.name.encode()), seed])
        task = _TASKS[self.name]
        kinds = list(task.changes)
        return PairDataset(
            [_pair(task, kinds[i % len(kinds)], random) for i in range(n)], self.model
        )

    def save(self, folder: str | Path) -> None:
        """Write the model and its processor in Hugging Face format, and `truth.json`."""
        folder = Path(folder)
        self.model.hf_model.save_pretrained(folder)
        self.model.processor.save_pretrained(folder)
        truth = {
            "task": self.name,
            "seed": self.seed,
            "edges": self.edges,
            "nodes": self.nodes,
            "roles": self.roles,
            "why": self.why,
        }
        (folder / TRUTH).write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")


def build(task: str, seed: int = 0) -> Planted:
    """A model with a planted circuit, in a second or two; the same for the same task and seed.

    Args:
        task: one of `TASKS` or `REDUNDANT`.
        seed: draws the layers and heads that do the work, the bases of both residual streams and
            of every head, and all noise.

    Raises:
        ValueError: for an unknown task, with the nearest ones, or a negative seed.
    """
    if task not in _TASKS:
        near = difflib.get_close_matches(task, _TASKS, n=3, cutoff=0.3) or _TASKS
        raise ValueError(f"no planted task {task!r}; did you mean {', '.join(near)}?")
    if seed < 0:
        raise ValueError(f"a seed must be 0 or more, not {seed}")
    random = np.random.default_rng([zlib.crc32(task.encode()), 1, seed])
    made = compile_program(_TASKS[task].program, random)
    model = HookedMultimodal.from_hf(made.model, build_processor())
    return Planted(task, seed, model, made.edges, dict(made.nodes), _TASKS[task].why)


def load(name: str | Path) -> Planted:
    """A trained model that is shipped, or a planted model that was saved.

    Args:
        name: one of `TRAINED`, or a folder that `Planted.save` wrote.

    Raises:
        ValueError: neither of both.
    """
    folder = SHIPPED / name if name in TRAINED else Path(name)
    if not (folder / TRUTH).is_file():
        raise ValueError(
            f"no trained model {str(name)!r}; there are {', '.join(TRAINED)}, and folders written "
            f"by Planted.save, with a file {TRUTH}"
        )
    truth = json.loads((folder / TRUTH).read_text(encoding="utf-8"))
    model = HookedMultimodal.from_pretrained(folder)
    names = ("seed", "edges", "roles", "why")
    seed, edges, roles, why = (truth[part] for part in names)
    return Planted(truth["task"], seed, model, tuple(edges), roles, why)


def _pair(task: Task, kind: str, random: np.random.Generator) -> Pair:
    """A pair of one kind, with different answers; which of both cases is clean is drawn too, where
    the task lets them take turns."""
    for _ in range(_TRIES):
        case = task.draw(random)
        cases = [case, task.changes[kind](random, case)]
        if task.turns and random.integers(2):
            cases.reverse()
        answer, foil = (task.answer(case) for case in cases)
        if answer is not None and foil is not None and answer != foil:
            clean, corrupt = (_prompt(task, case) for case in cases)
            return Pair(clean, corrupt, answer, foil, meta={"kind": kind})
    raise RuntimeError(f"no pair of kind {kind!r} in {_TRIES} tries")


def _prompt(task: Task, case: Case) -> Prompt:
    return Prompt(f"<image> {task.template.format(*case.asked)}", (case.scene.render(),))
