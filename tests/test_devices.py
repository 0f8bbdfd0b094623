"""What only shows where the host and a GPU, or two GPUs, are not one: quantisation on the way, moves there and back, mixed devices."""

import copy
import io
import pickle

from helpers import DEVICE, assert_same_bits, bell, raw_bytes
import pytest
import torch
from torch import nn

import bitsandbytes as bnb
from bitsandbytes import functional as F

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a device beside the CPU: BNB_TEST_DEVICE")
second = pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="needs two GPUs")
IN, OUT = 64, 48

LAYERS = {
    "nf4": lambda **options: bnb.nn.LinearNF4(IN, OUT, compress_statistics=True, **options),
    "fp4 flat": lambda **options: bnb.nn.LinearFP4(IN, OUT, compress_statistics=False, **options),
    "int8": lambda **options: bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=4.0, **options),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture(autouse=True)
def no_default_device():
    """One that is set sees every call, so that none goes to a native kernel directly."""
    torch.set_default_device(None)


def make(name: str, device=None) -> nn.Module:
    """A layer with the same weights each time, on the host, or quantised on the way to ``device``."""
    layer = LAYERS[name](device="cpu")
    with torch.no_grad():
        layer.weight.data.copy_(bell(OUT * IN).view(OUT, IN) / 8)
        layer.bias.copy_(bell(OUT, seed=2))
    return layer if device is None else layer.to(device)


def x(device=DEVICE, **options) -> torch.Tensor:
    values = bell(5 * IN, seed=3).view(5, IN).to(device)
    values[1, 7] = 6.0
    return values.requires_grad_(**options) if options else values


def tensors_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {**layer.state_dict(), "bias": layer.bias}


def on_the_host(key: str) -> bool:
    """Entries that hold words, not numbers, and never leave the host."""
    return key == "weight_format" or "bitsandbytes__" in key


def assert_on(layer: nn.Module, device: str) -> None:
    for key, tensor in tensors_of(layer).items():
        if not on_the_host(key):
            assert tensor.device == torch.device(device), key


# -------------------------------------------------------------------------------------------------------------------- to a device
@every_layer
def test_a_weight_is_quantised_on_its_way_as_it_is_on_the_host(name):
    there, here = make(name, f"{DEVICE}:0"), make(name, "cpu")
    assert_on(there, f"{DEVICE}:0")
    for key, tensor in here.state_dict().items():
        assert_same_bits(there.state_dict()[key].cpu(), tensor)


@every_layer
def test_both_devices_compute_the_same(name):
    there, here = make(name, DEVICE).eval(), make(name, "cpu").eval()
    with torch.no_grad():
        torch.testing.assert_close(there(x()).cpu(), here(x("cpu")), rtol=1e-4, atol=1e-4)


@every_layer
@pytest.mark.parametrize("move", [lambda m: m.cuda(), lambda m: m.to(DEVICE), lambda m: m.to(torch.device(DEVICE, 0)), lambda m: m.to(x())])
def test_every_way_to_a_device(name, move):
    layer = move(make(name))
    assert_on(layer, f"{DEVICE}:0")
    assert_same_bits(layer(x()), make(name, DEVICE)(x()))


@every_layer
@pytest.mark.parametrize("move", [lambda m: m.cuda(), lambda m: m.to(DEVICE), lambda m: m.to(torch.device(DEVICE, 0))])
def test_a_move_to_where_it_is_changes_nothing(name, move):
    layer = make(name, DEVICE)
    weight, state = layer.weight, getattr(layer.weight, "quant_state", None)
    scales = layer.weight.SCB if state is None else state.absmax
    places = [tensor.data_ptr() for tensor in (weight, layer.bias, scales)]
    move(layer)
    assert layer.weight is weight and getattr(weight, "quant_state", None) is state
    scales = layer.weight.SCB if state is None else state.absmax
    assert places == [tensor.data_ptr() for tensor in (weight, layer.bias, scales)]


@every_layer
@pytest.mark.parametrize("quantised_at", ["cpu", DEVICE])
def test_there_and_back_and_there_again(name, quantised_at):
    layer = make(name, quantised_at)
    before = {key: raw_bytes(tensor) for key, tensor in tensors_of(layer).items()}
    for device in (DEVICE, "cpu", DEVICE):
        layer = layer.to(device)
        assert_on(layer, "cpu" if device == "cpu" else f"{DEVICE}:0")
        assert {key: raw_bytes(tensor) for key, tensor in tensors_of(layer).items()} == before
    assert_same_bits(layer(x()), make(name, DEVICE)(x()))


