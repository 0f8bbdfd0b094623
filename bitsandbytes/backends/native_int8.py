"""What the native backends of LLM.int8(), the CPU's and the GPU's, make of the same three functions.

The operators are those of ``default/int8.py``, which says what they compute.
"""

from collections.abc import Callable

import torch

from .marshalling import written


def operators(kernel: Callable, quantise: Callable, matmul_into: Callable, scaled_product: Callable) -> tuple[Callable, ...]:
    """The operators ``int8_vectorwise_quant``, ``int8_double_quant``, ``int8_linear_matmul`` and its ``.out``, ``int8_scaled_mm`` and
    ``int8_mixed_scaled_mm``.

    Args:
        kernel: registers a function under the operator's name; see ``_ops.implement``.
        quantise: (A, threshold, with_columns) -> what ``int8_double_quant`` returns, without columns None in their places.
        matmul_into: (out, A, B) -> contiguous ``out``, which has received the product of codes.
        scaled_product: (CA, CB, SCA, SCB, bias, dtype, A, outlier_cols) -> the product in floating point; contiguous ``A`` and its columns, int64
            and not negative, may be left out.
    """

    @kernel("int8_vectorwise_quant")
    def int8_vectorwise_quant(A, threshold=0.0):
        codes, _, stats, _, outlier_cols = quantise(A, threshold, with_columns=False)
        return codes, stats, outlier_cols

    @kernel("int8_double_quant")
    def int8_double_quant(A, threshold=0.0):
        return quantise(A, threshold, with_columns=True)

    @kernel("int8_linear_matmul")
    def int8_linear_matmul(A, B):
        return matmul_into(A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32), A, B)

    @kernel("int8_linear_matmul.out")
    def int8_linear_matmul_out(A, B, out):
        written(out, lambda buffer: matmul_into(buffer, A, B))

    @kernel("int8_scaled_mm")
    def int8_scaled_mm(A, B, row_stats, col_stats, bias=None, dtype=None):
        return scaled_product(A, B, row_stats, col_stats, bias, dtype or torch.float16)

    @kernel("int8_mixed_scaled_mm")
    def int8_mixed_scaled_mm(A, CA, CB, SCA, SCB, outlier_cols=None, bias=None):
        if outlier_cols is None:
            return scaled_product(CA, CB, SCA, SCB, bias, A.dtype), A.new_empty(0)
        A = A.contiguous()
        K = A.shape[-1]
        outliers = A.view(A.shape[:-1].numel(), K)[:, outlier_cols]  # raises for a column that A has not
        columns = torch.where(outlier_cols < 0, outlier_cols + K, outlier_cols).to(torch.int64)
        return scaled_product(CA, CB, SCA, SCB, bias, A.dtype, A, columns), outliers

    return int8_vectorwise_quant, int8_double_quant, int8_linear_matmul, int8_linear_matmul_out, int8_scaled_mm, int8_mixed_scaled_mm
