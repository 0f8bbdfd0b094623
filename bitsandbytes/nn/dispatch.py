"""What PyTorch functions do with a quantised weight.

Model code often multiplies with ``layer.weight`` directly: ``F.linear(x, layer.weight)``, ``x @ layer.weight.t()``. A packed weight has the
shape of its bytes, so these would fail or, worse, compute with bytes. ``call`` is the ``__torch_function__`` of such weights: products with the
weight take the 4-bit path, anything else that means the matrix gets it dequantised, and functions that handle tensors as containers
(copying, moving, chunking) see the bytes.
"""

from math import prod

import torch
from torch import Tensor
import torch.nn.functional as F

from ..autograd._functions import matmul_4bit
from . import slicing


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
    handler = HANDLERS.get(func)
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs) if handler is None else handler(func, *args, **kwargs)


def _is_weight(value) -> bool:
    return getattr(value, "quant_state", None) is not None


def _is_transposed(value) -> bool:
    return isinstance(value, TransposedWeight)


def _is_quantised(value) -> bool:
    return _is_weight(value) or _is_transposed(value) or getattr(value, "bnb_quantized", False)


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


def _piece(weight, piece: Tensor, strict: bool = True):
    """A part of a weight's packed bytes as a weight: with the statistics of its blocks.

    Raises:
        ValueError: it does not consist of whole blocks. If not ``strict``, such a piece only lacks a quant_state, and cannot be computed with.
    """
    attributes = {**weight.__dict__, "module": None, "requires_grad": weight.requires_grad}
    if not _is_weight(weight):
        return type(weight)(piece, **attributes)
    first, step = piece.storage_offset() - weight.storage_offset(), 2 * weight.element_size()
    stop = min((first + piece.numel()) * step, prod(weight.quant_state.shape))
    try:
        _, state = slicing.between(weight.data, weight.quant_state, min(first * step, stop), stop)
    except ValueError:
        if strict:
            raise
        state = None
    part = type(weight)(piece, **{**attributes, "quant_state": None, "bnb_quantized": True})
    if state is not None:
        part._adopt(state)
    return part


def _pieces(func, weight, *args, **kwargs):
    """FSDP2 cuts parameters with ``torch.chunk`` wherever it likes, to send the pieces around; so cutting alone does not fail."""
    return tuple(_piece(weight, piece, strict=False) for piece in func(weight, *args, **kwargs))


def _narrow(func, weight, *args, **kwargs):
    piece = func(weight, *args, **kwargs)
    return _piece(weight, piece) if _is_packed(weight) and _is_run(piece, weight) else piece


def _index(func, weight, index):
    piece = func(weight, index)
    is_slice = isinstance(index, slice) or (isinstance(index, tuple) and len(index) == 1 and isinstance(index[0], slice))
    return _piece(weight, piece) if is_slice and _is_packed(weight) and _is_run(piece, weight) else piece


def _is_packed(value) -> bool:
    """Whether ``value`` is a quantised weight, laid out as the column of bytes that quantisation makes."""
    return _is_weight(value) and value.dim() == 2 and value.shape[1] == 1 and not value.quant_state.packing_format_for_cpu


def _is_run(piece: Tensor, weight) -> bool:
    """Whether ``piece`` consists of consecutive elements of a column."""
    return piece.dim() == 2 and piece.shape[1] == 1 and (piece.shape[0] < 2 or piece.stride(0) == weight.stride(0))


def _set_data(func, weight, value):
    """``weight.data = moved_weight``, as ``nn.Module.to`` writes it, takes the moved statistics along with the moved bytes."""
    func(weight, value)
    if _is_weight(weight) and _is_weight(value):
        weight._adopt(value.quant_state)


HANDLERS = {
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
    torch.narrow: _narrow,
    Tensor.narrow: _narrow,
    Tensor.__getitem__: _index,
    Tensor.data.__set__: _set_data,
}
