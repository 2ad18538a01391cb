"""HookedMultimodal: a Hugging Face multimodal model with hook points on all of it."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.HookedRootModule import HookedRootModule
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from mechmm.model import attention
from mechmm.model.batch import Batch, InputError, Picture, open_picture, per_prompt
from mechmm.model.families import UnknownArchitectureError, family_of, stack_of
from mechmm.model.grids import window
from mechmm.model.overlay import Overlay
from mechmm.model.rows import VERIFIED, Family, MediumInput
from mechmm.model.tower import WEIGHTS, MissingPathError, Tower, TowerConfig

DEMO = "mechmm/demo"
LANGUAGE = "language"
DERIVED = ("hook_result",)
"""Hooks that are computed only when somebody listens, and cached only when named."""


class UnknownHookError(KeyError):
    """No hook point has this name."""

    def __str__(self) -> str:
        return str(self.args[0])


class HookedMultimodal(HookedRootModule):
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
        self._switch_attention()
        object.__setattr__(self, "_overlay", Overlay(self))
        self._lay()
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
        source, demo = str(name_or_path), str(name_or_path) == DEMO
        if demo:
            source = str(files("mechmm") / "zoo" / "demo")
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
        processor = AutoProcessor.from_pretrained(source, **options)
        return cls(loaded.eval(), processor)

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, processor: Any = None) -> HookedMultimodal:
        """Wrap a Hugging Face model that is in memory.

        Raises:
            UnknownArchitectureError: the architecture has no row in `mechmm.model.families`.
            ValueError: the model is in training mode, or wrapped already.
        """
        return cls(hf_model, processor)

    def unwrap(self) -> PreTrainedModel:
        """The Hugging Face model as it was, with no hook and no attention function of ours left."""
        self.reset_hooks(including_permanent=True)
        self._overlay.remove()
        for config in _configs(self.hf_model):
            if id(config) in self._before:
                config._attn_implementation_internal = self._before[id(config)]
        return self.hf_model

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
                f"with transformers {VERIFIED}: install that version, or mend the row"
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
    def config(self) -> Any:
        """The Hugging Face config."""
        return self.hf_model.config

    @property
    def cfg(self) -> TowerConfig:
        """Sizes of the language model (or the only tower), in TransformerLens's names."""
        return self._main.cfg

    @property
    def _main(self) -> Tower:
        return self.towers.get(LANGUAGE) or next(iter(self.towers.values()))

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.hf_model.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.hf_model.dtype

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the Hugging Face model takes."""
        parameters = inspect.signature(self.hf_model.forward).parameters.values()
        return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)

    def takes(self, name: str) -> bool:
        """Whether the Hugging Face model has an input of this name."""
        return name in self.inputs

    def placeholder_of(self, medium: MediumInput) -> int:
        """The token id that a medium fills, -1 where it fills none."""
        return -1 if medium.placeholder is None else getattr(self.config, medium.placeholder)

    def token_of(self, medium: MediumInput) -> str:
        """The placeholder of a medium as text."""
        token = self.placeholder_of(medium)
        if self.processor is None:
            return f"token {token}"
        return self.processor.tokenizer.convert_ids_to_tokens(token)

    @property
    def placeholder(self) -> int:
        """The token id that a picture fills."""
        return self.placeholder_of(self.family.media[0])

    @property
    def image_token(self) -> str:
        """The placeholder of a picture as text."""
        return self.token_of(self.family.media[0])

    def __getattr__(self, name: str) -> Any:
        if name in ("W_E", "W_U", *WEIGHTS["attn"], *WEIGHTS["mlp"]):
            return getattr(self._main, name)
        return super().__getattr__(name)

    def __repr__(self) -> str:
        lines = [f"HookedMultimodal({self.family.architecture}, {len(self.hook_dict)} hook points"]
        lines += [f"  {tower!r}" for tower in self.towers.values()]
        return "\n".join([*lines, ")"])

    # Inputs ----------------------------------------------------------------------------------

    def encode(
        self,
        text: str | Sequence[str],
        images: Picture | Sequence[Picture | Sequence[Picture]] | None = None,
        *,
        padding_side: str = "left",
    ) -> Batch:
        """Turn texts and pictures into a batch.

        Args:
            text: one prompt or many; each has one placeholder (`model.image_token`) per picture.
            images: for one text, a picture or a list of pictures; for many, one such entry per
                text. `images=[]` runs on text alone, on purpose.
            padding_side: `"left"` (the last positions of all prompts line up) or `"right"`.

        Raises:
            InputError: placeholders and pictures do not match, with the prompt and both counts; an
                unreadable picture; no processor.
        """
        if self.processor is None:
            raise InputError(
                "this model has no processor; pass one to from_hf, or use Batch.from_inputs"
            )
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise InputError("no text was given; pass at least one prompt")
        groups = per_prompt(texts, images, self.image_token)
        pictures = tuple(
            tuple(open_picture(picture, prompt) for picture in group)
            for prompt, group in enumerate(groups)
        )
        flat = [picture for group in pictures for picture in group]
        inputs = self.processor(
            text=texts,
            images=flat or None,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side,
        )
        return self._batch(dict(inputs), pictures)

    def _batch(
        self, inputs: dict[str, Any], pictures: tuple[tuple[Image.Image, ...], ...]
    ) -> Batch:
        inputs.pop("token_type_ids", None)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value = value.to(self.device)
                inputs[name] = value.to(self.dtype) if value.is_floating_point() else value
        batch = Batch.from_inputs(self, **inputs)
        seen = partial(window, self.processor.image_processor)
        windows = tuple(tuple(seen(*picture.size) for picture in group) for group in pictures)
        layout = replace(batch.layout, windows=windows)
        return replace(batch, layout=layout, images=pictures)

    def token_texts(self, ids: Int[Tensor, "batch pos"]) -> tuple[tuple[str, ...], ...]:
        """Every token as text, with its leading space where it starts a word."""
        if self.processor is None:
            return tuple(tuple(f" {i}" for i in row) for row in ids.tolist())
        tokenizer = self.processor.tokenizer
        names = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        marked = any(name.startswith(("▁", "Ġ")) for name in tokenizer.get_vocab())
        return tuple(tuple(_readable(name, marked) for name in row) for row in names)

    def to_tokens(self, text: str) -> Int[Tensor, "1 pos"]:
        """Token ids of a text, as the tokenizer gives them."""
        ids = self.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        return ids.to(self.device)

    def to_string(self, ids: Int[Tensor, "..."]) -> str | list[str]:
        """Text of token ids: one string, or one per row."""
        if ids.ndim <= 1:
            return self.processor.tokenizer.decode(ids)
        return self.processor.tokenizer.batch_decode(ids)

    def to_single_token(self, word: str) -> int:
        """The id of a word that is one token in the middle of a text.

        Raises:
            ValueError: where it is several tokens or unknown.
        """
        ids = self.answer_tokens(word)
        if len(ids) != 1:
            raise ValueError(f"{word!r} is {len(ids)} tokens, not one")
        return ids[0]

    def answer_tokens(self, answer: str) -> list[int]:
        """Token ids of an answer as it follows a prompt.

        Raises:
            ValueError: where the answer is empty or the tokenizer does not know it.
        """
        tokenizer = self.processor.tokenizer
        ids = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
        bare = tokenizer(answer.strip(), add_special_tokens=False)["input_ids"]
        ids = bare if len(bare) < len(ids) else ids
        if not ids or tokenizer.unk_token_id in ids:
            raise ValueError(f"the tokenizer cannot write the answer {answer!r}")
        return ids

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
        """
        self._check_attention()
        if (batch.attention_mask[:, -1] == 0).any():
            raise InputError(
                "generation continues at the last position; encode with padding_side='left'"
            )
        inputs = {k: v for k, v in batch.inputs.items() if k != "position_ids"}
        generate: Any = self.hf_model.generate
        whole = generate(**inputs, **options)
        start = batch.extra.get("decoder_input_ids", batch.input_ids)
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
            Other arguments: as in TransformerLens.

        Raises:
            UnknownHookError: for a name that no hook point has, with the nearest names.
        """
        if names_filter is None:
            names_filter = _not_derived
        elif not callable(names_filter):
            names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
            self.check_names(names)
            names_filter = names
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

    def _enable_hook_with_name(self, name: str, hook: Callable, dir: Any) -> None:
        self.check_names([name])
        super()._enable_hook_with_name(name, hook, dir)


def _not_derived(name: str) -> bool:
    return not name.endswith(DERIVED)


def _readable(token: str, marked: bool) -> str:
    if token.startswith(("▁", "Ġ")):
        return " " + token[1:]
    return token if marked else f" {token}"


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
