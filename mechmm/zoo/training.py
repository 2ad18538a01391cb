"""Trains the demo model from a seed, on a CPU.

End-to-end training alone stays near chance for a long time, so skills come one after another: the
vision tower first, with throwaway linear heads that read color, shape, digit and position from
every patch; then questions that look one thing up; then, alone, those that compare or combine
things, which words make easier to learn than pictures; at last every kind of question in both
forms. Within a phase, kinds that lag are asked more often.

Several questions share one picture or description: each attends to that context and itself, but
not to the other questions, and its positions start where the context ends, so that one question
asked alone is computed identically.

Every batch is drawn from (seed, phase, step), so that a run resumed from a checkpoint sees what an
uninterrupted one would.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mechmm.data.questions import KINDS, PRIOR, Question
from mechmm.data.scenes import COLORS, SHAPES, Scene
from mechmm.data.shapes import Sampler
from mechmm.zoo.recipe import MEAN, PATCHES, STD, build_model, save, vocabulary

EASY = ("color", "shape", "where", "cell")
HARD = ("horizontal", "vertical", "same", "beside")
FORMS = ("image", "text")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: which kinds of question, how long, how fast."""

    name: str
    kinds: tuple[str, ...]
    steps: int
    rate: float
    batch: int
    until: float = 2.0
    """End early when every running accuracy is at least this."""
    forms: tuple[str, ...] = FORMS


PHASES = (
    Phase("sight", (), 1200, 1e-3, 64),
    Phase("find", EASY, 800, 1e-3, 32, until=0.99),
    Phase("find in words", EASY, 3000, 1e-3, 48, until=0.95, forms=("text",)),
    Phase("compare in words", HARD, 910, 1e-3, 48, until=0.93, forms=("text",)),
    Phase("compare", HARD, 1200, 1e-3, 32, until=0.93),
    Phase("all", tuple(KINDS), 3600, 1e-3, 32),
)
KEPT = {
    "sight": (0,),
    "find": (0, 50, 100, 200, 400),
    "find in words": (0,),
    "all": (0,),
}
"""Steps of the phases before which the model is kept, to see how circuits form."""
QUESTIONS = 6
"""Questions asked of one picture or description."""


@dataclass
class State:
    """Where training stands: written beside the weights at every checkpoint."""

    phase: int = 0
    step: int = 0
    accuracy: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    log: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Packed:
    """Contexts with several questions each, ready for the language model."""

    pixels: Tensor | None
    ids: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    kinds: list[str]


def sample_scene(rng: np.random.Generator, kind: str) -> Scene:
    return Sampler("train").scene(rng, kind)


def draw_questions(
    rng: np.random.Generator, scene: Scene, kinds: tuple[str, ...], weights: np.ndarray
) -> list[tuple[Question, str]]:
    """`QUESTIONS` well-posed questions about one scene with their answers."""
    found: list[tuple[Question, str]] = []
    for _ in range(4 * QUESTIONS):
        kind = kinds[rng.choice(len(kinds), p=weights)]
        question = Sampler("train").question(rng, scene, kind)
        if question is not None:
            found.append((question, str(question.answer(scene))))
        if len(found) == QUESTIONS:
            break
    if "color" in kinds and rng.random() < 0.1:
        unseen = [shape for shape in PRIOR if all(shape != t.shape for t in scene.things)]
        found += [(Question("color", (shape,)), PRIOR[shape]) for shape in unseen[:1]]
    return found


def pixels_of(scenes: list[Scene]) -> Tensor:
    """What the processor makes of rendered scenes: [image, 3, height, width]."""
    pictures = np.stack([np.asarray(scene.render(), dtype=np.float32) for scene in scenes])
    return torch.from_numpy((pictures / 255 - np.array(MEAN, np.float32)) / STD[0]).permute(
        0, 3, 1, 2
    )


