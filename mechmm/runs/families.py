"""The table of families, for the terminal and for the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pandas as pd

from mechmm.model.families import FAMILIES
from mechmm.model.hooked import HookedMultimodal
from mechmm.model.rows import RESUME, VERIFIED, Family, Stack
from mechmm.model.stacks import STACKS
from mechmm.testing import RECIPES, conformance, places, tiny_hf

INTRO = f"""# Families

Made by `make families` from the rows in `mechmm/model/families.py` and `mechmm/model/stacks.py`.
Every row goes through the conformance suite (`tests/model/test_conformance.py`) on a tiny random
model of its architecture; last with transformers {VERIFIED}.

A checkpoint works when its architecture (`config.architectures`) is in the first table and the
`model_type` of each of its towers in the second: a new combination of known towers needs no new
row. To add one, see "Add a model family" in `CONTRIBUTING.md`.
"""


def family_table() -> pd.DataFrame:
    """One row per architecture: towers, media, projectors, resume kind, version verified with."""
    return pd.DataFrame([_row(family) for family in FAMILIES.values()])


def _row(family: Family) -> dict[str, str]:
    return {
        "architecture": family.architecture,
        "towers": ", ".join(family.towers),
        "media": ", ".join(medium.kind for medium in family.media),
        "projectors": ", ".join(family.projectors) or "none",
        "resume": family.resume,
        "verified": f"transformers {VERIFIED}",
    }


def families_page() -> str:
    """`docs/families.md`."""
    families = family_table().drop(columns="verified")
    families["hooks of a tiny model"] = [_hooks(name) for name in families["architecture"]]
    stacks = pd.DataFrame([_stack_row(name, row) for name, row in STACKS.items()])
    kinds = pd.DataFrame(RESUME.items(), columns=["resume", "a run that enters at a later block"])
    sections = [
        INTRO,
        "## Architectures\n\n" + _markdown(families),
        "## Stacks\n\nBy the `model_type` of their own config.\n\n" + _markdown(stacks),
        "## Resume kinds\n\n" + _markdown(kinds),
        "## What has no hooks\n\n" + _markdown(_absent()),
        "## What a family cannot pass\n\nThe points of the suite, with the reason.\n\n"
        + _markdown(_exempt()),
    ]
    return "\n".join(sections)


def _hooks(architecture: str) -> str:
    """How many hook points the family's tiny model has."""
    name = next(name for name, r in RECIPES.items() if r.architecture == architecture)
    model = HookedMultimodal.from_hf(tiny_hf(name))
    counts = Counter(_owner(hook, model) for hook in model.hook_dict)
    return ", ".join(f"{owner} {number}" for owner, number in counts.items())


def _owner(hook: str, model: HookedMultimodal) -> str:
    first = hook.split(".")[0]
    return first if first in (*model.towers, *model.family.projectors) else "language"


def _stack_row(name: str, stack: Stack | Callable) -> dict[str, str]:
    if not isinstance(stack, Stack):
        return {"model_type": f"`{name}`", "norms": "as its config says", "besides": ""}
    order = "parallel" if stack.ln2 is None and stack.mid is None else "before each part"
    order = "behind each part" if stack.post_norm or stack.ln1 is None else order
    order = "before and behind each part" if stack.ln1 and stack.ln1_post else order
    parts = {
        "cross-attention": stack.cross_attn,
        "experts": stack.experts,
        "gates": stack.gated or stack.q_gate,
        "one layer for q, k, v": stack.qkv,
        "one layer for gate and input": stack.mlp_in_layout,
        "packed images": stack.packed,
        "blocks without patterns": stack.attn_out and "|" in stack.attn_out,
    }
    return {
        "model_type": f"`{name}`",
        "norms": f"{stack.norm}, {order}",
        "besides": ", ".join(part for part, there in parts.items() if there),
    }


def _absent() -> pd.DataFrame:
    rows = [(f.architecture, *item) for f in FAMILIES.values() for item in f.absent.items()]
    return pd.DataFrame(rows, columns=["architecture", "part", "why"])


def _exempt() -> pd.DataFrame:
    found = {**conformance.EXEMPT, **places.EXEMPT}
    rows = [(family, point, why) for (family, point), why in sorted(found.items())]
    encoders = "encoders (CLIP, SigLIP, ViT, DINO)"
    rows += [
        (encoders, "generates", conformance.NOTHING_TO_GENERATE),
        (encoders, "features, projected", places.NO_LANGUAGE),
        ("mllama; llava_onevision on videos", "projected", places.ALL_MIXED),
        ("emu3, in bfloat16", "same logits", conformance.CODES_FLIP),
    ]
    return pd.DataFrame(rows, columns=["tiny model", "point", "why"])


def _markdown(frame: pd.DataFrame) -> str:
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in frame.itertuples(index=False)]
    return "\n".join(lines) + "\n"
