"""State dicts of 4-bit layers: what is written, and that it loads wherever it can and is refused, with its name, where it cannot."""

import copy
import io
import json

import pytest
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from tests.helpers import DEVICE, STORAGE_DTYPES, raw_bytes, run_python

IN, OUT = 96, 48


def make(quant_type="nf4", nested=True, storage=torch.uint8, blocksize=64, bias=True, device=DEVICE) -> Linear4bit:
    """A layer with random values; quantised, unless ``device`` is None or "meta"."""
    created_on = "meta" if device == "meta" else None
    layer = Linear4bit(IN, OUT, bias, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, device=created_on)
    layer.weight.blocksize = blocksize
    return layer if device in (None, "meta") else layer.to(device)


def with_plain_weight() -> Linear4bit:
    layer = make(device=None)
    layer.weight = nn.Parameter(torch.randn(OUT, IN))
    return layer


def with_lost_state() -> Linear4bit:
    layer = make()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    layer.quant_state = None
    return layer


def forwarded(training: bool) -> Linear4bit:
    layer = make().train(training)
    layer(torch.randn(2, IN))
    return layer


DESTINATIONS = {
    "quantised": make,
    "not yet quantised": lambda: make(device=None),
    "on meta": lambda: make(device="meta"),
    "quantised, then meta": lambda: make().to("meta"),
    "other type": lambda: make(quant_type="fp4"),
    "not nested": lambda: make(nested=False),
    "other blocksize": lambda: make(blocksize=128),
    "other storage": lambda: make(storage=torch.bfloat16),
    "plain weight": with_plain_weight,
    "state lost": with_lost_state,
    "after training": lambda: forwarded(True),
    "after inference": lambda: forwarded(False),
}
SOURCES = {
    "nested": {},
    "flat": {"nested": False},
    "fp4, 128, float32": {"quant_type": "fp4", "blocksize": 128, "storage": torch.float32},
    "bfloat16": {"storage": torch.bfloat16},
}
destinations = pytest.mark.parametrize("destination", DESTINATIONS.values(), ids=DESTINATIONS.keys())
strictness = pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
assignment = pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])

X = torch.linspace(-1, 1, 3 * IN).view(3, IN)


def output(layer: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return layer(X)


def contents(layer: nn.Module) -> dict[str, bytes]:
    return {key: raw_bytes(value) for key, value in layer.state_dict().items() if not value.is_meta}


def assert_is_whole(layer: Linear4bit) -> None:
    """Weight and layer agree on one state, whatever happened before."""
    assert type(layer.weight) is Params4bit
    assert layer.weight.module is layer and layer.weight.bnb_quantized
    assert layer.quant_state is layer.weight.quant_state is layer.__dict__["quant_state"]
    state = layer.quant_state
    assert (layer.weight.quant_type, layer.weight.blocksize) == (state.quant_type, state.blocksize)
    assert (layer.weight.compress_statistics, layer.weight.quant_storage) == (state.nested, layer.weight.dtype)


# ------------------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_keys_are_those_of_the_published_format(quant_type, nested):
    state_dict = make(quant_type=quant_type, nested=nested).state_dict(prefix="a.b.")
    statistics = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else []), f"quant_state.bitsandbytes__{quant_type}"]
    assert list(state_dict) == ["a.b.weight", "a.b.bias", *[f"a.b.weight.{name}" for name in statistics]]
    assert all(type(value) is torch.Tensor and not value.requires_grad for value in state_dict.values())


def test_an_unquantised_layer_saves_like_a_linear_layer():
    assert list(make(device=None).state_dict()) == ["weight", "bias"]


def test_saving_changes_nothing():
    layer = make(nested=False).eval()
    before = output(layer)
    first, second = contents(layer), contents(layer)
    assert first == second and torch.equal(output(layer), before) and contents(layer) == first


@pytest.mark.parametrize("nested", [False, True])
def test_inference_does_not_touch_what_will_be_saved(nested):
    layer = make(nested=nested, bias=False)
    before = contents(layer)
    layer.eval()(torch.randn(1, IN, dtype=torch.bfloat16))
    layer.train()(torch.randn(4, IN, requires_grad=True)).sum().backward()
    assert contents(layer) == before


def test_variables_are_kept_on_request():
    layer = make()
    assert layer.state_dict(keep_vars=True)["weight"] is layer.weight


