"""The operators in torch.ops.bitsandbytes: schemas, results, the contract with torch.library, and one truth for every backend."""

from helpers import (
    BLOCKSIZES_4BIT,
    DEVICE,
    FLOAT_DTYPES,
    QUANT_TYPES,
    STORAGE_DTYPES,
    assert_same_bits,
    bell,
    grid,
    model_dequantize,
    model_dequantize_4bit,
    model_quantize_4bit,
    short_name,
)
from hypothesis import given
from hypothesis import strategies as st
import pytest
from strategies import float_dtypes, float_tensors
import torch

import bitsandbytes  # noqa: F401
from bitsandbytes import functional as F
from bitsandbytes.backends.default import ops as reference

ops = torch.ops.bitsandbytes

# All published, with these schemas, but for gemm_4bit_backward, int8_linear, int8_linear_backward and optimizer_step.
SCHEMAS = """
int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None) -> (Tensor, Tensor?)
int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor
int8_linear_matmul(Tensor A, Tensor B) -> Tensor
int8_linear_matmul.out(Tensor A, Tensor B, Tensor! out) -> ()
int8_vectorwise_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)
int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor
int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor
int8_double_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)
int8_linear(Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0.) -> (Tensor, Tensor)
int8_linear_backward(Tensor grad, Tensor CB, Tensor SCB) -> Tensor
dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor
dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, Tensor! out) -> ()
quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)
gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, Tensor? absmax_8bit=None,
  Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor
dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor
dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, Tensor! out) -> ()
quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)
gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor
gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, Tensor! out) -> ()
gemm_4bit_backward(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? absmax_8bit=None,
  Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor
optimizer_update_32bit(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, Tensor(a4!)? unorm_vec,
  float max_unorm, float param_norm, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, int step, float lr,
  float gnorm_scale, bool skip_zeros=False) -> ()
optimizer_update_8bit_blockwise(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1,
  float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, Tensor(a6!) absmax1,
  Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) -> ()
optimizer_step(Tensor(a0!)[] p, Tensor[] g, Tensor(a1!)[] moments, Tensor(a2!)[] absmax, Tensor[] qmaps, Tensor(a3!)[] unorm, str algorithm,
  int step, float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, float gnorm_scale=1.,
  float max_unorm=0., bool skip_zeros=False, bool decoupled_weight_decay=True, bool bias_correction=True, bool nesterov=False,
  bool amsgrad=False, bool centered=False, int[] seeds=[]) -> ()
"""
DECLARED = {line.split("(")[0]: "bitsandbytes::" + line for line in SCHEMAS.strip().replace("\n  ", " ").splitlines()}


def overload(name: str):
    packet, _, form = name.partition(".")
    return getattr(getattr(ops, packet), form or "default")


@pytest.mark.parametrize("name", DECLARED)
def test_schema(name):
    parsed = torch._C.parse_schema(DECLARED[name])
    assert str(overload(name)._schema) == str(parsed)


