"""Whatever a caller passes: a clear exception, never a crash, never a byte read or written out of bounds.

Calls that are wrong in one way each; states that lie about their data; and, each in a process of its own because a failure there is a dead
process, random mutations of good calls and good calls whose buffers end at an unmapped page. States from files: `test_hostile_states.py`.
"""

import copy
import functools
from functools import partial
import os
from pathlib import Path
import random
import sys

from helpers import BLOCKSIZES_4BIT, DEVICE, FLOAT_DTYPES, QUANT_TYPES, bell, cpu_only, model_quantize_4bit, run_python
import pytest
import torch

import bitsandbytes  # noqa: F401
from bitsandbytes import functional as F

ops = torch.ops.bitsandbytes
CLEAR = (RuntimeError, ValueError, TypeError)
HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------------------------- good calls, as keywords
@functools.cache
def _good_calls() -> dict[str, dict]:
    W = bell(24 * 130).reshape(24, 130)
    packed, absmax = model_quantize_4bit(W, 64, "nf4")
    _, nested = F.quantize_4bit(W, quant_type="nf4", compress_statistics=True)
    statistics = dict(absmax_8bit=nested.absmax, absmax_code=nested.state2.code, absmax_offset=nested.offset)
    A, codes = bell(3 * 130).reshape(3, 130), torch.arange(250, dtype=torch.uint8).reshape(10, 25)
    code16, code256 = F.get_4bit_type("nf4", device=DEVICE), F.create_dynamic_map()
    int8 = partial(torch.full, fill_value=3, dtype=torch.int8)
    rows, columns, hyper = torch.ones(10), torch.ones(30), dict(beta1=0.9, beta2=0.99, beta3=0.999, alpha=2.0, eps=1e-8)
    dequantise = dict(A=packed, absmax=absmax, blocksize=64, quant_type="nf4", shape=[24, 130], dtype=torch.float32)
    gemv = dict(A=A, B=packed, shapeB=[24, 130], absmax=absmax, code=code16, blocksize=64)
    gemm = dict(A=A, B=packed, shapeB=[24, 130], absmax=absmax, blocksize=64, quant_type="nf4", bias=torch.ones(24))
    dequantise_8bit = dict(A=codes, absmax=torch.ones(4), code=code256, blocksize=64, dtype=torch.float32)
    optimizer = dict(optimizer_name="adam", g=bell(300), p=bell(300))
    return {
        "quantize_4bit": dict(A=W, blocksize=64, quant_type="nf4", quant_storage=torch.uint8),
        "dequantize_4bit": dequantise,
        "dequantize_4bit.out": dequantise | dict(out=torch.empty(24, 130)),
        "gemm_4bit": gemm,
        "gemm_4bit nested": gemm | dict(absmax=nested.state2.absmax) | statistics,
        "gemm_4bit_backward": {key: value for key, value in gemm.items() if key != "bias"} | dict(A=bell(3 * 24).reshape(3, 24)),
        "gemv_4bit": gemv,
        "gemv_4bit.out": gemv | dict(out=torch.empty(3, 24)),
        "quantize_blockwise": dict(A=W, code=code256, blocksize=64),
        "dequantize_blockwise": dequantise_8bit,
        "dequantize_blockwise.out": dequantise_8bit | dict(out=torch.empty(10, 25)),
        "int8_vectorwise_quant": dict(A=W.to(torch.float16), threshold=2.0),
        "int8_double_quant": dict(A=W.to(torch.float16), threshold=2.0),
        "int8_vectorwise_dequant": dict(A=int8((10, 20)), stats=rows),
        "int8_linear_matmul": dict(A=int8((10, 20)), B=int8((30, 20))),
        "int8_linear_matmul.out": dict(A=int8((10, 20)), B=int8((30, 20)), out=torch.empty(10, 30, dtype=torch.int32)),
        "int8_mm_dequant": dict(A=torch.ones(10, 30, dtype=torch.int32), row_stats=rows, col_stats=columns, dtype=torch.float32, bias=columns),
        "int8_scaled_mm": dict(A=int8((10, 20)), B=int8((30, 20)), row_stats=rows, col_stats=columns, bias=columns, dtype=torch.float32),
        "int8_mixed_scaled_mm": dict(
            A=torch.ones(10, 20), CA=int8((10, 20)), CB=int8((30, 20)), SCA=rows, SCB=columns, outlier_cols=torch.tensor([1, 7]), bias=columns
        ),
        "int8_linear": dict(A=torch.ones(10, 20), CB=int8((30, 20)), SCB=columns, bias=columns, threshold=2.0),
        "int8_linear_backward": dict(grad=torch.ones(10, 30), CB=int8((30, 20)), SCB=columns),
        "optimizer_update_32bit": optimizer
        | dict(state1=torch.zeros(300), state2=torch.zeros(300), unorm_vec=torch.zeros(1), max_unorm=1.0, param_norm=1.0)
        | hyper
        | dict(weight_decay=0.01, step=1, lr=1e-3, gnorm_scale=1.0, skip_zeros=False),
        "optimizer_update_8bit_blockwise": optimizer
        | dict(state1=torch.zeros(300, dtype=torch.uint8), state2=torch.zeros(300, dtype=torch.uint8))
        | hyper
        | dict(step=1, lr=1e-3, qmap1=code256, qmap2=F.create_dynamic_map(signed=False), absmax1=torch.zeros(2), absmax2=torch.zeros(2))
        | dict(weight_decay=0.01, gnorm_scale=1.0, skip_zeros=False),
    }


