"""Pairs of prompts, clean and corrupt, that a model can be compared on position by position.

A `PairDataset` is aligned for one model when it is made: both prompts of every pair fill the same
number of positions, with the same modality and the same image patches at each, or the pair is
refused. So a position of the clean run and the same position of the corrupt run are one place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import combinations
from operator import index as as_index
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor

from mechmm.data.metrics import Answers, Metric, accuracy, last_logits, logit_diff, score
from mechmm.model.batch import Batch, InputError, open_picture
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import (
    BUILT_IN,
    MODALITIES,
    Box,
    Patches,
    SpanError,
    TokenLayout,
    Where,
    Words,
)

Value = str | int | float | bool
"""What a pair may be labelled with."""

COLUMNS = ("clean_text", "corrupt_text", "answer", "foil")
IMAGE_COLUMNS = ("clean_image", "corrupt_image")
_PLACES: dict[str, type] = {place.__name__: place for place in (Box, Words, Patches)}
_FILE, _IMAGES = "pairs.jsonl", "images"


class PairError(ValueError):
    """A pair cannot be used: it is not aligned, incomplete or unreadable."""


@dataclass(frozen=True)
class Prompt:
    """A text with one placeholder per image, and the images (kept as RGB)."""

    text: str
    images: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise PairError(f"the text of a prompt must be a str, not {type(self.text).__name__}")
        if not all(isinstance(image, Image.Image) for image in self.images):
            raise PairError("the images of a prompt must be PIL images; open files first")
        object.__setattr__(self, "images", tuple(_bare(image) for image in self.images))


def _bare(image: Image.Image) -> Image.Image:
    """A copy in RGB without what a file says beside its pixels, so that equal pixels are equal."""
    copy = image.convert("RGB")
    copy.info = {}
    return copy


@dataclass(frozen=True)
class Pair:
    """A clean prompt, a corrupt one, and the two answers to tell apart.

    Attributes:
        clean: the prompt that the model answers with `answer`.
        corrupt: a prompt that differs in what the experiment is about.
        answer, foil: a text that may follow the prompt, of one token or several. The foil is the
            alternative, often the answer to the corrupt prompt.
        spans: named places, disjoint. Each is looked up in the clean prompt, and the positions
            found there hold for both prompts: what `Words("red circle")` finds in the clean one
            may read otherwise in the corrupt one.
        meta: labels to select and group by, for example `kind`.

    Raises:
        PairError: an empty answer, a span with a built-in name, a label that is no plain value.
    """

    clean: Prompt
    corrupt: Prompt
    answer: str
    foil: str
    spans: Mapping[str, Where] = field(default_factory=dict)
    meta: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("answer", "foil"):
            text = getattr(self, name)
            if not isinstance(text, str) or not text.strip():
                raise PairError(f"the {name} must be a text, not {text!r}")
        for name, place in self.spans.items():
            if name in BUILT_IN:
                raise PairError(f"every layout has a span {name!r} already; choose another name")
            if not isinstance(place, Where):
                raise PairError(f"span {name!r} must be a Box, Words or Patches, not {place!r}")
        _check_meta(self.meta)
        object.__setattr__(self, "spans", dict(self.spans))
        object.__setattr__(self, "meta", dict(self.meta))


def _check_meta(meta: Mapping[str, Any]) -> None:
    for name, value in meta.items():
        if not isinstance(value, Value):
            raise PairError(f"meta {name!r} must be a str, int, float or bool, not {value!r}")


@dataclass(frozen=True)
class PairBatch:
    """Some pairs, ready to run; row `i` of everything is pair `i` of `pairs`.

    Attributes:
        clean, corrupt: left-padded to one common length, with the pairs' spans in their layouts.
            Every span of the dataset is there; its row is empty for a pair that lacks it.
        answers: answers and foils as the metrics need them.
        indices: number of each pair in its dataset.
        pairs: the pairs.
        whole: number of each pair in what the dataset is a part of; empty: it is no part.
    """

    clean: Batch
    corrupt: Batch
    answers: Answers
    indices: tuple[int, ...]
    pairs: tuple[Pair, ...]
    whole: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What random choices for a pair are drawn by: the same in a part as in the whole."""
        return self.whole or self.indices

    @property
    def foils(self) -> Answers:
        """Answers and foils exchanged: `log_prob(logits, batch.foils)` is the foil's."""
        return self.answers.swapped


