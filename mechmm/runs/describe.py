"""What a model is, for people and for programs."""

from __future__ import annotations

from typing import Any

import pandas as pd
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
    console.print(
        f"{found['architecture']}: {found['parameters']:,} parameters, {found['dtype']}; "
        f"put {found['image_token']} where a picture belongs",
        highlight=False,
    )
    sizes = pd.DataFrame(found["towers"]).rename_axis("tower").reset_index()
    print_table(sizes, "Towers", console)
    shown = [name for name in found["hooks"] if "blocks." not in name or "blocks.0." in name]
    console.print(f"{len(found['hooks'])} hook points; those of block 0 and outside blocks:")
    for name in shown:
        console.print(f"  {name}", highlight=False)


def example_batch(model: HookedMultimodal) -> Batch:
    """A prompt with one picture, for a model that nothing else is known about."""
    scene = Scene((Thing(5, "circle", "red"), Thing(10, "star", "blue")))
    text = f"{model.image_token} what color is the circle ? answer :"
    return model.encode(text, scene.render())
