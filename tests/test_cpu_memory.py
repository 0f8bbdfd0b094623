"""Large results of the CPU kernels: they use memory again, never while somebody can still see it, and are written past the caches."""

import gc

from native_cpu import DTYPES, lib, library  # noqa: F401
import pytest
import torch

from bitsandbytes.backends.cpu import memory
import bitsandbytes.functional as F


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setattr(memory, "SMALLEST", 1 << 16)
    monkeypatch.setattr(memory, "MOST_KEPT", 1 << 18)
    monkeypatch.setattr(memory, "_kept", {})


def empty(size=1 << 16):
    return memory.empty((size // 4,), torch.float32, torch.zeros(1))


def test_memory_is_used_again_after_the_tensor_died():
    address = empty().data_ptr()
    assert empty().data_ptr() == address


def test_living_results_do_not_share_memory():
    first, second = empty().fill_(1), empty().fill_(2)
    assert first.data_ptr() != second.data_ptr()
    assert first.eq(1).all() and second.eq(2).all()


@pytest.mark.parametrize("keep", [lambda t: t[5:7], lambda t: t.view(torch.int32), lambda t: t.numpy(), lambda t: t.untyped_storage()])
def test_views_keep_the_memory_from_being_used_again(keep):
    tensor = empty().fill_(3)
    address, kept = tensor.data_ptr(), keep(tensor)
    del tensor
    gc.collect()
    assert empty().data_ptr() != address
    del kept
    gc.collect()
    assert empty().data_ptr() == address


def test_other_sizes_get_memory_of_their_own():
    address = empty().data_ptr()
    assert empty(1 << 17).data_ptr() != address


def test_little_is_kept():
    tensors = [empty() for _ in range(9)]
    del tensors
    assert sum(size * len(kept) for size, kept in memory._kept.items()) <= memory.MOST_KEPT


def test_more_than_may_be_kept_is_given_back():
    empty(1 << 19)
    assert not memory._kept.get(1 << 19)


def test_small_results_are_ordinary_tensors():
    assert empty(1 << 10).untyped_storage().resizable()


def test_results_can_be_shared_pickled_and_trained():
    tensor = empty().fill_(4)
    tensor.share_memory_()
    parameter = torch.nn.Parameter(empty().fill_(1))
    (parameter * tensor).sum().backward()
    assert parameter.grad.eq(4).all() and tensor.is_shared()


def test_dequantised_weights_are_right_each_time():
    weights = [torch.randn(256, 128) for _ in range(3)]
    quantised = [F.quantize_4bit(weight, quant_type="nf4") for weight in weights]
    kept = [F.dequantize_4bit(*pair) for pair in quantised]
    for _ in range(3):
        for pair, expected in zip(quantised, kept):
            assert torch.equal(F.dequantize_4bit(*pair), expected)
    for weight, result in zip(weights, kept):
        assert (weight - result).abs().mean() < 0.1


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "fp16", "bf16"])
def test_large_results_are_the_same_numbers_as_small_ones(lib, dtype, offset):
    """Beyond the size of the caches results are written past them, if their vectors are aligned."""
    blocksize, small = 64, 64 * 1024
    n = (40 << 20) // dtype.itemsize + 40  # a short last block too
    blocks = -(-n // blocksize)
    codes, absmax = torch.randint(0, 256, (n,), dtype=torch.uint8), torch.rand(blocks)
    code = torch.linspace(-1, 1, 256)
    out = torch.zeros(n + 64 + offset, dtype=dtype)
    start = (-out.data_ptr() // dtype.itemsize) % (64 // dtype.itemsize) + offset
    out = out[start : start + n]

    def four_bit(first, count, into):
        address = codes.data_ptr() + first // 2, absmax.data_ptr() + first // blocksize * 4
        return lib.bnb_cpu_dequantize_4bit(*address, count, blocksize, 2, DTYPES[dtype], into.data_ptr(), 2)

    def eight_bit(first, count, into):
        address = codes.data_ptr() + first, absmax.data_ptr() + first // blocksize * 4
        return lib.bnb_cpu_dequantize_blockwise(code.data_ptr(), *address, count, blocksize, DTYPES[dtype], into.data_ptr(), 2)

    for dequantize in (four_bit, eight_bit):
        assert dequantize(0, n, out) == 0
        for first in (0, n // 2 // small * small, n // small * small):
            piece = torch.empty(min(small, n - first), dtype=dtype)
            assert dequantize(first, piece.numel(), piece) == 0
            assert torch.equal(out[first : first + piece.numel()], piece)
