"""The CUDA kernels of 4-bit products, emulated: out = A . W^T + bias and its gradient, from the packed layout.

Where a result can be exact it is compared bit for bit: with rows of the identity as activations the product *is* the weight, rounded to the element
type. Accuracy is that of the contract: against float64, no more than 1.1 times the error of dequantising and multiplying in the element type.
"""

import ctypes as ct
import os
from pathlib import Path
import runpy
import subprocess
import sys

from native_cpu import DTYPES, QUANT_TYPES, Guarded, assert_same_floats, at_page_edge
from native_cuda import EmulatedLibrary, build_emulated_library, cuda, cuda_once, emulated_library, emulated_only  # noqa: F401  (fixtures among them)
import numpy as np
import pytest
from test_cpu_gemm import Weight
import torch

from bitsandbytes import codebooks
from bitsandbytes.backends.cuda import gemm, gemm_4bit_plan
from bitsandbytes.backends.cuda.gemm_4bit_plan import KERNELS, Plan, backward_plan, forward_plan
from bitsandbytes.backends.cuda.gemm_4bit_table import TABLES
from bitsandbytes.backends.default import ops as reference

HALVES = (torch.float16, torch.bfloat16)
SIMPLE = Plan(KERNELS["simple"], 0, 1)
SKINNY = [Plan(KERNELS["skinny"], tile, 1) for tile in (8, 16, 32)]
TILED = [Plan(KERNELS["tiled"], tile, splits) for tile, splits in ((16, 1), (16, 3), (32, 1), (32, 2), (64, 1), (64, 2), (128, 1), (128, 2))]
BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
dtypes = pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "fp16", "bf16"])
halves = pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"])
plans = pytest.mark.parametrize("plan", [SIMPLE, *SKINNY, *TILED], ids=lambda plan: "-".join(map(str, plan)))
tensor_plans = pytest.mark.parametrize("plan", [*SKINNY, *TILED], ids=lambda plan: "-".join(map(str, plan)))
backward_plans = pytest.mark.parametrize("tile, splits", [(16, 1), (16, 2), (32, 1), (32, 3), (64, 1), (64, 2)])

P, L, I = ct.c_void_p, ct.c_int64, ct.c_int32  # noqa: E741


