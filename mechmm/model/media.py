"""Videos and sound as a caller passes them to `model.encode`, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mechmm.model.batch import (
    ARGUMENTS,
    NOUNS,
    InputError,
    is_picture,
    open_picture,
)

Video = np.ndarray | Sequence[Image.Image | np.ndarray]
"""An array [frame, height, width, 3] of uint8, or a list of frames of one size."""
Clip = tuple[np.ndarray, int]
"""Samples [sample] from -1 to 1, and how many of them there are in a second (Hz)."""


def is_video(entry: Any) -> bool:
    """Whether an entry is one video, readable or not."""
    if isinstance(entry, np.ndarray):
        return True
    return isinstance(entry, list | tuple) and bool(entry) and all(map(_is_frame, entry))


def _is_frame(entry: Any) -> bool:
    return isinstance(entry, Image.Image) or (isinstance(entry, np.ndarray) and entry.ndim == 3)


def is_clip(entry: Any) -> bool:
    """Whether an entry is one clip, readable or not: samples, with or without a rate."""
    if isinstance(entry, np.ndarray):
        return True
    return isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[1], int | float)


IS_ONE: dict[str, Callable[[Any], bool]] = {
    "image": is_picture,
    "video": is_video,
    "audio": is_clip,
}
"""By kind: tells one medium from a list of them."""


def open_video(video: Video, prompt: int) -> np.ndarray:
    """A video as an array [frame, height, width, 3] of uint8.

    Raises:
        InputError: where it has another shape, or its frames differ in size.
    """
    if isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
            picture = "; a picture is passed as images=" if video.ndim == 3 else ""
            raise InputError(
                f"prompt {prompt}: a video must be uint8 [frame, height, width, 3], not "
                f"{video.dtype} {list(video.shape)}{picture}"
            )
        return video
    frames = [np.asarray(open_picture(frame, prompt)) for frame in video]
    sizes = sorted({frame.shape[:2] for frame in frames})
    if len(sizes) > 1:
        raise InputError(
            f"prompt {prompt}: the frames of a video differ in size, {sizes[0]} and {sizes[1]} "
            "(height, width); resize them"
        )
    return np.stack(frames)


def open_clip(clip: Any, prompt: int, extractor: Any) -> np.ndarray:
    """The samples of a clip, float32 [sample].

    Args:
        clip: samples and their rate.
        prompt: that it belongs to, for errors.
        extractor: the processor's feature extractor, whose rate the clip must have.

    Raises:
        InputError: no rate or another one than the model's, no mono floats, or a clip longer than
            the model hears.
    """
    rate = extractor.sampling_rate
    if not isinstance(clip, tuple):
        raise InputError(
            f"prompt {prompt}: a clip is a pair of samples and their rate in Hz; this one has no "
            f"rate (the model hears {rate} Hz)"
        )
    samples, given = np.asarray(clip[0]), clip[1]
    if given != rate:
        raise InputError(
            f"prompt {prompt}: a clip has {given} samples per second, the model hears {rate}; "
            f"resample it, for example with scipy.signal.resample_poly(samples, {rate}, {given})"
        )
    if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating) or not len(samples):
        raise InputError(
            f"prompt {prompt}: samples must be floats [sample] from -1 to 1, one channel, not "
            f"{samples.dtype} {list(samples.shape)}"
        )
    longest = getattr(extractor, "n_samples", len(samples))
    if len(samples) > longest:
        raise InputError(
            f"prompt {prompt}: a clip lasts {len(samples) / rate:.1f} s, of which the model hears "
            f"{longest / rate:g} s; cut it"
        )
    return samples.astype(np.float32)


def loose(texts: Sequence[str] | None, media: Any, kind: str) -> list[list[Any]]:
    """The media of a model in whose texts nothing stands for them, dealt out to prompts.

    One each where there are as many texts as media or no texts; else all belong to the first.

    Raises:
        InputError: where there are none, or an entry is none.
    """
    name, noun = ARGUMENTS[kind], NOUNS[kind]
    is_one = IS_ONE[kind]
    given = [media] if is_one(media) else list(media or ())
    flat = [one for entry in given for one in ([entry] if is_one(entry) else _entries(entry))]
    if not flat:
        raise InputError(f"{name} are missing; pass one {noun} or a list of them")
    wrong = [one for one in flat if not is_one(one)]
    if wrong:
        raise InputError(f"{wrong[0]!r} is no {noun}; pass one {noun} or a list of them")
    if texts is None or len(texts) == len(flat):
        return [[one] for one in flat]
    return [flat, *([] for _ in texts[1:])]


def _entries(entry: Any) -> Sequence[Any]:
    return entry if isinstance(entry, list | tuple) else [entry]
