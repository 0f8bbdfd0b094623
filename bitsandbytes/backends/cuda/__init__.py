"""Operators on NVIDIA GPUs, and on AMD's by the same sources, by the native library.

Importing this registers those that the loaded library has kernels for. Without such a library nothing more is imported, which would only take time.
"""

from ...cextension import lib

if lib.compiled_with_cuda:
    from . import gemm, int8, ops, optimizers  # noqa: F401