@pytest.fixture(autouse=True)
def one_thread():
    """For the references, which are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def forget_devices():
    """The emulated device changes."""
    yield
    gemm._capability.cache_clear()


def random_of(*seed) -> np.random.Generator:
    return np.random.default_rng([abs(hash(part)) % 1000 if isinstance(part, str) else int(part) for part in seed])


def activations(random, M: int, K: int, dtype: torch.dtype, mean: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(random.standard_normal((M, K)) + mean).to(dtype)


def native_gemm(library):
    function = library._lib["bnb_cuda_gemm_4bit"]
    function.argtypes = [P] * 9 + [L] * 4 + [I] * 5 + [P, L, I, P]
    return function


def native_gemm_backward(library):
    function = library._lib["bnb_cuda_gemm_4bit_backward"]
    function.argtypes = [P] * 7 + [L] * 4 + [I] * 5 + [P, L, I, P]
    return function


def multiply(library, A, weight, plan=SIMPLE, bias=None, levels=None, status=0):
    """The native product, its outputs between guard bytes and full of other bytes before."""
    M, sums = A.shape[0], plan.splits * A.shape[0] * weight.N
    out, partial = Guarded(M * weight.N, A.dtype), Guarded(sums, torch.float32)
    addresses = (None if tensor is None else tensor.data_ptr() for tensor in (levels, bias))
    codes = QUANT_TYPES[weight.quant_type], DTYPES[A.dtype]
    sizes = M, weight.N, weight.K, weight.blocksize
    pointers = A.data_ptr(), *weight.pointers(), *addresses, out.pointer
    assert native_gemm(library)(*pointers, *sizes, *codes, *plan, partial.pointer, sums, 0, None) == status
    partial.check()
    return out.check().view(M, weight.N)


def multiply_backward(library, A, weight, tile=16, splits=1, status=0, kernel="tiled"):
    M, sums = A.shape[0], splits * A.shape[0] * weight.K
    out, partial = Guarded(M * weight.K, A.dtype), Guarded(sums, torch.float32)
    sizes = M, weight.N, weight.K, weight.blocksize
    codes = QUANT_TYPES[weight.quant_type], DTYPES[A.dtype]
    plan = Plan(KERNELS[kernel], tile, splits)
    pointers = A.data_ptr(), *weight.pointers(), out.pointer
    assert native_gemm_backward(library)(*pointers, *sizes, *codes, *plan, partial.pointer, sums, 0, None) == status
    partial.check()
    return out.check().view(M, weight.K)


def root_mean_square(errors: torch.Tensor) -> float:
    return errors.square().mean().sqrt().item()


def assert_as_good_as_dense(out, A, W, bias=None, note="") -> None:
    """``W`` [N, K] in fp32. In small results luck decides, so the bound has room for a unit in the last place of a few of them."""
    exact, dense = A.double() @ W.double().T, torch.nn.functional.linear(A, W.to(A.dtype), bias)
    if bias is not None:
        exact = exact + bias.double()
    error, dense_error = root_mean_square(out.double() - exact), root_mean_square(dense.double() - exact)
    luck = 0.4 * torch.finfo(A.dtype).eps * root_mean_square(exact) / (1 if A.dtype == torch.float32 else exact.numel() ** 0.5)
    assert error <= 1.1 * dense_error + luck, f"{note}: error {error:.4g}, dense {dense_error:.4g}"


# -------------------------------------------------------------------------------------- which weight is multiplied with which activation
EXACT_SHAPES = [(1, 32), (7, 64), (64, 96), (33, 192), (100, 160), (257, 128), (20, 1056)]


@dtypes
@pytest.mark.parametrize("N, K", [(1, 1), (5, 7), (3, 33), (9, 50), (20, 100), (13, 65), *EXACT_SHAPES])
def test_rows_of_the_identity_return_the_weight(cuda, dtype, N, K):
    for i, tokens in enumerate((1, 2, 5)):
        blocksize = BLOCKSIZES[(i + N) % len(BLOCKSIZES)]
        weight = Weight(N, K, blocksize, "nf4" if i % 2 else "fp4", nested=i == 1)
        chosen = torch.randperm(K)[:tokens]
        assert_same_floats(multiply(cuda, torch.eye(K, dtype=dtype)[chosen], weight), weight.values.T[chosen].to(dtype))


@halves
@pytest.mark.parametrize("plan", TILED, ids=lambda plan: "-".join(map(str, plan)))
def test_rows_of_the_identity_return_the_weight_from_tiles(cuda, dtype, plan):
    for i, (N, K) in enumerate(EXACT_SHAPES):
        weight = Weight(N, K, BLOCKSIZES[i % len(BLOCKSIZES)], "nf4" if i % 2 else "fp4", nested=i % 3 == 1)
        chosen = torch.randperm(K)[: (1, 20, 70)[i % 3]]
        assert_same_floats(multiply(cuda, torch.eye(K, dtype=dtype)[chosen], weight, plan), weight.values.T[chosen].to(dtype))


@halves
@pytest.mark.parametrize("plan", SKINNY, ids=lambda plan: "-".join(map(str, plan)))
def test_skinny_products_know_a_level_better_than_its_rounding(cuda, dtype, plan):
    """Two numbers of 16 bits stand for a level, so the only rounding that shows is that of the result."""
    for i, (N, K) in enumerate(EXACT_SHAPES):
        weight = Weight(N, K, BLOCKSIZES[i % len(BLOCKSIZES)], "nf4" if i % 2 else "fp4", nested=i % 3 == 1)
        chosen = torch.randperm(K)[: (1, 9, 17)[i % 3]]
        out, exact = multiply(cuda, torch.eye(K, dtype=dtype)[chosen], weight, plan), weight.values.T[chosen]
        error = ((out.double() - exact) / exact.abs().clamp_min(1e-3)).abs().max().item()
        assert error <= torch.finfo(dtype).eps * 0.51


@halves
@backward_plans
def test_rows_of_the_identity_return_the_weight_backward(cuda, dtype, tile, splits):
    for i, (N, K) in enumerate([(8, 32), (16, 64), (24, 96), (64, 160), (136, 192), (280, 288), (1000, 32)]):
        weight = Weight(N, K, BLOCKSIZES[i % len(BLOCKSIZES)], "nf4" if i % 2 else "fp4", nested=i % 3 == 1)
        chosen = torch.randperm(N)[: (1, 20, 70)[i % 3]]
        assert_same_floats(multiply_backward(cuda, torch.eye(N, dtype=dtype)[chosen], weight, tile, splits), weight.values[chosen].to(dtype))


@pytest.mark.parametrize("blocksize", [1, 3, 32, 40, 64, 100, 4096])
def test_any_block_size_is_exact(cuda_once, blocksize):
    for K in (32, 61, 64, 96):
        weight = Weight(12, K, blocksize, nested=True)
        for plan in (SIMPLE, SKINNY[0], TILED[0]):  # the last two leave to the first what they cannot do
            assert_same_floats(multiply(cuda_once, torch.eye(K), weight, plan), weight.values.T.contiguous())


@dtypes
def test_levels_of_the_caller(cuda_once, dtype):
    levels = torch.linspace(-0.8, 1.3, 16)
    weight = Weight(40, 128, 64, nested=True)
    codes = np.stack([weight.packed >> 4, weight.packed & 15], axis=-1).reshape(40, 128)
    W = levels[torch.from_numpy(codes.astype(np.int64))] * torch.from_numpy(np.repeat(weight.scales, 64).reshape(40, 128))
    A = activations(random_of(1), 9, 128, dtype, mean=0.5)
    for plan in (SIMPLE, SKINNY[1], TILED[0]):
        assert_as_good_as_dense(multiply(cuda_once, A, weight, plan, levels=levels), A, W)


# ------------------------------------------------------------------------------------------------------------------- accuracy
@plans
@halves
def test_every_number_of_tokens(cuda_once, plan, dtype):
    weight, bias = Weight(37, 192, 64, nested=True), activations(random_of(5), 1, 37, dtype)[0]
    A = activations(random_of(3), 130, 192, dtype)
    for M in [*range(1, 19), 24, 25, 32, 33, 40, 64, 65, 129]:
        assert_as_good_as_dense(multiply(cuda_once, A[:M], weight, plan, bias), A[:M], weight.values, bias, f"M={M}")


@backward_plans
@halves
def test_every_number_of_tokens_backward(cuda_once, tile, splits, dtype):
    weight, A = Weight(200, 96, 64, nested=True), activations(random_of(4), 130, 200, dtype)
    for M in [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 129]:
        out = multiply_backward(cuda_once, A[:M], weight, tile, splits)
        assert_as_good_as_dense(out, A[:M], weight.values.T, note=f"M={M}")


@dtypes
@pytest.mark.parametrize("mean", [0, 0.5, 2])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_is_that_of_a_dense_product_whatever_the_mean(cuda_once, dtype, mean, quant_type):
    """Levels rounded to 16 bits before they are scaled would fail this many times over at mean 2."""
    for N, K, blocksize in ((64, 1024, 64), (100, 992, 32), (100, 1152, 4096)):
        packed, absmax = reference.quantize_4bit(activations(random_of(K), N, K, torch.float32) * 0.02, blocksize, quant_type, torch.uint8)
        weight = Weight(N, K, blocksize, quant_type)
        weight.packed, weight.absmax = packed.view(-1).numpy(), absmax.numpy()
        weight.scales = weight.absmax
        for M, plan in ((1, SIMPLE), (1, SKINNY[0]), (8, SKINNY[2]), (16, SKINNY[1]), (40, TILED[2])):
            if plan is SIMPLE or dtype in HALVES:
                A = activations(random_of(M, K), M, K, dtype, mean)
                assert_as_good_as_dense(multiply(cuda_once, A, weight, plan), A, weight.values, note=f"M={M} {plan}")
        if dtype in HALVES and N % 8 == 0:
            A = activations(random_of(3, K), 20, N, dtype, mean)
            assert_as_good_as_dense(multiply_backward(cuda_once, A, weight), A, weight.values.T, note="backward")


@tensor_plans
@halves
def test_every_block_size_and_rows_that_end_within_a_block(cuda_once, plan, dtype):
    random = random_of(6)
    for blocksize in BLOCKSIZES:
        for K in (32, 96, 128, 320, 1152):
            weight = Weight(20, K, blocksize, nested=blocksize % 3 == 1)
            A = activations(random, 6, K, dtype, mean=0.5)
            assert_as_good_as_dense(multiply(cuda_once, A, weight, plan), A, weight.values, note=f"K={K} blocksize={blocksize}")


@dtypes
def test_products_of_random_shapes_and_alignments(cuda_once, dtype):
    """What tensor cores cannot do, the simple kernel does: any K, addresses aligned to an element only."""
    random = random_of(7)
    for case in range(40):
        M, N, K = (int(random.choice(sizes)) for sizes in ((1, 2, 3, 5, 9, 20, 40), (1, 7, 64, 100), (31, 32, 33, 50, 64, 96, 104, 250, 1000)))
        weight = Weight(N, K, int(random.choice(BLOCKSIZES)), str(random.choice(["fp4", "nf4"])), nested=bool(case % 2), seed=case)
        bias = activations(random, 1, N, dtype)[0] if case % 4 < 2 else None
        A = torch.empty(M * K + 1, dtype=dtype)[1:].view(M, K) if case % 3 else torch.empty(M, K, dtype=dtype)
        A.copy_(activations(random, M, K, dtype))
        if case % 5 == 0:
            weight.packed = np.concatenate([np.zeros(1, np.uint8), weight.packed])[1:]
        plan = (SIMPLE, SKINNY[1], TILED[0])[case % 3]
        assert_as_good_as_dense(multiply(cuda_once, A, weight, plan, bias), A, weight.values, bias, f"{M} {N} {K} {plan}")


@halves
@pytest.mark.parametrize("capability", [75, 80, 86, 90, 120])
def test_every_architecture(cuda_once, dtype, capability):
    """They differ in how much shared memory there is, and 7.5 has tensor cores for float16 alone; what it lacks the simple kernel does."""
    cuda_once.be(capability=capability)
    weight, A = Weight(300, 640, 64), activations(random_of(8), 24, 640, dtype, mean=0.5)
    for plan in (SKINNY[1], TILED[0], TILED[3], TILED[4], TILED[6]):
        assert_as_good_as_dense(multiply(cuda_once, A, weight, plan), A, weight.values, note=str(plan))
    A = activations(random_of(9), 24, 304, dtype)
    backward = Weight(304, 640, 64)
    if capability == 75:
        multiply_backward(cuda_once, A, backward, status=2)
    else:
        assert_as_good_as_dense(multiply_backward(cuda_once, A, backward, 32), A, backward.values.T)


@halves
@pytest.mark.parametrize("capability", [known for known in TABLES if known not in ("default", 75)])
def test_every_tile_of_a_table_fits_its_devices(cuda_once, emulated_only, dtype, capability):
    """Where it did not fit another kernel took over, which adds up in another order."""
    weight, A, grad = Weight(300, 640, 64), activations(random_of(8), 70, 640, dtype), activations(random_of(9), 70, 304, dtype)
    backward = Weight(304, 640, 64)
    tiles = {
        direction: {entry[2] for entries in TABLES[capability][direction].values() for entry in entries if entry[1] == "tiled"}
        for direction in ("forward", "backward")
    }
    assert max(tiles["forward"], default=0) <= (128 if capability in (90, 100) else 64)
    results = []
    for device in (90, capability):
        cuda_once.be(capability=device)
        forward = [multiply(cuda_once, A, weight, Plan(KERNELS["tiled"], tile, 1)) for tile in sorted(tiles["forward"])]
        results.append([*forward, *(multiply_backward(cuda_once, grad, backward, tile) for tile in sorted(tiles["backward"]))])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("capability, built_for, usable", [
    (86, 86, 86), (86, 80, 86), (86, 75, 75), (75, 70, 70), (90, 80, 80), (103, 100, 103), (121, 120, 121), (120, 90, 90), (75, 60, 60),
])  # fmt: skip
def test_capability_is_that_of_older_code_where_there_is_no_other(cuda_once, emulated_only, capability, built_for, usable):
    cuda_once.be(capability=capability, built_for=built_for)
    assert cuda_once.bnb_cuda_capability(0) == usable


@dtypes
@pytest.mark.parametrize("capability, built_for", [(86, 75), (90, 70), (120, 60), (120, 80)])
def test_a_library_of_older_code_serves_a_newer_device(cuda_once, emulated_only, dtype, capability, built_for):
    """The driver translates it, but kernels that need later instructions are not in it."""
    cuda_once.be(capability=capability, built_for=built_for)
    weight = Weight(64, 128, 64, nested=True)
    state, statistics = state_of(weight)
    for M in (1, 9, 70, 300):
        A, grad = torch.randn(M, 128).to(dtype), torch.randn(M, 64).to(dtype)
        assert_as_good_as_dense(gemm.gemm_4bit(A, *state, **statistics), A, weight.values, note=f"M={M}")
        assert_as_good_as_dense(gemm.gemm_4bit_backward(grad, *state, **statistics), grad, weight.values.T, note=f"backward M={M}")


# ------------------------------------------------------------------------------------- the same bytes in every run and order of threads
@halves
def test_runs_and_orders_of_threads_give_the_same_bytes(cuda_once, dtype):
    weight, A = Weight(300, 2048, 64, nested=True), activations(random_of(10), 40, 2048, dtype)
    wide = Weight(640, 320, 64, nested=True)
    results = []
    for reversed_threads in (False, False, True):
        cuda_once.be(reversed_threads=reversed_threads)
        forward = [multiply(cuda_once, A[:M], weight, plan) for M, plan in ((3, SIMPLE), (8, SKINNY[2]), (16, SKINNY[0]), (40, TILED[3]))]
        results.append([*forward, multiply_backward(cuda_once, A[:, :640].contiguous(), wide, 32, 3)])
    for other in results[1:]:
        for first, second in zip(results[0], other):
            assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------- what must not leak into a result
@plans
@halves
def test_a_nan_scale_stays_in_the_rows_of_its_block(cuda_once, plan, dtype):
    N, K, blocksize = 70, 192, 64
    weight = Weight(N, K, blocksize)
    for block in (0, 5, weight.absmax.size - 1):
        weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == block, np.nan, 0.5).astype(np.float32)
        touched = np.arange(N * K).reshape(N, K) // blocksize == block
        for M in (2, 17):
            out = multiply(cuda_once, torch.ones(M, K, dtype=dtype), weight, plan)
            assert (out.isnan().numpy() == touched.any(axis=1)).all()


@plans
@halves
def test_an_infinite_scale_gives_infinity(cuda_once, plan, dtype):
    """Not NaN, which it would be if it met the zeros that fill up a tile."""
    weight = Weight(72, 160, 32)
    weight.packed[:] = 0xFF
    weight.absmax[-1] = np.inf
    out = multiply(cuda_once, torch.ones(3, 160, dtype=dtype), weight, plan)
    assert out[:, 71].isposinf().all() and out[:, :71].isfinite().all()
    if plan.kernel == KERNELS["tiled"] and plan.tile <= 64:
        out = multiply_backward(cuda_once, torch.ones(3, 72, dtype=dtype), weight, plan.tile)
        assert out[:, 128:].isposinf().all() and out[:, :128].isfinite().all()


@plans
@halves
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_activation_stays_in_its_token(cuda_once, plan, dtype, bad):
    for K in (64, 160, 192):
        weight = Weight(40, K, 32)
        for M in (3, 21):
            A = torch.ones(M, K, dtype=dtype)
            A[1, 0] = A[M - 1, K - 1] = bad
            finite = multiply(cuda_once, A, weight, plan).isfinite().all(dim=1)
            assert finite.tolist() == [row not in (1, M - 1) for row in range(M)]


@halves
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_non_finite_values_stay_in_their_place_backward(cuda_once, dtype, tile):
    N, K = 152, 320
    weight = Weight(N, K, 64)
    weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == 7, np.nan, 0.5).astype(np.float32)
    touched = (np.arange(N * K).reshape(N, K) // 64 == 7).any(axis=0)
    out = multiply_backward(cuda_once, torch.ones(21, N, dtype=dtype), weight, tile)
    assert (out.isnan().numpy() == touched).all()
    A = torch.ones(21, N, dtype=dtype)
    A[20, N - 1] = torch.inf
    finite = multiply_backward(cuda_once, A, Weight(N, K, 64), tile).isfinite().all(dim=1)
    assert finite.tolist() == [True] * 20 + [False]


def multiply_at_page_edges() -> int:
    """Products of many shapes with every operand at the edge of readable memory: one byte too far kills the process."""
    library, calls = EmulatedLibrary(build_emulated_library()), 0
    shapes = (1, 1, 32), (3, 7, 32), (70, 96, 32), (7, 160, 4096), (65, 100, 64), (24, 192, 64), (264, 288, 128)
    for N, K, blocksize in shapes:
        for at_end in (False, True):
            for M in (1, 17):
                weight = Weight(N, K, blocksize, nested=M == 1)
                for name in ("packed", "absmax", "codes", "code", "offset"):
                    if getattr(weight, name) is not None:
                        setattr(weight, name, at_page_edge(getattr(weight, name), at_end))
                for dtype in DTYPES:
                    bits = torch.int32 if dtype == torch.float32 else torch.int16
                    arrays = (torch.randn(*shape).to(dtype).view(bits).numpy() for shape in ((M, K), (1, N), (M, N)))
                    A, bias, grad = (torch.from_numpy(at_page_edge(array, at_end)).view(dtype) for array in arrays)
                    for plan in (SIMPLE, *(SKINNY + TILED[1::2] if dtype in HALVES else [])):
                        multiply(library, A, weight, plan, bias[0])
                        calls += 1
                    if dtype in HALVES and N % 8 == 0 and K % 32 == 0:
                        for tile in (16, 32, 64):
                            multiply_backward(library, grad, weight, tile, 2)
                            calls += 1
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="the guard pages are made with Linux's mmap")
def test_nothing_is_read_outside_the_operands(emulated_library):
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", "import test_cuda_gemm as t; print(t.multiply_at_page_edges())"]
    path = os.pathsep.join([str(here), str(here.parent), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    assert int(done.stdout.split()[-1]) >= 400


@dtypes
def test_empty_sizes(cuda_once, dtype):
    nothing, bias = Weight(5, 0, 64), torch.randn(5).to(dtype)
    for plan in (SIMPLE, SKINNY[0], TILED[0]):
        assert torch.equal(multiply(cuda_once, torch.empty(2, 0, dtype=dtype), nothing, plan, bias), bias.expand(2, 5))
        assert multiply(cuda_once, torch.empty(0, 64, dtype=dtype), Weight(5, 64, 64), plan).shape == (0, 5)
        assert multiply(cuda_once, torch.empty(3, 64, dtype=dtype), Weight(0, 64, 64), plan).shape == (3, 0)


def test_bad_arguments_are_refused(cuda_once):
    weight, A = Weight(8, 64, 64), torch.ones(2, 64)
    bad = 1
    for plan in (Plan(0, 0, 0), Plan(0, 0, -1)):
        multiply(cuda_once, A, weight, plan, status=bad)
    function, out = native_gemm(cuda_once), torch.zeros(2, 8)
    pointers = [A.data_ptr(), *weight.pointers(), None, None, out.data_ptr()]
    good = [*pointers, 2, 8, 64, 64, 2, 0, 0, 0, 1, None, 0, 0, None]
    assert function(*good) == 0
    for position, value in ((0, None), (1, None), (2, None), (8, None), (9, -1), (10, 1 << 61), (12, 0), (13, 3), (14, 7), (17, 2)):
        assert function(*[value if i == position else argument for i, argument in enumerate(good)]) == bad


# ---------------------------------------------------------------------------------------------------------------- the backend's functions
def state_of(weight: Weight, dtype=torch.uint8):
    """B, shapeB, absmax, blocksize, quant_type, and nested statistics by name."""
    packed = torch.from_numpy(weight.packed).view(dtype).view(-1, 1)
    nested = {}
    if weight.codes is not None:
        nested = {"absmax_8bit": torch.from_numpy(weight.codes), "absmax_code": torch.from_numpy(weight.code), "absmax_offset": torch.tensor(0.7)}
    return (packed, (weight.N, weight.K), torch.from_numpy(weight.absmax), weight.blocksize, weight.quant_type), nested


@dtypes
@pytest.mark.parametrize("nested", [False, True])
def test_operator_and_its_gradient(cuda_once, dtype, nested):
    """From one token to more than any kernel is for; shapes that tensor cores take, and others."""
    for N, K in ((64, 96), (72, 192), (7, 65), (33, 128)):
        weight = Weight(N, K, 32, nested=nested)
        state, statistics = state_of(weight)
        bias = torch.randn(N).to(dtype)
        for rows in ((), (1,), (2, 9), (70,), (3000 if K == 65 else 40,)):
            A, grad = torch.randn(*rows, K).to(dtype), torch.randn(*rows, N).to(dtype)
            out, back = gemm.gemm_4bit(A, *state, bias, **statistics), gemm.gemm_4bit_backward(grad, *state, **statistics)
            assert out.shape == (*rows, N) and back.shape == (*rows, K) and out.dtype == back.dtype == dtype
            assert_as_good_as_dense(out.view(-1, N), A.view(-1, K), weight.values, bias, f"{N} {K} {rows}")
            assert_as_good_as_dense(back.view(-1, K), grad.view(-1, N), weight.values.T, None, f"backward {N} {K} {rows}")


@dtypes
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("K", [256, 96])
def test_dense_slabs_are_bounded_and_exact(cuda_once, monkeypatch, dtype, nested, K):
    """A slab at a time gives the bytes of the whole, and only rows that share blocks keep the whole together."""
    dense, sizes = gemm.dequantize_4bit_into, []
    monkeypatch.setattr(gemm, "dequantize_4bit_into", lambda out, *rest: sizes.append(out.numel()) or dense(out, *rest))
    monkeypatch.setattr(gemm, "forward_plan", lambda *shape: None)
    monkeypatch.setattr(gemm, "backward_plan", lambda *shape: None)
    limit = 64 * K * dtype.itemsize
    monkeypatch.setattr(gemm, "table_of", lambda capability: {"slab_bytes": limit})
    weight = Weight(200, K, 64, nested=nested)
    state, statistics = state_of(weight)
    for M in (1, 30):
        A, grad, bias = torch.randn(M, K).to(dtype), torch.randn(M, 200).to(dtype), torch.randn(200).to(dtype)
        out, back = gemm.gemm_4bit(A, *state, bias, **statistics), gemm.gemm_4bit_backward(grad, *state, **statistics)
        torch.testing.assert_close(out, torch.nn.functional.linear(A, weight.values.to(dtype), bias))
        torch.testing.assert_close(back, grad @ weight.values.to(dtype))
    assert max(sizes) == 200 * K if K % 64 else max(sizes) <= max(64 * K, 200 * 64)


@dtypes
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_storage_types_and_views(cuda_once, dtype, storage):
    weight = Weight(64, 128, 64)
    state, _ = state_of(weight, storage)
    for A in (torch.randn(128, 6).to(dtype).T, torch.randn(6, 256).to(dtype)[:, ::2], torch.randn(6 * 128 + 3).to(dtype)[3:].view(6, 128)):
        assert_as_good_as_dense(gemm.gemm_4bit(A, *state), A.contiguous(), weight.values)
        back = gemm.gemm_4bit_backward(A[:, :64], *state)
        assert_as_good_as_dense(back, A[:, :64].contiguous(), weight.values.T)


@halves
def test_a_weight_that_vectors_cannot_be_read_from_is_dequantised(cuda_once, monkeypatch, dtype):
    """The kernel that takes any address is for a few tokens."""
    weight = Weight(64, 128, 64)
    (packed, *rest), _ = state_of(weight)
    unaligned = torch.cat([packed[:1], packed])[1:]
    dense, calls = gemm.dequantize_4bit_into, []
    monkeypatch.setattr(gemm, "dequantize_4bit_into", lambda *arguments: calls.append(arguments) or dense(*arguments))
    for B, M, expected in ((packed.clone(), 32, 0), (unaligned, 4, 0), (unaligned, 32, 1)):
        calls.clear()
        A = torch.randn(M, 128).to(dtype)
        assert_as_good_as_dense(gemm.gemm_4bit(A, B, *rest), A, weight.values)
        assert len(calls) == expected


@dtypes
def test_gemv_takes_levels_from_the_device_and_any_number_of_tokens(cuda_once, dtype):
    for N, K in ((64, 96), (7, 65)):
        weight = Weight(N, K, 32)
        (B, shape, absmax, blocksize, _), _ = state_of(weight)
        for rows in ((1,), (2, 9), (300,)):
            A = torch.randn(*rows, K).to(dtype)
            out = gemm.gemv_4bit(A, B, shape, absmax, codebooks.levels("nf4"), blocksize)
            assert_as_good_as_dense(out.view(-1, N), A.view(-1, K), weight.values, note=f"{N} {K} {rows}")
            into = torch.empty(N, *rows[:-1], rows[-1], dtype=dtype).movedim(0, -1)
            gemm.gemv_4bit_out(A, B, shape, absmax, codebooks.levels("nf4"), blocksize, into)
            assert torch.equal(into, out)


def test_a_16_bit_offset_counts_as_its_fp32_value(cuda_once):
    weight = Weight(16, 64, 32, nested=True)
    state, statistics = state_of(weight)
    offset = torch.tensor(0.7, dtype=torch.float16)
    A = torch.randn(3, 64)
    expected = gemm.gemm_4bit(A, *state, **{**statistics, "absmax_offset": offset.float()})
    assert torch.equal(gemm.gemm_4bit(A, *state, **{**statistics, "absmax_offset": offset}), expected)


# ------------------------------------------------------------------------------------------------------------------------- the table
@pytest.mark.parametrize("capability", TABLES)
def test_tables_are_well_formed(capability):
    table = TABLES[capability]
    assert table["origin"] == "predicted" or table["origin"].startswith("measured on ")
    for direction in ("forward", "backward"):
        for entries in table[direction].values():
            tokens = [entry[0] for entry in entries]
            assert tokens == sorted(set(tokens)) and tokens[0] >= 1
            for _, kernel, tile, splits in entries:
                assert tile in {"skinny": (8, 16, 32), "tiled": (16, 32, 64, 128), "warpgroup": (64, 128, 256)}[kernel] and splits >= 1
                assert kernel != "skinny" or (direction == "forward" and splits == 1)


@pytest.mark.parametrize("capability", [75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121, 60, 200])
def test_every_device_and_shape_has_a_plan(capability):
    for N, K in ((8, 32), (4096, 4096), (128256, 8192), (32, 100000)):
        for M in (1, 16, 64, 128, 5000):
            forward, backward = forward_plan(capability, True, M, N, K), backward_plan(capability, True, M, N, K)
            assert forward is None or forward.splits * M * N * 4 <= gemm_4bit_plan.table_of(capability)["partial_bytes"] or forward.splits == 1
            assert (forward is not None) >= (M <= 64)
            assert (backward is not None) >= (M <= 128 and capability >= 80)
            assert backward_plan(capability, False, M, N, K) is None
        assert forward_plan(capability, False, 1, N, K) == SIMPLE and forward_plan(capability, False, 5000, N, K) is None


def test_predicted_tables_are_those_of_the_script():
    path = Path(__file__).resolve().parent.parent / "benchmarking" / "tune_gemm_4bit.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside these tests")
    script = runpy.run_path(str(path))
    for capability in (75, 90, "default"):
        if TABLES[capability]["origin"] == "predicted":
            assert script["table"](script["_predict"](capability), "predicted", has_backward=capability != 75) == TABLES[capability]


def test_a_newer_device_of_a_family_follows_the_older_one():
    assert gemm_4bit_plan.table_of(87) is TABLES[86] and gemm_4bit_plan.table_of(121) is TABLES[120]
    assert gemm_4bit_plan.table_of(110) is TABLES["default"]


# --------------------------------------------------------------------------------------------------------- names of the published library
def names_of(dtype):
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]


def as_pointer(tensor):
    return None if tensor is None else ct.c_void_p(tensor.data_ptr())


@dtypes
def test_naive_gemv_as_other_projects_call_it(cuda_once, dtype):
    """With plain ctypes values and no argtypes, as published projects do."""
    function = cuda_once._lib[f"cgemm_4bit_inference_naive_{names_of(dtype)}"]
    for N, K in ((40, 64), (40, 192), (9, 50)):
        weight = Weight(N, K, 64)
        A, out, levels = torch.randn(1, 1, K).to(dtype), torch.empty(1, 1, N, dtype=dtype), codebooks.levels("nf4").contiguous()
        packed, absmax = torch.from_numpy(weight.packed), torch.from_numpy(weight.absmax)
        m, n, k, lda, ldb, ldc = map(ct.c_int32, (N, 1, K, N, (K + 1) // 2, N))
        function(m, n, k, *map(as_pointer, (A, packed, absmax, levels, out)), lda, ldb, ldc, ct.c_int32(64), ct.c_void_p(None))
        assert_as_good_as_dense(out[0], A[0], weight.values)


@dtypes
@pytest.mark.parametrize("nested", [False, True])
def test_gemm_by_its_published_name(cuda_once, dtype, nested):
    function = cuda_once._lib[f"cgemm_4bit_{names_of(dtype)}"]
    weight = Weight(40, 128, 64, "fp4" if nested else "nf4", nested=nested)
    state, statistics = state_of(weight)
    for M, bias in ((1, None), (40, torch.randn(40).to(dtype))):
        A, out = torch.randn(M, 128).to(dtype), torch.empty(M, 40, dtype=dtype)
        tensors = A, state[0], state[2], *(statistics.get(name) for name in ("absmax_8bit", "absmax_code", "absmax_offset")), out, bias
        function(*map(as_pointer, tensors), *map(ct.c_int, (M, 40, 128, 64, QUANT_TYPES[weight.quant_type])), ct.c_void_p(None))
        assert_as_good_as_dense(out, A, weight.values, bias)


def test_published_names_leave_the_output_alone_if_arguments_are_wrong(cuda_once):
    out = torch.full((1, 8), 3.0)
    function = cuda_once._lib["cgemm_4bit_inference_naive_fp32"]
    function(*map(ct.c_int, (8, 1, 64)), None, None, None, None, as_pointer(out), *map(ct.c_int, (8, 32, 8, 64)), None)
    cuda_once._lib["cgemm_4bit_fp32"](*[None] * 6, as_pointer(out), None, *map(ct.c_int, (1, 8, 64, 64, 2)), None)
    assert out.eq(3).all()
