"""Parameters of methods that are no plain values: how a config names them, and what is made of it.

Everything is checked before a model is loaded (`check`) and made when its step runs (`make`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechmm.data import corruption, metrics
from mechmm.data.pairs import PairDataset
from mechmm.engine import sites
from mechmm.methods.acdc import Acdc
from mechmm.methods.attribution import Attribution
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.result import Result
from mechmm.runs.hints import MisfitError, cast, parameters
from mechmm.runs.place import Place

METRICS = {**metrics.METRICS, "flipped": metrics.flipped}
SITES: dict[str, Callable[..., sites.Sites]] = {
    f.__name__: f
    for f in (
        sites.residual,
        sites.attention,
        sites.mlps,
        sites.heads,
        sites.patterns,
        sites.neurons,
        sites.patches,
        sites.named,
        sites.projector,
    )
}
CORRUPTIONS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        corruption.blank,
        corruption.blur,
        corruption.gaussian_noise,
        corruption.mean_patches,
    )
}
SETTLED = ("region",)
"""Parameters that a config does not have: they depend on the picture."""


@dataclass(frozen=True)
class Known:
    """What a step may refer to: names of sets of pairs, and earlier steps with their methods; the
    folder that paths start from, and the seed of steps that name none."""

    sets: Sequence[str]
    steps: Mapping[str, str]
    later: Sequence[str] = ()
    base: Path = Path()
    seed: int = 0


@dataclass(frozen=True)
class Scene:
    """What a step runs on.

    Attributes:
        pairs: the sets by name. result: an earlier step's. base: where relative paths start.
    """

    model: HookedMultimodal
    pairs: Mapping[str, PairDataset]
    result: Callable[[str], Result]
    base: Path


@runtime_checkable
class Argument(Protocol):
    """A parameter that is no plain value."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        """The value with every default filled in.

        Raises:
            ConfigError: it cannot be made.
        """
        ...

    def make(self, value: Any, scene: Scene) -> Any:
        """What the method gets."""
        ...


@dataclass(frozen=True)
class Metric:
    """A metric by name."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        return place.choice(value, METRICS, "metric")

    def make(self, value: Any, scene: Scene) -> Any:
        return METRICS[value]


@dataclass(frozen=True)
class PairSet:
    """A set of pairs by name."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        return place.choice(value, known.sets, "set of pairs")

    def make(self, value: Any, scene: Scene) -> Any:
        return scene.pairs[value]


@dataclass(frozen=True)
class Sites:
    """A table of sites, or several that are added: `{ kind = "residual", spans = ["last"] }`."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        if isinstance(value, list) and value:
            return [self._one(each, place.at(i)) for i, each in enumerate(value)]
        return self._one(value, place)

    def make(self, value: Any, scene: Scene) -> Any:
        made = [self._made(each, scene) for each in (value if isinstance(value, list) else [value])]
        return sum(made[1:], made[0])

    def _one(self, value: Any, place: Place) -> Any:
        kind = kind_of(value, SITES, place, "kind of sites")
        return {"kind": kind, **filled(SITES[kind], rest_of(value), place, given=("model",))}

    def _made(self, value: Mapping[str, Any], scene: Scene) -> sites.Sites:
        make = SITES[value["kind"]]
        return make(scene.model, **typed(make, rest_of(value)))


