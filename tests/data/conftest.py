"""The demo model's architecture, untrained: small, quick and with everything that a pair needs."""

import pytest

from mechmm.model.hooked import HookedMultimodal
from mechmm.zoo.recipe import build_model, build_processor


@pytest.fixture(scope="session")
def model() -> HookedMultimodal:
    return HookedMultimodal.from_hf(build_model().eval(), build_processor())