def test_a_weight_in_the_published_cpu_layout_is_saved_canonically():
    layer = Linear4bit(64, 64, quant_type="nf4").to(DEVICE)
    before = contents(layer)
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, copy.copy(layer.quant_state))
    layer.weight.data, layer.weight.quant_state = packed, state
    assert contents(layer) == before
    assert state.packing_format_for_cpu and layer.weight.shape == packed.shape


def test_statistics_are_saved_for_a_weight_that_lost_its_class():
    """Under FSDP2 the parameter is replaced by a plain sharded one."""
    layer = make()
    before = layer.state_dict()
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert list(layer.state_dict()) == list(before)


@pytest.mark.parametrize("dtype,limit", [(torch.float16, 0.29), (torch.bfloat16, 0.29), (torch.float32, 0.143)])
def test_files_are_small(dtype, limit):
    def size(module):
        torch.save(module.state_dict(), buffer := io.BytesIO())
        return buffer.tell()

    dense = nn.Linear(300, 400, dtype=dtype)
    layer = bnb.nn.LinearNF4(300, 400)
    layer.weight = Params4bit(dense.weight, quant_type="nf4")
    layer.bias = nn.Parameter(dense.bias.data)
    assert size(layer.to(DEVICE)) < limit * size(dense)


# ------------------------------------------------------------------------------------------------------- reading what was written


@destinations
@strictness
@assignment
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_a_quantised_checkpoint_loads_into_every_layer(source, destination, strict, assign):
    origin, layer = make(**source), destination()
    state_dict = origin.state_dict()
    given = dict(state_dict)
    result = layer.load_state_dict(state_dict, strict=strict, assign=assign)
    assert not result.missing_keys and not result.unexpected_keys
    assert list(state_dict) == list(given) and all(state_dict[key] is given[key] for key in given)
    assert_is_whole(layer)
    assert contents(layer) == contents(origin)
    assert torch.equal(output(layer), output(origin))
    shares = layer.weight.data_ptr() == origin.weight.data_ptr()
    assert shares == assign and (layer.quant_state.absmax.data_ptr() == origin.quant_state.absmax.data_ptr()) == assign


@destinations
@assignment
def test_a_float_checkpoint_loads_into_every_layer(destination, assign):
    dense, layer = nn.Linear(IN, OUT), destination()
    was_quantised = layer.quant_state is not None
    if not was_quantised and not layer.weight.is_floating_point():  # how it was quantised is lost as well
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            layer.load_state_dict(dense.state_dict(), assign=assign)
        return
    layer.load_state_dict(dense.state_dict(), assign=assign)
    assert (layer.quant_state is not None) == was_quantised
    if was_quantised:
        assert_is_whole(layer)
        assert layer.weight.device.type == DEVICE
        assert raw_bytes(layer.weight) == raw_bytes(make_like(layer, dense).weight)
    else:
        assert torch.equal(output(layer), output(dense))
    assert (output(layer) - output(dense)).abs().max() < 0.6


def make_like(layer: Linear4bit, dense: nn.Linear) -> Linear4bit:
    """``dense`` quantised by the recipe of ``layer``."""
    weight = layer.weight
    other = make(weight.quant_type, weight.compress_statistics, weight.quant_storage, weight.blocksize, device=None)
    other.load_state_dict(dense.state_dict())
    return other.to(DEVICE)


@assignment
def test_a_float_checkpoint_in_an_unquantised_layer_is_quantised_by_its_recipe_later(assign):
    layer = make("nf4", nested=False, blocksize=128, device="meta" if assign else None)
    layer.load_state_dict(nn.Linear(IN, OUT).state_dict(), assign=assign)
    layer.to(DEVICE)
    assert_is_whole(layer)
    assert (layer.quant_state.quant_type, layer.quant_state.blocksize, layer.quant_state.nested) == ("nf4", 128, False)


@assignment
def test_loading_into_a_quantised_layer_keeps_or_replaces_the_parameter_as_torch_does(assign):
    layer = make()
    weight = layer.weight
    layer.load_state_dict(make(quant_type="fp4", nested=False).state_dict(), assign=assign)
    assert (layer.weight is weight) == (not assign)


