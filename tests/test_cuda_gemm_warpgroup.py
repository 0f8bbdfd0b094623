"""The 4-bit product by warp groups of sm_90a, emulated (csrc/cuda/emulation_hopper.cpp) or on a GPU that has them.

The demands are those of test_cuda_gemm.py: with rows of the identity as activations the result *is* the dequantised weight; with others its error is
that of dequantising and multiplying in the element type.
"""

import os
from pathlib import Path
import runpy
import subprocess
import sys

from native_cpu import DTYPES, QUANT_TYPES, assert_same_floats, at_page_edge
from native_cuda import EmulatedLibrary, build_emulated_library, cuda, cuda_once, emulated_library, emulated_only, here  # noqa: F401  (fixtures)
import numpy as np
import pytest
from test_cpu_gemm import Weight
import test_cuda_gemm
from test_cuda_gemm import BLOCKSIZES, activations, assert_as_good_as_dense, forget_devices, halves, one_thread, random_of  # noqa: F401  (fixtures)
import torch

from bitsandbytes.backends.cuda import gemm
from bitsandbytes.backends.cuda.gemm_4bit_plan import KERNELS, Plan, backward_plan, forward_plan
from bitsandbytes.backends.cuda.gemm_4bit_table import TABLES
from bitsandbytes.backends.default import ops as reference

TILES = (64, 128, 256)  # tokens of a block; its rows are 256, 256, 128, and its columns at once 128, 128, 64
PLANS = [Plan(KERNELS["warpgroup"], tile, splits) for tile in TILES for splits in (1, 3)]
plans = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan)))
GUARD = 64  # elements on both sides of a result


@pytest.fixture(autouse=True)
def on_hopper(request):
    """On another GPU there is nothing to test; the emulated device must do it this way and no other."""
    if "emulated_library" not in request.fixturenames:
        yield
        return
    library = request.getfixturevalue("emulated_library")
    if not isinstance(library, EmulatedLibrary):
        library.be(capability=90)
    before = group_products(library)
    yield
    assert isinstance(before, str) or group_products(library) > before


def group_products(library):
    """How many products of warp groups the emulation has computed."""
    return library.bnb_emulation_group_products() if isinstance(library, EmulatedLibrary) else "known to the GPU"


def call(function, library, A, weight, plan, width, others, offset):
    """A native product on the device of ``A``, on the CPU. Its result lies ``offset`` elements off a multiple of 16 bytes, between guards."""
    count = A.shape[0] * width
    out = torch.full((GUARD + offset + count + GUARD,), 3.0, dtype=A.dtype)
    partial = torch.full((plan.splits * count + GUARD,), 3.0) if plan.splits > 1 else torch.empty(0)
    state = weight.packed, weight.absmax, weight.codes, weight.code, weight.offset
    tensors = [A, *(None if array is None else here(torch.from_numpy(array)) for array in state), *others]
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    sizes = A.shape[0], weight.N, weight.K, weight.blocksize
    codes = QUANT_TYPES[weight.quant_type], DTYPES[A.dtype]
    room, begin = max(partial.numel() - GUARD, 0), GUARD + offset
    assert function(*pointers, out[begin:].data_ptr(), *sizes, *codes, *plan, partial.data_ptr(), room, *library.where) == 0
    out, partial = out.cpu(), partial.cpu()
    assert (out[:begin] == 3).all() and (out[begin + count :] == 3).all() and (partial[room:] == 3).all(), "wrote outside the result"
    return out[begin : begin + count].view(-1, width)


def multiply(library, A, weight, plan, bias=None, levels=None, offset=0):
    return call(test_cuda_gemm.native_gemm(library), library, A, weight, plan, weight.N, (levels, bias), offset)


def multiply_backward(library, A, weight, plan, offset=0):
    return call(test_cuda_gemm.native_gemm_backward(library), library, A, weight, plan, weight.K, (), offset)


