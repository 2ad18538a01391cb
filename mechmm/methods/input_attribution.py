"""Input attribution: which patches and words the answer is owed to, by the field's baselines.

Features are the patches of the picture and the words of the text (`mechmm.engine.features`); v(z)
is the metric of the clean prompt in which feature i is a share z_i of the way from a baseline to
what it is (`mechmm.engine.presence`). So every method of Captum that attributes a function of z can
be asked, and its scores are per patch and word:

- `"integrated-gradients"`: phi_i = integral over a from 0 to 1 of dv/dz_i at z = a, that is, the
  usual integral along the straight line of embeddings, summed over a feature's entries. Patches are
  embedded linearly, so that this is also the sum over a patch's pixels of integrated gradients of
  the pixels. Complete: sum phi = v(1) - v(0). Sundararajan et al. 1703.01365.
- `"occlusion"`: phi_i = v(1) - v(1 without i). Zeiler & Fergus 1311.2901.
- `"shapley"`: by sampled orders of features. sum phi = v(1) - v(0). Castro et al. 2009.
- `"grad-cam"`: of image tokens alone, as the projector gives them: relu(sum_d w_d x_id) with w_d
  the mean over tokens of dm/dx_id. Selvaraju et al. 1610.02391.

Captum's own gradients, ablation and sampling are used (`pip install "mechmm[captum]"`); Grad-CAM
through an identity laid at the image tokens, because Captum takes the second axis for channels.

A map that would be the same without training says nothing of the model (Adebayo et al. 1810.03292).
So the same attribution of the untrained model stands beside it, and random scores. With `cascade`
weights are also drawn anew part by part from the logits down: the unembedding, the language model's
blocks, projectors, the other towers' blocks, embeddings. Where a map stays what it was although
the parts above it say nothing any more, it is about the picture and not about the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from PIL import Image
from plotly.graph_objects import Figure
from torch import Tensor, nn

from mechmm.data.metrics import Metric, logit_diff, name_of, prepared, score
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.checks import check_choice, check_limits, check_seed
from mechmm.engine.estimate import check_gradient, constant
from mechmm.engine.features import READ, Feature, features_of
from mechmm.engine.flow import Edit
from mechmm.engine.lensed import first_picture
from mechmm.engine.presence import Presence, check_game
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.layout import IMAGE, SpanError
from mechmm.model.untrained import restored
from mechmm.model.untrained import untrained as drawn_anew
from mechmm.results import plots
from mechmm.results.lines import lines
from mechmm.results.report import Page, Section
from mechmm.results.result import Result
from mechmm.results.statistics import bootstrap_interval, rank_correlation

METHODS = ("integrated-gradients", "occlusion", "shapley", "grad-cam")
COMPLETE = ("integrated-gradients", "shapley")
"""Methods whose scores sum up to v(1) - v(0)."""
GRADIENTS = ("integrated-gradients", "grad-cam")
MAPS = ("scores", "untrained", "random")
TOGETHER = 64
"""Rows of one pass with gradients, at most, where a batch of pairs is smaller."""


@dataclass(frozen=True, eq=False)
class InputAttribution(Result):
    """The score of every patch and word for every pair's clean prompt.

    Attributes:
        scores: in units of the metric, positive = supports the clean answer (Grad-CAM: never
            negative, in no unit); 0 where a prompt has fewer features [example, feature].
        untrained: the same of the untrained model, NaN where it was left out.
        random: standard normal numbers.
        where: position, modality, medium, view, row and column of every feature, -1 for none
            [example, feature, six].
        names: of the features.
        inside: which share of a feature is in a span [span, example, feature]. spans: their names.
        full, empty: v with all features, and with none [example].
        method, baseline, metric: names. steps: of the integral, or orders. side: blocks along a
            side of the picture, 0: patches.
        picture: of the first example.
        cascade: scores with the weights of the first of some parts drawn anew, of the first two,
            and so on but for the last, where `untrained` begins [part, example, feature], or None.
        parts: their names from the logits down, the last included.
    """

    scores: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    untrained: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    random: Float[Tensor, "example feature"] = field(metadata={"axis": 0})
    where: Int[Tensor, "example feature six"] = field(metadata={"axis": 0})
    names: tuple[tuple[str, ...], ...] = field(metadata={"axis": 0})
    inside: Float[Tensor, "span example feature"] = field(metadata={"axis": 1})
    spans: tuple[str, ...]
    full: Float[Tensor, " example"] = field(metadata={"axis": 0})
    empty: Float[Tensor, " example"] = field(metadata={"axis": 0})
    method: str
    baseline: str
    metric: str
    steps: int
    side: int
    picture: Image.Image | None = field(default=None, metadata={"keep": "first"})
    cascade: Float[Tensor, "part example feature"] | None = field(
        default=None, metadata={"axis": 1}
    )
    parts: tuple[str, ...] = ()

    def gap(self) -> Float[Tensor, " example"]:
        """|sum of scores - (v(1) - v(0))| / |v(1) - v(0)|; NaN of methods without that axiom."""
        change = self.full - self.empty
        if self.method not in COMPLETE:
            return torch.full_like(change, torch.nan)
        return (self.scores.sum(1) - change).abs() / change.abs().clamp_min(1e-12)

    def image_scores(self) -> Float[Tensor, "example patch"]:
        """The scores of patches alone, for `mm.deletion_insertion`."""
        most = int(self._image.sum(1).max())
        return (self.scores * self._image)[:, :most]

    @property
    def _image(self) -> Tensor:
        return self.where[..., 1] == IMAGE

    def _maps(self) -> dict[str, Tensor]:
        found = {name: getattr(self, name) for name in MAPS}
        return {name: value for name, value in found.items() if not value.isnan().any()}

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example and feature: name, kind, position, medium, view, row, column, score,
        and the scores of the untrained model and of chance."""
        rows = []
        for example, names in enumerate(self.names):
            for feature, name in enumerate(names):
                position, modality, *place = self.where[example, feature].tolist()
                if modality >= 0:
                    kind = "image" if modality == IMAGE else "text"
                    values = [float(getattr(self, m)[example, feature]) for m in MAPS]
                    rows.append((example, name, kind, position, *place, *values))
        columns = ["example", "name", "kind", "position", "medium", "view", "row", "column"]
        return pd.DataFrame(rows, columns=[*columns, "score", "untrained", "random"])

    def mass(self) -> pd.DataFrame:
        """One row per map and span: the mean share of the patches' |score| that lies on the span,
        its 95 % interval over examples, and the span's share of the patches (`area`); examples
        whose patches have no score at all are left out (`examples`: how many are not)."""
        rows = []
        for name, values in self._maps().items():
            size = values.abs() * self._image
            kept = size.sum(1) > 0
            for number, span in enumerate(self.spans):
                inside = self.inside[number][kept]
                share = (size[kept] * inside).sum(1) / size[kept].sum(1)
                area = (inside * self._image[kept]).sum(1) / self._image[kept].sum(1)
                ends = _interval(share)
                rows.append((name, span, *ends, float(area.mean()), int(kept.sum())))
        columns = ["map", "span", "share", "low", "high", "area", "examples"]
        return pd.DataFrame(rows, columns=columns)

    def agreement(self) -> pd.DataFrame:
        """Spearman's rank correlation of the scores with those of the untrained model and with
        random ones, over the patches of an example: of the scores, and of their sizes (`absolute`);
        mean over examples and 95 % interval. Examples with constant maps are left out."""
        others = {name: values for name, values in self._maps().items() if name != "scores"}
        rows = [(name, *row) for name, values in others.items() for row in self._alike(values)]
        columns = ["with", "absolute", "correlation", "low", "high", "examples"]
        return pd.DataFrame(rows, columns=columns)

    def _alike(self, values: Float[Tensor, "example feature"]) -> list[tuple]:
        """(absolute, correlation, low, high, examples) of the scores with others."""
        rows = []
        for absolute in (False, True):
            one, other = (v.abs() if absolute else v for v in (self.scores, values))
            found = rank_correlation(one, other, self._image)
            found = found[~found.isnan()]
            rows.append((absolute, *_interval(found), len(found)))
        return rows

    def cascaded(self) -> pd.DataFrame:
        """One row per number of parts drawn anew from the logits down (`parts`; `down_to`: the
        lowest of them), for scores and for sizes: rank correlation with the trained model's map as
        in `agreement`.

        Raises:
            ValueError: made without `cascade`.
        """
        if self.cascade is None:
            raise ValueError("there is no cascade; run input_attribution(..., cascade=True)")
        maps = [*self.cascade, self.untrained]
        rows = [
            (count, name, *row)
            for count, (name, values) in enumerate(zip(self.parts, maps, strict=True), 1)
            for row in self._alike(values)
        ]
        columns = ["parts", "down_to", "absolute", "correlation", "low", "high", "examples"]
        return pd.DataFrame(rows, columns=columns)

    # Figures ---------------------------------------------------------------------------------

    def plot(self) -> dict[str, Figure]:
        """Maps over the first picture (`picture`), the share of their mass on spans (`mass`), their
        rank correlation with the untrained model's (`agreement`), and that with models whose
        weights are drawn anew from the logits down (`cascade`)."""
        count = len(self.full)
        table, alike = self.mass(), self.agreement()
        names = [f"{row.map}, {row.span} (area {row.area:.2f})" for row in table.itertuples()]
        share, low, high = (table[name].to_numpy(float) for name in ("share", "low", "high"))
        title = f"{self.method}: share of the patches' |score| on spans, {count} pairs"
        ends = (names, share, low, high, title)
        figures = {"mass": plots.bars(*ends, value_title="share of |score|")}
        kinds = alike["absolute"].map({True: "sizes", False: "scores"})
        names = (alike["with"] + ", " + kinds).tolist()
        mean, low, high = (alike[name].to_numpy(float) for name in ("correlation", "low", "high"))
        title = f"{self.method}: rank correlation over patches with other maps, {count} pairs"
        ends = (names, mean, low, high, title)
        figures["agreement"] = plots.bars(*ends, value_title="rank correlation")
        if self.cascade is not None:
            figures["cascade"] = self._cascade_figure()
        if self.picture is not None:
            figures["picture"] = self.overlay(0)
        if not self.spans:
            del figures["mass"]
        return figures

    def _cascade_figure(self) -> Figure:
        table = self.cascaded().rename(columns={"correlation": "value", "down_to": "name"})
        table = table.assign(x=table["parts"])
        chance = self.agreement().set_index(["with", "absolute"]).loc["random"]
        low, high = float(chance["low"].min()), float(chance["high"].max())
        series = {"of the scores": table[~table["absolute"]]}
        if bool((self.scores < 0).any()):  # else both are one
            series["of their sizes"] = table[table["absolute"]]
        return lines(
            series,
            f"{self.method}: weights drawn anew from the logits down, {len(self.full)} pairs",
            "rank correlation over patches with the trained model's map",
            x_title="parts drawn anew (the last: all)",
            y_title="rank correlation",
            null=pd.DataFrame({"x": [1, len(self.parts)], "low": low, "high": high}),
            null_title="random scores",
        )

    def overlay(self, example: int = 0) -> Figure:
        """The patches of one example over the first view of its first picture, each map divided by
        its largest size; the picture is that of the first example.

        Raises:
            ValueError: another example than the first, whose picture is not kept; no picture.
        """
        if self.picture is None or example != 0:
            raise ValueError(f"the picture of example {example} is not kept; that of 0 may be")
        where = self.where[example]
        at = ((where[:, 1] == IMAGE) & (where[:, 2] == 0) & (where[:, 3] == 0)).nonzero().flatten()
        row, column = where[at, 4], where[at, 5]
        maps = self._maps()
        shape = (len(maps), int(row.max()) + 1, int(column.max()) + 1)
        grids = np.full(shape, np.nan)
        for grid, values in zip(grids, maps.values(), strict=True):
            own = values[example, at]
            grid[row.numpy(), column.numpy()] = own / own.abs().max().clamp_min(1e-12)
        title = f"{self.method} of {self.metric} against {self.baseline}, example {example}"
        return plots.patch_overlay(
            self.picture, grids, title, list(maps), value_title="share of the largest"
        )

    def page(self, title: str, facts: Mapping[str, Any] | None = None) -> Page:
        """A report: the figures and the tables."""
        contents = [*self.plot().values(), self.mass(), self.agreement()]
        contents += [] if self.cascade is None else [self.cascaded()]
        return Page(title, self.summary(), [Section("Attribution", contents)], facts or {})

    def summary(self) -> str:
        """What was attributed, how complete it is, and how much of it training made, in words."""
        table = self.agreement().set_index(["with", "absolute"])["correlation"]
        alike, whole, gap = "", "", self.gap()
        if ("untrained", True) in table.index:
            found = table["untrained", True]
            alike = f" Their sizes and the untrained model's: rank correlation {found:.2f}."
        if not bool(gap.isnan().all()):
            whole = f" The completeness gap is {float(gap.max()):.1e} at most."
        return (
            f"{self.method} over {len(self.full)} pairs against the baseline {self.baseline}; "
            f"{self.metric} is {float(self.full.mean()):.2f} with all features and "
            f"{float(self.empty.mean()):.2f} with none.{whole}{alike}"
        )