class PairDataset(Sequence[Pair]):
    """Pairs aligned for a model; never empty.

    `dataset[3]` is a pair; `dataset[:8]`, `dataset[[0, 4]]` and `dataset[mask]` are datasets.

    Attributes:
        pairs: all of them.
        model: what they are aligned for.
    """

    def __init__(self, pairs: Iterable[Pair], model: HookedMultimodal) -> None:
        """Check every pair.

        Raises:
            PairError: no pairs; or the number of the first pair whose prompts cannot be encoded, do
                not correspond position by position or are equal, whose answer or foil cannot be
                written or told apart, or whose spans are not found or overlap.
        """
        self.pairs = tuple(pairs)
        self.model = model
        _refuse_empty(self.pairs, "there are no pairs; give at least one")
        for number, pair in enumerate(self.pairs):
            try:
                _check(pair, model)
            except PairError as error:
                raise PairError(f"pair {number}: {error}") from error

    # Selecting -------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | np.ndarray | Tensor) -> PairDataset: ...
    def __getitem__(self, index: Any) -> Pair | PairDataset:
        if isinstance(index, slice):
            return self._part(range(len(self))[index])
        if not isinstance(index, Sequence | np.ndarray | Tensor):
            return self.pairs[as_index(index)]
        chosen = np.asarray(index)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise PairError(
                    f"the mask has shape {list(chosen.shape)}, the dataset {len(self)} pairs; "
                    "give one true or false per pair"
                )
            chosen = chosen.nonzero()[0]
        return self._part(chosen.tolist())

    def where(
        self, condition: Callable[[Pair], bool] | None = None, /, **meta: Value
    ) -> PairDataset:
        """The pairs for which `condition` holds and whose labels are as given.

        Raises:
            PairError: a label that no pair has, or no pair left, with what there is.
        """
        for name in meta:
            if not any(name in pair.meta for pair in self):
                known = sorted({label for pair in self for label in pair.meta})
                raise PairError(f"no pair has meta {name!r}; there is {', '.join(known) or 'none'}")
        kept = [
            number
            for number, pair in enumerate(self)
            if all(name in pair.meta and pair.meta[name] == value for name, value in meta.items())
            and (condition is None or condition(pair))
        ]
        wanted = ", ".join(f"{name}={value!r}" for name, value in meta.items()) or "the condition"
        values = {n: sorted({str(p.meta[n]) for p in self if n in p.meta}) for n in meta}
        there = "".join(f"; {name} is one of {', '.join(found)}" for name, found in values.items())
        _refuse_empty(kept, f"no pair fits {wanted}{there}")
        return self._part(kept)

    def _part(self, numbers: Sequence[int]) -> PairDataset:
        """Some of the pairs, which need no second check."""
        _refuse_empty(numbers, "the selection holds no pair; select at least one")
        part = object.__new__(PairDataset)
        part.pairs = tuple(self.pairs[number] for number in numbers)
        part.model = self.model
        return part

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of all spans, in order of appearance."""
        return tuple(dict.fromkeys(name for pair in self for name in pair.spans))

    def __repr__(self) -> str:
        kinds = pd.Series([pair.meta.get("kind", "no kind") for pair in self]).value_counts()
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return f"PairDataset({counts}; spans: {', '.join(self.spans) or 'none'})"

    # Running ---------------------------------------------------------------------------------

    def batches(self, size: int = 32) -> Iterator[PairBatch]:
        """The pairs in order, `size` at a time.

        Raises:
            ValueError: where `size` is below 1.
        """
        if size < 1:
            raise ValueError(f"a batch of {size} pairs is impossible; give a size of 1 or more")
        starts = range(0, len(self), size)
        return (self.batch(range(start, min(start + size, len(self)))) for start in starts)

    @property
    def first(self) -> PairBatch:
        """The first pair; in a `Part` that of the whole."""
        return self.batch([0])

    def batch(self, numbers: Sequence[int]) -> PairBatch:
        """Some pairs together, by number, with every span of the dataset."""
        pairs = tuple(self.pairs[number] for number in numbers)
        clean = _encode(self.model, [pair.clean for pair in pairs])
        corrupt = _encode(self.model, [pair.corrupt for pair in pairs])
        masks = _masks(clean.layout, pairs, self.spans)
        return PairBatch(
            clean.with_layout(replace(clean.layout, defined=masks)),
            corrupt.with_layout(replace(corrupt.layout, defined=masks)),
            Answers.of(self.model, [p.answer for p in pairs], [p.foil for p in pairs]),
            tuple(numbers),
            pairs,
        )

    @torch.no_grad()
    def check(self, model: HookedMultimodal | None = None, size: int = 32) -> pd.DataFrame:
        """What a model makes of the pairs: does it know the answer, does the corruption flip it?

        Args:
            model: default: the one that the pairs are aligned for; another is aligned for first.
            size: pairs per batch.

        Returns:
            One row per pair: its `kind`, `answer` and `foil`; the likeliest next token after each
            prompt (`clean_says`, `corrupt_says`); `clean_right`: whether the clean prompt gets the
            answer; `flips`: whether the corrupt one gets the foil; and both logit differences.
        """
        pairs = self if model is None or model is self.model else PairDataset(self, model)
        tables = [_judge(pairs.model, batch) for batch in pairs.batches(size)]
        return pd.concat(tables).rename_axis("pair")

    # Keeping ---------------------------------------------------------------------------------

    def content_hash(self) -> str:
        """SHA-256 of all texts, pixels, answers, foils and spans, in order; labels do not count."""
        digest = sha256()
        for pair in self:
            record = {key: value for key, value in _record(pair).items() if key != "meta"}
            digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write `pairs.jsonl` and `images/`, each picture once, named by its content.

        Nothing half-written is left behind where it fails.

        Raises:
            FileExistsError: where the folder exists and is not empty, or is a file.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{str(folder)!r} exists and is not empty; choose another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".pairs-") as near:
            new = Path(near) / "new"
            (new / _IMAGES).mkdir(parents=True)
            for image in (i for pair in self for p in (pair.clean, pair.corrupt) for i in p.images):
                path = new / _IMAGES / _image_name(image)
                if not path.exists():
                    image.save(path)
            lines = [json.dumps(_record(pair), ensure_ascii=False) + "\n" for pair in self]
            (new / _FILE).write_text("".join(lines), encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            new.rename(folder)

    @classmethod
    def load(cls, folder: str | Path, model: HookedMultimodal) -> PairDataset:
        """What `save` wrote, aligned for a model.

        Raises:
            PairError: with the file and line, where something is missing, unreadable, unknown or
                not aligned for this model.
        """
        path = Path(folder) / _FILE
        if not path.is_file():
            raise PairError(f"{str(path)!r} does not exist; give a folder that save() wrote")
        pairs = []
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                pairs.append(_read(line, Path(folder) / _IMAGES))
            except ValueError as error:
                raise PairError(f"{path}, line {number}: {error}") from error
        try:
            return cls(pairs, model)
        except PairError as error:
            raise PairError(f"{path} (pair 0 is on line 1): {error}") from error

    @staticmethod
    def peek(folder: str | Path) -> tuple[Pair, int]:
        """The first pair of what `save` wrote, and how many there are; asks no model.

        Raises:
            PairError: as `load`.
        """
        path = Path(folder) / _FILE
        lines = path.read_bytes().splitlines() if path.is_file() else []
        if not lines:
            raise PairError(f"{str(path)!r} does not exist or is empty")
        try:
            return _read(lines[0], Path(folder) / _IMAGES), len(lines)
        except ValueError as error:
            raise PairError(f"{path}, line 1: {error}") from error

    @classmethod
    def from_dataframe(
        cls, df: pd.DataFrame, model: HookedMultimodal, *, folder: str | Path = "."
    ) -> PairDataset:
        """Pairs from a table with one row each.

        Args:
            df: columns `clean_text`, `corrupt_text`, `answer`, `foil`; also `clean_image` and
                `corrupt_image` (a path, a PIL image, a list of them, or missing for text alone).
                Every other column becomes `meta`; missing values there are left out.
            folder: what relative paths are relative to.

        Raises:
            PairError: missing or doubled columns; the row and column of an unusable value.
        """
        missing = [name for name in COLUMNS if name not in df.columns]
        if missing:
            raise PairError(
                f"the table lacks the column(s) {', '.join(missing)}; it has "
                f"{', '.join(map(str, df.columns))}"
            )
        if not df.columns.is_unique:
            raise PairError(f"columns appear twice: {list(df.columns[df.columns.duplicated()])}")
        rows = df.to_dict(orient="records")
        return cls([_from_row(i, row, Path(folder)) for i, row in enumerate(rows)], model)


# Alignment -----------------------------------------------------------------------------------


def _refuse_empty(found: Sequence[Any], message: str) -> None:
    if not len(found):
        raise PairError(message)


def _encode(model: HookedMultimodal, prompts: Sequence[Prompt]) -> Batch:
    texts = [prompt.text for prompt in prompts]
    return model.encode(texts, [prompt.images for prompt in prompts])


def _check(pair: Pair, model: HookedMultimodal) -> None:
    if pair.clean == pair.corrupt:
        raise PairError(
            "the clean and the corrupt prompt are the same; change one or drop the pair"
        )
    _check_answers(pair, model)
    clean = _layout(pair.clean, model, "clean")
    _check_aligned(clean, _layout(pair.corrupt, model, "corrupt"))
    _places(clean, pair)


def _layout(prompt: Prompt, model: HookedMultimodal, side: str) -> TokenLayout:
    try:
        return _encode(model, [prompt]).layout
    except InputError as error:
        raise PairError(str(error).replace("prompt 0", f"the {side} prompt")) from error


def _check_answers(pair: Pair, model: HookedMultimodal) -> None:
    try:
        answer, foil = model.answer_tokens(pair.answer), model.answer_tokens(pair.foil)
    except ValueError as error:
        raise PairError(f"{error}; choose another answer and foil") from error
    if model.placeholder in answer + foil:
        raise PairError("an answer or foil has an image placeholder; leave it out")
    if answer == foil:
        raise PairError(
            f"answer and foil are the same tokens ({pair.answer!r}); choose another foil"
        )
    short = min(len(answer), len(foil))
    if answer[:short] == foil[:short]:
        raise PairError(
            f"of answer {pair.answer!r} and foil {pair.foil!r}, one begins with the other, so that "
            "it can never be likelier; choose another foil"
        )


def _check_aligned(clean: TokenLayout, corrupt: TokenLayout) -> None:
    """Refuse prompts whose positions do not correspond."""
    if clean.shape != corrupt.shape:
        raise PairError(
            f"the clean prompt fills {clean.shape[1]} positions, the corrupt one "
            f"{corrupt.shape[1]}; {_remedy(clean, corrupt)}"
        )
    for name in ("modality", "image", "view", "row", "column"):
        differs = (getattr(clean, name) != getattr(corrupt, name))[0].nonzero().flatten().tolist()
        if differs:
            raise PairError(
                f"position {differs[0]} is {_what(clean, differs[0])} in the clean prompt and "
                f"{_what(corrupt, differs[0])} in the corrupt one; give both the same form, or "
                "drop the pair"
            )
    if clean.media != corrupt.media:
        raise PairError(
            f"the clean prompt's images are {clean.media[0]}, the corrupt one's "
            f"{corrupt.media[0]}; resize one of them or drop the pair"
        )


def _remedy(clean: TokenLayout, corrupt: TokenLayout) -> str:
    if int(clean.mask("text").sum()) == int(corrupt.mask("text").sum()):
        return "resize one of the images or drop the pair"
    return "reword one of them to the same number of tokens or drop the pair"


def _what(layout: TokenLayout, position: int) -> str:
    """One position in words."""
    modality = MODALITIES[int(layout.modality[0, position])]
    if int(layout.row[0, position]) < 0:
        return modality
    image, row, column = (
        int(getattr(layout, name)[0, position]) for name in ("image", "row", "column")
    )
    return f"row {row}, column {column} of image {image}"


def _places(layout: TokenLayout, pair: Pair, row: int = 0) -> dict[str, list[int]]:
    """The positions of every span, disjoint."""
    found = {}
    for name, place in pair.spans.items():
        try:
            found[name] = layout.find(place, row)
        except SpanError as error:
            raise PairError(f"span {name!r}, looked up in the clean prompt: {error}") from error
        _refuse_empty(found[name], f"span {name!r} is empty; give it a place or leave it out")
    for one, other in combinations(found, 2):
        both = sorted(set(found[one]) & set(found[other]))
        if both:
            raise PairError(
                f"spans {one!r} and {other!r} overlap at position {both[0]}; spans must be disjoint"
            )
    return found


def _masks(
    layout: TokenLayout, pairs: Sequence[Pair], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    masks = {name: torch.zeros(layout.shape, dtype=torch.bool) for name in names}
    for row, pair in enumerate(pairs):
        for name, positions in _places(layout, pair, row).items():
            masks[name][row, positions] = True
    return masks


# What a model makes of them ------------------------------------------------------------------


def _judge(model: HookedMultimodal, batch: PairBatch) -> pd.DataFrame:
    """The rows of `PairDataset.check` for one batch."""
    runs = {"clean": batch.clean, "corrupt": batch.corrupt}
    logits = {side: last_logits(model, run) for side, run in runs.items()}

    def says(side: str) -> list[str]:
        texts = model.token_texts(logits[side].argmax(-1)[:, None])
        return [text.strip() for (text,) in texts]

    def measured(side: str, metric: Metric, answers: Answers) -> np.ndarray:
        if answers.single:
            found = metric(logits[side], answers)
        else:
            found = score(model, runs[side], answers, metric)
        return found.float().cpu().numpy()

    columns = {
        "kind": [pair.meta.get("kind", "") for pair in batch.pairs],
        "answer": [pair.answer for pair in batch.pairs],
        "foil": [pair.foil for pair in batch.pairs],
        "clean_says": says("clean"),
        "corrupt_says": says("corrupt"),
        "clean_right": measured("clean", accuracy, batch.answers) > 0,
        "flips": measured("corrupt", accuracy, batch.foils) > 0,
        "clean_logit_diff": measured("clean", logit_diff, batch.answers),
        "corrupt_logit_diff": measured("corrupt", logit_diff, batch.answers),
    }
    return pd.DataFrame(columns, index=list(batch.indices))


# Files and tables ----------------------------------------------------------------------------


def _image_name(image: Image.Image) -> str:
    """The file name of an RGB picture, from its size and pixels."""
    digest = sha256(f"{image.width} x {image.height}\n".encode() + image.tobytes())
    return f"{digest.hexdigest()}.png"


def _record(pair: Pair) -> dict[str, Any]:
    """A pair as JSON takes it, with file names for pictures."""
    sides = {"clean": pair.clean, "corrupt": pair.corrupt}
    return {
        **{
            name: {"text": prompt.text, "images": [_image_name(image) for image in prompt.images]}
            for name, prompt in sides.items()
        },
        "answer": pair.answer,
        "foil": pair.foil,
        "spans": {n: {"place": type(p).__name__, **asdict(p)} for n, p in pair.spans.items()},
        "meta": dict(pair.meta),
    }


def _read(line: bytes, images: Path) -> Pair:
    """A pair from one line.

    Raises:
        ValueError: for anything that is not as `_record` writes it.
    """
    record = json.loads(line)
    _exactly(record, ("clean", "corrupt", "answer", "foil", "spans", "meta"), "a pair")
    for name in ("spans", "meta"):
        if not isinstance(record[name], dict):
            raise PairError(f"{name} must be an object, not {record[name]!r}")
    for name in ("answer", "foil"):
        if not isinstance(record[name], str):
            raise PairError(f"the {name} must be a text, not {record[name]!r}")
    _check_meta(record["meta"])
    spans = {name: _read_place(name, place) for name, place in record["spans"].items()}
    clean, corrupt = (_read_prompt(record[side], images) for side in ("clean", "corrupt"))
    return Pair(clean, corrupt, record["answer"], record["foil"], spans, record["meta"])


def _exactly(record: Any, keys: Sequence[str], what: str) -> None:
    found = sorted(record) if isinstance(record, dict) else record
    if found != sorted(keys):
        raise PairError(f"{what} must have exactly the entries {', '.join(keys)}, not {found}")


def _read_prompt(record: Any, images: Path) -> Prompt:
    _exactly(record, ("text", "images"), "a prompt")
    if not isinstance(record["text"], str) or not isinstance(record["images"], list):
        raise PairError(f"a prompt needs a text and a list of images, not {record}")
    return Prompt(record["text"], tuple(_read_image(images, name) for name in record["images"]))


def _read_image(folder: Path, name: Any) -> Image.Image:
    path = folder / Path(str(name)).name
    try:
        image = open_picture(path, 0)
    except InputError as error:
        raise PairError(f"{str(path)!r} is missing or no image; restore the file") from error
    if _image_name(image) != path.name:
        raise PairError(f"{str(path)!r} is not the picture that was saved; restore the file")
    return image


def _read_place(name: str, record: Any) -> Where:
    kind = record.get("place") if isinstance(record, dict) else None
    if kind not in _PLACES:
        raise PairError(f"span {name!r} must be one of {', '.join(_PLACES)}, not {record!r}")
    try:
        values = {key: _read_value(key, value) for key, value in record.items() if key != "place"}
        return _PLACES[kind](**values)
    except (TypeError, ValueError) as error:
        raise PairError(f"span {name!r} is no {kind}: {error}") from error


def _read_value(key: str, value: Any) -> Any:
    """One attribute of a place, in the type that it has there."""
    if key == "cells":
        return tuple((as_index(row), as_index(column)) for row, column in value)
    if key == "text":
        return str(value)
    return as_index(value) if key in ("image", "view", "nth") else float(value)


def _from_row(number: int, row: Mapping[Any, Any], folder: Path) -> Pair:
    try:
        texts = {name: _text(row, name) for name in COLUMNS}
        clean, corrupt = (
            Prompt(texts[f"{side}_text"], _pictures(row, f"{side}_image", folder))
            for side in ("clean", "corrupt")
        )
        known = (*COLUMNS, *IMAGE_COLUMNS)
        meta = {
            str(name): _plain(name, value)
            for name, value in row.items()
            if name not in known and not _missing(value)
        }
        return Pair(clean, corrupt, texts["answer"], texts["foil"], meta=meta)
    except ValueError as error:
        raise PairError(f"row {number}: {error}") from error


def _text(row: Mapping[Any, Any], name: str) -> str:
    if not isinstance(row[name], str):
        raise PairError(f"column {name!r} must hold texts, not {row[name]!r}")
    return row[name]


def _missing(value: Any) -> bool:
    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))


def _plain(name: Any, value: Any) -> Value:
    """A table's value as a plain one."""
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, Value):
        raise PairError(f"column {name!r} must hold texts, numbers or booleans, not {value!r}")
    return value


def _pictures(row: Mapping[Any, Any], name: str, folder: Path) -> tuple[Image.Image, ...]:
    value = row.get(name)
    if _missing(value):
        return ()
    entries = value if isinstance(value, list | tuple) else [value]
    return tuple(_picture(entry, name, folder) for entry in entries)


def _picture(entry: Any, name: str, folder: Path) -> Image.Image:
    if not isinstance(entry, Image.Image | np.ndarray | str | Path):
        raise PairError(f"column {name!r} must hold paths or PIL images, not {entry!r}")
    try:
        return open_picture(folder / entry if isinstance(entry, str | Path) else entry, 0)
    except InputError as error:
        raise PairError(f"column {name!r}: {str(error).removeprefix('prompt 0: ')}") from error