def good_calls() -> dict[str, dict]:
    """One good call of each operator: argument name -> value, in the order of the schema. The tensors are fresh."""
    return {name: good_call(name) for name in _good_calls()}


def good_call(name: str) -> dict:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in _good_calls()[name].items()}


def call(name: str, arguments: dict):
    packet, _, form = name.split()[0].partition(".")
    return getattr(getattr(ops, packet), form or "default")(**arguments)


@pytest.mark.parametrize("name", _good_calls())
def test_the_good_calls_are_good(name):
    call(name, good_call(name))


# ----------------------------------------------------------------------------------------------------------------- one wrong argument each
BAD_BLOCKSIZES_4BIT = [0, -1, -64, 1, 3, 63, 65, 8192, 2**31, 2**32 + 64, 2**62]
NOT_FLOATS = [torch.int32, torch.float64, torch.bool, torch.complex64]
HUGE_SHAPES = [[2**62, 4], [2**32, 2**32], [2**31, 2**31], [2**63 - 1], [24, 2**40]]


def empty(*shape, **options):
    return torch.empty(shape, **options)


BAD = {
    "quantize_4bit": dict(
        A=[bell(8).to(dtype) for dtype in NOT_FLOATS],
        blocksize=BAD_BLOCKSIZES_4BIT,
        quant_type=["", "nf5", "NF4", "int4", "fp4\0"],
        quant_storage=[torch.int64, torch.float64, torch.bool, torch.int32, torch.complex64],
    ),
    "dequantize_4bit": dict(
        A=[empty(n, 1, dtype=torch.uint8) for n in (0, 1, 1559)] + [empty(1560, 1, dtype=d) for d in (torch.int8, torch.int64, torch.float64)],
        absmax=[torch.ones(n) for n in (0, 1, 48)] + [torch.ones(49, dtype=d) for d in (torch.float16, torch.float64, torch.uint8)],
        blocksize=[*BAD_BLOCKSIZES_4BIT, 32],
        quant_type=["", "nf5"],
        shape=[[25, 130], [24, 131], [3121], [-24, -130], [-1, 130], [24, 130, 2], *HUGE_SHAPES],
        dtype=[torch.int32, torch.float64, torch.uint8],
    ),
    "dequantize_4bit.out": dict(
        out=[empty(24, 129), empty(24 * 130), empty(130, 24), empty(0), empty(24, 130, dtype=torch.float16), empty(24, 130, device="meta")],
        absmax=[torch.ones(48)],
        A=[empty(1559, 1, dtype=torch.uint8)],
    ),
    "gemm_4bit": dict(
        A=[empty(3, k) for k in (0, 1, 129, 131, 260)] + [empty(3, 130, dtype=d) for d in NOT_FLOATS] + [torch.tensor(1.0), empty(0)],
        B=[empty(n, 1, dtype=torch.uint8) for n in (0, 1559)] + [empty(1560, 1, dtype=d) for d in (torch.int8, torch.float64)],
        shapeB=[[25, 130], [130, 24], [24], [24, 130, 1], [], [-24, 130], [-1, -3120], [2**62, 130], [2**40, 130]],
        absmax=[torch.ones(48), torch.ones(0), torch.ones(49, dtype=torch.float16), torch.ones(49, dtype=torch.int32)],
        blocksize=[*BAD_BLOCKSIZES_4BIT, 32],
        quant_type=["", "int8"],
        bias=[torch.ones(n) for n in (0, 1, 23, 25)] + [torch.ones(24, 1), torch.ones(24, dtype=torch.float16), torch.ones(24, device="meta")],
        absmax_8bit=[torch.zeros(49, dtype=torch.uint8)],  # without the table and the offset beside it
    ),
    "gemm_4bit nested": dict(
        absmax=[torch.ones(0), torch.ones(1, dtype=torch.float16)],
        absmax_8bit=[torch.zeros(n, dtype=torch.uint8) for n in (0, 48)] + [torch.zeros(49), torch.zeros(49, dtype=torch.int8)],
        absmax_code=[None, torch.ones(255), torch.ones(16), torch.ones(0), torch.ones(256, dtype=torch.float16), torch.ones(256, device="meta")],
        absmax_offset=[None, torch.ones(2), torch.ones(0), torch.tensor(1), torch.tensor(1.0, dtype=torch.float64)],
    ),
    "gemm_4bit_backward": dict(
        A=[empty(3, n) for n in (0, 23, 25, 130)] + [torch.tensor(1.0), empty(3, 24, dtype=torch.float64)],
        B=[empty(1559, 1, dtype=torch.uint8), empty(1560, 1, dtype=torch.int32)],
        shapeB=[[25, 130], [130, 24], [24], [-24, -130], [24, 2**61]],
        absmax=[torch.ones(48), torch.ones(49, dtype=torch.bfloat16)],
        blocksize=[0, 63, 32],
        quant_type=["int4"],
        absmax_8bit=[torch.zeros(49, dtype=torch.uint8)],
    ),
    "gemv_4bit": dict(
        A=[empty(3, 129), empty(3, 130, dtype=torch.int64), torch.tensor(1.0)],
        B=[empty(1559, 1, dtype=torch.uint8), empty(1560, 1, dtype=torch.int16)],
        shapeB=[[25, 130], [130, 24], [24], [-24, -130], [2**62, 130]],
        absmax=[torch.ones(48)] + [torch.ones(n, dtype=d) for n in (0, 48, 49, 50) for d in (torch.float64, torch.bfloat16)],
        code=[torch.ones(n) for n in (0, 15, 17, 256)] + [torch.ones(16, dtype=d) for d in (torch.float16, torch.float64, torch.int32)],
        blocksize=BAD_BLOCKSIZES_4BIT,
    ),
    "gemv_4bit.out": dict(out=[empty(3, 23), empty(24, 3), empty(72), empty(3, 24, dtype=torch.float16), empty(3, 24, device="meta")]),
    "quantize_blockwise": dict(
        A=[bell(8).to(dtype) for dtype in NOT_FLOATS],
        code=[torch.ones(n) for n in (0, 16, 255, 257)] + [torch.ones(256, dtype=d) for d in (torch.float16, torch.float64, torch.int64)],
        blocksize=[0, -1, -(2**62)],
    ),
    "dequantize_blockwise": dict(
        A=[torch.zeros(10, 25, dtype=d) for d in (torch.int8, torch.float32, torch.int64, torch.bool)],
        absmax=[torch.ones(n) for n in (0, 3)] + [torch.ones(4, dtype=d) for d in (torch.float16, torch.float64)],
        code=[torch.ones(n) for n in (0, 16, 255)] + [torch.ones(256, dtype=torch.bfloat16)],
        blocksize=[0, -64, 1, 62],
        dtype=[torch.int32, torch.float64],
    ),
    "dequantize_blockwise.out": dict(out=[empty(10, 24), empty(25, 10), empty(250), empty(10, 25, dtype=torch.bfloat16)]),
    "int8_vectorwise_quant": dict(A=[torch.ones(3, 4, dtype=d) for d in NOT_FLOATS] + [torch.tensor(1.0)], threshold=[-1.0]),
    "int8_double_quant": dict(A=[torch.ones(3, 4, dtype=d) for d in NOT_FLOATS] + [torch.tensor(1.0)]),
    "int8_vectorwise_dequant": dict(
        A=[torch.ones(10, 20), torch.ones(10, 20, dtype=torch.uint8), torch.tensor(1, dtype=torch.int8)],
        stats=[torch.ones(n) for n in (0, 1, 9, 11, 20)] + [torch.ones(10, dtype=torch.float16)],
    ),
    "int8_linear_matmul": dict(
        A=[torch.ones(10, k, dtype=torch.int8) for k in (0, 19, 21)] + [torch.ones(10, 20), torch.tensor(1, dtype=torch.int8)],
        B=[torch.ones(20, 30, dtype=torch.int8), torch.ones(20, dtype=torch.int8), torch.ones(2, 30, 20, dtype=torch.int8), torch.ones(30, 20)],
    ),
    "int8_linear_matmul.out": dict(out=[empty(10, 30), empty(30, 10, dtype=torch.int32), empty(10, 29, dtype=torch.int32)]),
    "int8_mm_dequant": dict(
        A=[torch.ones(10, 30), torch.ones(10, 30, dtype=torch.int64), torch.ones(30, 10, dtype=torch.int32)],
        row_stats=[torch.ones(9), torch.ones(0), torch.ones(10, dtype=torch.float16)],
        col_stats=[torch.ones(10), torch.ones(30, dtype=torch.float64)],
        dtype=[torch.int32, torch.float64],
        bias=[torch.ones(29), torch.ones(1), torch.ones(1, 30), torch.ones(30, dtype=torch.int64)],
    ),
    "int8_scaled_mm": dict(
        A=[torch.ones(10, 19, dtype=torch.int8), torch.ones(10, 20)],
        B=[torch.ones(20, 30, dtype=torch.int8), torch.ones(30, 20)],
        row_stats=[torch.ones(9), torch.ones(10, dtype=torch.float16)],
        col_stats=[torch.ones(20), torch.ones(30, dtype=torch.float16)],
        bias=[torch.ones(10), torch.ones(30, 1)],
        dtype=[torch.int8, torch.float64],
    ),
    "int8_mixed_scaled_mm": dict(
        A=[torch.ones(10, 21), torch.ones(9, 20), torch.ones(10, 20, dtype=torch.float64)],
        CA=[torch.ones(10, 21, dtype=torch.int8), torch.ones(11, 20, dtype=torch.int8)],
        CB=[torch.ones(30, 21, dtype=torch.int8)],
        SCA=[torch.ones(9)],
        SCB=[torch.ones(29)],
        outlier_cols=[torch.tensor([1.0]), torch.tensor([[1]]), torch.tensor([20]), torch.tensor([2**40]), torch.tensor([-21])],
        bias=[torch.ones(29)],
    ),
    "int8_linear": dict(
        A=[torch.ones(10, k) for k in (0, 19, 21)] + [torch.ones(10, 20, dtype=d) for d in NOT_FLOATS] + [torch.tensor(1.0)],
        CB=[torch.ones(30, 21, dtype=torch.int8), torch.ones(20, 30, dtype=torch.int8), torch.ones(600, dtype=torch.int8), torch.ones(30, 20)],
        SCB=[torch.ones(n) for n in (0, 1, 29, 31)] + [torch.ones(30, dtype=torch.float16), torch.ones(30, device="meta")],
        bias=[torch.ones(n) for n in (0, 1, 29)] + [torch.ones(30, 1), torch.ones(30, dtype=torch.int64), torch.ones(30, device="meta")],
        threshold=[-1.0],
    ),
    "int8_linear_backward": dict(
        grad=[torch.ones(10, n) for n in (0, 20, 31)] + [torch.ones(10, 30, dtype=d) for d in NOT_FLOATS] + [torch.tensor(1.0)],
        CB=[torch.ones(31, 20, dtype=torch.int8), torch.ones(600, dtype=torch.int8), torch.ones(30, 20)],
        SCB=[torch.ones(n) for n in (0, 1, 29, 31)] + [torch.ones(30, dtype=torch.float16), torch.ones(30, device="meta")],
    ),
    "optimizer_update_32bit": dict(
        optimizer_name=["adamw", "", "sgd"],
        g=[bell(299), bell(301), bell(300).to(torch.float16), bell(300).double(), torch.ones(300, dtype=torch.int32)],
        p=[bell(299), bell(300).to(torch.bfloat16), bell(300).double()],
        state1=[torch.zeros(n) for n in (0, 299, 301)] + [torch.zeros(300, dtype=torch.float16), torch.zeros(300, device="meta")],
        state2=[None, torch.zeros(299), torch.zeros(300, dtype=torch.float64)],
        step=[0, -1],
        unorm_vec=[None, torch.zeros(0), torch.zeros(1, dtype=torch.float16)],
    ),
    "optimizer_update_8bit_blockwise": dict(
        optimizer_name=["adamw", "", "sgd"],
        g=[bell(299), bell(300).double()],
        p=[bell(301)],
        state1=[torch.zeros(299, dtype=torch.uint8), torch.zeros(300), torch.zeros(300, dtype=torch.int8)],
        state2=[None, torch.zeros(299, dtype=torch.uint8)],
        qmap1=[torch.ones(255), torch.ones(16), torch.ones(256, dtype=torch.float64)],
        qmap2=[None, torch.ones(255)],
        absmax1=[torch.zeros(n) for n in (0, 1, 3)] + [torch.zeros(2, dtype=torch.float16)],
        absmax2=[None, torch.zeros(1)],
    ),
}
WRONG = [(name, argument, i) for name, arguments in BAD.items() for argument, values in arguments.items() for i in range(len(values))]