def _interval(values: Float[Tensor, " example"]) -> tuple[float, float, float]:
    """The mean over examples and its 95 % interval; NaN where there are none."""
    if not len(values):
        return np.nan, np.nan, np.nan
    low, high = bootstrap_interval(values)
    return float(values.mean()), float(low), float(high)


def input_attribution(
    model: HookedMultimodal,
    pairs: PairDataset,
    method: str = "integrated-gradients",
    *,
    spans: Sequence[str] = ("object", "distractor"),
    baseline: str = "mean",
    side: int | None = None,
    text: bool = True,
    steps: int | None = None,
    metric: Metric = logit_diff,
    untrained: bool = True,
    cascade: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    tokens: int | None = None,
) -> InputAttribution:
    """Score the patches and words of every pair's clean prompt.

    Args:
        method: see above.
        spans: of the pairs; the share of the scores on them is reported. () for none.
        baseline: what absent patches are: the picture's mean colour (`"mean"`), `"black"`, a
            picture blurred by an eighth of its longer side (`"blur"`), or the pair's `"corrupt"`
            prompt; absent words are the mean word of all pairs, or the corrupt prompt's.
        side: score blocks of the picture, side x side of them, instead of patches; Shapley values
            of hundreds of patches take hundreds of runs for each order.
        text: score words, too (not with Grad-CAM); else they stay as they are.
        steps: of the integral (default 256), or orders of features (default 10).
        metric: of the clean prompt; with a gradient for `"integrated-gradients"` and `"grad-cam"`.
        untrained: also attribute the untrained model; takes a second model's memory.
        cascade: attribute models, too, whose parts are untrained from the logits down to each
            block; as many attributions as there are blocks. Needs `untrained`.
        seed: of orders, of random scores and of the untrained model's weights.
        batch_size, tokens: as for `patch`.

    Raises:
        ImportError: Captum is not installed.
        ValueError: an unknown method or baseline; steps or a side below 1; a metric without a
            gradient; a cascade without `untrained`; as `patch`.
        SpanError: a prompt without a picture; a span that no pair has; Grad-CAM of a model whose
            image tokens have no places.
    """
    check_choice("method", method, METHODS)
    check_limits(steps=steps, batch_size=batch_size)
    check_seed(seed)
    if cascade and not untrained:
        raise ValueError("a cascade ends at the untrained model; leave untrained=False away")
    check_game(model, pairs, metric, baseline)
    if method in GRADIENTS:
        check_gradient(model, pairs, metric, "clean")
    captum()
    names = (spans,) if isinstance(spans, str) else tuple(spans)
    words = text and method != "grad-cam"
    features = features_of(model, pairs, side=side, text=words, spans=names, batch_size=batch_size)
    count = steps if steps is not None else 10 if method == "shapley" else 256
    game = Presence(model, pairs, features, metric, baseline, batch_size, tokens)
    scores = _scores(game, method, count, seed)
    ends = game.values(torch.ones(1, *features.present.shape, dtype=torch.bool))
    other, falling, parts = torch.full_like(scores, torch.nan), None, ()
    if untrained:
        fresh = drawn_anew(model, seed)
        theirs = replace(game, model=fresh, pairs=PairDataset(pairs, fresh))
        other = _scores(theirs, method, count, seed)
        if cascade:
            falling, parts = _falling(theirs, model, method, count, seed)
    rng = np.random.default_rng(seed)
    random = torch.from_numpy(rng.standard_normal(tuple(scores.shape), dtype=np.float32))
    return InputAttribution(
        scores=scores,
        untrained=other,
        random=random * features.present,
        where=features.where,
        names=features.names,
        inside=features.inside,
        spans=names,
        full=ends.base,
        empty=ends.values[0],
        method=method,
        baseline=baseline,
        metric=name_of(metric),
        steps=count if method in COMPLETE else 0,
        side=side if side is not None else 0,
        picture=first_picture(pairs.batch([0]).clean),
        cascade=falling,
        parts=parts,
    )


