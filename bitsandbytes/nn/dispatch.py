"""What PyTorch functions do with a quantised weight.

Model code often multiplies with ``layer.weight`` directly: ``F.linear(x, layer.weight)``, ``x @ layer.weight.t()``. A packed weight has the
shape of its bytes, so these would fail or, worse, compute with bytes. ``call`` is the ``__torch_function__`` of such weights: products with the
weight take the 4-bit path, anything else that means the matrix gets it dequantised, and functions that handle tensors as containers
(copying, moving, chunking) see the bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autograd._functions import matmul_4bit


class TransposedWeight(Tensor):
    """The transpose of a quantised weight: its packed bytes as a row, and ``weight``, where they came from."""

    weight: Tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def dequantize(self) -> Tensor:
        """The dense matrix, [in_features, out_features]."""
        return self.weight.dequantize().t()


def call(func, args: tuple, kwargs: dict):
    """Calls ``func``, giving quantised weights among its arguments their meaning where ``func`` is about values."""
    handler = _HANDLERS.get(func)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs) if handler is None else handler(func, *args, **kwargs)


def _is_weight(value) -> bool:
    return getattr(value, "quant_state", None) is not None


def _is_transposed(value) -> bool:
    return isinstance(value, TransposedWeight)


def _is_quantised(value) -> bool:
    return _is_weight(value) or _is_transposed(value)


def _dense(value):
    """A quantised weight as a dense tensor; everything else as it is."""
    return value.dequantize() if _is_quantised(value) else value


def _all_dense(*operands) -> list[Tensor]:
    """The operands as dense tensors, weights in the dtype of the others."""
    dtypes = [operand.dtype for operand in operands if not _is_quantised(operand)]
    return [operand.dequantize().to(*dtypes[:1]) if _is_quantised(operand) else operand for operand in operands]


# --------------------------------------------------------------------------------------------------------------------- products


def _linear(func, input, weight, bias=None):
    if _is_weight(weight) and not _is_quantised(input):
        return matmul_4bit(input, weight, weight.quant_state, bias=bias)
    return func(*_all_dense(input, weight), bias)


def _matmul(func, left, right, **kwargs):
    if _is_transposed(right) and not _is_quantised(left):
        return matmul_4bit(left, right.weight, right.weight.quant_state, **kwargs)
    return func(*_all_dense(left, right), **kwargs)


def _addmm(func, addend, left, right, *, beta=1, alpha=1, **kwargs):
    if _is_transposed(right) and not _is_quantised(left) and addend.dim() == 1 and beta == alpha == 1:
        return matmul_4bit(left, right.weight, right.weight.quant_state, bias=addend, **kwargs)
    return func(*_all_dense(addend, left, right), beta=beta, alpha=alpha, **kwargs)


def _embedding(func, input, weight, *args, **kwargs):
    return func(input, _dense(weight), *args, **kwargs)


def _dequantize(func, weight):
    return weight.dequantize()


# ----------------------------------------------------------------------------------------------------------- views of the weight


def _transpose(func, weight, *dims):
    if _is_transposed(weight):
        return weight.weight
    if not _is_weight(weight):
        return func(weight, *dims)
    row = weight.data.reshape(1, -1).as_subclass(TransposedWeight)
    row.weight = weight
    return row


def _pieces(func, weight, *args, **kwargs):
    """The parts of a packed weight keep its class and attributes, so that FSDP2 can cut a parameter without losing what it is."""
    attributes = {**weight.__dict__, "module": None}
    return tuple(type(weight)(piece, requires_grad=weight.requires_grad, **attributes) for piece in func(weight, *args, **kwargs))


def _set_data(func, weight, value):
    """``weight.data = moved_weight``, as ``nn.Module.to`` writes it, takes the moved statistics along with the moved bytes."""
    func(weight, value)
    if _is_weight(weight) and _is_weight(value):
        weight._adopt(value.quant_state)


_HANDLERS = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    F.embedding: _embedding,
    torch.embedding: lambda func, weight, input, *args, **kwargs: func(_dense(weight), input, *args, **kwargs),
    torch.dequantize: _dequantize,
    torch.t: _transpose,
    torch.transpose: _transpose,
    Tensor.t: _transpose,
    Tensor.transpose: _transpose,
    Tensor.T.__get__: _transpose,
    Tensor.mT.__get__: _transpose,
    torch.chunk: _pieces,
    torch.split: _pieces,
    Tensor.data.__set__: _set_data,
}
