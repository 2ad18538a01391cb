"""Training a TopK sparse autoencoder on what one hook has.

States are recorded batch by batch, kept in memory or on disk, and drawn in a random order. With
x' = s (x - mean) of mean norm sqrt(d), e = x' - x^' and e^ what the dead features make of e,

    loss = |e|^2 / |x'|^2 + |e - e^|^2 / (32 |e|^2)

(Gao et al. 2406.04093, with their auxiliary loss), rows of W_dec of norm 1. At the end s and the
mean are folded into the weights, so that the autoencoder reads states as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechmm.engine.checks import check_choice
from mechmm.engine.shelf import Keep, Shelf
from mechmm.engine.sites import Sites
from mechmm.engine.states import Data, check_data, prompts_of, states
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.sparse import SparseAutoencoder, top

WIDER = 8
"""Features for each number of a state, where none is asked for."""
DEAD_AFTER = 100
"""Steps without being active after which a feature is dead."""
AUXILIARY = 1 / 32
"""Weight of the auxiliary loss."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """States of one site, kept in parts.

    Attributes:
        parts: of each batch [place, d]. ends: places up to the end of each part.
    """

    parts: list[Tensor]
    ends: np.ndarray

    @classmethod
    def of(
        cls,
        model: HookedMultimodal,
        data: Data,
        site: Sites,
        *,
        keep: Keep = "cpu",
        batch_size: int = 16,
        seed: int = 0,
    ) -> Recorded:
        """Run the model over the data once (errors as `states`)."""
        shelf, parts = Shelf(keep), []
        for batch, indices in prompts_of(data, batch_size):
            (found,) = states(model, batch, site, indices, seed)
            parts.append(shelf.put({"states": found.values})["states"])
        return cls(parts, np.cumsum([len(part) for part in parts]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, places: np.ndarray) -> Float[Tensor, "place d"]:
        """Some places, in any order."""
        part = np.searchsorted(self.ends, places, side="right")
        found = torch.empty(len(places), self.parts[0].shape[1])
        for number in np.unique(part):
            own = np.flatnonzero(part == number)
            start = self.ends[number] - len(self.parts[number])
            found[own] = self.parts[number][torch.as_tensor(places[own] - start)].float()
        return found

    def mean(self) -> Float[Tensor, " d"]:
        """The mean state."""
        sums = torch.stack([part.double().sum(0) for part in self.parts]).sum(0)
        return (sums / len(self)).float()

    def norm(self, mean: Float[Tensor, " d"]) -> float:
        """The mean distance from the mean."""
        total = sum(float((part.float() - mean).norm(dim=-1).double().sum()) for part in self.parts)
        return total / len(self)


def train_sae(
    model: HookedMultimodal,
    data: Data,
    site: Sites,
    *,
    d_sae: int | None = None,
    k: int = 16,
    steps: int = 1000,
    places: int = 512,
    lr: float = 2e-3,
    keep: Keep = "cpu",
    learn_encoder: bool = True,
    seed: int = 0,
    batch_size: int = 16,
    report: Callable[[int, int], None] | None = None,
) -> SparseAutoencoder:
    """Train a TopK sparse autoencoder on the states at one site; same seed, same weights.

    Args:
        data: pairs (the clean prompts are read), or batches.
        site: one row of a table of sites: `mm.sites.named(model, hook, [span])`.
        d_sae: features; default: 8 for each number of a state.
        k: active features of a place.
        steps, places, lr: steps of Adam, places of each, and the learning rate, which falls to 0
            over the last fifth.
        keep: where states are kept: `"cpu"`, `"disk"` or `"device"`.
        learn_encoder: False: random features, of which the decoder alone is learned (a baseline).
        report: called with (steps done, steps in all).

    Raises:
        ValueError: more or fewer than one site, or one of single heads or neurons; a number below
            1; more active features than features; states that do not vary.
        SpanError: a span that some example does not have.
    """
    check_data(model, data, site)
    check_choice("keep", keep, ("cpu", "disk", "device"))
    if len(site) != 1 or site.table["neuron"].notna().any():
        raise ValueError(f"a dictionary is of one hook and span, not of {len(site)} sites")
    for name, value in {"k": k, "steps": steps, "places": places, "d_sae": d_sae or 1}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    recorded = Recorded.of(model, data, site, keep=keep, batch_size=batch_size, seed=seed)
    width = recorded.parts[0].shape[1]
    d_sae = WIDER * width if d_sae is None else d_sae
    if k > d_sae:
        raise ValueError(f"k is {k}, but there are {d_sae} features; give k up to that")
    mean = recorded.mean()
    norm = recorded.norm(mean)
    if norm <= 1e-6 * float(mean.norm()):
        raise ValueError(f"all states at {site.table['hook'].iloc[0]} are one: nothing to learn")
    scale = width**0.5 / norm
    weights = _Weights(width, d_sae, k, learn_encoder, seed, model.device)
    order = _order(len(recorded), places, steps, seed)
    for step, chosen in enumerate(order):
        x = scale * (recorded[chosen] - mean).to(model.device)
        weights.step(x, lr * min(1.0, 5 * (steps - step) / steps))
        if report is not None:
            report(step + 1, steps)
    hook = str(site.table["hook"].iloc[0])
    return weights.folded(scale, mean, hook, model.family.architecture)


def _order(count: int, places: int, steps: int, seed: int) -> list[np.ndarray]:
    """Which places each step takes: all of them, shuffled, over and over."""
    rng = np.random.default_rng(seed)
    need = steps * min(places, count)
    rounds = [rng.permutation(count) for _ in range(-(-need // count))]
    return np.split(np.concatenate(rounds)[:need], steps)


class _Weights:
    """An autoencoder in training, in units in which states have norm sqrt(d)."""

    def __init__(
        self, d: int, d_sae: int, k: int, learn_encoder: bool, seed: int, device: torch.device
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        directions = torch.randn(d_sae, d, generator=random)
        self.W_dec = _unit(directions).to(device)
        self.W_enc = self.W_dec.T.clone()
        self.b_enc, self.b_dec = torch.zeros(d_sae, device=device), torch.zeros(d, device=device)
        learned = [self.W_dec, self.b_dec, *([self.W_enc, self.b_enc] if learn_encoder else [])]
        for parameter in learned:
            parameter.requires_grad_()
        self.k, self.learned = k, learned
        self.adam = torch.optim.Adam(learned, lr=1e-3)
        self.idle = torch.zeros(d_sae, device=device)

    @torch.inference_mode(mode=False)
    @torch.enable_grad()
    def step(self, x: Float[Tensor, "place d"], lr: float) -> None:
        """One step of Adam."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        features = top(pre, self.k)
        error = x - features @ self.W_dec - self.b_dec
        loss = error.square().sum() / x.square().sum() + self._auxiliary(pre, error.detach())
        self.adam.param_groups[0]["lr"] = lr
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        with torch.no_grad():
            self.W_dec.copy_(_unit(self.W_dec))
            self.idle = (self.idle + 1) * ~(features > 0).any(0)

    def _auxiliary(self, pre: Tensor, error: Tensor) -> Tensor:
        """How badly the dead features make the error of the others."""
        dead = self.idle > DEAD_AFTER
        count = min(int(dead.sum()), max(1, error.shape[1] // 2))
        if not count or not self.W_enc.requires_grad:
            return error.new_zeros(())
        made = top(pre.masked_fill(~dead, -torch.inf), count) @ self.W_dec
        return AUXILIARY * (error - made).square().sum() / error.square().sum().clamp(min=1e-12)

    def folded(self, scale: float, mean: Tensor, hook: str, name: str) -> SparseAutoencoder:
        """The autoencoder of states as they are."""
        weights = (self.W_enc, self.b_enc / scale, self.W_dec, self.b_dec / scale)
        W_enc, b_enc, W_dec, b_dec = (w.detach().cpu() for w in weights)
        b_dec = b_dec + mean.cpu()
        return SparseAutoencoder(
            W_enc.contiguous(), b_enc, W_dec, b_dec, "topk", hook, self.k, model=name
        )


def _unit(directions: Float[Tensor, "d_sae d"]) -> Float[Tensor, "d_sae d"]:
    return directions / directions.norm(dim=-1, keepdim=True).clamp(min=1e-12)
