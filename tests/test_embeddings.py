"""Embedding tables: quantised ones that look up single rows, save and load; trained ones whose optimizer state stays in 32 bit."""

import copy
from functools import partial
import gc
import io
import pickle
import weakref

import accelerate
from helpers import DEVICE, assert_same_bits, bell, grid, raw_bytes
from hypothesis import given
from hypothesis import strategies as st
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import functional
from bitsandbytes.nn import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, Params4bit, StableEmbedding
from bitsandbytes.optim.manager import GlobalOptimManager

QUANTISED = [EmbeddingNF4, EmbeddingFP4, Embedding8bit]
ROWS, WIDTH = 100, 96


def table(rows=ROWS, width=WIDTH, seed=1) -> torch.Tensor:
    return bell(rows * width, seed).reshape(rows, width)


def filled(layer: nn.Embedding, seed=1) -> nn.Embedding:
    with torch.no_grad():
        layer.weight.copy_(table(layer.num_embeddings, layer.embedding_dim, seed))
    return layer


def make(kind, rows=ROWS, width=WIDTH, seed=1, **options) -> nn.Embedding:
    """A quantised embedding."""
    return filled(kind(rows, width, **options), seed).to(DEVICE)


KINDS = {
    "nf4": lambda **o: make(EmbeddingNF4, **o),
    "nf4 nested": lambda **o: make(EmbeddingNF4, compress_statistics=True, **o),
    "fp4 in bfloat16": lambda **o: make(EmbeddingFP4, quant_storage=torch.bfloat16, **o),
    "int8": lambda **o: make(Embedding8bit, **o),
}
kinds = pytest.mark.parametrize("make_kind", KINDS.values(), ids=KINDS)


# -------------------------------------------------------------------------------------------------------------------------- lookups
@grid(width=[1, 2, 31, 64, 65, 66, 96, 128, 576], nested=[False, True], storage=[torch.uint8, torch.float32])
def test_a_lookup_gives_the_rows_of_the_dequantised_table(width, nested, storage):
    layer = make(Embedding4bit, 37, width, quant_type="nf4", compress_statistics=nested, quant_storage=storage)
    whole = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for ids in (torch.tensor([36, 0, 5, 5]), torch.randint(37, (2, 3, 4), dtype=torch.int32), torch.tensor(7), torch.empty(0, 3, dtype=torch.int64)):
        assert_same_bits(layer(ids), whole[ids.long()])
    assert torch.equal(layer.dequantize(), whole)


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 200),
    blocksize=st.sampled_from([32, 64, 512]),
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_lookups_hold_for_any_width_and_blocksize(rows, width, blocksize, nested, quant_type):
    packed, state = functional.quantize_4bit(table(rows, width), blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)
    layer = Embedding4bit(rows, width)
    layer.weight = Params4bit(packed, quant_state=state, bnb_quantized=True, module=layer)
    assert_same_bits(layer(torch.arange(rows)), functional.dequantize_4bit(packed, state))


@grid(dtype=[torch.float32, torch.float16, torch.bfloat16])
def test_an_int8_row_is_its_codes_times_its_scale(dtype):
    layer = make(Embedding8bit, dtype=dtype)
    ids = torch.tensor([[3, 99], [0, 3]])
    codes, scales, _ = functional.int8_vectorwise_quant(table().to(dtype))
    assert_same_bits(layer(ids), (codes[ids].float() * (scales[ids] / 127.0)[..., None]).to(dtype))
    assert_same_bits(layer.dequantize()[ids], layer(ids))
    assert (layer(ids).float() - table()[ids]).abs().max() < 0.03


@kinds
def test_rows_that_do_not_exist_are_refused(make_kind):
    for width in (64, 65):
        layer = make_kind(width=width)
        for wrong in (ROWS, -1):
            with pytest.raises((IndexError, RuntimeError), match="index|range"):
                layer(torch.tensor([0, wrong]))


def test_an_odd_table_has_no_row_after_its_last():
    with pytest.raises((IndexError, RuntimeError), match="index|range"):
        make(EmbeddingNF4, 7, 1)(torch.tensor([7]))


@kinds
def test_the_result_has_the_dtype_of_construction(make_kind):
    layer, ids = make_kind(dtype=torch.bfloat16), torch.tensor([1, 2])
    assert layer(ids).dtype == layer.dtype == torch.bfloat16
    before = layer(ids)
    assert_same_bits(layer.float()(ids), before)


