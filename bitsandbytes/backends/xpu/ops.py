"""Operators of XPUs: the Triton kernels. Without Triton the reference serves, as it does every device; nothing is registered then."""

from .. import triton

if triton.is_available():
    from ..triton import ops as triton_ops

    triton_ops.register("xpu")
