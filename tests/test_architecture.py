"""The house's own rules: which room imports which, and that importing mechmm changes nothing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

GLOBALS = """
import logging, os, random, sys, warnings
# scikit-learn itself sets variables for OpenMP, and draws a random number, when imported.
import numpy, pandas, plotly.io, sklearn.datasets, torch, transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

def state():
    return {
        "torch dtype": torch.get_default_dtype(),
        "torch device": torch.get_default_device(),
        "torch threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "torch gradients": torch.is_grad_enabled(),
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch matmul precision": torch.get_float32_matmul_precision(),
        "torch random state": torch.get_rng_state().tolist(),
        "numpy random state": str(numpy.random.get_state()),
        "python random state": random.getstate(),
        "numpy printing": str(numpy.get_printoptions()),
        "pandas display": pandas.get_option("display.max_rows"),
        "plotly template": plotly.io.templates.default,
        "plotly renderer": plotly.io.renderers.default,
        "attention functions": sorted(AttentionInterface().valid_keys()),
        "mask functions": sorted(AttentionMaskInterface().valid_keys()),
        "transformers verbosity": transformers.logging.get_verbosity(),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "warning filters": list(warnings.filters),
        # torch names its compiler's cache when a part of it is first imported.
        "environment": {k: v for k, v in os.environ.items() if "TORCHINDUCTOR" not in k},
        "folder": os.getcwd(),
        "excepthook": sys.excepthook,
    }

before = state()
import mechmm
for name in mechmm.__all__:
    getattr(mechmm, name)
after = state()
print("changed:", [name for name in before if before[name] != after[name]])
"""

HELP = """
import sys
from mechmm.cli import main

sys.argv = ["mechmm", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, f"mechmm --help ended with {end.code}"
print("heavy:", sorted({"torch", "transformers", "transformer_lens", "pandas"} & set(sys.modules)))
"""


def run(*command: str) -> str:
    """What a fresh process prints; its errors are shown when it fails."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_modules_import_only_from_rooms_below():
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo")


def test_importing_mechmm_changes_nothing():
    assert run(sys.executable, "-c", GLOBALS).splitlines()[-1] == "changed: []"


def test_help_answers_without_importing_torch():
    assert run(sys.executable, "-c", HELP).splitlines()[-1] == "heavy: []"