@pytest.mark.parametrize("name, argument, i", WRONG)
def test_wrong_argument_is_refused(name, argument, i):
    bad = BAD[name][argument][i]
    arguments = good_call(name) | {argument: bad}
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, torch.Tensor)}
    accepted = (*CLEAR, IndexError) if argument == "outlier_cols" else CLEAR
    with pytest.raises(accepted) as caught:
        call(name, arguments)
    assert len(str(caught.value)) > 15, "the message must say what is wrong"
    for key, value in before.items():
        if value.device.type != "meta":
            assert torch.equal(arguments[key].nan_to_num(), value.nan_to_num()), f"{key} was changed before the call failed"


@pytest.mark.parametrize("name", _good_calls())
def test_tensors_on_two_devices_are_refused(name):
    good = good_call(name)
    tensors = [key for key, value in good.items() if isinstance(value, torch.Tensor)]
    for key in tensors if len(tensors) > 1 else ():
        with pytest.raises(CLEAR + (NotImplementedError,)):
            call(name, good | {key: good[key].to("meta")})


@pytest.mark.parametrize("name", _good_calls())
def test_arguments_of_another_type_are_refused(name):
    good = good_call(name)
    for key, value in good.items():
        for wrong in ("text", object(), [[1.0]]):
            if not isinstance(value, str) or not isinstance(wrong, str):
                with pytest.raises(CLEAR):
                    call(name, good | {key: wrong})