def captum() -> Any:
    """Captum's attribution methods.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import captum.attr  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            f"input attribution needs Captum ({error}); install it with "
            "pip install 'mechmm[captum]'"
        ) from error
    return captum.attr


def _scores(game: Presence, method: str, steps: int, seed: int) -> Float[Tensor, "example feature"]:
    if method in GRADIENTS:
        own = _integrated if method == "integrated-gradients" else _grad_cam
        found = [own(game, batch, steps) for batch in game.pairs.batches(game.batch_size)]
        return torch.cat(found)
    kind = "FeatureAblation" if method == "occlusion" else "ShapleyValueSampling"
    z = game.features.present.float()
    options = {} if method == "occlusion" else {"n_samples": steps}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)  # Captum draws orders from the global state
        found = getattr(captum(), kind)(_played(game)).attribute(
            z, baselines=0.0, perturbations_per_eval=z.shape[1], **options
        )
    return found.float()


def _falling(
    game: Presence, model: HookedMultimodal, method: str, steps: int, seed: int
) -> tuple[Float[Tensor, "part example feature"], tuple[str, ...]]:
    """Scores of an untrained model that gets the trained weights part by part from the inputs up,
    the fewest untrained parts first; and all parts from the logits down."""
    steps_up = restored(game.model, model)
    parts = next(steps_up)  # the untrained model itself
    # A new game for every step, for what it remembers is of the weights before.
    found = [_scores(replace(game), method, steps, seed) for _ in steps_up]
    return torch.stack(found[::-1]), parts


def _played(game: Presence) -> Callable[[Tensor], Tensor]:
    """v for Captum, which asks for many coalitions of all examples at once."""

    def v(z: Float[Tensor, "row feature"]) -> Float[Tensor, " row"]:
        absent = z.view(-1, *game.features.present.shape) < 0.5
        return game.values(absent).values.flatten()

    return v


def _integrated(game: Presence, batch: PairBatch, steps: int) -> Float[Tensor, "example feature"]:
    z = game.features.present[list(batch.indices)].float().to(game.model.device)
    rows = len(batch) * max(1, TOGETHER // len(batch))
    found = (
        captum()
        .IntegratedGradients(game.graded(batch))
        .attribute(z, baselines=0.0, n_steps=steps, internal_batch_size=rows)
    )
    return found.detach().float().cpu()


# Grad-CAM ------------------------------------------------------------------------------------


def _grad_cam(game: Presence, batch: PairBatch, steps: int) -> Float[Tensor, "example feature"]:
    """One example at a time: they may have different numbers of image tokens."""
    found = torch.zeros(len(batch), game.features.count)
    for row, pair in enumerate(batch.indices):
        found[row] = _cam(game, game.pairs.batch([pair]), game.features.own[pair])
    return found


def _cam(game: Presence, one: PairBatch, own: Sequence[Feature]) -> Float[Tensor, " feature"]:
    model, tap = game.model, nn.Identity()
    start = int(one.clean.layout.mask("all")[0].long().argmax())
    at = torch.tensor([start + p for feature in own for p in feature.read])
    if not len(at):
        raise SpanError(
            f"pair {one.indices[0]}: no image token stands for a place of the picture, so that "
            "Grad-CAM has nothing to map; use another method"
        )
    answers = prepared(model, one.clean, one.answers, game.metric)

    def through(value: Tensor, hook: Any) -> Tensor:
        where = at.to(value.device)
        there = value[:, where].transpose(1, 2)  # [example, d_model, token]: Captum's channels
        new = tap(there.detach().requires_grad_()).transpose(1, 2)
        return value.index_put((torch.zeros_like(where), where), new[0])

    def run(z: Tensor) -> Tensor:
        edits: list[Edit] = [(READ, through)]
        with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=edits):
            return score(model, one.clean, answers, game.metric)

    z = torch.zeros(1, 1, device=model.device, requires_grad=True)
    cam = captum().LayerGradCam(run, tap).attribute(z, relu_attributions=True)
    sizes = [len(feature.read) for feature in own]
    found = torch.zeros(game.features.count)
    for number, part in enumerate(cam.detach().float().cpu().flatten().split(sizes)):
        found[number] = part.sum()
    return found
