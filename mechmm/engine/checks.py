"""What a sweep refuses before it runs anything."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from mechmm.data.metrics import READS_ANSWERS, Metric, name_of
from mechmm.data.pairs import PairBatch, PairDataset
from mechmm.engine.hidden import HIDDEN, PROJECTOR, behind, standing
from mechmm.engine.located import located
from mechmm.engine.places import QUERY_ROWS, spot_of
from mechmm.engine.shelf import Keep
from mechmm.engine.sites import Sites
from mechmm.engine.source import BySite, Named, Source, applied
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.tower import Tower

BASES = ("clean", "corrupt")
"""The prompts of a pair, one of which runs."""


class SiteError(ValueError):
    """A site that the model does not have, or that two prompts have unlike."""


def check_sites(model: HookedMultimodal, sites: Sites) -> None:
    """Refuse sites outside the model.

    Raises:
        SiteError: no sites; a head or neuron that its hook does not have; another tower than its
            hook's.
        UnknownHookError: a hook that the model does not have.
    """
    if not isinstance(sites, Sites):
        raise SiteError(f"sites are a table made by mechmm.sites, not {type(sites).__name__}")
    if not len(sites):
        raise SiteError("the table of sites is empty: there is nothing to patch")
    table = sites.table
    model.check_names(table["hook"].unique())
    for hook, tower in table[["hook", "tower"]].drop_duplicates().itertuples(index=False):
        own = spot_of(model, hook).tower
        # What stands in front of a resampler has the positions of the tower that it reads.
        names = {own, standing(model)} if own == PROJECTOR else {own}
        if str(tower).partition(".")[0] not in names:
            raise SiteError(f"{hook} belongs to {own!r}, but the table of sites says {tower!r}")
    for column, size in (("head", heads_of), ("neuron", neurons_of)):
        for hook, group in table[table[column].notna()].groupby("hook"):
            count, largest = size(model, str(hook)), int(group[column].max())
            if not 0 <= int(group[column].min()) <= largest < count:
                raise SiteError(f"{hook} has {column}s 0..{count - 1}, not {largest}")


def _block(model: HookedMultimodal, hook: str) -> tuple[Tower, int]:
    """The tower and the block of a hook."""
    prefix, inside, rest = hook.partition("blocks.")
    if not inside:
        raise SiteError(f"{hook} lies in no block: it has no heads and no neurons")
    return model.towers[prefix.rstrip(".") or LANGUAGE], int(rest.partition(".")[0])


def _by_head(hook: str) -> bool:
    """Whether a hook's tensor has an axis of heads."""
    return ".attn.hook_" in hook or ".cross_attn.hook_" in hook


def heads_of(model: HookedMultimodal, hook: str) -> int:
    """Heads of a hook: key-value heads where it is one of keys and values."""
    tower, layer = _block(model, hook)
    if not _by_head(hook):
        raise SiteError(f"{hook} has no heads")
    keys = hook.endswith(("hook_k", "hook_v", "hook_rot_k"))
    return tower.cfg.n_key_value_heads or tower.heads(layer) if keys else tower.heads(layer)


def neurons_of(model: HookedMultimodal, hook: str) -> int:
    """Neurons of a hook: of the MLP or the projector, or entries of the residual stream."""
    if hook == HIDDEN:
        return behind(model).in_features
    tower, layer = _block(model, hook)
    if _by_head(hook):
        raise SiteError(f"{hook} has no neurons")
    if hook.endswith("hook_scale"):
        return 1
    linear = tower.linear(layer, "mlp_out") if ".mlp." in hook else None
    return tower.cfg.d_model if linear is None else linear.in_features


def check_choices(base: str, source: Source, state: str) -> None:
    """Refuse names that mean nothing.

    Raises:
        ValueError: with the names there are.
    """
    named = (
        ()
        if callable(source) or isinstance(source, BySite)
        else (("source", source, get_args(Named)),)
    )
    for what, given, known in (("base", base, BASES), ("state", state, get_args(Keep)), *named):
        check_choice(what, given, known)


def check_model(model: HookedMultimodal) -> None:
    """Refuse models without logits after a prompt.

    Raises:
        ValueError: with the kind of model.
    """
    encoder = model.family.unembed is None
    if encoder or model.config.is_encoder_decoder:
        why = "it only encodes" if encoder else "its decoder writes apart from the prompt"
        name = model.family.architecture
        raise ValueError(
            f"a sweep reads logits after the last token of a prompt, and {name} gives none there: "
            f"{why}; patch with model.hooks or run_with_hooks"
        )


