"""Integer matrix products of early releases. Use ``functional.int8_linear_matmul`` in new code."""

import torch
from torch import Tensor
from typing_extensions import deprecated

_deprecated = deprecated("This function is deprecated and will be removed in a future release.", category=FutureWarning)


def _product_shape(A: Tensor, B: Tensor, transposed_A: bool, transposed_B: bool) -> tuple[int, ...]:
    """Shape of A B, or of A^T B and so on, the last two dimensions being the matrices; A may have a batch dimension, and B with it.

    Raises:
        ValueError: there is no such product.
    """
    a = A.mT if transposed_A and A.dim() > 1 else A
    b = B.mT if transposed_B and B.dim() > 1 else B
    if A.dim() not in (2, 3) or B.dim() not in (2, A.dim()) or a.shape[-1] != b.shape[-2] or (B.dim() == 3 and A.shape[0] != B.shape[0]):
        raise ValueError(
            f"Tensor dimensions incorrect for a matrix product: A {tuple(A.shape)}{' transposed' * transposed_A}, "
            f"B {tuple(B.shape)}{' transposed' * transposed_B}"
        )
    return *a.shape[:-1], b.shape[-1]


def _contracts_batch(A: Tensor, B: Tensor, out: Tensor | None) -> bool:
    """Whether the sum is to run over batch and sequence: [b, s, i] and [b, s, o] into an ``out`` of [i, o]."""
    return out is not None and out.dim() == 2 and A.dim() == B.dim() == 3 and A.shape[:2] == B.shape[:2]


def _checked_shape(A: Tensor, B: Tensor, out: Tensor | None, transposed_A: bool, transposed_B: bool, expected_type: torch.dtype):
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"Expected {expected_type} input tensors A and B, but got {A.dtype} and {B.dtype}")
    if _contracts_batch(A, B, out):
        shape = (A.shape[2], B.shape[2])
    else:
        shape = _product_shape(A, B, transposed_A, transposed_B)
    if out is not None and tuple(out.shape) != shape:
        raise ValueError(f"Tensor dimensions incorrect: out must have shape {shape}, got {tuple(out.shape)}")
    return torch.Size(shape)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """int8 [..., m, k] times int8 [k, n] or [..., k, n], exact in int32."""
    if b.dim() == 2:
        return torch.ops.bitsandbytes.int8_linear_matmul(a.contiguous(), b.t().contiguous())
    products = [_matmul(matrix, other) for matrix, other in zip(a, b)]
    return torch.stack(products) if products else torch.empty(0, a.shape[1], b.shape[2], dtype=torch.int32, device=a.device)


def _igemm(A: Tensor, B: Tensor, out: Tensor | None, transposed_A: bool, transposed_B: bool) -> Tensor:
    shape = _checked_shape(A, B, out, transposed_A, transposed_B, torch.int8)
    if _contracts_batch(A, B, out):
        product = _matmul(A.flatten(0, 1).t(), B.flatten(0, 1))
    else:
        product = _matmul(A.mT if transposed_A else A, B.mT if transposed_B else B)
    return product.view(shape) if out is None else out.copy_(product)


@_deprecated
def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> torch.Size:
    """Shape of the product that ``igemm`` would compute.

    Raises:
        TypeError: an operand is not of ``expected_type``.
        ValueError: the shapes do not fit together, or ``out`` does not fit them.
    """
    return _checked_shape(A, B, out, transposed_A, transposed_B, expected_type)


@_deprecated
def igemm(A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False) -> Tensor:
    """Exact int32 product of two int8 matrices.

    Args:
        A: [m, k], or [batch, m, k]. B: [k, n], or [batch, k, n] beside a batched A.
        out: receives the result. An ``out`` of [i, o] beside A [b, s, i] and B [b, s, o] asks for the sum over both b and s.
        transposed_A, transposed_B: the operand is stored with its two last dimensions exchanged.

    Returns:
        int32 [m, n] or [batch, m, n].

    Raises:
        TypeError: an operand is not int8.
        ValueError: the shapes do not fit together, or ``out`` does not fit them.
    """
    return _igemm(A, B, out, transposed_A, transposed_B)


@_deprecated
def batched_igemm(A: Tensor, B: Tensor, out: Tensor | None = None, transposed_A: bool = False, transposed_B: bool = False) -> Tensor:
    """As ``igemm`` for int8 [batch, m, k] and [batch, k, n].

    Raises:
        TypeError: an operand is not int8.
        ValueError: an operand is not three-dimensional, or the shapes do not fit together.
    """
    if A.dim() != 3 or B.dim() != 3:
        raise ValueError(f"batched_igemm needs three-dimensional operands, got {tuple(A.shape)} and {tuple(B.shape)}")
    return _igemm(A, B, out, transposed_A, transposed_B)
