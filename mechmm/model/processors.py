"""Processors: loaded whole where `transformers` can, and without their video part where it cannot.

Without torchvision, `transformers` loads image processors in their PIL versions, but refuses the
processors of families that also take videos, because a video processor needs torchvision. Here such
a processor is put together from its other parts, and refuses videos only when it is given some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    ImageProcessingMixin,
    ProcessorMixin,
)
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.hub import PushToHubMixin
from transformers.utils.import_utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

INSTALL = 'pip install "mechmm[video]"'
"""What installs torchvision, and whatever else processors ask for."""
FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
)
"""Files of which a folder with a processor, or a part of one, has at least one."""
PARTS: dict[str, tuple[Any, type]] = {
    "tokenizer": (AutoTokenizer, PreTrainedTokenizerBase),
    "image_processor": (AutoImageProcessor, ImageProcessingMixin),
    "feature_extractor": (AutoFeatureExtractor, FeatureExtractionMixin),
}
"""Parts of processors by name: what loads one, and what all of them are."""
UNMARKED = ("Blip2Processor", "InstructBlipProcessor", "Florence2Processor")
"""Processors that put the placeholders of one picture before each text by themselves."""
PICTURED = ("PaliGemmaProcessor",)
"""Processors that would spoil a prompt without a picture."""


class MissingVideoProcessor(PushToHubMixin):
    """Stands in the place of a video processor where torchvision is missing.

    Attributes:
        settings: of the real one, so that they are saved with the processor.
    """

    _auto_class = None  # `save_pretrained` asks every part for it

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self.settings = dict(settings or {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse videos.

        Raises:
            ImportError: with what to install.
        """
        raise ImportError(f"videos are read with torchvision, which is missing; {INSTALL}")

    def to_dict(self) -> dict[str, Any]:
        """The settings of the video processor."""
        return dict(self.settings)


class _Videoless:
    """Mixed into a processor class: takes a `MissingVideoProcessor` for a video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, MissingVideoProcessor):
            return MissingVideoProcessor
        check: Any = super()
        return check.check_argument_for_proper_class(argument_name, argument)


@cache
def without_videos(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class of the same name that takes a `MissingVideoProcessor`."""
    return type(kind.__name__, (_Videoless, kind), {})


def load_processor(source: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """The processor of a checkpoint.

    Args:
        source: a folder, or a name on the hub.
        options: of `from_pretrained`: `revision`, `trust_remote_code`.

    Returns:
        The processor (or the part of one that the checkpoint has) and "", or None and why there is
        none: a model is of use without, through `Batch.from_inputs`.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).exists() for name in FILES):
        return None, f"the folder {source!r} has no files of one"
    try:
        return AutoProcessor.from_pretrained(source, **options), ""
    except Exception as error:
        if is_torchvision_available():
            return None, _reason(error)
        try:
            return _assembled(source, options, error), ""
        except Exception as second:
            return None, _reason(second)


def _assembled(source: str, options: Mapping[str, Any], error: Exception) -> Any:
    """The processor of a checkpoint without its video part, or `error` where it has none."""
    kind = _class_of(source, options)
    if kind is None:  # the error of an image processor alone says what it needs
        return AutoImageProcessor.from_pretrained(source, **options)
    names = kind.get_attributes()
    if "video_processor" not in names:
        raise error
    settings, _ = kind.get_processor_dict(source, **options)
    parts = [_part(name, source, options) for name in names]
    return without_videos(kind).from_args_and_dict(parts, settings)


def _class_of(source: str, options: Mapping[str, Any]) -> Any:
    """The processor class that a checkpoint names, or else the one of its config."""
    settings, _ = ProcessorMixin.get_processor_dict(source, **options)
    named = settings.get("processor_class")
    if named is not None:
        return getattr(transformers, named)
    config = AutoConfig.from_pretrained(source, **options)
    return PROCESSOR_MAPPING.get(type(config), None)


def _part(name: str, source: str, options: Mapping[str, Any]) -> Any:
    if name != "video_processor":
        return PARTS[name][0].from_pretrained(source, **options)
    try:
        return MissingVideoProcessor(
            BaseVideoProcessor.get_video_processor_dict(source, **options)[0]
        )
    except OSError:  # some checkpoints have no settings of it
        return MissingVideoProcessor()


def _reason(error: Exception) -> str:
    """Why there is no processor, and what to install where something is missing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    first = lines[0].split(". ")[0].rstrip(".")
    missing = any(name in str(error).lower() for name in ("torchvision", "num2words"))
    return f"{first}; {INSTALL}" if missing else first


def part_of(processor: Any, name: str) -> Any:
    """A part of a processor (a name in `PARTS`, or `"video_processor"`), or None.

    A checkpoint may have one part alone, which is then all of its processor.
    """
    if name in PARTS and isinstance(processor, PARTS[name][1]):
        return processor
    return getattr(processor, name, None)


@contextmanager
def padding_on(processor: Any, side: str | None) -> Iterator[dict[str, Any]]:
    """The option of a call that pads the model's texts on a side, where one is given.

    Where a processor has a second tokenizer (InstructBLIP's Q-Former), the option would reach both,
    and the second one's model counts positions from the left; so the first is set instead.
    """
    second = getattr(processor, "qformer_tokenizer", None)
    if side is None or second is None:
        yield {} if side is None else {"padding_side": side}
        return
    before = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = side
    try:
        yield {}
    finally:
        processor.tokenizer.padding_side = before


def padding_first(inputs: dict[str, Any]) -> dict[str, Any]:
    """Texts padded on the left whose padding stands between picture and text: moved to the front.

    Where the model counts positions itself, padding within a prompt would change its numbers.
    """
    mask = inputs["attention_mask"]
    order = mask.argsort(dim=-1, stable=True)
    moved = {name: inputs[name].gather(-1, order) for name in ("input_ids", "attention_mask")}
    return {**inputs, **moved}