@every_layer
@pytest.mark.parametrize("saved_on, loaded_on", [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_crosses_devices(name, saved_on, loaded_on, assign):
    saved, layer = make(name, saved_on), LAYERS[name](device="cpu").to(loaded_on)
    layer.load_state_dict(saved.state_dict(), assign=assign)
    assert_on(layer, str(saved.weight.device) if assign else str(LAYERS[name](device="cpu").to(loaded_on).weight.device))
    for key, tensor in saved.state_dict().items():
        assert_same_bits(layer.state_dict()[key].cpu(), tensor.cpu())
    where = layer.weight.device
    torch.testing.assert_close(layer(x(where)), make(name, where)(x(where)), rtol=1e-4, atol=1e-4)


@every_layer
def test_files_are_read_onto_either_device(name):
    file = io.BytesIO()
    torch.save(make(name, DEVICE).state_dict(), file)
    for where in (None, "cpu", DEVICE):
        file.seek(0)
        read = torch.load(file, weights_only=True, map_location=where)
        layer = make(name, DEVICE)
        layer.load_state_dict(read)
        assert_same_bits(layer(x()), make(name, DEVICE)(x()))
        assert all(tensor.device.type == (where or DEVICE) for key, tensor in read.items() if not on_the_host(key))


@every_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_stay_where_they_were(name, duplicate):
    layer = make(name, DEVICE)
    assert_on(duplicate(layer), f"{DEVICE}:0")
    assert_same_bits(duplicate(layer)(x()), layer(x()))


@every_layer
def test_pinned_and_shared_memory(name):
    layer = make(name, "cpu")
    pinned = layer.weight.data.pin_memory()
    assert pinned.is_pinned() and not layer.weight.data.is_pinned()
    assert_same_bits(pinned.to(DEVICE, non_blocking=True).cpu(), layer.weight.data)


@every_layer
def test_compiles_as_one_graph(name):
    layer, inputs = make(name, DEVICE), x(requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(inputs).sum().backward()
    found, inputs.grad = inputs.grad, None
    layer(inputs).sum().backward()
    assert_same_bits(found, inputs.grad)


# ------------------------------------------------------------------------------------------------------------------ mixed devices
def quantised_there():
    return F.quantize_4bit(bell(64 * 64).view(64, 64).to(DEVICE), quant_type="nf4")


@every_layer
def test_an_input_on_the_host_is_refused(name):
    with pytest.raises(RuntimeError, match="device"):
        make(name, DEVICE)(x("cpu"))


@every_layer
def test_an_input_elsewhere_is_refused_by_a_layer_on_the_host(name):
    with pytest.raises(RuntimeError, match="device"):
        make(name, "cpu")(x())


def test_operators_name_the_devices():
    packed, state = quantised_there()
    with pytest.raises(RuntimeError, match=f"{DEVICE}:0 and cpu"):
        torch.ops.bitsandbytes.dequantize_4bit(packed, state.absmax.cpu(), 64, "nf4", [64, 64], torch.float32)
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.bitsandbytes.quantize_blockwise(torch.ones(10, device=DEVICE), F.create_dynamic_map().cpu(), 256)


def test_outputs_elsewhere_are_refused():
    packed, state = quantised_there()
    with pytest.raises(RuntimeError, match="device"):
        F.dequantize_4bit(packed, state, out=torch.empty(64, 64))


@every_layer
def test_a_state_left_behind_is_refused(name):
    layer = make(name, DEVICE)
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        layer.weight.SCB = layer.weight.SCB.cpu()
    else:
        state.to("cpu")
    with pytest.raises(RuntimeError, match="device"):
        layer(x())


# --------------------------------------------------------------------------------------------------------------------- two devices
@second
@every_layer
def test_a_layer_on_the_second_device(name):
    layer = make(name, f"{DEVICE}:1")
    assert_on(layer, f"{DEVICE}:1")
    inputs = x(f"{DEVICE}:1", requires_grad=True)
    result = layer(inputs)
    result.sum().backward()
    assert result.device == inputs.grad.device == torch.device(DEVICE, 1)
    assert torch.cuda.current_device() == 0
    assert_same_bits(result.to(f"{DEVICE}:0").detach(), make(name, DEVICE)(x()).detach())
    with pytest.raises(RuntimeError, match="device"):
        layer(x(f"{DEVICE}:0"))


@second
@every_layer
def test_a_model_over_two_devices_trains(name):
    first, last = make(name, f"{DEVICE}:0"), nn.Linear(OUT, 1, device=f"{DEVICE}:1")
    inputs = x(requires_grad=True)
    last(first(inputs).to(f"{DEVICE}:1")).sum().backward()
    assert inputs.grad.device == torch.device(DEVICE, 0) and inputs.grad.abs().sum() > 0
    assert last.weight.grad.device == torch.device(DEVICE, 1)


@second
@every_layer
def test_from_device_to_device(name):
    layer = make(name, f"{DEVICE}:0").to(f"{DEVICE}:1")
    assert_on(layer, f"{DEVICE}:1")
    assert_same_bits(layer(x(f"{DEVICE}:1")).to(f"{DEVICE}:0"), make(name, DEVICE)(x()))


# ---------------------------------------------------------------------------------------------------------------------- optimizers
OPTIMIZERS = {
    "AdamW": bnb.optim.AdamW, "AdamW8bit": bnb.optim.AdamW8bit, "Lion8bit": bnb.optim.Lion8bit,
    "SGD8bit": lambda p: bnb.optim.SGD8bit(p, 1e-3, momentum=0.9),
    "PagedAdamW": bnb.optim.PagedAdamW, "PagedAdamW8bit": bnb.optim.PagedAdamW8bit, "PagedLion8bit": bnb.optim.PagedLion8bit,
}  # fmt: skip

ROWS = 400  # enough for states to be paged


def step(make_optimizer, device, steps=3):
    p = nn.Parameter(bell(ROWS * 256).view(ROWS, 256).to(device))
    optimizer = make_optimizer([p])
    for i in range(steps):
        p.grad = bell(ROWS * 256, seed=10 + i).view(ROWS, 256).to(device)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_they_do_on_the_host(name):
    there, optimizer = step(OPTIMIZERS[name], DEVICE)
    here, _ = step(OPTIMIZERS[name.removeprefix("Paged")], "cpu")
    torch.testing.assert_close(there.detach().cpu(), here.detach(), rtol=1e-5, atol=1e-6)
    paged = name.startswith("Paged")
    for key in ("state1", "state2"):
        if key in optimizer.state[there]:
            state = optimizer.state[there][key]
            assert (getattr(state, "is_paged", False), state.device.type) == (paged, "cpu" if paged else DEVICE)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("map_location", [None, "cpu"])
def test_states_are_saved_and_go_on_elsewhere(name, map_location):
    p, optimizer = step(OPTIMIZERS[name], DEVICE)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    q = nn.Parameter(p.detach().clone())
    other = OPTIMIZERS[name]([q])
    other.load_state_dict(torch.load(file, map_location=map_location))
    for parameter, each in ((p, optimizer), (q, other)):
        parameter.grad = bell(ROWS * 256, seed=99).view(ROWS, 256).to(DEVICE)
        each.step()
    assert_same_bits(q.detach(), p.detach())


def test_gradients_elsewhere_are_refused():
    p = nn.Parameter(torch.ones(4096, device=DEVICE))
    optimizer = bnb.optim.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(RuntimeError, match="device"):
        torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
            "adam", torch.ones(4096), p.data, *(optimizer.state[p][key] for key in ("state1", "state2")),
            0.9, 0.99, 0.0, 0.0, 1e-8, 2, 1e-3, *(optimizer.state[p][key] for key in ("qmap1", "qmap2", "absmax1", "absmax2")), 0.0, 1.0, False,
        )  # fmt: skip


@second
def test_parameters_on_two_devices_are_stepped_where_they_are():
    ps = [nn.Parameter(bell(4096, seed=i).to(f"{DEVICE}:{i}")) for i in range(2)]
    optimizer = bnb.optim.AdamW8bit(ps)
    for p in ps:
        p.grad = bell(4096, seed=5).to(p.device)
    optimizer.step()
    for p in ps:
        assert p.device == optimizer.state[p]["state1"].device == optimizer.state[p]["absmax1"].device
    one = nn.Parameter(bell(4096, seed=1).to(DEVICE))
    alone = bnb.optim.AdamW8bit([one])
    one.grad = bell(4096, seed=5).to(DEVICE)
    alone.step()
    assert_same_bits(ps[1].detach().to(DEVICE), one.detach())
