"""k-bit quantisation for PyTorch: 4-bit and 8-bit numbers, the layers that compute with them, and where they come from.

Importing registers the operators ``torch.ops.bitsandbytes.*`` and the kernels that this machine can run. It never fails for want of a native
library, opens no connection and initialises no device.
"""

import importlib.metadata

import torch

from . import _ops, cextension, consts, cuda_specs, utils  # noqa: F401  (operators first, then the library, then kernels)
from .backends import cuda as cuda_backend, triton as triton_backend  # noqa: F401
from .backends.cpu import int8 as cpu_int8, ops as cpu_ops, optimizers as cpu_optimizers  # noqa: F401
from .backends.default import ops as default_ops  # noqa: F401
from . import functional, nn, optim  # noqa: F401  # isort: skip
from .autograd._functions import MatmulLtState, matmul, matmul_4bit  # noqa: F401
from .nn import modules  # noqa: F401
from .optim import adam  # noqa: F401

__version__ = "0.51.0.dev0"

# Probed by transformers, accelerate and diffusers.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}


# A GPU without a native build of the library.
if not cextension.lib.compiled_with_cuda and cuda_specs.gpu_is_visible() and triton_backend.is_available():
    from .backends.triton import ops as triton_ops

    triton_ops.register("cuda")

if hasattr(torch, "xpu") and torch.xpu.is_available():
    from .backends.xpu import ops as xpu_ops  # noqa: F401


def _import_backends() -> None:
    """Loads the backends that other packages offer under the entry point group ``bitsandbytes.backends`` and lets them register.

    Raises:
        RuntimeError: one of them failed.
    """
    for entry_point in importlib.metadata.entry_points(group="bitsandbytes.backends"):
        try:
            entry_point.load()()
        except Exception as error:
            raise RuntimeError(f"bitsandbytes failed to load backend {entry_point.name!r}: {error}") from error


_import_backends()

# Names that documentation generators leave out.
__pdoc__ = {"libbitsandbytes": False, "optim.optimizer.Optimizer8bit": False, "optim.optimizer.MockArgs": False}
