"""Fixtures for every test: one seed, and process-wide settings put back afterwards. No test reaches for a network."""

import os
import random

from hypothesis import settings
import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

# Examples are drawn from the test's own name, so that a red run is red again on the next machine; a busy machine is not a failure.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=25, database=None)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def fixed_seed_and_settings():
    """Seeds the generators, and restores the default dtype and the thread count that a test may have changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
