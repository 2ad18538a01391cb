"""Lays TransformerLens hook points over the stacks and projectors that a family row names."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from mechmm.model import attention
from mechmm.model.attention import AttentionHooks, fire, listening
from mechmm.model.experts import rerouted
from mechmm.model.rows import VERIFIED, Projector
from mechmm.model.taps import Component, Taps
from mechmm.model.tower import MissingPathError, Tower, found, remedy


class Overlay(Taps):
    """The hook points of one Hugging Face model."""

    def lay_tower(self, tower: Tower, eager: bool, deepstack: int = 0) -> None:
        """All hook points of one stack; the first `deepstack` blocks are followed by features of
        another tower."""
        prefix, row, view = tower.prefix, tower.row, tower.shown
        if row.packed is not None:
            self._pack(tower)
        embed, name = tower.module(row.embed), f"{prefix}hook_embed"
        lay = self.input if (row.embed or "").startswith("<") else self.output
        lay(embed, name, partial(view, where="embed"))
        before = partial(view, where="embed")
        self.norm(tower.module(row.ln_pre), f"{prefix}ln_pre", row.norm, before)
        for layer in range(len(tower.blocks)):
            self._lay_block(tower, layer, eager)
            if layer < deepstack:
                self.deepstack(tower, layer)
        final = tower.module(row.ln_final)
        pooled = partial(view, where="pooled")
        self.norm(final, f"{prefix}ln_final", row.norm, pooled, tower.is_stream)

    def lay_projector(self, root: nn.Module, prefix: str, row: Projector, tower: Tower) -> None:
        """All hook points of one projector, or of each in a list of them."""
        if isinstance(root, nn.ModuleList):
            for i, module in enumerate(root):
                self.lay_projector(module, f"{prefix}.{i}", row, tower)
            return
        tokens = partial(tower.shown, where="tokens")
        features = partial(tower.shown, where="features")
        self.input(root, f"{prefix}.hook_in", features, Tensor.is_floating_point)
        if row.pre is not None:
            self.output(_named(root, row.pre), f"{prefix}.hook_pre", tokens)
        if row.post is not None:
            self.input(_named(root, row.post), f"{prefix}.hook_post", tokens)
        self.output(root, f"{prefix}.hook_out", tokens, Tensor.is_floating_point)

    def _pack(self, tower: Tower) -> None:
        """Note, at every run of a tower that packs, where its patches lie."""
        packing = tower.row.packed
        assert packing is not None

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tower.pack = packing.pack(module, args, kwargs)

        self.before(tower.root, tap)

    def _lay_block(self, tower: Tower, layer: int, eager: bool) -> None:
        """All hook points of one block. Of two taps on the output of one module, the one laid later
        comes first: what is computed inside a module is laid after what the module gives."""
        row, block, view = tower.row, tower.blocks[layer], tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        if layer == 0:
            self.enter(block, tower)
        stream = partial(view, where="stream")
        self.input(block, f"{name}.hook_resid_pre", stream)
        # Before what the MLP adds, which is read from the same output where there is a gate.
        self.output(block, f"{name}.hook_resid_post", stream)
        self._lay_middle(tower, layer)
        for part, prefix in (("attn", ""), ("cross_attn", "cross_")):
            self._lay_attention(tower, layer, part, prefix, eager)
        self._lay_mlp(tower, layer)
        for norm in ("ln1", "ln1_post", "ln_cross", "ln2", "ln2_post"):
            module = tower.module(getattr(row, norm), layer)
            self.norm(module, f"{name}.{norm}", row.norm, view)
        for part in ("attn", "cross_attn", "mlp"):
            node = self.root.get_submodule(name)._modules.get(part)
            if isinstance(node, Component):
                node.weights = tower.weights(layer, part)

    def _lay_middle(self, tower: Tower, layer: int) -> None:
        """What attention adds, and the residual stream behind it."""
        row, view = tower.row, tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        outs = {
            "hook_attn_out": tower.first(layer, row.attn_out, row.ln1_post, row.attn),
            "hook_cross_attn_out": tower.first(layer, row.cross_attn_out, row.cross_attn),
        }
        outs = {hook: module for hook, module in outs.items() if module is not None}
        middle = ("hook_resid_mid", "hook_resid_mid_cross")[: len(outs)]
        if row.post_norm:
            stream = [tower.module(row.ln1, layer), tower.module(row.ln_cross, layer)]
            lay = self.output
        else:
            between = [tower.module(row.ln_cross, layer)] if len(outs) > 1 else []
            stream = [*between, tower.module(row.mid or row.ln2, layer)]
            lay = self.residual
        for (hook, module), point, at in zip(outs.items(), middle, stream, strict=False):
            if row.gated:
                assert at is not None
                self.added(tower.blocks[layer], at, f"{name}.{hook}", tower, behind=False)
            else:
                self.output(module, f"{name}.{hook}", view)
            lay(at, f"{name}.{point}", view)

    def _lay_mlp(self, tower: Tower, layer: int) -> None:
        row, view = tower.row, tower.shown
        name = f"{tower.prefix}blocks.{layer}"
        ln2, into = tower.module(row.ln2, layer), tower.linear(layer, "mlp_in")
        if row.gated:  # before `hook_mlp_in`, whose edits reach the MLP alone, not the stream
            assert ln2 is not None
            self.added(ln2, tower.blocks[layer], f"{name}.hook_mlp_out", tower, behind=True)
        if row.post_norm:
            self.input(into, f"{name}.hook_mlp_in", view)
        elif ln2 is not None:
            self.input(ln2, f"{name}.hook_mlp_in", view)
        if not row.gated:
            added = tower.first(layer, row.mlp_out_at, row.ln2_post, row.mlp)
            self.output(added, f"{name}.hook_mlp_out", view)
        points = [f"{name}.mlp.hook_pre", f"{name}.mlp.hook_pre_linear"]
        gate = tower.linear(layer, "mlp_gate")
        if row.mlp_in_layout is not None:
            self.parts(into, points, row.mlp_in_layout, "two", view, two=2)
        elif gate is not None:
            self.output(gate, points[0], view)
            self.output(into, points[1], view)
        else:
            self.output(into, points[0], view)
        self.input(tower.linear(layer, "mlp_out"), f"{name}.mlp.hook_post", view)
        self._lay_experts(tower, layer, f"{name}.mlp")

    def _lay_experts(self, tower: Tower, layer: int, name: str) -> None:
        """Weight and output of every expert, in a block that has experts."""
        row, view = tower.row, partial(tower.shown, where="experts")
        experts = tower.part(layer, "mlp", row.experts)
        if experts is None:
            return
        self.experts(experts, f"{name}.hook_expert_out", view)
        if row.router is not None:
            self.output(tower.part(layer, "mlp", row.router), f"{name}.hook_router", view)
            return
        point = self.point(f"{name}.hook_router")

        def tap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if not listening(point):
                return None
            return rerouted(module, args, partial(fire, point, view=view)), kwargs

        self.before(experts, tap, point)

    def _lay_attention(self, tower: Tower, layer: int, part: str, prefix: str, eager: bool) -> None:
        row, view = tower.row, tower.shown
        core = tower.part(layer, part, row.core)
        heads, name = tower.heads(layer), f"{tower.prefix}blocks.{layer}.{part}"
        if core is None:
            return
        fused = None if prefix else tower.linear(layer, "qkv")
        if fused is not None:
            points = [f"{name}.hook_{letter}" for letter in "qkv"]
            self.parts(fused, points, row.qkv_layout, "three", view, three=3, head=heads)
        else:
            self._lay_heads(tower, layer, prefix, name)
        points = {
            step: self.point(f"{name}.hook_{step}")
            for step in ("rot_q", "rot_k", "attn_scores", "pattern", "z")
        }
        scores = points.pop("attn_scores")
        hooks = AttentionHooks(scores=scores, eager=eager, pack=lambda: tower.pack, **points)
        attention.attach(core, hooks)
        self.attentions.append(core)
        self.result(tower.linear(layer, f"{prefix}o"), f"{name}.hook_result", heads, view)

    def _lay_heads(self, tower: Tower, layer: int, prefix: str, name: str) -> None:
        d_head, view = tower.d_head(layer), tower.shown
        for letter in "qkv":
            module = tower.linear(layer, prefix + letter)
            if letter == "q" and tower.row.q_gate:
                points, layout = [f"{name}.hook_q", f"{name}.hook_gate"], "(head part d_head)"
            else:
                points, layout = [f"{name}.hook_{letter}"], "(part head d_head)"
            sizes = {"part": len(points), "d_head": d_head}
            self.parts(module, points, layout, "part", view, **sizes)


def _named(root: nn.Module, path: str) -> nn.Module:
    module = found(root, path)
    if module is None:
        raise MissingPathError(
            f"projector {type(root).__name__} has no module {path!r}; its row in "
            f"mechmm/model/families.py was verified with transformers {VERIFIED}: {remedy()}"
        )
    return module
