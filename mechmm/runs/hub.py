"""A model of the Hugging Face hub: the commit that its files come from, and what a cache lacks."""

from __future__ import annotations

import json
from pathlib import Path

from mechmm.model.hooked import DEMO
from mechmm.model.processors import FILES
from mechmm.runs.paths import RunError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
SNAPSHOTS = "snapshots"


def is_hub(name: str, base: Path) -> bool:
    """Whether a name is neither the shipped model nor a folder."""
    return name != DEMO and not (base / name).is_dir()


def commit_of(folder: Path | None) -> str | None:
    """The commit of a folder of the cache, None of any other folder."""
    return folder.name if folder is not None and folder.parent.name == SNAPSHOTS else None


def snapshot(name: str, revision: str | None) -> Path:
    """The folder in the cache of the commit that a branch, tag or commit means now; the hub is
    asked where there is a network.

    Raises:
        RunError: neither the hub nor the cache has it.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent
    except (OSError, ValueError) as error:
        at = "" if revision is None else f" at the revision {revision}"
        raise RunError(
            f"cannot load the model {name!r}{at}: it is no local folder, and neither the hub nor "
            f"the cache has its config.json ({_first_line(error)}); put its folder there, or "
            f"{_get(name, revision)}"
        ) from error


def check_whole(folder: Path, name: str, why: object) -> None:
    """Refuse a model that could not be loaded because the cache has only a part of it.

    Raises:
        RunError: what is missing, and how to get it.
    """
    lacking = missing(folder)
    if lacking:
        raise RunError(
            f"the cache has only a part of the model {name} at the commit {folder.name}: missing "
            f"is {', '.join(lacking)} ({_first_line(why)}); {_get(name, folder.name)}"
        )


def missing(folder: Path) -> list[str]:
    """What a model's folder lacks: its config, weights, processor or vocabulary."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    found = [] if "config.json" in there else ["config.json"]
    found += _missing_weights(folder, there)
    if not there & set(FILES):
        found.append("the processor (processor_config.json, tokenizer_config.json, ...)")
    elif "tokenizer_config.json" in there and not there & set(VOCABULARIES):
        found.append("the vocabulary (tokenizer.json)")
    elif "tokenizer_config.json" in there and not there & set(FILES[:2]):
        found.append("the image processor (preprocessor_config.json or processor_config.json)")
    return found


def _missing_weights(folder: Path, there: set[str]) -> list[str]:
    for name in WEIGHTS:
        index = f"{name}.index.json"
        if name in there:
            return []
        if index in there:
            parts = set(json.loads((folder / index).read_bytes())["weight_map"].values())
            return sorted(parts - there)
    return ["the weights (model.safetensors, or its parts and model.safetensors.index.json)"]


def _get(name: str, revision: str | None) -> str:
    at = "" if revision is None else f" --revision {revision}"
    return f"get it with `hf download {name}{at}` where there is a network"


def _first_line(said: object) -> str:
    return next(iter(str(said).strip().splitlines()), type(said).__name__).strip()