def assert_good(library, A, weight, plan, bias=None, levels=None, note=""):
    values = weight.values if levels is None else levelled(weight, levels)
    out = multiply(library, here(A), weight, plan, None if bias is None else here(bias), None if levels is None else here(levels))
    assert_as_good_as_dense(out, A.cpu(), values, None if bias is None else bias.cpu(), note)


def assert_good_backward(library, A, weight, plan, note=""):
    assert_as_good_as_dense(multiply_backward(library, here(A), weight, plan), A.cpu(), weight.values.T, None, note)


def levelled(weight, levels):
    """The weight with other levels than its type's."""
    codes = np.stack([weight.packed >> 4, weight.packed & 15], axis=-1).reshape(weight.N, weight.K).astype(np.int64)
    scales = np.repeat(weight.scales, weight.blocksize)[: codes.size].reshape(codes.shape)
    return levels.cpu()[torch.from_numpy(codes)] * torch.from_numpy(scales)


# -------------------------------------------------------------------------------------- which weight is multiplied with which activation
@halves
@plans
def test_rows_of_the_identity_return_the_weight(cuda, plan, dtype):
    """Tails in every direction; fewer columns than a chunk, and more chunks than the ring has stages."""
    for i, (N, K) in enumerate([(1, 32), (7, 64), (64, 96), (33, 192), (100, 160), (257, 128), (132, 1056)]):
        weight = Weight(N, K, BLOCKSIZES[i % len(BLOCKSIZES)], "nf4" if i % 2 else "fp4", nested=i % 3 == 1)
        chosen = torch.arange((1, 70, plan.tile + 9)[i % 3], device="cpu") * 7 % K
        eye = here(torch.eye(K, dtype=dtype, device="cpu")[chosen])
        assert_same_floats(multiply(cuda, eye, weight, plan), weight.values.T[chosen].to(dtype))


@halves
@plans
def test_rows_of_the_identity_return_the_weight_backward(cuda, plan, dtype):
    for i, (N, K) in enumerate([(8, 32), (72, 800), (64, 160), (280, 288), (648, 32)]):
        weight = Weight(N, K, BLOCKSIZES[i % len(BLOCKSIZES)], "nf4" if i % 2 else "fp4", nested=i % 3 == 1)
        chosen = torch.arange((1, 70, plan.tile + 9)[i % 3], device="cpu") * 7 % N
        eye = here(torch.eye(N, dtype=dtype, device="cpu")[chosen])
        assert_same_floats(multiply_backward(cuda, eye, weight, plan), weight.values[chosen].to(dtype))


