"""Where recorded activations are kept: on the device, in main memory, or on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Literal
from weakref import finalize

import torch
from safetensors import safe_open
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
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, file)
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in tensors}


def pick(tensor: Tensor, *index: Tensor | slice, device: torch.device) -> Tensor:
    """Entries of a kept tensor, on a device."""
    at = tuple(i.to(tensor.device) if isinstance(i, Tensor) else i for i in index)
    return tensor[at].to(device)
