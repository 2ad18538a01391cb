"""The methods that a config may name, and how each is run: by chunks of pairs or on all at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import mechmm
from mechmm.results.result import Result
from mechmm.runs import composed
from mechmm.runs.arguments import (
    Argument,
    Circuit,
    Distortion,
    Earlier,
    Known,
    Metric,
    PairSet,
    Scene,
    Sites,
    plain,
)
from mechmm.runs.hints import cast, parameters
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
    "circuits": Circuit(several=True),
    "other_circuit": Circuit(),
    "image_circuit": Circuit(),
    "text_circuit": Circuit(),
}
"""By parameter, wherever a method has it."""


@dataclass(frozen=True)
class Method:
    """How a config calls a method.

    Attributes:
        function: the method.
        chunked: whether chunks of pairs, joined, are what all pairs at once give; other methods
            choose, learn, average or draw over all pairs.
        first: its parameter that a config calls `pairs`.
        hidden: parameters that no config has.
        own: parameters of this method alone that are no plain values.
    """

    function: Callable[..., Result]
    chunked: bool = False
    first: str = "pairs"
    hidden: tuple[str, ...] = ()
    own: tuple[tuple[str, Argument], ...] = ()

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
        return dict(self.own).get(name, ARGUMENTS.get(name))

    def check(self, options: Mapping[str, Any], place: Place, known: Known) -> dict[str, Any]:
        """The options with every default filled in.

        Raises:
            ConfigError: an unknown or missing option, a wrong type, an unknown name.
        """
        found: dict[str, Any] = {}
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
            return plain(name, hint, default, options, place)
        if name in options:
            return argument.check(options[name], place.at(name), known)
        if name == "pairs" and len(known.sets) == 1:
            return known.sets[0]
        if name == "metric":
            return default.__name__
        if default is Parameter.empty:
            names = f" (there are {', '.join(known.sets)})" if name == "pairs" else ""
            raise place.error(f"missing key `{name}`{names}")
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


def _table() -> dict[str, Method]:
    rows: Sequence[Method] = (
        Method(mechmm.patch, chunked=True),
        Method(mechmm.attribute, hidden=("graph",)),
        Method(mechmm.faithfulness),
        Method(mechmm.faithfulness_curve),
        Method(mechmm.completeness),
        Method(mechmm.minimality),
        Method(mechmm.acdc),
        Method(mechmm.interchange, first="image_pairs"),
        Method(mechmm.ablate_tokens),
        Method(mechmm.pruning_curve),
        Method(mechmm.knockout),
        Method(mechmm.attention_maps),
        Method(mechmm.logit_lens, first="prompts", hidden=("chunk",)),
        Method(mechmm.tuned_lens, first="prompts"),
        Method(mechmm.direct_logit_attribution),
        Method(mechmm.back_patch),
        Method(mechmm.early_exit),
        Method(mechmm.neuron_attribution),
        Method(mechmm.neuron_selectivity, first="data"),
        Method(mechmm.probe, first="data"),
        Method(mechmm.modality_gap, first="data"),
        Method(mechmm.cka, first="data", hidden=("other", "other_data", "other_sites")),
        Method(mechmm.steering),
        Method(mechmm.attention_steering),
        Method(mechmm.hallucination),
        Method(mechmm.subspace_interchange),
        Method(composed.mediation),
        Method(composed.overlap, first=""),
    )
    return {row.function.__name__: row for row in rows}


METHODS = _table()
"""By name."""