@halves
@plans
def test_every_block_size_and_rows_that_end_within_a_block(cuda_once, plan, dtype):
    for i, blocksize in enumerate(BLOCKSIZES):
        K = (96, 320, 1152)[i % 3]
        weight, backward = Weight(20, K, blocksize, nested=i % 2 == 1), Weight(72, K // 3, blocksize, nested=i % 2 == 1)
        note = f"K={K} blocksize={blocksize}"
        assert_good(cuda_once, activations(random_of(6), 6, K, dtype, mean=0.5), weight, plan, note=note)
        if backward.K % 32 == 0:
            assert_good_backward(cuda_once, activations(random_of(7), 6, 72, dtype, mean=0.5), backward, plan, note)


@halves
def test_levels_of_the_caller(cuda_once, dtype):
    levels = torch.linspace(-0.8, 1.3, 16)
    A = activations(random_of(1), 9, 128, dtype, mean=0.5)
    for plan in PLANS:
        assert_good(cuda_once, A, Weight(40, 128, 64, nested=True), plan, levels=levels)


# ------------------------------------------------------------------------------------------------------------------- accuracy
@halves
@plans
def test_every_number_of_tokens(cuda_once, plan, dtype):
    """With rows that come in fours, whose results are stored as vectors, and others; and with a result that vectors would not reach."""
    A = activations(random_of(3), 300, 192, dtype)
    for N, tokens in ((37, (1, 64, 65, 129, 300)), (40, (2, 257))):
        weight, bias = Weight(N, 192, 64, nested=True), activations(random_of(5), 1, N, dtype)[0]
        for M in tokens:
            assert_good(cuda_once, A[:M], weight, plan, bias, note=f"M={M} N={N}")
        out = multiply(cuda_once, here(A[:9]), weight, plan, here(bias))
        assert torch.equal(multiply(cuda_once, here(A[:9]), weight, plan, here(bias), offset=1), out)
    weight = Weight(192, 96, 64, nested=True)
    for M in (1, 64, 65, 300):
        assert_good_backward(cuda_once, A[:M], weight, plan, f"backward M={M}")
    out = multiply_backward(cuda_once, here(A[:9]), weight, plan)
    assert torch.equal(multiply_backward(cuda_once, here(A[:9]), weight, plan, offset=1), out)


@halves
@pytest.mark.parametrize("mean", [0, 0.5, 2])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_error_is_that_of_a_dense_product_whatever_the_mean(cuda_once, dtype, mean, quant_type):
    for N, K, blocksize in ((64, 1024, 64), (100, 992, 32)):
        packed, absmax = reference.quantize_4bit(activations(random_of(K), N, K, torch.float32) * 0.02, blocksize, quant_type, torch.uint8)
        weight = Weight(N, K, blocksize, quant_type)
        weight.packed, weight.absmax = packed.view(-1).cpu().numpy(), absmax.cpu().numpy()
        weight.scales = weight.absmax
        for plan in PLANS[::2]:
            assert_good(cuda_once, activations(random_of(plan.tile, K), 40, K, dtype, mean), weight, plan, note=f"{plan} K={K}")
            if N % 8 == 0:
                assert_good_backward(cuda_once, activations(random_of(plan.tile, N), 40, N, dtype, mean), weight, plan, f"backward {plan}")


@halves
def test_runs_and_orders_of_threads_give_the_same_bytes(cuda_once, dtype):
    weight, A = Weight(140, 800, 64, nested=True), here(activations(random_of(10), 70, 800, dtype))
    backward = Weight(800, 160, 64, nested=True)
    results = []
    for reversed_threads in (False, False, True):
        cuda_once.be(reversed_threads=reversed_threads)
        forward = [multiply(cuda_once, A, weight, plan) for plan in PLANS]
        results.append([*forward, *(multiply_backward(cuda_once, A, backward, plan) for plan in PLANS)])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[0], results[2]))


# ------------------------------------------------------------------------------------------------------- what must not leak into a result
@halves
@plans
def test_values_that_are_not_finite_stay_in_their_place(cuda_once, plan, dtype):
    N, K = 70, 160
    weight = Weight(N, K, 32)
    for block in (0, 5, weight.absmax.size - 1):
        weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == block, np.nan, 0.5).astype(np.float32)
        touched = (np.arange(N * K).reshape(N, K) // 32 == block).any(axis=1)
        assert (multiply(cuda_once, torch.ones(17, K, dtype=dtype), weight, plan).isnan().numpy() == touched).all()
    weight.packed[:] = 0xFF
    weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == weight.absmax.size - 1, np.inf, 0.5).astype(np.float32)
    out = multiply(cuda_once, torch.ones(3, K, dtype=dtype), weight, plan)
    assert out[:, N - 1].isposinf().all() and out[:, : N - 1].isfinite().all()  # not NaN: columns that fill up a tile do not meet it
    for bad in (torch.nan, torch.inf):
        A = torch.ones(21, K, dtype=dtype)
        A[1, 0] = A[20, K - 1] = bad
        finite = multiply(cuda_once, A, Weight(N, K, 32), plan).isfinite().all(dim=1)
        assert finite.tolist() == [row not in (1, 20) for row in range(21)]


