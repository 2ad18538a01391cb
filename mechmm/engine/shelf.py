"""Where recorded activations are kept: on the device, in main memory, or on disk."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal
from weakref import finalize

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Keep = Literal["device", "cpu", "disk"]


class Shelf:
    """Keeps tensors, and gives them back as they are indexed.

    Args:
        keep: `"disk"`: in files of safetensors in a temporary folder, mapped into memory, so that
            only what is read is loaded. The folder goes when the shelf does.
    """

    def __init__(self, keep: Keep = "device") -> None:
        self.keep = keep
        self.files = 0
        if keep == "disk":
            self.folder = Path(mkdtemp(prefix="mechmm-"))
            finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def put(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors where they are kept."""
        if self.keep == "device":
            return tensors
        if self.keep == "cpu":
            return {name: tensor.to("cpu") for name, tensor in tensors.items()}
        file = self.folder / f"{self.files}.safetensors"
        self.files += 1
        # Hooks may show views of one memory, which safetensors refuses, hence the copy.
        own = {name: t.to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        try:
            save_file(own, file)
        except (SafetensorError, OSError) as error:
            raise OSError(
                f"recorded state cannot be written to {str(self.folder)!r}: {error}; free some "
                "space, point TMPDIR to another folder, or keep the state elsewhere (cpu, device)"
            ) from error
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in tensors}

    def clear(self) -> None:
        """Delete what was put here before; tensors that are in use stay readable."""
        if self.keep == "disk":
            for file in self.folder.iterdir():
                with suppress(PermissionError):  # Windows keeps files that are mapped
                    file.unlink()


def pick(tensor: Tensor, *index: Tensor | slice, device: torch.device) -> Tensor:
    """Entries of a kept tensor, on a device."""
    at = tuple(i.to(tensor.device) if isinstance(i, Tensor) else i for i in index)
    return tensor[at].to(device)