def test_layers_that_share_a_weight_both_see_the_loaded_one():
    first, second, origin = make(bias=False), make(bias=False), make(bias=False, storage=torch.float16)
    second.weight = first.weight
    first.load_state_dict(origin.state_dict())
    assert torch.equal(output(second), output(origin))


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
@pytest.mark.parametrize("form", ["safetensors", "torch.save"])
def test_files_round_trip(storage, form):
    origin = make(storage=storage)
    if form == "safetensors":
        state_dict = load_safetensors(save_safetensors(origin.state_dict()))
    else:
        torch.save(origin.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        state_dict = torch.load(buffer, weights_only=True)
    layer = make(device=None)
    layer.load_state_dict(state_dict)
    assert contents(layer) == contents(origin)


@assignment
def test_whole_models_load(assign):
    def model(seed):
        torch.manual_seed(seed)
        return nn.ModuleDict({"a": nn.Linear(IN, IN), "b": nn.Sequential(make(), nn.ReLU()), "weight": make(nested=False)})

    origin, other = model(1), model(2)
    other.load_state_dict(origin.state_dict(), assign=assign)
    assert contents(other) == contents(origin)


def test_a_second_load_is_like_the_first():
    layer, origins = make(), [make(nested=False), make(quant_type="fp4"), make(storage=torch.float32)]
    for origin in origins:
        layer.load_state_dict(origin.state_dict())
        assert contents(layer) == contents(origin)


def test_what_was_loaded_trains():
    layer = make(device="meta")
    layer.load_state_dict(make().state_dict(), assign=True)
    x = X.clone().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.dequantize().sum(0).expand_as(x))


# ------------------------------------------------------------------------------------------------------------ what is not there


@destinations
def test_a_checkpoint_without_the_weight_leaves_it_alone(destination):
    layer = destination()
    before, weight = contents(layer), layer.weight
    result = layer.load_state_dict({}, strict=False)
    assert result.missing_keys == ["weight", "bias"] and not result.unexpected_keys
    assert layer.weight is weight and contents(layer) == before


def test_an_adapter_checkpoint_loads_around_the_layer():
    model = nn.ModuleDict({"base_layer": make(), "lora_A": nn.Linear(IN, 4, bias=False)})
    before = contents(model["base_layer"])
    adapter = {"lora_A.weight": torch.ones(4, IN)}
    result = model.load_state_dict(adapter, strict=False)
    assert result.missing_keys == ["base_layer.weight", "base_layer.bias"]
    assert model["lora_A"].weight.eq(1).all() and contents(model["base_layer"]) == before


def test_the_bias_loads_without_the_weight():
    layer = make()
    layer.load_state_dict({"bias": torch.ones(OUT)}, strict=False)
    assert layer.bias.eq(1).all()


STATISTICS = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"]


@destinations
@pytest.mark.parametrize("absent", [[name] for name in STATISTICS] + [STATISTICS], ids=[*STATISTICS, "all"])
def test_codes_without_their_statistics_are_missing_keys(absent, destination):
    layer, state_dict = destination(), make().state_dict()
    before, weight = contents(layer), layer.weight
    for name in absent:
        del state_dict[f"weight.{name}"]
    result = layer.load_state_dict(state_dict, strict=False)
    needed = ["weight.absmax", "weight.quant_map", f"weight.quant_state.bitsandbytes__{weight_type(layer)}"]
    assert sorted(result.missing_keys) == sorted(needed if len(absent) > 1 else named(absent[0], layer))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*weight\."):
        layer.load_state_dict(state_dict)
    assert layer.weight is weight and contents(layer) == before


def weight_type(layer) -> str:
    return layer._recipe().get("quant_type", "fp4")


def named(name: str, layer) -> list[str]:
    return [f"weight.{name}" if "bitsandbytes" not in name else f"weight.quant_state.bitsandbytes__{weight_type(layer)}"]


@strictness
def test_foreign_keys_are_reported_and_the_rest_is_loaded(strict):
    layer, origin = make(), make()
    foreign = {"weight.zero_point": torch.zeros(1), "weight.absmax.more": torch.zeros(1), "SCB": torch.zeros(OUT), "gamma": torch.zeros(1)}
    state_dict = {**origin.state_dict(), **foreign}
    if strict:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            layer.load_state_dict(state_dict)
    else:
        assert sorted(layer.load_state_dict(state_dict, strict=False).unexpected_keys) == sorted(foreign)
    assert contents(layer) == contents(origin)


def test_statistics_without_codes_are_unexpected():
    layer, state_dict = make(), make().state_dict()
    before = contents(layer)
    del state_dict["weight"], state_dict["bias"]
    result = layer.load_state_dict(state_dict, strict=False)
    assert result.missing_keys == ["weight", "bias"] and result.unexpected_keys == list(state_dict)
    assert contents(layer) == before


# ---------------------------------------------------------------------------------------------------------------- what is wrong


