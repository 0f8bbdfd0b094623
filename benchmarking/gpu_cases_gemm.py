"""Cases of gpu_benchmark.py: 4-bit products of Llama-3 layers, forward and backward, with nested NF4 statistics in bfloat16.

Predictions: up to 16 tokens a product reads the weight at 75 % of the memory's rate; beyond, the kernels that dequantise in registers are bound by
instructions, and from some hundred tokens on a dense product follows a dequantisation. Where the published library would multiply with its fused
kernel that is timed beside ours, elsewhere its dequantisation (three functions for nested statistics, of which the last is most of the time and
the one that is timed) and a dense product.
"""

from __future__ import annotations

from collections.abc import Iterator
import ctypes as ct
from math import isqrt

from gpu_benchmark import DTYPES, Case, Machine
import torch

from bitsandbytes import functional
from bitsandbytes.backends.cuda import gemm

LAYERS = ((1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))  # out features, in features
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKENS_BACKWARD = (16, 64, 512, 2048)
BLOCKSIZE = 64
NF4 = 2  # as the published functions number it
MEAN = 0.5  # of activations: levels that are rounded to 16 bits show at this

# What the published library asks of a shape before it multiplies without a dense weight: tiles of 64 out features, and the most tokens then.
PUBLISHED_ALWAYS_FUSED = 4
PUBLISHED_FUSED = ((396, 64), (264, 48), (132, 32), (66, 16))


def pointer(tensor: torch.Tensor | None) -> ct.c_void_p:
    return ct.c_void_p(None if tensor is None else tensor.data_ptr())


