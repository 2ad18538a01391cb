"""What every row of the family table has to show, point by point, on its tiny model.

Each point is a function of a `Case` that raises `AssertionError` where the family fails it.
`EXEMPT` lists what a family cannot pass, with the reason; nothing else is left out.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import einsum
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechmm.model.audit import audit, real
from mechmm.model.batch import Batch
from mechmm.model.hooked import LANGUAGE, HookedMultimodal
from mechmm.model.taps import affine, moments, norm_kind
from mechmm.model.tower import Tower
from mechmm.testing.checks import assert_no_hooks
from mechmm.testing.tiny import RECIPES, tiny_hf, tiny_inputs
from mechmm.testing.vocabulary import SPECIAL

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""How far two routes to a number may lie apart, in units of its standard deviation."""
Hook = Callable[[Tensor, HookPoint], Tensor | None]


@dataclass(frozen=True)
class Case:
    """One tiny model and batch.

    Attributes:
        family: name in `mechmm.testing.RECIPES`.
        kind: of the media of its prompts.
        options: of `tiny_hf`.
        prompts: how many media each prompt has; words: after them.
        side: of padding.
    """

    family: str
    kind: str = "image"
    options: tuple[tuple[str, Any], ...] = ()
    prompts: tuple[int, ...] = (1, 2)
    words: tuple[int, ...] = (6, 4)
    side: str = "left"

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return dict(self.options).get("dtype", torch.float32)

    def hf(self, attention: str = "sdpa") -> Any:
        """A fresh Hugging Face model."""
        return tiny_hf(self.family, attention=attention, **dict(self.options))

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """Of the Hugging Face model."""
        prompts = self.prompts if RECIPES[self.family].text else (1,) * len(self.prompts)
        options: dict[str, Any] = {"kind": self.kind, "padding_side": self.side}
        return tiny_inputs(self.model, prompts, list(self.words), **options)

    @cached_property
    def model(self) -> HookedMultimodal:
        """Hooked."""
        return HookedMultimodal.from_hf(self.hf())

    @cached_property
    def batch(self) -> Batch:
        """For the hooked model."""
        return Batch.from_inputs(self.model, **self.inputs)

    @cached_property
    def cache(self) -> dict[str, Tensor]:
        """Every activation, the derived ones included."""
        with torch.no_grad():
            return dict(self.model.run_with_cache(self.batch, names_filter=lambda name: True)[1])

    @cached_property
    def passed(self) -> dict[nn.Module, tuple[Tensor, Tensor]]:
        """What entered and left every linear layer of the towers, in a run like that of `cache`."""
        caught: dict[nn.Module, tuple[Tensor, Tensor]] = {}

        def catch(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                caught[module] = args[0], output.clone()  # Llama 4 adds to one in place

        modules = [m for m in self.model.hf_model.modules() if isinstance(m, nn.Linear)]
        handles = [module.register_forward_hook(catch) for module in modules]
        self.logits((everywhere, nothing))
        for handle in handles:
            handle.remove()
        return caught

    def normed(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """What enters and leaves a norm the first time it runs, None where it does not."""
        caught: list[tuple[Tensor, Tensor]] = []

        def catch(module: nn.Module, args: tuple, output: Any) -> None:
            caught.append((args[0], output))

        handle = module.register_forward_hook(catch)
        self.logits()
        handle.remove()
        return caught[0] if caught else None

    @cached_property
    def awake(self) -> list[Tower]:
        """The towers that run on this batch."""
        cached = self.cache
        towers = self.model.towers.values()
        return [t for t in towers if f"{t.prefix}blocks.0.hook_resid_post" in cached]

    def logits(self, *hooks: tuple[Any, Hook]) -> Tensor:
        """What the hooked model gives, without padding."""
        with torch.no_grad():
            return real(self.batch, self.model.run_with_hooks(self.batch, fwd_hooks=list(hooks)))

    def plain(self, attention: str = "sdpa") -> Tensor:
        """What the bare Hugging Face model gives, without padding."""
        if attention not in self._plain:
            self._plain[attention] = self._bare(attention)
        return self._plain[attention]

    @cached_property
    def _plain(self) -> dict[str, Tensor]:
        return {}

    def _bare(self, attention: str) -> Tensor:
        options = {"use_cache": False} if self.model.takes("past_key_values") else {}
        with torch.no_grad():
            output = self.hf(attention)(**self.inputs, **options)[self.model.family.output]
        return real(self.batch, output)

    def same(self, tower: Tower, a: Tensor, b: Tensor) -> bool:
        """Whether two values of a tower agree, padding of packed images left out."""
        there = None if tower.pack is None else tower.pack.blocks >= 0
        if there is not None and a.shape[:2] == there.shape:
            a, b = a[there], b[there]
        return self.near(a, b)

    def near(self, a: Tensor, b: Tensor) -> bool:
        """Whether two values agree within `CLOSE`."""
        scale = float(b.float().std()) or 1.0
        return bool((a.float() - b.float()).abs().max() <= CLOSE[self.dtype] * scale)


def everywhere(name: str) -> bool:
    """Names every hook point."""
    return True


def nothing(value: Tensor, hook: HookPoint) -> None:
    """A hook that returns nothing."""


# The points ----------------------------------------------------------------------------------


def same_logits(case: Case) -> None:
    """Logits are Hugging Face's: SDPA's without hooks, eager's where everything is hooked."""
    assert torch.equal(case.logits(), case.plain()), "not SDPA's logits"
    hooked = case.logits((everywhere, nothing))
    assert torch.equal(hooked, case.plain("eager")), "not eager's logits where patterns are hooked"


def fires_once(case: Case) -> None:
    """Every hook point of a tower that runs fires once, with the documented shape."""
    shapes: dict[str, list[torch.Size]] = {}

    def watch(value: Tensor, hook: HookPoint) -> None:
        shapes.setdefault(str(hook.name), []).append(value.shape)

    case.logits((everywhere, watch))
    asleep = tuple(t.prefix for t in case.model.towers.values() if t not in case.awake)
    for name in case.model.hook_dict:
        if asleep and name.startswith(asleep):
            continue
        fired = shapes.get(name, [])
        assert len(fired) == 1, f"{name} fired {len(fired)} times"
        wanted = _shape(case, name)
        got = tuple(fired[0])
        fits = wanted is None or (
            len(got) == len(wanted)
            and all(w in (None, g) for g, w in zip(got, wanted, strict=True))
        )
        assert fits, f"{name} has shape {got}, not {wanted}"


def alive(case: Case) -> None:
    """An edit at each hook changes the output and a gradient reaches it, or the audit says why the
    model does not use it."""
    case = _small(case)
    report = audit(case.model, case.batch)
    assert not report.dead, f"dead: {report.dead}"
    assert all(hook.reason for hook in report.hooks if hook.status != "live")


def _small(case: Case) -> Case:
    """The same with one short prompt, for points that run once or twice per hook."""
    return replace(case, prompts=(1,), words=(4,))


def clean_into_clean(case: Case) -> None:
    """Writing every activation back where it was, in place or returned, changes nothing."""
    cache, plain = case.cache, case.logits((everywhere, nothing))

    def write(value: Tensor, hook: HookPoint) -> Tensor:
        return cache[str(hook.name)].clone()

    def write_in_place(value: Tensor, hook: HookPoint) -> None:
        value.copy_(cache[str(hook.name)])

    assert torch.equal(case.logits((everywhere, write)), plain)
    assert torch.equal(case.logits((everywhere, write_in_place)), plain)


def in_place(case: Case) -> None:
    """An edit in place is a returned one, at every kind of hook point (in the last block that has
    it)."""
    case = _small(case)
    kinds = {re.sub(r"blocks\.\d+", "blocks", name): name for name in case.model.hook_dict}
    for name in kinds.values():
        # Experts that are not chosen stay so: a model cannot weigh more of them than it chooses.
        size, shift = (1.5, 0.0) if name.endswith("hook_router") else (1.0, 0.5)

        def change(
            value: Tensor, hook: HookPoint, size: float = size, shift: float = shift
        ) -> Tensor:
            return value * size + shift

        def change_in_place(
            value: Tensor, hook: HookPoint, size: float = size, shift: float = shift
        ) -> None:
            value.mul_(size).add_(shift)

        same = torch.equal(case.logits((name, change)), case.logits((name, change_in_place)))
        assert same, f"an edit in place is lost or leaks at {name}"


def sums(case: Case) -> None:
    """The residual stream adds up, and heads add up to attention."""
    for tower in case.awake:
        if not tower.row.post_norm:
            _stream_sums(case, tower)
        for layer in range(len(tower.blocks)):
            _head_sums(case, tower, layer)


def weights(case: Case) -> None:
    """Weight views reproduce what the modules give, from what enters them."""
    for tower in case.awake:
        for layer in range(len(tower.blocks)):
            for name, value, expected in _products(case, tower, layer):
                where = f"{tower.prefix}blocks.{layer} {name}"
                assert case.same(tower, value, expected), (
                    f"{where}: the view is not the module's weight"
                )


def recomputed(case: Case) -> None:
    """What is computed again for `hook_normalized` is what the norms give."""
    model, wrong = case.model, []
    for tower in case.awake:
        for name, module in _norms(tower):
            given = case.normed(module) if f"{name}.hook_scale" in model.hook_dict else None
            if given is not None:
                kind = norm_kind(module, tower.row.norm)
                centred, scale = moments(given[0], module, kind)
                if not case.near(affine(centred / scale, module, kind), given[1]):
                    wrong.append(name)
    assert not wrong, f"not what the module computes: {wrong}"


def generates(case: Case) -> None:
    """Cached generation equals generation without a cache, hooks live at every step."""
    model, batch = case.model, case.batch
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    options["suppress_tokens"] = list(range(len(SPECIAL)))  # a new placeholder needs a new picture
    last = len(model.towers[LANGUAGE].blocks) - 1
    name = f"blocks.{last}.hook_resid_post"
    push = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(5)) * 4
    shapes: list[int] = []

    def edit(value: Tensor, hook: HookPoint) -> Tensor:
        shapes.append(value.shape[1])
        return value + push.to(value) * value.std(-1, keepdim=True)

    plain = model.generate(batch, **options)
    with model.hooks(fwd_hooks=[(name, edit)]):
        cached = model.generate(batch, **options)
        steps, shapes[:] = list(shapes), []
        whole = model.generate(batch, use_cache=False, **options)
    assert cached.shape == (len(batch), 4), f"generated {tuple(cached.shape)}"
    assert torch.equal(cached, whole), "cached generation differs"
    assert len(steps) == 4, f"the hook fired {len(steps)} times in 4 steps"
    assert not torch.equal(cached, plain), "the hook had no effect on generation"


def leaves_nothing(case: Case) -> None:
    """No hook, attribute or attention function remains, after success and after an exception."""
    hf_model = case.hf()
    before = {id(m): set(vars(m)) for m in hf_model.modules()}
    model = HookedMultimodal.from_hf(hf_model)
    batch = Batch.from_inputs(model, **case.inputs)

    def fail(value: Tensor, hook: HookPoint) -> None:
        raise RuntimeError("a mistake in a hook")

    with torch.no_grad():
        first = model(batch)
        failed = False
        try:
            model.run_with_hooks(batch, fwd_hooks=[(everywhere, fail)])
        except RuntimeError as error:
            failed = "a mistake in a hook" in str(error)
        assert failed, "no hook fired"
        assert torch.equal(real(batch, model(batch)), real(batch, first))
    assert model.unwrap() is hf_model
    assert_no_hooks(hf_model)
    for module in hf_model.modules():
        assert set(vars(module)) <= before[id(module)] | {"_output_capturing_hooks_installed"}


def saves(case: Case, folder: Path) -> None:
    """Saved and loaded again, a model has the same row and gives the same numbers."""
    hf_model = case.hf()
    hf_model.save_pretrained(folder)
    model = HookedMultimodal.from_pretrained(folder)
    assert model.family is case.model.family
    assert list(model.hook_dict) == list(case.model.hook_dict)
    batch = Batch.from_inputs(model, **case.inputs)
    with torch.no_grad():
        assert torch.equal(real(batch, model(batch)), case.logits())


POINTS: dict[str, Callable[[Case], None]] = {
    "same logits": same_logits,
    "fires once": fires_once,
    "alive": alive,
    "clean into clean": clean_into_clean,
    "in place": in_place,
    "sums": sums,
    "weights": weights,
    "recomputed": recomputed,
    "generates": generates,
    "leaves nothing": leaves_nothing,
}
"""By name; saving needs a folder, places (`mechmm.testing.places`) need pictures."""

NOTHING_TO_GENERATE = "an encoder generates nothing"
CODES_FLIP = "its image tokenizer, which has no hooks, chooses other codes when eager"
EXEMPT: dict[tuple[str, str], str] = {
    ("florence2", "sums"): "convolutions stand on the residual stream of its vision tower (DaViT)",
}
"""(family, point) -> why the family cannot pass it."""


def exempt(case: Case, point: str) -> str | None:
    """Why a family cannot pass a point, or None where it has to."""
    if point == "generates" and case.model.family.unembed is None:
        return NOTHING_TO_GENERATE
    if (case.family, case.dtype, point) == ("emu3", torch.bfloat16, "same logits"):
        return CODES_FLIP
    return EXEMPT.get((case.family, point))


# What the points are made of -----------------------------------------------------------------


def _shape(case: Case, name: str) -> tuple[int | None, ...] | None:
    """The documented shape of a hook's value, None standing for any size."""
    owners = [t for t in case.model.towers.values() if t.prefix and name.startswith(t.prefix)]
    tower = owners[0] if owners else case.model.towers.get(LANGUAGE)
    last = name.rsplit(".", 1)[-1]
    if tower is None or not (owners or name.startswith(("blocks", "hook_embed", "ln_"))):
        return None, None, None
    cfg, stream = tower.cfg, case.cache[f"{tower.prefix}blocks.0.hook_resid_pre"]
    batch, pos = stream.shape[:2]
    if tower.row.stream_layout is not None:  # DaViT: width, heads and positions change by stage
        return None
    if ".cross_attn." in name:
        return _head_shape(last, batch, None, None, cfg)
    if ".attn." in name:
        return _head_shape(last, batch, pos, pos, cfg)
    if last in ("hook_router", "hook_expert_out"):
        return (batch, pos, None) if last == "hook_router" else (batch, pos, None, cfg.d_model)
    if ".mlp." in name:
        return batch, None, None
    if last == "hook_scale":
        return batch, None, 1
    if last == "hook_embed":
        return (None, None, None)
    return batch, None, cfg.d_model


def _head_shape(
    last: str, batch: int, pos: int | None, key: int | None, cfg: Any
) -> tuple[int | None, ...]:
    if last in ("hook_attn_scores", "hook_pattern"):
        return batch, cfg.n_heads, pos, key
    if last == "hook_result":
        return batch, pos, cfg.n_heads, cfg.d_model
    heads = cfg.n_key_value_heads if last in ("hook_k", "hook_v", "hook_rot_k") else cfg.n_heads
    return None if pos is None and heads != cfg.n_heads else batch, pos, heads, cfg.d_head


def _norms(tower: Tower) -> Iterator[tuple[str, nn.Module]]:
    """Every norm of a tower with the name of its hooks."""
    blocks = (("ln1", "ln1_post", "ln_cross", "ln2", "ln2_post"), range(len(tower.blocks)))
    for names, layers in ((("ln_pre", "ln_final"), (None,)), blocks):
        for layer, name in itertools.product(layers, names):
            module = tower.module(getattr(tower.row, name), layer)
            if module is not None:
                yield f"{tower.prefix}{'' if layer is None else f'blocks.{layer}.'}{name}", module


def _stream_sums(case: Case, tower: Tower) -> None:
    cache, n = case.cache, len(tower.blocks)
    for layer in range(n):
        name = f"{tower.prefix}blocks.{layer}"
        parts = ("hook_attn_out", "hook_cross_attn_out", "hook_mlp_out")
        added = [cache[f"{name}.{part}"] for part in parts if f"{name}.{part}" in cache]
        stream = cache[f"{name}.hook_resid_pre"]
        total = stream + sum(added)
        assert case.near(total, cache[f"{name}.hook_resid_post"]), f"{name} does not add up"
        if f"{name}.hook_resid_mid" in cache:
            middle = stream + added[0]
            assert case.near(middle, cache[f"{name}.hook_resid_mid"]), f"{name}: resid_mid"
        if layer + 1 < n and layer not in tower.ends:
            between = cache[f"{name}.hook_resid_post"] + cache.get(f"{name}.hook_deepstack", 0)
            after = cache[f"{tower.prefix}blocks.{layer + 1}.hook_resid_pre"]
            assert case.near(between, after), f"between block {layer} and the next of {tower.name}"


def _head_sums(case: Case, tower: Tower, layer: int) -> None:
    """Results plus bias are what the output projection gives; so is `hook_attn_out`, where nothing
    stands between."""
    for part, prefix in (("attn", ""), ("cross_attn", "cross_")):
        name = f"{tower.prefix}blocks.{layer}"
        result = case.cache.get(f"{name}.{part}.hook_result")
        if result is None:
            continue
        bias = tower.weight("b_O", layer, prefix)
        total = result.sum(2) if bias is None else result.sum(2) + bias
        given = case.passed[_there(tower.linear(layer, f"{prefix}o"))][1]
        assert case.same(tower, total, tower.shown(given)[0]), f"{name}.{part}: heads do not add up"
        row = tower.row
        direct = not (row.gated or row.ln1_post or row.attn_out or row.stream_layout)
        if direct:
            out = case.cache[f"{name}.hook_{part}_out"]
            assert case.same(tower, total, out), f"{name}: heads do not add up to hook_{part}_out"


def _products(case: Case, tower: Tower, layer: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, product of a view with what enters its module, what the hook behind it shows)."""
    name = f"{tower.prefix}blocks.{layer}"
    for part, prefix in (("attn", ""), ("cross_attn", "cross_")):
        for letter in "QKV":
            hook = f"{name}.{part}.hook_{letter.lower()}"
            weight = tower.weight(f"W_{letter}", layer, prefix)
            if weight is None or hook not in case.cache:
                continue
            fused = None if prefix else tower.linear(layer, "qkv")
            module = fused or tower.linear(layer, prefix + letter.lower())
            given = case.passed[_there(module)][0]
            value = einsum(tower.shown(given)[0], weight, "... d, head d d_head -> ... head d_head")
            bias = tower.weight(f"b_{letter}", layer, prefix)
            yield f"W_{letter}", value if bias is None else value + bias, case.cache[hook]
    for view in ("in", "gate", "out"):
        weight, module = tower.weight(f"W_{view}", layer), tower.linear(layer, f"mlp_{view}")
        if weight is None or module is None:
            continue
        given, gave = case.passed[module]
        if tower.row.mlp_in_layout is not None and view == "in":
            gave = gave.chunk(2, dim=-1)[1]
        bias = tower.weight(f"b_{view}", layer)
        value = given @ weight
        yield f"W_{view}", value if bias is None else value + bias, gave


def _there(module: nn.Module | None) -> nn.Module:
    assert module is not None
    return module
