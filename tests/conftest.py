"""Every test runs with jaxtyping's shape checks on and without the network, on two threads or in
one of several processes (`pytest -n`) on one."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
if "PYTEST_XDIST_WORKER" in os.environ:  # notebooks and commands that tests start are alone, too
    os.environ["OMP_NUM_THREADS"] = "1"

from importlib import import_module

import torch
import typechecker  # noqa: F401 - it makes the hook's decorator a quicker one
from jaxtyping import install_import_hook

# First, for within a checked import Python compiles all that it imports anew.
for name in ("transformer_lens", "networkx", "scipy.stats", "sklearn.linear_model", "typer"):
    import_module(name)

# Only modules imported after this are checked, so nothing above may import mechmm.
install_import_hook("mechmm", "typechecker.checked")
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
