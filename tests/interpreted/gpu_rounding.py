"""Triton's interpreter, made to round as GPUs do. Importing this does it, for a process of its own: see ``tests/test_triton.py``.

The interpreter (3.9) cuts float32 off to bfloat16 instead of rounding, misreads denormal bfloat16, and multiplies matrices of bfloat16 by their bits.
Those of float16 it multiplies rightly, but slowly.
"""

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter

_BF16, _FP32 = tl.bfloat16, tl.float32
_original_conversion = interpreter._convert_float
_original_dot = interpreter.InterpreterBuilder.create_dot


def _convert_float(data, source, target, rounding_mode):
    data = np.ascontiguousarray(data)
    if (source, target) == (_FP32, _BF16):
        return torch.from_numpy(data).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if (source, target) == (_BF16, _FP32):
        return data.view(np.uint16).astype(np.uint32) << 16
    return _original_conversion(data, source, target, rounding_mode)


def _create_dot(self, a, b, d, *precision):
    return _original_dot(self, *(_as_fp32(x) if x.dtype.scalar in (_BF16, tl.float16) else x for x in (a, b)), d, *precision)


def _as_fp32(handle):
    data = (handle.data.astype(np.uint32) << 16).view(np.float32) if handle.dtype.scalar == _BF16 else handle.data.astype(np.float32)
    return interpreter.TensorHandle(data, _FP32)


interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot
