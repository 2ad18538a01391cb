"""What a model is, for people and for programs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from mechmm.data.scenes import Scene, Thing
from mechmm.model.batch import Batch
from mechmm.model.hooked import HookedMultimodal
from mechmm.runs.terminal import print_table

SIZES = ("n_layers", "d_model", "n_heads", "n_key_value_heads", "d_head", "d_mlp", "d_vocab")


def describe(model: HookedMultimodal) -> dict[str, Any]:
    """Architecture, towers with their sizes, projectors, hook points; ready for JSON."""
    towers = {
        name: {"model_type": tower.cfg.model_name} | {s: getattr(tower.cfg, s) for s in SIZES}
        for name, tower in model.towers.items()
    }
    for sizes in towers.values():
        sizes["d_vocab"] = max(sizes["d_vocab"], 0)  # TransformerLens's -1: no vocabulary
    return {
        "architecture": model.family.architecture,
        "parameters": sum(p.numel() for p in model.hf_model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "image_token": model.image_token,
        "towers": towers,
        "projectors": list(model.family.projectors),
        "hooks": list(model.hook_dict),
    }


def print_description(found: dict[str, Any]) -> None:
    """`describe` as tables; hook names of the first block stand for those of all."""
    console = Console()
    mark = found["image_token"]
    place = f"put {mark} where a picture belongs" if mark else "prompts have no mark for pictures"
    sizes = f"{found['parameters']:,} parameters, {found['dtype']}"
    console.print(f"{found['architecture']}: {sizes}; {place}", highlight=False)
    sizes = pd.DataFrame(found["towers"]).rename_axis("tower").reset_index()
    print_table(sizes, "Towers", console)
    shown = [name for name in found["hooks"] if "blocks." not in name or "blocks.0." in name]
    console.print(f"{len(found['hooks'])} hook points; those of block 0 and outside blocks:")
    for name in shown:
        console.print(f"  {name}", highlight=False)


def example_batch(model: HookedMultimodal) -> Batch:
    """A prompt with one picture or sound, for a model that nothing else is known about."""
    picture = Scene((Thing(5, "circle", "red"), Thing(10, "star", "blue"))).render()
    if not model.takes("input_ids"):
        return model.encode(None, picture)
    if model.family.media[0].kind == "audio":
        rate = model.processor.feature_extractor.sampling_rate
        sound = np.sin(np.linspace(0, 440 * 2 * np.pi, rate, dtype=np.float32))
        return model.encode(f"{model.image_token} what is heard ?", audio=[(sound, rate)])
    batch = model.encode(f"{model.image_token} what color is the circle ? answer :", picture)
    if model.config.is_encoder_decoder:  # one token alone has nothing to attend to
        begun = [batch.extra["decoder_input_ids"], batch.input_ids[:, -3:]]
        batch = replace(batch, extra={**batch.extra, "decoder_input_ids": torch.cat(begun, 1)})
    return batch