@halves
@plans
def test_values_that_are_not_finite_stay_in_their_place_backward(cuda_once, plan, dtype):
    N, K = 152, 320
    weight = Weight(N, K, 64)
    weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == 7, np.nan, 0.5).astype(np.float32)
    touched = (np.arange(N * K).reshape(N, K) // 64 == 7).any(axis=0)
    assert (multiply_backward(cuda_once, torch.ones(21, N, dtype=dtype), weight, plan).isnan().numpy() == touched).all()
    weight.packed[:] = 0xFF
    weight.scales = weight.absmax = np.where(np.arange(weight.absmax.size) == weight.absmax.size - 1, np.inf, 0.5).astype(np.float32)
    out = multiply_backward(cuda_once, torch.ones(3, N, dtype=dtype), weight, plan)
    assert out[:, K - 64 :].isposinf().all() and out[:, : K - 64].isfinite().all()  # not NaN: rows that fill up a chunk do not meet it
    A = torch.ones(21, N, dtype=dtype)
    A[20, N - 1] = torch.inf
    finite = multiply_backward(cuda_once, A, Weight(N, K, 64), plan).isfinite().all(dim=1)
    assert finite.tolist() == [True] * 20 + [False]


def multiply_at_page_edges() -> int:
    """Products of many shapes with every operand at the edge of readable memory: one byte too far kills the process."""
    library, calls = EmulatedLibrary(build_emulated_library()), 0
    for N, K, blocksize in ((1, 32, 32), (70, 96, 32), (264, 288, 4096)):
        for at_end in (False, True):
            for M in (1, 70):
                weight = Weight(N, K, blocksize, nested=M == 1)
                for name in ("packed", "absmax", "codes", "code", "offset"):
                    if getattr(weight, name) is not None:
                        setattr(weight, name, at_page_edge(getattr(weight, name), at_end))
                for dtype in (torch.float16, torch.bfloat16):
                    arrays = (torch.randn(*shape).to(dtype).view(torch.int16).numpy() for shape in ((M, K), (1, N)))
                    A, bias = (torch.from_numpy(at_page_edge(array, at_end)).view(dtype) for array in arrays)
                    for plan in PLANS:
                        test_cuda_gemm.multiply(library, A, weight, plan, bias[0])
                        calls += 1
                    if N % 8 == 0:
                        grad = torch.from_numpy(at_page_edge(torch.randn(M, N).to(dtype).view(torch.int16).numpy(), at_end)).view(dtype)
                        for plan in PLANS:
                            test_cuda_gemm.multiply_backward(library, grad, weight, plan.tile, plan.splits, kernel="warpgroup")
                            calls += 1
    assert group_products(library) > calls
    return calls


@pytest.mark.skipif(sys.platform != "linux", reason="the guard pages are made with Linux's mmap")
def test_nothing_is_read_outside_the_operands(cuda_once, emulated_only):
    assert_good(cuda_once, torch.ones(1, 32, dtype=torch.float16), Weight(1, 32, 32), PLANS[0])
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-c", "import test_cuda_gemm_warpgroup as t; print(t.multiply_at_page_edges())"]
    path = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    assert int(done.stdout.split()[-1]) == 192


# ------------------------------------------------------------------------------------------------------------------------ who gets it
@halves
def test_what_it_cannot_do_the_simpler_kernels_do(cuda_once, emulated_only, dtype):
    """Other devices, elements without tensor cores, rows and addresses that copies of tiles do not take."""
    weight, A = Weight(37, 192, 64), activations(random_of(2), 70, 192, dtype)
    grad = A
    expected = [multiply(cuda_once, A, weight, Plan(KERNELS["tiled"], min(plan.tile, 128), plan.splits)) for plan in PLANS]
    assert_good(cuda_once, A, weight, PLANS[0])
    products = group_products(cuda_once)
    for capability in (80, 89, 100, 120):
        cuda_once.be(capability=capability)
        for plan, result in zip(PLANS, expected):
            if capability in (80, 100) or plan.tile == 64:
                assert torch.equal(multiply(cuda_once, A, weight, plan), result)
            assert_good(cuda_once, A, weight, plan)
            assert_good_backward(cuda_once, grad, Weight(192, 96, 64), plan)
    cuda_once.be()
    assert_good(cuda_once, activations(random_of(2), 3, 72, dtype), Weight(37, 72, 64), PLANS[0])
    assert_good(cuda_once, A.float(), weight, PLANS[0])
    shifted = torch.empty(70 * 192 + 1, dtype=dtype)[1:].view(70, 192).copy_(A)
    assert_good(cuda_once, shifted, weight, PLANS[0])
    assert group_products(cuda_once) == products


def tiles(capability, direction):
    return {entry[2] for shapes in TABLES[capability][direction].values() for entry in shapes if entry[1] == "warpgroup"}


@pytest.mark.parametrize("direction, planner", [("forward", forward_plan), ("backward", backward_plan)])
def test_only_hopper_is_given_it_and_only_with_its_tiles(direction, planner):
    for capability in TABLES:
        assert tiles(capability, direction) <= (set(TILES) if capability == 90 else set())
    for M in (128, 256, 512):
        assert all(
            plan is None or plan.kernel != KERNELS["warpgroup"] for plan in (planner(100, True, M, 8192, 8192), planner(90, False, M, 8192, 8192))
        )


def tuner():
    path = Path(__file__).resolve().parent.parent / "benchmarking" / "tune_gemm_4bit.py"
    if not path.exists():
        pytest.skip("the benchmarks are not beside these tests")
    return runpy.run_path(str(path))


def test_a_prediction_does_not_choose_it_but_says_from_where_on_it_should_pay():
    assert TABLES[90]["origin"] != "predicted" or not tiles(90, "forward") | tiles(90, "backward")
    script = tuner()
    for direction, tokens in (("forward", 128), ("backward", 64)):
        entries = script["best_plans"](script["_predict"](90, with_groups=True), direction, 8192, 8192)
        assert next(kernel for most, kernel, *_ in entries if most >= tokens) == "warpgroup"


def test_a_way_is_measured_only_if_its_result_is_right():
    is_right = tuner()["is_right"]
    expected = torch.randn(64, 64, dtype=torch.bfloat16)
    assert is_right(expected * (1 + 2**-8), expected)
    wrong = expected.clone()
    wrong[8:16] = expected[16:24]
    assert not is_right(wrong, expected)
    wrong[0, 0] = float("nan")
    assert not is_right(wrong, expected)


@halves
@pytest.mark.parametrize("nested", [False, True])
def test_operator_follows_the_plan(cuda_once, monkeypatch, dtype, nested):
    weight, bias = Weight(72, 192, 64, nested=nested), here(torch.randn(72).to(dtype))
    (B, shape, absmax, blocksize, quant_type), statistics = test_cuda_gemm.state_of(weight)
    statistics = {name: here(value) for name, value in statistics.items()}
    for plan in PLANS:
        for planner in ("forward_plan", "backward_plan"):
            monkeypatch.setattr(gemm, planner, lambda *shape, plan=plan: plan)
        A = here(torch.randn(2, 35, 192).to(dtype))
        out = gemm.gemm_4bit(A, here(B), shape, here(absmax), blocksize, quant_type, bias, **statistics)
        assert_as_good_as_dense(out.view(-1, 72).cpu(), A.view(-1, 192).cpu(), weight.values, bias.cpu(), str(plan))
        grad = here(torch.randn(2, 35, 72).to(dtype))
        back = gemm.gemm_4bit_backward(grad, here(B), shape, here(absmax), blocksize, quant_type, **statistics)
        assert_as_good_as_dense(back.view(-1, 192).cpu(), grad.view(-1, 72).cpu(), weight.values.T, None, f"backward {plan}")