def test_messages_say_what_was_wrong_and_what_is_needed():
    good = good_calls()
    for name, argument, bad, words in (
        ("dequantize_4bit", "absmax", torch.ones(48), ["dequantize_4bit", "absmax", "48", "49"]),
        ("dequantize_4bit", "A", torch.zeros(1559, 1, dtype=torch.uint8), ["dequantize_4bit", "3118", "3120"]),
        ("gemm_4bit", "A", torch.ones(3, 129), ["gemm_4bit", "129", "130"]),
        ("gemm_4bit", "bias", torch.ones(23), ["gemm_4bit", "bias", "24", "23"]),
        ("quantize_4bit", "blocksize", 65, ["quantize_4bit", "blocksize", "65", "64"]),
        ("quantize_blockwise", "code", torch.ones(255), ["quantize_blockwise", "code", "255", "256"]),
        ("dequantize_blockwise.out", "out", torch.ones(10, 24), ["out", "(10, 25)", "(10, 24)"]),
    ):
        with pytest.raises(CLEAR) as caught:
            call(name, good[name] | {argument: bad})
        assert all(word in str(caught.value) for word in words), str(caught.value)


# ----------------------------------------------------------------------------------------------------------------- unusual but legal values
@pytest.mark.parametrize("M, N, K", [(0, 24, 130), (3, 0, 130), (3, 24, 0), (0, 0, 0), (0, 24, 0)])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_products_of_empty_matrices(M, N, K, dtype):
    W = torch.ones(N, K)
    packed, absmax = ops.quantize_4bit(W, 64, "nf4", torch.uint8)
    bias = bell(N).to(dtype)
    y = ops.gemm_4bit(torch.ones(M, K, dtype=dtype), packed, [N, K], absmax, 64, "nf4", bias)
    assert torch.equal(y, bias.expand(M, N))
    y = ops.gemv_4bit(torch.ones(M, K, dtype=dtype), packed, [N, K], absmax, F.get_4bit_type("nf4", device=DEVICE), 64)
    assert torch.equal(y, torch.zeros(M, N, dtype=dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 6e4, 1e-45, -0.0])
