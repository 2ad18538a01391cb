"""The methods that a config may name, and how each is run: by chunks of pairs or on all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any

import mechmm
from mechmm.data.pairs import PairDataset
from mechmm.data.questions import KINDS
from mechmm.engine.contrast import TARGETS
from mechmm.engine.embeddings import check_dual
from mechmm.methods import (
    attribution,
    direct_logit_attribution,
    minimality,
    neuron_attribution,
)
from mechmm.methods.patching import SCREENS, SOURCES
from mechmm.model.hooked import HookedMultimodal
from mechmm.results.result import Result
from mechmm.results.units import GRANULARITIES
from mechmm.runs import composed
from mechmm.runs.arguments import (
    Argument,
    Checkpoints,
    Circuit,
    Distortion,
    Earlier,
    Known,
    Metric,
    PairSet,
    Scene,
    Sites,
    plain,
    table_of,
)
from mechmm.runs.hints import NONE, cast, parameters
from mechmm.runs.place import Place

GIVEN = ("model", "report", "tokens")
"""Parameters that the run itself gives."""
RENAMED = {"method": "algorithm"}
"""What a config calls parameters whose names a step has for itself."""
ARGUMENTS: Mapping[str, Argument] = {
    "metric": Metric(),
    "pairs": PairSet(),
    "data": PairSet(),
    "prompts": PairSet(),
    "fit": PairSet(),
    "image_pairs": PairSet(),
    "text_pairs": PairSet(),
    "sites": Sites(),
    "distortion": Distortion(),
    "scores": Earlier(("attribute",)),
    "lens": Earlier(("tuned_lens",)),
    "circuit": Circuit(),
    "other_sites": Sites(),
    "other_circuit": Circuit(),
    "image_circuit": Circuit(),
    "text_circuit": Circuit(),
}
"""By parameter, wherever a method has it."""


Options = Mapping[str, Any]
CHOICES: Mapping[str, Sequence[str]] = {
    "target": TARGETS,
    "direction": tuple(SOURCES),
    "screen": (NONE, *SCREENS),
    "granularity": (NONE, *GRANULARITIES),
    "prompt": ("clean", "corrupt"),
    "attribute.algorithm": attribution.METHODS,
    "neuron_attribution.algorithm": tuple(neuron_attribution.METHODS),
    "neuron_attribution.ablation": neuron_attribution.ABLATIONS,
    "text_span.kind": tuple(KINDS),
    "ablate_tokens.by": ("mean", "zero", "corrupt"),
    "minimality.by": minimality.BY,
    "direct_logit_attribution.of": ("difference", "answer"),
    "direct_logit_attribution.ablation": direct_logit_attribution.ABLATIONS,
}
"""Values of text parameters, of any method or of one, so that a wrong one is found at once."""


@dataclass(frozen=True)
class Nested:
    """A method with its options, to be run on other models:
    `{ method = "attribute", pairs = "color" }`."""

    def check(self, value: Any, place: Place, known: Known) -> Any:
        value = table_of(value, place, '{ method = "attribute" }')
        if "method" not in value:
            raise place.error("missing key `method`")
        names = [name for name in METHODS if name != "over_checkpoints"]
        name = place.at("method").choice(value["method"], names, "method")
        options = {key: item for key, item in value.items() if key != "method"}
        return {"method": name, **METHODS[name].check(options, place, known)}

    def make(self, value: Any, scene: Scene) -> Callable[[HookedMultimodal], Result]:
        options = {key: item for key, item in value.items() if key != "method"}
        method = METHODS[value["method"]]

        def on(model: HookedMultimodal, **given: Any) -> Result:
            used = method.sets(options).values()
            sets = {name: PairDataset(scene.pairs[name], model) for name in used}
            return method.run(options, replace(scene, model=model, pairs=sets), **given)

        return on


@dataclass(frozen=True)
class Method:
    """How a config calls a method.

    Attributes:
        function: the method.
        chunked: whether, with some options, chunks of pairs are joined to what all pairs at once
            give; other methods choose, learn, average or draw over all pairs.
        first: its parameter that a config calls `pairs`.
        hidden: parameters that no config has.
        own: parameters of this method alone that are no plain values.
        check_model: refuses models that the method cannot be used on, before anything runs.
    """

    function: Callable[..., Result]
    chunked: Callable[[Options], bool] = lambda options: False
    first: str = "pairs"
    hidden: tuple[str, ...] = ()
    own: tuple[tuple[str, Argument], ...] = ()
    check_model: Callable[[HookedMultimodal], None] = lambda model: None

    @property
    def parameters(self) -> dict[str, tuple[Any, Any]]:
        """Hint and default by the name that a config has for it."""
        found = {}
        for name, what in parameters(self.function).items():
            if name not in GIVEN and name not in self.hidden:
                found[self.said(name)] = what
        return found

    def said(self, parameter: str) -> str:
        """What a config calls a parameter."""
        return "pairs" if parameter == self.first else RENAMED.get(parameter, parameter)

    @property
    def _own_names(self) -> dict[str, str]:
        """Parameters by what a config calls them."""
        return {self.said(name): name for name in parameters(self.function)}

    def argument(self, name: str) -> Argument | None:
        """What makes a parameter, None where it is a plain value."""
        return dict(self.own).get(self._own_names[name], ARGUMENTS.get(name))

    def check(self, options: Mapping[str, Any], place: Place, known: Known) -> dict[str, Any]:
        """The options with every default filled in.

        Raises:
            ConfigError: an unknown or missing option, a wrong type, an unknown name.
        """
        found: dict[str, Any] = {}
        if "seed" in self.parameters:
            options = {"seed": known.seed, **options}
        place.only(options, ["name", "method", *self.parameters])
        for name, (hint, default) in self.parameters.items():
            value = self._checked(name, hint, default, options, place, known)
            if value is not Ellipsis:
                found[name] = value
        return found

    def _checked(
        self,
        name: str,
        hint: Any,
        default: Any,
        options: Mapping[str, Any],
        place: Place,
        known: Known,
    ) -> Any:
        argument = self.argument(name)
        if argument is None:
            value = plain(name, hint, default, options, place)
            known_values = CHOICES.get(f"{self.function.__name__}.{name}", CHOICES.get(name))
            if known_values is not None:
                place.at(name).choice(value, known_values, name)
            return value
        if name in options:
            return argument.check(options[name], place.at(name), known)
        if name == "pairs" and len(known.sets) == 1:
            return known.sets[0]
        if name == "metric":
            return default.__name__
        if default is Parameter.empty:
            there = _sets_there(known) if name == "pairs" else ""
            raise place.error(f"missing key `{name}`{there}")
        return Ellipsis

    def sets(self, options: Mapping[str, Any]) -> dict[str, str]:
        """Names of the sets of pairs by parameter."""
        found = {n: v for n, v in options.items() if isinstance(self.argument(n), PairSet)}
        return {name: str(value) for name, value in found.items()}

    def run(self, options: Mapping[str, Any], scene: Scene, **given: Any) -> Result:
        """Call the method with checked options."""
        known, own = self.parameters, {}
        for name, value in options.items():
            argument = self.argument(name)
            made = cast(value, known[name][0]) if argument is None else argument.make(value, scene)
            own[self._own_names[name]] = made
        accepted = parameters(self.function)
        return self.function(
            scene.model, **own, **{n: v for n, v in given.items() if n in accepted}
        )


def _sets_there(known: Known) -> str:
    if known.sets:
        return f" (there are {', '.join(known.sets)})"
    return "; give at least one set of pairs, for example [pairs.color]"


def _always(options: Options) -> bool:
    return True


def _own_run(options: Options) -> bool:
    """What takes the place of what is cut off is of the same pair, or zero."""
    return options["target"] != "mean"


def _patched(options: Options) -> bool:
    of_all_pairs = options["direction"] in ("mean", "resample") or options["screen"] != "none"
    return not of_all_pairs


def _scored(options: Options) -> bool:
    return _own_run(options) and options["algorithm"] != "random"


def _uncut(options: Options) -> bool:
    return _own_run(options) and options["n_greedy"] == 0


def _table() -> dict[str, Method]:
    rows = (
        Method(mechmm.patch, _patched),
        Method(mechmm.attribute, _scored, hidden=("graph",)),
        Method(mechmm.faithfulness, _own_run, own=(("circuit", Circuit(several=True)),)),
        Method(mechmm.faithfulness_curve, _own_run),
        Method(mechmm.completeness, _uncut),
        Method(mechmm.minimality, _own_run),
        Method(mechmm.interchange, _own_run, first="image_pairs"),
        Method(mechmm.pruning_curve, _always),
        Method(mechmm.early_exit, _always),
        Method(mechmm.acdc),
        Method(mechmm.ablate_tokens),
        Method(mechmm.knockout),
        Method(composed.mediation),
        Method(mechmm.attention_maps),
        Method(mechmm.logit_lens, first="prompts", hidden=("chunk",)),
        Method(mechmm.tuned_lens, first="prompts"),
        Method(composed.latent_lens),
        Method(mechmm.direct_logit_attribution),
        Method(mechmm.back_patch),
        Method(mechmm.neuron_attribution),
        Method(mechmm.neuron_selectivity, first="data"),
        Method(mechmm.dissection, first="data", hidden=("concepts",)),
        Method(mechmm.input_attribution),
        Method(
            mechmm.deletion_insertion,
            own=(("scores", Earlier(("input_attribution",), "image_scores")),),
        ),
        Method(mechmm.modality_shares, own=(("control", PairSet()),)),
        Method(mechmm.emap),
        Method(mechmm.probe, first="data"),
        Method(mechmm.modality_gap, first="data"),
        Method(mechmm.cka, first="data", hidden=("other", "other_data")),
        Method(composed.dictionary),
        Method(mechmm.steering),
        Method(mechmm.attention_steering),
        Method(mechmm.hallucination),
        Method(mechmm.subspace_interchange),
        Method(composed.text_span, first="", check_model=check_dual),
        Method(composed.overlap, first=""),
        Method(composed.rediscovery),
        Method(composed.chosen_circuit, first=""),
        Method(composed.answers),
        Method(
            composed.over_checkpoints,
            first="",
            own=(("of", Nested()), ("checkpoints", Checkpoints())),
        ),
    )
    return {row.function.__name__: row for row in rows}


METHODS = _table()
"""By name."""
