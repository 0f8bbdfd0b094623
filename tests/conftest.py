"""Fixtures for every test: one seed, and process-wide settings put back afterwards. No test reaches for a network.

With BNB_TEST_DEVICE=cuda new tensors are on the GPU unless a test says otherwise, and what tests only the CPU's part of the package is left out.
"""

import os
import random

from helpers import DEVICE
from hypothesis import settings
import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)  # now, so that it holds for the constants of test files as well

# Files that do not change with the device, and why.
ON_THE_CPU = {
    "test_cpu_*": "kernels of the CPU",
    "test_diagnostics": "looks at machines made up",
    "test_docs": "documentation is written for a CPU",
    "test_examples": "examples choose their device",
    "test_fuzz": "arguments of the CPU's library",
    "test_gpu_loading": "loads a library made up",
    "test_host_time": "measures what surrounds kernels, of whichever speed",
    "test_native_loading": "loads the library of the CPU",
    "test_optim_integrations": "the Trainer is told to use the CPU",
    "test_optim_sharding": "gloo, which joins processes here, moves memory of the host",
    "test_packaging": "looks at files",
    "test_paging": "a library made of host memory",
    "test_sharding": "gloo, which joins processes here, moves memory of the host",
    "test_triton": "Triton's interpreter works on memory of the host",
    "test_upstream_suite": "tests a program that starts others",
}


def pytest_collection_modifyitems(items):
    if DEVICE != "cpu":
        for item in items:
            for pattern, reason in ON_THE_CPU.items():
                if item.path.match(f"{pattern}.py"):
                    item.add_marker(pytest.mark.skip(reason=f"the same on every device: {reason}"))


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
    torch.set_default_device(DEVICE if DEVICE != "cpu" else None)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