def published_is_fused(M: int, N: int, K: int) -> bool:
    most = next((tokens for tiles, tokens in PUBLISHED_FUSED if -(-N // 64) >= tiles), 0)
    return M <= PUBLISHED_ALWAYS_FUSED or (M <= most and K % BLOCKSIZE == 0)


class Operands:
    """A layer, its activations, and room for the results of the published library."""

    def __init__(self, machine: Machine, M: int, N: int, K: int, dtype: str, nested: bool):
        self.machine, self.M, self.N, self.K, self.nested = machine, M, N, K, nested
        self.dtype = DTYPES[dtype]
        self.suffix = dtype
        device = machine.device
        self.packed = torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8, device=device)
        absmax = torch.rand(N * K // BLOCKSIZE, device=device) + 0.5
        self.offset = absmax.mean()
        self.codes, state = functional.quantize_blockwise(absmax - self.offset, blocksize=256)
        self.absmax_nested, self.code = state.absmax, state.code
        self.absmax = functional.dequantize_blockwise(self.codes, state) + self.offset
        self.x = torch.randn(M, K, device=device, dtype=self.dtype) + MEAN
        self.grad = torch.randn(M, N, device=device, dtype=self.dtype) + MEAN
        self.out_published = torch.empty(M, N, device=device, dtype=self.dtype)
        self.dense = None if machine.published is None else torch.empty(N, K, device=device, dtype=self.dtype)

    def statistics(self) -> tuple:
        """absmax, and what nested statistics have beside it, as the operators take them."""
        return (self.absmax_nested, self.codes, self.code, self.offset) if self.nested else (self.absmax, None, None, None)

    def forward(self) -> torch.Tensor:
        absmax, *nested = self.statistics()
        return gemm.gemm_4bit(self.x, self.packed, [self.N, self.K], absmax, BLOCKSIZE, "nf4", None, *nested)

    def backward(self) -> torch.Tensor:
        absmax, *nested = self.statistics()
        return gemm.gemm_4bit_backward(self.grad, self.packed, [self.N, self.K], absmax, BLOCKSIZE, "nf4", *nested)

    def published_forward(self):
        if self.machine.published is None:
            return None
        if not published_is_fused(self.M, self.N, self.K):
            return self._published_dense(lambda: torch.mm(self.x, self.dense.t(), out=self.out_published))
        multiply = getattr(self.machine.published, f"cgemm_4bit_{self.suffix}")
        absmax, codes, code, offset = self.statistics()
        operands = map(pointer, (self.x, self.packed, absmax, codes, code, offset, self.out_published, None))
        arguments = (*operands, *map(ct.c_int32, (self.M, self.N, self.K, BLOCKSIZE, NF4)))
        return lambda: multiply(*arguments, self.machine.stream())

    def published_backward(self):
        if self.machine.published is None:
            return None
        result = torch.empty_like(self.x)
        return self._published_dense(lambda: torch.mm(self.grad, self.dense, out=result))

    def _published_dense(self, multiply):
        dequantize = getattr(self.machine.published, f"cdequantize_blockwise_{self.suffix}_nf4")
        operands = map(pointer, (None, self.packed, self.absmax, self.dense))
        arguments = (*operands, ct.c_int32(BLOCKSIZE), ct.c_int32(self.N * self.K))

        def run():
            dequantize(*arguments, self.machine.stream())
            multiply()

        return run

    def errors(self) -> dict:
        """Ours and the published one's, as multiples of what a dense product in the same dtype has."""
        absmax, *nested = self.statistics()
        weight = torch.empty(self.N, self.K, device=self.x.device, dtype=torch.float32)
        gemm.dequantize_4bit_into(weight, self.packed, absmax, BLOCKSIZE, "nf4", *nested)
        exact = self.x.double() @ weight.double().t()
        error = lambda result: (result.double() - exact).norm()  # noqa: E731
        dense = error(self.x @ weight.to(self.dtype).t())
        found = {"error_of_dense": (error(self.forward()) / dense).item()}
        if self.machine.published is not None:
            found["published_error_of_dense"] = (error(self.out_published) / dense).item()
        return found


def cases(machine: Machine) -> Iterator[Case]:
    side = isqrt(machine.shrink)
    layers = [(max(40, N // side), max(128, K // side)) for N, K in LAYERS]
    whole = machine.shrink == 1
    for N, K in layers if whole else layers[:1]:
        for M in TOKENS if whole else (1, 3, 20):
            yield product(machine, M, N, K, "bf16", nested=True)
        for M in TOKENS_BACKWARD if whole else (5,):
            yield gradient(machine, M, N, K, "bf16")
    N, K = layers[1]
    for M in (1, 16, 128) if whole else (2,):
        yield product(machine, M, N, K, "fp16", nested=False)
        yield product(machine, M, N, K, "fp32", nested=False)


def traffic(M: int, N: int, K: int, dtype: str, nested: bool) -> int:
    scales = N * K // BLOCKSIZE
    return N * K // 2 + (scales + scales // 64 if nested else 4 * scales) + (M * K + M * N) * DTYPES[dtype].itemsize


def product(machine: Machine, M: int, N: int, K: int, dtype: str, nested: bool) -> Case:
    built = []

    def build():
        operands = Operands(machine, M, N, K, dtype, nested)
        built[:] = [operands]
        return operands.forward, operands.published_forward()

    size = {"M": M, "N": N, "K": K, "dtype": dtype, "nested": nested, "published": "fused" if published_is_fused(M, N, K) else "dense"}
    share = 0.75 if M <= 16 else 0.6
    bound = traffic(M, N, K, dtype, nested)
    return Case("gemm_4bit", size, bound, build, operations=2 * M * N * K, predicted=share, same=lambda: built[0].errors())


def gradient(machine: Machine, M: int, N: int, K: int, dtype: str) -> Case:
    def build():
        operands = Operands(machine, M, N, K, dtype, nested=True)
        return operands.backward, operands.published_backward()

    size = {"M": M, "N": N, "K": K, "dtype": dtype}
    return Case("gemm_4bit_backward", size, traffic(M, N, K, dtype, nested=True), build, operations=2 * M * N * K, predicted=0.5)
