"""The native 4-bit matrix product, on every instruction set: out = A . dequantised(B)^T + bias from the packed layout.

Where a result can be exact it is compared bit for bit: with rows of the identity as activations the product *is* the weight, rounded to the element
type, whatever the order of the sums. That pins every code, every scale and every tail; the rest needs error bounds.
"""

import os
from pathlib import Path
import subprocess
import sys

from native_cpu import (  # noqa: F401  (fixtures among them)
    DTYPES,
    LEVELS,
    QUANT_TYPES,
    SETS,
    Guarded,
    assert_same_floats,
    at_page_edge,
    block_count,
    lib,
    library,
    load_library,
    nibbles,
    quantize_4bit,
)
import numpy as np
import pytest
import torch

ALL_SIZES = [*range(1, 71), 96, 100, 192, 576]
ALL_TOKENS = [*range(1, 21), 31, 32, 33, 40, 41, 64, 65, 127, 128, 129]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "fp16", "bf16"])


@pytest.fixture(autouse=True)
def one_thread():
    """For the references, which are small; the product is told its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Weight:
    """A random packed weight [N, K] and what it stands for: ``values`` in fp32."""

    def __init__(self, N: int, K: int, blocksize: int, quant_type: str = "nf4", nested: bool = False, seed: int = 0):
        random = np.random.default_rng([N, K, blocksize, nested, seed])
        self.N, self.K, self.blocksize, self.quant_type = N, K, blocksize, quant_type
        blocks = block_count(N * K, blocksize)
        self.packed = random.integers(0, 256, (N * K + 1) // 2, dtype=np.uint8)
        self.codes = self.code = self.offset = None
        if nested:
            self.codes = random.integers(0, 256, blocks, dtype=np.uint8)
            self.code = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            self.absmax = random.uniform(0.1, 0.5, block_count(blocks, 256)).astype(np.float32)
            self.offset = np.array([0.7], np.float32)
            scales = self.code[self.codes] * np.repeat(self.absmax, 256)[:blocks] + self.offset
        else:
            self.absmax = scales = random.uniform(0.1, 1.5, blocks).astype(np.float32)
        self.scales = scales

    @property
    def values(self) -> torch.Tensor:
        levels = LEVELS[self.quant_type][nibbles(self.packed, self.N * self.K)]
        return torch.from_numpy((levels * np.repeat(self.scales, self.blocksize)[: self.N * self.K]).reshape(self.N, self.K))

    def pointers(self):
        arrays = self.packed, self.absmax, self.codes, self.code, self.offset
        return [None if array is None else array.ctypes.data for array in arrays]


def multiply(lib, A: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None, threads: int = 1) -> torch.Tensor:
    M = A.shape[0]
    out = Guarded(M * weight.N, A.dtype)
    bias_pointer = None if bias is None else bias.data_ptr()
    sizes = M, weight.N, weight.K, weight.blocksize
    codes = QUANT_TYPES[weight.quant_type], DTYPES[A.dtype], threads
    assert lib.bnb_cpu_gemm_4bit(A.data_ptr(), *weight.pointers(), bias_pointer, out.pointer, *sizes, *codes) == 0
    return out.check().view(M, weight.N)


def normal(random, *shape) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal(shape))


def assert_is_product(out: torch.Tensor, A: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> None:
    """Within what rounding the weight, the sum and the result allows, against a float64 product."""
    weights, activations = weight.values.double(), A.double()
    expected, size = activations @ weights.T, activations.abs() @ weights.abs().T
    if bias is not None:
        expected, size = expected + bias.double(), size + bias.double().abs()
    unit = torch.finfo(A.dtype).eps * (4 if A.dtype == torch.float32 else 1)  # in fp32 the sum rounds as coarsely as the result
    largest = ((out.double() - expected).abs() / (unit * size + 1e-7)).max().item()
    assert largest <= 1, f"error {largest:.2f} times the bound, M={A.shape[0]} N={weight.N} K={weight.K} blocksize={weight.blocksize}"


# ------------------------------------------------------------------------------------- which weight is multiplied with which activation
EXACT_SHAPES = [(1, 1), (5, 7), (3, 33), (9, 50), (64, 64), (70, 32), (33, 96), (17, 160), (20, 100), (130, 65), (66, 192), (7, 576), (4, 1056)]


@dtypes
@pytest.mark.parametrize("N, K", EXACT_SHAPES)
def test_rows_of_the_identity_return_the_weight(lib, dtype, N, K):
    for i, tokens in enumerate((1, 2, 3, 4, 7, 16, 41, K)):
        blocksize = BLOCKSIZES[(i + N) % len(BLOCKSIZES)]
        weight = Weight(N, K, blocksize, "nf4" if i % 2 else "fp4", nested=i % 3 == 0)
        chosen = torch.arange(K) if tokens == K else torch.randperm(K)[:tokens]
        A = torch.eye(K, dtype=dtype)[chosen]
        assert_same_floats(multiply(lib, A, weight), weight.values.T[chosen].to(dtype))


@pytest.mark.parametrize("blocksize", [1, 3, 32, 40, 64, 100, 4096])
def test_any_block_size_is_exact(lib, blocksize):
    for K in (32, 61, 64, 96):
        weight = Weight(12, K, blocksize, nested=True)
        assert_same_floats(multiply(lib, torch.eye(K), weight), weight.values.T.contiguous())


@dtypes
def test_bias_is_added_before_the_rounding(lib, dtype):
    weight, bias = Weight(50, 64, 64), torch.randn(50).to(dtype)
    for tokens in (3, 64):  # one for each form
        expected = (weight.values.T[:tokens] + bias.float()).to(dtype)
        if dtype == torch.bfloat16:  # the weight itself may be rounded first
            tolerance = dict(rtol=2**-7, atol=2**-7)
            torch.testing.assert_close(multiply(lib, torch.eye(64, dtype=dtype)[:tokens], weight, bias), expected, **tolerance)
        else:
            assert_same_floats(multiply(lib, torch.eye(64, dtype=dtype)[:tokens], weight, bias), expected)


@dtypes
def test_products_of_random_shapes(lib, dtype):
    random = np.random.default_rng(1)
    for case in range(48):
        M, N, K = (int(random.choice(sizes)) for sizes in (ALL_TOKENS, ALL_SIZES, ALL_SIZES))
        if case % 3 == 0:  # the layout of real weights
            K = int(random.choice([64, 96, 192, 576, 1152]))
        weight = Weight(N, K, int(random.choice(BLOCKSIZES)), str(random.choice(["fp4", "nf4"])), nested=bool(case % 2), seed=case)
        bias = normal(random, N).to(dtype) if case % 4 < 2 else None
        A = torch.empty(M * K + 1, dtype=dtype)[1:].view(M, K)  # not aligned to more than an element
        A.copy_(normal(random, M, K))
        assert_is_product(multiply(lib, A, weight, bias, threads=1 + case % 2), A, weight, bias)


@dtypes
def test_every_number_of_tokens(lib, dtype):
    random = np.random.default_rng(3)
    for weight in (Weight(23, 192, 64), Weight(70, 33, 32)):
        A = normal(random, max(ALL_TOKENS), weight.K).to(dtype)
        for M in ALL_TOKENS:
            assert_is_product(multiply(lib, A[:M], weight), A[:M], weight)


@dtypes
@pytest.mark.parametrize("M, N, K", [(1100, 3, 65), (1030, 70, 64), (2, 3, 9000), (3, 70, 8256), (45, 5, 8224), (150, 2, 10001)])
def test_sizes_beyond_one_pass(lib, dtype, M, N, K):
    random = np.random.default_rng(M)
    weight, A = Weight(N, K, 64, nested=True), normal(random, M, K).to(dtype)
    assert_is_product(multiply(lib, A, weight, threads=2), A, weight)


# ------------------------------------------------------------------------------------- accuracy
@dtypes
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("mean", [0, 2])
def test_error_is_that_of_a_dense_product(lib, dtype, quant_type, mean):
    """Levels rounded to 16 bits before they are scaled would fail this many times over at mean 2, a single chain of fp32 sums at any mean."""
    random = np.random.default_rng(2)
    N, K, blocksize = 96, 2048, 64
    weight = Weight(N, K, blocksize, quant_type)
    weight.absmax, weight.packed = quantize_4bit(lib, normal(random, N, K).float() * 0.02, blocksize, quant_type)
    weight.scales = weight.absmax
    for M in (4, 8, 48):
        A = (normal(random, M, K) + mean).to(dtype)
        exact = A.double() @ weight.values.double().T
        dense = torch.nn.functional.linear(A, weight.values.to(dtype))
        error, dense_error = ((y.double() - exact).square().mean().sqrt().item() for y in (multiply(lib, A, weight), dense))
        assert error <= 1.1 * dense_error, f"M={M}: root mean square error {error:.3g}, dense {dense_error:.3g}"


# ------------------------------------------------------------------------------------- what must not leak into a result
@dtypes
@pytest.mark.parametrize("K", [33, 64, 100, 576])
def test_a_nan_scale_stays_in_the_rows_of_its_block(lib, dtype, K):
    N, blocksize = 70, 32
    weight = Weight(N, K, blocksize)
    for block in (0, 5, weight.absmax.size - 1):
        weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == block, np.nan, 0.5).astype(np.float32)
        touched = np.arange(N * K).reshape(N, K) // blocksize == block
        for M in (2, 45):
            out = multiply(lib, torch.ones(M, K, dtype=dtype), weight)
            assert (out.isnan().numpy() == touched.any(axis=1)).all()


@dtypes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_activation_stays_in_its_token(lib, dtype, bad):
    for K in (33, 64, 65, 192):
        weight = Weight(40, K, 64)
        for M in (3, 45):
            A = torch.ones(M, K, dtype=dtype)
            A[1, 0] = A[M - 1, K - 1] = bad
            finite = multiply(lib, A, weight).isfinite().all(dim=1)
            assert finite.tolist() == [row not in (1, M - 1) for row in range(M)]


# ------------------------------------------------------------------------------------- threads, empty sizes, memory
@dtypes
@pytest.mark.parametrize("M, N, K", [(1, 1024, 3072), (9, 300, 2048), (48, 500, 1024), (400, 8, 1024), (90, 130, 1001)])
def test_the_number_of_threads_changes_nothing(lib, dtype, M, N, K):
    weight, A = Weight(N, K, 64, nested=True), torch.randn(M, K).to(dtype)
    bias = torch.randn(N).to(dtype)
    alone = multiply(lib, A, weight, bias, threads=1)
    for threads in (2, 3, 7):
        assert_same_floats(multiply(lib, A, weight, bias, threads=threads), alone)


@dtypes
def test_empty_sizes(lib, dtype):
    bias = torch.randn(5).to(dtype)
    nothing = Weight(5, 0, 64)
    assert_same_floats(multiply(lib, torch.empty(2, 0, dtype=dtype), nothing, bias), bias.expand(2, 5).contiguous())
    assert multiply(lib, torch.empty(2, 0, dtype=dtype), nothing).eq(0).all()
    assert multiply(lib, torch.empty(0, 64, dtype=dtype), Weight(5, 64, 64)).shape == (0, 5)
    assert multiply(lib, torch.ones(3, 64, dtype=dtype), Weight(0, 64, 64)).shape == (3, 0)


def multiply_at_page_edges() -> int:
    """Products of many shapes with every operand at the edge of readable memory: one byte too far kills the process."""
    lib, calls = load_library(), 0
    supported = [name for name in SETS if lib.bnb_cpu_isa_supported(name.encode())]
    shapes = (1, 1, 32), (3, 7, 32), (5, 33, 64), (17, 64, 64), (66, 96, 32), (7, 160, 4096), (65, 100, 64), (4, 192, 64), (9, 576, 128)
    for N, K, blocksize in shapes:
        for M in (1, 2, 5, 9, 45):
            for at_end in (False, True):
                weight = Weight(N, K, blocksize, nested=M != 2)
                for name in ("packed", "absmax", "codes", "code", "offset"):
                    if getattr(weight, name) is not None:
                        setattr(weight, name, at_page_edge(getattr(weight, name), at_end))
                for dtype in DTYPES:
                    bits = torch.int32 if dtype == torch.float32 else torch.int16
                    operands = (torch.randn(*shape).to(dtype).view(bits).numpy() for shape in ((M, K), (N,), (M, N)))
                    A, bias, out = (torch.from_numpy(at_page_edge(operand, at_end)) for operand in operands)
                    for name in supported:
                        lib.bnb_cpu_select_isa(name.encode())
                        sizes = M, N, K, blocksize, QUANT_TYPES["nf4"], DTYPES[dtype], 1
                        assert lib.bnb_cpu_gemm_4bit(A.data_ptr(), *weight.pointers(), bias.data_ptr(), out.data_ptr(), *sizes) == 0
                        calls += 1
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="the guard pages are made with Linux's mmap")
def test_nothing_is_read_or_written_outside_the_operands():
    here = str(Path(__file__).resolve().parent)
    command = [sys.executable, "-c", "import test_cpu_gemm as t; print(t.multiply_at_page_edges())"]
    path = os.pathsep.join([here, *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    assert int(done.stdout.split()[-1]) >= 270
