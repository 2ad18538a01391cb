"""Sparse autoencoders: a state as a sum of a few of many learned directions.

    f = activation((x - b_dec) W_enc + b_enc),   x^ = f W_dec + b_dec

with the k largest entries (TopK, Gao et al. 2406.04093), a ReLU, or a threshold per feature
(JumpReLU, Rajamanoharan et al. 2407.14435). Files are those of SAELens: `sae_weights.safetensors`
with W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec (and threshold), and `cfg.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
ACTIVATIONS = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
"""Activation by the architecture that `cfg.json` names."""


NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


class DictionaryError(ValueError):
    """A sparse autoencoder cannot be read, or does not fit a state."""


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """A dictionary of directions for the states at one hook.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: see above.
        activation: `"topk"`, `"relu"` or `"jumprelu"`.
        hook: where the states come from.
        k: active features of a place, at most; 0 unless `"topk"`.
        threshold: below which a feature is 0, for `"jumprelu"`.
        centred: whether b_dec is subtracted from what is encoded.
        model: name of the model.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    activation: str
    hook: str
    k: int = 0
    threshold: Float[Tensor, " d_sae"] | None = None
    centred: bool = True
    model: str = ""

    def __post_init__(self) -> None:
        check_shapes({name: getattr(self, name) for name in NAMES})
        d_sae = self.W_enc.shape[1]
        if self.activation not in ACTIVATIONS.values():
            known = ", ".join(ACTIVATIONS.values())
            raise DictionaryError(f"unknown activation {self.activation!r}; use {known}")
        if self.activation == "topk" and not 1 <= self.k <= d_sae:
            raise DictionaryError(f"k is {self.k}; give 1..{d_sae}")
        if (self.threshold is None) == (self.activation == "jumprelu"):
            raise DictionaryError("a threshold belongs to jumprelu, and to nothing else")

    @property
    def d_in(self) -> int:
        """Width of a state."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    def encode(self, x: Float[Tensor, "*place d_in"]) -> Float[Tensor, "*place d_sae"]:
        """The features of some states.

        Raises:
            DictionaryError: states of another width.
        """
        if x.shape[-1] != self.d_in:
            raise DictionaryError(
                f"this dictionary reads states of {self.d_in} numbers (it was trained at "
                f"{self.hook!r}), and these have {x.shape[-1]}; choose its own model and hook"
            )
        pre = (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc
        if self.activation == "topk":
            return top(pre, self.k)
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        return pre.relu()

    def decode(self, features: Float[Tensor, "*place d_sae"]) -> Float[Tensor, "*place d_in"]:
        """The states that features stand for."""
        return features @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*place d_in"]) -> Float[Tensor, "*place d_in"]:
        """States as far as the dictionary has them."""
        return self.decode(self.encode(x))

    def to(self, device: str | torch.device) -> SparseAutoencoder:
        """The same on a device, in single precision."""
        tensors = {name: getattr(self, name) for name in (*NAMES, "threshold")}
        moved = {n: t.to(device, torch.float32) for n, t in tensors.items() if t is not None}
        return replace(self, **moved)

    # Files -----------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Write both files into a new folder, wholly or not at all; SAELens reads them.

        Raises:
            FileExistsError: the folder holds something, or is a file.
        """
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise FileExistsError(f"{folder} exists and is not an empty folder; choose a new one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in NAMES}
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        with TemporaryDirectory(dir=folder.parent, prefix=".sae-") as near:
            new = Path(near) / "new"
            new.mkdir()
            save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, new / WEIGHTS)
            (new / CONFIG).write_text(json.dumps(self._config(), indent=2), encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            new.rename(folder)
        return folder

    def _config(self) -> dict[str, Any]:
        architecture = next(a for a, name in ACTIVATIONS.items() if name == self.activation)
        return {
            "architecture": architecture,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": str(self.W_dec.dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.centred,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"model_name": self.model, "hook_name": self.hook},
            **({"k": self.k, "rescale_acts_by_decoder_norm": False} if self.k else {}),
        }

    @classmethod
    def load(cls, folder: str | Path) -> SparseAutoencoder:
        """Read a folder in SAELens's format: architectures standard (ReLU or, in older files,
        TopK), topk and jumprelu. Gains that only rescale features are folded into the weights.

        Raises:
            DictionaryError: a file that is missing or damaged, another architecture, activations
                that are normalised first, or shapes that do not fit.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise DictionaryError(
                f"{folder} holds no readable {CONFIG} and {WEIGHTS} ({error}); give a folder in "
                "SAELens's format"
            ) from error
        missing = [name for name in NAMES if name not in weights]
        if missing:
            raise DictionaryError(f"{folder / WEIGHTS} has no {missing[0]}")
        check_shapes(weights)
        return _read(config, {name: value.float() for name, value in weights.items()})


def check_shapes(weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fit each other.

    Raises:
        DictionaryError: with the first that does not.
    """
    d_in, d_sae = weights["W_enc"].shape
    shapes = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    for name, shape in shapes.items():
        found = tuple(weights[name].shape)
        if found != shape:
            raise DictionaryError(
                f"{name} has shape {found}, but W_enc of {(d_in, d_sae)} asks for {shape}"
            )


def top(pre: Float[Tensor, "*place d_sae"], k: int) -> Float[Tensor, "*place d_sae"]:
    """The k largest entries where they are positive, else 0."""
    found = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, found.indices, found.values.relu())


def _read(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> SparseAutoencoder:
    """An autoencoder from what the files say."""
    architecture = config.get("architecture", "standard")
    if architecture not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise DictionaryError(f"architecture {architecture!r} is not one of {known}")
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", None) or config.get("reshape_activations", "none") != "none":
        raise DictionaryError(
            f"activations are changed before they are encoded (normalize_activations="
            f"{normalised!r}, reshape_activations={config.get('reshape_activations')!r}); fold "
            "that into the weights first"
        )
    older = architecture == "standard" and "topk" in str(config.get("activation_fn_str", ""))
    activation = "topk" if older else ACTIVATIONS[architecture]
    known = config.get("activation_fn_kwargs") or {}
    k = int(config.get("k", known.get("k", 0))) if activation == "topk" else 0
    about = config.get("metadata") or config.get("meta") or config
    return SparseAutoencoder(
        **_folded(config, weights),
        activation=activation,
        hook=str(about.get("hook_name") or ""),
        k=k,
        threshold=weights.get("threshold") if activation == "jumprelu" else None,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        model=str(about.get("model_name") or ""),
    )


def _folded(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with gains between encoder and decoder in them."""
    found = {name: weights[name] for name in NAMES}
    if config.get("rescale_acts_by_decoder_norm"):
        norm = found["W_dec"].norm(dim=-1)
        found["W_enc"], found["b_enc"] = found["W_enc"] * norm, found["b_enc"] * norm
        found["W_dec"] = found["W_dec"] / norm[:, None]
    if "scaling_factor" in weights and config.get("finetuning_scaling_factor"):
        found["W_dec"] = found["W_dec"] * weights["scaling_factor"][:, None]
    return found
