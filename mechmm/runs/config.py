"""What a run is: the model, the sets of pairs, the steps and the headlines, from a TOML file.

Everything that can be known without the model is checked here: unknown keys, wrong types, missing
ones, unknown methods, makers, metrics and kinds of sites, steps that refer to no earlier one. An
error names the file, the line where it can be found, and the key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from mechmm.runs import tables
from mechmm.runs.arguments import Known, local
from mechmm.runs.engines import ENGINES, LEAST, Engine
from mechmm.runs.expectation import Expectation
from mechmm.runs.hints import MisfitError, cast
from mechmm.runs.lines import lines_of
from mechmm.runs.makers import KEEP, MAKERS, check_corruption, check_options
from mechmm.runs.methods import METHODS
from mechmm.runs.overrides import apply
from mechmm.runs.place import ConfigError, Place

FORMAT = 1
STATISTICS = ("mean", "median", "max", "min", "count")
DTYPES = ("auto", "float64", "float32", "float16", "bfloat16")
T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """Which model: a hub name, `mechmm/demo`, or a folder (relative to the config).

    Attributes:
        sha256: over the model's files; the run is refused where it differs.
        Others: as `HookedMultimodal.from_pretrained`.
    """

    name: str
    revision: str | None = None
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class PairSet:
    """A named set of pairs, made or loaded.

    Attributes:
        make: name of a maker, with `options`; or `folder`, written by `PairDataset.save`.
        clean: a distortion of the pictures of the clean prompts, or None.
        keep: `flips`, `right` or `all`.
        corrupt: a corruption of the pictures that makes the corrupt prompts, or None.
        sha256: of the pairs' content; the run is refused where it differs.
    """

    name: str
    make: str | None = None
    folder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    keep: str = "all"
    clean: Mapping[str, Any] | None = None
    corrupt: Mapping[str, Any] | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Step:
    """One call of a method; `options` are its parameters, defaults filled in."""

    name: str
    method: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Headline:
    """One number read off the table of a step.

    Attributes:
        column, where: of the rows whose columns have these values, or of numbers fit a comparison
            such as `>= 0.85`.
        table: of the step's result; the default is the one that every result has.
        minus: another column, which is subtracted row by row.
        statistic: of the rows. low, high: columns that hold the interval of a single row; "": none.
        expect: the prediction, for example `<= 0.35` or `in [0.2, 0.4]`.
    """

    name: str
    step: str
    column: str
    where: Mapping[str, Any] = field(default_factory=dict)
    minus: str | None = None
    statistic: str = "mean"
    low: str = "low"
    high: str = "high"
    table: str = tables.MAIN
    expect: str | None = None


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        overrides: what the command line set. given: the file's bytes.
        base: the folder that relative paths start from.
    """

    name: str
    model: Model
    pairs: Mapping[str, PairSet]
    steps: Sequence[Step]
    headlines: Sequence[Headline] = ()
    engine: Engine = field(default_factory=Engine)
    question: str = ""
    prediction: str = ""
    seed: int = 0
    overrides: tuple[str, ...] = ()
    given: bytes = b""
    base: Path = Path()

    def to_dict(self) -> dict[str, Any]:
        """The config with every default filled in, in the form that `parse` reads."""
        return {
            "format": FORMAT,
            **{key: getattr(self, key) for key in ("name", "question", "prediction", "seed")},
            "model": _without_none(asdict(self.model)),
            "pairs": {name: _set_dict(one) for name, one in self.pairs.items()},
            "steps": [{"name": s.name, "method": s.method, **s.options} for s in self.steps],
            "headlines": [_without_none(asdict(one)) for one in self.headlines],
            "engine": _without_none(asdict(self.engine)),
        }


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a config.

    Args:
        overrides: `key=value` each, for example `pairs.color.n=8`.

    Raises:
        ConfigError: what is wrong, with the line and the key.
        OSError: the file cannot be read.
    """
    path = Path(path)
    given = path.read_bytes()
    try:
        text = given.decode()
        raw = tomllib.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path.name} is no TOML: {error}") from error
    paths = apply(raw, overrides)
    place = Place(path.name, lines=lines_of(text), overridden=paths)
    return parse(raw, place, path.absolute().parent, given, tuple(overrides))


def parse(
    raw: Mapping[str, Any],
    place: Place,
    base: Path,
    given: bytes = b"",
    overrides: tuple[str, ...] = (),
) -> Config:
    """A config from its table, checked.

    Raises:
        ConfigError: what is wrong, with the key.
    """
    place.only(raw, ("format", "name", "question", "prediction", "seed", *_TABLES))
    if raw.get("format", FORMAT) != FORMAT:
        raise place.at("format").error(f"this mechmm reads format {FORMAT}, not {raw['format']!r}")
    seed = _value(raw, "seed", int, place, 0)
    pairs = _sets(raw, place, base, seed)
    steps = _steps(raw, place, pairs, base, seed)
    name = _value(raw, "name", str, place)
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise place.at("name").error(f"{name!r} must be letters, digits, `_`, `-` and `.`")
    return Config(
        name=name,
        model=_model(raw, place, base),
        pairs=pairs,
        steps=steps,
        headlines=_headlines(raw, place, steps),
        engine=_engine(raw, place),
        question=_value(raw, "question", str, place, ""),
        prediction=_value(raw, "prediction", str, place, ""),
        seed=seed,
        overrides=overrides,
        given=given,
        base=base,
    )


_TABLES = ("model", "pairs", "steps", "headlines", "engine")
_OWN = ("make", "folder", "keep", "clean", "corrupt", "sha256")


def _model(raw: Mapping[str, Any], place: Place, base: Path) -> Model:
    found = _section(Model, _table(raw, "model", place), place.at("model"))
    at = place.at("model")
    if found.dtype is not None:
        at.at("dtype").choice(found.dtype, DTYPES, "dtype")
    if found.device is not None and found.device_map is not None:
        raise at.error("give either `device` or `device_map`")
    return Model(**{**asdict(found), "name": local(found.name, base)})


def _sets(raw: Mapping[str, Any], place: Place, base: Path, seed: int) -> dict[str, PairSet]:
    place = place.at("pairs")
    table = raw.get("pairs", {})
    if not isinstance(table, Mapping):
        raise place.error(f"must be tables such as [pairs.color], not {table!r}")
    return {name: _set(name, value, place.at(name), base, seed) for name, value in table.items()}


def _set(name: str, value: Any, place: Place, base: Path, seed: int) -> PairSet:
    _check_name(name, place)
    if not isinstance(value, Mapping):
        raise place.error(f"must be a table such as [pairs.{name}], not {value!r}")
    if ("make" in value) == ("folder" in value):
        raise place.error("give one of `make` and `folder`")
    own = {k: v for k, v in value.items() if k in _OWN}
    options = {k: v for k, v in value.items() if k not in own}
    for side in ("clean", "corrupt"):
        if own.get(side) is not None:
            own[side] = check_corruption(own[side], place.at(side))
    found = _section(PairSet, {**own, "name": name, "options": {}}, place)
    place.at("keep").choice(found.keep, KEEP, "keep")
    if found.make is None:
        place.only(options, _OWN[1:])
        return PairSet(**{**_shallow(found), "folder": local(str(found.folder), base)})
    place.at("make").choice(found.make, MAKERS, "maker")
    checked = check_options(found.make, {"seed": seed, **options}, place)
    return PairSet(**{**_shallow(found), "options": checked})


def _steps(
    raw: Mapping[str, Any], place: Place, sets: Mapping[str, PairSet], base: Path, seed: int
) -> tuple[Step, ...]:
    rows = _rows(raw, "steps", place)
    if not rows:
        raise place.at("steps").error("there are no steps; give at least one [[steps]]")
    names = [str(row.get("name")) for row in rows]
    found: list[Step] = []
    for number, row in enumerate(rows):
        at = place.at("steps").at(number)
        name, method = _value(row, "name", str, at), _value(row, "method", str, at)
        _check_name(name, at.at("name"))
        if name in names[:number]:
            raise at.at("name").error(f"two steps are named {name!r}")
        at.at("method").choice(method, METHODS, "method")
        earlier = {step.name: step.method for step in found}
        known = Known(tuple(sets), earlier, names[number:], base, seed)
        options = {key: value for key, value in row.items() if key not in ("name", "method")}
        found.append(Step(name, method, METHODS[method].check(options, at, known)))
    return tuple(found)


def _headlines(raw: Mapping[str, Any], place: Place, steps: Sequence[Step]) -> tuple[Headline, ...]:
    found = []
    for number, row in enumerate(_rows(raw, "headlines", place)):
        at = place.at("headlines").at(number)
        one = _section(Headline, row, at)
        methods = {step.name: METHODS[step.method] for step in steps}
        method = methods[at.at("step").choice(one.step, list(methods), "step")]
        at.at("table").choice(one.table, tables.names(method.function), "table")
        at.at("statistic").choice(one.statistic, STATISTICS, "statistic")
        for column, value in one.where.items():
            if not isinstance(value, (str, int, float)):
                message = f'must be one value or a comparison such as ">= 2", not {value!r}'
                raise at.at("where").at(column).error(message)
        if one.expect is not None:
            try:
                Expectation.read(one.expect)
            except ValueError as error:
                raise at.at("expect").error(str(error)) from None
        found.append(one)
    return tuple(found)


def _engine(raw: Mapping[str, Any], place: Place) -> Engine:
    at = place.at("engine")
    found = _section(Engine, raw.get("engine", {}), at)
    at.at("name").choice(found.name, ENGINES, "engine")
    for key, low in LEAST.items():
        if getattr(found, key) < low:
            raise at.at(key).error(f"must be {low} or more, not {getattr(found, key)}")
    if found.name == "local" and found.elsewhere:
        raise at.error('workers, cpus, gpus and address are for name = "ray"; this run is local')
    return found


# Tables and values ---------------------------------------------------------------------------


def _section(kind: type[T], raw: Any, place: Place) -> T:
    """A dataclass from a table with exactly its fields."""
    if not isinstance(raw, Mapping):
        raise place.error(f"must be a table, not {raw!r}")
    hints, own = get_type_hints(kind), fields(kind)  # type: ignore[arg-type]
    place.only(raw, [f.name for f in own])
    values = {}
    for f in own:
        needed = f.default is MISSING and f.default_factory is MISSING
        if f.name in raw or needed:
            values[f.name] = _value(raw, f.name, hints[f.name], place)
    return kind(**values)


def _value(raw: Mapping[str, Any], key: str, hint: Any, place: Place, *default: Any) -> Any:
    if key not in raw:
        if default:
            return default[0]
        raise place.error(f"missing key `{key}`")
    try:
        return cast(raw[key], hint)
    except MisfitError as error:
        raise place.at(key).error(str(error)) from None


def _table(raw: Mapping[str, Any], key: str, place: Place) -> Mapping[str, Any]:
    if key not in raw:
        raise place.error(f"missing table [{key}]")
    return raw[key]


def _rows(raw: Mapping[str, Any], key: str, place: Place) -> list[Mapping[str, Any]]:
    rows = raw.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise place.at(key).error(f"must be tables, each begun by [[{key}]]")
    return rows


def _check_name(name: str, place: Place) -> None:
    """Names become folders."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise place.error(f"the name {name!r} must be letters, digits, `_` and `-`")


def _shallow(one: Any) -> dict[str, Any]:
    return {f.name: getattr(one, f.name) for f in fields(one)}


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _set_dict(one: PairSet) -> dict[str, Any]:
    own = {key: getattr(one, key) for key in _OWN}
    return {**_without_none(own), **one.options}
