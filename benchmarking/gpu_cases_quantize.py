"""Cases of gpu_benchmark.py: 4-bit and 8-bit blockwise quantisation and its inverse.

Predictions come from counts of instructions and bytes: at 14 instructions an element NF4 quantisation is at the limit of what a GPU of four
instructions a cycle issues at 90 % of its memory's rate; dequantisation at 7 is far below it.
"""

from __future__ import annotations

from collections.abc import Iterator
import ctypes as ct

from gpu_benchmark import DTYPES, Case, Machine
import torch

from bitsandbytes import functional
from bitsandbytes.backends.cuda import ops
from bitsandbytes.backends.marshalling import DTYPES as DTYPE_CODES
from bitsandbytes.backends.marshalling import QUANT_TYPES

MEGABYTES = (1, 64, 1024)  # of the floating-point tensor


def pointer(tensor: torch.Tensor | None) -> ct.c_void_p:
    return ct.c_void_p(None if tensor is None else tensor.data_ptr())


class Operands:
    """A tensor, its codes and statistics, and a second set of results for the published library. ``bits``: 4 or 8."""

    def __init__(self, machine: Machine, n: int, dtype: torch.dtype, bits: int, blocksize: int):
        self.machine, self.n, self.dtype, self.blocksize = machine, n, dtype, blocksize
        self.x = torch.randn(n, device=machine.device, dtype=dtype)
        self.absmax, self.absmax_published = (torch.ones(-(-n // blocksize), device=machine.device) for _ in range(2))
        self.codes, self.codes_published = (torch.randint(0, 256, (n * bits // 8,), dtype=torch.uint8, device=machine.device) for _ in range(2))
        self.out, self.out_published = (torch.empty_like(self.x) for _ in range(2))
        self.code = functional.create_dynamic_map().to(machine.device)

    def published_quantize(self, suffix: str, code: torch.Tensor | None):
        if self.machine.published is None:
            return None
        function = getattr(self.machine.published, f"cquantize_blockwise_{suffix}")
        arguments = (*map(pointer, (code, self.x, self.absmax_published, self.codes_published)), ct.c_int32(self.blocksize), ct.c_int(self.n))
        return lambda: function(*arguments)

    def published_dequantize(self, suffix: str, code: torch.Tensor | None):
        if self.machine.published is None:
            return None
        function = getattr(self.machine.published, f"cdequantize_blockwise_{suffix}")
        arguments = (*map(pointer, (code, self.codes, self.absmax, self.out_published)), ct.c_int32(self.blocksize), ct.c_int(self.n))
        return lambda: function(*arguments, self.machine.stream())

    def different_codes(self) -> dict:
        return {
            "bytes_that_differ": int((self.codes != self.codes_published).sum()),
            "scales_that_differ": int((self.absmax != self.absmax_published).sum()),
        }

    def different_values(self) -> dict:
        return {"values_that_differ": int((self.out != self.out_published).sum())}


def cases(machine: Machine) -> Iterator[Case]:
    for dtype, megabytes in [("bf16", m) for m in MEGABYTES] + [("fp16", 64), ("fp32", 64), ("fp32", 1024)]:
        n = max(4096, (megabytes << 20) // DTYPES[dtype].itemsize // machine.shrink)
        for quant_type, blocksize in [("nf4", 64)] + ([("fp4", 64), ("nf4", 512), ("nf4", 4096)] if (dtype, megabytes) == ("bf16", 64) else []):
            yield quantize_4bit(machine, n, dtype, quant_type, blocksize)
            yield dequantize_4bit(machine, n, dtype, quant_type, blocksize)
        yield dequantize_nested(machine, n, dtype)
        for blocksize in (256, 4096):
            yield quantize_8bit(machine, n, dtype, blocksize)
        yield dequantize_8bit(machine, n, dtype, 256)


def _traffic(n: int, dtype: str, bits: int, blocksize: int) -> int:
    return n * DTYPES[dtype].itemsize + n * bits // 8 + 4 * (n // blocksize)


def quantize_4bit(machine: Machine, n: int, dtype: str, quant_type: str, blocksize: int) -> Case:
    built = []

    def build():
        operands = Operands(machine, n, DTYPES[dtype], 4, blocksize)
        built[:] = [operands]
        arguments = (operands.x.data_ptr(), DTYPE_CODES[operands.dtype], n, blocksize, QUANT_TYPES[quant_type])
        results = (operands.absmax.data_ptr(), operands.codes.data_ptr())
        return lambda: ops._quantize_4bit(operands.x, *arguments, *results), operands.published_quantize(f"{dtype}_{quant_type}", None)

    size = {"n": n, "dtype": dtype, "blocksize": blocksize}
    return Case(f"quantize_4bit {quant_type}", size, _traffic(n, dtype, 4, blocksize), build, predicted=0.8, published_graph=False,
                same=lambda: built[0].different_codes())  # fmt: skip


def dequantize_4bit(machine: Machine, n: int, dtype: str, quant_type: str, blocksize: int) -> Case:
    built = []

    def build():
        operands = Operands(machine, n, DTYPES[dtype], 4, blocksize)
        built[:] = [operands]
        ours = lambda: ops.dequantize_4bit_into(operands.out, operands.codes, operands.absmax, blocksize, quant_type)  # noqa: E731
        return ours, operands.published_dequantize(f"{dtype}_{quant_type}", None)

    size = {"n": n, "dtype": dtype, "blocksize": blocksize}
    return Case(f"dequantize_4bit {quant_type}", size, _traffic(n, dtype, 4, blocksize), build, predicted=0.85,
                same=lambda: built[0].different_values())  # fmt: skip


def dequantize_nested(machine: Machine, n: int, dtype: str) -> Case:
    """Ours decodes the statistics on the way; the published library needs three steps."""
    blocksize, blocks = 64, n // 64

    def build():
        operands = Operands(machine, n, DTYPES[dtype], 4, blocksize)
        codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, device=machine.device)
        outer, offset = torch.ones(-(-blocks // 256), device=machine.device), torch.ones((), device=machine.device)
        nested = (codes, operands.code, offset)
        ours = lambda: ops.dequantize_4bit_into(operands.out, operands.codes, outer, blocksize, "nf4", *nested)  # noqa: E731
        last_step = operands.published_dequantize(f"{dtype}_nf4", None)
        if last_step is None:
            return ours, None
        decode = machine.published.cdequantize_blockwise_fp32
        arguments = (*map(pointer, (operands.code, codes, outer, operands.absmax)), ct.c_int32(256), ct.c_int(blocks))

        def published():
            decode(*arguments, machine.stream())
            operands.absmax.add_(offset)
            last_step()

        return ours, published

    traffic = n * DTYPES[dtype].itemsize + n // 2 + blocks + 4 * (blocks // 256)
    return Case("dequantize_4bit nf4", {"n": n, "dtype": dtype, "blocksize": blocksize, "nested": True}, traffic, build, predicted=0.85)


def quantize_8bit(machine: Machine, n: int, dtype: str, blocksize: int) -> Case:
    built = []

    def build():
        operands = Operands(machine, n, DTYPES[dtype], 8, blocksize)
        built[:] = [operands]
        arguments = (operands.code.data_ptr(), operands.x.data_ptr(), DTYPE_CODES[operands.dtype], n, blocksize)
        results = (operands.absmax.data_ptr(), operands.codes.data_ptr())
        return lambda: ops._quantize_blockwise(operands.x, *arguments, *results), operands.published_quantize(dtype, operands.code)

    size = {"n": n, "dtype": dtype, "blocksize": blocksize}
    return Case("quantize_blockwise", size, _traffic(n, dtype, 8, blocksize), build, predicted=0.7, published_graph=False,
                same=lambda: built[0].different_codes())  # fmt: skip


def dequantize_8bit(machine: Machine, n: int, dtype: str, blocksize: int) -> Case:
    built = []

    def build():
        operands = Operands(machine, n, DTYPES[dtype], 8, blocksize)
        built[:] = [operands]
        ours = lambda: ops.dequantize_blockwise_into(operands.out, operands.codes, operands.absmax, operands.code, blocksize)  # noqa: E731
        return ours, operands.published_dequantize(dtype, operands.code)

    size = {"n": n, "dtype": dtype, "blocksize": blocksize}
    return Case("dequantize_blockwise", size, _traffic(n, dtype, 8, blocksize), build, predicted=0.8, same=lambda: built[0].different_values())
