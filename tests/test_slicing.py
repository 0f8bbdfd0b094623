"""Parts of packed weights: equal ones for tensor parallelism, and what torch's functions cut off."""

import copy

from helpers import DEVICE, assert_same_bits, bell, grid
import pytest
import torch
import torch.nn.functional as F

import bitsandbytes as bnb


def quantised(shape=(48, 128), **options):
    return bnb.nn.Params4bit(bell(torch.Size(shape).numel()).view(shape), **{"quant_type": "nf4", **options}).to(DEVICE)


@grid(storage=[torch.uint8, torch.bfloat16, torch.float32], nested=[False, True], blocksize=[32, 64, 256])
def test_equal_parts_for_tensor_parallelism(storage, nested, blocksize):
    """Values and the products with them are those of the whole, whether blocks end where the parts do or not."""
    weight = quantised((48, 192), quant_storage=storage, compress_statistics=nested, blocksize=blocksize)
    dense, x = weight.dequantize(), bell(3 * 192, seed=3).view(3, 192)
    for dim, world in ((0, 2), (0, 3), (0, 16), (1, 2), (1, 3)):
        parts = [bnb.nn.shard_4bit(weight, dim, rank, world) for rank in range(world)]
        assert all(part.dtype is storage and part.quant_type == "nf4" and part.quant_state.dtype is torch.float32 for part in parts)
        assert_same_bits(torch.cat([part.dequantize() for part in parts], dim), dense)
        pieces = zip(parts, x.chunk(world, -1) if dim else [x] * world)
        products = [bnb.matmul_4bit(inputs, part, part.quant_state) for part, inputs in pieces]
        together = sum(products) if dim else torch.cat(products, -1)
        torch.testing.assert_close(together, F.linear(x, dense), rtol=1e-4, atol=1e-4)


def test_parts_keep_nested_statistics_where_their_blocks_begin():
    """A block of nested statistics is 256 blocks of 64 elements: 128 rows of 128."""
    whole = quantised((256, 128), compress_statistics=True)
    second = bnb.nn.shard_4bit(whole, 0, 1, 2)
    assert second.compress_statistics and second.quant_state.nested and second.state2.absmax.numel() == 1
    assert second.data_ptr() == whole.data_ptr() + whole.numel() // 2
    assert not bnb.nn.shard_4bit(whole, 0, 1, 4).quant_state.nested
    assert not bnb.nn.shard_4bit(whole, 1, 1, 2).quant_state.nested


def test_stacks_are_divided_along_their_first_dimension():
    whole = quantised((4, 6, 32), compress_statistics=True)
    parts = [bnb.nn.shard_4bit(whole, 0, rank, 2) for rank in range(2)]
    assert [tuple(part.quant_state.shape) for part in parts] == [(2, 6, 32)] * 2
    assert_same_bits(torch.cat([part.dequantize() for part in parts]), whole.dequantize())
    with pytest.raises(ValueError, match="dim must be 0"):
        bnb.nn.shard_4bit(whole, 1, 0, 2)


def test_weights_in_the_layout_of_old_releases():
    """``shard_4bit`` brings them back to the canonical one. In theirs a piece is not a run of bytes."""
    plain = quantised((64, 128), compress_statistics=False)
    codes, state = bnb.functional._convert_weight_packed_for_cpu(plain.data, copy.copy(plain.quant_state))
    weight = bnb.nn.Params4bit(codes, quant_state=state, quant_type="nf4", bnb_quantized=True)
    part, expected = (bnb.nn.shard_4bit(w, 0, 1, 2) for w in (weight, plain))
    assert_same_bits(part.dequantize(), expected.dequantize())
    assert all(piece.quant_state is None for piece in torch.chunk(weight, 2))


def test_a_part_is_the_weight_of_a_layer_of_its_own():
    whole = bnb.nn.LinearNF4(128, 64, bias=False, quant_storage=torch.bfloat16).to(DEVICE)
    half = bnb.nn.LinearNF4(128, 32, bias=False)
    half.weight = bnb.nn.shard_4bit(whole.weight, 0, 1, 2)
    x = bell(2 * 128).view(2, 128)
    assert_same_bits(half(x), whole(x)[:, 32:])
    other = bnb.nn.LinearNF4(128, 32, bias=False)
    other.load_state_dict(half.state_dict())
    assert_same_bits(other(x), half(x))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 0, 7), "cannot be divided among 7"),
        ((1, 0, 5), "cannot be divided among 5"),
        ((1, 0, 8), "smaller than 32"),
        ((2, 0, 2), "dim must be"),
        ((0, 2, 2), "rank must be"),
        ((0, -1, 2), "rank must be"),
    ],
)
def test_parts_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        bnb.nn.shard_4bit(quantised(), *arguments)


def test_only_quantised_weights_have_parts():
    with pytest.raises(TypeError, match="Params4bit, got Tensor"):
        bnb.nn.shard_4bit(torch.ones(4, 64), 0, 0, 2)
    with pytest.raises(ValueError, match="move it to a device"):
        bnb.nn.shard_4bit(bnb.nn.Params4bit(torch.ones(4, 64)), 0, 0, 2)


CUTS = {
    "chunk": lambda w, n: torch.chunk(w, n),
    "split": lambda w, n: torch.split(w, w.shape[0] // n),
    "narrow": lambda w, n: [w.narrow(0, i * (w.shape[0] // n), w.shape[0] // n) for i in range(n)],
    "slice": lambda w, n: [w[i * (w.shape[0] // n) : (i + 1) * (w.shape[0] // n)] for i in range(n)],
}


@grid(cut=CUTS, storage=[torch.uint8, torch.float32], nested=[False, True])
def test_pieces_take_their_statistics_along(cut, storage, nested):
    """Rows stay rows; a piece that is not whole rows is a vector."""
    weight = quantised((48, 128), quant_storage=storage, compress_statistics=nested)
    dense = weight.dequantize()
    for count, shape in ((4, (12, 128)), (32, (192,))):
        pieces = CUTS[cut](weight, count)
        assert [tuple(piece.quant_state.shape) for piece in pieces] == [shape] * count
        assert_same_bits(torch.cat([piece.dequantize() for piece in pieces]).view(48, 128), dense)


@pytest.mark.parametrize("cut", [lambda w: w.narrow(0, 0, 10), lambda w: torch.narrow(w, 0, 5, 32), lambda w: w[:10], lambda w: w[16:40]])
def test_pieces_that_are_not_whole_blocks_are_refused(cut):
    with pytest.raises(ValueError, match="whole blocks of 64"):
        cut(quantised())


def test_the_last_piece_may_end_within_a_block():
    weight = quantised((5, 31))
    last = weight[64:]
    assert last.quant_state.shape == (27,)
    assert_same_bits(last.dequantize(), weight.dequantize().flatten()[128:])