def check_pairs(pairs: PairDataset, source: Source) -> None:
    """Refuse anything but a dataset of pairs, and one pair alone to resample.

    Raises:
        ValueError: with what to do.
    """
    if not isinstance(pairs, PairDataset):
        kind = type(pairs).__name__
        raise ValueError(
            f"pairs are a PairDataset, not {kind}; make one: PairDataset(pairs, model)"
        )
    if source == "resample" and len(pairs) == 1:
        raise ValueError(
            "resample takes the values of another pair, but there is one pair alone; give two or "
            "more, or ablate with zero or mean"
        )


def check_limits(**limits: float | None) -> None:
    """Refuse limits that let nothing through.

    Raises:
        ValueError: by name.
    """
    for name, value in limits.items():
        if value is not None and not (isinstance(value, Real) and value >= 1):
            raise ValueError(f"{name} is {value!r}; give a number of 1 or more, or None")


def check_seed(seed: int) -> None:
    """Refuse a seed that the generators do not take.

    Raises:
        ValueError: with the seed.
    """
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give a whole number, 0 or more")


def check_choice(what: str, given: str, known: Collection[str]) -> None:
    """Refuse a name that is not among those there are.

    Raises:
        ValueError: with these.
    """
    if given not in known:
        raise ValueError(f"unknown {what} {given!r}; use {', '.join(known)}")


def check_function(model: HookedMultimodal, sites: Sites, source: Source) -> None:
    """Try a function on made-up values of a site's size.

    Raises:
        InterventionError: another shape or dtype, or a need for gradients.
        SiteError: another number of functions than sites.
    """
    if isinstance(source, BySite):
        if len(source.functions) != len(sites):
            raise SiteError(f"{len(source.functions)} functions for {len(sites)} sites")
        for number, function in enumerate(source.functions):
            own = sites.table.iloc[[number]].reset_index(drop=True)
            check_function(model, Sites(own), function)
    if not callable(source):
        return
    give = applied(source)
    for hook, group in sites.table.groupby("hook"):
        shape = _shape(model, str(hook), bool(group["head"].notna().all()))
        parts = group["neuron"].notna()
        shape = () if parts.all() else shape
        if shape is None or parts.any() != parts.all():
            continue
        random = torch.Generator().manual_seed(0)
        made_up = torch.randn(2, *shape, generator=random).to(model.device, model.dtype)
        with torch.no_grad():
            give(str(hook), np.zeros(0, dtype=np.int64), made_up)


def _shape(model: HookedMultimodal, hook: str, of_head: bool) -> tuple[int, ...] | None:
    """The size of one place of a hook, or None where it depends on the batch or the family."""
    name = hook.rpartition(".")[2]
    if "blocks." not in hook or hook.endswith(QUERY_ROWS):
        return None
    tower, layer = _block(model, hook)
    if name.startswith("hook_resid") or name in ("hook_attn_out", "hook_mlp_out"):
        return (tower.cfg.d_model,)
    if name == "hook_z":
        return (tower.d_head(layer),) if of_head else (tower.heads(layer), tower.d_head(layer))
    return None


def check_metric(model: HookedMultimodal, pairs: PairDataset, metric: Metric) -> None:
    """Try a metric on made-up logits.

    Raises:
        ValueError: where it is none, or does not give one number per example.
    """
    if not callable(metric):
        raise ValueError(
            f"a metric is a function of logits and answers, for example mechmm.logit_diff, not "
            f"{metric!r}"
        )
    if metric in READS_ANSWERS:
        return
    answers = next(iter(pairs.batches(min(2, len(pairs))))).answers
    if not answers.single:
        return
    vocabulary = model.cfg.d_vocab
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(len(answers), vocabulary, generator=random).to(model.device)
    value = metric(logits, answers.with_reference(logits))
    shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
    if shape != [len(answers)]:
        raise ValueError(
            f"the metric {name_of(metric)} gave {shape} for {len(answers)} example(s); it must "
            "give one number per example, [batch]: leave out the mean over the batch"
        )


def check_places(sites: Sites, batch: PairBatch, seed: int) -> None:
    """Refuse spans of unequal size in the clean and the corrupt prompt.

    Raises:
        SiteError: with the pair, the span and both sizes.
    """
    other = located(sites, batch.corrupt.layout, seed, batch.numbers)
    mine = located(sites, batch.clean.layout, seed, batch.numbers)
    counts = [np.bincount(p.trial, minlength=len(p.prompts)) for p in (mine, other)]
    unequal = np.flatnonzero(counts[0] != counts[1])
    if len(unequal):
        site, prompt = divmod(int(unequal[0]), len(batch))
        row, sizes = sites.table.iloc[site], [int(count[unequal[0]]) for count in counts]
        raise SiteError(
            f"pair {batch.numbers[prompt]}: span {row['span']!r} at {row['hook']} has {sizes[0]} "
            f"positions in the clean prompt and {sizes[1]} in the corrupt one; make them equal or "
            "drop the pair"
        )
