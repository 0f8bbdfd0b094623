"""What is fuzzed: every reader of bytes from outside. Each target damages something good and hands it over.

The promise: a clear exception, and then everything is as it was; or it is taken, and then it works and can be written and read again. Never a
crash of the process, never another exception, never results that cannot be.
"""

import copy
import io
import re

from hypothesis import assume, given
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_dicts, damaged_tensors, json_values, tensors
from test_hostile_inputs import call, good_call, good_calls
import torch

import bitsandbytes as bnb
from bitsandbytes import functional as F
from bitsandbytes.functional import QuantState

CLEAR = (RuntimeError, ValueError, TypeError)
OUT_FEATURES, IN_FEATURES = 24, 64
OPTIMIZERS = ("Adam8bit", "AdamW", "Lion8bit", "SGD8bit", "AdEMAMix8bit", "RMSprop8bit", "LAMB8bit", "PagedAdamW8bit")


def weights() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, OUT_FEATURES * IN_FEATURES).sin().reshape(OUT_FEATURES, IN_FEATURES)


def require_clear(error: Exception) -> None:
    """The exception says something, and is not one that only happens to have the right class."""
    assert len(str(error)) > 10, repr(error)
    assert not isinstance(error, (RecursionError, NotImplementedError)), repr(error)


# ------------------------------------------------------------------------------------------------------------------------ quantisation states
def good_state(quant_type: str, nested: bool) -> tuple[torch.Tensor, QuantState]:
    return F.quantize_4bit(weights(), blocksize=64, quant_type=quant_type, compress_statistics=nested)


def use_state(packed: torch.Tensor, state: QuantState) -> None:
    """Whatever was accepted works or is refused with a clear exception, and comes back from its own dict."""
    again = QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert again.shape == state.shape and again.blocksize == state.blocksize and again.dtype == state.dtype and again.quant_type == state.quant_type
    try:
        result = F.dequantize_4bit(packed, state)
    except CLEAR as error:
        require_clear(error)
        return
    assert tuple(result.shape) == tuple(state.shape) and result.dtype == state.dtype


@given(st.data(), st.sampled_from(["nf4", "fp4"]), st.booleans(), st.booleans(), st.sampled_from(["", "model.layers.0.weight."]))
def quant_state_from_dict(data, quant_type, nested, as_packed, prefix):
    packed, state = good_state(quant_type, nested)
    good = {prefix + key: value for key, value in state.as_dict(packed=as_packed).items()}
    damaged = data.draw(damaged_dicts(good))
    before = dict(damaged)
    try:
        read = QuantState.from_dict(damaged, "cpu")
    except (*CLEAR, AssertionError) as error:
        require_clear(error)
    else:
        use_state(packed, read)
    assert list(damaged) == list(before) and all(damaged[key] is before[key] for key in before), "the caller's dict was changed"


@given(st.data(), st.booleans())
def packed_json(data, nested):
    packed, state = good_state("nf4", nested)
    good = state.as_dict(packed=True)
    key = "quant_state.bitsandbytes__nf4"
    try:
        read = QuantState.from_dict(good | {key: data.draw(damaged_bytes(good[key]))}, "cpu")
    except (*CLEAR, AssertionError) as error:
        require_clear(error)
    else:
        use_state(packed, read)


# ------------------------------------------------------------------------------------------------------------------------------------ layers
def linear4bit(**options):
    return bnb.nn.Linear4bit(IN_FEATURES, OUT_FEATURES, compute_dtype=torch.float32, quant_type="nf4", **options)


LAYERS = {
    "linear4bit": linear4bit,
    "linear4bit_flat": lambda: linear4bit(compress_statistics=False),
    "linear4bit_bf16_storage": lambda: linear4bit(quant_storage=torch.bfloat16),
    "linear8bit": lambda: bnb.nn.Linear8bitLt(IN_FEATURES, OUT_FEATURES, has_fp16_weights=False),
    "embedding4bit": lambda: bnb.nn.Embedding4bit(OUT_FEATURES, IN_FEATURES, quant_type="nf4"),
    "embedding8bit": lambda: bnb.nn.Embedding8bit(OUT_FEATURES, IN_FEATURES),
}


def quantised(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]().to("cpu")