def test_extreme_values_of_statistics_and_activations(value):
    good = good_calls()
    for dtype in FLOAT_DTYPES:
        A = torch.full((3, 130), value, dtype=dtype)
        product = ops.gemm_4bit(A, *list(good["gemm_4bit"].values())[1:6])
        for y in (product, call("gemv_4bit", good["gemv_4bit"] | {"A": A})):
            assert y.shape == (3, 24) and y.dtype == dtype
            assert y.isnan().all() if value != value else abs(value) > 1 or y.isfinite().all()
    for name in ("dequantize_4bit", "gemm_4bit", "gemv_4bit"):
        y = call(name, good[name] | {"absmax": torch.full((49,), value)})
        assert y.isnan().any() if value != value else abs(value) > 6e4 or y.isfinite().all()
    call("dequantize_blockwise", good["dequantize_blockwise"] | {"absmax": torch.full((4,), value)})


@pytest.mark.parametrize("code", ["descending", "shuffled", "nan", "inf", "constant"])
def test_unsorted_codes_are_refused_or_harmless(code):
    table = {
        "descending": F.create_dynamic_map().flip(0),
        "shuffled": F.create_dynamic_map()[torch.randperm(256)],
        "nan": torch.where(torch.arange(256) % 3 == 0, torch.nan, F.create_dynamic_map()),
        "inf": torch.linspace(-1, 1, 256) * torch.inf,
        "constant": torch.full((256,), 0.5),
    }[code]
    for n in (1, 255, 100_000):
        A = bell(n)
        try:
            codes, absmax = ops.quantize_blockwise(A, table, 256)
        except RuntimeError as error:
            assert "ascending" in str(error)
            continue
        assert codes.shape == A.shape and torch.equal(absmax, ops.quantize_blockwise(A, F.create_dynamic_map(), 256)[1])
        ops.dequantize_blockwise(codes, absmax, table, 256, torch.float16)