class Packer:
    """Turns scenes and questions into `Packed` batches."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(vocabulary())}

    def words(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def pack(
        self, scenes: list[Scene], asked: list[list[tuple[Question, str]]], form: str
    ) -> Packed:
        rows = [self._row(scene, row, form) for scene, row in zip(scenes, asked, strict=True)]
        length = max(len(row[0]) for row in rows)
        ids = np.full((len(rows), length), self.ids["<pad>"])
        targets = np.full((len(rows), length), -100)
        group = np.full((len(rows), length), -1)
        positions = np.zeros((len(rows), length), dtype=np.int64)
        for i, (row_ids, row_targets, row_group, row_positions) in enumerate(rows):
            n = len(row_ids)
            ids[i, :n], targets[i, :n] = row_ids, row_targets
            group[i, :n], positions[i, :n] = row_group, row_positions
        same = (group[:, None] == group[:, :, None]) | (group[:, None] == 0)
        mask = same & np.tril(np.ones((length, length), dtype=bool)) | np.eye(length, dtype=bool)
        return Packed(
            pixels_of(scenes) if form == "image" else None,
            torch.from_numpy(ids),
            torch.from_numpy(mask)[:, None],
            torch.from_numpy(positions),
            torch.from_numpy(targets),
            [question.kind for row in asked for question, _ in row],
        )

    def _row(self, scene: Scene, asked: list[tuple[Question, str]], form: str):
        images = [self.ids["<image>"]] * PATCHES**2
        context = images if form == "image" else self.words(scene.describe())
        ids = [self.ids["<s>"], *context]
        targets, group = [-100] * len(ids), [0] * len(ids)
        positions = list(range(len(ids)))
        for number, (question, answer) in enumerate(asked, start=1):
            words = self.words(question.text + " answer :")
            ids += [*words, self.ids[answer]]
            targets += [-100] * (len(words) - 1) + [self.ids[answer], self.ids["</s>"]]
            group += [number] * (len(words) + 1)
            start = len(context) + 1
            positions += range(start, start + len(words) + 1)
        return ids, targets, group, positions


def question_loss(model: Any, batch: Packed) -> tuple[Tensor, Tensor]:
    """Mean loss over answers and ends, and which answers were right [question]."""
    inputs = {"input_ids": batch.ids, "pixel_values": batch.pixels}
    hidden = model.model(
        **{name: value for name, value in inputs.items() if value is not None},
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.targets >= 0
    logits, targets = model.lm_head(hidden[wanted]), batch.targets[wanted]
    right = (logits.argmax(-1) == targets)[0::2]
    return cross_entropy(logits, targets), right


class SightHeads(nn.Module):
    """Throwaway readers of every patch: color, shape, digit and position."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        sizes = {"color": len(COLORS), "shape": len(SHAPES), "digit": 10}
        self.heads = nn.ModuleDict({k: nn.Linear(d_model, n + 1) for k, n in sizes.items()})
        self.heads["place"] = nn.Linear(d_model, PATCHES**2)

    def loss(self, features: Tensor, scenes: list[Scene]) -> Tensor:
        labels = {name: torch.zeros(len(scenes), PATCHES, PATCHES).long() for name in self.heads}
        labels["place"] += torch.arange(PATCHES**2).view(PATCHES, PATCHES)
        colors = list(COLORS)
        for i, scene in enumerate(scenes):
            for thing in scene.things:
                side = PATCHES // 4
                rows = slice(thing.row * side, thing.row * side + side)
                columns = slice(thing.column * side, thing.column * side + side)
                if thing.digit is not None:
                    labels["digit"][i, rows, columns] = 1 + int(thing.name)
                else:
                    labels["color"][i, rows, columns] = 1 + colors.index(str(thing.color))
                    labels["shape"][i, rows, columns] = 1 + SHAPES.index(thing.name)
        return sum(
            (
                cross_entropy(head(features).flatten(0, 1), labels[name].flatten())
                for name, head in self.heads.items()
            ),
            start=torch.zeros(()),
        )


