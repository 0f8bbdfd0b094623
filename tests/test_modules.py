"""What every layer with a quantised weight must survive, whatever it computes."""

import copy
import io
import pickle

from helpers import DEVICE, assert_same_bits, bell, cpu_only, grid, raw_bytes, run_python
import pytest
import torch
from torch import nn

import bitsandbytes as bnb

ROWS = torch.tensor([[1, 0, 47]])
X = bell(3 * 64, seed=9).reshape(3, 64)
LAYERS = {
    "Linear4bit": (lambda: bnb.nn.Linear4bit(64, 48, quant_type="nf4"), (X,)),
    "LinearNF4": (lambda: bnb.nn.LinearNF4(64, 48, bias=False, compress_statistics=False, quant_storage=torch.bfloat16), (X,)),
    "Linear8bitLt": (lambda: bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False), (X,)),
    "EmbeddingNF4": (lambda: bnb.nn.EmbeddingNF4(48, 64), (ROWS,)),
    "EmbeddingFP4": (lambda: bnb.nn.EmbeddingFP4(48, 65, compress_statistics=True, quant_storage=torch.float32), (ROWS,)),
    "Embedding8bit": (lambda: bnb.nn.Embedding8bit(48, 64), (ROWS,)),
    "Experts4bit": (lambda: bnb.nn.Experts4bit(4, 64, 48, bias=True), (X, torch.tensor([3, 0, 3]))),
}
FOUR_BIT = [name for name in LAYERS if "8bit" not in name]
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name: str, device: str = DEVICE) -> nn.Module:
    torch.manual_seed(3)
    layer = LAYERS[name][0]().eval()
    return layer if device == "unquantised" else layer.to(device)


def output(name: str, layer: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return layer(*LAYERS[name][1])


def statistics_of(layer: nn.Module) -> list[torch.Tensor]:
    return [tensor for key, tensor in layer.state_dict().items() if key not in ("weight", "bias", "weight_format")]


@every_layer
def test_the_weight_is_quantised_by_the_first_move_and_stays_the_same_object(name):
    layer = make(name, "unquantised")
    weight = layer.weight
    assert layer.to(DEVICE).weight is weight and type(weight).__name__ in ("Params4bit", "Int8Params")
    before = raw_bytes(weight.data)
    assert_same_bits(output(name, layer.to(DEVICE)), output(name, make(name)))
    assert layer.weight is weight and raw_bytes(weight.data) == before


@every_layer
def test_a_forward_pass_changes_nothing_that_is_saved(name):
    layer = make(name)
    before = {key: raw_bytes(tensor) for key, tensor in layer.state_dict().items()}
    first = output(name, layer)
    assert_same_bits(output(name, layer), first)
    assert {key: raw_bytes(tensor) for key, tensor in layer.state_dict().items()} == before


@grid(name=list(LAYERS), dtype=[torch.float16, torch.bfloat16])
def test_casts_leave_codes_and_statistics_alone(name, dtype):
    layer, cast = make(name), make(name).to(dtype).float()
    assert raw_bytes(cast.weight.data) == raw_bytes(layer.weight.data)
    for ours, before in zip(statistics_of(cast), statistics_of(layer)):
        assert_same_bits(ours, before)
    assert torch.allclose(output(name, cast), output(name, layer), atol=0.02)


@every_layer
def test_a_layer_comes_back_from_meta(name):
    layer = make(name)
    saved = layer.state_dict()
    away = nn.Sequential(layer).to("meta")
    assert away[0].weight.is_meta
    away[0].load_state_dict(saved, assign=True)
    assert_same_bits(output(name, away[0]), output(name, make(name)))


@every_layer
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_gives_the_same_result(name, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(make(name)) if name != "Experts4bit" else make(name)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device=DEVICE)
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=DEVICE)
    expected = output(name, make(name))
    for _ in range(2):
        assert_same_bits(output(name, model), expected)
        assert next(model.parameters()).is_meta


@every_layer
@pytest.mark.parametrize("quantised", [True, False])
def test_copies_are_independent_and_whole(name, quantised):
    layer = make(name, "cpu" if quantised else "unquantised")
    replica = copy.deepcopy(layer)
    replica.to(DEVICE)
    assert_same_bits(output(name, replica), output(name, make(name)))
    assert getattr(layer.weight, "quant_state", None) is not getattr(replica.weight, "quant_state", layer)
    with torch.no_grad():
        replica.weight.data.zero_()
    assert_same_bits(output(name, layer.to(DEVICE)), output(name, make(name)))


@every_layer
@pytest.mark.parametrize("form", ["pickle", "torch", "torch, weights only"])
def test_pickles_keep_the_class_of_the_layer_and_of_its_weight(name, form):
    layer, buffer = make(name), io.BytesIO()
    if form == "pickle":
        loaded = pickle.loads(pickle.dumps(layer))
    else:
        torch.save(layer, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only="only" in form)
    assert type(loaded) is type(layer) and type(loaded.weight) is type(layer.weight)
    assert_same_bits(output(name, loaded), output(name, layer))


@every_layer
def test_shared_memory_takes_the_statistics_along(name):
    layer = make(name).share_memory()
    tensors = [layer.weight, *statistics_of(layer)[:1]]
    assert all(tensor.is_shared() for tensor in tensors)


@every_layer
def test_only_its_own_entries_are_read(name):
    """Neighbours whose names begin alike, or are as long, keep theirs."""
    model = nn.ModuleDict({"a": make(name), "ab": make(name), "b": nn.Linear(2, 2)})
    saved = {f"x.{key}": value for key, value in model.state_dict().items()}
    other = nn.ModuleDict({"x": nn.ModuleDict({"a": make(name), "ab": make(name), "b": nn.Linear(2, 2)})})
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match='Unexpected key.*"x.b.SCB"'):
        other.load_state_dict({**saved, "x.b.SCB": torch.ones(2)})


@cpu_only("gloo, which joins processes here, moves memory of the host")
def test_4bit_layers_compute_sharded_and_save_their_statistics():
    """One process is enough: under FSDP2 the parameter is a distributed tensor without the class and attributes of ours."""
    done = run_python(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, torch.distributed as dist\n"
        "from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.fsdp import fully_shard\n"
        "from test_modules import FOUR_BIT, LAYERS, make\n"
        "torch.set_num_threads(1)\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "mesh = init_device_mesh('cpu', (1,))\n"
        "for name in FOUR_BIT:\n"
        "    plain, sharded, inputs = make(name), make(name), LAYERS[name][1]\n"
        "    fully_shard(sharded, mesh=mesh)\n"
        "    assert torch.equal(sharded(*inputs), plain(*inputs)), name\n"
        "    saved = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))\n"
        "    assert saved.keys() == plain.state_dict().keys(), name\n"
        "    fresh = LAYERS[name][0]().eval()\n"
        "    fresh.load_state_dict(saved)\n"
        "    assert torch.equal(fresh(*inputs), plain(*inputs)), name\n"
        "dist.destroy_process_group()\n"
        "print('fine')\n",
        __file__.rpartition("/")[0],
    )
    assert done.stdout.strip() == "fine", done.stderr


def test_published_layers_are_in_nn():
    published = (
        "Embedding Embedding4bit Embedding8bit EmbeddingFP4 EmbeddingNF4 Int8Params Linear4bit Linear8bitLt LinearFP4 LinearNF4 OutlierAwareLinear "
        "Params4bit StableEmbedding"
    )
    assert set(published.split()) <= set(bnb.nn.__all__)
    assert all(isinstance(getattr(bnb.nn, name), type) for name in published.split())