def test_a_huge_blocksize_is_one_block():
    for blocksize in (2**31, 2**40, 2**62):
        codes, absmax = ops.quantize_blockwise(bell(1000), F.create_dynamic_map(), blocksize)
        assert absmax.shape == (1,)
        assert ops.dequantize_blockwise(codes, absmax, F.create_dynamic_map(), blocksize, torch.float32).shape == (1000,)


def test_outputs_that_overlap_or_repeat_memory_are_refused_or_right():
    good = good_call("dequantize_blockwise.out")
    with pytest.raises(RuntimeError):
        call("dequantize_blockwise.out", good | {"out": torch.empty(1, 25).expand(10, 25)})


# ------------------------------------------------------------------------------------------------------------------- the functional layer
def test_states_that_do_not_fit_the_packed_data():
    packed, state = F.quantize_4bit(bell(24 * 130).reshape(24, 130), quant_type="nf4")
    nested = F.quantize_4bit(bell(24 * 130).reshape(24, 130), quant_type="nf4", compress_statistics=True)[1]
    lies = [
        (packed[:-1], state, {}),
        (packed, state, dict(shape=torch.Size((25, 130)))),
        (packed, state, dict(shape=torch.Size((2**40, 130)))),
        (packed, state, dict(blocksize=32)),
        (packed, state, dict(blocksize=0)),
        (packed, state, dict(absmax=state.absmax[:-1])),
        (packed, state, dict(absmax=state.absmax.to(torch.float16))),
        (packed, state, dict(absmax=state.absmax.to("meta"))),
        (packed, state, dict(quant_type="int4")),
        (packed, state, dict(dtype=torch.int32)),
        (packed, nested, dict(absmax=nested.absmax[:-1])),
        (packed, nested, dict(absmax=nested.absmax.float())),
        (packed, nested, dict(nested=False)),
        (packed.long(), state, {}),
    ]
    for data, base, changes in lies:
        lying = copy.copy(base)
        lying.__dict__ |= changes
        with pytest.raises(CLEAR):
            F.dequantize_4bit(data, lying)
        if not changes.keys() & {"quant_type", "dtype"}:  # the product asks the code and the activations instead
            with pytest.raises(CLEAR):
                F.gemv_4bit(torch.ones(1, 130), data, state=lying)