def rewritten(**changes):
    """Changes entries of the packed JSON; None removes one."""

    def change(state_dict):
        key = next(key for key in state_dict if "bitsandbytes__" in key)
        entries = {**json.loads(bytes(state_dict[key].tolist())), **changes}
        text = json.dumps({name: value for name, value in entries.items() if value is not None})
        state_dict[key] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


def replaced(name, value):
    def change(state_dict):
        state_dict[name] = value(state_dict[name]) if callable(value) else value

    return change


BLOB = "weight.quant_state.bitsandbytes__nf4"
CORRUPTIONS = {
    "codes: not a tensor": replaced("weight", "bytes"),
    "codes: truncated": replaced("weight", lambda t: t[:-1]),
    "codes: too many": replaced("weight", lambda t: torch.cat([t, t])),
    "codes: cast": replaced("weight", lambda t: t.to(torch.float32)),
    "codes: int8": replaced("weight", lambda t: t.view(torch.int8)),
    "codes: dense": replaced("weight", torch.zeros(OUT, IN)),
    "absmax: not a tensor": replaced("weight.absmax", 3.0),
    "absmax: short": replaced("weight.absmax", lambda t: t[:-3]),
    "absmax: long": replaced("weight.absmax", lambda t: t.repeat(2)),
    "absmax: float among nested": replaced("weight.absmax", lambda t: t.float()),
    "absmax: matrix": replaced("weight.absmax", lambda t: t.view(8, -1)),
    "nested absmax: integers": replaced("weight.nested_absmax", lambda t: t.int()),
    "nested absmax: long": replaced("weight.nested_absmax", lambda t: t.repeat(9)),
    "nested map: short": replaced("weight.nested_quant_map", lambda t: t[:16]),
    "map: short": replaced("weight.quant_map", lambda t: t[:15]),
    "map: codes": replaced("weight.quant_map", lambda t: t.to(torch.uint8)),
    "blob: not a tensor": replaced(BLOB, "{}"),
    "blob: empty": replaced(BLOB, torch.zeros(0, dtype=torch.uint8)),
    "blob: truncated": replaced(BLOB, lambda t: t[:-7]),
    "blob: not text": replaced(BLOB, lambda t: t | 0x80),
    "blob: float": replaced(BLOB, lambda t: t.float()),
    "blob: a list": replaced(BLOB, torch.tensor(list(b"[1, 2]"), dtype=torch.uint8)),
    "blob: deeply nested": replaced(BLOB, torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)),
    "blob: on meta": replaced(BLOB, lambda t: t.to("meta")),
    "two blobs": replaced("weight.quant_state.bitsandbytes__fp4", torch.zeros(3, dtype=torch.uint8)),
    "shape: other": rewritten(shape=[OUT, IN + 2]),
    "shape: transposed": rewritten(shape=[IN, OUT]),
    "shape: flat": rewritten(shape=[OUT * IN]),
    "shape: negative": rewritten(shape=[-OUT, -IN]),
    "shape: huge": rewritten(shape=[2**40, 2**40]),
    "shape: text": rewritten(shape="48x96"),
    "shape: absent": rewritten(shape=None),
    "type: other": rewritten(quant_type="fp4"),
    "type: unknown": rewritten(quant_type="int4"),
    "type: absent": rewritten(quant_type=None),
    "dtype: a function": rewritten(dtype="load"),
    "dtype: integer": rewritten(dtype="int8"),
    "blocksize: other": rewritten(blocksize=128),
    "blocksize: odd": rewritten(blocksize=63),
    "blocksize: text": rewritten(blocksize="64"),
    "blocksize: zero": rewritten(blocksize=0),
    "offset: absent": rewritten(nested_offset=None),
    "offset: text": rewritten(nested_offset="0.1"),
    "nested blocksize: other": rewritten(nested_blocksize=512),
    "foreign entry": rewritten(command="rm"),
}


@strictness
@pytest.mark.parametrize("destination", ["quantised", "not yet quantised", "on meta", "plain weight"])
@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_a_corrupt_weight_is_refused_by_name_and_nothing_changes(corrupt, destination, strict):
    model = nn.ModuleDict({"proj": DESTINATIONS[destination]()})
    state_dict = {f"proj.{key}": value for key, value in corrupted(corrupt).items()}
    before, weight, bias = contents(model), model["proj"].weight, model["proj"].bias
    with pytest.raises(RuntimeError, match="proj.weight"):
        model.load_state_dict(state_dict, strict=strict)
    assert model["proj"].weight is weight and model["proj"].bias is bias and contents(model) == before


