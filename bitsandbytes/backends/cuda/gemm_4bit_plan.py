"""Which kernel computes a 4-bit product, and how it cuts it up.

``gemm_4bit_table`` says what was best for some shapes on some devices; a product follows the nearest of them. Nothing is decided by thresholds in
code.
"""

import functools
from math import log2
from typing import NamedTuple, Optional

from .gemm_4bit_table import TABLES

KERNELS = {"simple": 0, "skinny": 1, "tiled": 2, "warpgroup": 3}  # as in csrc/cuda/kernels.h


class Plan(NamedTuple):
    """Arguments of the native product."""

    kernel: int
    tile: int
    splits: int


_SIMPLE = Plan(KERNELS["simple"], 0, 1)


def table_of(capability: int) -> dict:
    """The table of a compute capability, 10 * major + minor, or of the nearest older one of its major version, or the one for unknown devices."""
    older = [known for known in TABLES if known != "default" and known <= capability and known // 10 == capability // 10]
    return TABLES[max(older, default="default")]


@functools.lru_cache(maxsize=1 << 14)
def forward_plan(capability: int, on_tensor_cores: bool, M: int, N: int, K: int) -> Optional[Plan]:
    """How ``[M, K] x [N, K]^T`` is computed; None: dequantised first.

    Args:
        capability: of the device.
        on_tensor_cores: whether dtype and shape suit the kernels that use them.
        M, N, K: tokens, out features, in features.
    """
    table = table_of(capability)
    if not on_tensor_cores:
        return _SIMPLE if M <= table["simple_tokens"] else None
    return _planned(table, "forward", M, N, K, width=N)


@functools.lru_cache(maxsize=1 << 14)
def backward_plan(capability: int, on_tensor_cores: bool, M: int, N: int, K: int) -> Optional[Plan]:
    """How ``[M, N] x [N, K]`` is computed; None: dequantised first."""
    return _planned(table_of(capability), "backward", M, N, K, width=K) if on_tensor_cores else None


def _planned(table: dict, direction: str, M: int, N: int, K: int, width: int) -> Optional[Plan]:
    """The entry for M tokens of the nearest shape: entries are (most tokens, kernel, tile, splits)."""
    if 0 in (M, N, K):  # nothing to multiply
        return None
    shapes = table[direction]
    nearest = min(shapes, key=lambda shape: abs(log2(shape[0] / N)) + abs(log2(shape[1] / K)), default=None)
    for most_tokens, kernel, tile, splits in shapes.get(nearest, ()):
        if M <= most_tokens:
            most_splits = table["partial_bytes"] // (4 * M * width)  # of the float sums of each
            return Plan(KERNELS[kernel], tile, max(1, min(splits, most_splits)))
    return None
