"""Operators on NVIDIA GPUs, and on AMD's by the same sources, by the native library.

Importing this registers those that the loaded library has kernels for.
"""

from . import gemm, int8, ops, optimizers  # noqa: F401