def test_8bit_states_that_do_not_fit_the_codes():
    codes, state = F.quantize_blockwise(bell(1000), blocksize=64)
    for changes in (
        dict(absmax=state.absmax[:-1]),
        dict(blocksize=32),
        dict(blocksize=-64),
        dict(code=state.code[:16]),
        dict(code=state.code.double()),
        dict(dtype=torch.float64),
    ):
        lying = copy.copy(state)
        lying.__dict__ |= changes
        with pytest.raises(CLEAR):
            F.dequantize_blockwise(codes, lying)


@pytest.mark.parametrize("shape", [(499, 1), (1000, 1), (0,)])
def test_given_outputs_of_the_wrong_size(shape):
    A, wrong = bell(1000), torch.empty(shape, dtype=torch.uint8)
    with pytest.raises(CLEAR):
        F.quantize_4bit(A, out=wrong)
    with pytest.raises(CLEAR):
        F.quantize_blockwise(A, absmax=torch.empty(7))
    packed, state = F.quantize_4bit(A)
    with pytest.raises(CLEAR):
        F.dequantize_4bit(packed, state, out=torch.empty(999))
    codes, state = F.quantize_blockwise(A)
    with pytest.raises(CLEAR):
        F.dequantize_blockwise(codes, state, out=torch.empty(1000, 1))


