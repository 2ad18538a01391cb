"""What a sweep would find, estimated to first order from one gradient: attribution patching.

With m the metric, x what the base prompt has at the places of a site and x' what they are set to,

    m(x') - m(x) ~ sum over places of (x' - x) . dm/dx,   dm/dx at the base run.

One forward and one backward pass over a batch of pairs gives the estimates of all its cells. It is
exact where the metric is linear in x, good where the change is small, and poor where something
saturates between x and x' (attention that is sharp, early layers of the residual stream).

Nanda 2023, "Attribution patching: activation patching at industrial scale"; Syed et al. 2310.10348.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechmm.data.metrics import (
    Answers,
    Metric,
    Reading,
    accuracy,
    kl,
    logit_diff,
    name_of,
    prepared,
    readings,
)
from mechmm.data.pairs import PairDataset
from mechmm.engine.checks import check_places
from mechmm.engine.located import located
from mechmm.engine.places import Ints, Places, Values, halves, index
from mechmm.engine.shelf import Keep
from mechmm.engine.sites import Sites
from mechmm.engine.source import Donor, Source
from mechmm.model.hooked import HookedMultimodal

TOGETHER = 4096
"""Places that are read at once."""

Base = Literal["clean", "corrupt"]
Slopes = dict[str, list[tuple[Tensor, Tensor]]]
"""By hook: its value and the metric's gradient there, for every time that it fired."""


@torch.inference_mode(mode=False)
def estimated(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric = logit_diff,
    base: Base = "corrupt",
    source: Source = "clean",
    seed: int = 0,
    batch_size: int = 16,
    state: Keep = "device",
) -> Float[Tensor, "site example"]:
    """The estimated change of the metric by every site, for every pair.

    Arguments are those of `Sweep`. Parameters gather no gradients. A batch that the device's memory
    does not hold is made half as large.

    Raises:
        ValueError: a metric without a gradient at the base run.
        SpanError, SiteError: as `Sweep.run`.
        torch.OutOfMemoryError: where one pair alone does not fit.
    """
    check_gradient(model, pairs, metric, base)
    arguments = (model, pairs, sites, metric, base, source, seed)
    while True:
        try:
            return _estimated(*arguments, batch_size, state)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        torch.cuda.empty_cache()
        batch_size //= 2


@torch.inference_mode(mode=False)
def check_gradient(
    model: HookedMultimodal, pairs: PairDataset, metric: Metric, base: Base = "corrupt"
) -> None:
    """Try a metric's gradient on made-up logits.

    Raises:
        ValueError: where it has none.
    """
    if metric is kl and base == "clean":
        raise ValueError(
            "kl is flat at the clean run, which it compares with, so that its gradient there says "
            "nothing; screen with logit_diff, or patch the corrupt prompt (denoise)"
        )
    if metric is accuracy or not _has_gradient(model, pairs, metric):
        raise ValueError(
            f"the metric {name_of(metric)} has no gradient, from which effects could be estimated; "
            "screen with logit_diff or log_prob, or leave out screen"
        )


def _has_gradient(model: HookedMultimodal, pairs: PairDataset, metric: Metric) -> bool:
    answers = Answers.of(model, [pairs[0].answer], [pairs[0].foil])
    if not answers.single:
        return True  # there are rules of our own alone
    random = torch.Generator().manual_seed(0)
    shape = (2, 1, model.cfg.d_vocab)
    logits, reference = torch.randn(*shape, generator=random).to(model.device)
    with torch.enable_grad():
        return metric(logits.requires_grad_(), answers.with_reference(reference)).requires_grad


@torch.no_grad()
def _estimated(
    model: HookedMultimodal,
    pairs: PairDataset,
    sites: Sites,
    metric: Metric,
    base: Base,
    source: Source,
    seed: int,
    batch_size: int,
    state: Keep,
) -> Float[Tensor, "site example"]:
    donor = Donor(model, pairs, sites, source, seed, batch_size, state)
    columns = []
    for batch in pairs.batches(batch_size):
        check_places(sites, batch, seed)
        prompts = getattr(batch, base)
        places = located(sites, prompts.layout, seed, batch.indices)
        answers = prepared(model, batch.clean, batch.answers, metric)
        values, total = donor.values(batch, places), torch.zeros(len(places.prompts)).double()
        for part in readings(prompts, answers, metric):  # the metric is a sum over them
            total += _changes(places, values, slopes(model, part, answers, places.hooks))
        columns.append(total.view(len(sites), len(batch)).float())
    return torch.cat(columns, dim=1)


def slopes(
    model: HookedMultimodal, part: Reading, answers: Answers, hooks: Sequence[str]
) -> Slopes:
    """The values of some hooks in one run, and the gradient of the sum of the metric at each.

    Prompts do not see each other, so that every place holds the gradient of its own example.
    """
    caught: dict[str, list[Tensor]] = defaultdict(list)

    def catch(value: Tensor, hook: Any) -> Tensor:
        caught[hook.name].append(value if value.requires_grad else value.requires_grad_())
        return value.clone()  # what comes behind may write into it

    live: list[tuple[str | Callable, Callable]] = [(name, catch) for name in hooks]
    with torch.enable_grad(), constant(model.hf_model), model.hooks(fwd_hooks=live):
        total = part.reduce(part.logits(model), answers).sum()
        values = [value for firings in caught.values() for value in firings]
        if not total.requires_grad:  # no hook fired that the logits depend on
            return {}
        gradients = iter(torch.autograd.grad(total, values, allow_unused=True))
    reached = {hook: [(v.detach(), next(gradients)) for v in caught[hook]] for hook in caught}
    return {hook: [(v, g) for v, g in some if g is not None] for hook, some in reached.items()}


@contextmanager
def constant(module: nn.Module) -> Iterator[None]:
    """While it lasts, no parameter needs a gradient: graphs begin at the first hook."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_()


def _changes(places: Places, values: Values, found: Slopes) -> Float[Tensor, " trial"]:
    """The sum of change times gradient over the places of every trial."""
    total = torch.zeros(len(places.prompts), dtype=torch.float64)
    for hook, at in _chunks(places):
        there = places.chosen(at)
        for value, slope in found.get(hook, ()):
            where = index(hook, there.row, there.position, there.part, value)
            each = _product(value[where], values(hook, at, value[where]), slope[where])
            total.index_add_(0, torch.as_tensor(there.trial), each.double().cpu())
    return total


def _product(now: Tensor, new: Tensor, slope: Tensor) -> Float[Tensor, " place"]:
    """The change of every place times its gradient, in single precision at least."""
    precision = torch.promote_types(now.dtype, torch.float32)
    change = new.to(now.device, precision) - now.to(precision)
    # Masked scores are at the lowest number or at minus infinity, and have no gradient.
    product = (change * slope.to(precision)).where(slope != 0, 0)
    return product.reshape(len(now), -1).sum(1)


def _chunks(places: Places) -> Iterator[tuple[str, Ints]]:
    """Numbers of places of one hook, all of them with a part or all without."""
    for number, hook in enumerate(places.hooks):
        at = np.flatnonzero(places.hook == number)
        for half in halves(places.part[at]):
            for own in np.split(at[half], range(TOGETHER, len(half), TOGETHER)):
                yield hook, own
