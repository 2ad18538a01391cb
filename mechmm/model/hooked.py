"""HookedMultimodal: a Hugging Face multimodal model with hook points on all of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformers import AutoConfig, PreTrainedModel

from mechmm.model import attention
from mechmm.model.batch import Batch, InputError
from mechmm.model.encoding import Encoding
from mechmm.model.families import UnknownArchitectureError, family_of, stack_of
from mechmm.model.overlay import Overlay
from mechmm.model.processors import load_processor
from mechmm.model.rows import VERIFIED, Family
from mechmm.model.tower import WEIGHTS, MissingPathError, Tower, TowerConfig, remedy

DEMO = "mechmm/demo"
LANGUAGE = "language"
VISION = "vision"
DERIVED = ("hook_result", "hook_expert_out")
"""Hooks that are computed only when somebody listens, and cached only when named."""


class UnknownHookError(KeyError):
    """No hook point has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


def source_of(name_or_path: str | Path) -> str:
    """What `transformers` loads a model from: a name on the hub or a folder."""
    demo = str(name_or_path) == DEMO
    return str(files("mechmm") / "zoo" / "demo") if demo else str(name_or_path)


class HookedMultimodal(Encoding):
    """A multimodal model whose every activation, from pixel to answer token, has a hook point.

    The Hugging Face model runs unmodified; hook points are laid over it. `hooks`, `run_with_hooks`,
    `run_with_cache`, `add_hook` and `reset_hooks` are TransformerLens's own. The language model's
    hooks have TransformerLens's names; those of other towers carry a prefix (`vision.`).

    Attributes:
        family: the row of the architecture.
        towers: `"language"` and every other stack by name, with `.cfg` and weights.
        processor: turns text and pictures into inputs, or None.
    """

    hf_model: PreTrainedModel

    def __init__(self, hf_model: PreTrainedModel, processor: Any = None) -> None:
        super().__init__()
        if hf_model.training:
            raise ValueError(
                "the model is in training mode, where dropout makes every run different; call "
                "hf_model.eval() first"
            )
        if {attention.NAME, attention.PACKED} & set(_attention_of(hf_model).values()):
            raise ValueError(
                "this Hugging Face model is wrapped already; call unwrap() on that first"
            )
        self.family: Family = family_of(type(hf_model).__name__)
        self.processor = processor
        # Outside the module tree, so that hook names stay ours and parameters stay its own.
        object.__setattr__(self, "hf_model", hf_model)
        object.__setattr__(self, "towers", self._find_towers())
        object.__setattr__(self, "_before", _attention_of(hf_model))
        attention.register()
        object.__setattr__(self, "_overlay", Overlay(self))
        try:
            self._switch_attention()
            self._lay()
        except Exception:
            self._restore()
            raise
        self.setup()
        self.eval()

    towers: dict[str, Tower]
    _overlay: Overlay
    _before: dict[int, str]

    # Loading ---------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> HookedMultimodal:
        """Load a model and its processor with `transformers`.

        Where the processor cannot be loaded, the model has none, and `encode` says why.

        Args:
            name_or_path: a hub name, a local folder, or `"mechmm/demo"` (shipped).
            device: where to put the model; not together with `device_map`.
            dtype: for example `torch.bfloat16`; default: as the checkpoint was saved.
            device_map: `accelerate`'s placement over several devices.
            revision: branch, tag or commit of a hub model.
            trust_remote_code: run code that comes with the checkpoint.

        Raises:
            UnknownArchitectureError: the architecture has no row in `mechmm.model.families`.
            ValueError: a folder without a model, or `device` together with `device_map`.
            OSError: from `transformers`, where the name cannot be found.
        """
        if device is not None and device_map is not None:
            raise ValueError("give either device or device_map, not both")
        source = source_of(name_or_path)
        if Path(source).is_dir() and not (Path(source) / "config.json").exists():
            raise ValueError(
                f"the folder {source!r} is no model: it has no config.json; give a folder written "
                "by save_pretrained, or a hub name"
            )
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(source, **options)
        except OSError as error:
            raise OSError(
                f"cannot load {source!r}: it is no local folder, and the hub did not give it "
                f"({str(error).splitlines()[0]})"
            ) from error
        architecture = _architecture(config, source)
        family_of(architecture)
        loaded = getattr(transformers, architecture).from_pretrained(
            source, config=config, dtype=dtype or "auto", device_map=device_map, **options
        )
        if device is not None:
            loaded = loaded.to(device)
        processor, reason = load_processor(source, options)
        model = cls(loaded.eval(), processor)
        model.no_processor = reason
        return model

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, processor: Any = None) -> HookedMultimodal:
        """Wrap a Hugging Face model that is in memory.

        Raises:
            UnknownArchitectureError: the architecture has no row in `mechmm.model.families`.
            ValueError: the model is in training mode, or wrapped already.
        """
        return cls(hf_model, processor)

    def __deepcopy__(self, memo: dict) -> Any:
        """Refused: taps lie on the modules of one Hugging Face model.

        Raises:
            TypeError: always, with what to do.
        """
        raise TypeError("a hooked model cannot be copied; copy.deepcopy(model.unwrap()), wrap both")

    def unwrap(self) -> PreTrainedModel:
        """The Hugging Face model as it was, with no hook and no attention function of ours left."""
        self.reset_hooks(including_permanent=True)
        self._restore()
        return self.hf_model

    def _restore(self) -> None:
        """Take every tap off, and give every config its own attention back."""
        self._overlay.remove()
        for config in _configs(self.hf_model):
            if id(config) in self._before:
                config._attn_implementation_internal = self._before[id(config)]

    def _find_towers(self) -> dict[str, Tower]:
        towers = {}
        for name, path in self.family.towers.items():
            root = self._root(path)
            config: Any = getattr(root, "config", self.hf_model.config)
            language = name == LANGUAGE and self.family.unembed is not None
            unembed = self._root(self.family.unembed) if language else None
            row = stack_of(self.family.stacks.get(name, config.model_type), name, config)
            prefix = "" if name == LANGUAGE else f"{name}."
            towers[name] = Tower(prefix, row, root, config, unembed)
        return towers

    def _root(self, path: str | None) -> Any:
        """A module of the Hugging Face model that the family's row names."""
        try:
            return self.hf_model.get_submodule(path or "")
        except AttributeError:
            raise MissingPathError(
                f"{self.family.architecture} has no module {path!r} in transformers "
                f"{transformers.__version__}; its row in mechmm/model/families.py was verified "
                f"with transformers {VERIFIED}: {remedy()}"
            ) from None

    def _switch_attention(self) -> None:
        """Every tower calls our attention function, a packed one once for all its chunks; models
        beside the towers (an image tokenizer) keep theirs."""
        self.hf_model.set_attn_implementation(attention.NAME)
        roots = [tower.root for tower in self.towers.values()]
        inside = {id(module) for root in roots for module in root.modules()}
        for module in _models(self.hf_model):
            around = any(root in module.modules() for root in roots)
            if id(module) not in inside and not around:
                module.config._attn_implementation_internal = self._before[id(module.config)]
        for tower in self.towers.values():
            packing = tower.row.packed
            chunked = packing is not None and packing.chunked
            tower.root.config._attn_implementation_internal = (  # type: ignore[union-attr]
                attention.PACKED if chunked else attention.NAME
            )

    def _lay(self) -> None:
        for name, tower in self.towers.items():
            eager = self._before.get(id(tower.config)) == "eager"
            deepstack = self.family.deepstack(self.config) if name == LANGUAGE else 0
            self._overlay.lay_tower(tower, eager, deepstack)
        for prefix, row in self.family.projectors.items():
            tower = self.towers.get(row.tower) or next(iter(self.towers.values()))
            self._overlay.lay_projector(self._root(row.root), prefix, row, tower)

    # What it is ------------------------------------------------------------------------------

    @property
    def cfg(self) -> TowerConfig:
        """Sizes of the language model (or the only tower), in TransformerLens's names."""
        return self._main.cfg

    @property
    def _main(self) -> Tower:
        return self.towers.get(LANGUAGE) or next(iter(self.towers.values()))

    def __getattr__(self, name: str) -> Any:
        if name in ("W_E", "W_U", *WEIGHTS["attn"], *WEIGHTS["mlp"]):
            return getattr(self._main, name)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        lines = [f"HookedMultimodal({self.family.architecture}, {len(self.hook_dict)} hook points"]
        lines += [f"  {tower!r}" for tower in self.towers.values()]
        return "\n".join([*lines, ")"])

    # Running ---------------------------------------------------------------------------------

    def forward(
        self, batch: Batch | Int[Tensor, "batch pos"], *, logits_to_keep: int = 0
    ) -> Float[Tensor, "batch *rest"]:
        """What the family gives of a batch: logits [batch, pos, vocab] of a language model (of an
        encoder-decoder: of its decoder), `logits_per_image` [image, text] of a dual encoder, class
        logits [image, class] or features [image, pos, d_model] of a vision encoder.

        Args:
            batch: from `encode` or `Batch.from_inputs`; a tensor of token ids is taken as text
                alone and refused where it has image placeholders.
            logits_to_keep: only the last so many positions of a language model; 0: all.

        Raises:
            InputError: placeholders without pixels; pixels of another dtype or device.
            ValueError: the Hugging Face model is in training mode.
        """
        if self.hf_model.training:
            raise ValueError("the model is in training mode; call model.hf_model.eval() first")
        self._check_attention()
        if isinstance(batch, Tensor):
            batch = Batch.from_inputs(self, input_ids=batch)
        if not isinstance(batch, Batch):
            raise TypeError(
                f"expected a Batch, got {type(batch).__name__}; make one with "
                "model.encode(text, images) or Batch.from_inputs(model, **inputs)"
            )
        if batch.input_ids.device != self.device:
            raise InputError(
                f"the batch is on {batch.input_ids.device}, the model on {self.device}; call "
                "batch.to(model.device)"
            )
        options: dict[str, Any] = {"use_cache": False} if self.takes("past_key_values") else {}
        if self.takes("logits_to_keep"):
            options["logits_to_keep"] = logits_to_keep
        output = self.hf_model(**batch.inputs, **options)[self.family.output]
        sliced = "logits_to_keep" in options or self.family.unembed is None
        return output if sliced else output[:, -logits_to_keep:]

    def _check_attention(self) -> None:
        """Refuse to run where the attention hooks would be dead."""
        for name, tower in self.towers.items():
            now = tower.config._attn_implementation
            if now not in (attention.NAME, attention.PACKED):
                raise ValueError(
                    f"attention of tower {name!r} was set to {now!r}, so its hooks would not fire: "
                    "the model was unwrapped, or its config changed; wrap it again with from_hf"
                )

    @torch.no_grad()
    def generate(self, batch: Batch, **options: Any) -> Int[Tensor, "batch new"]:
        """Generate with hooks live at every step, cached decoding included.

        Args:
            batch: left-padded where prompts have different lengths.
            **options: of `transformers`' `generate`, for example `max_new_tokens`.

        Returns:
            The new tokens [batch, new]; `to_string` makes text of them.

        Raises:
            InputError: prompts of different lengths padded on the right.
            ValueError: for `return_dict_in_generate`.
        """
        self._check_attention()
        decodes = self.config.is_encoder_decoder
        if not decodes and (batch.attention_mask[:, -1] == 0).any():
            raise InputError(
                "generation continues at the last position; encode with padding_side='left'"
            )
        if options.get("return_dict_in_generate"):
            raise ValueError("generate gives the new tokens; for more, run model(batch) on them")
        inputs = {k: v for k, v in batch.inputs.items() if k != "position_ids"}
        generate: Any = self.hf_model.generate
        whole = generate(**inputs, **options)
        start = batch.extra["decoder_input_ids"] if decodes else batch.input_ids
        return whole[:, start.shape[1] :]

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """Logits and a `transformer_lens.ActivationCache`.

        Args:
            names_filter: a name, a list of names or a function of names. Default: every hook but
                the derived `hook_result`, which is large; name it to have it.
            others: as in TransformerLens.

        Raises:
            UnknownHookError: for a name that no hook point has, with the nearest names.
            SpanError: for a batch with images and videos, which runs its tower once for each.
        """
        for argument in model_args:
            if isinstance(argument, Batch):
                argument.layout.refuse_two_kinds()
        if names_filter is None:
            names_filter = _not_derived
        elif not callable(names_filter):
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            self.check_names(names)
            names_filter = frozenset(names).__contains__
        output, cache = super().run_with_cache(
            *model_args,
            names_filter=names_filter,
            device=device,  # type: ignore[arg-type]
            remove_batch_dim=remove_batch_dim,
            incl_bwd=incl_bwd,
            reset_hooks_end=reset_hooks_end,
            clear_contexts=clear_contexts,
            pos_slice=pos_slice,
            **model_kwargs,
        )
        return output, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse names that no hook point has.

        Raises:
            UnknownHookError: with the nearest names.
        """
        for name in names:
            if name not in self.hook_dict:
                near = difflib.get_close_matches(name, self.hook_dict, n=4, cutoff=0.5)
                raise UnknownHookError(
                    f"unknown hook {name!r}; nearest: {', '.join(near) or 'none'}. "
                    "model.hook_dict lists all of them"
                )

    def add_hook(self, name: Any, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; an unknown name is refused with the nearest names."""
        if isinstance(name, str):
            self.check_names([name])
        super().add_hook(name, *args, **kwargs)

    def remove_all_hook_fns(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, for the few hook points that have hooks."""
        for point in self.hook_points():
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(*args, **kwargs)

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.check_names([name])
        super()._enable_hook_with_name(name, hook, dir)


def _not_derived(name: str) -> bool:
    return not name.endswith(DERIVED)


def _architecture(config: Any, source: str) -> str:
    names = getattr(config, "architectures", None) or []
    if not names:
        raise UnknownArchitectureError(
            f"the config of {source!r} names no architecture; load the model yourself and pass it "
            "to HookedMultimodal.from_hf"
        )
    return names[0]


def _configs(hf_model: PreTrainedModel) -> list[Any]:
    """The configs of a model and of every model inside it."""
    return list({id(module.config): module.config for module in _models(hf_model)}.values())


def _models(hf_model: PreTrainedModel) -> list[PreTrainedModel]:
    """A model and every model inside it."""
    return [module for module in hf_model.modules() if isinstance(module, PreTrainedModel)]


def _attention_of(hf_model: PreTrainedModel) -> Mapping[int, str]:
    """The attention implementation that each config stands at, by the config's id."""
    return {id(config): config._attn_implementation for config in _configs(hf_model)}