# ------------------------------------------------------------------------------------------------- in a process of its own: random mutations
def mutations(value, generator: random.Random):
    """Variants of an argument, most of them wrong."""
    if isinstance(value, torch.Tensor):
        flat = value.reshape(-1)
        yield flat[: flat.numel() // 2]
        yield flat[: max(flat.numel() - 1, 0)]
        yield flat[:0]
        yield value.unsqueeze(0)
        yield value.t() if value.dim() == 2 else flat.flip(0)
        yield torch.stack((value, value), -1)[..., 0]
        yield value.to(generator.choice([torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float64]))
        yield value.to("meta")
        yield flat[:1].expand(generator.choice([1, 7, flat.numel(), 2**16]))
        yield None
    elif isinstance(value, bool) or isinstance(value, str):
        yield generator.choice(["nf4", "fp4", "lion", "ademamix", "momentum", "", True])
    elif isinstance(value, int):
        yield from (0, 1, -1, value + 1, value * 2, value // 2, generator.choice(BLOCKSIZES_4BIT), 2**31, 2**62, -(2**63))
    elif isinstance(value, float):
        yield from (0.0, -1.0, float("nan"), float("inf"), 1e300)
    elif isinstance(value, list):
        yield from (value[::-1], value[:1], [*value, 1], [0, *value[1:]], [*value[:-1], 0], [-1, *value[1:]], [2**31, 2**31], [2**62, 8], [])
    elif isinstance(value, torch.dtype):
        yield generator.choice([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32])
    else:
        yield None


def mutate_many(rounds: int, seed: int) -> int:
    """Calls operators with one to three arguments mutated. Returns how many of the calls were refused."""
    generator, refusals = random.Random(seed), 0
    torch.set_num_threads(2)
    for _ in range(rounds):
        name = generator.choice(list(_good_calls()))
        arguments = good_call(name)
        for key in generator.sample(list(arguments), generator.randint(1, min(3, len(arguments)))):
            arguments[key] = generator.choice(list(mutations(arguments[key], generator)))
        try:
            call(name, arguments)
        except (*CLEAR, IndexError, NotImplementedError, ArithmeticError):  # the last: a beta of 1e300
            refusals += 1
    return refusals


def run_here(code: str):
    """Runs `code` in a fresh interpreter that sees this module and the same library."""
    path = os.pathsep.join([str(HERE), str(Path(bitsandbytes.__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    preparation = "import torch, helpers as h; torch.set_default_device(h.DEVICE if h.DEVICE != 'cpu' else None); import test_hostile_inputs as t"
    done = run_python(f"{preparation}\n{code}", env={**os.environ, "PYTHONPATH": path, "PYTHONFAULTHANDLER": "1"}, cwd=HERE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("seed", [1, 2])
def test_random_mutations_never_crash(seed):
    refusals = int(run_here(f"print(t.mutate_many(1000, {seed}))").split()[-1])
    assert refusals > 300


# ------------------------------------------------------------------------------------- in a process of its own: buffers at an unmapped page
def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last of a page, with an unmapped page behind it: reading one byte too far kills the process."""
    import ctypes
    import mmap

    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    pages = -(-size // page) + 1
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.mmap(None, pages * page, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    end = start + (pages - 1) * page
    assert libc.mprotect(end, page, 0) == 0
    if not size:
        return tensor
    copied = torch.frombuffer((ctypes.c_char * size).from_address(end - size), dtype=tensor.dtype).view(tensor.shape)
    return copied.copy_(tensor)


def run_guarded_calls() -> int:
    """Good calls of many sizes with every tensor, outputs of `.out` forms included, at the end of mapped memory."""
    calls = 0
    for n in (1, 2, 3, 8, 15, 17, 33, 63, 64, 65, 127, 257, 1000, 4097):
        for dtype in FLOAT_DTYPES:
            A = guarded(bell(n).to(dtype))
            for blocksize in (32, 64, 256):
                for quant_type in QUANT_TYPES:
                    packed, absmax = ops.quantize_4bit(A, blocksize, quant_type, torch.uint8)
                    out = guarded(torch.empty(n, dtype=dtype))
                    ops.dequantize_4bit.out(guarded(packed), guarded(absmax), blocksize, quant_type, [n], dtype, out=out)
                code = guarded(F.create_dynamic_map())
                codes, absmax = ops.quantize_blockwise(A, code, blocksize)
                ops.dequantize_blockwise.out(guarded(codes), guarded(absmax), code, blocksize, dtype, out=guarded(torch.empty(n, dtype=dtype)))
                calls += 6
    for M in (1, 2, 4, 5, 17, 33, 65):
        for N, K in ((1, 1), (1, 7), (3, 5), (2, 33), (7, 64), (5, 100), (33, 129), (17, 192), (8, 258), (64, 96)):
            W = bell(N * K).reshape(N, K)
            for dtype in FLOAT_DTYPES:
                for blocksize, nested in ((32, False), (64, True), (4096, False)):
                    packed, state = F.quantize_4bit(W, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
                    A, bias = guarded(bell(M * K).reshape(M, K).to(dtype)), guarded(bell(N).to(dtype))
                    scales = guarded(state.state2.absmax if nested else state.absmax)
                    more = [guarded(t) for t in (state.absmax, state.state2.code, state.offset)] if nested else []
                    ops.gemm_4bit(A, guarded(packed), [N, K], scales, blocksize, "nf4", bias, *more)
                    grad = guarded(bell(M * N).reshape(M, N).to(dtype))
                    ops.gemm_4bit_backward(grad, guarded(packed), [N, K], scales, blocksize, "nf4", *more)
                    calls += 1
    return calls


@cpu_only("the memory of a GPU has no page that can be taken away; its kernels are watched in test_cuda_*.py")
@pytest.mark.skipif(sys.platform != "linux", reason="the guard page is made with Linux's mmap")
def test_nothing_is_read_or_written_behind_a_buffer():
    assert int(run_here("print(t.run_guarded_calls())").split()[-1]) > 600