def test_every_operator_is_listed_and_runs_everywhere():
    registered = {name.removeprefix("bitsandbytes::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("bitsandbytes::")}
    assert registered == set(DECLARED)
    for name in registered:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bitsandbytes::{name}", "CompositeExplicitAutograd"), f"{name} has no default kernel"


# -------------------------------------------------------------------------------------------------------------------------- opcheck
def weight(shape=(24, 128), quant_type="nf4", storage=torch.uint8, blocksize=64):
    A = bell(torch.Size(shape).numel()).reshape(shape)
    return ops.quantize_4bit(A, blocksize, quant_type, storage)


def nested_weight(shape=(24, 128), offset_dtype=torch.float32):
    packed, state = F.quantize_4bit(bell(torch.Size(shape).numel()).reshape(shape), quant_type="nf4", compress_statistics=True)
    statistics = dict(absmax_8bit=state.absmax, absmax_code=state.state2.code, absmax_offset=state.offset.to(offset_dtype))
    return packed, state.state2.absmax, statistics


def int8(*shape):
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def positive(n):
    return torch.rand(n) + 0.1


def outlier_input():
    A = bell(10 * 20).reshape(10, 20).to(torch.float16)
    A[1, 3], A[4, 17] = 9.0, -8.0
    return A


def calls_of_quantize_4bit():
    A = -0.35 - (bell(333).abs() % 0.65).reshape(9, 37)  # packed, these values are no NaN in any storage dtype: opcheck compares as numbers
    for storage in STORAGE_DTYPES:
        for quant_type in QUANT_TYPES:
            yield (A, 64, quant_type, storage), {}
    yield (torch.empty(0, 64), 64, "nf4", torch.uint8), {}
    yield (bell(2 * 96).reshape(96, 2).t().to(torch.bfloat16), 32, "fp4", torch.uint8), {}


def calls_of_dequantize_4bit():
    for storage in STORAGE_DTYPES:
        for dtype in FLOAT_DTYPES:
            packed, absmax = weight((7, 96), storage=storage)
            yield (packed, absmax, 64, "nf4", [7, 96], dtype), {}
    packed, absmax = weight((129,), "fp4")
    yield (packed, absmax, 64, "fp4", [129], torch.float16), {}
    yield (packed[:0], absmax[:0], 64, "fp4", [0, 5], torch.float16), {}


def calls_of_gemm_4bit():
    for dtype in FLOAT_DTYPES:
        for lead in ((), (1,), (5,), (2, 3), (0,)):
            packed, absmax = weight()
            A = bell(torch.Size((*lead, 128)).numel()).reshape(*lead, 128).to(dtype)
            yield (A, packed, [24, 128], absmax, 64, "nf4"), {}
            yield (A, packed, [24, 128], absmax, 64, "nf4", bell(24).to(dtype)), {}
    for offset_dtype in FLOAT_DTYPES:
        packed, absmax, statistics = nested_weight(offset_dtype=offset_dtype)
        yield (bell(3 * 128).reshape(3, 128), packed, [24, 128], absmax, 64, "nf4"), statistics
    packed, absmax = weight((5, 33), "fp4", torch.float32)
    yield (bell(2 * 33).reshape(2, 33), packed, [5, 33], absmax, 64, "fp4"), {"bias": bell(5)}
    packed, absmax = weight()
    yield (bell(128 * 3).reshape(128, 3).t(), packed, [24, 128], absmax, 64, "nf4"), {}


def calls_of_gemm_4bit_backward():
    for dtype in FLOAT_DTYPES:
        for lead in ((), (5,), (2, 3), (0,)):
            packed, absmax = weight()
            grad = bell(torch.Size((*lead, 24)).numel()).reshape(*lead, 24).to(dtype)
            yield (grad, packed, [24, 128], absmax, 64, "nf4"), {}
    packed, absmax, statistics = nested_weight()
    yield (bell(3 * 24).reshape(3, 24), packed, [24, 128], absmax, 64, "nf4"), statistics


def calls_of_gemv_4bit():
    for dtype in FLOAT_DTYPES:
        for quant_type in QUANT_TYPES:
            packed, absmax = weight(quant_type=quant_type)
            code = F.get_4bit_type(quant_type, device=DEVICE)
            yield (bell(3 * 128).reshape(3, 1, 128).to(dtype), packed, [24, 128], absmax, code, 64), {}


def calls_of_quantize_blockwise():
    for dtype in FLOAT_DTYPES:
        for signed in (True, False):
            yield (bell(1000).reshape(10, 100).to(dtype), F.create_dynamic_map(signed=signed), 77), {}
    yield (torch.empty(0), F.create_dynamic_map(), 256), {}


def calls_of_dequantize_blockwise():
    codes = torch.arange(0, 250, dtype=torch.uint8).reshape(10, 25)
    for dtype in FLOAT_DTYPES:
        yield (codes, positive(4), F.create_dynamic_map(), 64, dtype), {}
    yield (codes[:0], positive(0), F.create_dynamic_map(), 64, torch.float32), {}


def calls_of_int8_vectorwise_quant():
    for dtype in FLOAT_DTYPES:
        for A in (outlier_input().to(dtype), outlier_input().to(dtype).reshape(2, 5, 20), outlier_input().to(dtype)[:1]):
            yield (A,), {}
            yield (A,), {"threshold": 6.0}
            yield (A, 100.0), {}


def calls_of_int8_double_quant():
    for dtype in FLOAT_DTYPES:
        yield (outlier_input().to(dtype),), {}
        yield (outlier_input().to(dtype),), {"threshold": 6.0}


def calls_of_int8_vectorwise_dequant():
    yield (int8(10, 20), positive(10)), {}


def calls_of_int8_linear_matmul():
    for A in (int8(10, 20), int8(2, 5, 20), int8(20), int8(0, 20), int8(20, 10).t()):
        yield (A, int8(30, 20)), {}


def calls_of_int8_mm_dequant():
    A = torch.randint(-1000, 1000, (10, 30), dtype=torch.int32)
    yield (A, positive(10), positive(30)), {}
    for dtype in FLOAT_DTYPES:
        yield (A, positive(10), positive(30)), {"dtype": dtype, "bias": bell(30).to(dtype)}
    yield (A.reshape(2, 5, 30), positive(10), positive(30)), {}


def calls_of_int8_scaled_mm():
    for dtype in FLOAT_DTYPES:
        yield (int8(10, 20), int8(30, 20), positive(10), positive(30)), {"bias": bell(30).to(dtype), "dtype": dtype}
    yield (int8(2, 5, 20), int8(30, 20), positive(10), positive(30)), {}


def calls_of_int8_mixed_scaled_mm():
    """With outliers, without, and with an empty list of them."""
    for dtype in FLOAT_DTYPES:
        A, CB, SCB = outlier_input().to(dtype), int8(30, 20), positive(30)
        for threshold in (6.0, 100.0, 0.0):
            CA, SCA, columns = ops.int8_vectorwise_quant(A, threshold)
            yield (A, CA, CB, SCA, SCB, columns), {}
            yield (A, CA, CB, SCA, SCB, columns), {"bias": bell(30).to(dtype)}
    CA, SCA, columns = ops.int8_vectorwise_quant(A, 6.0)
    yield (A.reshape(2, 5, 20), CA.reshape(2, 5, 20), CB, SCA, SCB, columns), {}


def calls_of_int8_linear():
    for dtype in FLOAT_DTYPES:
        for A in (outlier_input().to(dtype), outlier_input().to(dtype).reshape(2, 5, 20), outlier_input().to(dtype)[0]):
            yield (A, int8(30, 20), positive(30)), {}
            yield (A, int8(30, 20), positive(30), bell(30)), {"threshold": 6.0}
    yield (outlier_input()[:0], int8(30, 20), positive(30), None, 6.0), {}
    yield (bell(10).reshape(10, 1)[:, :0], int8(30, 0), positive(30), None, 6.0), {}


def calls_of_int8_linear_backward():
    for dtype in FLOAT_DTYPES:
        yield (bell(300).reshape(10, 30).to(dtype), int8(30, 20), positive(30)), {}
    yield (bell(300).reshape(2, 5, 30), int8(30, 20), positive(30)), {}
    yield (bell(30), int8(30, 20), positive(30)), {}
    yield (bell(30)[:0], int8(0, 20), positive(0)), {}


def out_calls(calls, result):
    """The same calls with a tensor to write to."""
    for args, kwargs in calls():
        yield args, kwargs | {"out": torch.empty_like(result(*args, **kwargs))}


OPTIMIZERS = ("adam", "lamb", "ademamix", "momentum", "lars", "lion", "rmsprop", "adagrad")
TWO_STATES = ("adam", "lamb", "ademamix")


def calls_of_optimizer_update_32bit():
    for name in OPTIMIZERS:
        for dtype in FLOAT_DTYPES:
            g, p = bell(300, 1).to(dtype), bell(300, 2).to(dtype)
            state1 = torch.zeros(2, 300) if name == "ademamix" else torch.zeros(300)
            state2 = torch.zeros(300) if name in TWO_STATES else None
            yield (name, g, p, state1, state2, None, 0.0, 0.0, 0.9, 0.99, 0.999, 2.0, 1e-8, 0.01, 1, 1e-3, 1.0), {"skip_zeros": False}
            yield (name, g, p, state1, state2, torch.zeros(1), 1.0, 3.0, 0.9, 0.99, 0.999, 2.0, 1e-8, 0.01, 2, 1e-3, 0.5, True), {}


def calls_of_optimizer_update_8bit_blockwise():
    for name in OPTIMIZERS:
        for dtype in FLOAT_DTYPES:
            g, p = bell(300, 1).to(dtype), bell(300, 2).to(dtype)
            lead = (2,) if name == "ademamix" else ()
            first = torch.zeros(*lead, 300, dtype=torch.uint8), F.create_dynamic_map(), torch.zeros(*lead, 2)
            second = torch.zeros(300, dtype=torch.uint8), F.create_dynamic_map(signed=False), torch.zeros(2)
            (s1, q1, a1), (s2, q2, a2) = first, second if name in TWO_STATES else (None,) * 3
            yield (name, g, p, s1, s2, 0.9, 0.99, 0.999, 2.0, 1e-8, 1, 1e-3, q1, q2, a1, a2, 0.01, 1.0), {"skip_zeros": False}


def calls_of_optimizer_step():
    moments = {"adam": 2, "lamb": 2, "ademamix": 3, "momentum": 1, "lars": 1, "lion": 1, "rmsprop": 2, "adagrad": 1}  # rmsprop: with momentum
    for name, count in moments.items():
        for bits in (32, 8):
            sizes = (300, 7)
            p, g = ([bell(n, seed).to(torch.bfloat16) for n in sizes] for seed in (1, 2))
            states = [torch.zeros(n, dtype=torch.float32 if bits == 32 else torch.uint8) for n in sizes for _ in range(count)]
            absmax = [torch.zeros(-(-n // 256)) for n in sizes for _ in range(count)] if bits == 8 else []
            qmaps = [F.create_dynamic_map()] * count if bits == 8 else []
            norms = [torch.zeros(1) for _ in sizes]
            scalars = (name, 2, 1e-3, 0.9, 0.99, 0.999, 2.0, 1e-8, 0.01)
            yield (p, g, states, absmax, qmaps, norms, *scalars), {"max_unorm": 0.5, "seeds": [1, 2]}


CALLS = {name.removeprefix("calls_of_"): make for name, make in list(globals().items()) if name.startswith("calls_of_")}
CALLS |= {f"{base}.out": lambda base=base: out_calls(CALLS[base], overload(base)) for base in CALLS if f"{base}.out" in DECLARED}


@pytest.mark.parametrize("name", DECLARED)
def test_contract_with_torch_library(name):
    """opcheck: the schema tells the truth about mutation and aliasing, the fake kernel about the result, and tracing works."""
    calls = list(CALLS[name]())
    for args, kwargs in thinned(calls):
        torch.library.opcheck(overload(name), args, kwargs)


def thinned(calls, limit=14):
    """Not more than `limit` of the calls, spread over the list; the fake results of the rest are compared with the real ones by the next test."""
    return calls[:: -(-len(calls) // limit)]


@pytest.mark.parametrize("name", [name for name in DECLARED if not name.startswith("optimizer") and not name.endswith(".out")])
def test_fake_result_describes_the_real_one(name):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    for args, kwargs in CALLS[name]():
        real = overload(name)(*args, **kwargs)
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fake_args, fake_kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        with mode:
            fake = overload(name)(*fake_args, **fake_kwargs)
        for r, f in zip(as_tuple(real), as_tuple(fake), strict=True):
            assert (r is None) == (f is None)
            if r is not None:
                assert (r.dtype, r.dim(), r.device) == (f.dtype, f.dim(), f.device)
                assert all(not isinstance(size, int) or size == r.shape[i] for i, size in enumerate(f.shape))


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", [name for name in DECLARED if name.endswith(".out")])
def test_out_form_writes_what_the_plain_form_returns(name):
    for args, kwargs in CALLS[name]():
        out = kwargs["out"]
        expected = overload(name.removesuffix(".out"))(*args)
        assert overload(name)(*args, out=out) is None
        assert_same_bits(out, expected)
        strided = torch.empty(*out.shape, 2, dtype=out.dtype)[..., 0]
        overload(name)(*args, strided)
        assert_same_bits(strided.contiguous(), expected)


# --------------------------------------------------------------------------------------------------------------- one truth for all backends
@given(
    A=float_tensors(), blocksize=st.sampled_from(BLOCKSIZES_4BIT), quant_type=st.sampled_from(QUANT_TYPES),
    storage=st.sampled_from(STORAGE_DTYPES),
)  # fmt: skip
def test_quantize_4bit_equals_the_reference(A, blocksize, quant_type, storage):
    packed, absmax = ops.quantize_4bit(A, blocksize, quant_type, storage)
    expected, expected_absmax = reference.quantize_4bit(A, blocksize, quant_type, storage)
    assert_same_bits(packed, expected)
    assert_same_values(absmax, expected_absmax)


@given(
    A=float_tensors(), blocksize=st.sampled_from(BLOCKSIZES_4BIT), quant_type=st.sampled_from(QUANT_TYPES),
    storage=st.sampled_from(STORAGE_DTYPES), dtype=float_dtypes,
)  # fmt: skip
def test_dequantize_4bit_equals_the_reference(A, blocksize, quant_type, storage, dtype):
    packed, absmax = ops.quantize_4bit(A, blocksize, quant_type, storage)
    args = (packed, absmax, blocksize, quant_type, list(A.shape), dtype)
    assert_same_values(ops.dequantize_4bit(*args), reference.dequantize_4bit(*args))


CODES = {
    "dynamic": F.create_dynamic_map,
    "unsigned": lambda: F.create_dynamic_map(signed=False),
    "linear": F.create_linear_map,
    "normal": F.create_normal_map,  # 241 equal values
    "positive": lambda: torch.linspace(0.25, 1, 256, dtype=torch.float32),  # no zero
    "beyond_one": lambda: torch.linspace(-3, 5, 256, dtype=torch.float32),
    "constant": lambda: torch.zeros(256),
    "irregular": lambda: bell(256, 3).sort().values,
}


@given(A=float_tensors(), blocksize=st.one_of(st.integers(1, 400), st.sampled_from([4096, 2**31, 2**40])), code=st.sampled_from(list(CODES)))
def test_quantize_blockwise_equals_the_reference(A, blocksize, code):
    code = CODES[code]()
    codes, absmax = ops.quantize_blockwise(A, code, blocksize)
    if blocksize > A.numel():
        expected, expected_absmax = reference.quantize_blockwise(A, code, max(A.numel(), 1))  # one block, without padding it to its size
    else:
        expected, expected_absmax = reference.quantize_blockwise(A, code, blocksize)
    assert_same_bits(codes, expected)
    assert_same_values(absmax, expected_absmax)


@given(A=float_tensors(), blocksize=st.integers(1, 400), code=st.sampled_from(list(CODES)), dtype=float_dtypes)
def test_dequantize_blockwise_equals_the_reference(A, blocksize, code, dtype):
    codes, absmax = ops.quantize_blockwise(A, CODES[code](), blocksize)
    args = (codes, absmax, CODES[code](), blocksize, dtype)
    assert_same_values(ops.dequantize_blockwise(*args), reference.dequantize_blockwise(*args))


def assert_same_values(actual, expected):
    """Bit for bit, but any NaN equals any other."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert_same_bits(actual.masked_fill(actual.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


@given(
    lead=st.sampled_from([(), (1,), (2,), (3, 2), (17,), (33,), (0,), (2, 0)]),
    N=st.one_of(st.integers(0, 70), st.sampled_from([96, 128])),
    K=st.one_of(st.integers(1, 140), st.sampled_from([192, 256, 576, 1025])),
    blocksize=st.sampled_from(BLOCKSIZES_4BIT),
    quant_type=st.sampled_from(QUANT_TYPES),
    storage=st.sampled_from(STORAGE_DTYPES),
    dtype=float_dtypes,
    has_bias=st.booleans(),
    nested=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gemm_4bit_is_the_product_with_the_dequantised_weight(lead, N, K, blocksize, quant_type, storage, dtype, has_bias, nested, seed):
    W = bell(N * K, seed).reshape(N, K)
    packed, state = F.quantize_4bit(W, blocksize=blocksize, quant_type=quant_type, quant_storage=storage, compress_statistics=nested)
    A = (bell(torch.Size((*lead, K)).numel(), seed + 1) + 0.5).reshape(*lead, K).to(dtype)
    bias = bell(N, seed + 2).to(dtype) if has_bias else None
    if nested:
        statistics = (state.state2.absmax, blocksize, quant_type, bias, state.absmax, state.state2.code, state.offset)
    else:
        statistics = (state.absmax, blocksize, quant_type, bias)
    y = ops.gemm_4bit(A, packed, [N, K], *statistics)
    assert y.shape == (*lead, N) and y.dtype == dtype
    assert_within_rounding(y, A, F.dequantize_4bit(packed, state), bias)


@given(
    M=st.sampled_from([0, 1, 2, 5, 17, 33]), N=st.integers(1, 140), K=st.integers(0, 140), blocksize=st.sampled_from(BLOCKSIZES_4BIT),
    quant_type=st.sampled_from(QUANT_TYPES), storage=st.sampled_from(STORAGE_DTYPES), dtype=float_dtypes, nested=st.booleans(),
)  # fmt: skip
def test_gemm_4bit_backward_is_the_product_with_the_weight_untransposed(M, N, K, blocksize, quant_type, storage, dtype, nested):
    W = bell(N * K, M).reshape(N, K)
    packed, state = F.quantize_4bit(W, blocksize=blocksize, quant_type=quant_type, quant_storage=storage, compress_statistics=nested)
    grad = (bell(M * N, 7) + 0.5).reshape(M, N).to(dtype)
    absmax = state.state2.absmax if nested else state.absmax
    more = (state.absmax, state.state2.code, state.offset) if nested else ()
    x = ops.gemm_4bit_backward(grad, packed, [N, K], absmax, blocksize, quant_type, *more)
    assert x.shape == (M, K) and x.dtype == dtype
    assert_within_rounding(x, grad, F.dequantize_4bit(packed, state).t(), None)


def assert_within_rounding(y, A, W, bias, slack=4):
    """Weights rounded to the dtype of A at most, sums in fp32, one rounding of the result."""
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[A.dtype]
    exact = A.double() @ W.double().t()
    size = A.double().abs() @ W.double().abs().t()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    weight_rounding = unit if A.dtype != torch.float32 else 0
    bound = slack * (exact.abs() * unit + size * (weight_rounding + 2.0**-24 * (A.shape[-1] + 8))) + 1e-30
    excess = ((y.double() - exact).abs() - bound).amax().item() if y.numel() else 0
    assert excess <= 0, f"error beyond the bound by {excess}"


@grid(quant_type=QUANT_TYPES, dtype=FLOAT_DTYPES, M=(1, 2, 5, 40))
def test_gemv_4bit_fills_every_row(quant_type, dtype, M):
    packed, absmax = weight((50, 96), quant_type)
    A = bell(M * 96).reshape(M, 1, 96).to(dtype)
    y = ops.gemv_4bit(A, packed, [50, 96], absmax, F.get_4bit_type(quant_type, device=DEVICE), 64)
    assert y.shape == (M, 1, 50)
    assert_within_rounding(y, A, ops.dequantize_4bit(packed, absmax, 64, quant_type, [50, 96], torch.float32), None)


def test_gemv_4bit_uses_the_code_it_is_given():
    packed, absmax = weight((8, 64))
    code = torch.linspace(-2, 3, 16)
    codes = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), 1).view(8, 64)
    W = code[codes.long()] * absmax[:, None]
    y = ops.gemv_4bit(torch.eye(64), packed, [8, 64], absmax, code, 64)
    torch.testing.assert_close(y, W.t())


# ------------------------------------------------------------------------------------------------------------- layouts, sizes, threads
def test_views_of_packed_weight_and_statistics():
    packed, absmax = weight((24, 128))
    A = bell(4 * 128).reshape(4, 128)
    expected = ops.gemm_4bit(A, packed, [24, 128], absmax, 64, "nf4")
    values = ops.dequantize_4bit(packed, absmax, 64, "nf4", [24, 128], torch.float16)
    spread = torch.stack((packed, packed), dim=-1)[..., 0]
    spread_absmax = torch.stack((absmax, absmax), dim=-1)[..., 0]
    for B, scales in ((packed.t(), absmax), (packed.view(8, -1), absmax), (spread, spread_absmax), (packed.view(8, -1).view(torch.bfloat16), absmax)):
        assert_same_bits(ops.gemm_4bit(A, B, [24, 128], scales, 64, "nf4"), expected)
        assert_same_bits(ops.dequantize_4bit(B, scales, 64, "nf4", [24, 128], torch.float16), values)
    wide = torch.zeros(4, 256)
    wide[:, ::2] = A
    assert_same_bits(ops.gemm_4bit(wide[:, ::2], packed, [24, 128], absmax, 64, "nf4"), expected)


def test_longer_buffers_than_needed_are_fine():
    packed, absmax = weight((7, 33))
    longer, longer_absmax = torch.cat((packed, packed)), torch.cat((absmax, absmax * torch.nan))
    args = (64, "nf4", [7, 33], torch.float32)
    assert_same_bits(ops.dequantize_4bit(longer, longer_absmax, *args), ops.dequantize_4bit(packed, absmax, *args))
    A = bell(33).reshape(1, 33)
    assert_same_bits(ops.gemm_4bit(A, longer, [7, 33], longer_absmax, 64, "nf4"), ops.gemm_4bit(A, packed, [7, 33], absmax, 64, "nf4"))


@pytest.mark.parametrize("shape", [(5,), (1, 5), (5, 1), (1, 1, 1), (2, 2), (8,), (4096,), (3, 5, 7), (1, 96), (96, 1), (17, 33)], ids=str)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_dequantised_shape_is_the_shape_asked_for(shape, quant_type):
    A = bell(torch.Size(shape).numel()).reshape(shape)
    packed, absmax = ops.quantize_4bit(A, 64, quant_type, torch.uint8)
    for dtype in FLOAT_DTYPES:
        values = ops.dequantize_4bit(packed, absmax, 64, quant_type, list(shape), dtype)
        assert_same_bits(values, model_dequantize_4bit(packed, absmax, 64, quant_type, shape, dtype))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=short_name)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    A = bell(600 * 1000).reshape(600, 1000).to(dtype)
    x = bell(70 * 1000, 2).reshape(70, 1000).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        packed, absmax = ops.quantize_4bit(A, 64, "nf4", torch.uint8)
        codes, scales = ops.quantize_blockwise(A, F.create_dynamic_map(), 256)
        results.append(
            (
                packed, absmax, codes, scales,
                ops.dequantize_4bit(packed, absmax, 64, "nf4", [600, 1000], dtype),
                ops.dequantize_blockwise(codes, scales, F.create_dynamic_map(), 256, dtype),
                *(ops.gemm_4bit(x[:M], packed, [600, 1000], absmax, 64, "nf4") for M in (1, 4, 16, 70)),
            )
        )  # fmt: skip
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def test_packed_bytes_of_a_large_tensor():
    A = bell(3_000_001).to(torch.bfloat16)
    packed, absmax = ops.quantize_4bit(A, 128, "nf4", torch.uint8)
    expected, expected_absmax = model_quantize_4bit(A, 128, "nf4")
    assert_same_bits(packed, expected)
    assert_same_bits(absmax, expected_absmax)
    code = F.create_dynamic_map()
    codes, scales = ops.quantize_blockwise(A, code, 4096)
    assert_same_bits(ops.dequantize_blockwise(codes, scales, code, 4096, torch.float16), model_dequantize(codes, scales, code, 4096, torch.float16))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_functions_give_the_same_bits(fullgraph):
    def roundtrip(A):
        packed, absmax = torch.ops.bitsandbytes.quantize_4bit(A, 64, "nf4", torch.uint8)
        return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, 64, "nf4", A.shape, A.dtype)

    compiled = torch.compile(roundtrip, backend="aot_eager", fullgraph=fullgraph, dynamic=True)
    for shape in ((4, 64), (5, 33), (7, 130)):
        A = bell(torch.Size(shape).numel()).reshape(shape)
        assert_same_bits(compiled(A), roundtrip(A))


def test_operators_work_on_meta_tensors():
    A = torch.empty(100, 65, device="meta")
    packed, absmax = ops.quantize_4bit(A, 64, "nf4", torch.bfloat16)
    assert packed.device.type == "meta" and packed.shape == (1625, 1) and absmax.shape == (102,)
    assert ops.dequantize_4bit(packed, absmax, 64, "nf4", [100, 65], torch.float16).shape == (100, 65)
    assert ops.gemm_4bit(torch.empty(3, 65, device="meta"), packed, [100, 65], absmax, 64, "nf4").shape == (3, 100)