def test_a_lookup_reads_no_more_than_its_rows(monkeypatch):
    """Every tensor that a lookup makes is of the size of the result, not of the table."""
    largest = 0

    class Sizes(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result._base is None and result.untyped_storage().data_ptr() not in own:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    for width in (64, 65, 96):
        for nested in (False, True):
            layer = make(EmbeddingNF4, 1000, width, compress_statistics=nested)
            state = layer.weight.quant_state
            tensors = [layer.weight.data, state.absmax, *([state.state2.absmax] if nested else [])]
            own = {tensor.untyped_storage().data_ptr() for tensor in tensors}
            with Sizes():
                layer(torch.tensor([999, 17]))
    assert 0 < largest <= 2 * 96 * 8


# ------------------------------------------------------------------------------------------------------- the arguments of nn.Embedding
@kinds
def test_arguments_of_nn_embedding(make_kind):
    layer = make_kind(padding_idx=-1, max_norm=4.0, norm_type=2.0, scale_grad_by_freq=True)
    assert layer.padding_idx == ROWS - 1 and layer.scale_grad_by_freq
    free = make_kind()
    free.load_state_dict(layer.state_dict())
    rows = free(torch.arange(ROWS))
    norms = rows.norm(dim=1, keepdim=True)
    assert (norms > 4.0).any(), "nothing to shorten in this test"
    expected = torch.where(norms > 4.0, rows * 4.0 / norms, rows)
    assert torch.allclose(layer(torch.arange(ROWS)), expected, rtol=1e-5)
    assert torch.equal(free(torch.arange(ROWS)), rows)


def test_a_width_without_common_blocks_is_warned_of_once(caplog):
    EmbeddingNF4(10, 96), EmbeddingNF4(10, 64)
    assert not caplog.records
    EmbeddingNF4(10, 65)
    assert len(caplog.records) == 1 and "inference" in caplog.text and caplog.records[0].name == "bitsandbytes.nn.modules"


# ------------------------------------------------------------------------------------------------------------------ tables in float
@pytest.mark.parametrize("kind", QUANTISED)
def test_a_table_that_was_never_quantised_is_used_as_it_is_with_one_warning(kind, caplog):
    layer, ids = filled(kind(ROWS, WIDTH)), torch.tensor([3, 4])
    assert torch.equal(layer(ids), table()[ids]) and torch.equal(layer(ids), layer.dequantize()[ids])
    assert len(caplog.records) == 1 and f"{kind.__name__}({ROWS}, {WIDTH})" in caplog.text
    with pytest.raises(NotImplementedError, match="device"):
        nn.Sequential(layer).state_dict()


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_table_tied_to_a_float_weight_saves_as_a_plain_weight(kind):
    layer, head = kind(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
    layer.weight = head.weight
    assert set(layer.state_dict()) == {"weight"}
    ids = torch.tensor([[1, 2]])
    layer(ids).sum().backward()
    assert torch.equal(layer(ids), head.weight[ids]) and head.weight.grad[1].eq(1).all()


def test_codes_without_statistics_are_an_error_that_names_the_layer():
    layer = make(EmbeddingNF4)
    layer.weight.quant_state = None
    ids = torch.tensor([1])
    assert torch.equal(layer(ids), make(EmbeddingNF4)(ids)), "the layer remembers the state"
    layer.quant_state = layer.weight.quant_state = None
    with pytest.raises(RuntimeError, match="EmbeddingNF4.*quant_state"):
        layer(ids)
    layer = make(Embedding8bit)
    layer.weight.SCB = None
    with pytest.raises(RuntimeError, match="Embedding8bit.*SCB"):
        layer(ids)


def test_a_weight_that_became_a_plain_parameter_gets_its_state_back():
    layer, ids = make(EmbeddingNF4, compress_statistics=True), torch.tensor([[5, 6]])
    expected = layer(ids)
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert_same_bits(layer(ids), expected)
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    assert type(layer.weight) is Params4bit and layer.weight.quant_type == "nf4" and layer.weight.compress_statistics
    assert_same_bits(layer(ids), expected)


# ------------------------------------------------------------------------------------------------------------------------ state dicts
@kinds
@pytest.mark.parametrize("target", ["quantised", "fresh", "meta", "other format"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_saved_table_loads(make_kind, target, assign):
    source, ids = make_kind(), torch.arange(ROWS)
    kind = type(source)
    other = {"quant_storage": torch.float16, "compress_statistics": True} if kind is not Embedding8bit else {}
    targets = {
        "quantised": lambda: make_kind(seed=2),
        "fresh": lambda: kind(ROWS, WIDTH),
        "meta": lambda: kind(ROWS, WIDTH, device="meta"),
        "other format": lambda: make(kind, seed=2, **other),
    }
    layer, saved = nn.Sequential(targets[target]()), nn.Sequential(source).state_dict()
    layer.load_state_dict(saved, assign=assign)
    assert_same_bits(layer(ids), source(ids))
    again = layer.state_dict()
    assert set(again) == set(saved) and all(raw_bytes(again[key]) == raw_bytes(saved[key]) for key in saved)


def test_keys_are_those_of_the_linear_layers():
    statistics = {"weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}
    assert set(make(EmbeddingNF4).state_dict()) == {"weight"} | statistics
    nested = {"weight.nested_absmax", "weight.nested_quant_map"}
    assert set(make(EmbeddingNF4, compress_statistics=True).state_dict()) == {"weight"} | statistics | nested
    assert set(make(Embedding8bit).state_dict()) == {"weight", "SCB", "weight_format"}


@kinds
def test_a_float_table_is_quantised_when_loaded(make_kind):
    layer, ids = make_kind(seed=2), torch.arange(ROWS)
    layer.load_state_dict({"weight": table()})
    assert_same_bits(layer(ids), make_kind()(ids))


@kinds
def test_a_missing_scale_is_reported_and_the_table_left_alone(make_kind):
    layer, saved = make_kind(seed=2), make_kind().state_dict()
    before = layer(torch.arange(ROWS))
    key = "SCB" if "SCB" in saved else "weight.absmax"
    del saved[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        layer.load_state_dict(saved)
    assert torch.equal(layer(torch.arange(ROWS)), before)


def through_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


@kinds
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies_are_whole(make_kind, duplicate):
    layer, ids = make_kind(), torch.arange(ROWS)
    replica = duplicate(layer)
    assert type(replica) is type(layer) and type(replica.weight) is type(layer.weight)
    assert_same_bits(replica(ids), layer(ids))
    replica.load_state_dict(make_kind(seed=2).state_dict())
    assert torch.equal(layer(ids), make_kind()(ids)), "the copy shares memory with the original"


# ------------------------------------------------------------------------------------------------------------------------- neighbours
class Tied(nn.Module):
    """A model whose input embedding is its output head."""

    def __init__(self, embedding, head, seed=1):
        super().__init__()
        self.tokens, self.head = filled(embedding, seed), head
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        return self.head(self.tokens(ids))


@kinds
@pytest.mark.parametrize("where", ["memory", "disk", "by hand"])
def test_a_table_is_offloaded_and_comes_back(make_kind, where, tmp_path):
    model, ids = nn.Sequential(make_kind(), nn.LayerNorm(WIDTH, elementwise_affine=False)).to(DEVICE), torch.arange(7)
    expected = model(ids)
    if where == "by hand":
        model, hook = accelerate.cpu_offload_with_hook(model, execution_device=DEVICE)
        assert_same_bits(model(ids), expected)
        hook.offload()
    else:
        offload = {"memory": accelerate.cpu_offload, "disk": partial(accelerate.disk_offload, offload_dir=tmp_path)}[where]
        offload(model, execution_device=DEVICE)
        assert model[0].weight.is_meta
    for _ in range(2):
        assert_same_bits(model(ids), expected)


TIED = {
    "nf4": lambda seed=1: Tied(EmbeddingNF4(ROWS, 64), bnb.nn.Linear4bit(64, ROWS, bias=False, quant_type="nf4"), seed),
    "int8": lambda seed=1: Tied(Embedding8bit(ROWS, 64), bnb.nn.Linear8bitLt(64, ROWS, bias=False, has_fp16_weights=False), seed),
}


@pytest.mark.parametrize("make_tied", TIED.values(), ids=TIED)
def test_one_weight_serves_the_embedding_and_the_head(make_tied):
    model, ids = make_tied().to(DEVICE), torch.arange(ROWS)
    assert model.tokens.weight is model.head.weight
    rows = model.tokens.dequantize()
    assert torch.allclose(model(ids), rows @ rows.t(), rtol=0.02, atol=0.2)
    other = make_tied(seed=2).to(DEVICE)
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(ids), model(ids))
    assert other.tokens.weight is other.head.weight
    replica = copy.deepcopy(model)
    assert replica.tokens.weight is replica.head.weight
    assert_same_bits(replica(ids), model(ids))


@kinds
@pytest.mark.parametrize("width", [64, 65])
def test_compiles_as_one_graph(make_kind, width):
    layer, ids = make_kind(width=width), torch.tensor([[1, 2, 3]])
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_same_bits(compiled(ids), layer(ids))


@grid(width=[64, 65], nested=[False, True], strict=[False, True])
def test_exports(width, nested, strict):
    layer, ids = make(EmbeddingNF4, width=width, compress_statistics=nested), torch.tensor([[1, 2, 3]])
    exported = torch.export.export(layer, (ids,), strict=strict).module()
    assert_same_bits(exported(ids + 5), layer(ids + 5))


def test_exports_in_8_bit():
    layer, ids = make(Embedding8bit), torch.tensor([[1, 2, 3]])
    exported = torch.export.export(layer, (ids,), strict=True).module()
    assert_same_bits(exported(ids + 5), layer(ids + 5))


@kinds
@pytest.mark.parametrize("width", [64, 65])
def test_maps_over_a_batch_of_indices(make_kind, width):
    layer, ids = make_kind(width=width), torch.tensor([[1, 2], [3, 99]])
    assert_same_bits(torch.func.vmap(layer)(ids), layer(ids))


# ---------------------------------------------------------------------------------------------------------------- trained embeddings
@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_trained_embeddings_take_every_argument(kind):
    layer = kind(10, 8, padding_idx=3, max_norm=1.0, norm_type=1.0, scale_grad_by_freq=True, sparse=False, device=DEVICE, dtype=torch.bfloat16)
    assert (layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq) == (3, 1.0, 1.0, True)
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.requires_grad and layer.weight[3].eq(0).all()
    assert layer(torch.tensor([1, 3])).dtype == torch.bfloat16
    weight = torch.randn(10, 8)
    assert kind(10, 8, _weight=weight).weight.data_ptr() == weight.data_ptr()
    assert kind(10, 8, device="meta").weight.is_meta


def test_initialisation_is_xavier_uniform():
    for kind in (Embedding, StableEmbedding):
        torch.manual_seed(5)
        layer = kind(50, 20)
        torch.manual_seed(5)
        assert torch.equal(layer.weight, nn.init.xavier_uniform_(torch.empty(50, 20)))


@grid(dtype=[torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_stable_embedding_normalises_in_every_dtype(dtype):
    layer = StableEmbedding(10, 16).to(dtype)
    assert list(layer.state_dict()) == ["weight", "norm.weight", "norm.bias"]
    rows = layer(torch.tensor([[1, 2]]))
    assert rows.dtype == layer.weight.dtype and rows.shape == (1, 2, 16)
    assert torch.allclose(rows.float(), nn.functional.layer_norm(layer.weight[[1, 2]].float(), (16,))[None], atol=0.05)


@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_optimizers_keep_32_bit_state_and_let_the_layer_go(kind):
    manager = GlobalOptimManager.get_instance()

    def registered(layer):
        return [(name, config) for module, name, config in manager.module_weight_config_triple if module is layer]

    layer = kind(100, 64)
    replica = copy.deepcopy(layer)
    assert registered(layer) == registered(replica) == [("weight", {"optim_bits": 32})]
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None, "the manager keeps the layer alive"


@pytest.mark.parametrize("kind", [Embedding, StableEmbedding])
def test_an_8_bit_optimizer_keeps_the_state_of_the_table_in_32_bit(kind):
    model = nn.ModuleDict({"tokens": kind(100, 64), "other": nn.Embedding(100, 64)})
    optimizer = bnb.optim.AdamW8bit(model.parameters())
    ids = torch.tensor([1, 2])
    (model["tokens"](ids).square().sum() + model["other"](ids).square().sum()).backward()
    optimizer.step()
    assert optimizer.state[model["tokens"].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model["other"].weight]["state1"].dtype == torch.uint8
