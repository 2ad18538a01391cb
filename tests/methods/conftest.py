"""The demo model untrained, and pairs of pictures for it."""

from __future__ import annotations

import pytest
import torch

import mechmm as mm
from mechmm.data import shapes
from mechmm.zoo.recipe import build_model, build_processor

torch.set_num_threads(1)  # models are so small that a second thread only waits for the first


@pytest.fixture(scope="module")
def model():
    return mm.HookedMultimodal.from_hf(build_model(seed=1).eval(), build_processor())


@pytest.fixture(scope="module")
def demo():
    """The demo model as it is shipped."""
    return mm.HookedMultimodal.from_pretrained("mechmm/demo")


@pytest.fixture(scope="module")
def pictures(model):
    return shapes.pairs(model, "color", 3, seed=1)
