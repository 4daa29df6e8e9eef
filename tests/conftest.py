"One thread, one seed, and Hypothesis without surprises in CI."
import os

import numpy as np
import pytest
import torch
from hypothesis import settings
from jaxtyping import config as jaxtyping_config

torch.set_num_threads(1)
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


@pytest.fixture(autouse=True)
def seeded():
    "Every test starts from the same random state, in whatever order the tests run."
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture
def untyped():
    "Switches the shape annotations off, so that bad input meets the library's own errors, as it does for users."
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)
