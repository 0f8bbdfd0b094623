"""Under FSDP a 4-bit weight is a plain tensor of codes. What the module remembers of it is complete, saved and loaded."""

import os
import socket
import traceback

import pytest
import torch
from torch import nn
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

import bitsandbytes as bnb

WORLD = 2
FULL = StateDictOptions(full_state_dict=True)
BROADCAST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
IDS = torch.arange(24).view(4, 6)
KINDS = {
    "uint8, nested": dict(nested=True, quant_storage=torch.uint8),
    "bfloat16": dict(nested=False, quant_storage=torch.bfloat16),
}


def build(kind, seed=0):
    options = dict(KINDS[kind])
    nested = options.pop("nested")
    torch.manual_seed(seed)
    model = nn.Sequential(
        bnb.nn.EmbeddingNF4(40, 64, **options),
        bnb.nn.LinearNF4(64, 96, compress_statistics=nested, **options),
        nn.Tanh(),
        nn.Linear(96, 7),
    ).to("cpu")
    for parameter in (model[0].weight, *model[1].parameters()):
        parameter.requires_grad_(False)
    return model.train()


def sharded(kind, seed=0):
    model = build(kind, seed)
    for layer in model[:2]:
        fully_shard(layer)
    return fully_shard(model)


def output(model):
    return model(IDS).detach()


def bits(value):
    """Codes in floating-point storage may spell NaN; JSON may end in spaces."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def same_entries(found, expected):
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is torch.Tensor, key
        entry = found[key][: value.numel()] if "bitsandbytes__" in key else found[key]
        assert torch.equal(bits(entry), bits(value)), key


# ------------------------------------------------------------------------------------------------------------ two processes


def fsdp2_saves_everything(kind, folder):
    state = get_model_state_dict(sharded(kind), options=FULL)
    if dist.get_rank() == 0:
        same_entries(state, build(kind).state_dict())


def fsdp2_loads_a_full_state(kind, folder):
    expected = output(sharded(kind))
    target = sharded(kind, seed=5)
    state = build(kind).state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(target, state, options=BROADCAST)
    torch.testing.assert_close(output(target), expected)
    for layer in target[:2]:
        assert layer.quant_state is not None and not isinstance(layer.quant_state.absmax, dist.tensor.DTensor)


def fsdp2_goes_through_a_sharded_checkpoint(kind, folder):
    source, target = sharded(kind), sharded(kind, seed=5)
    dcp.save(get_model_state_dict(source), checkpoint_id=os.path.join(folder, "checkpoint"))
    state = get_model_state_dict(target)
    dcp.load(state, checkpoint_id=os.path.join(folder, "checkpoint"))
    set_model_state_dict(target, state)
    torch.testing.assert_close(output(target), output(source))


SCENARIOS = [fsdp2_saves_everything, fsdp2_loads_a_full_state, fsdp2_goes_through_a_sharded_checkpoint]


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for scenario in SCENARIOS:
        for kind in KINDS:
            try:
                place = os.path.join(folder, f"{scenario.__name__}-{kind}")
                os.makedirs(place, exist_ok=True)
                scenario(kind, place)
                failure = None
            except Exception:
                failure = traceback.format_exc()
            failures = [None] * WORLD
            dist.all_gather_object(failures, failure)
            results[scenario.__name__, kind] = "\n".join(filter(None, failures))
    if rank == 0:
        torch.save(results, os.path.join(folder, "results"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("fsdp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(worker, args=(port, folder), nprocs=WORLD)
    return torch.load(os.path.join(folder, "results"), weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_two_processes(failures, scenario, kind):
    failure = failures[scenario.__name__, kind]
    assert not failure, failure


# ------------------------------------------------------------------------------------------------------------- one process


def stripped(layer):
    """The layer as FSDP leaves it: a plain parameter with the codes."""
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    return layer


@pytest.mark.parametrize("nested", [True, False])
def test_a_recovered_weight_knows_how_it_was_quantized(nested):
    layer = stripped(bnb.nn.LinearNF4(64, 96, compress_statistics=nested, quant_storage=torch.bfloat16).to("cpu").train())
    layer(torch.randn(2, 64))
    weight = layer.weight
    assert isinstance(weight, bnb.nn.Params4bit) and weight.bnb_quantized
    found = (weight.quant_type, weight.blocksize, weight.compress_statistics, weight.quant_storage, weight.module)
    assert found == ("nf4", 64, nested, torch.bfloat16, layer)


def test_a_recovered_weight_is_quantized_again_by_its_own_recipe():
    """What PEFT does when it merges an adapter."""
    layer = stripped(bnb.nn.LinearNF4(64, 96, compress_statistics=False).to("cpu").train())
    layer(torch.randn(2, 64))
    dense = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    options = {**layer.weight.__dict__, "quant_state": None, "bnb_quantized": False}
    again = bnb.nn.Params4bit(dense, requires_grad=False, **options).to("cpu")
    assert again.quant_state.quant_type == "nf4" and not again.quant_state.nested
    assert torch.equal(bnb.functional.dequantize_4bit(again.data, again.quant_state), dense)


def test_a_table_is_recovered():
    table = bnb.nn.EmbeddingNF4(40, 64).to("cpu")
    expected = table(IDS)
    assert torch.equal(stripped(table)(IDS), expected)


def test_a_layer_without_its_parameter_class_is_saved_and_loaded():
    make = lambda seed: (torch.manual_seed(seed), bnb.nn.LinearNF4(64, 96).to("cpu").train())[1]  # noqa: E731
    source, target = make(0), stripped(make(5))
    same_entries(stripped(make(0)).state_dict(), source.state_dict())
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, 64, requires_grad=True)
    assert torch.equal(target(x), source(x))


def test_a_float_weight_is_not_taken_for_codes():
    layer = bnb.nn.LinearNF4(64, 96).to("cpu")
    layer.weight = nn.Parameter(torch.randn(96, 64), requires_grad=False)
    assert layer.state_dict().keys() == {"weight", "bias"}