def forward(layer: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if isinstance(layer, torch.nn.Embedding):
            return layer(torch.arange(OUT_FEATURES))
        return layer(torch.ones(3, IN_FEATURES))


def same_tensors(a: dict, b: dict) -> bool:
    def bits(tensor):
        return tensor.detach().reshape(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(bits(a[key]), bits(b[key])) for key in a)


# What nn.Module finds amiss after it has loaded the rest: unexpected keys; and no bias, where that is the only thing wrong.
COMPLAINTS_OF_MODULE = re.compile(r'Unexpected key|Missing key\(s\) in state_dict: "bias"\.\s*\Z')


@given(st.data(), st.sampled_from(sorted(LAYERS)), st.booleans(), st.booleans())
def layer_load_state_dict(data, name, strict, assign):
    layer = quantised(name)
    saved, answer = copy.deepcopy(dict(layer.state_dict())), forward(layer)
    damaged = data.draw(damaged_dicts(copy.deepcopy(saved)))
    before = dict(damaged)
    try:
        layer.load_state_dict(damaged, strict=strict, assign=assign)
    except CLEAR as error:
        require_clear(error)
        if COMPLAINTS_OF_MODULE.search(str(error)):
            use_layer(layer, name)
        else:
            layer.load_state_dict({"bias": saved["bias"]} if "bias" in saved else {}, strict=False)  # nn.Module takes that for itself
            assert same_tensors(layer.state_dict(), saved) and torch.equal(forward(layer), answer), "a failed load changed the layer"
    else:
        use_layer(layer, name)
    assert list(damaged) == list(before) and all(damaged[key] is before[key] for key in before), "the caller's dict was changed"


def use_layer(layer: torch.nn.Module, name: str) -> None:
    """A layer that took a state dict computes, or says clearly why not, and what it saves loads again with the same results."""
    if layer.weight.is_meta:  # which assign=True takes as well
        return
    try:
        result = forward(layer)
    except CLEAR as error:
        require_clear(error)
        return
    assert result.shape == ((OUT_FEATURES, IN_FEATURES) if isinstance(layer, torch.nn.Embedding) else (3, OUT_FEATURES))
    other = quantised(name)
    other.load_state_dict(layer.state_dict())
    again = forward(other)
    assert again.dtype == result.dtype and torch.equal(again.nan_to_num(), result.nan_to_num()), "saved and loaded, it computes something else"


@given(st.data(), st.sampled_from(["linear4bit", "linear4bit_flat", "linear8bit", "embedding4bit"]))
def pickled_parameter(data, name):
    """The pickle of a parameter with damaged attributes, read with weights_only=True: no crash, whatever Python says about them."""
    layer = quantised(name)
    weight = layer.weight
    attributes = data.draw(damaged_dicts({key: value for key, value in vars(weight).items() if not isinstance(value, torch.nn.Module)}))
    vars(weight).update({key: value for key, value in attributes.items() if isinstance(key, str) and key.isidentifier()})
    file = io.BytesIO()
    try:
        torch.save(weight, file)
    except Exception:  # a good writer that cannot write this says nothing about the reader
        assume(False)
    try:
        file.seek(0)
        layer.weight = torch.load(file, weights_only=True)
        forward(layer)
        layer.state_dict()
    except Exception as error:  # an attribute of another type shows where it is used
        assert str(error)


# -------------------------------------------------------------------------------------------------------------------------------- optimizers
def stepped(name: str):
    """An optimizer after two steps, with its parameter."""
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
    optimizer = getattr(bnb.optim, name)([parameter], lr=1e-3)
    for _ in range(2):
        parameter.grad = torch.linspace(1, 2, 5000)
        optimizer.step()
    return parameter, optimizer


@given(st.data(), st.sampled_from(OPTIMIZERS))
def optimizer_load_state_dict(data, name):
    parameter, optimizer = stepped(name)
    good = copy.deepcopy(optimizer.state_dict())
    damaged = data.draw(damaged_dicts(good))
    try:
        optimizer.load_state_dict(damaged)
    except CLEAR as error:
        assert str(error)
    try:
        optimizer.step()
    except (*CLEAR, KeyError, AttributeError, ArithmeticError) as error:  # settings are looked at when they are used, as in torch.optim
        assert str(error)
    optimizer.load_state_dict(good)  # nothing that was damaged stands in the way of what is right
    parameter.data.copy_(torch.linspace(-1, 1, 5000))
    optimizer.step()
    assert parameter.isfinite().all()


# --------------------------------------------------------------------------------------------------------------------------------- operators
@given(st.data(), st.sampled_from(sorted(good_calls())))
def operator_arguments(data, name):
    arguments = good_call(name)
    for key in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=3, unique=True)):
        value = arguments[key]
        if isinstance(value, torch.Tensor):
            arguments[key] = data.draw(st.one_of(damaged_tensors(value), st.none()))
        elif isinstance(value, list):
            arguments[key] = data.draw(st.lists(st.integers(-2, 2**62), max_size=3))
        elif isinstance(value, torch.dtype):
            arguments[key] = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int32]))
        else:
            arguments[key] = data.draw(st.one_of(json_values, tensors()))
    try:
        call(name, arguments)
    except (*CLEAR, IndexError, ArithmeticError, NotImplementedError) as error:  # the dispatcher and Python's floats have their own
        assert str(error)


TARGETS = {
    target.__name__: target
    for target in (
        quant_state_from_dict, packed_json, layer_load_state_dict, pickled_parameter, optimizer_load_state_dict, operator_arguments
    )
}  # fmt: skip