class Trainer:
    """Training with checkpoints in `folder`; starts from the newest one there.

    The model is kept as a Hugging Face folder in `model` when training ends, and on the way in
    `history/{number}-{phase}-{step}` (`KEPT`).
    """

    def __init__(self, folder: Path, seed: int = 0, phases: tuple[Phase, ...] = PHASES) -> None:
        self.folder, self.seed, self.phases = folder, seed, phases
        self.model = build_model(seed)
        vision: Any = self.model.config.vision_config
        self.heads = SightHeads(vision.hidden_size)
        self.state, self.packer = State(), Packer()
        self.optimizer = torch.optim.AdamW(
            [*self.model.parameters(), *self.heads.parameters()],
            lr=1e-3,
            betas=(0.9, 0.98),
            weight_decay=0.02,
        )
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "state.json").exists():
            self._load()

    def run(self, every: float = 120.0) -> None:
        """Train to the end, saving a checkpoint every `every` seconds."""
        self.model.train()
        saved = started = time.monotonic()
        before = self.state.seconds
        while self.state.phase < len(self.phases):
            phase = self.phases[self.state.phase]
            self._keep(phase)
            self._step(phase)
            self.state.step += 1
            self.state.seconds = before + time.monotonic() - started
            if self._finished(phase):
                self.state.phase, self.state.step = self.state.phase + 1, 0
                self.state.accuracy = {}
            if time.monotonic() - saved > every or self.state.step == 0:
                self._save()
                saved = time.monotonic()
        self.model.eval()
        save(self.model, self.folder / "model")

    def _keep(self, phase: Phase) -> None:
        """Keep the model, if it is one of those to keep."""
        if self.state.step not in KEPT.get(phase.name, ()):
            return
        before = [(name, step) for name, steps in KEPT.items() for step in steps]
        number = before.index((phase.name, self.state.step))
        name = f"{number}-{phase.name.replace(' ', '-')}-{self.state.step}"
        if not (self.folder / "history" / name).exists():
            self.model.eval()
            save(self.model, self.folder / "history" / name)
            self.model.train()

    def _finished(self, phase: Phase) -> bool:
        accuracy = self.state.accuracy
        wanted = [f"{form}/{kind}" for form in phase.forms for kind in phase.kinds]
        learned = bool(wanted) and all(accuracy.get(name, 0) >= phase.until for name in wanted)
        return learned or self.state.step >= phase.steps

    def _step(self, phase: Phase) -> None:
        step = self.state.step
        warm = min(1.0, (step + 1) / 100)
        decay = 0.5 * (1 + np.cos(np.pi * step / phase.steps)) if phase.until > 1 else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = phase.rate * warm * (0.02 + 0.98 * decay)
        rng = np.random.default_rng([self.seed, self.state.phase, step])
        loss = self._sight(rng, phase) if not phase.kinds else self._questions(rng, phase)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        if step % 50 == 0:
            self._report(phase, float(loss.detach()))

    def _sight(self, rng: np.random.Generator, phase: Phase) -> Tensor:
        kinds = rng.choice(["color", "digit", "beside"], phase.batch)
        scenes = [sample_scene(rng, str(kind)) for kind in kinds]
        tower = self.model.model.vision_tower
        features = tower(pixels_of(scenes)).last_hidden_state[:, 1:]
        return self.heads.loss(features, scenes)

    def _questions(self, rng: np.random.Generator, phase: Phase) -> Tensor:
        losses = []
        for form in phase.forms:
            scores = self.state.accuracy
            known = [scores.get(f"{form}/{kind}", 0.0) for kind in phase.kinds]
            weights = 0.1 + 1.0 - np.array(known)
            weights /= weights.sum()
            kinds = rng.choice(len(phase.kinds), phase.batch, p=weights)
            scenes = [sample_scene(rng, phase.kinds[kind]) for kind in kinds]
            asked = [draw_questions(rng, scene, phase.kinds, weights) for scene in scenes]
            batch = self.packer.pack(scenes, asked, form)
            loss, right = question_loss(self.model, batch)
            losses.append(loss)
            self._score(form, batch.kinds, right.tolist())
        return torch.stack(losses).mean()

    def _score(self, form: str, kinds: list[str], right: list[bool]) -> None:
        """Running accuracy per kind, over about the last 200 questions of it."""
        for kind, ok in zip(kinds, right, strict=True):
            name = f"{form}/{kind}"
            old = self.state.accuracy.get(name, 0.0)
            self.state.accuracy[name] = old + 0.005 * (float(ok) - old)

    def _report(self, phase: Phase, loss: float) -> None:
        accuracy = {name: round(value, 3) for name, value in sorted(self.state.accuracy.items())}
        row = {"phase": phase.name, "step": self.state.step, "loss": round(loss, 4)}
        row |= {"seconds": round(self.state.seconds), "accuracy": accuracy}
        self.state.log.append(row)
        print(json.dumps(row), flush=True)

    def _save(self) -> None:
        """Weights, optimizer and counters; the counters last, so that they never run ahead."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"heads.{k}": v for k, v in self.heads.state_dict().items()}
        for i, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in entry.items()}
        name = f"checkpoint-{self.state.phase}-{self.state.step}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / name)
        partial = self.folder / "state.json.partial"
        partial.write_text(json.dumps({"checkpoint": name, **asdict(self.state)}))
        os.replace(partial, self.folder / "state.json")
        for old in self.folder.glob("checkpoint-*.safetensors"):
            if old.name != name:
                old.unlink()

    def _load(self) -> None:
        saved = json.loads((self.folder / "state.json").read_text())
        tensors = load_file(self.folder / saved.pop("checkpoint"))
        self.state = State(**saved)

        def part(prefix: str) -> dict[str, Tensor]:
            found = (key for key in tensors if key.startswith(prefix))
            return {key.removeprefix(prefix): tensors[key] for key in found}

        self.model.load_state_dict(part("model."))
        self.heads.load_state_dict(part("heads."))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in part("adam.").items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        whole = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**whole, "state": entries})
