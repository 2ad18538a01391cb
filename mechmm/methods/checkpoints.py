"""Any method over the checkpoints of a training run: when does what it finds come to be?

A method is a function of a model that gives a result, for example

    lambda model: mm.patch(model, mm.data.shapes.color_pairs(model, n=16), sites(model))

It runs on every checkpoint, and on a model of the same architecture with random weights, the null:
what is found there is no product of training (Adebayo et al. 1810.03292 ask this of saliency maps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from mechmm.model.hooked import HookedMultimodal, source_of
from mechmm.model.untrained import untrained
from mechmm.results import plots
from mechmm.results.result import Result, class_named
from mechmm.results.statistics import bootstrap_interval

Checkpoint = str | Path | tuple[str, str]
"""A folder, a hub name, or a hub name and a revision of it."""
Method = Callable[[HookedMultimodal], Result]
Measure = Callable[[Any], float | Tensor | np.ndarray]
"""What is read off a result: one number, or one per example [example]."""
UNTRAINED = "untrained"
IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, eq=False)
class OverCheckpoints(Result):
    """What a method found on every checkpoint.

    Attributes:
        checkpoints: names, in the order given; the null, if there is one, is named `untrained`
            and comes last.
        results: one per name.
    """

    checkpoints: tuple[str, ...]
    results: tuple[Result, ...]

    def __len__(self) -> int:
        return len(self.checkpoints)

    def to_dataframe(self) -> pd.DataFrame:
        """The tables of all results one below the other, with the column `checkpoint`."""
        tables = [result.to_dataframe() for result in self.results]
        named = zip(self.checkpoints, tables, strict=True)
        return pd.concat([t.assign(checkpoint=name) for name, t in named], ignore_index=True)

    def measured(self, measures: Mapping[str, Measure]) -> pd.DataFrame:
        """What can be read off the results: one row per checkpoint and measure, with a 95 %
        bootstrap interval over examples where there is one number per example."""
        rows = []
        for name, measure in measures.items():
            for checkpoint, result in zip(self.checkpoints, self.results, strict=True):
                rows.append((checkpoint, name, *_with_interval(measure(result))))
        return pd.DataFrame(rows, columns=["checkpoint", "measure", "value", "low", "high"])

    def plot(self, measures: Mapping[str, Measure]) -> dict[str, Figure]:
        """A curve per measure over the checkpoints, beside the value of the untrained model."""
        table = self.measured(measures)
        return {str(n): _bars(str(n), group) for n, group in table.groupby("measure", sort=False)}

    def _values(self) -> dict[str, Any]:
        stored = [{"class": type(r).__name__, "values": r._values()} for r in self.results]
        return {"checkpoints": self.checkpoints, "results": tuple(stored)}

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> OverCheckpoints:
        stored = values["results"]
        return cls(values["checkpoints"], tuple(_stored(**result) for result in stored))


def over_checkpoints(
    method: Method,
    checkpoints: Sequence[Checkpoint],
    *,
    null: bool = True,
    seed: int = 0,
    **options: Any,
) -> OverCheckpoints:
    """Run a method on every checkpoint of one training run.

    One model is in memory at a time.

    Args:
        method: gives a `Result` for a model. It makes its own pairs, which belong to a model.
        checkpoints: folders or hub names; (name, revision) for a revision of one on the hub.
        null: whether it runs on a model with random weights, too.
        seed: of those weights.
        options: of `HookedMultimodal.from_pretrained` (device, dtype, ...).

    Raises:
        ValueError: no checkpoints, one twice, or one of another architecture or size than the
            first; found before anything runs.
        TypeError: the method gives no `Result`.
        OSError: a checkpoint that cannot be found.
    """
    named = [_named(checkpoint) for checkpoint in checkpoints]
    _check(named)
    results = []
    for number, (name, revision) in enumerate(named):
        model = HookedMultimodal.from_pretrained(name, revision=revision, **options)
        results.append(_result(method, model))
        if null and number == len(named) - 1:
            results.append(_result(method, untrained(model, seed)))
    names = [_label(*pair) for pair in named] + [UNTRAINED] * null
    return OverCheckpoints(tuple(names), tuple(results))


def _stored(**result: Any) -> Result:
    kind = class_named(result["class"], Result)
    if kind is None:
        raise ValueError(f"there is no result {result['class']}; import what defines it first")
    return kind._from_values(result["values"])


def _bars(name: str, table: pd.DataFrame) -> Figure:
    """A measure on every checkpoint, over the interval of the untrained model."""
    trained = table[table["checkpoint"] != UNTRAINED]
    null = table[table["checkpoint"] == UNTRAINED]
    value, low, high = (trained[column].to_numpy(float) for column in ("value", "low", "high"))
    ends = null[["low", "high"]].fillna(null["value"].mean()).to_numpy(float)
    return plots.bars(
        trained["checkpoint"].tolist(),
        value,
        low,
        high,
        f"{name} over training",
        null=(ends[0, 0], ends[0, 1]) if len(ends) else None,
        value_title=name,
        null_title="untrained model",
    )


def _named(checkpoint: Checkpoint) -> tuple[str, str | None]:
    return checkpoint if isinstance(checkpoint, tuple) else (str(checkpoint), None)


def _label(name: str, revision: str | None) -> str:
    """The last part of a folder's path, or a name on the hub and its revision."""
    short = Path(name).name if Path(name).is_dir() else name
    return short if revision is None else f"{short}@{revision}"


def _check(named: Sequence[tuple[str, str | None]]) -> None:
    labels = [_label(*pair) for pair in named]
    if not labels:
        raise ValueError("no checkpoints: give folders, or names and revisions on the hub")
    if twice := [label for label in labels if labels.count(label) > 1 or label == UNTRAINED]:
        raise ValueError(f"two checkpoints would be named {twice[0]!r}; rename a folder")
    first = None
    for (name, revision), label in zip(named, labels, strict=True):
        own = _shape(name, revision)
        first = own if first is None else first
        if own != first:
            odd = sorted(k for k in {*own, *first} if own.get(k) != first.get(k))
            raise ValueError(
                f"checkpoint {label} is of another architecture than {labels[0]}: {odd[0]} is "
                f"{own.get(odd[0])!r} there and {first.get(odd[0])!r} here; compare checkpoints "
                "of one model"
            )


def _shape(name: str, revision: str | None) -> dict[str, Any]:
    """What a checkpoint's config says of its architecture, names of nested entries joined."""
    found: PretrainedConfig = AutoConfig.from_pretrained(source_of(name), revision=revision)
    return dict(_flat(found.to_dict()))


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        if key not in IGNORED:
            nested = isinstance(value, dict)
            rows += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return rows


def _result(method: Method, model: HookedMultimodal) -> Result:
    found = method(model)
    if not isinstance(found, Result):
        raise TypeError(
            f"the method gave a {type(found).__name__}, which is no result; give one that returns "
            "what a mechmm method returns, without plot() or mean()"
        )
    return found


def _with_interval(found: float | Tensor | np.ndarray) -> tuple[float, float, float]:
    """A number, or the mean of one per example and its interval."""
    values = np.asarray(found, dtype=float)
    if values.ndim == 0:
        return float(values), np.nan, np.nan
    low, high = bootstrap_interval(values)
    return float(values.mean()), float(low), float(high)
