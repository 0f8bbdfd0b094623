"""Cases of gpu_benchmark.py: LLM.int8().

Predictions: up to 16 tokens a product reads the weight at 80 % of the memory's rate. Beyond, a product of classes issues ten instructions for each of
the tensor cores', which lets those work at less than half of their rate; a plain one is bound by the rate at which they take their operands from
registers, about 60 % of it on GPUs that have a wider form.
"""

from __future__ import annotations

from collections.abc import Iterator
import ctypes as ct
from math import isqrt

from gpu_benchmark import DTYPES, Case, Machine
import torch

from bitsandbytes.backends.cuda import int8
from bitsandbytes.backends.marshalling import DTYPES as DTYPE_CODES

LAYERS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
KERNELS = {"auto": int8.AUTO, "rows": int8.ROWS, "narrow": int8.NARROW, "middle": int8.MIDDLE, "wide": int8.WIDE}
FEW = 16  # tokens up to which reading the weight is the bound


def pointer(tensor: torch.Tensor | None) -> ct.c_void_p:
    return ct.c_void_p(None if tensor is None else tensor.data_ptr())


class Operands:
    """A layer and its activations, and what the published library needs beside them. ``threshold``: about six columns hold outliers above it."""

    def __init__(self, machine: Machine, M: int, N: int, K: int, dtype: torch.dtype, threshold: float = 0.0):
        self.machine, self.M, self.N, self.K, self.dtype, self.threshold = machine, M, N, K, dtype, threshold
        device = machine.device
        self.x = torch.randn(M, K, device=device, dtype=dtype)
        self.x[0, :: max(1, K // 6)] = 60.0
        self.grad = torch.randn(M, N, device=device, dtype=dtype)
        self.codes = torch.randint(-127, 128, (M, K), device=device, dtype=torch.int8)
        self.weight = torch.randint(-127, 128, (N, K), device=device, dtype=torch.int8)
        self.stats, self.scales = torch.rand(M, device=device), torch.rand(N, device=device)
        self.product, self.product_published = (torch.empty(M, N, device=device, dtype=torch.int32) for _ in range(2))
        self.out_published = torch.empty(M, N, device=device, dtype=torch.float16)

    def published(self, name: str):
        function = getattr(self.machine.published, name)
        function.restype = ct.c_int if name == "cigemmlt_32" else None
        return function

    def published_product(self):
        """Its BLAS has columns where we have rows: our weight is its first operand."""
        if self.machine.published is None:
            return None
        get_context = self.machine.published.get_context
        get_context.restype = ct.c_void_p
        multiply, context = self.published("cigemmlt_32"), ct.c_void_p(get_context())
        sizes = [ct.c_int32(size) for size in (self.N, self.M, self.K)]
        operands = [pointer(self.weight), pointer(self.codes), pointer(self.product_published), pointer(None)]
        strides = [ct.c_int32(stride) for stride in (self.K, self.K, self.N)]
        return lambda: multiply(context, *sizes, *operands, *strides, self.machine.stream())

    def published_quantisation(self):
        if self.machine.published is None or self.dtype is not torch.float16:
            return None
        quantise = self.published("cint8_vector_quant")
        arguments = (*map(pointer, (self.x, self.codes, self.stats)), ct.c_float(self.threshold), ct.c_int32(self.M), ct.c_int32(self.K))
        return lambda: quantise(*arguments, self.machine.stream())

    def published_layer(self):
        """Quantisation, product and dequantisation, without what its Python does between them."""
        quantise, multiply = self.published_quantisation(), self.published_product()
        if quantise is None or self.threshold > 0.0:
            return None
        scale = self.published("cdequant_mm_int32_fp16")
        operands = map(pointer, (self.product_published, self.stats, self.scales, self.out_published, None))
        arguments = (*operands, ct.c_int32(self.M), ct.c_int32(self.N))

        def run():
            quantise()
            multiply()
            scale(*arguments, self.machine.stream())

        return run

    def different_integers(self) -> dict:
        return {"integers_that_differ": int((self.product != self.product_published).sum())}


def cases(machine: Machine) -> Iterator[Case]:
    side = isqrt(machine.shrink)
    layers = [(max(40, N // side), max(64, K // side)) for N, K in LAYERS]
    tokens = TOKENS if machine.shrink == 1 else (1, 3, 40)
    for N, K in layers if machine.shrink == 1 else layers[:1]:
        for M in tokens:
            yield layer(machine, M, N, K, "fp16", 0.0)
            yield layer(machine, M, N, K, "bf16", 6.0)
            yield product(machine, M, N, K, "auto")
            yield gradient(machine, M, N, K, "bf16")
    N, K = layers[0]
    for M in tokens:
        for kernel in list(KERNELS)[1:]:
            yield layer(machine, M, N, K, "bf16", 0.0, kernel)
            yield product(machine, M, N, K, kernel)
        for dtype in ("fp16", "bf16"):
            yield quantisation(machine, M, K, dtype)
    yield quantisation(machine, max(8, 65536 // side), K, "fp16")


def _share(M: int, plain: bool) -> float:
    return 0.8 if M <= FEW else 0.6 if plain else 0.4


def layer(machine: Machine, M: int, N: int, K: int, dtype: str, threshold: float, kernel: str = "auto") -> Case:
    def build():
        operands = Operands(machine, M, N, K, DTYPES[dtype], threshold)
        ours = lambda: int8.linear(operands.x, operands.weight, operands.scales, None, threshold, KERNELS[kernel])  # noqa: E731
        return ours, operands.published_layer()

    size = {"M": M, "N": N, "K": K, "dtype": dtype, "threshold": threshold, "kernel": kernel}
    traffic = N * K + (M * K + M * N) * DTYPES[dtype].itemsize
    return Case("int8_linear", size, traffic, build, operations=2 * M * N * K, rate="int8", predicted=_share(M, plain=False))


def product(machine: Machine, M: int, N: int, K: int, kernel: str) -> Case:
    built = []

    def build():
        operands = Operands(machine, M, N, K, torch.float16)
        built[:] = [operands]
        ours = lambda: int8._matmul_into(operands.product, operands.codes, operands.weight, KERNELS[kernel])  # noqa: E731
        return ours, operands.published_product()

    size = {"M": M, "N": N, "K": K, "kernel": kernel}
    traffic = (N + M) * K + 4 * M * N
    return Case("int8_linear_matmul", size, traffic, build, operations=2 * M * N * K, rate="int8", predicted=_share(M, plain=True),
                same=lambda: built[0].different_integers())  # fmt: skip


def gradient(machine: Machine, M: int, N: int, K: int, dtype: str) -> Case:
    def build():
        operands = Operands(machine, M, N, K, DTYPES[dtype])
        return lambda: int8.int8_linear_backward(operands.grad, operands.weight, operands.scales), None

    size = {"M": M, "N": N, "K": K, "dtype": dtype}
    traffic = N * K + (M * K + M * N) * DTYPES[dtype].itemsize
    return Case("int8_linear_backward", size, traffic, build, operations=2 * M * N * K, predicted=0.5)


def quantisation(machine: Machine, M: int, K: int, dtype: str) -> Case:
    def build():
        operands = Operands(machine, M, 8, K, DTYPES[dtype])
        codes, stats = torch.empty_like(operands.codes), torch.empty_like(operands.stats)
        arguments = (operands.x.data_ptr(), DTYPE_CODES[operands.dtype], M, K, 0.0, None, None, None)
        ours = lambda: int8._quantize(operands.x, *arguments, stats.data_ptr(), codes.data_ptr(), None, None)  # noqa: E731
        return ours, operands.published_quantisation()

    size = {"M": M, "K": K, "dtype": dtype}
    return Case("int8_vectorwise_quant", size, M * K * (DTYPES[dtype].itemsize + 1) + 4 * M, build, predicted=0.7)