@dataclass(frozen=True)
class Distortion:
    """A corruption of pictures by name: `{ kind = "gaussian_noise", sd = 80 }`."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        kind = kind_of(value, CORRUPTIONS, place, "corruption")
        given = ("image", *SETTLED)
        return {"kind": kind, **filled(CORRUPTIONS[kind], rest_of(value), place, given=given)}

    def make(self, value: Any, scene: Scene) -> Any:
        change = CORRUPTIONS[value["kind"]]
        return corruption.on_images(change, **typed(change, rest_of(value)))


@dataclass(frozen=True)
class Earlier:
    """The result of an earlier step: `{ step = "eap" }`.

    Attributes:
        methods: that it may come from. read: what of it is taken, by name; "": all.
    """

    methods: tuple[str, ...]
    read: str = ""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        value = table_of(value, place, '{ step = "..." }')
        place.only(value, ("step",))
        self.step(value, place, known)
        return dict(value)

    def make(self, value: Any, scene: Scene) -> Any:
        found = scene.result(value["step"])
        return getattr(found, self.read)() if self.read else found

    def step(self, value: Mapping[str, Any], place: Place, known: Known) -> str:
        """The name of the step, which exists, comes earlier, and gives the right thing."""
        if "step" not in value:
            raise place.error('missing key `step`: write { step = "..." }')
        name, at = value["step"], place.at("step")
        if name in known.later:
            raise at.error(f"step {name!r} comes later; put it before this one")
        at.choice(name, list(known.steps), "step")
        if known.steps[name] not in self.methods:
            wanted = " or ".join(self.methods)
            raise at.error(f"step {name!r} is {known.steps[name]}; give one that is {wanted}")
        return name


@dataclass(frozen=True)
class Circuit:
    """A circuit of an earlier step's scores, `{ step = "eap", fraction = 0.05 }`, or the one that
    a search found, `{ step = "acdc" }`; where `several`, also a list of them."""

    several: bool = False

    def check(self, value: Any, place: Place, known: Known) -> Any:
        if self.several and isinstance(value, list) and value:
            return [self._one(each, place.at(i), known) for i, each in enumerate(value)]
        return self._one(value, place, known)

    def make(self, value: Any, scene: Scene) -> Any:
        if isinstance(value, list):
            return [self.make(each, scene) for each in value]
        found = scene.result(value["step"])
        if isinstance(found, Acdc):
            return found.circuit
        assert isinstance(found, Attribution)
        options = {k: v for k, v in value.items() if k != "step"}
        return found.circuit(**typed(Attribution.circuit, options))

    def _one(self, value: Any, place: Place, known: Known) -> Any:
        value = table_of(value, place, '{ step = "...", fraction = 0.05 }')
        name = Earlier(("attribute", "acdc")).step(value, place, known)
        rest = {k: v for k, v in value.items() if k != "step"}
        if known.steps[name] == "acdc":
            place.only(rest, ())
            return {"step": name}
        sizes = [k for k in ("n", "fraction", "threshold") if rest.get(k, "none") != "none"]
        if len(sizes) != 1:
            raise place.error("give one of `n`, `fraction` and `threshold`, the circuit's size")
        return {"step": name, **filled(Attribution.circuit, rest, place, given=("self",))}


@dataclass(frozen=True)
class Checkpoints:
    """Folders (relative to the config) or hub names of checkpoints."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise place.error(f"must be a list of folders or hub names, not {value!r}")
        return [local(each, known.base) for each in value]

    def make(self, value: Any, scene: Scene) -> Any:
        return [str(scene.base / each) if (scene.base / each).is_dir() else each for each in value]


def local(name: str, base: Path) -> str:
    """A folder's path relative to the config; any other name as it is."""
    given = Path(name).expanduser()
    if given.is_absolute() or (base / given).is_dir():
        return Path(os.path.relpath(base / given, base)).as_posix()
    return name


# Plain values --------------------------------------------------------------------------------


def table_of(value: Any, place: Place, like: str) -> Mapping[str, Any]:
    """A table, or an error that says what one looks like."""
    if not isinstance(value, Mapping):
        raise place.error(f"must be a table such as {like}, not {value!r}")
    return value


def kind_of(value: Any, known: Mapping[str, Any], place: Place, what: str) -> str:
    """The `kind` of a table."""
    value = table_of(value, place, '{ kind = "..." }')
    if "kind" not in value:
        raise place.error(f"missing key `kind`; use one of {', '.join(known)}")
    return place.at("kind").choice(value["kind"], list(known), what)


def rest_of(value: Mapping[str, Any]) -> dict[str, Any]:
    """A table less its kind."""
    return {key: item for key, item in value.items() if key != "kind"}


def filled(
    function: Callable[..., Any],
    options: Mapping[str, Any],
    place: Place,
    given: Sequence[str] = (),
) -> dict[str, Any]:
    """Plain options of a function, checked, with every default that TOML can say filled in.

    Raises:
        ConfigError: an unknown or missing option, or one of a wrong type.
    """
    known = {n: p for n, p in parameters(function).items() if n not in given}
    place.only(options, list(known))
    return {
        name: said
        for name, (hint, default) in known.items()
        if (said := plain(name, hint, default, options, place)) is not Ellipsis
    }


def plain(name: str, hint: Any, default: Any, options: Mapping[str, Any], place: Place) -> Any:
    """One plain option as JSON has it; Ellipsis where its default cannot be said."""
    if name in options:
        try:
            return jsonable(cast(options[name], hint))
        except MisfitError as error:
            raise place.at(name).error(str(error)) from None
    if default is Parameter.empty:
        raise place.error(f"missing key `{name}`")
    try:
        return jsonable(cast(jsonable(default), hint))
    except (MisfitError, TypeError):
        return Ellipsis


def typed(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options in the types that a function has."""
    known = parameters(function)
    return {name: cast(value, known[name][0]) for name, value in options.items()}


def jsonable(value: Any) -> Any:
    """Tuples as lists, None as "none"."""
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return [jsonable(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool):
        return value
    raise TypeError(type(value).__name__)
