"""A pytest plugin: the CPU is served by the CUDA backend and the emulated library, so that general tests try that backend without a GPU.

The package that is imported must have the emulated library under the name of a CUDA library, and no CPU library (see test_cuda_whole.py).
"""

import torch

torch.version.cuda = "13.0"
_device_count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
import bitsandbytes  # noqa: E402, F401

torch.version.cuda, torch.cuda.device_count = None, _device_count

from bitsandbytes import _ops, cextension  # noqa: E402
from bitsandbytes.backends.cuda import native  # noqa: E402

native.use_library(cextension.lib, lambda tensor: (0, None))
SERVED = sorted(name for name, device in _ops._NATIVE if device == "cuda")
for _name in SERVED:
    _ops.implement(_name, "cpu")(_ops._NATIVE[_name, "cuda"][1])


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"CUDA kernels, emulated, served: {', '.join(SERVED)}")