def corrupted(corrupt) -> dict:
    state_dict = dict(make().state_dict())
    corrupt(state_dict)
    return state_dict


@pytest.mark.parametrize("corrupt", CORRUPTIONS.values(), ids=CORRUPTIONS.keys())
def test_from_prequantized_refuses_most_of_it_too(corrupt):
    state_dict = corrupted(corrupt)
    weight = state_dict.pop("weight")
    statistics = {key: value for key, value in state_dict.items() if key != "bias"}
    if not isinstance(weight, torch.Tensor):
        return
    try:
        made = Params4bit.from_prequantized(weight, statistics, device=DEVICE)
    except (ValueError, AssertionError):
        return
    assert made.dequantize().numel() == made.quant_state.shape.numel()  # another weight, but a whole one


@assignment
@pytest.mark.parametrize("destination", ["quantised", "not yet quantised", "on meta"])
def test_a_wrong_bias_keeps_the_weight_out(destination, assign):
    layer = DESTINATIONS[destination]()
    before, weight = contents(layer), layer.weight
    state_dict = {**make().state_dict(), "bias": torch.zeros(OUT + 1)}
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        layer.load_state_dict(state_dict, assign=assign)
    assert layer.weight is weight and contents(layer) == before


def test_a_float_weight_of_another_shape_is_a_size_mismatch():
    layer = make()
    before = contents(layer)
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(nn.Linear(IN + 32, OUT).state_dict())
    assert contents(layer) == before


# ----------------------------------------------------------------------------------------------------------------------- hooks


def test_pre_hooks_run_once_and_before_the_weight_is_read():
    layer, origin = make(), make()
    calls = []

    def rename(state_dict, prefix, *_):
        calls.append(prefix)
        for key in [key for key in state_dict if key.startswith("old_")]:
            state_dict[key.removeprefix("old_")] = state_dict.pop(key)

    layer._register_load_state_dict_pre_hook(rename)
    layer.load_state_dict({f"old_{key}": value for key, value in origin.state_dict().items()})
    assert calls == [""] and contents(layer) == contents(origin)
    assert len(layer._load_state_dict_pre_hooks) == 1


def test_a_hook_may_take_the_weight_for_itself():
    """Lightning quantises in a pre-hook that removes the weight from the dict."""
    layer, dense = make(), nn.Linear(IN, OUT)
    taken = []
    layer._register_load_state_dict_pre_hook(lambda state_dict, *_: taken.append(state_dict.pop("weight")))
    layer.register_load_state_dict_post_hook(lambda module, incompatible: incompatible.missing_keys.clear())
    before = raw_bytes(layer.weight)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(taken[0], dense.weight) and raw_bytes(layer.weight) == before


# ------------------------------------------------------------------------------------------------------------------------- FSDP2


def test_a_sharded_model_saves_and_loads_its_statistics():
    """One process is enough: the parameter is a distributed tensor without the class and attributes of ours."""
    done = run_python(
        "import torch, torch.distributed as dist, bitsandbytes as bnb\n"
        "from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "mesh, options = init_device_mesh('cpu', (1,)), StateDictOptions(full_state_dict=True)\n"
        "for storage in (torch.uint8, torch.bfloat16):\n"
        "    make = lambda: torch.nn.Sequential(bnb.nn.LinearNF4(64, 48, quant_storage=storage).to('cpu'))\n"
        "    plain, model, x = make(), make(), torch.randn(2, 64, requires_grad=True)\n"
        "    model.load_state_dict(plain.state_dict())\n"
        "    fully_shard(model, mesh=mesh)\n"
        "    y = model(x)\n"
        "    y.sum().backward()\n"
        "    assert torch.equal(y, plain(x)) and x.grad is not None\n"
        "    saved = get_model_state_dict(model, options=options)\n"
        "    assert saved.keys() == plain.state_dict().keys(), saved.keys()\n"
        "    other = make()\n"
        "    other.load_state_dict(saved)\n"
        "    assert torch.equal(other(x), y)\n"
        "    sharded = fully_shard(make(), mesh=mesh)\n"
        "    set_model_state_dict(sharded, saved, options=options)\n"
        "    assert torch.equal(sharded(x), y)\n"
        "dist.destroy_process_group()\n"
        "print('fine')\n"
    )
    assert done.stdout.strip() == "fine", done.stderr
