"""Runs circuit libraries that need an older TransformerLens, in a process of their own.

EAP-IG (module `eap`) and auto-circuit import `HookedTransformer`, which TransformerLens 4 no longer
has. `circuits.py` starts this file with an interpreter that has them, hands it a folder with a
language model and prompts, and asks for one job a line; the answer is a line of JSON with the CPU
milliseconds that the job took here, and the scores of all edges in a file.

What had to be set, so that they run here, and changes nothing of what they compute:

- EAP-IG makes its scores on the device "cuda", which is replaced by the model's;
- EAP-IG tokenizes texts in every call; it is given ready tokens, and so are the others;
- auto-circuit imports the cache of keys and values under its former name.
"""

from __future__ import annotations

import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from _timing import settle
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor

EAP_IG, AUTO_CIRCUIT = "EAP-IG package", "auto-circuit"


class Peers:
    """Both libraries on one model.

    Attributes:
        clean, corrupt: tokens [prompt, pos].
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.setup = json.loads((folder / "setup.json").read_text())
        self.weights = load_file(folder / "model.safetensors")
        self.clean, self.corrupt = self.weights.pop("clean"), self.weights.pop("corrupt")

    def run(self, library: str, job: str, **options: Any) -> Tensor:
        """Scores of all edges, in the order of `flat`."""
        jobs = {
            (EAP_IG, "eap"): self._eap,
            (EAP_IG, "eap-ig"): self._eap_ig,
            (EAP_IG, "exact"): self._exact,
            (AUTO_CIRCUIT, "eap"): self._mask_gradient,
            (AUTO_CIRCUIT, "eap-ig"): self._mask_gradients,
        }
        return jobs[library, job](**options)

    def prepare(self, library: str) -> None:
        """Import a library and build what it runs on.

        Raises:
            ImportError: where it, or a TransformerLens that it runs with, is not there.
        """
        if library == EAP_IG:
            self.eap  # noqa: B018
        else:
            self.auto  # noqa: B018

    def lens(self) -> Any:
        """The model as a `HookedTransformer`."""
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            **self.setup["config"],
            act_fn="silu",
            gated_mlp=True,
            normalization_type="RMS",
            final_rms=True,
            positional_embedding_type="rotary",
            use_attn_result=True,
            use_split_qkv_input=True,
            use_hook_mlp_in=True,
            device="cpu",
        )
        model = HookedTransformer(config)
        state = model.state_dict()
        new = {**state, **converted(self.weights, self.setup["config"])}
        model.load_state_dict({name: new[name] for name in state})
        return model.eval().requires_grad_(False)

    # EAP-IG ----------------------------------------------------------------------------------

    @cached_property
    def eap(self) -> Any:
        import eap.attribute
        import eap.evaluate
        import eap.graph

        def ready(model: Any, tokens: Tensor, max_length: int | None = None) -> tuple:
            mask = torch.ones_like(tokens)
            return tokens, mask, mask.sum(1), tokens.shape[1]

        eap.attribute.tokenize_plus = eap.evaluate.tokenize_plus = ready
        self.hooked = self.lens()
        return eap

    def metric(self, logits: Tensor, clean_logits: Any, lengths: Any, label: Any) -> Tensor:
        """The logit difference after the last position."""
        last = logits[:, -1]
        return (last[:, self.setup["answer"]] - last[:, self.setup["foil"]]).mean()

    @property
    def batches(self) -> list[tuple]:
        """One batch. What they call clean is our corrupt prompt, at which we take gradients."""
        return [(self.corrupt, self.clean, None)]

    def _eap(self) -> Tensor:
        graph = self.eap.graph.Graph.from_model(self.hooked)
        self.hooked.W_E.requires_grad_()  # without it nothing has a gradient
        with on_cpu():
            scores = self.eap.attribute.get_scores_eap(
                self.hooked, graph, self.batches, self.metric, quiet=True
            )
        self.hooked.zero_grad()
        self.hooked.W_E.requires_grad_(False)
        return self.flat(scores)

    def _eap_ig(self, steps: int) -> Tensor:
        graph = self.eap.graph.Graph.from_model(self.hooked)
        with on_cpu():
            scores = self.eap.attribute.get_scores_eap_ig(
                self.hooked, graph, self.batches, self.metric, steps=steps, quiet=True
            )
        return self.flat(scores)

    def _exact(self, edges: int, seed: int) -> Tensor:
        """The first lines of its loop over edges, on some of them."""
        graph = self.eap.graph.Graph.from_model(self.hooked)
        names = list(graph.edges)
        chosen = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:edges]
        graph.edges = {names[i]: graph.edges[names[i]] for i in chosen.tolist()}
        batches = [(self.clean, self.corrupt, None)]
        self.eap.attribute.get_scores_exact(self.hooked, graph, batches, self.metric, quiet=True)
        return self.flat(graph.scores)

    def flat(self, scores: Tensor) -> Tensor:
        """Scores [writer, reader] as one row of edges, readers of heads and MLPs in turn."""
        heads, layers = self.setup["config"]["n_heads"], self.setup["config"]["n_layers"]
        found, column = [], 0
        for layer in range(layers):
            before = 1 + layer * (heads + 1)
            for width, seen in ((3 * heads, before), (1, before + heads)):
                found.append(scores[:seen, column : column + width].flatten())
                column += width
        return torch.cat([*found, scores[:, column]])

    # auto-circuit ----------------------------------------------------------------------------

    @cached_property
    def auto(self) -> Any:
        import transformer_lens

        name = "transformer_lens.past_key_value_caching"
        if name not in sys.modules:  # what is there before version 3
            stand_in: Any = types.ModuleType(name)
            stand_in.HookedTransformerKeyValueCache = object  # for annotations alone
            sys.modules[name] = stand_in
            transformer_lens.HookedTransformerKeyValueCache = object
        from auto_circuit import data
        from auto_circuit.prune_algos import mask_gradient
        from auto_circuit.utils.graph_utils import patchable_model

        mask_gradient.tqdm = Silent
        model = self.lens()
        self.patchable = patchable_model(
            model, factorized=True, slice_output="last_seq", separate_qkv=True
        )
        answers = [torch.tensor([self.setup["answer"]])] * len(self.clean)
        foils = [torch.tensor([self.setup["foil"]])] * len(self.clean)
        prompts = data.PromptDataset(list(self.corrupt), list(self.clean), answers, foils)
        self.loader = data.PromptDataLoader(prompts, None, 0, batch_size=len(self.clean))
        return mask_gradient.mask_gradient_prune_scores

    def _mask_gradient(self) -> Tensor:
        return self._masks(mask_val=0.0)

    def _mask_gradients(self, steps: int) -> Tensor:
        return self._masks(integrated_grad_samples=steps)

    def _masks(self, **options: Any) -> Tensor:
        for wrapper in self.patchable.dest_wrappers:
            wrapper.patch_mask.grad = None
        found = self.auto(self.patchable, self.loader, None, "logit", "avg_diff", **options)
        layers, parts = self.setup["config"]["n_layers"], []
        for layer in range(layers):
            block = f"blocks.{layer}.hook"
            heads = [found[f"{block}_{letter}_input"] for letter in "qkv"]
            parts += [torch.cat(heads).T.flatten(), found[f"{block}_mlp_in"].flatten()]
        parts.append(found[f"blocks.{layers - 1}.hook_resid_post"].flatten())
        return -torch.cat(parts)  # its loss is the metric's negative


class Silent:
    """In place of a progress bar."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def set_description_str(self, text: str) -> None:
        """Show nothing."""


@contextmanager
def on_cpu() -> Iterator[None]:
    """While it lasts, `torch.zeros` makes nothing on "cuda"."""
    zeros = torch.zeros

    def moved(*shape: Any, **options: Any) -> Tensor:
        return zeros(*shape, **{**options, "device": "cpu"})

    with patch.object(torch, "zeros", moved):
        yield


def converted(weights: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """A Llama's weights by TransformerLens's names."""
    heads, found = config["n_heads"], {}
    for layer in range(config["n_layers"]):
        old, new = f"model.layers.{layer}", f"blocks.{layer}"
        for letter in "qkv":
            weight = weights[f"{old}.self_attn.{letter}_proj.weight"]
            found[f"{new}.attn.W_{letter.upper()}"] = rearrange(weight, "(n h) m -> n m h", n=heads)
        weight = weights[f"{old}.self_attn.o_proj.weight"]
        found[f"{new}.attn.W_O"] = rearrange(weight, "m (n h) -> n h m", n=heads)
        for name, part in (("W_gate", "gate"), ("W_in", "up"), ("W_out", "down")):
            found[f"{new}.mlp.{name}"] = weights[f"{old}.mlp.{part}_proj.weight"].T
        found[f"{new}.ln1.w"] = weights[f"{old}.input_layernorm.weight"]
        found[f"{new}.ln2.w"] = weights[f"{old}.post_attention_layernorm.weight"]
    found["ln_final.w"] = weights["model.norm.weight"]
    found["embed.W_E"] = weights["model.embed_tokens.weight"]
    found["unembed.W_U"] = weights["lm_head.weight"].T
    return found


def answer(peers: Peers, library: str, job: str, options: dict[str, Any]) -> dict[str, Any]:
    """Do a job, or only prepare."""
    if job == "prepare":
        peers.prepare(library)
        return {}
    start = time.process_time()
    scores = peers.run(library, job, **options)
    taken = 1000 * (time.process_time() - start)
    file = peers.folder / "scores.safetensors"
    save_file({"scores": scores.contiguous()}, file)
    return {"milliseconds": taken, "scores": str(file)}


def main() -> None:
    settle()
    write: Callable[[str], int] = sys.stdout.write
    sys.stdout = sys.stderr  # what libraries print is no answer
    peers = Peers(Path(sys.argv[1]))
    for line in sys.stdin:
        try:
            found = answer(peers, **json.loads(line))
        except ImportError as error:
            found = {"missing": str(error)}
        write(json.dumps(found) + "\n")
        sys.__stdout__.flush()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
